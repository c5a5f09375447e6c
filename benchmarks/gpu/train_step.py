"""Stage "train_step": measures training steps of a random decoder, for several ways to compute the loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.gpu.session import GpuStage
from benchmarks.losses import reason_of
from benchmarks.measure import gpu_peak_bytes, interleaved, nothing
from mpo_ext import hidden_and_head, linear_mpo_loss, mpo_loss
from mpo_ext.plan.roofline import LossShape

LOSS = LossShape(tokens=4096, vocab=151_936, hidden=2048, share=0.25)  # about 1 billion parameters with its layers
_DRY_LOSS = LossShape(tokens=16, vocab=211, hidden=64, share=0.5)
_RUNS = 5


def run(stage: GpuStage) -> None:
    """Measures a training step (forward, backward, AdamW) for each way to compute the loss."""
    loss = _DRY_LOSS if stage.dry else LOSS
    try:
        model = _model(loss, stage)
    except ImportError as error:
        stage.add("step", "not run", reason_of(error), loss=loss)
        return
    stage.settings["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=not stage.dry)
    for name, compute in _ways(model, loss, stage.device).items():

        def step(compute: Callable[[], Tensor] = compute) -> None:
            optimizer.zero_grad(set_to_none=True)
            compute().backward()
            optimizer.step()

        try:
            first = float(compute().detach())
            step()
            runs = 1 if stage.dry else _RUNS
            timing = interleaved({name: (nothing, step)}, runs, device=stage.device)[name]
            peak = None if stage.dry else gpu_peak_bytes(step)
        except Exception as error:  # out of memory
            stage.add("step", "not run", reason_of(error), provider=name, loss=loss)
        else:
            stage.add("step", "measured", provider=name, loss=loss, timing=timing, peak_bytes=peak, first_loss=first)
        stage.free()


def _model(loss: LossShape, stage: GpuStage) -> nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    size = (96, 2, 4, 2) if stage.dry else (8192, 12, 16, 8)
    names = ("intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    config = Qwen2Config(
        vocab_size=loss.vocab, hidden_size=loss.hidden_size, max_position_embeddings=8192, tie_word_embeddings=False,
        **dict(zip(names, size, strict=True)),
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(stage.device):
        model = Qwen2ForCausalLM(config).to(torch.bfloat16).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.config.use_cache = False
    return model


def _ways(model: nn.Module, loss: LossShape, device: str) -> dict[str, Callable[[], Tensor]]:
    """Returns a dict of functions by name. Each function computes the model's loss in a different way.

    All functions use the same random pair.
    """
    ids = torch.randint(loss.vocab, (2, loss.tokens), device=device)
    labels = ids.clone()
    labels[:, : loss.tokens - round(loss.tokens * loss.share)] = -100
    cpu_labels = labels.cpu() if device == "cpu" else labels.cpu().pin_memory()
    ref_logp = torch.full((2,), -11.0 * loss.labelled / 2, device=device)

    def linear(recompute: bool) -> Tensor:
        head = hidden_and_head(model, input_ids=ids)
        options = {**head.options, "recompute": recompute, "shift": True}
        return linear_mpo_loss(head.hidden, head.weight, cpu_labels, ref_logp, **options).loss

    def from_logits(**options: object) -> Tensor:
        return mpo_loss(model(input_ids=ids).logits, labels, ref_logp, shift=True, **options).loss

    return {
        "linear_mpo_loss": lambda: linear(True),
        "linear_mpo_loss, recompute=False": lambda: linear(False),
        "mpo_loss": from_logits,
        "mpo_loss, reuse_logits": lambda: from_logits(reuse_logits=True),
        "eager": lambda: from_logits(backend="reference"),
    }
