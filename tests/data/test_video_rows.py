"""Tests pairs with videos, and pairs with separate images for the rejected response, in every format.

Formats that cannot store such pairs must reject them.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from rows import assistant, open_rows, read_row, user

from mpo_ext.data import BadLine, Pair, open_pairs
from mpo_ext.data.convert import convert
from mpo_ext.data.mmpr import MMPRDataset, read_meta, write_mmpr
from mpo_ext.videos import Video

A, FRAMES = Video("{root}/a.mp4"), Video(frames=("{root}/0.png", "{root}/1.png"), fps=4.0)
REST = {"chosen": "c", "rejected": "r"}
MIXED = [
    user([{"type": "text", "text": "q"}, {"type": "video", "video": "a.mp4"}, {"type": "image", "image": "b.png"}])
]


def placed(root: Path, *videos: Video) -> tuple[Video, ...]:
    return tuple(video.map_paths(lambda path: path.replace("{root}", str(root))) for video in videos)


ROWS: list[tuple[str, dict[str, Any], str, tuple[Video, ...]]] = [
    ("pairs", {"question": "<video>\nq", **REST, "videos": ["a.mp4"]}, "<video>\nq", (A,)),
    ("mmpr", {"video": "a.mp4", "question": "q", **REST}, "q", (A,)),
    ("mmpr", {"video": ["a.mp4", {"frames": ["0.png", "1.png"], "fps": 4.0}], "question": "<video><video>", **REST},
     "<video><video>", (A, FRAMES)),
    ("sharegpt", {"conversations": [{"from": "human", "value": "<video>q"}], **REST, "videos": ["a.mp4"]}, "<video>q",
     (A,)),
    ("sharegpt", {"messages": [user("<video>q")], **REST, "videos": [["0.png", "1.png"]]}, "<video>q",
     (Video(frames=FRAMES.frames),)),
    ("sharegpt", {"messages": [user("<video> <video>")], **REST, "videos": ["a.mp4", ["0.png", "1.png"]]},
     "<video> <video>", (A, Video(frames=FRAMES.frames))),
    ("alpaca", {"instruction": "q", **REST, "video": "a.mp4"}, "q", (A,)),
    ("swift", {"messages": [user("<video>q"), assistant("c")], "rejected_response": "r", "videos": ["a.mp4"]},
     "<video>q", (A,)),
    ("rlaif-v", {"question": "q", **REST, "image": {"path": "b.png"}, "video": {"path": "a.mp4"}}, "q", (A,)),
    ("trl", {"prompt": "q", **REST, "videos": ["a.mp4"]}, "q", (A,)),
    ("trl", {"prompt": MIXED, **REST}, "q<video>\n<image>\n", (A,)),
    ("trl", {"prompt": [user([{"type": "video", "video": "a.mp4", "fps": 1.0, "max_frames": 3}])], **REST},
     "<video>\n", (Video(A.path, fps=1.0, max_frames=3),)),
    ("trl", {"prompt": [user([{"type": "video_url", "video_url": {"url": "a.mp4"}}])], **REST}, "<video>\n", (A,)),
    ("openai", {"input": {"messages": [user([{"type": "video", "path": "a.mp4"}])]},
                "preferred_output": [assistant("c")], "non_preferred_output": [assistant("r")]}, "<video>\n", (A,)),
]  # fmt: skip


@pytest.mark.parametrize(("format", "row", "question", "videos"), ROWS)
def test_rows_with_videos(
    format: str, row: dict[str, Any], question: str, videos: tuple[Video, ...], tmp_path: Path
) -> None:
    source = open_rows(tmp_path, [row])
    assert source.format == format
    pair = source.read(0)[1]
    assert isinstance(pair, Pair), pair
    assert (pair.question, pair.chosen, pair.rejected) == (question, "c", "r")
    assert pair.videos == placed(tmp_path, *videos)
    assert not pair.extra.keys() - {"$source"}
    convert(source, tmp_path / "out.jsonl", "pairs")
    assert open_pairs(tmp_path / "out.jsonl", format="pairs").read(0)[1] == pair


@pytest.mark.parametrize(
    ("format", "row", "words"),
    [
        ("pairs", {"question": "<video>q", **REST, "images": [], "videos": []}, "must not hold <video> without"),
        ("pairs", {"question": "<video 1>q", **REST, "videos": ["a.mp4"]}, "question must mark videos by <video>"),
        ("trl", {"prompt": "<|video_2|><|video_1|>q", **REST, "videos": ["a.mp4", "b.mp4"]}, "got <|video_2|> in"),
        ("pairs", {"question": "q", **REST, "videos": "a.mp4"}, "videos must be a list of videos"),
        ("pairs", {"question": "q", **REST, "videos": [{"path": "a.mp4", "start": 1}]}, "got 'start'"),
        ("mmpr", {"question": "q", **REST, "videos": ["a.mp4"]}, "videos"),
        ("mmpr", {"question": "q", **REST, "video": "../a.mp4"}, "must stay inside"),
        ("mmpr", {"question": "q", **REST, "image": "a.png", "rejected_image": 3}, "rejected_image must be a path"),
        ("trl", {"prompt": "q", "chosen": "<video>", "rejected": "r", "videos": ["a.mp4"]}, "chosen must not hold"),
        ("trl", {"prompt": [user([{"type": "video"}])], **REST}, "a video for each place"),
        ("trl", {"prompt": [user([{"type": "video", "video": "a.mp4", "nframes": 3}])], **REST}, "'nframes'"),
        ("trl", {"prompt": "q", **REST, "video": "a.mp4", "videos": ["b.mp4"]}, "must not both be given"),
        ("trl", {"prompt": "q", **REST, "video": "data:video/mp4;base64,AAAA"}, "must be files"),
        ("trl", {"prompt": "q", "chosen": [assistant("x"), user([{"type": "video", "video": "a.mp4"}]),
                                           assistant("y")], "rejected": "r"}, "must be without videos"),
        ("trl", {"prompt": [user("q <video>"), assistant("x"), user("y")], **REST, "videos": ["a.mp4", "b.mp4"]},
         "no or 2 places"),
        ("trl", {"prompt": "q", **REST, "images": ["a.png"], "rejected_images": ["b.png", "c.png"]},
         "one for each of the 1 images, got 2"),
    ],
)  # fmt: skip
def test_refused_rows(format: str, row: dict[str, Any], words: str, tmp_path: Path) -> None:
    bad = read_row(tmp_path, row, format=format)
    assert isinstance(bad, BadLine), bad
    assert words in bad.reason


VIDEO_PAIR = Pair("<video>q", "c", "r", videos=(Video("/r/a.mp4", fps=1.0), Video(frames=("/r/0.png",))))
REJECTED_PAIR = Pair("<image>q", "c", "r", ("/r/a.png",), rejected_images=("/r/b.png",))


def test_json_form() -> None:
    for pair in (VIDEO_PAIR, REJECTED_PAIR):
        assert Pair.from_dict(json.loads(json.dumps(pair.to_dict()))) == pair
    assert Pair("q", "c", "r").to_dict().keys().isdisjoint({"videos", "rejected_images"})
    pairs = [VIDEO_PAIR, REJECTED_PAIR, Pair("<video>q", "c", "r"), Pair("<image>q", "c", "r", ("/r/a.png",))]
    assert len({pair.key() for pair in pairs}) == 4
    assert VIDEO_PAIR.media_paths == ("/r/a.mp4", "/r/0.png")
    assert REJECTED_PAIR.map_paths(str.upper).media_paths == ("/R/A.PNG", "/R/B.PNG")


def test_mmpr_is_written_and_read_without_loss(tmp_path: Path) -> None:
    lines = [
        {"video": "v/a.mp4", "question": "q", **REST},
        {"video": ["v/a.mp4"], "question": "q", **REST},
        {"video": [["0.png", "1.png"]], "question": "q", **REST},
        {"image": "a.png", "video": {"path": "a.mp4", "fps": 1.5}, "question": "q", **REST},
        {"image": "a.png", "rejected_image": "b.png", "question": "q", **REST},
        {"image": ["a.png"], "rejected_image": ["b.png"], "question": "q", **REST},
        {"video": None, "question": "q", **REST},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "a.jsonl").write_text(text)
    (tmp_path / "meta.json").write_text(json.dumps({"s": {"root": "r", "annotation": "a.jsonl", "length": 7}}))
    source = open_pairs(tmp_path / "meta.json")
    assert source.read(4)[1].rejected_images == (str(tmp_path / "r" / "b.png"),)
    convert(source, tmp_path / "out", "mmpr")
    assert Path(read_meta(tmp_path / "out" / "meta.json")[0].annotation).read_text() == text
    convert(source, tmp_path / "pairs.jsonl", "pairs")
    convert(open_pairs(tmp_path / "pairs.jsonl"), tmp_path / "again", "mmpr")
    assert Path(read_meta(tmp_path / "again" / "meta.json")[0].annotation).read_text() == text


def test_new_pairs_are_written_to_mmpr(tmp_path: Path) -> None:
    pairs = [
        Pair("q", "c", "r", videos=(Video("/r/a.mp4"),)),
        Pair("q", "c", "r", videos=(Video(frames=("/r/0.png", "/r/1.png")),)),
        VIDEO_PAIR,
        REJECTED_PAIR,
    ]
    write_mmpr(tmp_path, pairs, root="/r")
    lines = [json.loads(line) for line in (tmp_path / "annotations" / "pairs.jsonl").read_text().splitlines()]
    assert [line.get("video") for line in lines] == [
        "a.mp4",
        [["0.png", "1.png"]],
        [{"path": "a.mp4", "fps": 1.0}, ["0.png"]],
        None,
    ]
    assert lines[3]["rejected_image"] == "b.png"
    read = [dataclasses.replace(pair, extra={}) for pair in MMPRDataset(tmp_path / "meta.json")]
    assert read == pairs
    with pytest.raises(ValueError, match=r"images must be below the root /r, got '/x/a\.mp4'"):
        write_mmpr(tmp_path, [Pair("q", "c", "r", videos=(Video("/x/a.mp4"),))], root="/r")


@pytest.mark.parametrize("pair", [VIDEO_PAIR, REJECTED_PAIR])
@pytest.mark.parametrize("format", ["trl", "hf"])
def test_formats_that_hold_none_refuse_them(pair: Pair, format: Any, tmp_path: Path) -> None:
    if format == "hf":
        pytest.importorskip("datasets", reason="needs datasets, which dev installs")
    (tmp_path / "in.jsonl").write_text(json.dumps(pair.to_dict()) + "\n" + json.dumps(Pair("q", "c", "r").to_dict()))
    source = open_pairs(tmp_path / "in.jsonl", format="pairs")
    name = "videos" if pair.videos else "rejected_images"
    with pytest.raises(BadLine, match=f"in.jsonl:1: {name}: {format} must have pairs without {name}"):
        convert(source, tmp_path / "out", format)
    count, skipped = convert(source, tmp_path / "out", format, skip_bad=True)
    assert (count, dict(skipped.counts)) == (1, {name: 1})


@pytest.mark.parametrize("name", ["video", "videos"])
def test_videos_of_a_table_are_stored(name: str, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="needs datasets, which dev installs")
    video = {"bytes": b"a video", "path": "a.mp4"}
    row = {"question": "q", **REST, name: video if name == "video" else [video]}
    datasets.Dataset.from_list([row, {**row, name: None}]).to_parquet(tmp_path / "rows.parquet")
    source = open_pairs(tmp_path / "rows.parquet", image_dir=tmp_path / "stored")
    (_, pair), (_, text) = source.scan()
    assert isinstance(pair, Pair), pair
    assert [Path(video.path).read_bytes() for video in pair.videos] == [b"a video"]
    assert text == Pair("q", "c", "r")
