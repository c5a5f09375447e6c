"""Tests the conditions under which the backend "triton" is chosen, and the errors if it cannot run."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mpo_ext import token_logp


def test_cpu_tensors_are_refused_outside_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run: it needs tensors on a GPU, got device cpu"):
        token_logp(torch.zeros(1, 4), torch.tensor([1]), backend="triton", shift=False)


def test_without_triton_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "triton" else find_spec(name, *a)
    )
    with pytest.raises(RuntimeError, match=r"triton is not installed: install the extra 'triton'"):
        token_logp(torch.zeros(1, 4), torch.tensor([1]), backend="triton", shift=False)


def test_without_triton_the_other_backends_work(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, mpo_ext\n"
        "z = torch.randn(2, 4, 9, requires_grad=True)\n"
        "out = mpo_ext.mpo_loss(z, torch.ones(2, 4, dtype=torch.int64), torch.zeros(2))\n"
        "out.loss.backward(); print(out.backend)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.stdout.strip() == "cpu", done.stderr
