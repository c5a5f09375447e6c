"""Checks that require a GPU, for the stage "correct". Each check returns a list of problems, [] if it passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.session import PairBatch
from mpo_ext import RewardShift, linear_mpo_loss, mpo_loss

_STATS = ("entropy", "mean_logit", "top1")


def _loss_and_grad(batch: PairBatch, backend: str, **options: Any) -> tuple[Tensor, Tensor]:
    leaf = batch.logits.detach().requires_grad_()
    loss = mpo_loss(leaf, batch.labels, batch.ref_logp, shift=False, backend=backend, **options).loss
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def _is_same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def _batch(*size: Any, **options: Any) -> PairBatch:
    return PairBatch.random("cuda", *size, **options)


def bits(backend: str) -> list[str]:
    """Checks that 50 repeated calls of ``mpo_loss`` give bitwise equal losses and gradients, for three shapes."""
    wrong = []
    for vocab, tokens, share in ((151_674, 40, 1.0), (151_936, 300, 0.02), (9001, 7, 1.0)):
        batch = _batch(1, tokens, vocab, torch.bfloat16, share)
        first = _loss_and_grad(batch, backend)
        runs = (_is_same(_loss_and_grad(batch, backend), first) for _ in range(50))
        wrong += [] if all(runs) else [f"V = {vocab}: runs differ"]
    return wrong


def streams(backend: str) -> list[str]:
    """Checks that parallel CUDA streams do not change results, and that kernels run on the current stream."""
    batches = [_batch(1, 12 + 7 * i, 32_768 + i, torch.bfloat16, seed=i) for i in range(4)]
    expected = [_loss_and_grad(batch, backend) for batch in batches]
    torch.cuda.synchronize()
    lanes = [torch.cuda.Stream() for _ in batches]
    noise = torch.randn(4096, 4096, device="cuda")
    found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in batches]
    for _ in range(40):
        noise @ noise
        for lane, batch, results in zip(lanes, batches, found, strict=True):
            with torch.cuda.stream(lane):
                results.append(_loss_and_grad(batch, backend))
    torch.cuda.synchronize()
    is_right = [all(_is_same(run, want) for run in runs) for want, runs in zip(expected, found, strict=True)]
    wrong = [] if all(is_right) else ["streams side by side change a result"]
    late, lane = torch.full_like(batches[0].logits, torch.nan), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(lane):
        torch.cuda._sleep(100_000_000)  # noqa: SLF001  # torch has no public kernel that waits
        late.copy_(batches[0].logits, non_blocking=True)
        result = _loss_and_grad(batches[0].replaced(late), backend)
    lane.synchronize()
    return wrong + ([] if _is_same(result, expected[0]) else ["a kernel runs on another stream than the current one"])


def graphs(backend: str) -> list[str]:
    """Checks ``mpo_loss`` in CUDA graphs: replays with changed logits, and replays that update a reward shift."""
    batch = _batch(2, 9, 1003, torch.float32)
    static = batch.replaced(batch.logits.clone())
    shift = RewardShift()

    def with_shift() -> None:
        leaf = static.logits.detach().requires_grad_()
        mpo_loss(leaf, batch.labels, batch.ref_logp, shift=False, reward_shift=shift, backend=backend)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        _loss_and_grad(static, backend)
        with_shift()
    torch.cuda.current_stream().wait_stream(side)
    graph, shift_graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _loss_and_grad(static, backend)
    with torch.cuda.graph(shift_graph):
        with_shift()
    wrong = []
    for factor in (1.0, 0.5, 2.0):
        static.logits.copy_(batch.logits * factor)
        for _ in range(3):
            graph.replay()
        expected = _loss_and_grad(batch.replaced(batch.logits * factor), backend)
        wrong += [] if _is_same(captured, expected) else [f"a replay differs from a call at factor {factor}"]
    counts = []
    for _ in range(3):
        shift_graph.replay()
        counts.append(shift.state_dict()["count"])
    return wrong + (
        [] if counts == [2, 3, 4] else [f"replays count {counts} updates of the reward shift, not 2, 3, 4"]
    )


def capture_of_hidden_states(backend: str) -> list[str]:
    """Checks that ``linear_mpo_loss`` refuses to be captured in a CUDA graph, with a clear error."""
    hidden, weight = (torch.randn(*shape, device="cuda") for shape in ((2, 5, 32), (1003, 32)))
    labels, ref_logp = torch.ones(2, 5, dtype=torch.int64), torch.zeros(2, device="cuda")
    linear_mpo_loss(hidden, weight, labels, ref_logp, shift=False, backend=backend)
    torch.cuda.synchronize()
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            linear_mpo_loss(hidden, weight, labels, ref_logp, shift=False, backend=backend)
    except RuntimeError as error:
        return [] if "must not be captured" in str(error) else [f"another error was raised: {str(error)[:200]}"]
    return ["no error was raised"]


def compiled(backend: str) -> list[str]:
    """Checks the padded and the packed loss inside ``torch.compile``, with and without CUDA graphs."""
    batch = _batch(1, 8, 1003, torch.bfloat16)
    hidden, weight = (torch.randn(*shape, device="cuda").bfloat16() for shape in ((2, 8, 32), (1003, 32)))
    offsets = torch.tensor([0, 8, 16], device="cuda", dtype=torch.int32)

    def padded(h: Tensor, w: Tensor) -> Tensor:
        return mpo_loss(h @ w.T, batch.labels, batch.ref_logp, shift=True, backend=backend).loss

    def packed(h: Tensor, w: Tensor) -> Tensor:
        rows, labels = (h @ w.T).flatten(0, 1), batch.labels.flatten()
        return mpo_loss(rows, labels, batch.ref_logp, shift=True, cu_seqlens=offsets, backend=backend).loss

    wrong = []
    for name, step in (("padded", padded), ("packed", packed)):
        expected = float(step(hidden, weight))
        for mode in ("default", "reduce-overhead"):
            torch.compiler.reset()
            fast = torch.compile(step, mode=mode)
            for _ in range(4):
                torch.compiler.cudagraph_mark_step_begin()
                leaf = weight.detach().requires_grad_()
                loss = fast(hidden, leaf)
                loss.backward()
                value = float(loss)
            wrong += [] if abs(value - expected) < 1e-4 else [f"{name}, {mode}: {value} instead of {expected}"]
    return wrong


def waits(backend: str) -> list[str]:
    """Checks that the losses never make the host wait for the GPU. In this check, torch raises an error on a wait."""
    batch = _batch(1, 16, 32_768, torch.bfloat16)
    hidden, weight = (torch.randn(*shape, device="cuda").bfloat16() for shape in ((2, 16, 64), (32_768, 64)))
    labels, pinned = batch.labels.cpu(), batch.labels.cpu().pin_memory()
    shift = RewardShift()

    def linear(on_cpu: Tensor, **options: Any) -> None:
        inputs = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        options = {"reward_shift": shift, "stats": _STATS, "memory_budget": 8 << 20, "backend": backend, **options}
        loss = linear_mpo_loss(*inputs, on_cpu, batch.ref_logp, shift=False, **options).loss
        torch.autograd.grad(loss, inputs)

    cases: dict[str, Callable[[], Any]] = {
        "mpo_loss": lambda: _loss_and_grad(batch, backend, reward_shift=shift, stats=_STATS),
        "linear, pinned labels": lambda: linear(pinned),
        "linear, CPU labels": lambda: linear(labels),
        "linear, recompute=False": lambda: linear(pinned, recompute=False),
    }
    wrong = []
    for name, call in cases.items():
        call()  # compiles, and moves the reward shift to the GPU
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        except RuntimeError as error:
            wrong.append(f"{name}: {str(error)[:160]}")
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return wrong


#: Functions that take the name of a backend and return the problems found, by the name of the check.
CHECKS: dict[str, Callable[[str], list[str]]] = {
    "bits": bits,
    "streams": streams,
    "graphs": graphs,
    "capture of hidden states": capture_of_hidden_states,
    "waits": waits,
    "compiled": compiled,
}
