"""Reads the images and videos of a row, in the order in which the prompt shows them.

Images and videos are in fields and in messages of the row.
"""

import base64
import binascii
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mpo_ext.chat import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER
from mpo_ext.checks import shorten, type_and_value
from mpo_ext.data.marks import NO_IMAGE
from mpo_ext.data.media import VIDEO, is_empty
from mpo_ext.data.reader import FieldError
from mpo_ext.images import describe_source, is_data_url
from mpo_ext.videos import Video, describe_video

SaveImage = Callable[[bytes], str]

_PATH_FIELDS = ("image", "path", "url", "image_url", "base64", "source")
#: Fields of a part of a message that holds an image or a video.
PART_FIELDS = {"type", "text", "detail", *_PATH_FIELDS}
VIDEO_FIELDS = ("video", "path", "url", "video_url", "frames")
VIDEO_SETTINGS = ("fps", "max_frames")
#: Columns that ``row_images``, ``row_videos`` and ``row_rejected_images`` read.
MEDIA_COLUMNS = ("image", "images", "video", "videos", "rejected_images")


def row_images(row: Mapping[str, Any], save_image: SaveImage | None) -> list[str]:
    """Returns the paths of the images in the fields ``image`` and ``images`` of a row.

    Each field may hold an image or a list of images. An image is a path, bytes, or an object with ``bytes``, ``path``
    or ``url``.

    Args:
        row: Fields of the row.
        save_image: Function that stores the bytes of an image and returns the path. None: such bytes raise FieldError.

    Raises:
        FieldError: If a value is not an image, or both fields have images and these differ.
    """
    found = {}
    for name in ("image", "images"):
        value = row.get(name)
        images = list(value) if isinstance(value, (list, tuple)) else [] if is_empty(value) else [value]
        if not images:
            continue
        found[name] = [image_path("images", image, save_image) for image in images]
    if len(found) == 2 and found["image"] != found["images"]:
        raise FieldError(
            f"image and images must not both be given, got {_paths_text(found['image'])} and "
            f"{_paths_text(found['images'])}"
        )
    return next(iter(found.values()), [])


def _paths_text(paths: Sequence[str]) -> str:
    return ", ".join(map(describe_source, paths))


def row_videos(row: Mapping[str, Any], save_image: SaveImage | None) -> list[Video]:
    """Returns the videos in the fields ``video`` and ``videos`` of a row.

    Each field may hold a video or a list of videos. A video has one of these forms:

    - a path
    - an object as in ``Video.from_value``
    - bytes, or an object with ``bytes`` or ``path``
    - a list of frame paths, but only inside a list of videos

    Args:
        row: Fields of the row.
        save_image: Function that stores the bytes of a video and returns the path. None: such bytes raise FieldError.

    Raises:
        FieldError: If a value is not a video. Also raised if both fields have videos, and these differ.
    """
    found = {}
    for name in ("video", "videos"):
        value = row.get(name)
        values = list(value) if isinstance(value, (list, tuple)) else [] if is_empty(value) else [value]
        if values:
            found[name] = [read_video(name, part, save_image) for part in values]
    if len(found) == 2 and found["video"] != found["videos"]:
        raise FieldError(
            f"video and videos must not both be given, got {', '.join(map(describe_video, found['video']))} and "
            f"{', '.join(map(describe_video, found['videos']))}"
        )
    return next(iter(found.values()), [])


def read_video(name: str, value: object, save_image: SaveImage | None) -> Video:
    """Converts a value of a row to a Video. The value may have any form that ``row_videos`` describes.

    ``name`` is the name of the field, for error messages.
    """
    if isinstance(value, bytes) or (isinstance(value, Mapping) and value.keys() <= {"bytes", "path"}):
        value = image_path(name, value, save_image)
    try:
        video = Video.from_value(value, name)
    except (TypeError, ValueError) as error:
        raise FieldError(str(error)) from None
    if is_data_url(video.path):
        raise FieldError(f"{name} must be files, got the data: URL {describe_source(video.path)}", kind=VIDEO)
    return video


def row_rejected_images(row: Mapping[str, Any], save_image: SaveImage | None) -> tuple[str, ...]:
    """Returns the image paths in the field ``rejected_images`` of a row; an empty tuple if the field is empty.

    ms-swift uses this field if the two responses have different images.
    """
    value = row.get("rejected_images")
    images = list(value) if isinstance(value, (list, tuple)) else [] if is_empty(value) else [value]
    return tuple(image_path("rejected_images", image, save_image) for image in images)


def image_path(name: str, image: object, save_image: SaveImage | None) -> str:
    """Returns the path of an image that ``row_images`` accepts. ``name`` is the image's field, for error messages."""
    if isinstance(image, bytes):
        image = {"bytes": image}
    if isinstance(image, str) and image:
        return image
    if isinstance(image, Mapping):
        content = image.get("bytes")
        if content is not None and not isinstance(content, bytes):
            raise FieldError(f"{name}: bytes must be binary, got {type_and_value(content)}")
        if content is not None and save_image is not None:
            return save_image(content)
        for field in ("path", "url"):
            if content is None and isinstance(image.get(field), str) and image[field]:
                return image[field]
        if content is not None:
            raise FieldError(f"{name} must be paths unless image_dir is given, got {len(content):,} bytes")
    raise FieldError(f"{name} must be paths, or objects with bytes, path or url, got {type_and_value(image)}")


class Images:
    """Collects the images and videos of a row, in the order of their places in the prompt.

    An image has a place in the prompt: a message part or ``<image>``. A part may name the image. Otherwise, the place
    takes the next path of ``columns``. Videos are collected in the same way.

    Args:
        columns: Paths from the row's fields ``image`` and ``images``.
        save_image: Function that stores the bytes of an image and returns the path. None: such bytes raise FieldError.
        videos: Videos from the row's fields ``video`` and ``videos``.
    """

    def __init__(
        self, columns: Sequence[str] = (), save_image: SaveImage | None = None, videos: Sequence[Video] = ()
    ) -> None:
        self._waiting = list(columns)
        self._waiting_videos, self._placed_videos, self._n_video_places = list(videos), list[Video](), 0
        self._save_image = save_image
        self._placed: list[str] = []
        self._n_places = 0

    def add_part(self, name: str, part: Mapping[str, Any]) -> None:
        """Adds the image of a message part to the images of the row.

        If the part does not contain an image, adds the next image of the row's fields. ``name`` is the name of the
        part in error messages.
        """
        self._n_places += 1
        path = self._part_path(name, part)
        if path is None:
            if not self._waiting:
                raise FieldError(
                    f"{name} must have an image for each image part, got {self._n_places} parts or more and "
                    f"{len(self._placed)} images",
                    kind=NO_IMAGE,
                )
            path = self._waiting.pop(0)
        self._placed.append(path)

    def add_marks(self, name: str, text: str) -> None:
        """Adds the row's next image for each ``<image>`` in a text, and the row's next video for each ``<video>``.

        ``name`` is the name of the text's field, for error messages.
        """
        for _ in range(text.count(IMAGE_PLACEHOLDER)):
            self.add_part(name, {})
        for _ in range(text.count(VIDEO_PLACEHOLDER)):
            self.add_video(name, {})

    def add_video(self, name: str, part: Mapping[str, Any]) -> None:
        """Adds the video of a message part.

        A part without a video gets the next video from the row's own field, such as ``videos``. ``name`` is the name
        of the field that holds the part, for error messages.
        """
        self._n_video_places += 1
        given = {field: part[field] for field in VIDEO_FIELDS if not is_empty(part.get(field))}
        settings = {field: part[field] for field in VIDEO_SETTINGS if part.get(field) is not None}
        if not given:
            if not self._waiting_videos:
                raise FieldError(
                    f"{name} must have a video for each place of a video, got {self._n_video_places} places or more "
                    f"and {len(self._placed_videos)} videos",
                    kind=VIDEO,
                )
            if settings:
                raise FieldError(f"{name} must name the video in a video part with settings, got {shorten(part)}")
            self._placed_videos.append(self._waiting_videos.pop(0))
            return
        if len(given) > 1:
            raise FieldError(f"{name} must name one video in a video part, got {shorten(given)}")
        (field, value) = given.popitem()
        if isinstance(value, Mapping) and field == "video_url":
            refuse_fields(name, value, {"url"})
            value = value.get("url")
        if isinstance(value, Mapping) or settings:
            value = value if isinstance(value, Mapping) else {"video": value}
            value = {**value, **settings}
        self._placed_videos.append(read_video(name, value, self._save_image))

    def videos(self, name: str) -> tuple[Video, ...]:
        """Returns all videos of the prompt in order.

        A place is a video part of a message, or a placeholder ``<video>``. The videos have the order of the places. If
        the prompt has no places, the videos have the order of the row's fields.

        Raises FieldError if only some of the videos have a place. ``name`` is the name of the row's field, for the
        message.
        """
        count = len(self._placed_videos) + len(self._waiting_videos)
        if self._waiting_videos and self._n_video_places:
            raise FieldError(f"{name} must have no or {count} places for its videos, got {self._n_video_places}")
        return (*self._placed_videos, *self._waiting_videos)

    @property
    def count(self) -> int:
        """Number of images, including images without a place in the prompt.

        A place is a message part or a placeholder in the text.
        """
        return len(self._placed) + len(self._waiting)

    def paths(self, name: str) -> tuple[str, ...]:
        """Returns the paths of all images, in the order of their places in the prompt.

        A place is an image part of a message, or ``<image>`` in a text. If the prompt has no places, the order is that
        of the row's fields. ``name`` is the name of the prompt's field, for error messages.

        Raises:
            FieldError: If some images have a place, and others have none.
        """
        if self._waiting and self._n_places:
            raise FieldError(f"{name} must have no or {self.count} places for its images, got {self._n_places}")
        return (*self._placed, *self._waiting)

    def _part_path(self, name: str, part: Mapping[str, Any]) -> str | None:
        found = []
        for field in _PATH_FIELDS:
            value = part.get(field)
            if is_empty(value):
                continue
            if field == "base64":
                value = {"bytes": _decode(name, value)}
            elif field == "source":
                value = _anthropic_source(name, value)
            elif field == "image_url" and isinstance(value, Mapping):
                refuse_fields(name, value, {"url", "detail"})
                value = value.get("url")
            found.append(image_path(name, value, self._save_image))
        if len(set(found)) > 1:
            raise FieldError(f"{name} must name one image in an image part, got {_paths_text(found)}")
        return found[0] if found else None


def _decode(name: str, value: object) -> bytes:
    try:
        return base64.b64decode(str(value), validate=True)
    except binascii.Error:
        raise FieldError(f"{name}: base64 must be a base64 text, got {type_and_value(value)}") from None


def _anthropic_source(name: str, source: object) -> object:
    if isinstance(source, Mapping):
        if source.get("type") == "base64":
            return {"bytes": _decode(name, source.get("data"))}
        if source.get("type") == "url":
            return source.get("url")
    raise FieldError(f"{name}: the source of an image must have type base64 or url, got {shorten(source)}")


def refuse_fields(name: str, values: Mapping[str, Any], known: set[str]) -> None:
    """Raises FieldError if ``values`` has a non-empty field that is not in ``known``.

    ``values`` are the fields of an object. ``name`` is the name of the object, for the error message.
    """
    for field, value in values.items():
        if field not in known and value not in (None, "", [], {}):  # 0 may be a weight
            raise FieldError(
                f"{name} must have {' and '.join(sorted(known))} only, got the field {field!r} {shorten(value)}: "
                "remove it, or name it in ignore (--ignore) if it does not matter"
            )
