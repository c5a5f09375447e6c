"""Tests that the CPU kernels access no byte outside their tensors, which lie next to inaccessible memory pages."""

import ctypes
import faulthandler
import mmap
import os
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mpo_ext.ops import native
from mpo_ext.ops.checks import STATS
from mpo_ext.ops.logits import logits_grad_, stats_mask, token_logp
from mpo_ext.ops.pair_loss import PairLossSettings, pair_loss

CASES = int(os.environ.get("MPO_GUARD_CASES", "80"))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PROT_NONE = 0


def guarded(values: Tensor, *, at_end: bool) -> Tensor:
    """Returns a copy of ``values`` between two inaccessible memory pages.

    ``at_end`` True: the copy ends right before the second page. False: the copy begins right after the first page.
    """
    size = values.numel() * values.element_size()
    pages = -(-max(size, 1) // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 2) * mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (0, pages + 1):
        status = ctypes.CDLL(None).mprotect(
            ctypes.c_void_p(address + page * mmap.PAGESIZE), ctypes.c_size_t(mmap.PAGESIZE), _PROT_NONE
        )
        assert status == 0
    start = mmap.PAGESIZE + (pages * mmap.PAGESIZE - size if at_end else 0)
    copy = torch.frombuffer(memory, dtype=values.dtype, count=values.numel(), offset=start).view(values.shape)
    return copy.copy_(values)


def test_no_kernel_reads_or_writes_outside_of_its_tensors(
    monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, Any], None]
) -> None:
    record_property("cases", CASES)
    rng = random.Random(CASES)
    settings = PairLossSettings(0.1, 0.8, 0.2, 1.0, 0.0, False).numbers()
    for _ in range(CASES):
        monkeypatch.setenv("MPO_CPU_ISA", rng.choice(native.cpu_isas()))
        at_end = rng.random() < 0.7
        dtype, vocab = rng.choice(DTYPES), rng.choice([rng.randint(1, 140), rng.randint(1, 3000)])
        length, sequences = rng.randint(1, 6), 2 * rng.randint(1, 3)
        labels = torch.tensor(
            [
                [rng.choice([-100, 0, vocab - 1, vocab, -1, 2**40, rng.randrange(vocab)]) for _ in range(length)]
                for _ in range(sequences)
            ]
        )
        labels = guarded(labels, at_end=at_end)
        logits = guarded(torch.randn(sequences, length, vocab).to(dtype), at_end=at_end)
        logp, row_max, row_sum, _ = token_logp(logits, labels, -100, stats_mask(STATS), "cpu")
        rows = [guarded(tensor, at_end=at_end) for tensor in (logp, row_max, row_sum)]
        references = guarded(torch.zeros(sequences), at_end=at_end)
        state = guarded(torch.zeros(2, dtype=torch.float64), at_end=at_end)
        offsets = guarded(torch.arange(sequences + 1) * length, at_end=at_end) if rng.random() < 0.5 else None
        outputs = pair_loss(rows[0], labels, references, state, offsets, settings, -100, "cpu")
        weight = guarded(outputs[-1], at_end=at_end)
        logits_grad_(logits, labels, rows[1], rows[2], weight, None, -100, "cpu")


def test_the_guard_is_there() -> None:
    """Checks that a read past the end of a guarded tensor kills the process."""
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        values = guarded(torch.zeros(3), at_end=True)
        ctypes.string_at(values.data_ptr() + 12, 1)
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
