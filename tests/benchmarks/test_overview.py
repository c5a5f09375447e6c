"""The picture of README.md shows the figures of results/."""

import pytest

from benchmarks import overview


def test_the_committed_picture_is_the_one_that_the_results_give() -> None:
    assert overview.PICTURE.read_text(encoding="utf-8") == overview.draw(), "run python -m benchmarks.overview"


def test_the_bars_show_the_measured_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overview, "times", lambda: {"mpo_ext": 0.5, "eager torch": 2.0})
    drawn = "\n".join(overview.speed())
    assert "0.50 s" in drawn
    assert f'width="{overview.BAR_PIXELS / 4:g}"' in drawn
    assert f'width="{overview.BAR_PIXELS:g}"' in drawn
