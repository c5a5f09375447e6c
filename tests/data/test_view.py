"""Tests the HTML page that shows pairs."""

import html.parser
import json
import re
from pathlib import Path
from typing import Any

import pytest
from mmpr_files import GOOD
from PIL import Image

from mpo_ext.data import (
    Pair,
    open_pairs,
    write_pairs,
)
from mpo_ext.data.view import write_view

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<!--<script>",
    "]]>&lt;b&gt;\u2028\u2029",
    "{{ 7 * 7 }}{% raw %}",
    "\"'`${alert(1)}\\",
    "javascript:alert(1)",
]


class Page(html.parser.HTMLParser):
    """Parses an HTML page into its start tags and the text of its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script":
            self.scripts[-1] += data


def test_the_page_shows_every_pair_and_no_pair_becomes_html(images: Path, tmp_path: Path) -> None:
    pytest.importorskip("jinja2", reason="needs jinja2, which dev installs")
    pairs = [
        Pair(
            f"{text}q{index}",
            f"shared 😀{text}c",
            f"shared 😀{text}r",
            (f"{images}/a.png", f"{images}/{text.replace('/', '')}.png"),
            text,
            {"pipeline": text, "cut": {"characters": 8, "tokens": 2}, text: text},
            {"$source": {"subset": text}, text: [text]},
        )
        for index, text in enumerate(HOSTILE)
    ]
    write_pairs(tmp_path / "p.jsonl", pairs)
    plain = tmp_path / "plain.html"
    write_pairs(tmp_path / "one.jsonl", [Pair("q", "c", "r", provenance={"pipeline": "x"})])
    write_view(plain, open_pairs(tmp_path / "one.jsonl"), title="t")
    count, skipped = write_view(tmp_path / "p.html", open_pairs(tmp_path / "p.jsonl"), title=HOSTILE[0])
    assert (count, skipped.total) == (len(pairs), 0)

    page, reference = Page((tmp_path / "p.html").read_text()), Page(plain.read_text())
    # Except the options of the filters, the elements are the same: no text of the data became HTML.
    names, expected = ([tag for tag, _ in one.tags if tag != "option"] for one in (page, reference))
    assert names == expected
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert len(page.scripts) == 2
    assert re.sub(r"\s", "", page.scripts[1]) == re.sub(r"\s", "", reference.scripts[1])
    assert not set("<>&\u2028\u2029") & set(page.scripts[0])
    shown = json.loads(page.scripts[0])
    assert [pair["question"] for pair in shown["pairs"]] == [pair.question for pair in pairs]
    for entry, pair, text in zip(shown["pairs"], pairs, HOSTILE, strict=True):
        assert (entry["chosen"], entry["rejected"], entry["answer"]) == (pair.chosen, pair.rejected, text)
        assert entry["subset"] == entry["pipeline"] == text
        assert json.loads(entry["more"]) == {"provenance": pair.provenance, "extra": {text: [text]}}
        utf16 = pair.chosen.encode("utf-16-le")
        assert utf16[: 2 * entry["cut"]].decode("utf-16-le") == "shared 😀"
        assert utf16[: 2 * entry["shared"]].decode("utf-16-le") == f"shared 😀{text}"
        assert entry["images"][0] == {"name": "a.png", "index": 0}
        assert entry["images"][1]["problem"] == "missing"
    assert len(shown["images"]) == 1
    assert shown["images"][0].startswith("data:image/jpeg;base64,")
    assert "http" not in re.sub(r"http-equiv", "", (tmp_path / "p.html").read_text())


def test_the_page_states_what_it_omits(write_lines: Any, images: Path, tmp_path: Path) -> None:
    pytest.importorskip("jinja2", reason="needs jinja2, which dev installs")
    Image.effect_noise((900, 600), 90).save(images / "large.png")
    lines = [{**GOOD, "question": f"q{index}", "image": ["a.png", "large.png"]} for index in range(50)]
    source = open_pairs(write_lines("many", [*lines, b"{\n"]))
    count, skipped = write_view(tmp_path / "p.html", source, image_budget=2000, max_characters=2)
    assert (count, skipped.counts) == (50, {"bad JSON": 1})
    text = (tmp_path / "p.html").read_text()
    assert "skipped 1: bad JSON" in text
    assert "1 images did not fit into 2,000 bytes." in text
    assert "q1… [" not in text
    assert "q1 … [1 more characters]" in text
    draws = []
    for seed in (1, 1, 2):
        write_view(tmp_path / "p.html", source, limit=10, seed=seed)
        text = (tmp_path / "p.html").read_text()
        assert f"10 of 51 lines, drawn at random with seed {seed}." in text
        draws.append([pair["where"] for pair in json.loads(Page(text).scripts[0])["pairs"]])
    assert draws[0] == draws[1] != draws[2]
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        write_view(tmp_path / "p.html", source, limit=0)


def test_thumbnails_are_small_for_every_image_mode(images: Path, tmp_path: Path) -> None:
    pytest.importorskip("jinja2", reason="needs jinja2, which dev installs")
    modes = {"1": 1, "L": 9, "P": 3, "LA": (1, 2), "RGBA": (1, 2, 3, 0), "CMYK": (1, 2, 3, 4), "I;16": 9, "F": 50.5}
    paths = []
    for index, (mode, color) in enumerate(modes.items()):
        paths.append(images / f"{index}.{'tiff' if mode in ('CMYK', 'F', 'I;16') else 'png'}")
        Image.new(mode, (2000, 1000), color).save(paths[-1])
    write_pairs(tmp_path / "p.jsonl", [Pair("q", "c", "r", tuple(map(str, paths)))])
    write_view(tmp_path / "p.html", open_pairs(tmp_path / "p.jsonl"), thumbnail=64)
    (pair,) = json.loads(Page((tmp_path / "p.html").read_text()).scripts[0])["pairs"]
    assert [image.get("index") for image in pair["images"]] == list(range(len(modes)))
    assert (tmp_path / "p.html").stat().st_size < 40_000
