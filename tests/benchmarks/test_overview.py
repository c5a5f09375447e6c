"""The pictures of README.md and docs/: the overview shows the figures of results/, and each main page has one."""

import re

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
    words = re.findall(r'<text x="(\d+)" y="\d+" font-size="(\d+)"[^>]*>([^<]*)<', committed)
    assert all(0.56 * int(size) * len(text) < diagrams.WIDTH - 16 for _, size, text in words[1:]), (
        "a line must fit its box"
    )


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
