"""Tests questions with videos: they are read, sampled with and without the videos, and written into pairs."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("av", reason="needs the extra video")
import video_models
from stub_engine import StubEngine
from video_files import write_frames, write_video

from mpo_ext.data import open_pairs
from mpo_ext.generate.correctness import Correctness, CorrectnessConfig
from mpo_ext.generate.dropout_ntp import DropoutNTP, DropoutNTPConfig
from mpo_ext.generate.engine import Request, SamplingConfig, refused_videos
from mpo_ext.generate.items import Item
from mpo_ext.generate.questions import without_placeholders
from mpo_ext.generate.runner import run
from mpo_ext.generate.transformers_engine import TransformersEngine
from mpo_ext.videos import Video, load_video


def write_items(folder: Path, *items: dict[str, Any]) -> Path:
    path = folder / "items.jsonl"
    path.write_text("".join(json.dumps({"answer_gt": "7", **item}) + "\n" for item in items))
    return path


def test_items() -> None:
    item = Item.from_dict({"question": "<video>Q?", "video": {"path": "a.mp4", "fps": 1}}, image_root="/r")
    assert item.problem is None
    assert item.videos == (Video("a.mp4", fps=1),)
    assert item.video_sources == (Video("/r/a.mp4", fps=1),)
    assert Item.from_dict(item.to_dict(), image_root="/r") == item
    assert item.pair("q", "c", "r", {}).videos == item.videos
    assert item.digest != Item.from_dict({"question": "<video>Q?", "video": "a.mp4"}).digest
    subset = Item.from_dict({"question": "Q?", "videos": ["a.mp4"]}, image_root="/r", subset="s")
    assert subset.pair_videos == (Video("/r/a.mp4"),)
    problems = {
        "number of <video> is not that of the videos": {"question": "<video><video>", "videos": ["a.mp4"]},
        "videos are URLs, which are not fetched: download them first": {"question": "Q", "video": "https://a/b.mp4"},
        "video must be paths, lists of frames or objects, got int 3": {"question": "Q", "video": 3},
    }
    for problem, values in problems.items():
        assert Item.from_dict(values).problem == problem
    outside = Item.from_dict({"question": "Q?", "videos": ["../a.mp4"]}, image_root="/r", subset="s")
    assert outside.problem == "image outside the root of its subset"
    assert without_placeholders("<video>\nWhat <image>is <video>it?") == "What is it?"


def test_dropout_ntp_removes_the_video(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", 8)
    path = write_items(
        tmp_path,
        {"question": "<video>\nWhat?", "video": "a.mp4", "chosen": "It moves up and then down. Final answer: 7"},
        {"question": "What?", "video": "none.mp4", "chosen": "It moves. Final answer: 7"},
    )
    engine = StubEngine()
    summary = run(DropoutNTP(DropoutNTPConfig(matcher=None)), engine, path, tmp_path / "out",
                  image_root=str(tmp_path), stream=None)  # fmt: skip
    assert [(request.question, request.images, request.videos) for request in engine.requests] == [
        ("What?", (), ()),
        ("What?", (), ()),
    ]
    pairs = list(open_pairs(tmp_path / "out" / "pairs.jsonl").pairs)
    assert len(pairs) == summary.pairs
    assert pairs[0].question == "<video>\nWhat?"
    assert pairs[0].videos == (Video("../a.mp4"),)
    assert open_pairs(tmp_path / "out" / "pairs.jsonl").read(0)[1].videos == (Video(str(tmp_path / "a.mp4")),)
    engine = StubEngine()
    summary = run(DropoutNTP(DropoutNTPConfig(matcher=None, with_image=True)), engine, path, tmp_path / "seen",
                  image_root=str(tmp_path), stream=None)  # fmt: skip
    assert [[len(video.frames) for video in request.videos] for request in engine.requests] == [[2]]
    assert summary.skipped == {"video cannot be read": 1}


def test_correctness_shows_the_video(tmp_path: Path) -> None:
    frames = [os.path.relpath(path, tmp_path) for path in write_frames(tmp_path / "f", 3)]
    path = write_items(
        tmp_path,
        {"question": "What?", "videos": [frames]},
        {"question": "<video>?", "videos": ["none.mp4"]},
        {"question": "What <video>?"},
    )
    engine = StubEngine()
    config = CorrectnessConfig(samples=8, template="cot")
    summary = run(Correctness(config), engine, path, tmp_path / "out", image_root=str(tmp_path), stream=None)
    assert len(engine.requests) == 8
    assert {len(video.frames) for request in engine.requests for video in request.videos} == {3}
    assert summary.skipped["video cannot be read"] == 1
    assert summary.skipped["number of <video> is not that of the videos"] == 1
    lines = [json.loads(line) for line in (tmp_path / "out" / "pairs.jsonl").read_text().splitlines()]
    assert lines
    assert all(line["videos"] == [[f"../{frame}" for frame in frames]] for line in lines)


def test_unsolved_questions_keep_the_paths_of_their_videos(tmp_path: Path) -> None:
    frames = [os.path.relpath(path, tmp_path) for path in write_frames(tmp_path / "f", 3)]
    path = write_items(tmp_path, {"question": "What?", "videos": [frames], "answer_gt": "10", "chosen": "It is ten."})
    out = tmp_path / "out"
    run(Correctness(CorrectnessConfig(samples=4)), StubEngine(), path, out, image_root=str(tmp_path), stream=None)
    assert json.loads((out / "unsolved.jsonl").read_text())["videos"] == [frames]
    unsolved = DropoutNTP(DropoutNTPConfig(matcher=None))
    run(unsolved, StubEngine(), out / "unsolved.jsonl", tmp_path / "blind", image_root=str(tmp_path), stream=None)
    (pair,) = open_pairs(tmp_path / "blind" / "pairs.jsonl").pairs
    assert pair.videos == (Video(frames=tuple(f"../{frame}" for frame in frames)),)


def requests_of(videos: Sequence[Any], **options: Any) -> list[Request]:
    sampling = SamplingConfig(temperature=0.8, max_new_tokens=6)
    return [
        Request(key=f"{number}", question="What?", videos=(video,), seed=number, sampling=sampling, **options)
        for number, video in enumerate(videos)
    ]


@pytest.mark.parametrize("family", video_models.BUILDERS)
def test_the_engine_shows_videos_to_the_model(family: str, tmp_path: Path) -> None:
    """A batch gives the same continuations as single requests, and different frames give different logits."""
    torch.manual_seed(0)
    model, processor = video_models.BUILDERS[family]()
    engine = TransformersEngine(model.eval(), processor, batch_size=4)
    paths = write_frames(tmp_path, 6)
    videos = [load_video(paths[:4]), load_video(paths[2:]), load_video(paths[:3])]
    requests = requests_of([videos[0], *videos, videos[0]])
    together = engine.generate(requests)
    assert together == [engine.generate([request])[0] for request in requests]
    texts = [engine.chat.prompt(request) for request in requests[1:4]]
    logits = []
    for request, prompt in zip(requests[1:4], texts, strict=True):
        inputs = engine._inputs([request], [prompt])
        with torch.no_grad():
            logits.append(model(**inputs).logits[0, -1])
    assert not torch.allclose(logits[0], logits[1], atol=1e-6)
    assert not torch.allclose(logits[0], logits[2], atol=1e-6)
    blind = engine._inputs([Request(question="What?")], [engine.chat.prompt(Request(question="What?"))])
    assert not any("pixel" in name for name in blind)


def test_other_engines_refuse_videos_by_name(tmp_path: Path) -> None:
    (request,) = requests_of([load_video(write_frames(tmp_path, 2))])
    for name in ("vllm", "openai"):
        refusal = refused_videos(name, request).refusal
        assert refusal == f"videos must be none for the engine {name}, got 1: use --engine transformers"
