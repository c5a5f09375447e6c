"""Tests ``data check``, ``view`` and ``stats`` on pairs with videos or with separate images of the rejected side."""

import base64
import io
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("av", reason="needs the extra video")
from mmpr_files import run_data
from PIL import Image
from video_files import number_of, write_frames, write_video

from mpo_ext.data import open_pairs
from mpo_ext.data.check import check_pairs
from mpo_ext.data.stats import collect_stats
from mpo_ext.data.view import write_view


def write_rows(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "rows.jsonl"
    rest = {"chosen": "c", "rejected": "r"}
    lines = [{"question": f"q{number}", **rest, "images": [], **row} for number, row in enumerate(rows)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_check_finds_bad_videos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_video(tmp_path / "good.mp4", 8)
    write_frames(tmp_path / "frames", 2)
    (tmp_path / "text.mp4").write_text("no video")
    os.mkfifo(tmp_path / "pipe.mp4")
    Image.new("RGB", (5, 5)).save(tmp_path / "small.png")
    frames = ["frames/000.png", "frames/001.png"]
    path = write_rows(
        tmp_path,
        {"videos": ["good.mp4", frames], "question": "<video><video>q"},
        {"videos": ["none.mp4"]},
        {"videos": ["text.mp4"]},
        {"videos": ["pipe.mp4"]},
        {"videos": ["https://example.org/a.mp4"]},
        {"videos": [["frames/000.png", "frames/002.png"]]},
        {"videos": [["frames/000.png", "small.png"]]},
        {"videos": ["good.mp4"], "question": "<video> <video> q"},
        {"images": ["small.png"], "rejected_images": ["none.png"], "question": "<image>q"},
    )
    expected = {
        "missing video": 1, "broken video": 3, "missing frame of a video": 1, "video is a URL": 1, "placeholders": 1,
        "missing image": 1,
    }  # fmt: skip
    expected["missing video"] += 1  # pipe.mp4 is not a regular file
    expected["broken video"] -= 1
    report = check_pairs(open_pairs(path))
    assert report.totals() == expected
    assert report.totals() == check_pairs(open_pairs(path), images="decode").totals()
    assert run_data("check", path) == 1
    out = capsys.readouterr().out
    assert "9 of 9 pairs with images or videos; 9 videos; 1 pairs with other images for the rejected response" in out
    assert check_pairs(open_pairs(path), images="skip").totals() == {"placeholders": 1}


def test_equal_responses_to_other_images_are_a_preference(tmp_path: Path) -> None:
    row = {"chosen": "c", "rejected": "c", "images": ["a.png"]}
    path = write_rows(tmp_path, {**row, "rejected_images": ["b.png"]}, {**row, "rejected_images": ["a.png"]}, row)
    assert check_pairs(open_pairs(path), images="skip").totals() == {"equal responses": 2}


def test_a_video_that_breaks_off_is_found(tmp_path: Path) -> None:
    video = write_video(tmp_path / "a.mkv", 200, codec="ffv1")
    content = video.read_bytes()
    path = write_rows(tmp_path, {"videos": ["a.mkv"]})
    assert check_pairs(open_pairs(path), images="decode").is_clean
    video.write_bytes(content[: len(content) // 2])
    report = check_pairs(open_pairs(path))
    assert report.totals() == {"broken video": 1}
    assert "video must be complete, got 1" in report.examples["broken video"][0].message


def test_view_shows_key_frames(tmp_path: Path) -> None:
    write_video(tmp_path / "good.mp4", 24)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "b.png")
    path = write_rows(
        tmp_path,
        {"videos": ["good.mp4"]},
        {"videos": ["good.mp4", "none.mp4"], "question": "<video><video>"},
        {"images": ["a.png"], "rejected_images": ["b.png"]},
    )
    count, _ = write_view(tmp_path / "v.html", open_pairs(path), thumbnail=32)
    assert count == 3
    data = json.loads(re.search(r'id="data"[^>]*>(.*?)</script>', (tmp_path / "v.html").read_text(), re.S)[1])
    first, second, third = (pair["images"] for pair in data["pairs"])
    assert [entry["name"] for entry in first] == [f"good.mp4 at {second:.1f} s" for second in (0, 0.75, 1.5, 2.25)]
    assert second == [*first, {"name": "none.mp4", "problem": "missing"}]
    assert third[1]["name"] == "for rejected: b.png"
    shown = [
        Image.open(io.BytesIO(base64.b64decode(data["images"][entry["index"]].partition(",")[2]))) for entry in first
    ]
    assert [number_of(image) for image in shown] == [0, 6, 12, 18]
    assert shown[0].size == (32, 24)
    assert len(data["images"]) == 6
    write_view(tmp_path / "v.html", open_pairs(path), thumbnail=0)
    assert '"omitted"' in (tmp_path / "v.html").read_text()


def test_stats_count_videos(tmp_path: Path) -> None:
    path = write_rows(tmp_path, {"videos": ["a.mp4", "b.mp4"]}, {}, {"images": ["a"], "rejected_images": ["b"]})
    (stats,) = collect_stats(open_pairs(path)).values()
    assert (stats.pairs, stats.videos, stats.text_only, stats.rejected_images) == (3, 2, 1, 1)
    assert stats.to_dict()["videos"] == 2
