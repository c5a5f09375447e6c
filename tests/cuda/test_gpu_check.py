"""What of benchmarks/gpu_check.py runs without a GPU: its arithmetic, its steps, its report, its programs on a CPU."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import gpu_check  # noqa: E402
from benchmarks.gpu_check import Case, Clock, Step, Timing  # noqa: E402


def test_the_bytes_needed_are_those_of_the_floor() -> None:
    case = Case(tokens=4096, vocab=151_936)
    assert case.bytes_needed("forward") == 8192 * 151_936 * 2
    assert case.bytes_needed("both") == 3 * case.bytes_needed("forward")
    sparse = Case(tokens=4096, vocab=151_936, share=0.1)
    assert sparse.bytes_needed("forward") == 820 * 151_936 * 2
    assert sparse.bytes_needed("backward") == (820 + 8192) * 151_936 * 2


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    assert gpu_check.main([]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().out


def test_the_small_program_agrees_with_plain_torch_on_the_cpu() -> None:
    assert gpu_check.small_program("cpu", "cpu") == []


def test_every_rival_is_measured_on_the_cpu() -> None:
    case = Case(tokens=3, vocab=50, dtype="float32", share=0.5)
    timings = gpu_check.measure(case, Clock("cpu"), ["cpu"], runs=2)
    assert set(timings) == {"forward", "backward", "both"}
    for rows in timings.values():
        assert {"mpo_ext, cpu", "eager", "torch.compile"} <= set(rows)
        assert all(len(timing.ms) == 2 for timing in rows.values())
    assert gpu_check.copy_bandwidth(Clock("cpu"), 1 << 20) > 0


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


def test_the_report_holds_steps_figures_and_failures() -> None:
    case = Case()
    timing = Timing([1.0, 2.0, 3.0], 5 << 20)
    table = gpu_check.render_table(case, {"both": {"mpo_ext, cuda": timing}}, 3000.0)
    assert "| both | mpo_ext, cuda | 2.000 (1.000 .. 3.000) | 3734 | 124% | 5.0 |" in table
    steps = [Step("build", True, 61.0), Step("tests", False, 9.0, ["tests: exit status 1, see tests.log"])]
    report = gpu_check.render_report({"gpu": "none"}, steps, 3000.0, [table], gpu_check.PEERS)
    assert "| tests | FAILED | 9 |" in report
    assert "- tests: tests: exit status 1, see tests.log" in report
    assert table in report
