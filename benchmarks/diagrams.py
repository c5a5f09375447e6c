"""Draws the diagrams of the pages in docs/: numbered steps in boxes. ``python -m benchmarks.diagrams`` writes them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from benchmarks.overview import INK, box, text

FOLDER = Path(__file__).parents[1] / "docs" / "images"
_COLUMNS, WIDTH, _HEIGHT, _GAP = 3, 190, 92, 20
_FILLS = ("#e0e7ff", "#dcfce7", "#fef3c7", "#fee2e2", "#e0f2fe", "#f3e8ff")

#: Title and steps of each picture, by the name of its page. A step has a heading and up to three lines of text.
DIAGRAMS: dict[str, tuple[str, tuple[tuple[str, ...], ...]]] = {
    "tutorial": (
        "From images to an evaluated model",
        (
            ("Questions", "your images, with", "true answers"),
            ("Sample", "mpo-ext sample:", "right and wrong", "responses"),
            ("Check", "mpo-ext data check", "and data view"),
            ("Train", "mpo-ext train", "with a recipe"),
            ("Evaluate", "mpo-ext evaluate:", "before and after"),
            ("Look", "failures, curves,", "model card"),
        ),
    ),
    "data": (
        "The ways of preference data",
        (
            ("Read", "MMPR, TRL, ShareGPT,", "ms-swift, OpenAI,", "parquet, the hub"),
            ("Detect", "the format, from the", "fields of the rows"),
            ("A pair", "question, images,", "chosen, rejected"),
            ("Check", "bad lines, missing", "images, duplicates"),
            ("Convert", "to pairs, mmpr,", "trl or hf"),
            ("Train", "the trainer reads", "all formats itself"),
        ),
    ),
    "images": (
        "From an image file to the pixels of the model",
        (
            ("Source", "path, file:// URL,", "data: URL or bytes"),
            ("Check", "format, regular file,", "number of pixels"),
            ("Upright", "turned as EXIF says"),
            ("Colour", "profile to sRGB,", "16 bits to 8 bits"),
            ("White", "transparency on a", "white background"),
            ("RGB", "the same pixels in", "training, sampling", "and evaluation"),
        ),
    ),
    "generate": (
        "How pairs are made",
        (
            ("Items", "questions with images", "and true answers"),
            ("Sample", "several responses of", "the model itself"),
            ("Judge", "true answer, claims,", "a model, or a cut", "response"),
            ("Pair", "a better and a worse", "response"),
            ("Journal", "a killed run resumes", "where it ended"),
            ("Outputs", "pairs.jsonl, and the", "numbers of the run"),
        ),
    ),
    "answers": (
        "From a response to a verdict",
        (
            ("Response", "the text of the model"),
            ("Extract", "final_answer, boxed,", "answer, direct, regex"),
            ("Read", "option, number, unit,", "formula or text"),
            ("Match", "exact, choice, number,", "chart, anls, vqa, math"),
            ("Right", "gives a chosen", "response"),
            ("Wrong", "or unreadable, which", "counts as neither"),
        ),
    ),
    "train": (
        "A training run",
        (
            ("Recipe", "model, data, loss,", "optimizer, output"),
            ("Dry run", "paths, pairs and the", "memory, without", "weights"),
            ("First pairs", "decoded, checked", "before step 1"),
            ("Steps", "DPO, BCO and NTP", "from one forward"),
            ("Checkpoints", "a killed run resumes", "bit for bit"),
            ("Final model", "with a model card,", "log and curves"),
        ),
    ),
    "evaluate": (
        "An evaluation",
        (
            ("Models", "folders, runs,", "adapters, hub names"),
            ("Questions", "files with", "true answers"),
            ("Prompts", "direct, step by step,", "with or without", "the image"),
            ("Ask", "each question once;", "journals resume"),
            ("Score", "a matcher compares", "the answers"),
            ("Compare", "table, differences,", "page of failures"),
        ),
    ),
    "demo": (
        "The digits demo",
        (
            ("Images", "a grid of four", "handwritten digits"),
            ("A tiny model", "hallucinates: after", "3, 4 it writes 5"),
            ("Its own pairs", "right and wrong", "responses"),
            ("Three methods", "SFT, DPO and MPO", "on the same pairs"),
            ("Evaluation", "direct and step by", "step, with errors"),
            ("demo.html", "tables, curves and", "all failures"),
        ),
    ),
    "when-mpo-helps": (
        "How to find out whether MPO can help",
        (
            ("Ask", "direct and step by", "step, several times"),
            ("Can it?", "some of its answers", "are right"),
            ("Its own text", "step by step is worse", "than direct"),
            ("Yes to both", "make pairs and", "train with MPO"),
            ("Misreads", "every answer is", "wrong: SFT first"),
            ("Compare", "with SFT on the", "same pairs"),
        ),
    ),
    "study": (
        "The study",
        (
            ("Start", "a tiny model that", "reads digits"),
            ("Pairs", "from the start's", "responses"),
            ("Ablations", "terms of the loss,", "data, DropoutNTP", "and its share"),
            ("Seeds", "several runs of", "each row"),
            ("Accuracy", "direct and step by", "step (CoT)"),
            ("Findings", "which results of the", "paper return"),
        ),
    ),
    "kernels": (
        "One step in three operators",
        (
            ("token_logp", "reads each labelled", "row of logits once"),
            ("pair_loss", "all terms and one", "weight per row"),
            ("logits_grad", "reads again, writes", "the gradient"),
        ),
    ),
}  # fmt: skip
#: Pages whose picture does not have the name of the page.
PAGES = {name: f"{name}.md" for name in DIAGRAMS} | {"kernels": "explanation/kernels.md"}


def _step(number: int, lines: tuple[str, ...]) -> Iterator[str]:
    x = _GAP + number % _COLUMNS * (WIDTH + _GAP)
    y = 48 + number // _COLUMNS * (_HEIGHT + _GAP)
    yield box(x, y, WIDTH, _HEIGHT, fill=_FILLS[number % len(_FILLS)])
    yield text(x + 12, y + 24, f"{number + 1}. {lines[0]}", size=15, bold=True)
    for line, words in enumerate(lines[1:]):
        yield text(x + 12, y + 45 + 18 * line, words, size=14)
    if number % _COLUMNS:
        yield f'<path d="M{x - _GAP + 4} {y + _HEIGHT // 2}h10m-5 -5l5 5l-5 5" fill="none" stroke="{INK}"/>'


def draw(name: str) -> str:
    """Returns the SVG text of the diagram ``name``, a key of ``DIAGRAMS``."""
    title, steps = DIAGRAMS[name]
    width = _GAP + _COLUMNS * (WIDTH + _GAP)
    height = 48 + -(-len(steps) // _COLUMNS) * (_HEIGHT + _GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" role="img">',
        f"<title>{title}</title>",
        box(0.5, 0.5, width - 1, height - 1, fill="#ffffff", line="#e5e7eb"),
        text(_GAP, 32, title, size=18, bold=True),
    ]
    parts += [part for number, lines in enumerate(steps) for part in _step(number, lines)]
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    """Writes all diagrams."""
    for name in DIAGRAMS:
        (FOLDER / f"{name}.svg").write_text(draw(name), encoding="utf-8")


if __name__ == "__main__":
    main()
