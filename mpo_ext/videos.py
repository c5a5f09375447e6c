"""Loads videos. Training, sampling, evaluation and HTML pages all use ``load_video`` and see the same frames.

A video is a file, which PyAV decodes, or a list of frame images. docs/how-to/video.md describes which frames are used.
"""

import bisect
import contextlib
import dataclasses
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mpo_ext.checks import check_integer, check_number, install_hint, shorten, type_and_value
from mpo_ext.images import (
    ImageError,
    describe_source,
    image_exists,
    is_remote,
    is_url,
    load_image,
    local_path,
    max_pixels,
    open_regular,
)

FPS_VARIABLE, FRAMES_VARIABLE = "MPO_VIDEO_FPS", "MPO_VIDEO_MAX_FRAMES"
BYTES_VARIABLE = "MPO_MAX_VIDEO_BYTES"
_DEFAULT_FPS = 2.0
_DEFAULT_FRAMES = 64
_DEFAULT_BYTES = 4 << 30
_COMPLETE = 0.9  # minimum fraction of the duration in the header, which is inexact even for complete files
_FRAME_PIXELS = 1 << 29  # maximum number of pixels in all frames that are taken from a video: 1.6 GB as RGB
# Containers whose content lies in the file itself. Playlists, such as HLS and concat, name further files and URLs.
_CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi", "mpegts", "mpeg", "mpegvideo", "flv", "ogg", "asf", "gif",
    "m4v", "h264", "hevc", "apng",
)  # fmt: skip
_FIELDS = {"path", "video", "frames", "fps", "max_frames"}


class VideoError(ImageError):
    """Raised for a video that cannot be used. The message names the source."""


@dataclasses.dataclass(frozen=True, slots=True)
class Video:
    """A video of a prompt: a file or a list of frame images.

    Attributes:
        path: Path of the file; "" for a list of frames.
        frames: Paths of the frame images, in order; empty for a file.
        fps: Frames per second that the model sees. Frames are taken from a file at this rate. A list of frames already
            has this rate. None: ``default_fps()``.
        max_frames: Maximum number of frames. A longer video gives this many frames, evenly spaced over its whole
            length. None: ``default_max_frames()``.

    Raises:
        TypeError: If a field has a wrong type. The message names the field, the rule and the value.
        ValueError: If both ``path`` and ``frames`` are given, or neither. Also raised if a frame's path is empty, a
            path has a NUL character, or a number is out of its range.
    """

    path: str = ""
    frames: tuple[str, ...] = ()
    fps: float | None = None
    max_frames: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.frames, tuple):
            raise TypeError(f"frames of a video must be a tuple of paths, got {type_and_value(self.frames)}")
        for name, path in (("path", self.path), *((f"frames[{k}]", frame) for k, frame in enumerate(self.frames))):
            if not isinstance(path, str):
                raise TypeError(f"{name} of a video must be a str, got {type_and_value(path)}")
            if "\0" in path or (not path and name != "path"):
                raise ValueError(f"{name} of a video must be a path, got {type_and_value(path)}")
        if bool(self.path) == bool(self.frames):
            raise ValueError(
                "a video must have a path or a list of frames, got "
                + (f"the path {self.path!r} and {len(self.frames)} frames" if self.path else "neither")
            )
        if self.fps is not None:
            check_number("fps", self.fps, "(0, inf)")
        if self.max_frames is not None:
            check_integer("max_frames", self.max_frames, least=1)

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of the video's files: the video file, or the frame images."""
        return (self.path,) if self.path else self.frames

    def map_paths(self, change: Callable[[str], str]) -> "Video":
        """Returns the video with ``change`` applied to each path."""
        if self.path:
            return dataclasses.replace(self, path=change(self.path))
        return dataclasses.replace(self, frames=tuple(map(change, self.frames)))

    def to_value(self) -> Any:
        """Returns the video as a JSON value: a path, a list of frame paths, or an object as in ``from_value``."""
        content: Any = self.path or list(self.frames)
        settings = {name: getattr(self, name) for name in ("fps", "max_frames") if getattr(self, name) is not None}
        return {"path" if self.path else "frames": content, **settings} if settings else content

    @classmethod
    def from_value(cls, value: Any, name: str = "videos") -> "Video":
        """Returns the video that a JSON value describes.

        Args:
            value: A path, a list of frame paths, or an object. The object has the field ``path`` (a path), ``frames``
                (a list of frame paths) or ``video`` (a path or such a list). ``fps`` and ``max_frames`` are optional.
            name: Name of the field in messages.

        Raises:
            TypeError: If the value, a frame path or a setting has a wrong type.
            ValueError: If the object has unknown fields or invalid values.
        """
        if isinstance(value, Video):
            return value
        if isinstance(value, str):
            return cls(path=value)
        if isinstance(value, (list, tuple)):
            return cls(frames=tuple(value))
        if not isinstance(value, Mapping):
            raise TypeError(f"{name} must be paths, lists of frames or objects, got {type_and_value(value)}")
        fields = {key: part for key, part in value.items() if part is not None}
        if unknown := sorted(fields.keys() - _FIELDS):
            raise ValueError(
                f"{name} must have only {', '.join(sorted(_FIELDS))}, got {', '.join(map(repr, unknown))}"
            )
        given = [key for key in ("path", "video", "frames") if key in fields]
        if len(given) != 1:
            raise ValueError(f"{name} must name one of path, video and frames, got {shorten(value)}")
        content = fields[given[0]]
        types: Any = {"path": str, "frames": (list, tuple), "video": (str, list, tuple)}[given[0]]
        if not isinstance(content, types):
            rule = {"path": "a path", "frames": "a list of paths"}.get(given[0], "a path or a list of paths")
            raise ValueError(f"{given[0]} in {name} must be {rule}, got {type_and_value(content)}")
        return dataclasses.replace(
            cls.from_value(content, name), fps=fields.get("fps"), max_frames=fields.get("max_frames")
        )


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class LoadedVideo:
    """The frames of a video that are shown to a model.

    Attributes:
        frames: PIL images of mode RGB, all upright and of the same size.
        times: Time of each frame in seconds from the start of the video.
        rate: Frames per second of the whole video.
        n_source: Number of frames of the whole video.
        name: Name of the video in messages.
    """

    frames: tuple[Any, ...]
    times: tuple[float, ...]
    rate: float
    n_source: int
    name: str = ""

    def pixels(self) -> Any:
        """Returns the frames as a numpy array ``[T, H, W, 3]`` uint8."""
        import numpy as np

        return np.stack([np.asarray(frame) for frame in self.frames])

    def metadata(self) -> dict[str, Any]:
        """Returns the fields of transformers' ``VideoMetadata``, from which processors compute times."""
        width, height = self.frames[0].size
        return {
            "total_num_frames": self.n_source,
            "fps": self.rate,
            "width": width,
            "height": height,
            "duration": self.n_source / self.rate,
            "video_backend": "pyav",
            "frames_indices": [round(time * self.rate) for time in self.times],
        }


def load_video(source: Any) -> LoadedVideo:
    """Reads a video, and returns the frames for a model.

    A file of D seconds gives ``round(D * fps)`` frames at equal intervals, but at least one and at most
    ``max_frames``. A frame is never repeated, so a file with few frames gives fewer. A list gives all its frames. From
    a list longer than ``max_frames``, ``max_frames`` evenly spaced frames are taken. Each frame is converted like an
    image by ``mpo_ext.images.load_image``.

    Args:
        source: A ``Video``, a value that ``Video.from_value`` takes, or a ``LoadedVideo``, which is returned
            unchanged.

    Raises:
        FileNotFoundError: If a file does not exist.
        VideoError: If the video cannot be decoded, is not a regular file in a known container, exceeds a limit, or has
            frames of different sizes. Also raised if the path is a URL other than ``file://``.
        ImageError: If a frame image cannot be used.
        TypeError: If the source has another type.
        ImportError: If PyAV or Pillow is not installed.
    """
    if isinstance(source, LoadedVideo):
        return source
    video = Video.from_value(source)
    return _load_file(video) if video.path else _load_frames(video)


def key_frames(source: Any, count: int) -> LoadedVideo:
    """Returns ``count`` evenly spaced frames of a video, or fewer if ``load_video`` returns fewer.

    ``source`` is a ``Video`` or a value that ``Video.from_value`` takes. Raises the errors of ``load_video``.
    """
    check_integer("count", count, least=1)
    video = Video.from_value(source)
    limit = min(count, video.max_frames or default_max_frames())
    return load_video(dataclasses.replace(video, max_frames=limit))


def check_video(source: Any, *, decode: bool = False) -> list[tuple[str, str]]:
    """Checks a video. Returns a list of warnings as ``check_image`` does; at present, the list is always empty.

    Args:
        source: A ``Video``, or a value that ``Video.from_value`` takes.
        decode: Whether to decode all frames that ``load_video`` returns. False: only the first frame of a video file
            is decoded. The frames of a list are always decoded.

    Raises:
        FileNotFoundError: If a file does not exist.
        VideoError: If ``load_video`` would raise it. Without ``decode``, defects in later frames may stay undetected.
        ImageError: If a frame image cannot be used.
    """
    video = Video.from_value(source)
    if not decode and video.path:
        key_frames(video, 1)
        return []
    load_video(video)
    return []


def video_exists(video: Video) -> bool:
    """Returns whether all files of a video exist."""
    return all(map(image_exists, video.paths))


def describe_video(video: Video) -> str:
    """Returns a text that names a video in a message."""
    if video.path:
        return describe_source(video.path)
    return f"{describe_source(video.frames[0])} and {len(video.frames) - 1} more frames"


def default_fps() -> float:
    """Returns the default frames per second of a video: the environment variable MPO_VIDEO_FPS, or 2."""
    text = os.environ.get(FPS_VARIABLE, "")
    if not text:
        return _DEFAULT_FPS
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{FPS_VARIABLE} must be a positive number, got {shorten(text)}")
    return value


def default_max_frames() -> int:
    """Returns the default maximum number of frames: the environment variable MPO_VIDEO_MAX_FRAMES, or 64."""
    return _positive(FRAMES_VARIABLE, _DEFAULT_FRAMES)


def max_video_bytes() -> int:
    """Returns the maximum size of a video file in bytes: the environment variable MPO_MAX_VIDEO_BYTES, or 4 GiB."""
    return _positive(BYTES_VARIABLE, _DEFAULT_BYTES)


def set_video_defaults(fps: float | None = None, max_frames: int | None = None) -> None:
    """Sets the defaults for this process and its future child processes. None leaves a default unchanged."""
    if fps is not None:
        check_number("video_fps", fps, "(0, inf)")
        os.environ[FPS_VARIABLE] = repr(float(fps))
    if max_frames is not None:
        check_integer("video_max_frames", max_frames, least=1)
        os.environ[FRAMES_VARIABLE] = str(max_frames)


def video_settings() -> dict[str, Any]:
    """Returns the current defaults of ``fps`` and ``max_frames``, or {} if neither was changed."""
    settings = {"fps": default_fps(), "max_frames": default_max_frames()}
    return {} if settings == {"fps": _DEFAULT_FPS, "max_frames": _DEFAULT_FRAMES} else settings


def _positive(variable: str, default: int) -> int:
    text = os.environ.get(variable, "")
    if not text:
        return default
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise ValueError(f"{variable} must be a positive integer, got {shorten(text)}")
    return int(text)


def _limits(video: Video) -> tuple[float, int]:
    return video.fps or default_fps(), video.max_frames or default_max_frames()


def _load_frames(video: Video) -> LoadedVideo:
    fps, most = _limits(video)
    count = len(video.frames)
    kept = range(count) if count <= most else [index * count // most for index in range(most)]
    images: list[Any] = []
    for index in kept:
        image = load_image(video.frames[index])
        _check_pixels(image.size, len(kept), describe_video(video))
        if images and image.size != images[0].size:
            raise VideoError(
                f"video must have frames of one size, got {images[0].size[0]} x {images[0].size[1]} and "
                f"{image.size[0]} x {image.size[1]} in {describe_source(video.frames[index])}"
            )
        images.append(image)
    return LoadedVideo(tuple(images), tuple(index / fps for index in kept), fps, count, describe_video(video))


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise ImportError(f"PyAV, which decodes videos, is missing: {install_hint('video')} ({error})") from error
    return av


def _load_file(video: Video) -> LoadedVideo:
    fps, most = _limits(video)
    name = describe_source(video.path)
    with _opened(video.path) as (container, stream):
        index = _PacketIndex(container, stream, video.path)
        count = min(most, max(1, round(index.duration * fps)))
        _check_pixels((stream.width, stream.height), count, name)
        places = index.at([number * index.duration / count for number in range(count)])
        frames = index.decode(places)
    sizes = {frame.size for frame in frames}
    if len(sizes) > 1:
        raise VideoError(f"video must have frames of one size, got {sorted(sizes)} in {name}")
    times = tuple(index.time(place) for place in places)
    return LoadedVideo(tuple(frames), times, len(index) / index.duration, len(index), name)


def _check_pixels(size: tuple[int, int], count: int, name: str) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise VideoError(f"video must have at least one pixel, got {width} x {height} in {name}")
    if width * height > max_pixels():
        raise VideoError(
            f"video must have at most {max_pixels():,} pixels per frame, got {width:,} x {height:,} in {name}"
        )
    if width * height * count > _FRAME_PIXELS:
        raise VideoError(
            f"video must have at most {_FRAME_PIXELS:,} pixels in its frames, got {count} frames of {width:,} x "
            f"{height:,} in {name}: lower max_frames"
        )


@contextlib.contextmanager
def _opened(path: str) -> Iterator[tuple[Any, Any]]:
    """Opens a video file, and yields its container and first video stream. Converts read errors to VideoError."""
    av, name = _av(), describe_source(path)
    if is_url(path) and (is_remote(path) or local_path(path) == path):
        raise VideoError(f"video must be a file, got the URL {name}: download it first")
    file_path = local_path(path)
    if not os.path.exists(file_path):
        raise FileNotFoundError(f"video must be a file that exists, got {name}")
    limit = max_video_bytes()
    try:
        with open_regular(file_path, path, "video") as file:
            if (size := os.fstat(file.fileno()).st_size) > limit:
                raise VideoError(f"video must have at most {limit:,} bytes ({BYTES_VARIABLE}), got {size:,} in {name}")
            # A playlist could name other files and URLs, so neither playlists nor protocols are allowed.
            options = {"format_whitelist": ",".join(_CONTAINERS), "protocol_whitelist": "none"}
            with av.open(file, options=options) as container:
                if not container.streams.video:
                    raise VideoError(f"video must have a video stream, got none in {name}")
                stream = container.streams.video[0]
                stream.thread_type = "AUTO"
                yield container, stream
    except (FileNotFoundError, MemoryError, VideoError):
        raise
    except ImageError as error:
        raise VideoError(str(error)) from None
    except (av.error.FFmpegError, OSError, ValueError, EOFError, StopIteration) as error:
        text = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise VideoError(
            f"video must be readable, got {name}: {type(error).__name__}: {str(text).splitlines()[0][:120]}"
        ) from error


class _PacketIndex:
    """The times of all frames of a video stream, read from its packets without decoding.

    Attributes:
        duration: Length of the stream in seconds.
    """

    def __init__(self, container: Any, stream: Any, path: str) -> None:
        self._container, self._stream, self._path = container, stream, path
        name = self._name = describe_source(path)
        stamps: list[tuple[int, int, bool]] = []
        self._has_stamps = True
        for packet in container.demux(stream):
            if not packet.size or packet.is_discard:
                continue
            self._has_stamps &= packet.pts is not None
            stamps.append((packet.pts or 0, packet.duration or 0, packet.is_keyframe))
        if not stamps:
            raise VideoError(f"video must have frames, got none in {name}")
        average = stream.average_rate if self._has_stamps else None  # FFmpeg's default for a raw stream, not its rate
        rate = float(average or stream.guessed_rate or 0) or 25.0
        if self._has_stamps and len({stamp[0] for stamp in stamps}) == len(stamps):
            base = float(stream.time_base)
            stamps.sort()
            self._stamps = [stamp[0] for stamp in stamps]
            self._keys = [stamp[0] for stamp in stamps if stamp[2]]
            last = stamps[-1][1] * base or 1 / rate
            self._times = [(stamp - self._stamps[0]) * base for stamp in self._stamps]
            self.duration = self._times[-1] + last
        else:  # raw streams have no times
            self._has_stamps = False
            self._times = [number / rate for number in range(len(stamps))]
            self.duration = len(stamps) / rate
        declared = stream.duration * float(stream.time_base) if stream.duration else 0.0
        if not declared and len(container.streams) == 1 and container.duration:
            declared = container.duration / 1e6
        if self.duration < _COMPLETE * declared:
            raise VideoError(
                f"video must be complete, got {self.duration:.1f} s of the {declared:.1f} s that its header states in "
                f"{name}"
            )
        if not 0 < self.duration < math.inf:
            raise VideoError(f"video must have a positive duration, got {self.duration} s in {name}")

    def __len__(self) -> int:
        return len(self._times)

    def time(self, place: int) -> float:
        """Returns the time of the frame with index ``place``, in seconds from the first frame."""
        return self._times[place]

    def at(self, times: Sequence[float]) -> list[int]:
        """Returns the indices of the frames that are shown at the given times, without repetitions."""
        margin = self.duration / len(self) / 1000  # times are sums of rounded numbers
        places = [max(0, bisect.bisect_right(self._times, time + margin) - 1) for time in times]
        return list(dict.fromkeys(places))

    def decode(self, places: Sequence[int]) -> list[Any]:
        """Decodes frames to PIL images of mode RGB. The indices ``places`` must be in ascending order."""
        images = self._with_seeks(places) if self._has_stamps else None
        if images is None:  # a container without a usable index, or a raw stream
            images = self._in_order(places)
        if len(images) != len(places):
            raise VideoError(
                f"video must be decodable to its end, got {len(images)} of {len(places)} frames in {self._name}"
            )
        return images

    def _with_seeks(self, places: Sequence[int]) -> list[Any] | None:
        """Decodes frames by seeking to the keyframe before each frame. Returns None if a frame is not found."""
        images: list[Any] = []
        position = -1  # timestamp of the last decoded frame
        frames: Iterator[Any] = iter(())
        for place in places:
            target = self._stamps[place]
            key = self._keys[max(0, bisect.bisect_right(self._keys, target) - 1)] if self._keys else self._stamps[0]
            if not images or position < key:
                self._container.seek(min(key, target), stream=self._stream, backward=True)
                frames = self._container.decode(self._stream)
            for frame in frames:
                position = frame.pts if frame.pts is not None else position
                if position >= target:
                    break
            if position != target:
                return None
            images.append(_to_rgb(frame))
        return images

    def _in_order(self, places: Sequence[int]) -> list[Any]:
        wanted = {self._stamps[place] for place in places} if self._has_stamps else set(places)
        images = []
        with _opened(self._path) as (container, stream):  # a raw stream cannot seek
            for number, frame in enumerate(container.decode(stream)):
                if (frame.pts if self._has_stamps else number) in wanted:
                    images.append(_to_rgb(frame))
                if len(images) == len(places):
                    break
        return images


def _to_rgb(frame: Any) -> Any:
    """Returns a decoded frame as a PIL image of mode RGB, turned upright."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = frame.to_image()
    rotation = getattr(frame, "rotation", 0) or 0
    return load_image(image.rotate(rotation, expand=True) if rotation else image)
