"""Pairs in TRL's preference format, as rows and as Hugging Face datasets, without loss in either direction.

TRL's own columns are ``prompt``, ``chosen``, ``rejected`` and ``images``. Beside them stand

- ``answer_gt`` (text or null),
- ``image_paths`` (list of texts; only in datasets, whose ``images`` may hold bytes without a path),
- ``question`` (text or null): the question, where its messages do not give it back, as with ``<image>`` in mid-line,
- ``provenance`` and ``extra``: JSON in text, since a column of a dataset has one type.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from mpo_ext.checks import install_hint
from mpo_ext.data.jsonl import (
    MAX_LINE_BYTES,
    BadLine,
    FieldError,
    LineFile,
    Location,
    Pairs,
    dump_line,
    parse_object,
    remap,
)
from mpo_ext.data.records import Pair
from mpo_ext.files import atomic_write, sync_folder, sync_tree

if TYPE_CHECKING:
    import datasets

Kind = Literal["standard", "conversational"]
PLACEHOLDER = "<image>"
_COLUMNS = ("prompt", "chosen", "rejected", "images", "answer_gt", "image_paths", "question", "provenance", "extra")
_SUFFIXES = {
    "image/jpeg": ".jpg",
    "image/png": ".png",
    "image/webp": ".webp",
    "image/gif": ".gif",
    "image/bmp": ".bmp",
}


def check_kind(kind: object) -> None:
    """Raises ValueError unless it is one of TRL's two kinds."""
    if kind not in get_args(Kind):
        raise ValueError(f"kind must be 'standard' or 'conversational', got {kind!r}")


def to_trl(pair: Pair, kind: Kind = "standard", *, structured: bool = True) -> dict[str, Any]:
    """Turns a pair into a row of TRL's preference format.

    Args:
        pair: The pair.
        kind: "standard" takes the question as the prompt, word for word. "conversational" makes a user message of it:
            each ``<image>``, with one line break behind it, becomes an image block; where their number differs from
            that of the images, all images come first and the text stays as it is.
        structured: Whether the content of the user message is a list of blocks, as image models want it, or text. Must
            be the same in all rows of a dataset.

    Returns:
        The row. ``images`` holds the paths.
    """
    check_kind(kind)
    row: dict[str, Any] = {"prompt": pair.question, "chosen": pair.chosen, "rejected": pair.rejected}
    if kind == "conversational":
        content = _blocks(pair.question, len(pair.images)) if structured else pair.question
        row = {
            "prompt": [{"role": "user", "content": content}],
            "chosen": [{"role": "assistant", "content": pair.chosen}],
            "rejected": [{"role": "assistant", "content": pair.rejected}],
        }
    row |= {"images": list(pair.images), "answer_gt": pair.answer_gt, "question": None}
    if kind == "conversational" and _question(row["prompt"][0]["content"]) != pair.question:
        row["question"] = pair.question
    row["provenance"] = json.dumps(pair.provenance, ensure_ascii=False) if pair.provenance else None
    row["extra"] = json.dumps(pair.extra, ensure_ascii=False) if pair.extra else None
    return row


def from_trl(row: Mapping[str, Any], *, save_image: Callable[[bytes], str] | None = None) -> Pair:
    """Turns a row of TRL's preference format into a pair.

    Args:
        row: With the columns that ``to_trl`` writes, or any preference row with one user message as its prompt.
            Columns nobody knows go into ``extra``.
        save_image: Stores an image that comes as bytes and returns its path.

    Raises:
        FieldError: If a column does not hold what it should. The message names it, the rule and the value.
        TypeError: If a column has the wrong type.
    """
    for name in ("prompt", "chosen", "rejected"):
        if row.get(name) is None:
            raise FieldError("bad field", f"{name} must be given, got columns {', '.join(map(repr, row))}")
    paths = row.get("image_paths")
    images = [_path(image, save_image) for image in _list("images", row.get("images"))] if paths is None else paths
    question = _prompt(row["prompt"])
    original = row.get("question")
    if isinstance(original, str) and isinstance(row["prompt"], list):
        content = row["prompt"][0]["content"]
        # A prompt that was changed since has the last word.
        if (content if isinstance(content, str) else _plain(content)) in (original, _blocks(original, len(images))):
            question = original
    extra = {name: value for name, value in row.items() if name not in _COLUMNS}
    return Pair(
        question=question,
        chosen=_response("chosen", row["chosen"]),
        rejected=_response("rejected", row["rejected"]),
        images=tuple(_list("image_paths", images)),
        answer_gt=row.get("answer_gt"),
        provenance=_json("provenance", row.get("provenance")),
        extra={**_json("extra", row.get("extra")), **extra},
    )


def _blocks(question: str, images: int) -> list[dict[str, Any]]:
    pieces = question.split(PLACEHOLDER)
    if len(pieces) - 1 != images:
        return [*[_image_block()] * images, _text_block(question)]
    blocks = [_text_block(pieces[0])] if pieces[0] or not images else []
    for piece in pieces[1:]:
        blocks.append(_image_block())
        text = piece.removeprefix("\n")
        if text:
            blocks.append(_text_block(text))
    return blocks


def _text_block(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _image_block() -> dict[str, Any]:
    return {"type": "image", "text": None}  # with every key in every block, as a column of a dataset must have it


def _plain(content: Iterable[Any]) -> list[dict[str, Any]]:
    return [_text_block(b["text"]) if b["type"] == "text" else _image_block() for b in content]


def _question(content: object) -> str:
    """The question that a user message asks: the way back from blocks."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise FieldError(
            "bad field", f"prompt must have text or a list of blocks as content, got {str(content)[:80]!r}"
        )
    parts = []
    for block in content:
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "image":
            parts.append(PLACEHOLDER + "\n")
        elif kind == "text" and isinstance(block.get("text"), str):
            parts.append(block["text"])
        else:
            raise FieldError("bad field", f"prompt must have blocks of text and images, got {str(block)[:80]!r}")
    return "".join(parts)


def _prompt(prompt: object) -> str:
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list) or not all(isinstance(message, dict) for message in prompt):
        raise FieldError("bad field", f"prompt must be text or a list of messages, got {str(prompt)[:80]!r}")
    roles = [message.get("role") for message in prompt]
    if roles != ["user"]:
        raise FieldError("bad field", f"prompt must be one message of the user, got roles {str(roles)[:80]}")
    return _question(prompt[0].get("content"))


def _response(name: str, value: object) -> str:
    if isinstance(value, str):
        return value
    message = value[0] if isinstance(value, list) and len(value) == 1 else None
    if not isinstance(message, dict) or message.get("role") != "assistant":
        raise FieldError("bad field", f"{name} must be text or one message of the assistant, got {str(value)[:80]!r}")
    content = message.get("content")
    if isinstance(content, list) and len(content) == 1 and isinstance(content[0], dict):
        content = content[0].get("text")
    if not isinstance(content, str):
        raise FieldError("bad field", f"{name} must have text as its content, got {str(content)[:80]!r}")
    return content


def _list(name: str, value: object) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, (list, tuple)):
        raise FieldError("bad field", f"{name} must be a list, got {type(value).__name__} {str(value)[:80]!r}")
    return list(value)


def _json(name: str, value: object) -> dict[str, Any]:
    if isinstance(value, str):
        value = parse_object(value)
    if value is not None and not isinstance(value, dict):
        raise FieldError(
            "bad field", f"{name} must be an object in JSON, got {type(value).__name__} {str(value)[:80]!r}"
        )
    return value or {}


def _path(image: object, save_image: Callable[[bytes], str] | None) -> str:
    if isinstance(image, str):
        return image
    if isinstance(image, dict):
        if image.get("bytes") is not None:
            if save_image is not None:
                return save_image(image["bytes"])
        elif isinstance(image.get("path"), str):
            return image["path"]
    raise FieldError("bad field", f"images must be paths unless image_dir is given, got {type(image).__name__}")


def read_trl(
    path: str | os.PathLike[str],
    *,
    root_map: Sequence[tuple[str, str]] = (),
    max_line_bytes: int = MAX_LINE_BYTES,
) -> LineFile:
    """Opens a file with one row of TRL's preference format a line, of either kind.

    Args:
        path: The file.
        root_map: Pairs of prefixes (old, new): where the images have moved to.
        max_line_bytes: A longer line is a bad one.
    """
    roots = tuple(root_map)
    return LineFile(path, lambda values, line: remap(from_trl(values), roots), max_line_bytes=max_line_bytes)


def write_trl(path: str | os.PathLike[str], pairs: Iterable[Pair], kind: Kind = "standard", **options: Any) -> int:
    """Writes one row of TRL's preference format a line, whole or not at all. Returns the number of rows."""
    count = 0
    with atomic_write(path) as file:
        for pair in pairs:
            file.write(dump_line(to_trl(pair, kind, **options)))
            count += 1
    return count


def require_datasets() -> Any:
    """Imports Hugging Face datasets.

    Raises:
        ImportError: With the command that installs it.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"Hugging Face datasets is missing: {install_hint('data')}") from error
    return datasets


def to_dataset(
    pairs: Callable[[], Iterator[Pair]] | Sequence[Pair],
    kind: Kind = "standard",
    *,
    embed: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
) -> "datasets.Dataset":
    """Builds a dataset that TRL's trainers take. It is written to disk as it is built, and mapped into memory.

    Args:
        pairs: The pairs, or what gives an iterator over them anew; they are gone through twice.
        kind: "standard" or "conversational".
        embed: Whether the bytes of the images go into the dataset; else it opens their files when a row is read.
        cache_dir: Where the dataset is built; default: a new temporary folder, which stays as long as the process.

    Returns:
        The dataset. If no pair has images it has no column ``images``, which would make TRL ask for an image model.

    Raises:
        ImportError: If Hugging Face datasets is missing.
        OSError: If an image cannot be read, with ``embed``.
    """
    datasets = require_datasets()
    check_kind(kind)
    again = pairs if callable(pairs) else lambda: iter(pairs)
    has_images = any(pair.images for pair in again())
    text = datasets.Value("string")
    content = datasets.List({"type": text, "text": text}) if has_images else text
    conversational = kind == "conversational"
    columns = {
        "prompt": datasets.List({"role": text, "content": content}) if conversational else text,
        "chosen": datasets.List({"role": text, "content": text}) if conversational else text,
        "rejected": datasets.List({"role": text, "content": text}) if conversational else text,
        **({"images": datasets.List(datasets.Image()), "image_paths": datasets.List(text)} if has_images else {}),
        **dict.fromkeys(("answer_gt", "question", "provenance", "extra"), text),
    }

    def rows() -> Iterator[dict[str, Any]]:
        for pair in again():
            row = to_trl(pair, kind, structured=has_images)
            if has_images:
                row["image_paths"] = row["images"]
                row["images"] = [_encoded(path, embed) for path in row["images"]]
            yield {name: row[name] for name in columns}

    if cache_dir is None:
        folder = tempfile.TemporaryDirectory(prefix="mpo-ext-")
        _kept.append(folder)
        cache_dir = folder.name
    try:
        return datasets.Dataset.from_generator(
            rows,
            features=datasets.Features(columns),
            cache_dir=os.fspath(cache_dir),
            fingerprint=os.urandom(8).hex(),  # else the generator, with all its pairs, is pickled to make one
            writer_batch_size=100,
        )
    except datasets.exceptions.DatasetGenerationError as error:
        raise (error.__cause__ or error) from None  # what a pair or an image really suffers from


_kept: list[tempfile.TemporaryDirectory] = []


def _encoded(path: str, embed: bool) -> dict[str, Any]:
    if not embed:
        return {"path": path, "bytes": None}
    return {"path": os.path.basename(path), "bytes": Path(path).read_bytes()}


def save_dataset(
    folder: str | os.PathLike[str], pairs: Callable[[], Iterator[Pair]] | Sequence[Pair], kind: Kind = "standard"
) -> int:
    """Writes a dataset, its images included, for ``datasets.load_from_disk``, whole or not at all.

    Args:
        folder: Where it goes. What stands there is replaced if it is a dataset or empty.
        pairs: The pairs, or what gives an iterator over them anew.
        kind: "standard" or "conversational".

    Returns:
        The number of rows.

    Raises:
        FileExistsError: If the folder holds something else.
    """
    target = Path(folder)
    if target.exists() and not (target / "state.json").exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"folder must be empty or hold a dataset, got {target}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent) as work:
        dataset = to_dataset(pairs, kind, embed=True, cache_dir=Path(work, "cache"))
        written = Path(work, "dataset")
        dataset.save_to_disk(str(written))
        sync_tree(written)
        if target.exists():
            shutil.rmtree(target)
        os.replace(written, target)
    sync_folder(target.parent)
    return len(dataset)


class DatasetPairs(Pairs):
    """The pairs of a Hugging Face dataset in TRL's preference format, read one by one.

    Args:
        dataset: The dataset.
        name: Its name in places and messages.
        image_dir: Folder for images that have bytes and no path; without it such a row is a bad one.
        root_map: Pairs of prefixes (old, new): where the images have moved to.
    """

    def __init__(
        self,
        dataset: "datasets.Dataset",
        *,
        name: str = "dataset",
        image_dir: str | os.PathLike[str] | None = None,
        root_map: Sequence[tuple[str, str]] = (),
    ) -> None:
        datasets = require_datasets()
        if "images" in dataset.features:
            dataset = dataset.cast_column("images", datasets.List(datasets.Image(decode=False)))
            if "image_paths" in dataset.features:  # then the bytes need not be read
                dataset = dataset.remove_columns("images")
        self._dataset, self._name, self._root_map = dataset, name, tuple(root_map)
        self._image_dir = None if image_dir is None else Path(image_dir)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        where = self.locate(index)
        try:
            row = self._dataset[where.line - 1]
            return remap(from_trl(row, save_image=self._save if self._image_dir else None), self._root_map)
        except FieldError as error:
            raise BadLine(where, error.kind, str(error)) from None
        except RecursionError:
            raise BadLine(where, "bad JSON", "nested too deeply") from None
        except (TypeError, ValueError) as error:
            raise BadLine(where, "bad field", str(error)) from None

    def locate(self, index: int) -> Location:
        """Says where a pair stands."""
        size = len(self)
        if not -size <= index < size:
            raise IndexError(f"index must be in [{-size}, {size}), got {index}")
        return Location(Path(self._name).name, self._name, index % size + 1)

    def _save(self, content: bytes) -> str:
        from PIL import Image

        assert self._image_dir is not None
        mime = _mime(content, Image)
        path = self._image_dir / f"{hashlib.blake2b(content, digest_size=12).hexdigest()}{_SUFFIXES.get(mime, '')}"
        if not path.exists():
            with atomic_write(path) as file:
                file.write(content)
        return str(path)


def _mime(content: bytes, image_module: Any) -> str:
    import io

    try:
        with image_module.open(io.BytesIO(content)) as image:
            return image.get_format_mimetype() or ""
    except Exception:  # a broken image is kept as it is; the check finds it
        return ""


def from_dataset(dataset: "datasets.Dataset", **options: Any) -> DatasetPairs:
    """Returns the pairs of a dataset; the options are those of DatasetPairs."""
    return DatasetPairs(dataset, **options)


def load_dataset_folder(path: str | os.PathLike[str], **options: Any) -> DatasetPairs:
    """Opens a dataset that ``save_to_disk`` wrote; the options are those of DatasetPairs.

    Raises:
        ImportError: If Hugging Face datasets is missing.
        ValueError: If the folder holds none, or several splits.
    """
    datasets = require_datasets()
    try:
        dataset = datasets.load_from_disk(os.fspath(path))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{os.fspath(path)} must be a folder that save_to_disk wrote, got {error}") from None
    if not isinstance(dataset, datasets.Dataset):
        raise ValueError(f"{os.fspath(path)} must hold one split; name one of {', '.join(map(str, dataset))} below it")
    return DatasetPairs(dataset, name=os.fspath(path), **options)
