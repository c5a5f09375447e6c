"""Tests properties that need a GPU: deterministic bits, streams, devices, CUDA graphs and launches.

mpo_ext contains a static CUDA runtime. These tests also show that it works beside torch's CUDA runtime.
"""

import pytest
import torch
from batches import loss_and_grad, small_batch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU that torch sees")


def assert_same_bits(result: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def test_every_run_gives_the_same_bits_in_any_order_of_blocks() -> None:
    batch = small_batch("cuda", torch.bfloat16, 151_674, 40)
    first = loss_and_grad(batch, "cuda")
    for _ in range(20):
        assert_same_bits(loss_and_grad(batch, "cuda"), first)


def test_the_kernels_run_on_the_current_stream() -> None:
    batch = small_batch("cuda", torch.bfloat16, 32_768)
    expected = loss_and_grad(batch, "cuda")
    torch.cuda.synchronize()
    late = torch.full_like(batch[0], torch.nan)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # a launch on another stream would read the logits before they are copied
        late.copy_(batch[0], non_blocking=True)
        result = loss_and_grad((late, *batch[1:]), "cuda")
    stream.synchronize()
    assert_same_bits(result, expected)


def test_the_kernels_run_on_the_device_of_their_tensors() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    batch = small_batch("cuda:1", torch.float32, 1003)
    torch.testing.assert_close(loss_and_grad(batch, "cuda")[0], loss_and_grad(batch, "reference")[0])


def test_a_replayed_graph_computes_from_new_logits() -> None:
    batch = small_batch("cuda", torch.float32, 1003)
    static = batch[0].clone()
    loss_and_grad((static, *batch[1:]), "cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = loss_and_grad((static, *batch[1:]), "cuda")
    for factor in (1.0, 0.5, 2.0):
        static.copy_(batch[0] * factor)
        graph.replay()
        assert_same_bits(captured, loss_and_grad((batch[0] * factor, *batch[1:]), "cuda"))


def test_forward_and_backward_are_one_launch_each() -> None:
    from torch.profiler import ProfilerActivity, profile

    batch = small_batch("cuda", torch.bfloat16, 1003)
    loss_and_grad(batch, "cuda")
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        loss_and_grad(batch, "cuda")
        torch.cuda.synchronize()
    names = [event.name for event in profiler.events() if "mpo" in event.name and "kernel" in event.name]
    assert len(names) == 2, names
    assert "token_logp" in names[0]
    assert "logits_grad" in names[1]
