"""Tests that the limits of images and videos of a run or a command do not apply to the next one in the process."""

import argparse
import os
from pathlib import Path
from typing import Any

import digits_run
import pytest

from mpo_ext.cli.main import main
from mpo_ext.cli.shared import add_image_limit, command
from mpo_ext.images import max_pixels
from mpo_ext.train.loop import train
from mpo_ext.videos import video_settings

LIMITS = {"data__max_image_pixels": 5000, "data__video_fps": 4.0, "data__video_max_frames": 8}
VARIABLES = ("MPO_MAX_IMAGE_PIXELS", "MPO_VIDEO_FPS", "MPO_VIDEO_MAX_FRAMES")


def limits() -> tuple[int, dict[str, Any]]:
    return max_pixels(), video_settings()


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("before", [None, "9000"])
def test_a_run_restores_the_limits(tmp_path: Path, before: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if before is not None:
        monkeypatch.setenv("MPO_MAX_IMAGE_PIXELS", before)
    default, seen = limits(), []
    pairs = digits_run.write_pairs(tmp_path / "data", 8)
    for name, settings in (("one", LIMITS), ("two", {})):
        recipe = digits_run.recipe(tmp_path / name, pairs, optim__max_steps=1, **settings)
        model, processor = digits_run.tiny()
        train(recipe, model=model, processor=processor, on_step=lambda step, line: seen.append(limits()))
        assert limits() == default
    assert seen == [(5000, {"fps": 4.0, "max_frames": 8}), default]
    refused = digits_run.recipe(tmp_path / "three", pairs, data__max_image_pixels=2)
    with pytest.raises(ValueError, match="at most 2 pixels"):
        train(refused, model=model, processor=processor)
    assert limits() == default


def test_a_command_restores_the_limits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen = []

    @command("test", extra="train")
    def run(args: argparse.Namespace) -> int:
        seen.append(limits())
        raise ValueError("an error must not keep the limits")

    parser = argparse.ArgumentParser()
    add_image_limit(parser)
    options = ["--max-image-pixels", "5000", "--video-fps", "4", "--video-max-frames", "8"]
    assert run(parser.parse_args(options)) == 2
    assert seen == [(5000, {"fps": 4.0, "max_frames": 8})]
    pairs = digits_run.write_pairs(tmp_path / "data", 8)
    digits_run.recipe(tmp_path / "out", pairs)
    overrides = [f"{name.replace('__', '.')}={value}" for name, value in LIMITS.items()]
    main(["train", str(tmp_path / "out.yaml"), "--dry-run", f"model.path={tmp_path}", *overrides])
    assert not any(name in os.environ for name in VARIABLES)
