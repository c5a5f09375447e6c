"""Tests the pictures of README.md and docs/: they are up to date, and their texts do not overlap.

Each main page must have a picture.
"""

import re
from collections.abc import Iterator
from html import unescape
from pathlib import Path

import pytest
import yaml

from benchmarks import diagrams, overview


def test_the_committed_picture_is_the_one_that_the_results_give() -> None:
    assert overview.PICTURE.read_text(encoding="utf-8") == overview.draw(), "run python -m benchmarks.overview"


def test_the_bars_show_the_measured_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overview, "times", lambda: {"mpo_ext": 0.5, "eager torch": 2.0})
    drawn = "\n".join(overview.speed())
    assert "0.50 s" in drawn
    assert f'width="{overview.BAR_PIXELS / 4:g}"' in drawn
    assert f'width="{overview.BAR_PIXELS:g}"' in drawn


@pytest.mark.parametrize("name", diagrams.DIAGRAMS)
def test_the_committed_diagrams_are_drawn_ones(name: str) -> None:
    committed = (diagrams.FOLDER / f"{name}.svg").read_text(encoding="utf-8")
    assert committed == diagrams.draw(name), "run python -m benchmarks.diagrams"


Area = tuple[float, float, float, float]  # left, top, right and bottom


def areas(svg: str) -> Iterator[tuple[str, Area]]:
    """Yields (text, bounding box) of each text and each rectangle in an SVG picture. A rectangle has an empty text.

    The width of a text is measured in DejaVu Sans, a wide font.
    """
    image_font = pytest.importorskip("PIL.ImageFont")
    folder = Path(
        pytest.importorskip("matplotlib", reason="needs matplotlib, which dev installs").get_data_path(),
        "fonts",
        "ttf",
    )
    for element, attributes, words in re.findall(r"<(rect|text) ([^>]*?)/?>([^<]*)", svg):
        values = dict(re.findall(r'([\w-]+)="([^"]*)"', attributes))
        left, top = float(values["x"]), float(values["y"])
        if element == "rect":
            yield "", (left, top, left + float(values["width"]), top + float(values["height"]))
            continue
        name = "DejaVuSans-Bold.ttf" if "font-weight" in values else "DejaVuSans.ttf"
        size = float(values["font-size"])
        width = image_font.truetype(str(folder / name), 100).getlength(unescape(words)) * size / 100
        yield unescape(words), (left, top - 0.8 * size, left + width, top + 0.2 * size)


def is_apart(first: Area, second: Area) -> bool:
    return first[2] < second[0] or second[2] < first[0] or first[3] < second[1] or second[3] < first[1]


def is_inside(inner: Area, outer: Area, margin: float = 4) -> bool:
    return inner[0] >= outer[0] and inner[1] >= outer[1] and inner[2] + margin <= outer[2] and inner[3] <= outer[3]


@pytest.mark.parametrize("picture", sorted(diagrams.FOLDER.glob("*.svg")), ids=lambda path: path.stem)
def test_no_text_runs_over_its_box_or_another_text(picture: Path) -> None:
    found = list(areas(picture.read_text(encoding="utf-8")))
    texts, boxes = [entry for entry in found if entry[0]], [area for words, area in found if not words]
    assert texts
    for number, (words, area) in enumerate(texts):
        assert all(is_inside(area, other) or is_apart(area, other) for other in boxes), words
        assert all(is_apart(area, other) for _, other in texts[number + 1 :]), words


def test_each_main_page_has_a_picture() -> None:
    docs = diagrams.FOLDER.parent
    nav = yaml.safe_load((docs.parent / "mkdocs.yml").read_text())["nav"]
    (guides,) = (section["Guides"] for section in nav if "Guides" in section)
    pages = ["index.md", "tutorial.md", "performance.md", *(page for entry in guides for page in entry.values())]
    pages += ["explanation/loss.md", "explanation/kernels.md"]
    for page in pages:
        pictures = re.findall(r"^!\[[^\]]+\]\(([^)]+)\)$", (docs / page).read_text(encoding="utf-8"), re.MULTILINE)
        assert pictures, page
        assert all(((docs / page).parent / picture).is_file() for picture in pictures), page
