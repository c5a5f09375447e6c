"""Reads benchmark items in the formats in which they are published.

Besides MMPR's format, these are:

- MMMU: ``options`` as the text of a Python list, ``image_1`` to ``image_7``, and placeholders such as ``<image 1>``.
- MathVista: ``choices`` and ``decoded_image``.
- M3CoT and ScienceQA: ``choices``, ``context`` or ``hint``, and the index of an option as the answer.
- AI2D: the index of an option as the answer, written as text.
- MathVision: placeholders such as ``<image1>``.
- ChartQA: ``query``, ``label`` and ``imgname``.
- POPE: ``text`` and ``label``.
- MMBench: columns ``A``, ``B``, ..., and an image in base64.
- SEED-Bench: ``choice_a``, ``choice_b``, ...

Items of each format may have videos in ``video`` or ``videos``. ``item_turns`` reads conversations.
"""

import base64
import dataclasses
import datetime
import decimal
import functools
import io
import re
from collections.abc import Mapping
from typing import Any

from mpo_ext.chat import IMAGE_PLACEHOLDER
from mpo_ext.checks import shorten
from mpo_ext.data.marks import FOREIGN_MARK, NUMBERED_MARK
from mpo_ext.data.media import FILE_NAME, MEDIA_FILE, file_name, is_media_content
from mpo_ext.data.messages import Turn, last_question, with_question
from mpo_ext.data.reader import FieldError
from mpo_ext.data.row_media import row_videos
from mpo_ext.generate.item_answers import take_truths
from mpo_ext.generate.item_options import FormError, is_missing, is_null, shows_options, take_options
from mpo_ext.generate.item_turns import ItemTurns, read_chosen, read_conversation, take_conversation
from mpo_ext.images import is_data_url
from mpo_ext.videos import Video

_QUESTIONS = ("question", "query", "text")
_IMAGES = ("images", "image", "decoded_image", "imgname", "image_path")
_NUMBERED_IMAGE = re.compile(r"image_([1-9][0-9]?)")
# Parts of field names that look like images. Such a field is an error, because its image would be ignored.
_IMAGE_NAME = re.compile(r"(?:^|_)(?:images?|imgs?|pictures?|photos?|videos?|audios?|frames|pixels)(?:_|$)")
_METADATA = re.compile(
    r"(?:^|_)(?:id|ids|type|types|source|sources|width|height|size|license|attribution|caption|captions|category|count|num"
    r"|number|n|url|urls|description|descriptions|use|name|split|hash|quality)(?:_|$)"
)
_FILE_NAME = re.compile(
    r"image|img|file|path|photo|pic|video|figure|screenshot"
    r"|(?:^|_)(?:media|medium|visuals?|diagrams?|charts?|plots?|scans?|screen|drawing|attachments?|fig|frame)(?:_|[0-9]|$)"
)
_MIME_BY_BASE64 = {"/9j/": "jpeg", "iVBORw0KGgo": "png", "R0lGOD": "gif", "UklGR": "webp", "Qk": "bmp", "SUkq": "tiff"}
_MIME_BY_BASE64["TU0AK"] = "tiff"
_SHORTEST_BASE64 = 65  # shorter texts are the ``index`` of another row of MMBench, which has the image


@dataclasses.dataclass(slots=True)
class ItemFields:
    """The fields of an item in the common format. ``read_fields`` converts all published formats to this format.

    Attributes:
        question: The question. It has ``<image>`` instead of placeholders such as ``<image 1>``. If the input has
            a field ``context`` or ``hint``, the question begins with these fields. A question that is not a string is
            kept unchanged.
        chosen: The preferred response; None if the input has none. A message becomes its text.
        images: Paths and data URLs of the images.
        videos: The videos.
        truths: True answers. If the input gives the index of an option, the true answer is the option's letter.
        extra: All other fields. The answer options are in ``extra["options"]``: a list of texts, or a dict from letter
            to text.
        turns: All turns of a multi-turn prompt. ``question`` is the last user turn. Empty for a prompt of one turn.
        tools: The functions that the assistant may call.
    """

    question: Any
    chosen: Any
    images: list[Any]
    truths: list[str]
    extra: dict[str, Any]
    turns: list[Turn] = dataclasses.field(default_factory=list)
    tools: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    videos: list[Video] = dataclasses.field(default_factory=list)


def read_fields(values: Mapping[str, Any]) -> ItemFields:
    """Converts a row in a published format to the common format.

    Raises:
        FormError: If the row has options, an answer, images, videos, a conversation or a chosen response that cannot
            be read, or an image placeholder of another program. Also raised if an unknown field looks like options, an
            answer or an image.
    """
    rest = {key: _plain(value) for key, value in values.items()}
    conversation = take_conversation(rest)
    question_key = next((key for key in _QUESTIONS if not is_null(rest.get(key))), "question")
    question, chosen = rest.pop(question_key, None), read_chosen(rest.pop("chosen", None))
    question = None if is_null(question) else question
    if "rejected" in rest:
        _take_pair_fields(rest)
    options, is_index = take_options(rest)
    if not isinstance(question, str) and not conversation:
        return ItemFields(question, chosen, [], [], rest)
    truths = take_truths(rest, options, is_index=is_index)
    numbered, images = _take_images(rest)
    read = ItemTurns([{"role": "user", "content": question}], [], images)
    if conversation:
        read = read_conversation(conversation, question, options, images, _data_url)
    turns = with_question(read.turns, _with_context(last_question(read.turns), rest))
    images, videos = read.images, _take_videos(rest)
    texts = [*(turn["content"] for turn in turns), *_listed(options)]
    if numbered or any(map(NUMBERED_MARK.search, texts)):
        turns, options, images = _place_numbered(turns, options, numbered or dict(enumerate(images, 1)))
    if mark := FOREIGN_MARK.search("\n".join([*(turn["content"] for turn in turns), *_listed(options)])):
        raise FormError(f"the question must mark images by {IMAGE_PLACEHOLDER} or <image 1>, got {shorten(mark[0])}")
    if options is not None:
        rest["options"] = options
    names = {file_name(image) for image in images if isinstance(image, str) and not is_data_url(image)}
    has_content = any(isinstance(image, str) and is_data_url(image) for image in images)
    for key, value in rest.items():
        is_text = isinstance(value, str) and not is_media_content(value)
        if key == FILE_NAME and is_text and (has_content or file_name(value) in names):
            continue  # the name of the image
        if _is_image_like(key, value):
            raise FormError(f"the field {key!r} looks like an image, and is not read: name it image or images")
    several = turns if len(turns) > 1 else []
    return ItemFields(last_question(turns), chosen, images, truths, rest, several, read.tools, videos)


def _take_pair_fields(rest: dict[str, Any]) -> None:
    """Removes ``rejected`` from a preference pair, and copies the fields that an item needs from its ``extra``."""
    del rest["rejected"]
    extra = rest.get("extra")
    for name in ("options", "chosen_source"):
        if isinstance(extra, Mapping) and name in extra and rest.get(name) is None:
            rest[name] = extra[name]


def _with_context(question: str, rest: Mapping[str, Any]) -> str:
    """Returns a question after the texts of the fields ``context`` and ``hint``.

    A text that already stands before the question, as in ``unsolved.jsonl``, is not repeated.
    """
    texts = [rest[key].strip() for key in ("context", "hint") if isinstance(rest.get(key), str)]
    texts = [text for text in dict.fromkeys(texts) if text and not is_missing(text)]
    return "\n".join([*(text for text in texts if not _has_lines(question, text)), question])


def _has_lines(question: str, text: str) -> bool:
    """Returns whether a question contains a text on separate lines, before at least one further line."""
    return re.search(rf"^{re.escape(text)}\n", question, re.MULTILINE) is not None


def _take_videos(rest: dict[str, Any]) -> list[Video]:
    """Removes ``video`` and ``videos`` from the fields ``rest``, and returns the videos in these fields.

    ``mpo_ext.data.row_media.row_videos`` describes the accepted values.
    """
    given = {key: rest.pop(key) for key in ("video", "videos") if key in rest}
    try:
        return row_videos({key: None if is_missing(value) else value for key, value in given.items()}, None)
    except FieldError as error:
        raise FormError(str(error)) from None


def _listed(options: list[str] | dict[str, str] | None) -> list[str]:
    return list(options.values() if isinstance(options, dict) else options or ())


def _plain(value: Any) -> Any:
    """Converts dates, times and decimal numbers to texts. Returns all other values unchanged."""
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    return str(value) if isinstance(value, decimal.Decimal) else value


# ---- Images


def _take_images(rest: dict[str, Any]) -> tuple[dict[int, Any], list[Any]]:
    """Removes the image fields from ``rest``. Returns ``(numbered, others)``.

    ``numbered`` is a dict with the images of numbered fields, such as {2: image} for the field ``image_2``. ``others``
    is a list with the images of another field, such as ``images``.

    Raises:
        FormError: If an image cannot be read, or ``image_source`` is not a file name. Also raised if both numbered
            fields and other fields hold images, or if two other fields hold different images.
    """
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
        if not MEDIA_FILE.fullmatch(rest["image_source"]):
            raise FormError("image must be given: image_source names no file")
        fields["image_source"] = [rest.pop("image_source")]
    if numbered and fields:
        raise FormError(f"images must be given once, got image_1 and {next(iter(fields))}")
    different = list({tuple(map(str, images)): key for key, images in fields.items()}.values())
    if len(different) > 1:
        raise FormError(f"images must be given once, got {different[0]} and {different[1]} with other images")
    return numbered, next(iter(fields.values()), [])


def _place_numbered(
    turns: list[Turn], options: list[str] | dict[str, str] | None, images: Mapping[int, Any]
) -> tuple[list[Turn], list[str] | dict[str, str] | None, list[Any]]:
    """Replaces placeholders such as ``<image 2>`` by ``<image>``, and sorts the images accordingly.

    If only some images have a placeholder, the first user turn begins with an ``<image>`` for each other image. If no
    image has a placeholder, the order of the images stays.

    Returns:
        The turns, the options and the sorted images.
    """
    order: list[Any] = []
    placed: set[int] = set()
    is_shown = options is not None and shows_options(last_question(turns), options)

    def place(text: str) -> str:
        def mark(match: re.Match[str]) -> str:
            number = int(match[2])
            if number not in images:
                raise FormError(f"{match[0]} must have an image with this number")
            order.append(images[number])
            placed.add(number)
            return IMAGE_PLACEHOLDER

        return NUMBERED_MARK.sub(mark, text)

    first = next((index for index, turn in enumerate(turns) if turn["role"] == "user"), 0)
    turns = [dict(turn) for turn in turns]
    before = 0  # number of placeholders before the first user turn
    for index, turn in enumerate(turns):
        before = len(order) if index <= first else before
        turn["content"] = place(turn["content"])
    if is_shown:
        place = functools.partial(NUMBERED_MARK.sub, IMAGE_PLACEHOLDER)  # the question has these images
    if isinstance(options, dict):
        options = {label: place(text) for label, text in options.items()}
    elif options is not None:
        options = [place(text) for text in options]
    others = [images[number] for number in sorted(images) if number not in placed]
    if placed and others:
        turns[first]["content"] = f"{IMAGE_PLACEHOLDER}\n" * len(others) + turns[first]["content"]
    return turns, options, order[:before] + others + order[before:]


def _image(key: str, value: Any, rest: Mapping[str, Any]) -> Any:
    """Converts an image to a path or a data URL.

    An empty value becomes None. A value of an unknown type is returned unchanged.

    Args:
        key: Name of the field that holds the image.
        value: A path, bytes, base64 text, a PIL image or an image dict of Hugging Face's datasets.
        rest: Other fields of the item.

    Raises:
        FormError: If the value is the number of another row, which holds the image (as in MMBench). Also raised if
            bytes are not an image of a supported type.
    """
    if isinstance(value, Mapping) and set(value) <= {"bytes", "path"}:  # the form of Hugging Face's datasets
        value = value["bytes"] if value.get("bytes") else value.get("path")
    if value is None or value == "" or is_missing(value):
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
    """Returns whether the name or the value of a field suggests that it holds an image or a video."""
    entries = value if isinstance(value, (list, tuple)) else [value]
    for entry in entries:
        if isinstance(entry, (bytes, bytearray)) or hasattr(entry, "mode"):
            return True
        if isinstance(entry, Mapping) and "bytes" in entry and "path" in entry:
            return True
        if isinstance(entry, str) and is_media_content(entry):
            return True
    if value is None or isinstance(value, (bool, int, float)) or value in ("", [], {}):
        return False
    name = key.casefold().replace("-", "_")
    is_named = _IMAGE_NAME.search(name) is not None and _METADATA.search(name) is None
    is_file = any(MEDIA_FILE.fullmatch(text) is not None for text in _texts(value))
    return is_named or (is_file and _FILE_NAME.search(name) is not None)


def _texts(value: Any) -> list[str]:
    """Returns all strings in a value, including those in nested lists and dicts."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [text for entry in value for text in _texts(entry)]
    return [value] if isinstance(value, str) else []
