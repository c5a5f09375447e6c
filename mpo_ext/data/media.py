"""Finds images, videos and audio that a reader missed: placeholders without media, and media in unknown fields."""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from mpo_ext.chat import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER
from mpo_ext.checks import shorten
from mpo_ext.data.literals import is_text_of_messages
from mpo_ext.data.marks import NO_IMAGE, check_marks
from mpo_ext.data.reader import FieldError
from mpo_ext.data.records import PROMPT_TURNS, SOURCE, Pair
from mpo_ext.images import describe_source

#: Kinds of bad lines.
IMAGE_IN_RESPONSE, UNREAD_FIELD = "image in response", "unread field"
VIDEO, TOOLS = "video or audio", "tools"

_MEDIA_NAME = re.compile(
    r"image|img|picture|photo|pixel|screenshot|thumbnail|video|audio|waveform|(?:^|_)pics?(?:_|$)", re.IGNORECASE
)
# <audio>, <|audio_1|>, <|AUDIO|>
_AUDIO_MARK = re.compile(r"<(\|?)audio(?:[ _-]?[0-9]{1,3})?\1>", re.IGNORECASE)
# Placeholders of other programs: <video 1>, <|video_1|>, <Video>, <|video_pad|>
_VIDEO_MARK = re.compile(
    r"<(?!video>)(\|?)(?i:video)(?:[ _-]?[0-9]{1,3})?\1>|<\|video_pad\|>|<video_(?:pad|placeholder)>"
)
#: Paths whose extension is that of an image, video or audio file.
MEDIA_FILE = re.compile(
    r"[^\n]*[^\s/\\.]\.(?:png|jpe?g|jfif|gif|webp|bmp|tiff?|svg|heic|heif|avif|ico|ppm|dcm"
    r"|mp4|webm|avi|mov|mkv|m4v|mpe?g|flv|wmv|wav|mp3|flac|ogg|m4a|aac|opus)",
    re.IGNORECASE,
)
_QUOTED = re.compile(r"""(?<=["'])[^"'\s]+(?=["'])""")
_URL = re.compile(r"(?:https?|s3|gs|file|hf)://\S+", re.IGNORECASE)
_DATA_URL = re.compile(r"data:(?:image|video|audio)/", re.IGNORECASE)
# Names of fields whose values are file names even if the values contain spaces, as in "my photo.png".
_FILE_FIELD = re.compile(r"file|path|name|media|visual|attachment|fig|jpe?g|png|src", re.IGNORECASE)
# First bytes of files in base64: JPEG, PNG, GIF, RIFF (WebP, WAV, AVI), BMP, TIFF, MP4 (HEIC, AVIF), MP3, Ogg, FLAC
# and Matroska.
_BASE64_MEDIA = re.compile(
    r"/9j/|iVBORw0KGgo|R0lGOD|UklGR|Qk.{6}AAAA|SUkqA|TU0AK|AAAA..Z0eXB|SUQz|//u[QSU]|T2dnU|ZkxhQ|GkXfo"
)
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]+={0,2}\s*")
_SHORTEST_BASE64 = 65  # no file of these types is shorter; words and ids are shorter
#: Column in which imagefolder datasets name the file of a row's image.
FILE_NAME = "file_name"
_STORED_NAME = re.compile(r"[0-9a-f]{24}(?:\.[a-z]{3,4})?")
# Fields in which readers look for the bytes of images and videos.
_READ_FIELDS = {
    *("image", "images", "video", "videos", "rejected_image", "rejected_images"),
    *("prompt", "chosen", "rejected", "messages", "rejected_messages", "rejected_response"),
    *("conversations", "conversation", "input", "preferred_output", "non_preferred_output"),
}


def is_empty(value: object) -> bool:
    """Returns whether a value is None, False, 0 or "", or a list or dict that holds only such values."""
    if isinstance(value, Mapping):
        return all(map(is_empty, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(is_empty, value))
    return not value


def is_unset(value: object) -> bool:
    """Returns whether a value is unset: None, "", or a list or dict that holds only unset values.

    Unlike ``is_empty``, this function treats False and 0 as values.
    """
    if isinstance(value, Mapping):
        return all(map(is_unset, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(is_unset, value))
    return value is None or value == ""


def check_media(values: Mapping[str, Any], pair: Pair) -> Pair:
    """Checks that a pair has all images and videos of its row. Also checks the placeholders in the texts of the pair.

    Args:
        values: Fields of the row. The fields that the reader did not use are also in ``pair.extra``.
        pair: The pair that a reader made from the row.

    Returns:
        The pair, with numbered placeholders such as ``<image 1>`` replaced by ``<image>``; see ``marks.check_marks``.

    Raises:
        FieldError: If an unused field may hold an image, video or audio. If the prompt has ``<audio>``. If the prompt
            has ``<image>`` in a pair without images, or ``<video>`` in a pair without videos. If a response has
            ``<image>``, or has ``<video>`` in a pair with videos. If both responses are texts of messages. If
            ``marks.check_marks`` raises it.
    """
    has_media = bool(pair.media_paths)
    for name, value in values.items():
        if name in pair.extra and pair.extra[name] is value:  # the reader did not use this field of the row
            _check_field(name, value, has_media=has_media)
    unread = {name: value for name, value in pair.extra.items() if name not in (SOURCE, "provenance")}
    read = set(map(file_name, (*pair.media_paths, *_held_names(values, pair)))) - {""} if unread else set()
    for name, value in unread.items():
        _check_value(name, value, read)
    for text in _prompt_texts(pair):
        if not pair.images and (count := text.count(IMAGE_PLACEHOLDER)):
            raise FieldError(
                f"question must hold {IMAGE_PLACEHOLDER} 0 times for 0 images, got {count}: {shorten(text)}",
                kind=NO_IMAGE,
            )
        if not pair.videos and VIDEO_PLACEHOLDER in text:
            raise FieldError(
                f"question must not hold {VIDEO_PLACEHOLDER} without videos, got {shorten(text)}", kind=VIDEO
            )
        if "<" in text and (match := _AUDIO_MARK.search(text)):
            raise FieldError(f"question must not hold {match[0]}, got {shorten(text)}", kind=VIDEO)
        if "<" in text and (match := _VIDEO_MARK.search(text)):
            raise FieldError(
                f"question must mark videos by {VIDEO_PLACEHOLDER} in the order of the videos, got {match[0]} in "
                f"{shorten(text)}: replace it by {VIDEO_PLACEHOLDER}",
                kind=VIDEO,
            )
    if is_text_of_messages(pair.chosen) and is_text_of_messages(pair.rejected):
        raise FieldError(
            f"chosen and rejected must not be messages that were written as text, got {shorten(pair.chosen)}: write "
            "the messages as a list (in CSV files, cells with messages are parsed)"
        )
    marks = (IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER) if pair.videos else (IMAGE_PLACEHOLDER,)
    for name, text in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        for mark in marks:
            if mark in text:
                medium = "an image" if mark == IMAGE_PLACEHOLDER else "a video"
                raise FieldError(
                    f"{name} must not hold {mark}, the mark of {medium} in a prompt, got {shorten(text)}",
                    kind=IMAGE_IN_RESPONSE,
                )
    return check_marks(pair)


def _held_names(values: Mapping[str, Any], pair: Pair) -> list[str]:
    """Returns the file names of the images and videos whose content is in the row, as bytes or as a data URL.

    A file name is in the field ``path`` beside ``bytes``, or in the unknown field ``file_name``. This field also names
    an image that was in a row as bytes before the row was converted.
    """
    names = [path for name, value in values.items() if name in _READ_FIELDS for path in _paths_of_contents(value)]
    if names or any(is_stored_name(file_name(path)) or _DATA_URL.match(path) for path in pair.media_paths):
        names.append(pair.extra.get(FILE_NAME))
    return [name for name in names if isinstance(name, str) and not is_media_content(name)]


def is_stored_name(name: str) -> bool:
    """Returns whether a file name looks like a name that ``hf.save_bytes`` gives to the bytes of an image or video."""
    return _STORED_NAME.fullmatch(name) is not None


def _paths_of_contents(value: object) -> Iterator[object]:
    """Yields a name for each image or video in ``value`` that is given by its content (bytes or a data URL).

    The name is the value of the field ``path`` beside the field ``bytes``, or None without the field ``path``.
    """
    if isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes):
        yield value.get("path")
    elif isinstance(value, (Mapping, list, tuple)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _paths_of_contents(part)
    elif isinstance(value, bytes) or (isinstance(value, str) and _DATA_URL.match(value)):
        yield None


def file_name(path: str) -> str:
    """Returns the last part of a path or URL, after the last slash or backslash."""
    return re.split(r"[/\\]", path.strip())[-1]


def refuse_bytes(row: Mapping[str, Any]) -> None:
    """Raises FieldError if a table row holds bytes in a column that is not for images, videos or messages."""
    for name, value in row.items():
        if name not in _READ_FIELDS:
            _refuse_bytes(name, value)


def _refuse_bytes(name: str, value: object) -> None:
    if isinstance(value, (bytes, bytearray)) and value:
        raise _unread(name, value)
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    for part in parts:
        _refuse_bytes(name, part)


def _unread(name: str, value: object) -> FieldError:
    is_place = isinstance(value, str) and any(form.fullmatch(value.strip()) for form in (MEDIA_FILE, _URL))
    shown = repr(describe_source(value)) if is_place else shorten(value)
    return FieldError(
        f"images must be in image or images, and videos in video or videos (audio is not supported), got the field "
        f"{name!r} {shown}, which is not read: rename it, or name it in ignore (--ignore) if it does not matter",
        kind=UNREAD_FIELD,
    )


def _check_value(name: str, value: object, read: Collection[str]) -> None:
    """Raises FieldError if a field holds an image, a video or audio. Searches lists and mappings at any depth.

    An image, for example, may be a path, a URL, a data URL, base64 text, or an object with ``bytes`` and ``path``.
    A path is allowed if its file name is in ``read``.

    Args:
        name: Name of the field, for the error message.
        value: Value of the field.
        read: File names of the images and videos that have been read for the pair.
    """
    if isinstance(value, Mapping):
        content = value.get("bytes")
        # Images in Hugging Face's datasets have this form. If ``bytes`` is a number, it is the size of a file.
        if {"bytes", "path"} == value.keys() and not is_empty(value) and not isinstance(content, (int, float)):
            raise _unread(name, value)
        for inner, part in value.items():
            _check_value(f"{name}.{inner}", part, read)
    elif isinstance(value, (list, tuple)):
        for part in value:
            _check_value(name, part, read)
    elif isinstance(value, str):
        text = value.strip()
        if file_name(text) in read:
            return
        # A cell of a CSV file may hold a list of paths as text.
        if _is_media(name, text) or (text.startswith("[") and any(map(MEDIA_FILE.fullmatch, _QUOTED.findall(text)))):
            raise _unread(name, value)


def is_media_content(text: str) -> bool:
    """Returns whether a text holds the data of an image, video or audio: a data URL, or base64."""
    if _DATA_URL.match(text):
        return True
    return len(text) >= _SHORTEST_BASE64 and bool(_BASE64_MEDIA.match(text)) and _BASE64.fullmatch(text) is not None


def _is_media(name: str, text: str) -> bool:
    if is_media_content(text):
        return True
    if _URL.fullmatch(text):
        return any(map(MEDIA_FILE.fullmatch, (text, re.split(r"[?#]", text, maxsplit=1)[0])))
    if not MEDIA_FILE.fullmatch(text):
        return False
    # "What is in a.png" is a sentence; "photos/a b.png" is a path.
    words = text.split()
    has_folder = "/" in words[0] or "\\" in words[0]
    return len(words) == 1 or has_folder or _FILE_FIELD.search(name) is not None


def _check_field(name: str, value: object, *, has_media: bool) -> None:
    """Raises FieldError if the name of an unknown field contains a word such as "image", "video" or "audio".

    Empty fields are allowed. If the pair has media, numbers such as ``image_width`` are also allowed. If the pair has
    no media, nested fields are checked, too.
    """
    # In a row with images or videos, a number such as "image_width" or "image_id" describes one of them.
    if _MEDIA_NAME.search(name) and not is_empty(value) and not (has_media and isinstance(value, (int, float))):
        raise _unread(name, value)
    if isinstance(value, Mapping) and not has_media:
        for inner, part in value.items():
            _check_field(f"{name}.{inner}", part, has_media=has_media)


def drop_fields(value: Any, names: Collection[str]) -> Any:
    """Returns a JSON value without the fields ``names``. Nested fields are removed, too."""
    if isinstance(value, Mapping):
        return {name: drop_fields(part, names) for name, part in value.items() if name not in names}
    if isinstance(value, (list, tuple)):
        return [drop_fields(part, names) for part in value]
    return value


def _prompt_texts(pair: Pair) -> list[str]:
    values: list[Any] = [pair.question]
    messages = pair.source.get(PROMPT_TURNS)
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, Mapping) else None
        parts = content if isinstance(content, list) else [{"text": content}]
        values += [part.get("text") for part in parts if isinstance(part, Mapping)]
    return [value for value in values if isinstance(value, str)]


def count_places(pair: Pair, kind: str = "image") -> int:
    """Returns the number of places for images in the prompt of a pair; with ``kind="video"``, for videos.

    A place is a placeholder ``<image>`` (or ``<video>``) in a text, or a message part of the type ``kind``.
    """
    mark = {"image": IMAGE_PLACEHOLDER, "video": VIDEO_PLACEHOLDER}[kind]
    messages = pair.source.get(PROMPT_TURNS)
    if not isinstance(messages, list):
        return pair.question.count(mark)
    contents = [message.get("content") for message in messages if isinstance(message, Mapping)]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return sum(content.count(mark) for content in contents if isinstance(content, str)) + sum(
        isinstance(part, Mapping) and part.get("type") == kind for part in parts
    )


def place_problem(pair: Pair) -> str | None:
    """Returns an error message if a prompt does not have a placeholder for each image and video, otherwise None.

    The placeholders are ``<image>`` and ``<video>``. A single image or a single video needs no placeholder.
    """
    for kind, mark, count in (
        ("image", IMAGE_PLACEHOLDER, len(pair.images)),
        ("video", VIDEO_PLACEHOLDER, len(pair.videos)),
    ):
        places = count_places(pair, kind)
        if places != count and (count, places) != (1, 0):
            allowed = "0 or 1" if count == 1 else str(count)
            return f"question must hold {mark} {allowed} times for {count} {kind}s, got {places}"
    return None
