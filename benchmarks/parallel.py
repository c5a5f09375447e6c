"""Measures the memory of a rank if 1, 2 or 4 ranks split the vocabulary: ``python -m benchmarks.parallel``.

The ranks run on this machine with gloo. The measured memory is the peak during forward and backward, minus the memory
before the inputs were made. Every rank holds all hidden states and their gradient; their size is printed separately.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.measure import reset_peak, resident_bytes
from mpo_ext import linear_mpo_loss, mpo_loss

PAIRS, LENGTH, HIDDEN, VOCAB = 1, 256, 512, 65536
MIB = 1 << 20


def measure(rank: int, world: int, store: str, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    group, columns = dist.new_group(range(world)), VOCAB // world
    torch.manual_seed(0)  # the labels of all ranks are the same
    labels, ref_logp = torch.randint(VOCAB, (2 * PAIRS, LENGTH)), torch.zeros(2 * PAIRS)
    options = {"vocab_parallel": group} if world > 1 else {}

    def warm_up() -> None:
        hidden, weight = torch.randn(2, 4, 8, requires_grad=True), torch.randn(16, 8, requires_grad=True)
        few = torch.randint(16, (2, 4))
        mpo_loss((hidden @ weight.T).detach().requires_grad_(), few, ref_logp, **options).loss.backward()
        linear_mpo_loss(hidden, weight, few, ref_logp, **options).loss.backward()

    def from_logits() -> None:
        logits = torch.randn(2 * PAIRS, LENGTH, columns, requires_grad=True)
        mpo_loss(logits, labels, ref_logp, **options).loss.backward()

    def from_hidden() -> None:
        hidden = torch.randn(2 * PAIRS, LENGTH, HIDDEN, requires_grad=True)
        weight = torch.randn(columns, HIDDEN, requires_grad=True)
        linear_mpo_loss(hidden, weight, labels, ref_logp, memory_budget=8 * MIB, **options).loss.backward()

    warm_up()
    peaks = []
    for run in (from_logits, from_hidden):
        before = resident_bytes("VmRSS")
        reset_peak()
        run()
        peaks.append(resident_bytes("VmHWM") - before)
    if rank == 0:
        results.put(peaks)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    print(f"{PAIRS} pair, T = {LENGTH}, V = {VOCAB}, D = {HIDDEN}, float32; MiB of rank 0")
    print(f"hidden states and their gradient, on every rank: {2 * 2 * PAIRS * LENGTH * HIDDEN * 4 / MIB:.0f}")
    print("| ranks | logits and gradient | peak, mpo_loss | head and gradient | peak, linear_mpo_loss |")
    print("| --- | --- | --- | --- | --- |")
    for world in (1, 2, 4):
        results = mp.get_context("spawn").SimpleQueue()
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(measure, args=(world, f"{folder}/store", results), nprocs=world)
        from_logits, from_hidden = results.get()
        of_logits, of_head = 2 * PAIRS * LENGTH * VOCAB * 4 // world, VOCAB * HIDDEN * 4 // world
        figures = (2 * of_logits, from_logits, 2 * of_head, from_hidden)
        print(f"| {world} | " + " | ".join(f"{figure / MIB:.0f}" for figure in figures) + " |")


if __name__ == "__main__":
    main()
