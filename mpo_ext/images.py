"""Loads images. Training, sampling, evaluation and HTML pages all use ``load_image`` and see the same pixels.

docs/images.md describes the conversions.
"""

import base64
import binascii
import contextlib
import functools
import io
import itertools
import os
import re
import stat
import urllib.parse
import warnings
from collections.abc import Iterator
from typing import IO, Any

from mpo_ext.checks import check_integer, install_hint, shorten, type_and_value

LIMIT_VARIABLE = "MPO_MAX_IMAGE_PIXELS"
_DEFAULT_LIMIT = 1 << 26  # pixels: 8192 x 8192, which take a few hundred MB while they are decoded
# Formats that Pillow reads without another program. To read EPS, for instance, it would start Ghostscript.
_FORMATS = (
    "PNG", "JPEG", "MPO", "GIF", "WEBP", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO", "PSD", "TGA", "PCX",
    "SGI", "QOI", "DDS",
)  # fmt: skip
_GREY_BLOCK = 1 << 20  # pixels that are scaled at a time
_SHOWN = 80  # number of characters that a message shows of a source that cannot be a path
_LONGEST_PATH = 4096  # PATH_MAX of Linux
_URL = re.compile(r"data:|file:/|[a-z][a-z0-9+.-]+://", re.IGNORECASE)
_FILE_URL = re.compile(r"file:(?://(?:localhost)?)?(?=/)(?!//)", re.IGNORECASE)
_NO_ANIMATIONS = ("MPO", "PSD")  # formats whose other frames are previews or layers
_GREYS = ("1", "L", "LA", "La", "I", "F", "I;16", "I;16L", "I;16B", "I;16N")
_PROFILE_MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab ": "LAB"}
_ORIENTATION, _BITS, _PHOTOMETRIC = 0x0112, 258, 262  # tags of EXIF and TIFF
_WHITE_IS_ZERO = 0
# Beginnings of image files in base64, and their media types.
_BASE64_KINDS = {
    "iVBORw0KGgo": "png",
    "/9j/": "jpeg",
    "R0lGOD": "gif",
    "UklGR": "webp",
    "SUkqA": "tiff",
    "TU0AK": "tiff",
}
_BASE64_IMAGE = re.compile(rf"(?:^|(?<=/))({'|'.join(_BASE64_KINDS)})[A-Za-z0-9+/\s]{{40,}}={{0,2}}\s*$")


class ImageError(ValueError):
    """Raised for an image that cannot be used. The message names the source."""


def load_image(source: Any) -> Any:
    """Returns the pixels that a model sees: a PIL image of mode RGB, upright, in sRGB, on white.

    EXIF orientation is applied. Transparency is composited on white. An embedded colour profile is converted to sRGB.
    16-bit grey is scaled to 8 bits. An animation is replaced by its first frame. A PIL image that needs no conversion
    is returned unchanged.

    Args:
        source: Path, ``file://`` URL, ``data:`` URL, bytes of an image file, or PIL image.

    Raises:
        FileNotFoundError: If the file does not exist.
        ImageError: If the source is another kind of URL, such as ``https://``, or not a regular file in a known
            format. If the image cannot be read, has more pixels than the limit, or has values of an unknown range.
        TypeError: If the source has another type.
        ImportError: If Pillow is not installed.
    """
    with _opened(source) as image:
        return _to_rgb(image)


def check_image(source: Any, *, decode: bool = False) -> list[tuple[str, str]]:
    """Checks an image, and returns (kind, text) for each warning.

    Kinds: "animated image" if only the first frame is used, "colour profile" if the profile cannot be applied.

    Args:
        source: Path, ``file://`` URL, ``data:`` URL or bytes of an image file.
        decode: True: decodes the pixels. False: reads headers and some checksums, but decodes images in modes I and F.

    Raises:
        FileNotFoundError: If the file does not exist.
        ImageError: If ``load_image`` would raise it. Without ``decode``, damaged pixels may stay undetected.
    """
    name, notes = describe_source(source), []
    with _opened(source) as image:
        if getattr(image, "is_animated", False) and image.format not in _NO_ANIMATIONS:
            text = f"only the first frame is used, got {image.n_frames} frames in {name}"
            notes.append(("animated image", text))
        profile = image.info.get("icc_profile")
        problem = _profile_transform(profile, _color_mode(image.mode))[1] if profile else None
        if problem is not None:
            text = f"the colours count as sRGB, because the profile {problem}, in {name}"
            notes.append(("colour profile", text))
    with _opened(source) as image:
        if decode or image.mode in ("I", "F"):
            _to_rgb(image)
        else:
            _check_transparency(image, _raw_mode(image))
            image.verify()
    return notes


def is_url(source: str) -> bool:
    """Returns whether a text is a URL and not a path. A file name that looks like a URL must begin with "./"."""
    return _URL.match(source) is not None


def is_data_url(source: str) -> bool:
    return source[:5].lower() == "data:"


def is_remote(source: str) -> bool:
    """Returns whether a text is a URL of another machine; False for ``data:`` and local ``file://`` URLs."""
    return is_url(source) and not is_data_url(source) and _FILE_URL.match(source) is None


def local_path(source: str) -> str:
    """Returns the path in a ``file://`` URL. Other texts are returned unchanged."""
    match = _FILE_URL.match(source)
    return source if match is None else urllib.parse.unquote(source[match.end() :])


def image_exists(source: str) -> bool:
    """Returns whether a path or ``file://`` URL exists as a file; True for ``data:`` URLs, False for other URLs."""
    return is_data_url(source) or os.path.isfile(local_path(source))


def missing_image_advice(source: str) -> str:
    """Returns advice for an error message about the missing image file ``source``, or "".

    If ``source`` is the base64 text of an image, the advice is to write ``data:image/...;base64,`` before the text.
    The text is also detected in ``FOLDER/TEXT``, because callers join relative paths to the image folder.
    """
    match = _BASE64_IMAGE.search(source)
    if match is None:
        return ""
    return f": it is base64 text; write data:image/{_BASE64_KINDS[match[1]]};base64, before it"


def describe_source(source: Any) -> str:
    """Returns a description of an image source for messages.

    Paths and URLs are complete. ``data:`` URLs, base64 text, and texts too long for a path get at most 80 characters.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"{len(source):,} bytes"
    if not isinstance(source, (str, os.PathLike)):
        mode = getattr(source, "mode", None)
        return f"a PIL image of mode {mode}" if isinstance(mode, str) else type_and_value(source)
    text = os.fspath(source)
    if isinstance(text, bytes):
        return repr(text)
    if is_data_url(text):
        return f"{text[:40]}... ({len(text):,} characters)" if len(text) > _SHOWN else text
    if len(text) <= _LONGEST_PATH and not missing_image_advice(text):
        return text
    return f"{text[: _SHOWN - 3]}..." if is_url(text) else f"...{text[3 - _SHOWN :]}"


def read_source(source: str) -> bytes:
    """Returns the bytes of an image file, given by a path, a ``file://`` URL or a ``data:`` URL.

    Raises:
        OSError: If the file cannot be read.
        ImageError: If the ``data:`` URL is malformed, the path is not a regular file, or the source is a remote URL.
    """
    if is_data_url(source):
        return _data_bytes(source)
    _check_is_local(source)
    with open_regular(local_path(source), source) as file:
        return file.read()


def read_image(source: str) -> bytes:
    """Returns the bytes of an image file after checking that it is an image. ``source`` is as in ``read_source``.

    Use this function to copy or publish images; it never returns a file of another kind.

    Raises:
        OSError: If the file cannot be read.
        ImageError: If ``read_source`` or ``check_image`` raises it. Damaged pixels may stay undetected.
    """
    content = read_source(source)
    try:
        check_image(content)
    except ImageError as error:
        raise ImageError(f"{error}: {describe_source(source)}") from None
    return content


def set_max_pixels(limit: int) -> None:
    """Sets the maximum number of pixels per image, for this process and its future child processes."""
    check_integer("max_image_pixels", limit, least=1)
    os.environ[LIMIT_VARIABLE] = str(limit)


def max_pixels() -> int:
    """Returns the maximum number of pixels per image: MPO_MAX_IMAGE_PIXELS in the environment, or the default."""
    text = os.environ.get(LIMIT_VARIABLE, "")
    if not text:
        return _DEFAULT_LIMIT
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise ValueError(f"{LIMIT_VARIABLE} must be a positive integer, got {shorten(text)}")
    return int(text)


def open_regular(path: str | os.PathLike[str], source: Any, kind: str = "image") -> IO[bytes]:
    """Opens and returns a regular file. Raises ImageError for another kind of file, such as a folder, pipe or device.

    In the message, ``kind`` is the kind of the content, and ``source`` names the file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ImageError(f"{kind} must be a regular file, got {describe_source(source)}")
    return open(descriptor, "rb")


@functools.cache
def _known_formats() -> tuple[str, ...]:
    """Returns the names of the allowed formats that the installed Pillow can open."""
    pillow = _pillow()
    pillow.init()
    return tuple(name for name in _FORMATS if name in pillow.OPEN)


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(f"Pillow is missing: {install_hint('data')}") from error
    return Image


@contextlib.contextmanager
def _opened(source: Any) -> Iterator[Any]:
    """Opens an image, checks its size, and yields it as a PIL image. ``_named_errors`` converts errors."""
    pillow, limit = _pillow(), max_pixels()
    if isinstance(source, pillow.Image):
        with _named_errors(source), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _check_size(source.size, limit)
            if source.format not in (None, *_FORMATS):  # the pixels of ``source`` may not have been decoded yet
                raise ImageError(f"be in one of the formats {', '.join(_FORMATS)}, got {source.format}")
            yield source
        return
    file: Any
    stack = contextlib.ExitStack()
    if isinstance(source, (bytes, bytearray, memoryview)):
        file = io.BytesIO(source)
    elif isinstance(source, str) and is_data_url(source):
        file = io.BytesIO(_data_bytes(source))
    elif isinstance(source, (str, os.PathLike)):
        file = os.fspath(source)
        if isinstance(source, str):
            _check_is_local(source)
            file = local_path(source)
        if not os.path.exists(file):
            text = f"image must be a file that exists, got {describe_source(source)}"
            raise FileNotFoundError(f"{text}{missing_image_advice(os.fsdecode(source))}")
        with _named_errors(source):
            file = stack.enter_context(open_regular(file, source))
    else:
        raise TypeError(f"image must be a path, a URL, bytes or a PIL image, got {type_and_value(source)}")
    if pillow.MAX_IMAGE_PIXELS is not None and limit > 2 * pillow.MAX_IMAGE_PIXELS:
        pillow.MAX_IMAGE_PIXELS = -(-limit // 2)  # Pillow refuses images of more than twice this number
    with stack, _named_errors(source), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about sizes below the limit and about unusual metadata
        with pillow.open(file, formats=_known_formats()) as image:
            _check_size(image.size, limit)
            yield image


@contextlib.contextmanager
def _named_errors(source: Any) -> Iterator[None]:
    """Converts errors of Pillow in the ``with`` block to an ImageError that names the source."""
    from PIL import Image, UnidentifiedImageError

    name = describe_source(source)
    try:
        yield
    except (FileNotFoundError, ImportError, MemoryError):
        raise
    except ImageError as error:
        text = str(error)
        raise ImageError(text if text.startswith("image must") else f"image must {text} in {name}") from None
    except UnidentifiedImageError:
        raise ImageError(f"image must be in a format that mpo_ext reads, such as PNG or JPEG, got {name}") from None
    except Image.DecompressionBombError:
        raise ImageError(
            f"image must have at most {max_pixels():,} pixels, got more in {name}: set {LIMIT_VARIABLE} to allow more"
        ) from None
    except Exception as error:  # Pillow's plugins raise many exception types
        text = (error.strerror if isinstance(error, OSError) else None) or str(error)
        reason = f"{type(error).__name__}: {text.splitlines()[0][:120]}" if text else type(error).__name__
        raise ImageError(f"image must be readable, got {name}: {reason}") from error


def _check_size(size: tuple[int, int], limit: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"have at least one pixel, got {width} x {height}")
    if width * height > limit:
        raise ImageError(
            f"have at most {limit:,} pixels ({LIMIT_VARIABLE} sets another limit), got {width:,} x {height:,}"
        )


def _check_is_local(source: str) -> None:
    if is_remote(source):
        raise ImageError(f"image must be a file here, got the URL {describe_source(source)}: download it first")


def _data_bytes(url: str) -> bytes:
    """Returns the decoded bytes of a ``data:`` URL (RFC 2397)."""
    name = describe_source(url)
    header, comma, text = url.partition(",")
    if not comma:
        raise ImageError(f"image must be a data: URL with a comma before the data, got {name}")
    if not header.lower().endswith(";base64"):
        return urllib.parse.unquote_to_bytes(text)
    text = "".join((urllib.parse.unquote(text) if "%" in text else text).split())
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"image must be a data: URL with valid base64, got {name}: {error}") from None


def _to_rgb(image: Any) -> Any:
    """Converts an opened image as ``load_image`` describes.

    The message of an ImageError lacks the words "image must" and the source. ``_named_errors`` adds both.
    """
    pillow = _pillow()
    raw_mode = _raw_mode(image)
    _check_transparency(image, raw_mode)
    image.load()
    orientation = _orientation(image)  # after load(), because Pillow turns some TIFF files while it loads them
    if type(image) is pillow.Image and image.mode == "RGB" and not image.info and orientation is None:
        return image
    color, alpha = _color_and_alpha(image, raw_mode)
    rgb = _to_srgb(color, image.info.get("icc_profile"))
    if alpha is not None:
        white = pillow.new("RGB", rgb.size, "white")
        rgb = pillow.composite(rgb, white, alpha)
    if orientation is not None:
        rgb = rgb.transpose(orientation)
    rgb.info = {}  # transparency, profile and orientation are applied already
    return rgb


def _raw_mode(image: Any) -> str:
    """Returns an image's pixel layout, such as "L;4"; "" if it is unknown or the image is already loaded."""
    tiles = getattr(image, "tile", None)
    arguments = tiles[0][3] if tiles else None
    raw_mode = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return raw_mode if isinstance(raw_mode, str) else ""


def _check_transparency(image: Any, raw_mode: str) -> None:
    if raw_mode == "RGB;16B" and "transparency" in image.info:
        # Pillow drops the low byte of each value, so it cannot tell the transparent colour from similar colours.
        raise ImageError("not have a transparent colour of 16 bits, got mode RGB;16 with tRNS")


def _orientation(image: Any) -> Any:
    """Returns the Pillow transposition that turns an image upright, or None. Damaged EXIF data is ignored."""
    transpose = _pillow().Transpose
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # Pillow's parser raises many exception types; viewers ignore such a block, too
        return None
    return {
        2: transpose.FLIP_LEFT_RIGHT,
        3: transpose.ROTATE_180,
        4: transpose.FLIP_TOP_BOTTOM,
        5: transpose.TRANSPOSE,
        6: transpose.ROTATE_270,
        7: transpose.TRANSVERSE,
        8: transpose.ROTATE_90,
    }.get(orientation)


def _color_and_alpha(image: Any, raw_mode: str) -> tuple[Any, Any]:
    """Returns (colours, opacity) of an image. Colours: mode L, RGB, CMYK or LAB. Opacity: mode L; None: opaque."""
    mode, transparency = image.mode, image.info.get("transparency")
    if mode.startswith("I") or mode == "F":
        return _grey(image, transparency)
    if mode in ("CMYK", "LAB"):
        return image, None
    if mode in ("La", "LA"):
        grey_alpha = image.convert("LA") if mode == "La" else image
        return grey_alpha.getchannel("L"), grey_alpha.getchannel("A")
    if not image.has_transparency_data:
        return image.convert("L" if mode in ("1", "L") else "RGB"), None
    if raw_mode in ("L;2", "L;4") and isinstance(transparency, int):
        # Pillow scales these pixels to 8 bits, but leaves the transparent value as it is.
        image = image.copy()
        image.info["transparency"] = transparency * (85 if raw_mode == "L;2" else 17)
    rgba = image.convert("RGBA")
    return image.convert("L") if mode in ("1", "L") else rgba.convert("RGB"), rgba.getchannel("A")


def _grey(image: Any, transparency: object) -> tuple[Any, Any]:
    """Scales a grey image of more than 8 bits to mode L. Returns (image, opacity). Opacity None: opaque."""
    import numpy as np

    values, pillow = np.asarray(image), _pillow()
    tags = getattr(image, "tag_v2", {})
    if image.mode.startswith("I;16"):
        bits = tags.get(_BITS, (16,))
        most = (1 << (bits[0] if isinstance(bits, tuple) else bits)) - 1
    elif image.mode == "I" and image.format in ("PNG", "PPM"):
        most = 65535  # Pillow scales PNG and PPM to 16 bits
    else:
        values = np.nan_to_num(values, nan=-1.0, posinf=-1.0, neginf=-1.0) if image.mode == "F" else values
        low, high = values.min(), values.max()
        if low < 0 or high > 255 or 0 < high <= 1:
            raise ImageError(
                f"have 8 or 16 bits, or in mode {image.mode}, whose range is unknown, values from 0 to 255 of which "
                f"one exceeds 1, got values from {_range(image)}"
            )
        most = 255
    scaled = np.empty(values.shape, np.uint8)
    rows = max(_GREY_BLOCK // values.shape[1], 1)  # in blocks: the float64 copies take 8 bytes per pixel each
    for first in range(0, values.shape[0], rows):
        part = values[first : first + rows].astype(np.float64) * (255 / most)
        scaled[first : first + rows] = np.rint(part).clip(0, 255).astype(np.uint8)
    if image.mode.startswith("I;16") and tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        scaled = 255 - scaled  # Pillow inverts only images of up to 8 bits
    alpha = None
    if isinstance(transparency, int):
        alpha = pillow.fromarray(np.where(values == transparency, 0, 255).astype(np.uint8))
    return pillow.fromarray(scaled), alpha


def _range(image: Any) -> str:
    low, high = image.getextrema()
    return f"{low:g} to {high:g}"


def _color_mode(mode: str) -> str:
    """Returns the mode of the colours that ``_color_and_alpha`` returns for an image mode, such as "RGB" for "P"."""
    return "L" if mode in _GREYS else mode if mode in ("CMYK", "LAB") else "RGB"


def _to_srgb(color: Any, profile: bytes | None) -> Any:
    """Converts colours from their profile to sRGB. Without a usable profile, the colours count as sRGB."""
    transform = _profile_transform(profile, color.mode)[0] if profile else None
    if transform is None:
        return color.convert("RGB")
    if transform.inputMode != color.mode:
        color = color.convert(transform.inputMode)
    return transform.apply(color)


@functools.lru_cache(maxsize=64)
def _profile_transform(profile: bytes, mode: str) -> tuple[Any, str | None]:
    """Returns (transform, problem) for a colour profile. ``mode`` is the mode of the image's colours.

    ``transform`` converts the colours to sRGB; None: no conversion. ``problem`` is the reason why the profile cannot
    be applied, or None.
    """
    cms, pillow = _image_cms(), _pillow()
    try:
        source = cms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space
        input_mode = _PROFILE_MODES.get(space)
        if input_mode != mode and (mode, input_mode) != ("L", "RGB"):
            return None, f"is for {space.strip()}, not for {mode}"
        # For grey, the optimized transform is off by up to 10 of 255 in dark tones.
        flags = cms.Flags.NOOPTIMIZE if input_mode == "L" else cms.Flags.NONE
        transform = cms.buildTransform(source, cms.createProfile("sRGB"), input_mode, "RGB", flags=flags)
    except (OSError, ValueError, TypeError, cms.PyCMSError) as error:
        return None, f"is broken ({shorten(str(error), 60)})"
    if input_mode == "RGB":
        levels = range(0, 256, 15)
        colors = bytes(itertools.chain.from_iterable(itertools.product(levels, repeat=3)))
        cube = pillow.frombytes("RGB", (len(colors) // 3, 1), colors)
    elif input_mode == "L":
        cube = pillow.frombytes("L", (256, 1), bytes(range(256)))
    else:
        return transform, None
    before, after = cube.convert("RGB").tobytes(), transform.apply(cube).tobytes()
    is_srgb = max(abs(left - right) for left, right in zip(before, after, strict=True)) <= 1
    return (None if is_srgb else transform), None


def _image_cms() -> Any:
    """Returns Pillow's module for colour profiles; raises ImportError if Pillow was built without littlecms."""
    from PIL import ImageCms, features

    if not features.check("littlecms2"):
        raise ImportError("colour profiles need a Pillow with littlecms2: install Pillow's wheel from PyPI")
    return ImageCms
