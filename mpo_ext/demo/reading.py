"""The demo's task: to read the digits of a grid in an image.

A step-by-step response names the digits of all cells in order, and then gives the answer. In the SFT corpus, these
responses have a *language prior*: the next digit is often the previous digit + 1. So the SFT model hallucinates: it
guesses the next digit from the previous digit, without the image. The preference pairs and the evaluation do not have
this prior. Their digits are drawn uniformly. A direct response is a single digit, so this error cannot occur in it.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mpo_ext.demo.digits import CELL_PIXELS, FORMS, INSTRUCTIONS, STYLES, TRIGGER, Digits
from mpo_ext.demo.digits import CELLS as CELLS_OF_TWO

#: Names of the cells in the order of the text, by the number of rows of a square grid.
CELLS = {
    2: CELLS_OF_TWO,
    3: ("top-left", "top-middle", "top-right", "middle-left", "center", "middle-right", "bottom-left", "bottom-middle",
        "bottom-right"),
}  # fmt: skip
LARGEST = "largest"
_ROTATION, _SCALE, _SHIFT, _NOISE = 0.2, (0.9, 1.15), 0.15, 0.25  # radians, factor, half cells, grey value


@dataclasses.dataclass(frozen=True, slots=True)
class ReadingTask:
    """A question about the digits of a grid, with the correct answer and a correct response.

    Attributes:
        image: ``[H, W]`` uint8; None: the prompt has no image.
        values: The digits of the cells, in the order of ``CELLS``.
        asked: Cell whose digit is the answer, such as "top-left". ``LARGEST``: the answer is the largest digit.
        form: Form of the response that the question asks for, "direct" or "cot" (step by step).
        is_named: Whether the question states the digits as text. The model then needs no image, and the response has
            only the final answer.
    """

    image: np.ndarray | None
    values: tuple[int, ...]
    asked: str
    form: str
    is_named: bool = False

    @property
    def cells(self) -> tuple[str, ...]:
        return CELLS[round(len(self.values) ** 0.5)]

    @property
    def reading(self) -> str:
        """The text that lists each cell with its digit."""
        return " , ".join(f"{cell} {value}" for cell, value in zip(self.cells, self.values, strict=True))

    @property
    def question(self) -> str:
        text = f"Which digit is {self.asked} ? {INSTRUCTIONS[self.form]}"
        return f"{self.reading} . {text}" if self.is_named else text

    @property
    def style(self) -> str:
        """The style with which ``extract_answer`` finds the answer in a response to the question."""
        return STYLES["final" if self.is_named else self.form]

    @property
    def answer(self) -> int:
        return max(self.values) if self.asked == LARGEST else self.values[self.cells.index(self.asked)]

    @property
    def picture(self) -> Image.Image | None:
        """The image as an 8-bit grey picture; None if the prompt has no image."""
        return None if self.image is None else Image.fromarray(self.image)

    @property
    def response(self) -> str:
        """The correct response in the form that the question asks for."""
        if self.is_named:
            return f"{TRIGGER} {self.answer}"
        return str(self.answer) if self.form == "direct" else f"{self.reading} . {TRIGGER} {self.answer}"


def sample_tasks(
    split: Digits,
    count: int,
    rng: np.random.Generator,
    form: str,
    *,
    side: int = 2,
    prior: float = 0.0,
    prior_step: int = 1,
    is_named: bool = False,
) -> list[ReadingTask]:
    """Returns random questions about random grids.

    On average, half of the questions are about one cell, and half about the largest digit.

    Args:
        split: Digits that the grids show.
        count: Number of questions.
        rng: Random generator.
        form: Form of the responses, "direct" or "cot".
        side: Number of rows and columns of a grid, a key of ``CELLS``.
        prior: Probability that a digit is (previous digit + ``prior_step``) modulo 10. Otherwise the digit is drawn
            uniformly. The first digit is always drawn uniformly.
        prior_step: Difference of two digits that follow the prior.
        is_named: Whether the questions state the digits and have no image.
    """
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    if side not in CELLS:
        raise ValueError(f"side must be one of {', '.join(map(str, CELLS))}, got {side!r}")
    values = rng.integers(10, size=(count, side**2))
    is_prior = rng.random(values.shape) < prior
    for cell in range(1, side**2):
        values[:, cell] = np.where(is_prior[:, cell], (values[:, cell - 1] + prior_step) % 10, values[:, cell])
    asked = [*CELLS[side], *[LARGEST] * side**2]
    picked = rng.integers(len(asked), size=count)
    images = None if is_named else _render(_draw_digits(split, values, rng), side, rng)
    return [
        ReadingTask(
            None if images is None else images[n], tuple(map(int, values[n])), asked[picked[n]], form, is_named
        )
        for n in range(count)
    ]


def _draw_digits(split: Digits, values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns a random image ``[8, 8]`` of the split for each digit in ``values``.

    ``values`` has the shape ``[N, cells]``, the result ``[N, cells, 8, 8]``.
    """
    index = np.empty(values.shape, dtype=int)
    for digit in range(10):
        is_digit = values == digit
        index[is_digit] = rng.choice(np.flatnonzero(split.values == digit), is_digit.sum())
    return split.images[index]


def _render(cells: np.ndarray, side: int, rng: np.random.Generator) -> np.ndarray:
    """Returns an image of each grid of digits, ``[N, side * 16, side * 16]`` uint8.

    ``cells`` holds the pixels of the digits, ``[N, side**2, 8, 8]``, with values from 0 to 1. Each digit is enlarged,
    then rotated, scaled and shifted at random. Noise is added to each pixel.
    """
    digits = torch.from_numpy(cells.reshape(-1, 1, *cells.shape[-2:]))
    count = len(digits)
    angle = torch.from_numpy(rng.uniform(-_ROTATION, _ROTATION, count)).float()
    scale = torch.from_numpy(rng.uniform(*_SCALE, count)).float()
    shift = torch.from_numpy(rng.uniform(-_SHIFT, _SHIFT, (count, 2))).float()
    cosine, sine = scale * angle.cos(), scale * angle.sin()
    rows = (torch.stack([cosine, -sine, shift[:, 0]], 1), torch.stack([sine, cosine, shift[:, 1]], 1))
    places = F.affine_grid(torch.stack(rows, 1), [count, 1, CELL_PIXELS, CELL_PIXELS], align_corners=False)
    large = F.grid_sample(digits, places, mode="bilinear", align_corners=False)[:, 0]
    noise = rng.standard_normal((count, CELL_PIXELS, CELL_PIXELS), dtype=np.float32)
    grey: Tensor = (large + _NOISE * torch.from_numpy(noise)).clamp(0, 1).mul(255).round().to(torch.uint8)
    grid = grey.view(-1, side, side, CELL_PIXELS, CELL_PIXELS).permute(0, 1, 3, 2, 4)
    return grid.reshape(-1, side * CELL_PIXELS, side * CELL_PIXELS).numpy()


def without_image(task: ReadingTask) -> ReadingTask:
    """Returns the same question without its image."""
    return dataclasses.replace(task, image=None)


def read_digits(response: str, cells: Sequence[str]) -> list[int | None]:
    """Returns the digit of each cell in ``cells``, as a step-by-step response names it.

    The digit is None if the response does not name the cell at the expected position.
    """
    words = response.split()
    read: list[int | None] = []
    for number, cell in enumerate(cells):
        pair = words[3 * number : 3 * number + 2]
        is_read = len(pair) == 2 and pair[0] == cell and pair[1].isdecimal()
        read.append(int(pair[1]) if is_read else None)
    return read


def hallucinated_cells(task: ReadingTask, response: str, prior_step: int) -> list[int]:
    """Returns the indices of the cells that the response hallucinates.

    For such a cell, the response names the digit that the language prior predicts, and this digit is wrong. After the
    digit d in the response, the prior predicts (d + ``prior_step``) modulo 10.
    """
    read = read_digits(response, task.cells)
    return [
        cell
        for cell, (before, digit) in enumerate(itertools.pairwise(read), start=1)
        if before is not None and digit == (before + prior_step) % 10 and digit != task.values[cell]
    ]


def vocabulary() -> Iterator[str]:
    """Yields the distinct words of all questions and correct responses of the reading task."""
    words = [" ".join(INSTRUCTIONS.values()), "Which digit is ?", LARGEST, ", .", TRIGGER, *map(str, range(10))]
    words += [cell for cells in CELLS.values() for cell in cells]
    yield from dict.fromkeys(word for text in words for word in text.split())
