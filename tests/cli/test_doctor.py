"""Tests the report of ``mpo-ext doctor``, also for imitated builds with and without CUDA kernels."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from mpo_ext.__main__ import main
from mpo_ext.ops import native


def facts(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    assert main(["doctor"]) == 0
    return {line[:20].strip(): line[20:] for line in capsys.readouterr().out.splitlines()}


def fake_build(monkeypatch: pytest.MonkeyPatch, **attributes: object) -> None:
    """Replaces attributes of the compiled module, to imitate another build."""
    compiled = native.compiled()
    module = SimpleNamespace(**{name: getattr(compiled, name) for name in dir(compiled)} | attributes)
    monkeypatch.setattr(native, "compiled", lambda: module)


def test_a_reader_that_closes_the_pipe_gets_no_traceback() -> None:
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "mpo_ext", "doctor"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.close()
    _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (1, "")


@pytest.mark.parametrize(
    ("torch_cuda", "fact"), [("13.0", "built; no GPU here"), (None, "built; no GPU here, and a torch without CUDA")]
)
def test_a_cuda_build_without_a_gpu_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], torch_cuda: str | None, fact: str
) -> None:
    fake_build(monkeypatch, has_cuda=True, cuda_archs="80, 90 and PTX", cuda_compiler="nvcc 13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    printed = facts(capsys)
    assert printed["CUDA architectures"] == "80, 90 and PTX, nvcc 13.0"
    assert printed["CUDA kernels"] == fact
    assert "cuda" not in printed["backends"]


def test_a_build_without_cuda_kernels_says_how_to_build_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_build(monkeypatch, has_cuda=False, cuda_archs="")
    assert "MPO_CUDA=ON pip install . builds them" in facts(capsys)["CUDA kernels"]
