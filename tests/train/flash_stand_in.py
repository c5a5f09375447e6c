"""A replacement for the package flash-attn in plain torch, for padded and for packed sequences."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
    causal: bool,
    window: tuple[int, int],
    softcap: float,
) -> Tensor:
    """Computes attention of one sequence. Returns ``[n, H, D]``.

    If there are more keys than queries, the last query is aligned with the last key, as in flash-attn since 2.1.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, 1) for tensor in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    distance = torch.arange(len(query)).unsqueeze(1) + len(key) - len(query) - torch.arange(len(key))
    visible = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    if window[0] >= 0:
        visible &= distance <= window[0]
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~visible, -torch.inf).softmax(-1), value)


class FlashAttention:
    """Replaces the package ``flash_attn``, and records the calls for packed sequences."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from transformers import modeling_flash_attention_utils as utils

        self.calls: list[dict[str, Any]] = []
        package, padding = types.ModuleType("flash_attn"), types.ModuleType("flash_attn.bert_padding")
        package.flash_attn_func = self.padded  # type: ignore[attr-defined]
        package.flash_attn_varlen_func = self.packed  # type: ignore[attr-defined]
        package.flash_attn_with_kvcache = None  # type: ignore[attr-defined]
        padding.pad_input, padding.unpad_input = utils._pad_input, utils._unpad_input  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "flash_attn", package)
        monkeypatch.setitem(sys.modules, "flash_attn.bert_padding", padding)
        monkeypatch.setattr(utils, "is_flash_attn_2_available", lambda **options: True)
        monkeypatch.setattr(utils, "_loaded_implementation", None)

    def padded(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        deterministic: bool = False,
    ) -> Tensor:
        rows = zip(q, k, v, strict=True)
        return torch.stack([attend(*row, softmax_scale, causal, window_size, softcap) for row in rows])

    def packed(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        deterministic: bool = False,
    ) -> Tensor:
        assert q.ndim == k.ndim == v.ndim == 3
        assert {cu_seqlens_q.dtype, cu_seqlens_k.dtype} == {torch.int32}
        counts_q, counts_k = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
        assert (sum(counts_q), sum(counts_k)) == (len(q), len(k))
        assert (max_seqlen_q, max_seqlen_k) == (max(counts_q), max(counts_k))
        self.calls.append({"q": counts_q, "k": counts_k, "causal": causal, "window": window_size, "softcap": softcap})
        parts = zip(q.split(counts_q), k.split(counts_k), v.split(counts_k), strict=True)
        return torch.cat([attend(*part, softmax_scale, causal, window_size, softcap) for part in parts])
