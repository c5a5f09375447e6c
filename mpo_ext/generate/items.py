"""Reads items: questions with images, videos, answers and responses, for the pipelines and the evaluation."""

import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mpo_ext.answers import label_options
from mpo_ext.chat import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER
from mpo_ext.checks import check_json, is_nested_deeply
from mpo_ext.data.containers import as_lines
from mpo_ext.data.hub import describe_folder
from mpo_ext.data.jsonl import UNREADABLE
from mpo_ext.data.messages import turns_text, with_question
from mpo_ext.data.mmpr import read_meta, resolve_image
from mpo_ext.data.paths import absolute_path
from mpo_ext.data.reader import FieldError
from mpo_ext.data.records import PROMPT_TOOLS, PROMPT_TURNS, SOURCE, Pair
from mpo_ext.generate.item_forms import FormError, read_fields
from mpo_ext.generate.item_options import shows_options
from mpo_ext.generate.item_rows import count_rows, read_rows
from mpo_ext.generate.item_turns import NO_QUESTION
from mpo_ext.images import is_data_url, is_remote, is_url, load_image
from mpo_ext.videos import Video, load_video

_MAX_NAMES = 500  # maximum length of the names of fields in a message
_IMAGE_PROBLEM, _VIDEO_PROBLEM = "image cannot be read", "video cannot be read"
MEDIA_PROBLEMS = {_IMAGE_PROBLEM, _VIDEO_PROBLEM}  # the results of ``media_problem``
WRONG_SAMPLE = "wrong sample"  # the ``chosen_source`` of a chosen response that is known to be wrong


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A question from which pairs are made, or with which a model is evaluated.

    Attributes:
        question: The question, or the last user turn of a conversation. It may hold the placeholders ``<image>`` and
            ``<video>``.
        messages: All turns of a multi-turn prompt, as in ``mpo_ext.chat.Conversation``; otherwise empty.
        tools: The functions that the assistant may call, as in ``Conversation``.
        images: Image paths as in the input. If the input holds the image itself, a data URL takes the place of the
            path.
        videos: Videos, with paths as in the input.
        chosen: Preferred response, an input of DropoutNTP; None if the item has no such response.
        truths: True answers, each of which counts as right.
        extra: Other fields of the input line. The field ``options`` is a list of texts, or a dict from letter to text.
        image_root: Folder to which relative image paths are joined.
        subset: Name of the item's data set in an MMPR meta file (a JSON file that lists data sets). None without such
            a file. With a data set, the item's pairs store ``subset`` and ``image_root``. The paths of images and
            videos in the pairs are then absolute.
        problem: Reason why the item cannot be used, or None.
        detail: Further explanation of ``problem``, or None.
    """

    question: str = ""
    messages: tuple[Mapping[str, Any], ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    images: tuple[str, ...] = ()
    videos: tuple[Video, ...] = ()
    chosen: str | None = None
    truths: tuple[str, ...] = ()
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    image_root: str = ""
    subset: str | None = None
    problem: str | None = None
    detail: str | None = None

    @property
    def pair_images(self) -> tuple[str, ...]:
        """Image paths for pairs: the paths of the input, or absolute paths if ``subset`` is set."""
        if self.subset is None:
            return self.images
        return self.image_sources

    @property
    def image_sources(self) -> tuple[str, ...]:
        """Images as arguments of ``load_image``: URLs, and paths joined to ``image_root``."""
        return tuple(absolute_path(image, self.image_root) for image in self.images)

    @property
    def video_sources(self) -> tuple[Video, ...]:
        """Videos in the form that ``load_video`` reads, with paths joined to ``image_root``."""
        return tuple(video.map_paths(lambda path: absolute_path(path, self.image_root)) for video in self.videos)

    @property
    def pair_videos(self) -> tuple[Video, ...]:
        """The videos of the item, as they are stored in pairs.

        If ``subset`` is set, the paths of the videos are absolute. Otherwise, they are the paths in the input.
        """
        return self.videos if self.subset is None else self.video_sources

    @property
    def question_with_options(self) -> str:
        """The question, followed by its options, one per line.

        A question that already shows the options is unchanged.
        """
        options = self.options
        if options is None or shows_options(self.question, self.extra["options"]):
            return self.question
        return "\n".join([self.question, *(f"{letter}. {text}" for letter, text in options)])

    def turns(self, question: str) -> tuple[Mapping[str, Any], ...]:
        """Returns a copy of ``messages`` in which ``question`` is the content of the last user turn.

        Returns () if ``messages`` is empty.
        """
        return tuple(with_question(self.messages, question)) if self.messages else ()

    @property
    def prompt_text(self) -> str:
        """The prompt as readable text: the tools, followed by all turns.

        If ``messages`` is empty, the question is the only turn. The question is shown with its options.
        """
        question = self.question_with_options
        return turns_text(self.turns(question) or None, self.tools, question)

    @property
    def options(self) -> tuple[tuple[str, str], ...] | None:
        """The letter and the text of each option; None if the item has no options."""
        options = self.extra.get("options")
        return None if options is None else tuple(label_options(options).items())

    @property
    def pair_extra(self) -> dict[str, Any]:
        """The extra fields that are stored in pairs.

        These are the fields of ``extra``. If ``subset`` is set, ``"$source"`` holds ``subset`` and ``image_root``.
        """
        if self.subset is None:
            return dict(self.extra)
        return {**self.extra, SOURCE: {"subset": self.subset, "root": self.image_root}}

    @property
    def answer_gt(self) -> str | None:
        """The first true answer; None if the item has no true answer."""
        return self.truths[0] if self.truths else None

    @property
    def digest(self) -> str:
        """Hash of the item's content without ``extra`` and ``image_root``. The position in the input has no effect."""
        content: tuple[Any, ...] = (self.question, self.images, self.chosen, self.truths, self.problem)
        content += (self.videos,) if self.videos else ()
        if self.messages or self.tools:
            content += (json.dumps([self.messages, self.tools], sort_keys=True),)
        return hashlib.blake2b(repr(content).encode(errors="surrogatepass"), digest_size=8).hexdigest()

    def pair(self, question: str, chosen: str, rejected: str, provenance: dict[str, Any]) -> Pair:
        """Returns a preference pair of two responses to this item.

        The pair has the images, the videos, the first true answer and the extra fields of the item.

        Args:
            question: Text of the last user turn. The pair also records the earlier turns and the tools of the item.
            chosen: The preferred response.
            rejected: The dispreferred response.
            provenance: Fields that record how the pair was made, such as the pipeline and the seed.
        """
        extra = self.pair_extra
        if chosen != self.chosen:
            extra.pop("chosen_source", None)  # it describes the chosen response of the input
        prompt: dict[str, Any] = {PROMPT_TURNS: list(map(dict, turns))} if (turns := self.turns(question)) else {}
        if self.tools:
            prompt[PROMPT_TOOLS] = list(map(dict, self.tools))
        if prompt:
            extra[SOURCE] = {**extra.get(SOURCE, {}), **prompt}
        return Pair(question, chosen, rejected, self.pair_images, self.answer_gt, provenance, extra, self.pair_videos)

    def load_media(self) -> dict[str, Any]:
        """Loads the images and videos, and returns them as keyword arguments for ``Conversation``.

        Raises:
            FileNotFoundError: If a file is missing.
            ImageError: If a file cannot be read.
        """
        videos = tuple(map(load_video, self.video_sources))
        return {"images": tuple(map(load_image, self.image_sources)), "videos": videos}

    @classmethod
    def from_dict(
        cls, values: Any, *, image_root: str = "", subset: str | None = None, system: str | None = None
    ) -> "Item":
        """Builds an item from a parsed input line. If the line cannot be used, the item's ``problem`` says why.

        Args:
            values: A dict with ``question`` or ``messages``. The optional fields are ``image``, ``images``, ``video``,
                ``videos``, ``chosen``, ``answer_gt``, ``answer``, ``options``, ``system``, ``history`` and ``tools``.
                Each of ``image`` and ``images`` holds a path or a list of paths. The function
                ``mpo_ext.data.row_media.row_videos`` describes the values of ``video`` and ``videos``. ``item_forms``
                lists further accepted formats. All other fields become ``extra``, except ``rejected`` and
                ``"$source"``.
            image_root: Folder of relative image paths.
            subset: Name of the data set in an MMPR meta file. All images and videos must then be inside
                ``image_root``. None: the line does not come from a meta file.
            system: System prompt for an item without a system prompt; None: no system prompt.
        """
        if not isinstance(values, Mapping) or is_nested_deeply(values):
            return cls(problem="unreadable line")
        if UNREADABLE in values:
            return cls(problem=str(values[UNREADABLE]))
        source = values.get(SOURCE)
        try:
            fields = read_fields({key: value for key, value in values.items() if key != SOURCE})
        except FormError as error:
            detail = _no_question(values) if str(error) == NO_QUESTION else None
            return cls(question=str(values.get("question")), problem=str(error), detail=detail)
        question, images, chosen = fields.question, fields.images, fields.chosen
        if not isinstance(question, str) or not question.strip():
            return cls(question=str(question), problem=NO_QUESTION, detail=_no_question(values))
        try:
            check_json(
                "item",
                {**fields.extra, "question": question, "chosen": chosen,
                 "": [fields.truths, fields.turns, fields.tools]},
            )  # fmt: skip
        except (TypeError, ValueError):
            return cls(problem="unreadable line")
        paths = [*images, *(path for video in fields.videos for path in video.paths)]
        if subset is None:
            subset, image_root = _remembered_subset(source, paths, image_root)
        options = fields.extra.get("options") or ()
        texts = [turn["content"] for turn in fields.turns] or [question]
        if options and not shows_options(question, options):
            texts += options.values() if isinstance(options, dict) else options
        text = "".join(texts)
        problem = None
        if not all(map(_is_path, images)):
            problem = "images are no paths"  # words: ignore (journals hold this text)
        elif any(map(is_remote, paths)) and not any(map(is_remote, images)):
            problem = "videos are URLs, which are not fetched: download them first"
        elif any(map(is_remote, images)):
            problem = "images are URLs, which are not fetched: download them first"
        elif subset is not None and not all(_is_inside(path, image_root) for path in paths):
            problem = "image outside the root of its subset"
        elif text.count(IMAGE_PLACEHOLDER) not in {0, len(images)}:
            problem = f"number of {IMAGE_PLACEHOLDER} is not that of the images"
        elif text.count(VIDEO_PLACEHOLDER) not in {0, len(fields.videos)}:
            problem = f"number of {VIDEO_PLACEHOLDER} is not that of the videos"
        if problem is not None:
            return cls(question=question, problem=problem)
        turns = fields.turns
        if system is not None and not any(turn["role"] in ("system", "developer") for turn in turns):
            turns = [{"role": "system", "content": system}, *(turns or [{"role": "user", "content": question}])]
        return cls(
            question=question,
            messages=tuple(turns),
            tools=tuple(fields.tools),
            images=tuple(images),
            videos=tuple(fields.videos),
            chosen=chosen if isinstance(chosen, str) and chosen.strip() else None,
            truths=tuple(fields.truths),
            extra=fields.extra,
            image_root=image_root,
            subset=subset,
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the item as a dict that ``from_dict`` reads."""
        values: dict[str, Any] = {"image": list(self.pair_images)} if self.images else {}
        if self.videos:
            values["videos"] = [video.to_value() for video in self.pair_videos]
        if self.messages:
            values["messages"] = list(map(dict, self.turns(self.question)))
        else:
            values["question"] = self.question
        if self.tools:
            values["tools"] = list(map(dict, self.tools))
        if self.chosen is not None:
            values["chosen"] = self.chosen
        if self.truths:
            values["answer_gt"] = self.truths[0] if len(self.truths) == 1 else list(self.truths)
        return {**values, **self.pair_extra}


@dataclasses.dataclass(frozen=True, slots=True)
class ItemFile:
    """A file of items, and how to read it.

    Attributes:
        path: Path of the file.
        image_root: Folder to which relative image paths are joined.
        subset: Name of the data set in the MMPR meta file that lists this file; None without a meta file.
        system: System prompt for items without a system prompt; None: no system prompt.
    """

    path: str
    image_root: str = ""
    subset: str | None = None
    system: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class ItemSource:
    """The items of a run, opened by ``open_items``.

    Attributes:
        files: The files of items, in order.
        digest: Hash of the files' contents. With a meta file, the names of its data sets are hashed, too. Paths have
            no effect.
        count: Number of items in the run.
        system: System prompt for items without a system prompt; None: no system prompt.
    """

    files: tuple[ItemFile, ...]
    digest: str
    count: int
    system: str | None = None

    def settings(self) -> dict[str, Any]:
        """Returns a dict of JSON values: the digest of the input and, if there is one, the system prompt.

        A resumed run must have the same values as its first start.
        """
        return {"blake2b": self.digest, **({} if self.system is None else {"system": self.system})}

    def items(self) -> Iterator[Item]:
        """Yields the items of the run in the order of the input."""
        return itertools.islice(read_items(self.files), self.count)


def open_items(
    source: str | Path,
    *,
    image_root: str = "",
    root_map: Sequence[tuple[str, str]] = (),
    system: str | None = None,
    limit: int | None = None,
) -> ItemSource:
    """Opens the files of a source, counts their items and hashes their contents.

    Args:
        source: See ``item_files``.
        image_root: See ``item_files``.
        root_map: See ``item_files``.
        system: See ``item_files``.
        limit: Maximum number of items, taken from the beginning; None: all items.

    Raises:
        OSError: If a file is missing or cannot be read.
        ValueError: If the format of a file is not supported, or an argument does not fit the source.
    """
    files = item_files(source, image_root=image_root, root_map=root_map, system=system)
    digest, count = hashlib.blake2b(digest_size=16), 0
    for item_file in files:
        if item_file.subset is not None:
            digest.update(repr(item_file.subset).encode(errors="surrogatepass"))
        count += count_rows(item_file.path, digest)
    return ItemSource(files, digest.hexdigest(), count if limit is None else min(count, limit), system)


def item_files(
    source: str | Path,
    *,
    image_root: str = "",
    root_map: Sequence[tuple[str, str]] = (),
    system: str | None = None,
) -> tuple[ItemFile, ...]:
    """Returns the item files of a source: all files that an MMPR meta file lists, or the source itself.

    Args:
        source: Path of an item file (JSON lines, JSON array, TSV, CSV or Parquet), or path of an MMPR meta file. A
            meta file is a JSON object that lists item files and their image folders.
        image_root: Folder to which relative image paths are joined. Must be empty for a meta file.
        root_map: Tuples (old, new) for a meta file: paths in the folder ``old`` are looked up in the folder ``new``.
            Must be empty without a meta file.
        system: System prompt for items without a system prompt; None: no system prompt.

    Raises:
        OSError: If the source does not exist, or the meta file cannot be read.
        ValueError: If the source is a folder, the meta file is invalid, or another argument does not fit the source.
    """
    if system is not None and (not isinstance(system, str) or not system.strip()):
        raise ValueError(f"system must be a text, got {system!r}")
    if os.path.isdir(source):
        raise ValueError(f"path must be a file of items or questions, got {describe_folder(source)}")
    if not os.path.exists(source):
        raise FileNotFoundError(f"path must be a file of items or questions, got {source}: it does not exist")
    if not is_meta(source):
        if root_map:
            raise ValueError(f"root_map must be left out unless source is a meta file (.json), got {root_map}")
        return (ItemFile(str(source), image_root, system=system),)
    if image_root:
        raise ValueError(f"image_root must be left out for a meta file, which names its own roots, got {image_root!r}")
    return tuple(
        ItemFile(subset.annotation, subset.root, subset.name, system)
        for subset in read_meta(source, root_map=root_map)
    )


def is_meta(source: str | os.PathLike[str]) -> bool:
    """Returns whether a file is an MMPR meta file, which lists data sets: a .json file that is not a JSON array.

    Raises ValueError for a meta file that is not in UTF-8.
    """
    if Path(source).suffix != ".json" or not os.path.exists(source):
        return False
    with open(source, "rb") as file:
        head = file.read(1 << 12)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in head:
        return as_lines(str(source)) is None
    return head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] != b"["


def read_items(files: Sequence[ItemFile]) -> Iterator[Item]:
    """Yields the items of all files in order. An unreadable row becomes an item with a ``problem``."""
    for item_file in files:
        for values in read_rows(item_file.path):
            yield Item.from_dict(
                values, image_root=item_file.image_root, subset=item_file.subset, system=item_file.system
            )


def media_problem(error: Exception) -> str:
    """Returns the ``problem`` of an item after an error of ``load_media``."""
    return _VIDEO_PROBLEM if str(error).startswith("video") else _IMAGE_PROBLEM


def _no_question(values: Mapping[str, Any]) -> str:
    """Returns the ``detail`` of an item without a question. The text lists the field names of the row."""
    names = ", ".join(map(repr, values)) or "none"
    names = names if len(names) <= _MAX_NAMES else f"{names[:_MAX_NAMES]} ..."
    return f"the question must be in 'question', or in 'messages'; the fields are {names}"


def _is_path(image: object) -> bool:
    return isinstance(image, str) and image != "" and "\0" not in image


def _remembered_subset(source: object, images: object, image_root: str) -> tuple[str | None, str]:
    """Returns (name of the data set, image folder) from a line that an earlier run wrote.

    The earlier run had an MMPR meta file. The run stored the name and the folder in ``source``, the field
    ``"$source"`` of the line. ``images`` are the paths of the line's images and videos.

    If the name or the folder is missing, returns (None, ``image_root``). If a path is relative or outside the folder,
    also returns (None, ``image_root``).
    """
    subset, root = (source.get("subset"), source.get("root")) if isinstance(source, dict) else (None, None)
    if not isinstance(subset, str) or not isinstance(root, str) or not isinstance(images, (list, tuple)):
        return None, image_root
    if not all(_is_path(image) and _is_absolute(image) and _is_inside(image, root) for image in images):
        return None, image_root
    return subset, root


def _is_absolute(image: str) -> bool:
    return os.path.isabs(image) or is_url(image)


def _is_inside(image: str, root: str) -> bool:
    if is_data_url(image):
        return True
    try:
        resolve_image(image, root)
    except FieldError:
        return False
    return True
