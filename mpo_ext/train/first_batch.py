"""Checks the first batch of a run for probable mistakes, with the checks of ``mpo_ext.check_batch``."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from mpo_ext.checks import LinesError
from mpo_ext.loss import eager
from mpo_ext.loss.batch_check import BatchFinding, BatchSequence, find_mistakes
from mpo_ext.loss.config import MPOConfig
from mpo_ext.train.batch import Batch
from mpo_ext.train.forward import HiddenRows
from mpo_ext.train.ranks import gather
from mpo_ext.train.recipe import Recipe

_IGNORE_INDEX = MPOConfig().ignore_index


class FirstBatchCheck:
    """Checks the micro-batches of the first step for mistakes in the labels and the log-probs.

    In every micro-batch, labels must be valid indices of the output head. The first micro-batch gets further checks if
    the loss has a preference term. Its labels are compared with the input tokens, as in ``mpo_ext.check_batch``. If
    the reference and the policy start from the same weights, their log-probs are compared, too.

    Attributes:
        findings: Probable mistakes that this rank has found.
    """

    def __init__(self, recipe: Recipe, processor: Any) -> None:
        self._loss, self._tokenizer = recipe.loss, getattr(processor, "tokenizer", processor)
        # If the reference is another model, its log-probs may be far from those of the policy.
        self._compares_reference = recipe.reference_kind is not None and recipe.reference.path is None
        self.findings: list[BatchFinding] = []
        self._is_first = True
        self._n_labels = 0
        self._names: list[str] = []

    @torch.no_grad()
    def check(self, batch: Batch, output: Tensor | HiddenRows, ref_logp: Tensor | None) -> None:
        """Checks a micro-batch and appends probable mistakes to ``findings``.

        Args:
            batch: The micro-batch.
            output: Logits ``[N, V]`` for the N labels of the batch, or hidden states and output head.
            ref_logp: ``[2B]`` summed log-probs of the responses under the reference, or None.
        """
        vocab, logits_at = _logits_of(output)
        self._n_labels += batch.projected_rows
        self._names += batch.names
        labels = batch.labels
        bad = ((labels != _IGNORE_INDEX) & ((labels < 0) | (labels >= vocab))).nonzero().squeeze(-1).tolist()
        if bad:
            self.findings.append(
                BatchFinding(
                    "label out of range",
                    f"{len(bad)} labels of {', '.join(batch.names[:4])} are not in [0, {vocab}), the rows of the "
                    f"output head, such as {int(labels[bad[0]])}: the loss is NaN; does the tokenizer belong to the "
                    "model?",
                )
            )
        if self._is_first and not bad and self._loss.has_preference and logits_at is not None:
            self.findings += find_mistakes(
                list(batch_sequences(batch, vocab, logits_at)),
                ref_logp if self._compares_reference else None,
                shift=False,
                ignore_index=_IGNORE_INDEX,
                tokenizer=self._tokenizer,
            )
        self._is_first = False

    def report(self, accelerator: Any, say: Callable[[str], None]) -> None:
        """Prints the findings of all ranks as warnings. All ranks must call this method.

        Raises:
            LinesError: If all labels of the first step are -100, or a label is out of range.
        """
        ranks = gather(accelerator, (self.findings, self._n_labels, self._names))
        findings = dict.fromkeys(str(finding) for findings, *_ in ranks for finding in findings)
        fatal = [text for text in findings if text.startswith("label out of range")]
        if not any(n_labels for _, n_labels, _ in ranks):
            names = [name for *_, names in ranks for name in names]
            fatal.append(
                f"no labels: no token of {', '.join(names[:4])} is trained in the first step ({len(names)} pairs)"
            )
        if fatal:
            raise LinesError("the first batch cannot be trained on:\n  " + "\n  ".join(fatal))
        for text in findings:
            say(f"WARNING: first batch: {text}")


def batch_sequences(batch: Batch, vocab: int, logits_at: Callable[[Tensor], Tensor]) -> Iterable[BatchSequence]:
    """Yields the sequences ``[prompt | response]`` of a batch: B chosen sequences, then B rejected sequences.

    In a sequence, position t predicts label t (``shift=False``). ``vocab`` is the number of logits per position.
    ``logits_at`` takes n indices into ``batch.labels``. It returns the logits ``[n, vocab]`` that predict these
    labels.
    """
    tokens, segments = batch.inputs["input_ids"].flatten().cpu(), batch.segments.flatten().tolist()
    index, bounds = batch.index.cpu(), batch.cu_seqlens.tolist()
    for number in range(2 * batch.pairs):
        begin, end = bounds[number], bounds[number + 1]
        places, targets = index[begin:end], batch.labels[begin:end]
        last = int(places[0])  # of the prompt
        first = last
        while first > 0 and segments[first - 1] == 0 and first % batch.segments.shape[1]:
            first -= 1
        prompt = tokens[first : last + 1]
        # The position that predicts a token holds the token before it.
        response = torch.cat([tokens[places[1:]], targets[-1:].clamp(min=0)])
        ignored = torch.full((len(prompt) - 1,), _IGNORE_INDEX)
        start = begin - len(ignored)

        def logits_of(rows: Tensor, start: int = start) -> Tensor:
            return logits_at(rows + start)

        side = "chosen" if number < batch.pairs else "rejected"
        name = f"{side} of {batch.names[number % batch.pairs]}"
        labels = torch.cat([ignored, targets, torch.tensor([_IGNORE_INDEX])])
        yield BatchSequence(name, logits_of, vocab, labels, torch.cat([prompt, response]))


def _logits_of(output: Tensor | HiddenRows) -> tuple[int, Callable[[Tensor], Tensor] | None]:
    """Returns the size of the vocabulary, V, and a function that computes logits.

    The function takes n indices into ``Batch.labels`` (int64 on the CPU), and returns their logits, ``[n, V]``. If the
    output head is sharded over ranks, None is returned in place of the function.
    """
    if isinstance(output, Tensor):
        return output.shape[-1], lambda rows: output[rows.to(output.device)]
    options = dict(output.options)
    if (group := options.pop("vocab_parallel", None)) is not None:
        return len(output.weight) * group.size(), None
    hidden, weight = output.hidden, output.weight
    return len(weight), lambda rows: eager.linear_logits(hidden[rows.to(hidden.device)], weight, **options)
