"""Counts the GPU work of ``linear_mpo_loss`` without a GPU: ``python tests/ops/gpu_counts.py``.

The operators take the GPU code path on meta tensors, which have shapes but no memory. Counts kernel launches, peak
memory, and the bytes that kernels move. Matrix products count as launches, but their bytes are not counted. Also
counts reads and writes of float32 tensors ``[n, D]``: n is the number of labelled positions, D the hidden size.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mpo_ext.ops import cuda, linear, matmul, tile_shape, tiles

MULTIPROCESSORS = 132
H100_BUDGET = tile_shape.gpu_memory_budget(80e9)
MODES = {"recompute": linear.KEEP_NOTHING, "keep": linear.KEEP_LOGITS, "frozen": linear.KEEP_HIDDEN_GRAD}
#: Operators that allocate memory or make views, and launch nothing.
_SILENT = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "_unsafe_view", "lift_fresh"}
_PRODUCTS = {"mm", "addmm", "addmm_"}
#: Operators whose first tensor is only written.
_ONLY_WRITE = {"copy_", "fill_", "zero_"}
_BY_INDEX = {"gather", "scatter_", "index", "index_put_"}


@dataclasses.dataclass
class Counts:
    """Counts of one forward and backward pass.

    Attributes:
        launches: Number of kernel launches, including matrix products.
        products: Number of launches of matrix products.
        moved: Bytes that all kernels except matrix products read and write.
        passes: Number of reads and writes of float32 tensors with the shape of the labelled hidden states, ``[n, D]``.
        peak: Peak bytes of the tensors that the calls allocate.
        tile: (rows, columns) of a tile of logits.
    """

    launches: int = 0
    products: int = 0
    moved: int = 0
    passes: int = 0
    peak: int = 0
    tile: tuple[int, int] = (0, 0)


class Counter(TorchDispatchMode):
    """Counts the operators that run on meta tensors inside a ``with`` block.

    ``hidden`` is the shape of the labelled hidden states, ``[n, D]``.
    """

    def __init__(self, hidden: tuple[int, int]) -> None:
        super().__init__()
        self.counts = Counts()
        self._hidden = hidden
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self._remember(inputs, is_new=False)
        result = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self._remember(outputs, is_new=True)
        name = func.overloadpacket.__name__
        if func.is_view or name in _SILENT or not any(tensor.is_meta for tensor in outputs):
            return result
        inputs = list({id(tensor): tensor for tensor in inputs}.values())
        written = [tensor for tensor in inputs if any(tensor is output for output in outputs)]
        is_out = "out" in kwargs
        read = [tensor for tensor in inputs if not (is_out and tensor is kwargs["out"])]
        if name in _ONLY_WRITE:
            read = [tensor for tensor in inputs[1:]]
        if is_out and any(tensor is kwargs["out"] for tensor in args):  # added to in place
            read.append(kwargs["out"])
        new = [output for output in outputs if not any(output is tensor for tensor in inputs)]
        if name in _BY_INDEX:  # they touch as many elements as there are indices
            index = next(tensor for tensor in inputs if tensor.dtype == torch.int64)
            read = written = [index]
        self.kernel(name, read, [*written, *new])
        return result

    def kernel(self, name: str, read: list[Tensor], written: list[Tensor]) -> None:
        """Counts a launch of a kernel that reads the tensors ``read`` and writes the tensors ``written``."""
        touched = [tensor for tensor in (*read, *written) if tensor.is_meta]
        self.counts.launches += 1
        self.counts.passes += sum(
            tensor.dtype == torch.float32 and tuple(tensor.shape) == self._hidden for tensor in touched
        )
        if name in _PRODUCTS:
            self.counts.products += 1
        else:
            self.counts.moved += sum(tensor.numel() * tensor.element_size() for tensor in touched)

    def _remember(self, tensors: list[Tensor], *, is_new: bool) -> None:
        self._storages = {key: pair for key, pair in self._storages.items() if not pair[0].expired()}
        for tensor in tensors:
            reference = StorageWeakRef(tensor.untyped_storage())
            if tensor.is_meta and reference.cdata not in self._storages:
                self._storages[reference.cdata] = reference, tensor.untyped_storage().nbytes() if is_new else 0
        self.counts.peak = max(self.counts.peak, sum(size for _, size in self._storages.values()))


@contextlib.contextmanager
def recorded_kernels(counter: Counter, rows: int) -> Iterator[None]:
    """Replaces the functions that need a GPU, in a ``with`` block. ``counter`` counts kernels, which are not launched.

    ``rows`` is the number of positions that are treated as labelled.
    """

    def score(z: Tensor, *rest: Any, **options: Any) -> None:
        counter.kernel("token_logp", [z], [])

    def write_exp_logits(z: Tensor, *rest: Any, is_last: bool) -> Tensor:
        """Counts a launch of exp_logits. Assumes that only the last tile rescales the row sums."""
        sums = [rest[3]] if is_last else []
        counter.kernel("exp_logits", [z, *sums], [rest[5], *sums])
        return torch.empty_like(rest[1])

    def write_grad(z: Tensor, *rest: Any, **options: Any) -> None:
        counter.kernel("logits_grad", [z], [rest[7]])

    def labelled_rows(labels: Tensor, ignore_index: int) -> Tensor:
        return torch.arange(rows)

    matmul.wide_matmuls.cache_clear()
    with contextlib.ExitStack() as stack:
        for module, name, replacement in (
            (linear, "score", score), (linear, "write_grad", write_grad),
            (linear, "write_exp_logits", write_exp_logits),
            (linear, "labelled_rows", labelled_rows), (tiles, "labelled_rows", labelled_rows),
            (cuda, "multiprocessors", lambda device: MULTIPROCESSORS),
            (cuda, "check_not_capturing", lambda tensor: None), (linear, "check_not_capturing", lambda tensor: None),
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(module, name, replacement))
        yield
    matmul.wide_matmuls.cache_clear()


def count(
    mode: str, rows: int, hidden_size: int, vocab: int, dtype: torch.dtype = torch.bfloat16, *,
    positions: int | None = None, budget: int = H100_BUDGET, **head: float,
) -> Counts:  # fmt: skip
    """Counts the GPU work of a forward and backward pass.

    ``mode`` is a key of MODES. ``rows`` is the number of labelled positions, and ``positions`` is the number of all
    positions. Without ``positions``, all positions are labelled. ``budget`` is the memory budget in bytes. ``head``
    may have logit_scale, softcap and temperature.
    """
    counter = Counter((rows, hidden_size))
    scales = [head.get("logit_scale", 1.0), head.get("softcap", 0.0), head.get("temperature", 1.0)]
    options = linear.LinearOptions(-100, scales, budget, dtype, "cuda")
    with recorded_kernels(counter, rows):
        hidden = torch.empty(positions or rows, hidden_size, dtype=dtype, device="meta")
        weight = torch.empty(vocab, hidden_size, dtype=dtype, device="meta")
        labels = torch.zeros(positions or rows, dtype=torch.int64)
        matmul.wide_matmuls(hidden.device, dtype)
        with counter:
            forward = linear.linear_token_logp._init_fn  # the function, not the operator, whose fake would run
            logp, row_max, row_sum, _, kept = forward(hidden, weight, None, labels, 0, MODES[mode], *options)
            weights, scale = torch.ones_like(logp), torch.ones((), device="meta")
            counter.counts.launches -= 2
            if mode == "frozen":
                gradient = linear.kept_hidden_grad._init_fn(hidden, labels, kept, weights, scale, -100)
                gradients = [gradient]
            else:
                kept_logits = kept if mode == "keep" else None
                wanted = [True, True, False]
                rest = (row_max, row_sum, weights, scale, kept_logits, wanted, *options)
                gradients = linear.linear_grad._init_fn(hidden, weight, None, labels, *rest)
            assert all(each.dtype in (dtype, torch.float32) for each in gradients)
            keeps = {"keeps_logits": mode == "keep", "converts_weight_grad": mode != "frozen"}
        rows_of = tiles.TiledRows(hidden, labels, linear._head(weight, None, scales, dtype), -100, budget, **keeps)
        counter.counts.tile = rows_of._chunk_rows, rows_of._chunk_columns
    return counter.counts


def main() -> None:
    """Prints a table with the counts of every mode."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = {"rows": 8192, "hidden-size": 4096, "vocab": 151_936, "budget-mib": H100_BUDGET >> 20}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    print(f"{'mode':<12}{'tile':>14}{'tiles':>7}{'launches':>10}{'products':>10}{'GB moved':>10}{'[n, D]':>8}   GiB")
    for mode in MODES:
        found = count(mode, args.rows, args.hidden_size, args.vocab, budget=args.budget_mib << 20)
        n_tiles = math.ceil(args.rows / found.tile[0]) * math.ceil(args.vocab / found.tile[1])
        tile = "{} x {}".format(*found.tile)
        print(f"{mode:<12}{tile:>14}{n_tiles:>7}{found.launches:>10}{found.products:>10}{found.moved / 1e9:>10.2f}"
              f"{found.passes:>8}{found.peak / 2**30:>7.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
