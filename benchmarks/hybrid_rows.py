"""Measures forward and backward of a hybrid model (DeltaNet and attention): ``python -m benchmarks.hybrid_rows``.

A small Qwen3.5 text model runs on one pair, in two ways. "shared" puts the prompt and both responses into one
sequence. "separate" makes a sequence for each response. The runs of the two ways alternate. The default vocabulary is
small, so that the layers take most of the time.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.measure import environment, interleaved, nothing, peak_bytes
from mpo_ext import linear_mpo_loss
from mpo_ext.train.batch import collate
from mpo_ext.train.encode import Sample
from mpo_ext.train.forward import forward
from mpo_ext.train.masks import use_split_attention

LAYOUTS = ("shared", "separate")


def build(vocab: int, hidden: int, layers: int) -> Any:
    """Returns an untrained Qwen3.5 text model. Every fourth layer is attention, as in the released models."""
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    heads = max(1, hidden // 64)
    torch.manual_seed(0)
    config = Qwen3_5TextConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        head_dim=64,
        linear_num_key_heads=heads,
        linear_num_value_heads=heads,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
    )
    model = Qwen3_5ForCausalLM(config).train()
    reason = use_split_attention(model)
    if reason is not None:
        raise RuntimeError(f"the model must support rows with several responses, got {reason}")
    return model


def make_step(layout: Any, vocab: int, hidden: int, layers: int, prompt: int, response: int) -> Callable[[], float]:
    """Returns a function that runs forward and backward on a random pair. This function returns the loss.

    ``layout`` is "shared" (one sequence for the pair) or "separate" (one sequence for each response).
    """
    model = build(vocab, hidden, layers)
    generator = torch.Generator().manual_seed(0)
    prompt_ids, chosen_ids, rejected_ids = (
        torch.randint(vocab, (count,), generator=generator) for count in (prompt, response, response)
    )
    sample = Sample(
        key="pair", name="pair", prompt_key="prompt", prompt_ids=prompt_ids, chosen_ids=chosen_ids,
        rejected_ids=rejected_ids, token_inputs={}, image_inputs={}, digest="",
    )  # fmt: skip
    batch = collate([sample], layout, pad_id=0)

    def step() -> float:
        model.zero_grad()
        out = forward(model, batch)
        loss = linear_mpo_loss(
            out.hidden, out.weight, batch.labels, torch.zeros(2), cu_seqlens=batch.cu_seqlens, shift=False,
            **out.options,
        ).loss  # fmt: skip
        loss.backward()
        return loss.item()

    return step


def one_step(begin: Callable[[], None], threads: int, *sizes: Any) -> None:
    """Builds the model, calls ``begin``, and runs one step. ``peak_bytes`` calls this function in a fresh process.

    ``sizes`` are the arguments of ``make_step``.
    """
    torch.set_num_threads(threads)
    step = make_step(*sizes)
    begin()
    step()


def main() -> None:
    """Compares the layouts "shared" and "separate". Prints a table of times, memory and losses."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=4096, help="tokens of the prompt")
    parser.add_argument("--response", type=int, default=256, help="tokens of each response")
    parser.add_argument("--steps", type=int, default=5, help="counted steps, after a first step that is not counted")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sizes = args.vocab, args.hidden, args.layers, args.prompt, args.response

    print(", ".join(f"{key} {value}" for key, value in environment().items()))
    steps = {layout: make_step(layout, *sizes) for layout in LAYOUTS}
    losses = {layout: step() for layout, step in steps.items()}
    timings = interleaved({layout: (nothing, step) for layout, step in steps.items()}, args.steps)
    peaks = {layout: peak_bytes(one_step, args.threads, layout, *sizes) for layout in LAYOUTS}
    print(f"{'rows':<12}{'step':>9}{'p20 .. p80':>20}{'of separate':>13}{'peak MiB':>10}{'loss':>12}")
    for layout in LAYOUTS:
        low, high = timings[layout].spread_s
        ratio = timings[layout].median_s / timings["separate"].median_s
        print(
            f"{layout:<12}{timings[layout].median_s:>7.2f} s{f'{low:.2f} .. {high:.2f} s':>20}{ratio:>13.2f}"
            f"{peaks[layout] / 2**20:>10.0f}{losses[layout]:>12.6f}"
        )


if __name__ == "__main__":
    main()
