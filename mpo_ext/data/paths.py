"""Converts image paths: replaces folders that have moved, and makes paths absolute or relative."""

import dataclasses
import functools
import os
from collections.abc import Sequence

from mpo_ext.data.records import SOURCE, Pair
from mpo_ext.images import is_url, local_path

RootMap = Sequence[tuple[str, str]]

real_path = functools.lru_cache(maxsize=64)(os.path.realpath)


def parse_root_map(text: str) -> tuple[str, str]:
    """Splits a text OLD=NEW into the path prefixes (OLD, NEW). Raises ValueError if "=", OLD or NEW is missing."""
    old, equals, new = text.partition("=")
    if not equals or not old or not new:
        raise ValueError(f"root_map must read OLD=NEW, got {text!r}")
    return old, new


def map_root(path: str, root_map: RootMap) -> str:
    """Replaces the folder at the beginning of a path. ``root_map`` holds tuples (old folder, new folder).

    A tuple matches if the path is the old folder, or is inside the old folder. The first match is used. Without a
    match, the path is returned unchanged.
    """
    for old, new in root_map:
        prefix = old.rstrip("/")
        if path.rstrip("/") == prefix:
            return new
        if path.startswith(prefix + "/"):
            return new.rstrip("/") + path[len(prefix) :]
    return path


def map_roots(pair: Pair, root_map: RootMap) -> Pair:
    """Applies ``map_root`` to all media paths of a pair, and to the image folder in ``extra["$source"]["root"]``."""
    if not root_map:
        return pair
    extra, root = pair.extra, pair.source.get("root")
    if isinstance(root, str):
        extra = {**extra, SOURCE: {**pair.source, "root": map_root(root, root_map)}}
    moved = pair.map_paths(lambda path: map_root(local_path(path), root_map))
    return dataclasses.replace(moved, extra=extra)


def absolute_path(image: str, root: str) -> str:
    """Joins an image path to the folder ``root``. A ``file://`` URL becomes a path. Other URLs are returned unchanged.

    If the path begins with ``..``, symbolic links in ``root`` are resolved first.
    """
    image = local_path(image)
    if is_url(image):
        return image
    if not image.startswith("../"):
        return os.path.join(root, image)
    root = real_path(root)
    while image.startswith("../"):
        root, image = os.path.dirname(root), image[3:]
    return os.path.join(root, image)


def path_from(folder: str, path: str) -> str:
    """Returns a path relative to ``folder``. URLs, and paths outside the folder, are returned unchanged."""
    if is_url(path):
        return path
    inside = os.path.relpath(path, folder)
    return path if inside.startswith("..") else inside.replace(os.sep, "/")


def below(path: str, root: str) -> str | None:
    """Returns the part of a path after the folder ``root``, or None if the path does not begin with this folder."""
    prefix = root if root.endswith("/") else root + "/"
    return path[len(prefix) :] if path.startswith(prefix) else None
