"""Writes small video files with PyAV, in which the grey value of a frame identifies the frame."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIZE = (64, 48)  # width and height


def grey(number: int) -> int:
    """Returns the grey value of frame ``number``. Neighbouring frames differ by 8."""
    return number * 8 % 256


def number_of(image: Image.Image) -> int:
    """Returns the number (below 32) of a frame from ``write_video``. ``image`` is the frame."""
    return round(float(np.asarray(image).mean()) / 8)


def write_video(
    path: Path,
    values: Sequence[int] | int = 24,
    *,
    rate: int = 8,
    codec: str = "libx264",
    size: tuple[int, int] = SIZE,
    keyframes: int = 6,
    stamps: Sequence[int] | None = None,
    rotation: int = 0,
    colours: Sequence[tuple[int, int, int]] | None = None,
) -> Path:
    """Encodes a video whose frames have a uniform color, and returns its path.

    ``values`` are the grey values of the frames. A number n stands for ``grey(0)`` to ``grey(n - 1)``. ``colours`` are
    the colors of the frames, and replace ``values``. ``stamps`` are the times of the frames in units of 1 / rate
    seconds. With a ``rotation`` in degrees, the upper half of each stored frame is white.
    """
    import av

    width, height = size
    values = [grey(number) for number in range(values)] if isinstance(values, int) else values
    pixels: list[Any] = list(colours) if colours is not None else [(value,) * 3 for value in values]
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=rate, options={"g": str(keyframes)})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.bit_rate = 4_000_000
        if rotation:
            stream.set_display_rotation(rotation)
        for number, colour in enumerate(pixels):
            array = np.broadcast_to(np.array(colour, np.uint8), (height, width, 3))
            if rotation:  # the upper half is white, so that the test sees what is up
                array = array.copy()
                array[: height // 2] = 255
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")
            frame.pts = number if stamps is None else stamps[number]
            frame.time_base = Fraction(1, rate)
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def write_frames(folder: Path, count: int, size: tuple[int, int] = SIZE) -> list[str]:
    """Writes image files of the first ``count`` frames, with the grey values of ``grey``, and returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(count):
        path = folder / f"{number:03d}.png"
        Image.new("RGB", size, (grey(number),) * 3).save(path)
        paths.append(str(path))
    return paths
