"""``check_batch`` looks for common mistakes in a batch before a training run."""

import dataclasses
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mpo_ext.loss import eager
from mpo_ext.loss.config import MPOConfig
from mpo_ext.loss.reward_shift import RewardShift
from mpo_ext.ops import checks

_SHOWN = 60  # characters of a decoded text
_ROWS = 128  # positions whose logits are computed at a time
_NOT_GIVEN: Any = object()
_DEFAULT_CONFIG = MPOConfig()
_BAD_LABELS = ("label out of range", "no labels")


@dataclasses.dataclass(frozen=True, slots=True)
class BatchFinding:
    """A probable mistake in a batch: its kind, and a message with the evidence."""

    kind: str
    message: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}"


@dataclasses.dataclass(frozen=True, slots=True)
class BatchSequence:
    """A sequence of a batch, with T positions.

    Attributes:
        name: Name of the sequence in messages, such as "chosen 0".
        logits_at: Function that takes n positions (int64 tensor on the CPU) and returns their logits, ``[n, vocab]``.
        vocab: Size of the vocabulary.
        labels: ``[T]`` on the CPU.
        ids: ``[T]`` token ids of the model's input on the CPU, or None.
    """

    name: str
    logits_at: Callable[[Tensor], Tensor]
    vocab: int
    labels: Tensor
    ids: Tensor | None

    def sum_and_count(self, ahead: int, ignore_index: int) -> tuple[float, int]:
        """Returns the summed log-prob of the scored labels, and the number of scored labels.

        The logits at position t score the label at position ``t + ahead``; ``ahead`` may be negative. Labels that
        equal ``ignore_index`` or lie outside the vocabulary are not scored.
        """
        labels = self.labels[max(ahead, 0) :]
        if ahead < 0:
            labels = torch.nn.functional.pad(labels[:ahead], (-ahead, 0), value=ignore_index)
        is_scored = (labels != ignore_index) & (labels >= 0) & (labels < self.vocab)
        rows = is_scored.nonzero().squeeze(-1)
        total = 0.0
        for part in rows.split(_ROWS):  # not all at once, which could take gigabytes
            logits = self.logits_at(part).detach()
            logp = eager.token_logp(logits, labels[part].to(logits.device), ignore_index)
            total += float(logp.double().sum())
        return total, len(rows)


def check_batch(
    logits: Tensor,
    labels: Tensor,
    ref_logp: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    input_ids: Tensor | None = None,
    tokenizer: Any = None,
    cu_seqlens: Tensor | None = None,
    shift: bool = True,
    reward_shift: RewardShift | Tensor | float | None = _NOT_GIVEN,
    config: MPOConfig = _DEFAULT_CONFIG,
) -> list[BatchFinding]:
    """Returns the probable mistakes in the arguments of ``mpo_loss``. A correct batch gives [].

    Call this function for the first batch, on which policy and reference are nearly equal. Do not call it in every
    step, because it waits for the device and computes the log-probs of all labels again.

    Args:
        logits: ``[2B, T, V]``, or packed ``[N, V]`` with ``cu_seqlens``, as in ``mpo_loss``. With ``weight``, pass the
            hidden states instead, ``[2B, T, D]`` or ``[N, D]``, as in ``linear_mpo_loss``.
        labels: ``[2B, T]`` or ``[N]`` int64.
        ref_logp: ``[2B]`` summed log-probs under the reference, or None.
        weight: ``[V, D]`` weight of the head, or None.
        bias: ``[V]`` bias of the head, or None.
        logit_scale: As in ``linear_mpo_loss``; ignored without ``weight``.
        softcap: As in ``linear_mpo_loss``; ignored without ``weight``.
        temperature: As in ``linear_mpo_loss``; ignored without ``weight``.
        input_ids: Token ids of the model's input, shaped like ``labels``, including the prompts. None skips the checks
            of prompts and padding.
        tokenizer: Tokenizer that decodes token ids for the messages and defines the padding token, or None.
        cu_seqlens: ``[2B + 1]`` as in ``mpo_loss``.
        shift: As in ``mpo_loss``.
        reward_shift: The ``reward_shift`` that you will pass to ``mpo_loss``. None and 0 are reported as a mistake if
            ``config.bco_weight`` is positive. Leave this argument out to skip the check.
        config: As in ``mpo_loss``.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If a shape, a device or ``cu_seqlens`` is wrong.
    """
    name = "logits" if weight is None else "hidden"
    count = checks.check_pairs(logits, labels, cu_seqlens, name)
    if weight is not None:
        checks.check_head(logits, weight, bias)
    if input_ids is not None and input_ids.shape != labels.shape:
        raise ValueError(
            f"input_ids must have the shape of labels, {tuple(labels.shape)}, got {tuple(input_ids.shape)}"
        )
    if ref_logp is not None:
        checks.check_reference(logits, count, ref_logp, None, name)
    head = None if weight is None else (weight, bias, logit_scale, softcap, temperature)
    sequences = list(_split(logits, labels, head, input_ids, cu_seqlens, count))
    findings = find_mistakes(sequences, ref_logp, shift=shift, ignore_index=config.ignore_index, tokenizer=tokenizer)
    if any(finding.kind in _BAD_LABELS for finding in findings):
        return findings
    is_forgotten = reward_shift is None or (isinstance(reward_shift, (int, float)) and reward_shift == 0)
    if is_forgotten and config.bco_weight > 0:
        text = (
            f"bco_weight is {config.bco_weight:g}, and reward_shift is {reward_shift}: the BCO term of the authors "
            "subtracts a running mean of the rewards; create one RewardShift() and pass it each time"
        )
        findings.append(BatchFinding("no reward shift", text))
    return findings


def is_debugging() -> bool:
    """Returns whether the environment variable MPO_DEBUG asks for ``check_batch`` in each call of a loss function.

    Under torch.compile, always returns False.

    Raises:
        ValueError: If the variable has another value than "", "0" and "1".
    """
    if torch.compiler.is_compiling():
        return False
    text = os.environ.get("MPO_DEBUG", "")
    if text not in ("", "0", "1"):
        raise ValueError(f"MPO_DEBUG must be 0 or 1 in the environment, got {text!r}")
    return text == "1"


def warn_of_mistakes(*args: Any, **options: Any) -> None:
    """Calls ``check_batch`` and issues a Python warning for each finding.

    The warning shows the line of the user's code that calls the loss function.
    """
    with torch.no_grad():
        findings = check_batch(*args, **options)
    for finding in findings:
        warnings.warn(f"MPO_DEBUG: {finding}", stacklevel=4)  # above this function, the loss and its decorator


def find_mistakes(
    sequences: Sequence[BatchSequence],
    ref_logp: Tensor | None,
    *,
    shift: bool,
    ignore_index: int,
    tokenizer: Any = None,
) -> list[BatchFinding]:
    """Returns the probable mistakes in ``sequences``: B chosen sequences, followed by B rejected sequences.

    The other arguments are those of ``check_batch`` and ``MPOConfig``.
    """
    ahead = int(shift)
    findings = [*_check_range(sequences, ignore_index), *_check_labelled(sequences, ahead, ignore_index)]
    if findings:
        return findings  # the other checks read the labels
    if any(sequence.ids is None for sequence in sequences):
        findings += _check_alignment_by_logp(sequences, ahead, ignore_index)
    else:
        findings += _check_alignment(sequences, ahead, ignore_index)
        findings += _check_prompts(sequences, ahead, ignore_index, tokenizer)
        findings += _check_padding(sequences, ahead, ignore_index, tokenizer)
    if not findings:
        findings += _check_values(sequences, None if ref_logp is None else ref_logp.tolist(), ahead, ignore_index)
    return findings


def _split(
    logits: Tensor,
    labels: Tensor,
    head: tuple[Any, ...] | None,
    input_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    count: int,
) -> Iterator[BatchSequence]:
    bounds = None if cu_seqlens is None else cu_seqlens.tolist()
    for number in range(count):
        place: Any = number if bounds is None else slice(bounds[number], bounds[number + 1])
        scores = logits[place]

        def logits_at(rows: Tensor, scores: Tensor = scores) -> Tensor:
            chosen = scores[rows.to(scores.device)]
            return chosen if head is None else eager.linear_logits(chosen, *head)

        ids = None if input_ids is None else input_ids[place].cpu()
        side = "chosen" if number < count // 2 else "rejected"
        vocab = scores.shape[-1] if head is None else len(head[0])
        yield BatchSequence(f"{side} {number % (count // 2)}", logits_at, vocab, labels[place].cpu(), ids)


def _check_range(sequences: Sequence[BatchSequence], ignore_index: int) -> Iterator[BatchFinding]:
    for sequence in sequences:
        labels, vocab = sequence.labels, sequence.vocab
        bad = ((labels != ignore_index) & ((labels < 0) | (labels >= vocab))).nonzero().squeeze(-1).tolist()
        if bad:
            yield BatchFinding(
                "label out of range",
                f"{len(bad)} labels of {sequence.name} are neither {ignore_index} nor in [0, {vocab}), as "
                f"{labels[bad[0]].item()} at position {bad[0]}: the loss is NaN",
            )


def _check_labelled(sequences: Sequence[BatchSequence], ahead: int, ignore_index: int) -> Iterator[BatchFinding]:
    empty = [sequence.name for sequence in sequences if bool((sequence.labels[ahead:] == ignore_index).all())]
    if empty:
        yield BatchFinding(
            "no labels", f"all labels are {ignore_index} in {', '.join(empty[:5])}: these responses are not trained"
        )


def _check_alignment(sequences: Sequence[BatchSequence], ahead: int, ignore_index: int) -> Iterator[BatchFinding]:
    """Yields a finding if the labels are too early or too late, compared with ``input_ids``.

    With ``ahead=1``, the loss shifts the labels: ``labels[t]`` must equal ``input_ids[t]``. With ``ahead=0``, the loss
    does not shift the labels: ``labels[t]`` must equal ``input_ids[t + 1]``.
    """
    shares = {offset: _share_of_equal(sequences, offset, ignore_index) for offset in (-1, 0, 1, 2)}
    expected = 1 - ahead
    best = max(shares, key=lambda offset: shares[offset])
    if shares[expected] > 0.9 or shares[best] < 0.9 or best == expected:
        return
    advice = _alignment_advice(ahead, best)
    yield BatchFinding(
        "labels shifted",
        f"{100 * shares[best]:.0f} % of the labels equal the input id {best:+d} positions away and "
        f"{100 * shares[expected]:.0f} % the one at {expected:+d}, where shift={bool(ahead)} expects it: {advice}",
    )


def _alignment_advice(ahead: int, offset: int) -> str:
    """Returns advice for a batch with misplaced labels: ``labels[t]`` equals ``input_ids[t + offset]``.

    ``ahead`` is 1 if the loss function shifts the labels, otherwise 0.
    """
    if offset == 1 and ahead == 1:
        return "the labels are shifted already: pass shift=False, or labels that equal input_ids"
    if offset == 0 and ahead == 0:
        return "the labels are not shifted: pass shift=True, or shift_labels(labels)"
    is_late = offset < 1 - ahead
    correct = "the token at position t" if ahead else "the token at position t + 1"
    positions = abs(offset - (1 - ahead))
    return (
        f"the labels are {positions} position{'s' if positions > 1 else ''} too {'late' if is_late else 'early'}: the "
        f"label at position t must be {correct}{'' if is_late else '; were the labels shifted twice?'}"
    )


def _share_of_equal(sequences: Sequence[BatchSequence], offset: int, ignore_index: int) -> float:
    equal = total = 0
    for sequence in sequences:
        assert sequence.ids is not None
        labels, ids = sequence.labels, sequence.ids
        size = len(labels) - abs(offset)
        labels, ids = (labels[:size], ids[offset:]) if offset >= 0 else (labels[-offset:], ids[:size])
        scored = labels != ignore_index
        equal += int((labels == ids)[scored].sum())
        total += int(scored.sum())
    return equal / max(total, 1)


def _check_alignment_by_logp(
    sequences: Sequence[BatchSequence], ahead: int, ignore_index: int
) -> Iterator[BatchFinding]:
    """Yields a finding if the labels seem to be at the wrong positions.

    The loss scores the label at position ``t + ahead`` with the logits at position t. This function computes the mean
    log-prob of the labels for the offsets -1, 0, 1 and 2. If the largest mean exceeds the mean for ``ahead`` by more
    than 2 nats, the function yields a finding.
    """
    means = {}
    for other in range(-1, 3):
        parts = [sequence.sum_and_count(other, ignore_index) for sequence in sequences]
        means[other] = sum(part for part, _ in parts) / max(sum(size for _, size in parts), 1)
    best = max(means, key=lambda other: means[other])
    if best != ahead and means[best] > means[ahead] + 2:
        yield BatchFinding(
            "labels shifted",
            f"labels have a log-prob of {means[best]:.2f} per token {best} positions after their logits and "
            f"{means[ahead]:.2f} at {ahead}, where shift={bool(ahead)} expects them: "
            f"{_alignment_advice(ahead, 1 - best)}",
        )


def _first_label(sequence: BatchSequence, ignore_index: int) -> int:
    return int((sequence.labels != ignore_index).nonzero()[0])


def _prompt(sequence: BatchSequence, ahead: int, ignore_index: int, padding: int | None) -> list[int]:
    assert sequence.ids is not None
    prompt = sequence.ids[: _first_label(sequence, ignore_index) + 1 - ahead].tolist()
    while prompt and prompt[0] == padding:
        prompt.pop(0)
    return prompt


def _check_prompts(
    sequences: Sequence[BatchSequence], ahead: int, ignore_index: int, tokenizer: Any
) -> Iterator[BatchFinding]:
    padding = getattr(tokenizer, "pad_token_id", None)
    pairs = len(sequences) // 2
    prompts = [_prompt(sequence, ahead, ignore_index, padding) for sequence in sequences]
    differing = [pair for pair in range(pairs) if prompts[pair] != prompts[pairs + pair]]
    if differing and all(prompts[2 * pair] == prompts[2 * pair + 1] for pair in range(pairs)):
        yield BatchFinding(
            "pairs interleaved",
            f"rows 2i and 2i+1 have the same prompt ({_text(prompts[0], tokenizer)}), but rows i and {pairs}+i are "
            "compared: pass all chosen responses first, then all rejected ones",
        )
    elif len(differing) == pairs:
        texts = " and ".join(_text(prompts[row], tokenizer) for row in (0, pairs))
        yield BatchFinding("prompts differ", f"chosen and rejected response of each pair have other prompts: {texts}")
    unmasked = [
        sequence
        for sequence, prompt in zip(sequences, prompts, strict=True)
        if len(prompt) <= 1 and len(sequence.labels) > 4
    ]
    if len(unmasked) == len(sequences):
        assert sequences[0].ids is not None
        start = _text(sequences[0].ids[:12].tolist(), tokenizer)
        yield BatchFinding(
            "prompt not masked",
            f"in every row the labels begin with the first token ({start}): set those of the prompt to {ignore_index}",
        )


def _check_padding(
    sequences: Sequence[BatchSequence], ahead: int, ignore_index: int, tokenizer: Any
) -> Iterator[BatchFinding]:
    padding = getattr(tokenizer, "pad_token_id", None)
    for sequence in sequences:
        labels = sequence.labels.tolist()
        while len(labels) > 1 and labels[-1] == ignore_index and not ahead:
            labels.pop()  # the last position predicts nothing
        run = next((size for size, label in enumerate(reversed(labels)) if label != labels[-1]), len(labels))
        if labels[-1] != ignore_index and run >= (2 if labels[-1] == padding else 6 if padding is None else math.inf):
            yield BatchFinding(
                "padding not masked",
                f"the labels of {sequence.name} end with {run} times the token {_text([labels[-1]], tokenizer)}: set "
                f"the labels of padding to {ignore_index}",
            )
            return


def _check_values(
    sequences: Sequence[BatchSequence], reference: list[float] | None, ahead: int, ignore_index: int
) -> Iterator[BatchFinding]:
    """Yields findings about log-probs that are not finite, or a reference that is far from the policy."""
    scored = [sequence.sum_and_count(ahead, ignore_index) for sequence in sequences]
    sums, sizes = [part for part, _ in scored], [size for _, size in scored]
    sources = {"the policy": sums} if reference is None else {"the policy": sums, "ref_logp": reference}
    is_finite = True
    for source, values in sources.items():
        bad = [number for number, value in enumerate(values) if not math.isfinite(value)]
        if bad:
            sequence, value = sequences[bad[0]].name, values[bad[0]]
            text = f"{source} has the summed log-prob {value} for {sequence}: the loss may be NaN"
            yield BatchFinding("not finite", text)
            is_finite = False
    if reference is not None and is_finite:
        yield from _check_reference(sums, sizes, reference)


def _check_reference(sums: list[float], sizes: list[int], reference: list[float]) -> Iterator[BatchFinding]:
    pairs = len(sums) // 2
    gaps = [abs(ref - own) / size for ref, own, size in zip(reference, sums, sizes, strict=True)]
    evidence = f"ref_logp is {reference[0]:.2f} and the policy's {sums[0]:.2f} for the {sizes[0]} tokens of chosen 0"
    ratios = [ref / own * size if own else 0.0 for ref, own, size in zip(reference, sums, sizes, strict=True)]
    if min(sizes) >= 4 and all(0.5 < ratio < 2 for ratio in ratios):
        yield BatchFinding(
            "mean instead of sum", f"{evidence}: ref_logp must be the sum of the log-probs, not their mean"
        )
        return
    orders = {
        "rejected responses first": [*range(pairs, 2 * pairs), *range(pairs)],
        "pairs interleaved": [2 * row if row < pairs else 2 * (row - pairs) + 1 for row in range(2 * pairs)],
    }
    if max(gaps) > 0.02:
        for name, order in orders.items():
            moved = [abs(reference[place] - own) / size for place, own, size in zip(order, sums, sizes, strict=True)]
            if max(moved) < 0.1 * max(gaps):
                yield BatchFinding("reference in another order", f"{evidence}; in the order '{name}' all rows agree")
                return
    if sorted(gaps)[len(gaps) // 2] > 1:
        yield BatchFinding(
            "reference of other tokens",
            f"{evidence}, {gaps[0]:.2f} nats per token apart: the reference has other tokens or labels or another "
            "shift, or this is not the first batch",
        )


def _text(ids: list[int], tokenizer: Any) -> str:
    text = str(ids) if tokenizer is None else repr(tokenizer.decode(ids))
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
