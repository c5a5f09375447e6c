"""Tests that ``mpo-ext data check`` finds every defect."""

import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mmpr_files import DEFECTS, GOOD, LINES
from PIL import Image

from mpo_ext.data import open_pairs
from mpo_ext.data.check import check_pairs
from mpo_ext.train.mixture import Mixture
from mpo_ext.train.recipe import SourceRecipe

IMAGES = int(os.environ.get("MPO_SCALE_IMAGES", "300"))


def test_each_defect_is_found_alone_in_its_line(broken: Path) -> None:
    report = check_pairs(open_pairs(broken, max_line_bytes=100_000), keep=100)
    findings = {one.where.line: one for kind in report.examples.values() for one in kind}
    assert report.totals().total() == len(findings) == len(DEFECTS)
    for line, (kind, _, words) in enumerate(DEFECTS, start=2):
        assert (findings[line].kind, words in findings[line].message) == (kind, True), findings[line]
        assert findings[line].where.file.endswith("broken.jsonl")
    bad_lines = ("bad JSON", "bad UTF-8", "huge line", "bad field", "bad image path", "no image")
    bad = sum(kind in bad_lines for kind, _, _ in DEFECTS)
    assert report.stats["broken"].skipped == bad
    assert report.stats["broken"].pairs == 1 + len(DEFECTS) - bad


def test_the_valid_fixture_has_only_findings_for_answers_that_are_not_text(mmpr: Path) -> None:
    report = check_pairs(open_pairs(mmpr))
    assert report.totals() == {"answer_gt": 2}
    assert sum(stats.pairs for stats in report.stats.values()) == sum(map(len, LINES.values()))


def test_a_wrong_length_in_the_meta_file_is_found(mmpr: Path) -> None:
    meta = json.loads(mmpr.read_text())
    meta["multi"]["length"] = 99
    mmpr.write_text(json.dumps(meta))
    report = check_pairs(open_pairs(mmpr))
    assert report.counts["multi"] == {"wrong length": 1}
    assert report.examples["wrong length"][0].message == "length must be the number of lines, 3, got 99"


def test_duplicates_are_found_across_files_and_the_first_is_named(mmpr: Path) -> None:
    meta = json.loads(mmpr.read_text())
    meta["again"] = meta["multi"]
    mmpr.write_text(json.dumps(meta))
    report = check_pairs(open_pairs(mmpr), keep=9)
    assert report.counts["again"] == {"duplicate": 3}
    messages = [finding.message for finding in report.examples["duplicate"]]
    assert [message.rpartition("/")[2] for message in messages] == [f"multi.jsonl:{line}" for line in (1, 2, 3)]


def test_only_decoding_finds_a_truncated_image(images: Path, write_lines: Any) -> None:
    noise = Image.effect_noise((200, 200), 90)
    noise.save(images / "cut.jpg")
    (images / "cut.jpg").write_bytes((images / "cut.jpg").read_bytes()[:-5000])
    meta = write_lines("cut", [{**GOOD, "image": "cut.jpg"}, {**GOOD, "image": "none.png"}])
    kinds = {
        how: set(check_pairs(open_pairs(meta), images=how).totals()) for how in ("verify", "decode", "exists", "skip")
    }
    assert kinds == {
        "verify": {"missing image"},
        "decode": {"missing image", "broken image"},
        "exists": {"missing image"},
        "skip": set(),
    }
    with pytest.raises(ValueError, match="images must be one of verify, decode, exists, skip, got 'no'"):
        check_pairs(open_pairs(meta), images="no")  # type: ignore[arg-type]


def test_many_images_take_little_memory(tmp_path: Path, record_property: Callable[[str, Any], None]) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    for number in range(IMAGES):
        folder = tmp_path / f"{number // 1000:04d}"
        folder.mkdir(exist_ok=True)
        (folder / f"{number}.png").write_bytes(content)
    missing = {3, IMAGES // 2}
    with open(tmp_path / "p.jsonl", "w") as file:
        for number in range(IMAGES):
            name = "gone.png" if number in missing else f"{number // 1000:04d}/{number}.png"
            pair = {"question": f"q{number}", "chosen": "c", "rejected": "r", "images": [name]}
            file.write(json.dumps(pair) + "\n")
    source = open_pairs(tmp_path / "p.jsonl")
    tracemalloc.start()
    report = check_pairs(source)
    (overview,) = Mixture([SourceRecipe(path=str(tmp_path / "p.jsonl"))]).inspect(limit=IMAGES)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert report.totals() == {"missing image": 2}
    assert (overview.images, overview.missing, overview.pairs_missing) == (IMAGES - 1, 1, 2)
    assert peak < (4 << 20) + 700 * IMAGES
    record_property("cases", IMAGES)
