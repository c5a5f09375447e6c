"""Reads the fields of items in the forms in which benchmarks are published.

Besides the form of MMPR, these are the forms of MMMU (``options`` as the text of a Python list, ``image_1`` to
``image_7``, ``<image 1>``), MathVista (``choices``, ``decoded_image``), M3CoT and ScienceQA (``choices``, ``context``
or ``hint``, an answer that is an index), ChartQA (``query``, ``label``, ``imgname``), POPE (``text``, ``label``) and
MMBench (columns ``A``, ``B``, ..., an image in base64).
"""

import ast
import base64
import dataclasses
import datetime
import decimal
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mpo_ext.answers import label_options
from mpo_ext.chat import IMAGE_PLACEHOLDER

_QUESTIONS = ("question", "query", "text")
_ANSWERS = ("answer_gt", "answer", "label", "answers")
_IMAGES = ("images", "image", "decoded_image", "imgname", "image_path")
_NUMBERED_IMAGE = re.compile(r"image_([1-9][0-9]?)")
_NUMBERED_MARK = re.compile(r"<image ([1-9][0-9]?)>")
_COLUMNS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# A field whose name or value looks like an image that this module does not read would be lost.
_IMAGE_NAME = re.compile(r"(?:^|_)(?:images?|imgs?|pictures?|photos?|videos?|audios?|frames|pixels)(?:_|$)")
_METADATA = re.compile(
    r"(?:^|_)(?:id|ids|type|types|source|sources|width|height|size|license|attribution|caption|captions|category|count|num"
    r"|number|n|url|urls|description|descriptions|use|name|split|hash|quality)(?:_|$)"
)
_IMAGE_FILE = re.compile(r"\S[^\n]*\.(?:png|jpe?g|gif|webp|bmp|tiff?|mp4|webm|avi|mov)", re.IGNORECASE)
_MIME_BY_BASE64 = {"/9j/": "jpeg", "iVBORw0KGgo": "png", "R0lGOD": "gif", "UklGR": "webp", "Qk": "bmp", "SUkq": "tiff"}
_MIME_BY_BASE64["TU0AK"] = "tiff"
_SHORTEST_BASE64 = 65  # shorter texts are the ``index`` of another row of MMBench, which has the image


class FormError(ValueError):
    """Raised for an item that cannot be used; the message is the item's ``problem``."""


@dataclasses.dataclass(slots=True)
class ItemFields:
    """The fields of an item, in one form for all published forms.

    Attributes:
        question: The question with its context, and ``<image>`` at the place of an image; may be no text.
        images: Paths and data URLs.
        truths: True answers; the letter for an answer that is an index.
        extra: The other fields; ``options`` is a list of texts, or a dict from letter to text.
    """

    question: Any
    chosen: Any
    images: list[Any]
    truths: list[str]
    extra: dict[str, Any]


def read_fields(values: Mapping[str, Any]) -> ItemFields:
    """Returns the fields of an item.

    Raises:
        FormError: If the item has options, an answer or images that cannot be read.
    """
    rest = {key: _plain(value) for key, value in values.items()}
    question_key = next((key for key in _QUESTIONS if rest.get(key) is not None), "question")
    question, chosen = rest.pop(question_key, None), rest.pop("chosen", None)
    rest.pop("rejected", None)
    options, is_index = _take_options(rest)
    if not isinstance(question, str):
        return ItemFields(question, chosen, [], [], rest)
    truths = _take_truths(rest, options, is_index=is_index)
    if options is not None:
        context = next((rest[key] for key in ("context", "hint") if isinstance(rest.get(key), str)), "")
        question = f"{context.strip()}\n{question}" if context.strip() else question
    question, options, images = _take_images(rest, question, options)
    if options is not None:
        rest["options"] = options
    for key, value in rest.items():
        if _is_image_like(key, value):
            raise FormError(f"the field {key!r} looks like an image, and is not read: name it image or images")
    return ItemFields(question, chosen, images, truths, rest)


def _plain(value: Any) -> Any:
    """Returns a value of a table as JSON has it."""
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    return str(value) if isinstance(value, decimal.Decimal) else value


# ---- Options


def _take_options(rest: dict[str, Any]) -> tuple[list[str] | dict[str, str] | None, bool]:
    """Removes the options from the fields; returns them, and whether their form has an index as the answer."""
    named = [key for key in ("options", "choices") if key in rest]
    taken = {key: rest.pop(key) for key in named}
    options = [(key, parsed) for key, value in taken.items() if (parsed := parse_options(key, value)) is not None]
    if len(options) > 1 and options[0][1] != options[1][1]:
        raise FormError("options and choices differ")
    if options:
        return options[0][1], options[0][0] == "choices"
    columns = []
    for letter in _COLUMNS:
        if not isinstance(rest.get(letter), str) or not rest[letter].strip():
            break
        columns.append(letter)
    if len(columns) < 2:
        return None, False
    texts = [rest.pop(letter) for letter in columns]
    for letter in _COLUMNS[len(columns) :]:
        if isinstance(rest.get(letter), str) and not rest[letter].strip():
            del rest[letter]  # a question with fewer options than others
        elif letter in rest:
            raise FormError(f"option {letter} stands after an empty option")
    return texts, False


def parse_options(key: str, value: Any) -> list[str] | dict[str, str] | None:
    """Returns options as a list of texts or a dict from letter to text; None for an empty value.

    Args:
        key: Name of the field in messages.
        value: A list; a dict from letter to text; a dict with ``text`` and ``label`` lists; or the text of a list or
            dict in the notation of Python or JSON, as MMMU has it.

    Raises:
        FormError: If the value is none of these, or has more than 26 options.
    """
    if isinstance(value, str) and value.strip():
        try:
            value = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise FormError(f"{key} must be a list of texts") from None
        if isinstance(value, str):
            raise FormError(f"{key} must be a list of texts")
    if value is None or (isinstance(value, (str, Sequence, Mapping)) and not value):
        return None
    if isinstance(value, Mapping) and set(value) == {"text", "label"}:
        texts, labels = value["text"], value["label"]
        if not isinstance(texts, list) or not isinstance(labels, list) or len(texts) != len(labels):
            raise FormError(f"{key} must have as many texts as labels")
        value = dict(zip(map(str, labels), texts, strict=True))
    if isinstance(value, Mapping):
        options: list[str] | dict[str, str] = {
            str(label).strip().upper(): _option(key, t) for label, t in value.items()
        }
        if len(options) < len(value):
            raise FormError(f"{key} must have different labels")
    elif isinstance(value, (list, tuple)):
        options = [_option(key, text) for text in value]
    else:
        raise FormError(f"{key} must be a list of texts")
    try:
        label_options(options)
    except (TypeError, ValueError):
        raise FormError(f"{key} must be 1 to 26 texts, labelled A to Z if they have labels") from None
    return options


def _option(key: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise FormError(f"{key} must hold texts")
    return str(value)


# ---- Answers


def _take_truths(rest: dict[str, Any], options: list[str] | dict[str, str] | None, *, is_index: bool) -> list[str]:
    """Removes the answer from the fields, and returns all answers that are right."""
    given = [key for key in _ANSWERS if rest.get(key) is not None and (key != "answers" or _is_texts(rest[key]))]
    key = given[0] if given else "answer_gt"
    answer = rest.pop(key, None)
    for name in ("answer_gt", "answer"):
        if rest.get(name, "") is None:
            del rest[name]
    if answer is None:
        return []
    if rest.get("question_type") == "open" and isinstance(answer, str) and answer.strip().startswith("["):
        answer = _open_answers(answer)
    if isinstance(answer, (list, tuple)):
        if not all(isinstance(each, (str, int, float)) for each in answer):
            raise FormError(f"{key} must hold texts")
        return [str(each) for each in answer]
    if isinstance(answer, Mapping):
        raise FormError(f"{key} must be a text or a list of texts")
    if isinstance(answer, int) and not isinstance(answer, bool) and options is not None:
        return [_indexed_answer(answer, options, is_index=is_index)]
    text = str(answer)
    is_hidden = text.strip() in ("", "?") and (options is not None or "question_type" in rest)
    return [] if is_hidden else [text]  # test splits have no answers


def _is_texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(each, str) for each in value)


def _open_answers(answer: str) -> Any:
    """Returns the answers to an open question of MMMU, which may be the text of a list."""
    try:
        answers = ast.literal_eval(answer.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return answer
    return answers if isinstance(answers, list) and answers else answer


def _indexed_answer(answer: int, options: list[str] | dict[str, str], *, is_index: bool) -> str:
    """Returns the letter of an answer that is the index of an option, counted from 0 as in ScienceQA."""
    labels = label_options(options)
    matching = [label for label, text in labels.items() if text.strip() == str(answer)]
    letter = list(labels)[answer] if 0 <= answer < len(labels) else None
    if is_index and letter is not None:
        return letter
    if matching and (letter is None or matching == [letter]):
        return matching[0]
    raise FormError("answer must be a letter or the text of an option: a number may be an index from 0 or from 1")


# ---- Images


def _take_images(
    rest: dict[str, Any], question: str, options: list[str] | dict[str, str] | None
) -> tuple[str, list[str] | dict[str, str] | None, list[Any]]:
    """Removes the images from the fields; returns question and options with ``<image>`` marks, and the images."""
    numbered = {
        int(match[1]): image
        for key in list(rest)
        if (match := _NUMBERED_IMAGE.fullmatch(key)) and (image := _image(key, rest.pop(key), rest)) is not None
    }
    fields: dict[str, list[Any]] = {}
    for key in _IMAGES:
        value = rest.pop(key, None)
        entries = list(value) if isinstance(value, (list, tuple)) else [value]
        images = [image for entry in entries if (image := _image(key, entry, rest)) is not None]
        if images:
            fields[key] = images
    if "decoded_image" in fields:
        fields.pop("image", None)  # MathVista's ``image`` is the path of the same image
    if not fields and not numbered and isinstance(rest.get("image_source"), str):
        if not _IMAGE_FILE.fullmatch(rest["image_source"]):
            raise FormError("image must be given: image_source names no file")
        fields["image_source"] = [rest.pop("image_source")]
    if numbered and fields:
        raise FormError(f"images must be given once, got image_1 and {next(iter(fields))}")
    different = list({tuple(map(str, images)): key for key, images in fields.items()}.values())
    if len(different) > 1:
        raise FormError(f"images must be given once, got {different[0]} and {different[1]} with other images")
    images = next(iter(fields.values()), [])
    if not numbered and not (images and _NUMBERED_MARK.search(question)):
        return question, options, images
    return _place_numbered(question, options, numbered or dict(enumerate(images, 1)))


def _place_numbered(
    question: str, options: list[str] | dict[str, str] | None, images: Mapping[int, Any]
) -> tuple[str, list[str] | dict[str, str] | None, list[Any]]:
    """Replaces ``<image 1>`` by ``<image>``, and returns the images in the order of the marks in the prompt."""
    order: list[Any] = []
    placed: set[int] = set()

    def place(text: str) -> str:
        def mark(match: re.Match[str]) -> str:
            number = int(match[1])
            if number not in images:
                raise FormError(f"{match[0]} must have an image with this number")
            order.append(images[number])
            placed.add(number)
            return IMAGE_PLACEHOLDER

        return _NUMBERED_MARK.sub(mark, text)

    question = place(question)
    if isinstance(options, dict):
        options = {label: place(text) for label, text in options.items()}
    elif options is not None:
        options = [place(text) for text in options]
    others = [images[number] for number in sorted(images) if number not in placed]
    if placed and others:  # images that the text does not mention come first
        question = f"{IMAGE_PLACEHOLDER}\n" * len(others) + question
    return question, options, others + order


def _image(key: str, value: Any, rest: Mapping[str, Any]) -> Any:
    """Returns an image as a path or a data URL, None for no image, and other values unchanged."""
    if isinstance(value, Mapping) and set(value) <= {"bytes", "path"}:  # the form of Hugging Face's datasets
        value = value["bytes"] if value.get("bytes") else value.get("path")
    if value is None or value == "":
        return None
    if isinstance(value, (bytes, bytearray)):
        return _data_url(base64.b64encode(value).decode())
    if isinstance(value, str):
        if key == "image" and "index" in rest and value.isdigit():
            raise FormError("image refers to the image of another row: write that image into this row")
        if len(value) >= _SHORTEST_BASE64 and re.fullmatch(r"[A-Za-z0-9+/\s]+={0,2}\s*", value):
            return _data_url("".join(value.split())) if value.startswith(tuple(_MIME_BY_BASE64)) else value
        return value
    if hasattr(value, "save") and hasattr(value, "mode"):  # a PIL image
        buffer = io.BytesIO()
        value.save(buffer, "PNG")
        return _data_url(base64.b64encode(buffer.getvalue()).decode())
    return value


def _data_url(text: str) -> str:
    mime = next((mime for start, mime in _MIME_BY_BASE64.items() if text.startswith(start)), None)
    if mime is None:
        raise FormError("image must be PNG, JPEG, GIF, WebP, BMP or TIFF, got other bytes")
    return f"data:image/{mime};base64,{text}"


def _is_image_like(key: str, value: Any) -> bool:
    """Returns whether a field that is not read may hold an image or a video."""
    entries = value if isinstance(value, (list, tuple)) else [value]
    for entry in entries:
        if isinstance(entry, (bytes, bytearray)) or hasattr(entry, "mode"):
            return True
        if isinstance(entry, Mapping) and "bytes" in entry and "path" in entry:
            return True
        if isinstance(entry, str) and entry.startswith("data:image/"):
            return True
    if value is None or isinstance(value, (bool, int, float)) or value in ("", [], {}):
        return False
    name = key.casefold().replace("-", "_")
    is_named = _IMAGE_NAME.search(name) is not None and _METADATA.search(name) is None
    is_file = any(isinstance(entry, str) and _IMAGE_FILE.fullmatch(entry) is not None for entry in entries)
    return is_named or (is_file and re.search(r"image|img|file|path|photo|pic|video|figure", name) is not None)
