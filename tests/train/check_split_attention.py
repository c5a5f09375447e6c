"""Compares split attention with separate rows and with a dense mask, for many model families.

Split attention handles a row with several responses to one prompt, without building a mask. Run with
``make check-attention``. For each family, compares loss and gradients in four layouts:

- "separate": a row for each response.
- "masked": rows with several responses, and a dense mask.
- "shared": split attention on padded rows.
- "packed": split attention on one row without padding.

Prints the largest relative error of loss and gradients. All gradients together count as one vector.

A batch has pairs with the same prompt, and two pairs with other prompts. A prompt has up to two images. Responses
differ in length. Some sliding windows are shorter than a prompt, and others are longer. In float64 runs, the norm
layers also compute in float64.
"""

from __future__ import annotations

import argparse
import sys

import torch
from families import FAMILIES, Family, build, sample
from more_families import MORE
from single_forwards import batch_of, gradients, loss_of
from torch import nn

from mpo_ext.train.encode import Sample
from mpo_ext.train.masks import use_split_attention
from mpo_ext.train.model import switch_off_dropout

LIMITS = {torch.float32: 1e-6, torch.float64: 1e-12}
#: ``build`` multiplies matrices by 8, with which some families multiply the rounding of float32. 2 remains.
FLOAT32_SCALE = 0.25
EAGER = ("gemma2", "gptoss")  # sdpa in transformers supports neither softcaps nor sinks
ALL: dict[str, Family] = {**FAMILIES, **MORE}


def pairs(family: str, count: int, images: int) -> list[Sample]:
    """Returns pairs of unequal lengths: ``count`` pairs that share a prompt, and two pairs with other prompts."""
    same = [
        sample(family, seed, prompt=3, text=9, chosen=1 + 3 * seed % 7, rejected=6 - seed, images=images)
        for seed in range(count)
    ]
    return [*same, sample(family, 21, text=2, chosen=8, rejected=2), sample(family, 22, text=7, images=min(images, 1))]


def result(model: nn.Module, samples: list[Sample], layout: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = loss_of(model, batch_of(model, samples, layout))
    return loss.detach(), gradients(model, loss)


def errors(model: nn.Module, samples: list[Sample]) -> dict[tuple[str, str], float]:
    """Returns the relative errors of the layouts for one batch.

    The result is a dict from (layout, reference layout), such as ("packed", "separate"), to the larger of two errors.
    These are the error of the loss, and the error of all gradients as one vector.
    """
    results = {layout: result(model, samples, layout) for layout in ("separate", "masked", "shared", "packed")}
    found = {}
    for truth in ("separate", "masked"):
        loss, grads = results[truth]
        norm = sum(grad.double().square().sum() for grad in grads.values()) ** 0.5
        for layout in ("masked", "shared", "packed"):
            if layout != truth:
                other, others = results[layout]
                error = sum((others[name] - grad).double().square().sum() for name, grad in grads.items()) ** 0.5
                found[layout, truth] = max((error / norm).item(), (abs(other - loss) / abs(loss)).item())
    return found


def check(name: str, dtype: torch.dtype) -> dict[tuple[str, str], float]:
    """Returns the largest relative errors of a model family over several batches. The keys are those of ``errors``.

    Raises:
        ValueError: If split attention does not support the model.
    """
    model = build(name, "eager" if name.startswith(EAGER) else "sdpa", dtype)
    switch_off_dropout(model)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped product has no float64
    if dtype == torch.float32:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(FLOAT32_SCALE if parameter.ndim > 1 else 1)
    reason = use_split_attention(model)
    if reason is not None:
        raise ValueError(reason)
    worst: dict[tuple[str, str], float] = {}
    for images in (0, 1, 2) if ALL[name].images else (0,):
        for count in (1, 2, 4):
            for key, error in errors(model, pairs(name, count, images)).items():
                worst[key] = max(worst.get(key, 0.0), error)
    return worst


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", default=list(ALL), help="names of families; default: all")
    torch.set_num_threads(1)
    failed = 0
    columns = [(layout, truth) for truth in ("separate", "masked") for layout in ("shared", "packed")]
    columns.append(("masked", "separate"))
    print(f"{'family':<24}{'dtype':<9}" + "".join(f"{f'{layout} / {truth}':>20}" for layout, truth in columns))
    for name in parser.parse_args().families:
        for dtype in LIMITS:
            try:
                worst = check(name, dtype)
            except Exception as error:  # every error is a result
                failed += 1
                print(f"{name:<24}{type(error).__name__}: {error}", flush=True)
                break
            is_wrong = any(not worst[column] <= LIMITS[dtype] for column in columns[:-1])
            failed += is_wrong
            line = f"{name:<24}{str(dtype).removeprefix('torch.'):<9}" + "".join(f"{worst[c]:>20.1e}" for c in columns)
            print(f"{line}{'  above the limit' if is_wrong else ''}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
