"""Checks whether a model supports rows with several responses.

One check reads the model's code. Another check compares the log-probs of a few pairs.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from mpo_ext.loss.config import MPOConfig
from mpo_ext.loss.functions import linear_token_logp, token_logp
from mpo_ext.loss.hf_head import unwrap_model
from mpo_ext.train.batch import Batch, collate
from mpo_ext.train.encode import Sample
from mpo_ext.train.forward import forward, forward_logits
from mpo_ext.train.masks import (
    decoder_config,
    forward_source,
    has_image_blocks,
    plan_masks,
    undo_split_attention,
    use_split_attention,
)
from mpo_ext.train.settings import SharedPrefix
from mpo_ext.train.split_recurrence import has_split_layers

SharedLayout = Literal["packed", "shared", "masked"]


def supports_shared_prefix(model: nn.Module) -> str | None:
    """Returns None if a model supports rows with several responses. Otherwise, returns the reason why it does not.

    The check reads the model's config and code. The model may be wrapped (DDP, FSDP, peft).
    """
    inner = unwrap_model(model)
    name = type(inner).__name__
    peft_config = getattr(model, "active_peft_config", None)
    if getattr(peft_config, "is_prompt_learning", False):
        return f"{type(peft_config).__name__} inserts virtual tokens before each row"
    plan = plan_masks(inner)
    if isinstance(plan, str):
        return plan
    config = decoder_config(inner)
    if getattr(config, "is_encoder_decoder", False):
        return f"{name} has an encoder and a decoder"
    if getattr(config, "cross_attention_layers", None):
        return f"{name} attends to images through cross attention"
    if not getattr(config, "is_causal", True) or getattr(config, "use_bidirectional_attention", None):
        return f"{name} has attention that is not causal"
    has_states = has_split_layers(inner)
    for module in inner.modules():
        kind = type(module)
        if getattr(kind, "_is_stateful", False) and not has_states:
            return f"{kind.__name__} has recurrent layers, which no mask can separate"
        # Gemma 4: our mask would replace the mask that lets the tokens of an image attend to each other.
        has_blocks = hasattr(kind, "get_image_features") and "block_sequence_ids" in forward_source(kind)
        if has_blocks and not has_image_blocks(inner):
            return f"tokens of an image attend to each other in {kind.__name__}"
    return None


def shared_layouts(models: Sequence[nn.Module], setting: SharedPrefix, reasons: list[str]) -> Iterator[SharedLayout]:
    """Yields the layouts that the caller should check, such as "packed". In these layouts, responses share a prompt.

    ``Batch`` describes the layouts. Some layouts need split attention. The function switches split attention in the
    models on or off before it yields a layout.

    Args:
        models: Models that will run on the batches.
        setting: Value of ``loss.shared_prefix``.
        reasons: List to which the function appends a reason if it leaves out layouts.
    """
    if not setting:
        reasons.append("loss.shared_prefix is false")
        return
    if setting == "masked":
        reasons.append("loss.shared_prefix is masked")
    elif split_reasons := [reason for model in models if (reason := use_split_attention(model)) is not None]:
        reasons += split_reasons
    else:
        if setting == "padded":
            reasons.append("loss.shared_prefix is padded")
        else:
            yield "packed"
        yield "shared"
    for model in models:
        undo_split_attention(model)
    yield "masked"


def check_shared_prefix(
    model: nn.Module,
    samples: Sequence[Sample],
    *,
    pad_id: int,
    positions: Callable[[Sample], Tensor] | None = None,
    device: torch.device | str | None = None,
    tolerance: float | None = None,
    layout: SharedLayout = "shared",
    from_logits: bool = False,
) -> str | None:
    """Checks on a few pairs whether rows with shared prompts give the same log-probs as separate rows.

    Returns None if the log-probs agree. Otherwise, returns a text with the reason why the layout cannot be used.

    The model runs three times in evaluation mode, without gradients. The first run has separate rows. The second run
    has the layout ``layout``. In the third run, the responses attend to each other. The third run measures the effect
    of a broken mask. During the runs, sliding windows are shortened, so that they take effect on short pairs, too.
    Afterwards, the model's state is restored.

    If the model is sharded, all ranks must call this function together, and the caller must combine their results.

    Args:
        model: Model; see ``forward``.
        samples: At least one sample, with images if the run will have images.
        pad_id: See ``collate``.
        positions: See ``collate``.
        device: Device of the batches; None: the device of the model's parameters.
        tolerance: Maximum root mean square difference of the log-probs, in nats. None: 16 times the machine epsilon of
            the computation, but at least 1e-3. If a broken mask has a small effect, the limit is half this effect. The
            limit is never below ``tolerance / 4``.
        layout: Layout to check, such as "packed"; see ``Batch``. The responses of a pair share a prompt.
        from_logits: Whether the model computes logits; see ``loss.from_logits``.

    Raises:
        torch.OutOfMemoryError: If memory runs out.
        Exception: Any exception that the model raises in the first or the third run.
    """
    reason = supports_shared_prefix(model)
    if reason is not None:
        return reason
    device = next(model.parameters()).device if device is None else device
    if layout == "packed":
        samples = _with_two_prompts(samples)
    shared = collate(samples, layout, pad_id=pad_id, positions=positions)
    separate = collate(samples, "separate", pad_id=pad_id, positions=positions)
    labelled = shared.labels != MPOConfig().ignore_index
    if not labelled.any():
        return None
    longest = int((separate.segments >= 0).sum(1).max())
    kind = type(unwrap_model(model)).__name__
    with _evaluation_mode(model, max(1, longest // 2)), torch.no_grad():
        expected, epsilon = label_logp_and_precision(model, separate.to(device), from_logits)
        try:
            actual, _ = label_logp_and_precision(model, shared.to(device), from_logits)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            return f"{type(error).__name__} in the forward of {kind}: {error}"
        broken, _ = label_logp_and_precision(model, shared.with_merged_responses().to(device), from_logits)
    differences = (actual - expected)[labelled].abs()
    rms = _rms(differences)
    leak = _rms((broken - expected)[labelled])
    bound = max(16 * epsilon, 1e-3) if tolerance is None else tolerance
    limit = min(bound, max(leak / 2, bound / 4))
    if rms <= limit:
        return None
    worst = int(torch.where(labelled)[0][differences.nan_to_num(math.inf).argmax()])
    name = samples[(int(torch.searchsorted(shared.cu_seqlens, worst, right=True)) - 1) % len(samples)].name
    return (
        f"log-probs of {kind} differ by {rms:.2g} nats (root mean square; {differences.max().item():.2g} at most, in "
        f"{name}) from the log-probs of separate rows, the limit is {limit:.2g}; responses that attend to each other "
        f"would change them by {leak:.2g}"
    )


def _with_two_prompts(samples: Sequence[Sample]) -> list[Sample]:
    """Returns samples with at least two different prompt keys, so that a packed row contains several prompts.

    If all samples have the same prompt key, all but the first get another key. A single sample is repeated.
    """
    first, *others = samples
    if all(other.prompt_key == first.prompt_key for other in others):
        others = [dataclasses.replace(other, prompt_key=f"{first.prompt_key} again") for other in others or [first]]
    return [first, *others]


def label_logp_and_precision(model: nn.Module, batch: Batch, from_logits: bool = False) -> tuple[Tensor, float]:
    """Returns ``(logp, epsilon)``: the log-prob of each label, and the precision of the computation.

    ``logp`` is ``[N]`` float64 on the CPU, for the N labels of the batch. ``epsilon`` is the machine epsilon of the
    coarsest dtype in the computation.

    ``from_logits`` True: the model computes logits. False: the log-probs are computed from hidden states.
    """
    dtypes: list[torch.dtype] = []

    def note(module: nn.Module, args: Any) -> None:  # autocast may be active inside the model only
        dtypes.append(module.weight.dtype)  # type: ignore[arg-type]
        device = cast(Tensor, module.weight).device.type
        if torch.is_autocast_enabled(device):
            dtypes.append(torch.get_autocast_dtype(device))

    inner = unwrap_model(model)
    handle = inner.get_input_embeddings().register_forward_pre_hook(note)  # type: ignore[operator]
    try:
        if from_logits:
            logits = forward_logits(model, batch)
            dtypes.append(logits.dtype)
        else:
            out = forward(model, batch)
            dtypes += [out.hidden.dtype, out.weight.dtype]
    finally:
        handle.remove()
    floats = [dtype for dtype in dtypes if dtype.is_floating_point]
    epsilon = max(torch.finfo(dtype).eps for dtype in floats)
    if batch.labels.is_cuda and torch.get_float32_matmul_precision() != "highest":
        epsilon = max(epsilon, torch.finfo(torch.float16).eps)  # TF32 has the mantissa of float16
    if from_logits:
        logp = token_logp(logits, batch.labels.to(logits.device), shift=False)
    else:
        weight = out.weight.to(out.hidden.device)
        logp = linear_token_logp(out.hidden, weight, batch.labels, shift=False, **out.options)
    return logp.double().cpu(), epsilon


def _rms(differences: Tensor) -> float:
    return differences.square().mean().sqrt().item()


@contextmanager
def _evaluation_mode(model: nn.Module, window: int) -> Iterator[None]:
    """In the ``with`` block, the model is in evaluation mode, and sliding windows have at most ``window`` tokens.

    At the end, the earlier mode and the earlier windows are restored.
    """
    training = [(module, module.training) for module in model.modules()]
    windows: dict[int, tuple[Any, int]] = {}
    for module in unwrap_model(model).modules():
        owner: Any = getattr(module, "config", None)
        # With flash-attn, the window is read from the attention module, because there is no mask.
        for config in (module, owner, getattr(owner, "text_config", None)):
            size = getattr(config, "sliding_window", None)
            if isinstance(size, int) and size > window:
                windows.setdefault(id(config), (config, size))
    try:
        model.eval()
        for config, _ in windows.values():
            config.sliding_window = window
        yield
    finally:
        for config, size in windows.values():
            config.sliding_window = size
        for module, mode in training:
            module.training = mode
