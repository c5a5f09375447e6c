"""Makes image files of all modes, orientations and kinds of transparency, with expected pixels.

The pixels are computed independently of the package's image loader.
"""

import io
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageCms

SIDE = 28


class ImageFile(NamedTuple):
    """An image file and the expected pixels after loading, ``[H, W, 3]`` uint8."""

    name: str
    content: bytes
    pixels: np.ndarray


def noise(*shape: int, seed: int = 0, low: int = 0, high: int = 256) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, (SIDE, SIDE, *shape)).astype(np.uint8)


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(np.rint(values).astype(np.uint8)[..., None], 3, axis=-1)


def on_white(colors: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    opacity = alpha[..., None] / 255
    return np.rint(colors * opacity + 255 * (1 - opacity)).astype(np.uint8)


#: What turns a picture upright, by EXIF orientation (TIFF 6.0: the place of row 0 and column 0).
UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a.swapaxes(0, 1)[:, ::-1],
    7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
    8: lambda a: a.swapaxes(0, 1)[::-1],
}


def exif(orientation: int) -> bytes:
    block = Image.Exif()
    block[0x0112] = orientation
    return block.tobytes()


def png(bits: int, color: int, rows: list[bytes], extra: bytes = b"") -> bytes:
    """Returns a PNG file of any bit depth; Pillow can write only some depths."""
    header = struct.pack(">IIBBBBB", SIDE, len(rows), bits, color, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def tiff(bits: int, photometric: int, data: bytes, *, order: str = "<", sample_format: int = 1) -> bytes:
    """Returns an uncompressed grey TIFF file."""
    entries = [(256, SIDE), (257, SIDE), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, SIDE)]
    entries += [(279, len(data)), (339, sample_format)]
    tags = b"".join(struct.pack(f"{order}HHII" if tag in (273, 279) else f"{order}HHIHxx", tag,
                                4 if tag in (273, 279) else 3, 1, value) for tag, value in entries)  # fmt: skip
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8 + len(data))
    return head + data + struct.pack(f"{order}H", len(entries)) + tags + bytes(4)


def icc(space: bytes, tags: dict[bytes, bytes], connection: bytes = b"XYZ ") -> bytes:
    """Returns an ICC color profile of version 2.

    Args:
        space: Color space of the image, such as b"CMYK".
        tags: Content of the tags, by signature.
        connection: Profile connection space.
    """
    tags = {b"wtpt": xyz(0.9642, 1.0, 0.8249), b"cprt": b"text\0\0\0\0none\0", **tags}
    body, directory = b"", struct.pack(">I", len(tags))
    for name, value in tags.items():
        directory += struct.pack(">4sII", name, 128 + 4 + 12 * len(tags) + len(body), len(value))
        body += value + bytes(-len(value) % 4)
    size = 128 + len(directory) + len(body)
    kind = b"prtr" if space == b"CMYK" else b"mntr"
    head = struct.pack(">I4sI4s4s4s", size, b"none", 0x02400000, kind, space, connection) + bytes(12) + b"acsp"
    return head.ljust(68, b"\0") + struct.pack(">iii", 63190, 65536, 54061) + bytes(48) + directory + body


def xyz(*values: float) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">iii", *(round(65536 * value) for value in values))


def gamma(value: float) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(256 * value)) + bytes(2)


# Columns are red, green and blue in XYZ at D50: Adobe RGB (1998) and sRGB, from their specifications.
ADOBE = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
ADOBE_PROFILE = icc(b"RGB ", {
    name: value
    for column, letter in enumerate("rgb")
    for name, value in (
        (f"{letter}XYZ".encode(), xyz(*ADOBE[:, column])), (f"{letter}TRC".encode(), gamma(563 / 256)),
    )
})  # fmt: skip
GREY_PROFILE = icc(b"GRAY", {b"kTRC": gamma(1.0)})


def srgb_encoded(linear: np.ndarray) -> np.ndarray:
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def from_adobe(pixels: np.ndarray) -> np.ndarray:
    linear = (pixels / 255) ** (563 / 256) @ ADOBE.T @ np.linalg.inv(SRGB).T
    return np.rint(srgb_encoded(linear)).astype(np.uint8)


def from_lab(lab: np.ndarray) -> np.ndarray:
    """Converts CIELAB colors (L from 0 to 100, white point D50) to sRGB."""
    y = (lab[..., 0] + 16) / 116
    f = np.stack([y + lab[..., 1] / 500, y, y - lab[..., 2] / 200], axis=-1)
    white = np.array([0.9642, 1.0, 0.8249])
    values = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * white
    return np.rint(srgb_encoded(values @ np.linalg.inv(SRGB).T)).astype(np.uint8)


def cmyk_profile() -> bytes:
    """Returns an ICC profile that maps CMYK inks to grey.

    The lightness L is 100 without ink. Full C, M and Y lower it by 20 each, and full K lowers it by 40.
    """
    lightness = [100 - 20 * (c + m + y) - 40 * k for c in (0, 1) for m in (0, 1) for y in (0, 1) for k in (0, 1)]
    table = b"".join(bytes([round(255 * value / 100), 128, 128]) for value in lightness)
    head = (
        b"mft1"
        + bytes(4)
        + bytes([4, 3, 2, 0])
        + struct.pack(">9i", *(65536 * i for i in (1, 0, 0, 0, 1, 0, 0, 0, 1)))
    )
    lut = head + bytes(range(256)) * 4 + table + bytes(range(256)) * 3
    return icc(b"CMYK", {b"A2B0": lut, b"A2B1": lut, b"A2B2": lut}, b"Lab ")


def orientation_files() -> Iterator[ImageFile]:
    picture = noise(3)
    jpeg = saved(Image.fromarray(picture), "JPEG", quality=95)
    decoded = np.asarray(Image.open(io.BytesIO(jpeg)))
    for orientation, turn in UPRIGHT.items():
        photo = saved(Image.fromarray(picture), "JPEG", quality=95, exif=exif(orientation))
        yield ImageFile(f"orientation{orientation}.jpg", photo, turn(decoded))
    for orientation, format in ((5, "PNG"), (6, "TIFF"), (7, "WEBP"), (8, "PNG")):
        options: dict[str, Any] = {"exif": exif(orientation)} | ({"lossless": True} if format == "WEBP" else {})
        content = saved(Image.fromarray(picture), format, **options)
        yield ImageFile(f"orientation{orientation}.{format.lower()}", content, UPRIGHT[orientation](picture))
    compressed = saved(Image.fromarray(picture), "TIFF", exif=exif(3), compression="tiff_lzw")
    yield ImageFile("orientation3_lzw.tiff", compressed, UPRIGHT[3](picture))
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    block = b"http://ns.adobe.com/xap/1.0/\0" + xmp
    photo = jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + jpeg[2:]
    yield ImageFile("orientation6_xmp.jpg", photo, UPRIGHT[6](decoded))
    alpha = noise(seed=9)
    content = saved(Image.fromarray(np.dstack([picture, alpha])), "PNG", exif=exif(6))
    yield ImageFile("orientation6_rgba.png", content, UPRIGHT[6](on_white(picture, alpha)))
    yield ImageFile("exif_damaged.png", saved(Image.fromarray(picture), "PNG", exif=b"Exif\0\0MM\0*broken"), picture)
    yield ImageFile("orientation_unknown.png", saved(Image.fromarray(picture), "PNG", exif=exif(9)), picture)


def transparent_files() -> Iterator[ImageFile]:
    colors, alpha, levels = noise(3), noise(seed=1), noise(seed=2)
    rgba = Image.fromarray(np.dstack([colors, alpha]))
    yield ImageFile("rgba.png", saved(rgba, "PNG"), on_white(colors, alpha))
    yield ImageFile("rgba.tiff", saved(rgba, "TIFF"), on_white(colors, alpha))
    yield ImageFile("rgba.webp", saved(rgba, "WEBP", lossless=True, exact=True), on_white(colors, alpha))
    yield ImageFile(
        "la.png", saved(Image.fromarray(np.dstack([levels, alpha]), "LA"), "PNG"), on_white(grey(levels), alpha)
    )
    drawing = np.zeros((SIDE, SIDE, 4), np.uint8)
    drawing[5:9, 3:20, 3] = 255  # black on a transparent ground
    upright = np.full((SIDE, SIDE, 3), 255, np.uint8)
    upright[5:9, 3:20] = 0
    for format in ("PNG", "WEBP", "GIF", "TIFF", "ICO"):
        options: dict[str, Any] = {"lossless": True} if format == "WEBP" else {}
        options |= {"sizes": [(SIDE, SIDE)]} if format == "ICO" else {}
        yield ImageFile(f"drawing.{format.lower()}", saved(Image.fromarray(drawing), format, **options), upright)
    palette = noise(3, seed=3).reshape(-1, 3)[:256]
    indexed = Image.fromarray(levels, "P")
    indexed.putpalette(palette.tobytes())
    yield ImageFile("p.png", saved(indexed, "PNG"), palette[levels])
    entries = bytes(noise(seed=4).reshape(-1)[:256])
    shown = on_white(palette[levels], np.frombuffer(entries, np.uint8)[levels])
    yield ImageFile("p_alpha.png", saved(indexed, "PNG", transparency=entries), shown)
    gif = on_white(palette[levels], np.where(levels == levels[0, 0], 0, 255))
    yield ImageFile("p_index.gif", saved(indexed, "GIF", transparency=int(levels[0, 0])), gif)
    for bits, scale in ((2, 85), (4, 17)):
        values = levels % (1 << bits)
        packed = np.packbits(np.unpackbits(values[..., None], axis=-1)[..., 8 - bits :].reshape(SIDE, -1), axis=-1)
        content = png(bits, 0, [row.tobytes() for row in packed], chunk(b"tRNS", struct.pack(">H", 1)))
        shown = on_white(grey(values * scale), np.where(values == 1, 0, 255))
        yield ImageFile(f"l{bits}_trns.png", content, shown)
    key = int(levels[3, 3])
    content = png(8, 0, [row.tobytes() for row in levels], chunk(b"tRNS", struct.pack(">H", key)))
    yield ImageFile("l_trns.png", content, on_white(grey(levels), np.where(levels == key, 0, 255)))
    few = colors // 200 * 200
    content = png(8, 2, [row.tobytes() for row in few], chunk(b"tRNS", struct.pack(">HHH", 0, 200, 0)))
    yield ImageFile("rgb_trns.png", content, on_white(few, np.where((few == (0, 200, 0)).all(-1), 0, 255)))
    wide = levels.astype(np.uint16) * 257
    content = png(16, 0, [row.astype(">u2").tobytes() for row in wide], chunk(b"tRNS", struct.pack(">H", key * 257)))
    yield ImageFile("i16_trns.png", content, on_white(grey(levels), np.where(levels == key, 0, 255)))


def deep_files() -> Iterator[ImageFile]:
    wide = np.random.default_rng(5).integers(0, 65536, (SIDE, SIDE)).astype(np.uint16)
    shown = grey(wide / 257)
    yield ImageFile("i16.png", saved(Image.fromarray(wide), "PNG"), shown)
    yield ImageFile("i16_little.tiff", tiff(16, 1, wide.astype("<u2").tobytes()), shown)
    yield ImageFile("i16_big.tiff", tiff(16, 1, wide.astype(">u2").tobytes(), order=">"), shown)
    yield ImageFile("i16_white_is_zero.tiff", tiff(16, 0, wide.astype("<u2").tobytes()), 255 - shown)
    dark = wide // 256  # at most 255, but of 65535
    yield ImageFile("dark.pgm", b"P5 28 28 65535\n" + dark.astype(">u2").tobytes(), grey(dark / 257))
    ten = wide // 64
    yield ImageFile("ten_bits.pgm", b"P5 28 28 1023\n" + ten.astype(">u2").tobytes(), grey(ten / 1023 * 255))
    twelve = wide // 16
    pairs = twelve.reshape(-1, 2).astype(np.uint32)
    packed = (pairs[:, 0] << 12 | pairs[:, 1]).astype(">u4").view(np.uint8).reshape(-1, 4)[:, 1:]
    yield ImageFile("twelve_bits.tiff", tiff(12, 1, packed.tobytes()), grey(twelve / 4095 * 255))
    levels = noise(seed=6)
    yield ImageFile("i32.tiff", tiff(32, 1, levels.astype("<i4").tobytes(), sample_format=2), grey(levels))
    yield ImageFile("f32.tiff", tiff(32, 1, levels.astype("<f4").tobytes(), sample_format=3), grey(levels))
    rgb = np.random.default_rng(7).integers(0, 65536, (SIDE, SIDE, 3))
    content = png(16, 2, [row.astype(">u2").tobytes() for row in rgb])
    yield ImageFile("rgb16.png", content, np.rint(rgb / 257).astype(np.uint8))
    alpha = np.random.default_rng(8).integers(0, 65536, (SIDE, SIDE))
    content = png(16, 6, [row.astype(">u2").tobytes() for row in np.dstack([rgb, alpha])])
    yield ImageFile("rgba16.png", content, on_white(rgb // 256, alpha // 256))  # as Pillow reads 16 bits of colour


def color_files() -> Iterator[ImageFile]:
    colors, levels = noise(3), noise(seed=1)
    yield ImageFile("one_bit.png", saved(Image.fromarray(levels > 127), "PNG"), grey(255.0 * (levels > 127)))
    yield ImageFile("l.png", saved(Image.fromarray(levels), "PNG"), grey(levels))
    yield ImageFile("rgb.png", saved(Image.fromarray(colors), "PNG"), colors)
    yield ImageFile("white_is_zero.tiff", tiff(8, 0, levels.tobytes()), grey(255 - levels))
    inks = noise(4, seed=2)
    shown = np.rint((255.0 - inks[..., :3]) * (255.0 - inks[..., 3:]) / 255).astype(np.uint8)
    yield ImageFile("cmyk.tiff", saved(Image.fromarray(inks, "CMYK"), "TIFF"), shown)
    # Photoshop inverts the inks in a JPEG file; Pillow writes files of the same kind.
    jpeg = saved(Image.fromarray(inks, "CMYK"), "JPEG", quality=95, subsampling=0)
    stored = 255.0 - np.asarray(Image.open(io.BytesIO(jpeg)))
    yield ImageFile("cmyk_adobe.jpg", jpeg, np.rint(stored[..., :3] * stored[..., 3:] / 255).astype(np.uint8))
    place = jpeg.index(b"Adobe") + 11
    assert jpeg[place] == 0  # transform: 2 means YCCK
    y, cb, cr, k = np.moveaxis(stored, -1, 0)
    rgb = np.stack(
        [y + 1.402 * (cr - 128), y - 0.344136 * (cb - 128) - 0.714136 * (cr - 128), y + 1.772 * (cb - 128)], -1
    )
    ycck = jpeg[:place] + b"\2" + jpeg[place + 1 :]
    yield ImageFile("ycck_adobe.jpg", ycck, np.rint((255 - rgb.clip(0, 255)) * k[..., None] / 255).astype(np.uint8))
    lab = np.dstack([noise(seed=3, low=60, high=200), noise(seed=4, high=16) - 8, noise(seed=5, high=16) - 8])
    values = np.dstack([lab[..., 0] / 2.55, lab[..., 1:].view(np.int8)])
    yield ImageFile("lab.tiff", saved(Image.fromarray(lab, "LAB"), "TIFF"), from_lab(values))
    yield ImageFile(
        "adobe_rgb.png", saved(Image.fromarray(colors), "PNG", icc_profile=ADOBE_PROFILE), from_adobe(colors)
    )
    alpha = noise(seed=6)
    content = saved(Image.fromarray(np.dstack([colors, alpha])), "PNG", icc_profile=ADOBE_PROFILE, exif=exif(8))
    yield ImageFile("adobe_rgba_turned.png", content, UPRIGHT[8](on_white(from_adobe(colors), alpha)))
    content = saved(Image.fromarray(levels), "PNG", icc_profile=ADOBE_PROFILE)
    yield ImageFile("adobe_grey.png", content, from_adobe(grey(levels)))
    content = saved(Image.fromarray(levels), "PNG", icc_profile=GREY_PROFILE)
    shown = grey(srgb_encoded(levels / 255))
    yield ImageFile("grey_profile.png", content, shown)
    key = int(levels[0, 0])
    content = saved(Image.fromarray(levels), "PNG", icc_profile=GREY_PROFILE, transparency=key)
    yield ImageFile("grey_profile_trns.png", content, on_white(shown, np.where(levels == key, 0, 255)))
    ink = Image.new("CMYK", (SIDE, SIDE), (255, 0, 255, 0))
    printed = from_lab(np.full((SIDE, SIDE, 3), (60.0, 0.0, 0.0)))
    yield ImageFile("cmyk_profile.tiff", saved(ink, "TIFF", icc_profile=cmyk_profile()), printed)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    yield ImageFile("srgb.png", saved(Image.fromarray(colors), "PNG", icc_profile=srgb), colors)
    yield ImageFile("broken_profile.png", saved(Image.fromarray(colors), "PNG", icc_profile=b"broken"), colors)
    content = saved(Image.fromarray(colors), "PNG", icc_profile=GREY_PROFILE)
    yield ImageFile("other_profile.png", content, colors)


def animated_files() -> Iterator[ImageFile]:
    first, second = noise(3), noise(3, seed=1)
    frames = [Image.fromarray(first), Image.fromarray(second)]
    options: dict[str, Any] = {"save_all": True, "append_images": frames[1:]}
    yield ImageFile("animated.png", saved(frames[0], "PNG", **options), first)
    yield ImageFile("animated.webp", saved(frames[0], "WEBP", lossless=True, **options), first)
    yield ImageFile("pages.tiff", saved(frames[0], "TIFF", **options), first)
    grey_frames = [Image.fromarray(frame[..., 0]) for frame in (first, second)]
    content = saved(grey_frames[0], "GIF", save_all=True, append_images=grey_frames[1:])
    yield ImageFile("animated.gif", content, grey(first[..., 0]))
    photos = [Image.fromarray(frame) for frame in (first, second)]
    content = saved(photos[0], "MPO", save_all=True, append_images=photos[1:], quality=95)
    yield ImageFile("phone.mpo", content, np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))


ANIMATED = ("animated.png", "animated.webp", "pages.tiff", "animated.gif")
FILES = [*orientation_files(), *transparent_files(), *deep_files(), *color_files(), *animated_files()]
