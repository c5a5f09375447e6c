"""Grids of four handwritten digits, and questions about the sum of some of these digits ("the adding task").

An image shows four of scikit-learn's 8x8 digits, each enlarged to 16x16 pixels. The splits share no digit image.
Benchmarks and tests use this task. The demo uses the task of ``mpo_ext.demo.reading`` instead, with the same digits,
splits and forms of responses.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

CELL_PIXELS = 16
IMAGE_PIXELS = 2 * CELL_PIXELS
CELLS = ("top-left", "top-right", "bottom-left", "bottom-right")
REGIONS = {
    "top row": (0, 1), "bottom row": (2, 3), "left column": (0, 2), "right column": (1, 3), "main diagonal": (0, 3),
    "other diagonal": (1, 2), "whole grid": (0, 1, 2, 3),
}  # fmt: skip
OPERATIONS = {"sum": sum}
LARGEST_ANSWER = 9 * len(CELLS)
FORMS = ("direct", "cot")
INSTRUCTIONS = {"direct": "Answer directly.", "cot": "Think stepwise."}
TRIGGER = "Final answer:"
# Styles of ``extract_answer``. A direct response is a number. A step-by-step response is a text, TRIGGER (only once)
# and a number. A final answer is TRIGGER and a number.
STYLES = {
    "direct": r"regex:\A\s*([0-9]+)\s*\Z",
    "cot": rf"regex:(?s)\A\s*(?!{TRIGGER})\S(?:(?!{TRIGGER}).)*{TRIGGER}\s*([0-9]+)\s*\Z",
    "final": rf"regex:\A\s*{TRIGGER}\s*([0-9]+)\s*\Z",
}
MATCHER: dict[str, Any] = {"kind": "number", "relative": 0.0, "absolute": 0.0}
SPLIT_SIZES = {"train": 1100, "validation": 247, "held-out": 450}
_SPLIT_SEED = 0  # the splits are part of the task, so they do not depend on the seed of a run


@dataclasses.dataclass(frozen=True, slots=True)
class Digits:
    """The N digits of a split.

    Attributes:
        images: ``[N, 8, 8]`` float32 in [0, 1].
        values: ``[N]`` the digits, 0 to 9.
        indices: ``[N]`` indices of the digits in scikit-learn's data set.
    """

    images: np.ndarray
    values: np.ndarray
    indices: np.ndarray


class GridTask(Protocol):
    """The common interface of ``Task`` and ``reading.ReadingTask``: a question about a grid, with its answer."""

    @property
    def values(self) -> tuple[int, ...]: ...
    @property
    def form(self) -> str: ...
    @property
    def style(self) -> str: ...
    @property
    def question(self) -> str: ...
    @property
    def answer(self) -> int: ...
    @property
    def response(self) -> str: ...
    @property
    def picture(self) -> Image.Image | None: ...


@dataclasses.dataclass(frozen=True, slots=True)
class Task:
    """A question about an image of four digits, with the correct answer and a correct response.

    Attributes:
        image: ``[1, 32, 32]`` float32 in [0, 1]; None: the prompt has no image.
        values: The four digits, in the order of ``CELLS``.
        operation: Key of ``OPERATIONS``, such as "sum".
        region: The cells that the question is about, a key of ``REGIONS`` such as "top row".
        form: Form of the response that the question asks for, "direct" or "cot" (step by step).
        is_named: Whether the text of the question states the digits, so that it can be answered without the image.
    """

    image: Tensor | None
    values: tuple[int, ...]
    operation: str
    region: str
    form: str
    is_named: bool = False

    @property
    def question(self) -> str:
        text = f"What is the {self.operation} of the {self.region} ? {INSTRUCTIONS[self.form]}"
        if not self.is_named:
            return text
        named = " , ".join(f"{cell} {value}" for cell, value in zip(CELLS, self.values, strict=True))
        return f"{named} . {text}"

    @property
    def style(self) -> str:
        """The style with which ``extract_answer`` finds the answer in a response to the question."""
        return STYLES[self.form]

    @property
    def answer(self) -> int:
        return OPERATIONS[self.operation](self.values[cell] for cell in REGIONS[self.region])

    @property
    def picture(self) -> Image.Image | None:
        """The image as an 8-bit grey picture of 32x32 pixels; None if the prompt has no image."""
        if self.image is None:
            return None
        return Image.fromarray((self.image.squeeze(0).numpy() * 255).round().astype(np.uint8))

    @property
    def response(self) -> str:
        """The correct response in the form that the question asks for."""
        if self.form == "direct":
            return str(self.answer)
        cells = REGIONS[self.region]
        steps = []
        for count, cell in enumerate(cells, start=1):
            so_far = OPERATIONS[self.operation](self.values[seen] for seen in cells[:count])
            steps.append(f"{CELLS[cell]} {self.values[cell]} {self.operation} {so_far}")
        return f"{' , '.join(steps)} . {TRIGGER} {self.answer}"


@functools.cache
def load_digits() -> dict[str, Digits]:
    """Loads scikit-learn's 1,797 digits and returns the splits "train", "validation" and "held-out" by name."""
    from sklearn.datasets import load_digits as load

    images, values = load(return_X_y=True)
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(values))
    splits, start = {}, 0
    for name, size in SPLIT_SIZES.items():
        indices = order[start : start + size]
        pixels = images[indices].reshape(-1, 8, 8).astype(np.float32) / 16
        splits[name] = Digits(pixels, values[indices], indices)
        start += size
    return splits


def part(split: Digits, begin: int, end: int | None) -> Digits:
    """Returns the digits of a split from index ``begin`` to ``end - 1``, or to the last digit if ``end`` is None."""
    chosen = slice(begin, end)
    return Digits(split.images[chosen], split.values[chosen], split.indices[chosen])


def sample_tasks(digits: Digits, count: int, rng: np.random.Generator, form: str | None = None) -> list[Task]:
    """Returns random questions about random grids.

    On average, half of the questions are about the whole grid, and half about two cells.

    Args:
        digits: Digits that the grids show.
        count: Number of questions.
        rng: Random generator.
        form: Form of the responses, "direct" or "cot"; None draws the form of each question.
    """
    if form is not None and form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)} or None, got {form!r}")
    tasks = []
    smaller = [region for region, cells in REGIONS.items() if len(cells) < len(CELLS)]
    for _ in range(count):
        region = "whole grid" if rng.random() < 0.5 else str(rng.choice(smaller))
        picked = rng.integers(len(digits.values), size=len(CELLS))
        values = tuple(int(value) for value in digits.values[picked])
        operation = str(rng.choice(list(OPERATIONS)))
        drawn_form = form or str(rng.choice(FORMS))
        tasks.append(Task(grid_image(digits.images[picked]), values, operation, region, drawn_form))
    return tasks


def without_image(task: Task) -> Task:
    """Returns a copy of the question without the image."""
    return dataclasses.replace(task, image=None)


def in_words(task: Task) -> Task:
    """Returns a copy of the question without the image. The text of the copy states the digits."""
    return dataclasses.replace(task, image=None, is_named=True)


def grid_image(cells: np.ndarray) -> Tensor:
    """Returns the image ``[1, 32, 32]`` of a grid of four digits ``[4, 8, 8]``."""
    scale = CELL_PIXELS // cells.shape[-1]
    large = cells.repeat(scale, axis=1).repeat(scale, axis=2)
    rows = [np.concatenate([large[0], large[1]], axis=1), np.concatenate([large[2], large[3]], axis=1)]
    return torch.from_numpy(np.concatenate(rows, axis=0)).unsqueeze(0)


def vocabulary() -> Iterator[str]:
    """Yields the distinct words of all questions and correct responses of the adding task."""
    words = [" ".join(INSTRUCTIONS.values()), "What is the of ?", *CELLS, *REGIONS, *OPERATIONS, ", .", TRIGGER]
    words += map(str, range(LARGEST_ANSWER + 1))
    yield from dict.fromkeys(word for text in words for word in text.split())
