"""The items that a pipeline reads: questions with images, answers and responses."""

import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mpo_ext.chat import IMAGE_PLACEHOLDER, load_image
from mpo_ext.checks import check_json
from mpo_ext.data.jsonl import FieldError
from mpo_ext.data.mmpr import read_meta, resolve_image
from mpo_ext.data.records import SOURCE, find_url

WRONG_SAMPLE = "wrong sample"  # what ``chosen_source`` says of a chosen response that is known to be wrong


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A question to make pairs from.

    Attributes:
        question: May hold ``<image>`` where an image belongs.
        images: As the input names them.
        chosen: A response to prefer, for DropoutNTP.
        truths: The true answers, any of which is right; most items have one.
        extra: What else the input says of it.
        image_root: Folder that relative image paths start from.
        subset: Name of its subset where it comes from a meta file; its pairs then have absolute images, and remember
            subset and root. Those of other items have images that start at the folder of the written file.
        problem: Why the item cannot be used.
    """

    question: str = ""
    images: tuple[str, ...] = ()
    chosen: str | None = None
    truths: tuple[str, ...] = ()
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    image_root: str = ""
    subset: str | None = None
    problem: str | None = None

    @property
    def pair_images(self) -> tuple[str, ...]:
        """The images as the input names them, but absolute where a subset has a root."""
        if self.subset is None:
            return self.images
        return tuple(os.path.join(self.image_root, image) for image in self.images)

    @property
    def pair_extra(self) -> dict[str, Any]:
        """What the pairs of the item keep of it beside their own fields."""
        if self.subset is None:
            return dict(self.extra)
        return {**self.extra, SOURCE: {"subset": self.subset, "root": self.image_root}}

    @property
    def answer_gt(self) -> str | None:
        """The first of the true answers."""
        return self.truths[0] if self.truths else None

    @property
    def digest(self) -> str:
        """Names the item by its content, wherever it stands in the input."""
        content = (self.question, self.images, self.chosen, self.truths, self.problem)
        return hashlib.blake2b(repr(content).encode(errors="surrogatepass"), digest_size=8).hexdigest()

    def load_images(self) -> tuple[Any, ...]:
        """Opens the images.

        Raises:
            OSError: If one is missing or cannot be read.
        """
        return tuple(load_image(Path(self.image_root, image)) for image in self.images)

    @classmethod
    def from_dict(cls, values: Any, *, image_root: str = "", subset: str | None = None) -> "Item":
        """Reads an item; one that cannot be used says so in ``problem``.

        Args:
            values: ``question``; ``image`` or ``images``, a path or a list of them; ``chosen``; ``answer_gt`` or
                ``answer``. All else is kept as ``extra``.
            image_root: As in the class.
            subset: As in the class. Its images must stay below ``image_root``.
        """
        if not isinstance(values, Mapping):
            return cls(problem="unreadable line")
        try:
            check_json("item", dict(values))
        except (TypeError, ValueError):
            return cls(problem="unreadable line")
        rest = dict(values)
        source = rest.pop(SOURCE, None)
        question, chosen = rest.pop("question", None), rest.pop("chosen", None)
        images = rest.pop("images", None) or rest.pop("image", None) or ()
        images = (images,) if isinstance(images, str) else images
        answer = rest.pop("answer_gt", None)
        answer = rest.pop("answer", None) if answer is None else answer
        truths = answer if isinstance(answer, (list, tuple)) else () if answer is None else (answer,)
        rest.pop("rejected", None)
        for key in ("image", "images"):
            rest.pop(key, None)
        problem = None
        if subset is None:
            subset, image_root = _known_subset(source, images, image_root)
        if not isinstance(question, str) or not question.strip():
            problem = "no question"
        elif not isinstance(images, (list, tuple)) or not all(map(_is_path, images)):
            problem = "images are no paths"
        elif any(map(find_url, images)):
            problem = "images are URLs, which are not fetched: download them first"
        elif subset is not None and not all(_is_inside(image, image_root) for image in images):
            problem = "image outside the root of its subset"
        elif question.count(IMAGE_PLACEHOLDER) not in {0, len(images)}:
            problem = f"number of {IMAGE_PLACEHOLDER} is not that of the images"
        if problem is not None:
            return cls(question=str(question), problem=problem)
        return cls(
            question=str(question),
            images=tuple(images),
            chosen=chosen if isinstance(chosen, str) and chosen.strip() else None,
            truths=tuple(map(str, truths)),
            extra=rest,
            image_root=image_root,
            subset=subset,
        )

    def to_dict(self) -> dict[str, Any]:
        """The item as ``from_dict`` reads it."""
        values: dict[str, Any] = {"image": list(self.pair_images)} if self.images else {}
        values["question"] = self.question
        if self.chosen is not None:
            values["chosen"] = self.chosen
        if self.truths:
            values["answer_gt"] = self.truths[0] if len(self.truths) == 1 else list(self.truths)
        return {**values, **self.pair_extra}


@dataclasses.dataclass(frozen=True, slots=True)
class ItemFile:
    """A file of items.

    Attributes:
        path: The file, one JSON object a line.
        image_root: Folder that relative image paths start from.
        subset: Its name in the meta file that names it; None where there is none.
    """

    path: str
    image_root: str = ""
    subset: str | None = None


def item_files(
    source: str | Path, *, image_root: str = "", root_map: Sequence[tuple[str, str]] = ()
) -> tuple[ItemFile, ...]:
    """The files of items that a source stands for: itself, or the annotations of a meta file (.json) as in MMPR.

    Args:
        source: A JSONL file, or a meta file.
        image_root: Folder that relative image paths start from; a meta file has its own.
        root_map: Pairs of prefixes (old, new): where the folders in a meta file have moved to.

    Raises:
        OSError: If the meta file cannot be read.
        ValueError: If it is none, or an argument does not belong to the kind of the source.
    """
    if Path(source).suffix != ".json":
        if root_map:
            raise ValueError(f"root_map must be left out unless source is a meta file (.json), got {root_map}")
        return (ItemFile(str(source), image_root),)
    if image_root:
        raise ValueError(
            f"image_root must be left out for a meta file, which has roots of its own, got {image_root!r}"
        )
    return tuple(ItemFile(one.annotation, one.root, one.name) for one in read_meta(source, root_map=root_map))


def read_items(files: Sequence[ItemFile]) -> Iterator[Item]:
    """Yields the items of files in their order; a line that cannot be read is an item with a ``problem``."""
    for each in files:
        with open(each.path, "rb") as file:
            for line in file:
                if not line.strip():
                    continue
                try:
                    values = json.loads(line)
                except ValueError:
                    values = None
                yield Item.from_dict(values, image_root=each.image_root, subset=each.subset)


def _is_path(image: object) -> bool:
    return isinstance(image, str) and image != "" and "\0" not in image


def _known_subset(source: object, images: object, image_root: str) -> tuple[str | None, str]:
    """The subset and root that a line written here remembers; it does so where its images are absolute."""
    subset, root = (source.get("subset"), source.get("root")) if isinstance(source, dict) else (None, None)
    if not isinstance(subset, str) or not isinstance(root, str) or not isinstance(images, (list, tuple)):
        return None, image_root
    if not all(_is_path(image) and os.path.isabs(image) and _is_inside(image, root) for image in images):
        return None, image_root
    return subset, root


def _is_inside(image: str, root: str) -> bool:
    try:
        resolve_image(image, root)
    except FieldError:
        return False
    return True


def take(files: Sequence[ItemFile], limit: int | None) -> Iterator[Item]:
    """The items of a run."""
    return itertools.islice(read_items(files), limit)


def scan(files: Sequence[ItemFile]) -> tuple[str, int]:
    """Digest of files and their subsets, wherever they stand, and how many of their lines are not blank."""
    digest, lines = hashlib.blake2b(digest_size=16), 0
    for each in files:
        if each.subset is not None:
            digest.update(repr(each.subset).encode(errors="surrogatepass"))
        with open(each.path, "rb") as file:
            for line in file:
                digest.update(line)
                lines += bool(line.strip())
    return digest.hexdigest(), lines
