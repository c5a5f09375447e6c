"""What ``mpo-ext doctor`` says of builds that are not the one under test."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from mpo_ext.__main__ import main
from mpo_ext.ops import native as _native


def facts(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    assert main(["doctor"]) == 0
    return {line[:20].strip(): line[20:] for line in capsys.readouterr().out.splitlines()}


@pytest.fixture
def cuda_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the native module had CUDA kernels, and no GPU were here."""
    names = {name: getattr(_native.compiled(), name) for name in dir(_native.compiled())}
    names |= {"has_cuda": True, "cuda_archs": "80, 90 and PTX", "cuda_compiler": "nvcc 13.0"}
    module = SimpleNamespace(**names)
    monkeypatch.setattr(_native, "compiled", lambda: module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize(
    ("torch_cuda", "said"), [("13.0", "built; no GPU here"), (None, "built; no GPU here, and a torch without CUDA")]
)
@pytest.mark.usefixtures("cuda_build")
def test_a_cuda_build_without_a_gpu_is_told_plainly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], torch_cuda: str | None, said: str
) -> None:
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    found = facts(capsys)
    assert found["CUDA architectures"] == "80, 90 and PTX, nvcc 13.0"
    assert found["CUDA kernels"] == said
    assert "cuda" not in found["backends"]


def test_a_build_without_cuda_kernels_says_how_to_build_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {name: getattr(_native.compiled(), name) for name in dir(_native.compiled())} | {
        "has_cuda": False,
        "cuda_archs": "",
    }
    module = SimpleNamespace(**names)
    monkeypatch.setattr(_native, "compiled", lambda: module)
    assert "MPO_CUDA=ON pip install . builds them" in facts(capsys)["CUDA kernels"]
