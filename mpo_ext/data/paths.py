"""Paths of images: URLs, folders that have moved, and the folder that relative paths start at."""

import dataclasses
import functools
import os
import re
from collections.abc import Sequence

from mpo_ext.data.records import SOURCE, Pair

RootMap = Sequence[tuple[str, str]]
_URL = re.compile(r"(?:^|/)((?:(?:https?|ftp|s3|gs|hf)://|data:image/).+)", re.IGNORECASE | re.DOTALL)

real_path = functools.lru_cache(maxsize=64)(os.path.realpath)


def find_url(path: str) -> str | None:
    """Returns the URL that is given as the path of an image, with or without a root before it; None for a path."""
    match = _URL.search(path)
    return None if match is None else match.group(1)


def parse_root_map(text: str) -> tuple[str, str]:
    """Parses OLD=NEW.

    Raises:
        ValueError: If "=" or one of its sides is missing.
    """
    old, equals, new = text.partition("=")
    if not equals or not old or not new:
        raise ValueError(f"root_map must read OLD=NEW, got {text!r}")
    return old, new


def map_root(path: str, root_map: RootMap) -> str:
    """Replaces the first prefix in ``root_map`` that is the path or a folder above it."""
    for old, new in root_map:
        prefix = old.rstrip("/")
        if path.rstrip("/") == prefix:
            return new
        if path.startswith(prefix + "/"):
            return new.rstrip("/") + path[len(prefix) :]
    return path


def map_roots(pair: Pair, root_map: RootMap) -> Pair:
    """Returns the pair with ``map_root`` applied to its images and to the root of its subset."""
    if not root_map:
        return pair
    extra, root = pair.extra, pair.source.get("root")
    if isinstance(root, str):
        extra = {**extra, SOURCE: {**pair.source, "root": map_root(root, root_map)}}
    return dataclasses.replace(pair, images=tuple(map_root(image, root_map) for image in pair.images), extra=extra)


def absolute_path(image: str, root: str) -> str:
    """Joins the path of an image to a root; a URL stays as it is.

    A leading ``..`` starts at the real folder of the root, so that an image has the same path from every folder that
    names it.
    """
    if find_url(image):
        return image
    if not image.startswith("../"):
        return os.path.join(root, image)
    root = real_path(root)
    while image.startswith("../"):
        root, image = os.path.dirname(root), image[3:]
    return os.path.join(root, image)


def path_from(folder: str, path: str) -> str:
    """Returns a path relative to a folder if it lies below the folder, and the path itself otherwise."""
    inside = os.path.relpath(path, folder)
    return path if inside.startswith("..") or find_url(path) else inside.replace(os.sep, "/")


def below(path: str, root: str) -> str | None:
    """Returns the part of a path below a root, or None if the path does not start with the root."""
    prefix = root if root.endswith("/") else root + "/"
    return path[len(prefix) :] if path.startswith(prefix) else None
