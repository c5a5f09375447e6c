"""Draws docs/images/overview.svg: a preference pair, the terms of the loss, and the measured speed.

Usage: ``python -m benchmarks.overview``. A test fails if the picture does not match results/logits.json.
"""

import json
from collections.abc import Iterator
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "images" / "overview.svg"
#: Providers in results/logits.json and their labels in the picture.
PROVIDERS = {
    "mpo_ext": "mpo_ext",
    "torch.compile": "torch.compile",
    "TRL selective_log_softmax": "TRL",
    "eager": "eager torch",
}
BAR_PIXELS = 170
INK, GREY, GREEN, RED, BLUE = "#1f2937", "#6b7280", "#15803d", "#b91c1c", "#1d4ed8"


def times(path: Path = ROOT / "results" / "logits.json") -> dict[str, float]:
    """Reads the median seconds of forward and backward from results/logits.json, in float32, on the base shape.

    The keys of the result are the labels in ``PROVIDERS``.
    """
    points = json.loads(path.read_text())["points"]
    base = {
        point["provider"]: point["median_s"]
        for point in points
        if point["sweep"] == "base" and point["dtype"] == "float32" and point["status"] == "measured"
    }
    return {label: base[provider] for provider, label in PROVIDERS.items() if provider in base}


def text(x: float, y: float, content: str, *, size: int = 13, color: str = INK, bold: bool = False) -> str:
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{color}"{weight}>{escape(content)}</text>'


def box(x: float, y: float, width: float, height: float, *, fill: str, line: str = "none") -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6" fill="{fill}" stroke="{line}"/>'


def pair() -> Iterator[str]:
    """Yields the SVG elements on the left of the picture: an image with a question, and two responses."""
    yield text(24, 34, "A preference pair", size=15, bold=True)
    yield box(24, 48, 96, 96, fill="#111827")
    for (x, y), digit in zip(((38, 86), (84, 86), (38, 132), (84, 132)), "5397", strict=True):
        yield f'<text x="{x}" y="{y}" font-size="34" fill="#f9fafb" font-family="cursive">{digit}</text>'
    yield text(132, 70, "What is the sum of")
    yield text(132, 88, "the left digits?")
    yield box(24, 156, 262, 40, fill="#dcfce7")
    yield text(34, 173, "chosen", size=11, color=GREEN, bold=True)
    yield text(34, 189, "top 5, bottom 9. Final answer: 14")
    yield box(24, 204, 262, 40, fill="#fee2e2")
    yield text(34, 221, "rejected", size=11, color=RED, bold=True)
    yield text(34, 237, "top 5, bottom 4. Final answer: 9")


def loss() -> Iterator[str]:
    """Yields the SVG elements in the middle of the picture: the terms of the loss, and how often logits are read."""
    yield text(326, 34, "One loss, one pass", size=15, bold=True)
    terms = (
        ("0.8 DPO", "the chosen response is better"),
        ("0.2 BCO", "each response is good or bad"),
        ("1.0 NTP", "the chosen response is learned"),
    )
    for place, (term, meaning) in enumerate(terms):
        y = 48 + 46 * place
        yield box(326, y, 282, 38, fill="#eff6ff")
        yield text(338, y + 24, term, color=BLUE, bold=True)
        yield text(404, y + 24, meaning, size=12)
    yield text(326, 208, "logits: 1 read forward, 1 read + 1 write", size=12, color=GREY)
    yield text(326, 226, "backward; or none, from hidden states.", size=12, color=GREY)
    yield text(326, 244, "Prompt and image tokens are never read.", size=12, color=GREY)


def speed() -> Iterator[str]:
    """Yields the SVG elements on the right of the picture: bars with the times of the implementations."""
    seconds = times()
    yield text(644, 34, "Time on a CPU", size=15, bold=True)
    for place, (label, value) in enumerate(seconds.items()):
        y = 52 + 44 * place
        width = BAR_PIXELS * value / max(seconds.values())
        yield text(644, y + 8, label, size=12)
        yield box(644, y + 14, width, 16, fill=BLUE if place == 0 else "#cbd5e1")
        yield text(652 + width, y + 27, f"{value:.2f} s", size=12, color=GREY)
    yield text(644, 244, "1 pair, T = 512, V = 151,936, float32", size=11, color=GREY)


def draw() -> str:
    """Returns the picture as SVG text."""
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 880 268" font-family="sans-serif" role="img">',
        "<title>A preference pair, the three terms of the loss, and the measured speed</title>",
        box(0.5, 0.5, 879, 267, fill="#ffffff", line="#e5e7eb"),
        *pair(),
        *loss(),
        *speed(),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    PICTURE.write_text(draw(), encoding="utf-8")
