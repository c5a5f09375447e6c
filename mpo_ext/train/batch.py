"""Combines encoded pairs (samples) into batches of sequence rows.

A sequence row is a row of ``input_ids``, such as ``[prompt | chosen | rejected]``.
"""

import dataclasses
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from mpo_ext.loss.config import MPOConfig
from mpo_ext.train.encode import Sample
from mpo_ext.train.split_attention import token_blocks

RowLayout = Literal["packed", "shared", "masked", "separate"]

_IGNORE_INDEX = MPOConfig().ignore_index


@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
    """A batch of B pairs, on the CPU until ``to`` moves it.

    Attributes:
        layout: Arrangement of prompts and responses in the sequence rows.
            "separate": a row ``[prompt | response]`` for each response. The rows of the chosen responses come first.
            "shared": a row ``[prompt | chosen | rejected | chosen | rejected ...]`` for each prompt, with all of its
            pairs. If a rejected response has other images, it is in another row, after the prompt with these images.
            "packed": the rows of "shared", joined to a single row without padding. Needs ``use_split_attention``.
            "masked": the rows of "shared", always with a dense attention mask. "shared" has such a mask only if the
            model does not support split attention.
        inputs: Keyword arguments of the model, without attention masks: ``input_ids`` ``[R, L]`` (R sequence rows of L
            tokens), ``position_ids`` if the layout or model needs them, other inputs per token, ``pixel_values`` ...
        segments: ``[R, L]`` int32: 0 for a prompt, 1, 2, ... for the responses to this prompt, -1 for padding.
        index: ``[N]`` int64: the output of the model at token position ``index[i]`` of the flattened rows ``[R * L]``
            predicts ``labels[i]``.
        labels: ``[N]`` int64, the tokens of the B chosen responses, followed by the tokens of the B rejected
            responses; -100 for the tokens of user turns. An empty response has one label, -100, because the loss
            functions need at least one token position per sequence.
        cu_seqlens: ``[2B + 1]`` int64, the offsets of the responses in ``labels``.
        names: File and line number of each pair, for errors and warnings.
        keys: ``Sample.key`` of each pair.
        digests: ``Sample.digest`` of each pair.
        copies: 2 if each image in ``inputs`` belongs to two rows, one for each response of a pair (layout "separate");
            otherwise 1.
        segment_lengths: For each row, a tuple with an entry for each prompt: the number of tokens of the prompt, then
            of each non-empty response. For example, ``((10, 4, 6),)`` is a row with a prompt of 10 tokens and two
            responses. An entry is ``()`` if the prompt and its responses have no tokens. Only a row of the layout
            "packed" can have several prompts.
        image_blocks: Like ``segment_lengths``, but the entry of a prompt holds ``(start, end)`` for each run of image
            tokens (type 1 in ``token_type_ids``). Both are token indices in the prompt; ``end`` is exclusive. The
            attribute itself is ``()`` if no prompt in the batch has ``token_type_ids``.
    """

    layout: RowLayout
    inputs: dict[str, Tensor]
    segments: Tensor
    index: Tensor
    labels: Tensor
    cu_seqlens: Tensor
    names: tuple[str, ...]
    keys: tuple[str, ...]
    digests: tuple[str, ...]
    copies: int
    segment_lengths: tuple[tuple[tuple[int, ...], ...], ...]
    image_blocks: tuple[tuple[tuple[tuple[int, int], ...], ...], ...]

    def with_merged_responses(self) -> "Batch":
        """Returns a copy of the batch in which all responses to a prompt form a single response.

        In the copy, a response attends to the responses before it. ``check_shared_prefix`` uses the copy to measure
        the effect of a broken mask.
        """
        lengths = tuple(
            tuple((prompt[0], sum(prompt[1:])) if len(prompt) > 1 else prompt for prompt in row)
            for row in self.segment_lengths
        )
        return dataclasses.replace(self, segments=self.segments.clamp(max=1), segment_lengths=lengths)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Batch":
        """Returns the batch with all tensors on a device, except for ``labels``, which stay on the CPU.

        Labels on the CPU let ``linear_mpo_loss`` run without waiting for the GPU. For ``mpo_loss``, pass
        ``labels.to(logits.device)``.
        """
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking), skip="labels")

    def pin_memory(self) -> "Batch":
        """Returns the batch in pinned memory; a DataLoader with ``pin_memory=True`` calls this method."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor], skip: str | None = None) -> "Batch":
        changed: dict[str, Any] = {"inputs": {name: change(tensor) for name, tensor in self.inputs.items()}}
        for name in ("segments", "index", "labels", "cu_seqlens"):
            if name != skip:
                changed[name] = change(getattr(self, name))
        return dataclasses.replace(self, **changed)

    @property
    def pairs(self) -> int:
        """Number of pairs, B."""
        return len(self.names)

    @property
    def rows(self) -> int:
        """Number of sequence rows that go through the model, R."""
        return self.segments.shape[0]

    @property
    def positions(self) -> int:
        """Number of token positions that go through the decoder, R * L, padding included."""
        return self.segments.numel()

    @property
    def projected_rows(self) -> int:
        """Number of labels that are not -100. ``linear_mpo_loss`` computes logits only for these labels."""
        return int((self.labels != _IGNORE_INDEX).sum())

    @property
    def tokens(self) -> int:
        """Number of tokens, without padding. If the batch is on a GPU, reading this property waits for the GPU."""
        return int((self.segments >= 0).sum())

    @property
    def routed_tokens(self) -> int:
        """Number of tokens in the auxiliary loss of mixture-of-experts routers; see ``is_routed``."""
        return sum(sum(lengths) for row in self.segment_lengths for lengths in row if len(lengths) > 1)

    def is_routed(self) -> Tensor:
        """Returns which tokens count in the auxiliary loss of mixture-of-experts routers: ``[R * L]`` bool on the CPU.

        Padding does not count. A prompt does not count if all of its responses are empty. All other tokens count.
        """
        rows, length = self.segments.shape
        is_routed = torch.zeros(rows, length, dtype=torch.bool)
        for row, prompts in zip(is_routed, self.segment_lengths, strict=True):
            start = 0
            for lengths in prompts:
                end = start + sum(lengths)
                row[start:end] = len(lengths) > 1
                start = end
        return is_routed.flatten()


class _PlacedPrompt(NamedTuple):
    """The prompt of a sample, and its place in a sequence row."""

    number: int  # index of the prompt in _RowPlan.prompts
    sample: Sample
    row: int  # index of the sequence row
    start: int  # position of the first token in the row

    @property
    def ids(self) -> Tensor:
        return self.sample.prompt_ids

    @property
    def end(self) -> int:
        return self.start + len(self.ids)

    @property
    def place(self) -> tuple[int, slice]:
        return self.row, slice(self.start, self.end)


class _PlacedResponse(NamedTuple):
    """A response to a prompt, and its place in the sequence row of the prompt."""

    prompt: _PlacedPrompt
    start: int  # position of the first token in the row
    segment: int  # number of the response among the responses to its prompt, from 1
    ids: Tensor
    targets: Tensor | None  # bool for each token, whether it is scored; None: all tokens are scored

    @property
    def end(self) -> int:
        return self.start + len(self.ids)

    @property
    def place(self) -> tuple[int, slice]:
        return self.prompt.row, slice(self.start, self.end)

    @property
    def labels(self) -> Tensor:
        if not len(self.ids):
            return torch.tensor([_IGNORE_INDEX])
        return self.ids if self.targets is None else self.ids.masked_fill(~self.targets, _IGNORE_INDEX)


class _RowPlan(NamedTuple):
    """The positions of all prompts and responses of a batch in the sequence rows.

    Attributes:
        prompts: The prompts, ordered by row and by position in the row. If ``copies`` is 2, the list has two halves.
            The second half has the same prompts as the first half, in other rows.
        responses: The B chosen responses, followed by the B rejected responses.
        copies: The value of ``Batch.copies``.
    """

    prompts: list[_PlacedPrompt]
    responses: list[_PlacedResponse]
    copies: int = 1

    @property
    def owners(self) -> list[Sample]:
        """The sample of each prompt. If ``copies`` is 2, the repeated second half of ``prompts`` is left out."""
        return [prompt.sample for prompt in self.prompts[: len(self.prompts) // self.copies]]

    @property
    def ends(self) -> list[int]:
        """The number of tokens of each row, without padding."""
        ends = [0] * (self.prompts[-1].row + 1)
        for prompt in self.prompts:
            ends[prompt.row] = max(ends[prompt.row], prompt.end)
        for response in self.responses:
            ends[response.prompt.row] = max(ends[response.prompt.row], response.end)
        return ends

    def segment_lengths(self) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """Returns ``Batch.segment_lengths`` of the batch that this plan describes."""
        sizes = [{0: len(prompt.ids)} for prompt in self.prompts]
        for response in self.responses:
            if len(response.ids):
                sizes[response.prompt.number][response.segment] = len(response.ids)
        return self.by_row([tuple(size for _, size in sorted(segments.items()) if size) for segments in sizes])

    def by_row(self, values: Sequence[Any]) -> tuple[Any, ...]:
        """Groups the values of the prompts by sequence row. Returns a tuple of values for each row."""
        rows: list[list[Any]] = [[] for _ in self.ends]
        for prompt, value in zip(self.prompts, values, strict=True):
            rows[prompt.row].append(value)
        return tuple(map(tuple, rows))


def collate(
    samples: Sequence[Sample],
    layout: RowLayout,
    *,
    pad_id: int,
    with_rejected: bool = True,
    positions: Callable[[Sample], Tensor] | None = None,
    blank: Sample | None = None,
) -> Batch:
    """Returns a batch of samples on the CPU. DataLoader workers can call this function.

    Except in the layout "separate", samples with the same ``prompt_key`` share a prompt and its images.
    Trailing axes of image inputs are padded with zeros to the largest size, as processors do.

    Args:
        samples: At least one sample. Empty responses are allowed and do not contribute to the loss.
        layout: "packed", "shared", "masked" or "separate"; see ``Batch``.
        pad_id: Token id that fills shorter rows on the right. Attention never reads it. The model must be able to
            embed it, and it must not be the id of an image token.
        with_rejected: Whether rejected responses are included; False: they are treated as empty.
        positions: Function from a sample to the position ids of its prompt; see ``prompt_positions``. None: prompt
            tokens are numbered from 0.
        blank: A sample with images. Its prompt, without labels, is added to a batch without images. All ranks of a
            sharded model then run the vision tower. None: no prompt is added.

    Raises:
        TypeError: If token ids are not int64.
        ValueError: If ``samples`` is empty, the layout is unknown, or a response has no prompt. Also if the names,
            shapes or dtypes of inputs do not match, or samples with the same ``prompt_key`` have different prompts.
    """
    if layout not in get_args(RowLayout):
        raise ValueError(f"layout must be one of {', '.join(get_args(RowLayout))}, got {layout!r}")
    if not samples:
        raise ValueError("samples must hold at least one sample, got none")
    for sample in samples:
        _check_sample(sample)
    blanks = [blank] if blank is not None and not any(sample.image_inputs for sample in samples) else []
    plan = (_plan_separate if layout == "separate" else _plan_shared)(samples, blanks, with_rejected)
    if layout == "packed":
        plan = _packed(plan)

    input_ids, segments = _fill_rows(plan, pad_id)
    rows, length = segments.shape
    inputs = {"input_ids": input_ids}
    if positions is not None:
        inputs["position_ids"] = _positions([positions(owner) for owner in plan.owners], plan, rows, length)
    elif layout != "separate":
        indices = [torch.arange(len(owner.prompt_ids)).unsqueeze(0) for owner in plan.owners]
        inputs["position_ids"] = _positions(indices, plan, rows, length)[0]
    inputs |= _token_inputs(plan.prompts, rows, length)
    inputs |= _image_inputs(plan.owners)
    index, labels, lengths = _label_rows(plan.responses, length)
    has_types = any("token_type_ids" in owner.token_inputs for owner in plan.owners)
    return Batch(
        layout=layout,
        inputs=inputs,
        segments=segments,
        index=index,
        labels=labels,
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0),
        names=tuple(sample.name for sample in samples),
        keys=tuple(sample.key for sample in samples),
        digests=tuple(sample.digest for sample in samples),
        copies=plan.copies,
        segment_lengths=plan.segment_lengths(),
        image_blocks=plan.by_row([_image_blocks(prompt.sample) for prompt in plan.prompts]) if has_types else (),
    )


def _responses(sample: Sample, with_rejected: bool) -> list[tuple[Tensor, Tensor | None]]:
    """Returns token ids and targets of both responses. Without ``with_rejected``, the rejected response is empty."""
    chosen = (sample.chosen_ids, sample.chosen_targets)
    return [
        chosen,
        (sample.rejected_ids, sample.rejected_targets) if with_rejected else (sample.rejected_ids[:0], None),
    ]


def _plan_separate(samples: Sequence[Sample], blanks: list[Sample], with_rejected: bool) -> _RowPlan:
    """Returns the plan of the layout "separate". Prompts of ``blanks`` get rows without a response."""
    owners = [*samples, *blanks]
    copies = 2 if with_rejected else 1
    rows_of = owners * copies
    if with_rejected and any(sample.rejected_prompt is not None for sample in samples):
        rows_of = [*owners, *(sample.rejected_prompt or sample for sample in samples)]
        copies = 1  # images are stored for each row, because those of the rejected rows differ
    prompts = [_PlacedPrompt(row, owner, row, 0) for row, owner in enumerate(rows_of)]
    responses = []
    for side, first in ((0, 0), (1, len(owners) if with_rejected else 0)):
        for row, sample in enumerate(samples, first):
            ids, targets = _responses(sample, with_rejected)[side]
            responses.append(_PlacedResponse(prompts[row], prompts[row].end, 1, ids, targets))
    return _RowPlan(prompts, responses, copies)


def _plan_shared(samples: Sequence[Sample], blanks: list[Sample], with_rejected: bool) -> _RowPlan:
    """Returns the plan of the layout "shared". Prompts of ``blanks`` get rows without a response."""
    prompts: dict[str, _PlacedPrompt] = {}
    ends: list[int] = []
    segment_counts: list[int] = []
    sides: tuple[list[_PlacedResponse], list[_PlacedResponse]] = ([], [])
    for sample in samples:
        has_other = with_rejected and sample.rejected_prompt is not None
        owners = (sample, (sample.rejected_prompt or sample) if has_other else sample)
        for side, owner, (ids, targets) in zip(sides, owners, _responses(sample, with_rejected), strict=True):
            prompt = prompts.setdefault(owner.prompt_key, _PlacedPrompt(len(ends), owner, len(ends), 0))
            row = prompt.row
            if row == len(ends):
                ends.append(prompt.end)
                segment_counts.append(0)
            _check_same_prompt(prompt.sample, owner)
            segment_counts[row] += 1
            side.append(_PlacedResponse(prompt, ends[row], segment_counts[row], ids, targets))
            ends[row] += len(ids)
    additional = [_PlacedPrompt(row, blank, row, 0) for row, blank in enumerate(blanks, len(ends))]
    return _RowPlan([*prompts.values(), *additional], sides[0] + sides[1])


def _packed(plan: _RowPlan) -> _RowPlan:
    """Returns a plan that puts all rows of ``plan`` into a single row, one after the other."""
    starts = [0, *accumulate(plan.ends)]
    prompts = [prompt._replace(row=0, start=starts[prompt.row]) for prompt in plan.prompts]
    responses = [
        response._replace(prompt=prompts[response.prompt.number], start=starts[response.prompt.row] + response.start)
        for response in plan.responses
    ]
    return _RowPlan(prompts, responses)


def _fill_rows(plan: _RowPlan, pad_id: int) -> tuple[Tensor, Tensor]:
    """Returns the token ids (int64) and ``Batch.segments`` (int32), ``[R, L]`` each."""
    shape = (len(plan.ends), max(1, *plan.ends))
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    segments = torch.full(shape, -1, dtype=torch.int32)
    for prompt in plan.prompts:
        input_ids[prompt.place] = prompt.ids
        segments[prompt.place] = 0
    for response in plan.responses:
        input_ids[response.place] = response.ids
        segments[response.place] = response.segment
    return input_ids, segments


def _label_rows(responses: Sequence[_PlacedResponse], length: int) -> tuple[Tensor, Tensor, list[int]]:
    """Returns (``Batch.index``, ``Batch.labels``, number of labels per response). A row has ``length`` tokens."""
    index, labels = [], []
    for response in responses:
        places = torch.arange(len(response.ids) or 1) + response.start - 1
        places[0] = max(response.prompt.end - 1, 0)  # the prompt's last token predicts the response's first token
        index.append(places + response.prompt.row * length)
        labels.append(response.labels)
    return torch.cat(index), torch.cat(labels), [len(ids) for ids in labels]


def _check_sample(sample: Sample) -> None:
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        ids = getattr(sample, name)
        if ids.dtype != torch.int64:
            raise TypeError(f"{name} must be int64, got {ids.dtype} in {sample.name}")
        if ids.ndim != 1:
            raise ValueError(f"{name} must have one axis, got shape {tuple(ids.shape)} in {sample.name}")
    if not len(sample.prompt_ids) and (len(sample.chosen_ids) or len(sample.rejected_ids)):
        raise ValueError(f"prompt_ids must hold a token to predict the response from, got none in {sample.name}")
    for name, values in sample.token_inputs.items():
        if values.shape != sample.prompt_ids.shape:
            raise ValueError(
                f"{name} must have the shape of prompt_ids, {tuple(sample.prompt_ids.shape)}, got "
                f"{tuple(values.shape)} in {sample.name}"
            )


def _check_same_prompt(first: Sample, second: Sample) -> None:
    shapes = [{name: values.shape for name, values in sample.image_inputs.items()} for sample in (first, second)]
    if not torch.equal(first.prompt_ids, second.prompt_ids) or shapes[0] != shapes[1]:
        raise ValueError(
            f"samples with one prompt_key must have one prompt, got two for {first.prompt_key!r}: in {first.name} and "
            f"in {second.name}"
        )


def _positions(values: Sequence[Tensor], plan: _RowPlan, rows: int, length: int) -> Tensor:
    """Returns the position ids of all rows, ``[A, R, L]`` int64. A is 1, or larger for multimodal RoPE.

    ``values`` holds the position ids ``[A, P]`` of each prompt, in the order of ``plan.owners``. The positions of a
    response continue after the largest position of its prompt.
    """
    positions = torch.zeros(values[0].shape[0], rows, length, dtype=torch.int64)
    firsts = []
    for prompt, of_prompt in zip(plan.prompts, [*values] * plan.copies, strict=True):
        row, place = prompt.place
        positions[:, row, place] = of_prompt
        firsts.append(int(of_prompt.max()) + 1 if of_prompt.numel() else 0)
    for response in plan.responses:
        row, place = response.place
        first = firsts[response.prompt.number]
        positions[:, row, place] = torch.arange(first, first + len(response.ids))
    return positions


def _token_inputs(prompts: Sequence[_PlacedPrompt], rows: int, length: int) -> dict[str, Tensor]:
    """Returns the additional per-token inputs of the model by name, such as ``token_type_ids``: ``[R, L]`` each.

    The values are 0 for responses, for padding, and for prompts that lack the input.
    """
    inputs: dict[str, Tensor] = {}
    for prompt in prompts:
        for name, values in prompt.sample.token_inputs.items():
            if name not in inputs:
                inputs[name] = values.new_zeros(rows, length)
            inputs[name][prompt.place] = values
    return inputs


def _image_blocks(sample: Sample) -> tuple[tuple[int, int], ...]:
    types = sample.token_inputs.get("token_type_ids")
    return () if types is None else token_blocks(types)


def _image_inputs(owners: Sequence[Sample]) -> dict[str, Tensor]:
    """Returns the image and video inputs by name, concatenated over the samples that have images or videos."""
    joined: dict[str, Tensor] = {}
    for is_video in (False, True):
        parts = [
            (owner, {name: value for name, value in owner.image_inputs.items() if _is_of_video(name) == is_video})
            for owner in owners
        ]
        parts = [(owner, inputs) for owner, inputs in parts if inputs]
        for owner, inputs in parts:
            first, names = parts[0][0], sorted(parts[0][1])
            if sorted(inputs) != names:
                raise ValueError(
                    f"image_inputs must have the same names in all samples of a batch, got {names} in {first.name} "
                    f"and {sorted(inputs)} in {owner.name}"
                )
        for name in parts[0][1] if parts else ():
            joined[name] = _padded_cat(name, [inputs[name] for _, inputs in parts])
    return joined


def _is_of_video(name: str) -> bool:
    """Returns whether the model input with this name holds videos rather than images."""
    return "video" in name or name == "second_per_grid_ts"


def _padded_cat(name: str, tensors: Sequence[Tensor]) -> Tensor:
    """Concatenates tensors along the first axis. First, all other axes are padded with zeros to their largest size.

    ``name`` is the name of the input, for error messages.
    """
    axes, dtypes = {tensor.ndim for tensor in tensors}, {tensor.dtype for tensor in tensors}
    if len(axes) > 1 or len(dtypes) > 1 or 0 in axes:
        shapes = ", ".join(f"{tuple(tensor.shape)} {tensor.dtype}" for tensor in tensors)
        raise ValueError(f"{name} must have the same axes, at least one, and dtype in all samples, got {shapes}")
    sizes = [max(tensor.shape[axis] for tensor in tensors) for axis in range(1, tensors[0].ndim)]
    if all(list(tensor.shape[1:]) == sizes for tensor in tensors):
        return torch.cat(list(tensors))
    out = tensors[0].new_zeros(sum(len(tensor) for tensor in tensors), *sizes)
    start = 0
    for tensor in tensors:
        place = (slice(start, start + len(tensor)), *map(slice, tensor.shape[1:]))
        out[place] = tensor
        start += len(tensor)
    return out
