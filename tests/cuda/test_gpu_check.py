"""The parts of benchmarks/gpu_check.py that run without a GPU: arithmetic, steps, measurements on a CPU, report."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import gpu_check  # noqa: E402
from benchmarks.gpu_check import StepResult  # noqa: E402
from benchmarks.measure import Timing  # noqa: E402
from mpo_ext.plan.roofline import LossShape  # noqa: E402


def test_the_bytes_needed_are_those_of_the_floor() -> None:
    dense = LossShape(tokens=4096, vocab=151_936)
    assert gpu_check.bytes_needed(dense, "forward") == 8192 * 151_936 * 2
    assert gpu_check.bytes_needed(dense, "both") == 3 * gpu_check.bytes_needed(dense, "forward")
    sparse = LossShape(tokens=4096, vocab=151_936, share=0.1)
    assert gpu_check.bytes_needed(sparse, "forward") == 820 * 151_936 * 2
    assert gpu_check.bytes_needed(sparse, "backward") == (820 + 8192) * 151_936 * 2


def test_without_a_gpu_it_prints_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    assert gpu_check.main([]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().out


def test_every_provider_is_measured_on_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    loss = LossShape(tokens=3, vocab=50, dtype="float32", share=0.5)
    names = ("mpo_ext", "mpo_ext, reuse_logits", "eager", "torch.compile", "mpo_ext, cuda")
    timings, peaks = gpu_check.measure(loss, "cpu", names, runs=2)
    assert set(timings) == {"forward", "backward", "both"}
    expected = set(names) if torch.cuda.is_available() else set(names[:-1])
    for by_name in timings.values():
        assert set(by_name) >= expected - {"mpo_ext, cuda"}
        assert all(len(timing.seconds) == 2 for timing in by_name.values())
    assert set(peaks.values()) == {0}
    assert "mpo_ext, cuda cannot run [2, 3, 50] float32, 50% labelled: RuntimeError" in capsys.readouterr().out
    assert gpu_check.copy_bandwidth("cpu", 1 << 20) > 0


def test_providers_are_those_of_the_benchmark_from_logits() -> None:
    assert set(gpu_check.PROVIDERS) <= set(gpu_check.logits.LOSSES)


def test_a_step_that_fails_is_reported_with_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = {
        "good": [sys.executable, "-c", "print('fine')"],
        "bad": [sys.executable, "-c", "raise SystemExit(3)"],
        "absent": ["no-such-program"],
    }
    monkeypatch.setattr(gpu_check, "commands", lambda step, root: made)
    step = gpu_check.run_step("tests", ROOT, tmp_path)
    assert not step.passed
    assert step.notes == ["bad: exit status 3, see bad.log", "absent: no-such-program is not on PATH"]
    assert "fine" in (tmp_path / "good.log").read_text()


def test_the_commands_name_every_sanitizer_and_backend() -> None:
    assert len(gpu_check.commands("sanitizer", ROOT)) == 4
    assert "cuda" in gpu_check.step_environment("tests")["MPO_TEST_BACKENDS"]
    assert gpu_check.step_environment("build")["MPO_CUDA"] == "ON"
    with pytest.raises(ValueError, match="step must be"):
        gpu_check.commands("measure", ROOT)


def test_the_files_of_the_commands_exist() -> None:
    for step in ("tests", "hardware", "sanitizer"):
        for command in gpu_check.commands(step, ROOT).values():
            paths = [Path(word) for word in command if word.startswith(str(ROOT / "tests"))]
            assert paths
            assert all(path.exists() for path in paths)


def test_the_report_holds_steps_results_and_failures() -> None:
    timing = Timing([0.001, 0.002, 0.003])
    loss = LossShape(tokens=4096, vocab=151_936)
    table = gpu_check.render_table(loss, {"both": {"mpo_ext, cuda": timing}}, {"mpo_ext, cuda": 5 << 20}, 3e12)
    (row,) = [line for line in table.splitlines() if line.startswith("| both, mpo_ext, cuda")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:] == ["2.000 (1.000 .. 3.000)", "3734", "124%", "5.0"]
    steps = [StepResult("build", True, 61.0), StepResult("tests", False, 9.0, ["tests: exit status 1, see tests.log"])]
    report = gpu_check.render_report({"gpu": "none"}, steps, 3e12, [table])
    assert any(line.split() == ["|", "tests", "|", "FAILED", "|", "9", "|"] for line in report.splitlines())
    assert "- tests: tests: exit status 1, see tests.log" in report
    assert table.strip() in report
