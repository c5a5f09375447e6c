"""Tests the parts of benchmarks.gpu that need no GPU: result files, arithmetic, programs, tables."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import documents, schema
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import linear, programs, tables
from benchmarks.gpu import logits as stage_logits
from benchmarks.gpu.session import GpuStage
from benchmarks.logits import LOSSES
from benchmarks.measure import Timing, output_of
from mpo_ext.plan.roofline import LossShape

DENSE = LossShape(tokens=4096, vocab=151_936)


@pytest.fixture
def stage(tmp_path: Path) -> GpuStage:
    return GpuStage("correct", tmp_path, dry=True, command="python -m benchmarks.gpu --dry")


def test_the_bytes_needed_are_those_of_the_floor() -> None:
    assert stage_logits.bytes_needed(DENSE, "forward") == 8192 * 151_936 * 2
    assert stage_logits.bytes_needed(DENSE, "both") == 3 * stage_logits.bytes_needed(DENSE, "forward")
    sparse = LossShape(tokens=4096, vocab=151_936, share=0.1)
    assert stage_logits.bytes_needed(sparse, "forward") == 820 * 151_936 * 2
    assert stage_logits.bytes_needed(sparse, "backward") == (820 + 8192) * 151_936 * 2


def test_providers_are_those_of_the_benchmarks() -> None:
    assert set(stage_logits.PROVIDERS) <= set(LOSSES)
    assert set(linear.PROVIDERS) <= set(linear.linear.BENCHMARK.providers)


def test_every_file_of_the_stage_of_tests_exists() -> None:
    assert all((programs.ROOT / path).exists() for path in programs.TESTS)


def test_without_a_gpu_it_prints_the_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    assert command.main(["--stage", "correct", "--out", str(tmp_path)]) == 2
    assert "needs an NVIDIA GPU that torch sees, or --dry" in capsys.readouterr().out


def test_a_stage_that_takes_too_long_ends_with_the_programs_that_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slow = tmp_path / "slow"
    slow.write_text(f"#!/bin/sh\nsleep 60 & echo $! > {tmp_path}/started\nwait\n")
    slow.chmod(0o755)
    monkeypatch.setattr(command.sys, "executable", str(slow))
    args = command.parser().parse_args(["--out", str(tmp_path)])
    assert command._run_process("correct", args, 0.0) == 1
    assert "not started" in capsys.readouterr().out
    assert command._run_process("correct", args, 2.0) == 1
    assert f"stopped after 2 s; its results so far are in {tmp_path}" in capsys.readouterr().out
    started = int((tmp_path / "started").read_text())
    assert not _is_running(started)


def _is_running(process: int) -> bool:
    """Returns whether a process still runs after a wait of up to 10 seconds. A zombie counts as ended."""
    for _ in range(100):
        status = Path(f"/proc/{process}/stat")
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            return False
        time.sleep(0.1)
    return True


def test_the_stages_are_those_of_the_schema() -> None:
    assert sorted(command.ORDER) == sorted(schema.GPU_STAGES)


def test_the_file_is_written_after_every_case(stage: GpuStage) -> None:
    def breaks() -> list[str]:
        raise ValueError("x must be 1, got 2")

    assert stage.check("first", lambda: [])
    assert [point["status"] for point in schema.load(stage.path)["points"]] == ["passed"]
    assert not stage.check("second", lambda: ["off by 3"])
    assert not stage.check("third", breaks)
    points = schema.load(stage.path)["points"]
    assert [point["status"] for point in points] == ["passed", "failed", "failed"]
    assert stage.failed == ["second, mpo_ext: off by 3", "third, mpo_ext: ValueError: x must be 1, got 2"]


def test_a_program_that_fails_or_is_missing_is_a_point_with_a_log(stage: GpuStage) -> None:
    code = "print('Error: lost'); raise SystemExit(3)"
    log = programs._run(stage, "bad", [sys.executable, "-c", code])
    programs._run(stage, "good", [sys.executable, "-c", "print('fine')"])
    programs._run(stage, "absent", ["no-such-program"])
    assert [point["status"] for point in stage.points] == ["failed", "passed", "not run"]
    assert stage.points[0]["reason"] == f"exit status 3, see {log.name}: Error: lost"
    assert stage.points[2]["reason"] == "no-such-program is not on PATH"


def test_a_variant_changes_the_launch_shape_in_a_copy(tmp_path: Path) -> None:
    source = programs._edited(tmp_path, "512:2:8") / "csrc" / "mpo" / "cuda"
    assert "constexpr int kCudaThreads = 512;" in (source / "launch.h").read_text()
    assert "constexpr int kCudaBlocksPerSm = 2;" in (source / "launch.h").read_text()
    assert "constexpr int kUnroll = 8;" in (source / "rows.cuh").read_text()


def test_a_missing_program_has_no_output() -> None:
    assert output_of(["no-such-program"]) is None
    assert output_of([sys.executable, "-c", "raise SystemExit(1)"]) is None
    assert output_of([sys.executable, "-c", "print('x')"]) == "x"


def test_tables_show_what_was_measured(stage: GpuStage) -> None:
    stage.settings |= {"gpu": "NVIDIA H200", "driver": "580.1"}
    stage.check("first", lambda: [])
    stage.check("second", lambda: ["wrong"])
    measured = GpuStage("logits", stage.out, dry=True, command="python -m benchmarks.gpu")
    measured.settings |= stage.settings
    timing = Timing([0.001, 0.002, 0.004])
    measured.add("both", "measured", provider="eager", loss=DENSE, timing=timing, share_of_floor=0.5, peak_bytes=2**30)
    measured.add("both", "not run", "ImportError: no `quack`", provider="quack", loss=DENSE)
    text = tables.measured(documents.load(stage.out))
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line]
    assert ["operators and hardware", "1", "1", "0"] in [row[:4] for row in cells]
    row = ["both", "the same loss in eager torch", "2.000", "1.000 to 4.000", "50%", "", "1.00 GiB"]
    assert row in cells
    assert "- both, quack's cross entropy: ImportError: no  quack" in text
    assert tables.measured({}) == "There are no results of a GPU yet."


def test_a_dry_run_does_not_reach_the_docs(
    stage: GpuStage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stage.check("first", lambda: [])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    command.main(["--docs", "--out", str(tmp_path)])
    assert "is from a dry run and is left out" in capsys.readouterr().out
    assert not list((tmp_path / "results").iterdir())
    document = json.loads(stage.path.read_text())
    stage.path.write_text(json.dumps({**document, "quick": False}))
    command.main(["--docs", "--out", str(tmp_path)])
    assert (tmp_path / "results" / "gpu_correct.json").exists()
