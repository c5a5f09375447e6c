"""Tests the operators on shards of the vocabulary, in one process. Merged results must equal unsharded results."""

from __future__ import annotations

import pytest
import torch
from shards import check_shards

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize(("vocab", "edges"), [(7, (1, 5)), (203, (64, 65, 128)), (9001, (5000,))], ids=str)
def test_merged_shards_equal_the_whole(kernel: str, dtype: torch.dtype, vocab: int, edges: tuple[int, ...]) -> None:
    check_shards(kernel, dtype, vocab, edges)
