"""Batches of pairs: ``collate`` combines encoded pairs (samples) into the sequence rows that go through the model."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from mpo_ext.loss.config import MPOConfig
from mpo_ext.train.encode import Sample
from mpo_ext.train.masks import sequence_positions
from mpo_ext.train.split_attention import segment_lengths, token_blocks

RowLayout = Literal["shared", "masked", "separate"]

_IGNORE_INDEX = MPOConfig().ignore_index


@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
    """A batch of B pairs, on the CPU until ``to`` moves it.

    Attributes:
        layout: "shared": a sequence row is ``[prompt | chosen | rejected]``; pairs with the same prompt share a row,
            ``[prompt | chosen | rejected | chosen | rejected ...]``. "masked": the same rows, always with a dense
            attention mask, which "shared" needs only without split attention. "separate": a sequence row is
            ``[prompt | response]``; the chosen rows come first, and images are stored once for both rows of a pair.
        inputs: Keyword arguments of the model except attention masks: ``input_ids`` ``[R, L]``, ``position_ids`` if
            the layout needs them, inputs with a value per token, ``pixel_values`` ...
        segments: ``[R, L]`` int32: 0 for the prompt, 1, 2, ... for the responses of the row, -1 for padding.
        index: ``[N]`` int64: for each label, the token position that predicts it, in the flattened rows ``[R * L]``.
        labels: ``[N]`` int64, the tokens of the B chosen responses, followed by the tokens of the B rejected
            responses; -100 for the tokens of user turns. An empty response has one label, -100, because the loss
            functions need at least one token position per sequence.
        cu_seqlens: ``[2B + 1]`` int64, the offsets of the responses in ``labels``.
        names: File and line number of each pair, for messages.
        keys: ``Sample.key`` of each pair.
        digests: ``Sample.digest`` of each pair.
        copies: Number of sequence rows per prompt: 2 in the layout "separate" with rejected responses, otherwise 1.
        segment_lengths: For each row, the number of tokens of its prompt and of each response that is not empty.
        image_blocks: For each row, first and last position (exclusive) of each run of tokens with type 1 in
            ``token_type_ids``; empty without this input.
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
    segment_lengths: tuple[tuple[int, ...], ...]
    image_blocks: tuple[tuple[tuple[int, int], ...], ...]

    def with_segments(self, segments: Tensor) -> "Batch":
        """Returns the batch with other ``segments`` of the same shape."""
        return dataclasses.replace(self, segments=segments, segment_lengths=segment_lengths(segments))

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Batch":
        """Returns the batch with all tensors on a device, except for ``labels``, which stay on the CPU.

        ``linear_mpo_loss`` then need not wait for the GPU; for ``mpo_loss``, pass ``labels.to(logits.device)``.
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
        """Number of labelled token positions, for which ``linear_mpo_loss`` computes logits."""
        return int((self.labels != _IGNORE_INDEX).sum())

    @property
    def tokens(self) -> int:
        """Number of token positions without padding. Read it before ``to``: on a GPU it waits for the device."""
        return int((self.segments >= 0).sum())


class _PlacedResponse(NamedTuple):
    """A response and its place in the sequence rows."""

    row: int
    start: int
    prompt_length: int
    segment: int
    ids: Tensor
    targets: Tensor | None

    @property
    def end(self) -> int:
        return self.start + len(self.ids)

    @property
    def labels(self) -> Tensor:
        if not len(self.ids):
            return torch.tensor([_IGNORE_INDEX])
        return self.ids if self.targets is None else self.ids.masked_fill(~self.targets, _IGNORE_INDEX)


class _RowPlan(NamedTuple):
    """The sequence rows of a batch.

    Attributes:
        owners: The samples that provide prompts and images.
        row_owners: For each row, the sample that provides its prompt; each owner occurs ``copies`` times.
        responses: The B chosen responses, followed by the B rejected responses.
    """

    owners: list[Sample]
    row_owners: list[Sample]
    responses: list[_PlacedResponse]

    @property
    def copies(self) -> int:
        return len(self.row_owners) // len(self.owners)

    @property
    def present(self) -> list[_PlacedResponse]:
        """The responses that have a row; without rejected responses, the layout "separate" has no rows for them."""
        return [response for response in self.responses if response.row < len(self.row_owners)]

    @property
    def length(self) -> int:
        prompts = (len(owner.prompt_ids) for owner in self.owners)
        return max(1, *prompts, *(response.end for response in self.present))


def collate(
    samples: Sequence[Sample],
    layout: RowLayout,
    *,
    pad_id: int,
    with_rejected: bool = True,
    positions: Callable[[Sample], Tensor] | None = None,
    blank: Sample | None = None,
) -> Batch:
    """Returns a batch of samples on the CPU. DataLoader workers can call it.

    In the layouts "shared" and "masked", samples with the same ``prompt_key`` share a sequence row and its images.
    Trailing axes of image inputs are padded with zeros to the largest size, as processors do.

    Args:
        samples: At least one sample. Empty responses are allowed and do not contribute to the loss.
        layout: "shared", "masked" or "separate"; see ``Batch``.
        pad_id: Token id that fills shorter rows on the right. Attention never reads it, but the model must be able to
            embed it, and it must not be the id of an image token.
        with_rejected: Whether rejected responses go through the model; False: they are treated as empty.
        positions: The result of ``prompt_positions(model)``.
        blank: A sample with images. A batch without images gets an additional row with its prompt, which is not
            scored, because ranks that share a model must either all run its vision tower or all skip it. None: no
            additional row.

    Raises:
        TypeError: If token ids are not int64.
        ValueError: If ``samples`` is empty, the layout is unknown, shapes do not match, a response has no prompt, or
            samples with the same ``prompt_key`` have different prompts.
    """
    if layout not in get_args(RowLayout):
        raise ValueError(f"layout must be one of {', '.join(get_args(RowLayout))}, got {layout!r}")
    if not samples:
        raise ValueError("samples must hold at least one sample, got none")
    for sample in samples:
        _check_sample(sample)
    blanks = [blank] if blank is not None and not any(sample.image_inputs for sample in samples) else []
    plan = (_plan_separate if layout == "separate" else _plan_shared)(samples, blanks, with_rejected)

    input_ids, segments = _fill_rows(plan, pad_id)
    rows, length = segments.shape
    inputs = {"input_ids": input_ids}
    if positions is not None:
        prompts = [positions(owner) for owner in plan.owners]
        inputs["position_ids"] = _rotary_positions(prompts * plan.copies, plan.present, rows, length)
    elif layout != "separate":
        inputs["position_ids"] = sequence_positions(segments)
    inputs |= _token_inputs(plan.row_owners, rows, length)
    inputs |= _image_inputs(plan.owners)
    index, labels, lengths = _label_rows(plan.responses, rows, length)
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
        segment_lengths=segment_lengths(segments),
        image_blocks=token_blocks(inputs.get("token_type_ids")),
    )


def _responses(sample: Sample, with_rejected: bool) -> list[tuple[Tensor, Tensor | None]]:
    """Returns the ids and the targets of the chosen and of the rejected response."""
    chosen = (sample.chosen_ids, sample.chosen_targets)
    return [
        chosen,
        (sample.rejected_ids, sample.rejected_targets) if with_rejected else (sample.rejected_ids[:0], None),
    ]


def _plan_separate(samples: Sequence[Sample], blanks: list[Sample], with_rejected: bool) -> _RowPlan:
    """Plans a row for each response; the rejected rows follow all chosen and blank rows."""
    owners = [*samples, *blanks]
    responses = []
    for side in (0, 1):
        for row, sample in enumerate(samples):
            size, (ids, targets) = len(sample.prompt_ids), _responses(sample, with_rejected)[side]
            responses.append(_PlacedResponse(row + side * len(owners), size, size, 1, ids, targets))
    return _RowPlan(owners, owners * 2 if with_rejected else owners, responses)


def _plan_shared(samples: Sequence[Sample], blanks: list[Sample], with_rejected: bool) -> _RowPlan:
    """Plans a row for each prompt with all its responses."""
    row_of: dict[str, int] = {}
    owners: list[Sample] = []
    ends: list[int] = []
    segment_counts: list[int] = []
    sides: tuple[list[_PlacedResponse], list[_PlacedResponse]] = ([], [])
    for sample in samples:
        row = row_of.setdefault(sample.prompt_key, len(owners))
        if row == len(owners):
            owners.append(sample)
            ends.append(len(sample.prompt_ids))
            segment_counts.append(0)
        _check_same_prompt(owners[row], sample)
        for side, (ids, targets) in zip(sides, _responses(sample, with_rejected), strict=True):
            segment_counts[row] += 1
            side.append(_PlacedResponse(row, ends[row], len(sample.prompt_ids), segment_counts[row], ids, targets))
            ends[row] += len(ids)
    owners += blanks
    return _RowPlan(owners, owners, sides[0] + sides[1])


def _fill_rows(plan: _RowPlan, pad_id: int) -> tuple[Tensor, Tensor]:
    """Returns the token ids and the segments of all rows, ``[R, L]`` each."""
    shape = (len(plan.row_owners), plan.length)
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    segments = torch.full(shape, -1, dtype=torch.int32)
    for row, owner in enumerate(plan.row_owners):
        size = len(owner.prompt_ids)
        input_ids[row, :size] = owner.prompt_ids
        segments[row, :size] = 0
    for response in plan.present:
        input_ids[response.row, response.start : response.end] = response.ids
        segments[response.row, response.start : response.end] = response.segment
    return input_ids, segments


def _label_rows(responses: Sequence[_PlacedResponse], rows: int, length: int) -> tuple[Tensor, Tensor, list[int]]:
    """Returns ``Batch.index``, ``Batch.labels`` and the number of labels per response."""
    index, labels = [], []
    for response in responses:
        places = torch.arange(len(response.ids) or 1) + (response.row * length + response.start - 1)
        # The last token of the prompt predicts the first token of each response.
        places[0] = min(response.row, rows - 1) * length + max(response.prompt_length - 1, 0)
        index.append(places)
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


def _rotary_positions(
    prompts: Sequence[Tensor], responses: Iterable[_PlacedResponse], rows: int, length: int
) -> Tensor:
    """Returns the positions of all rows, ``[A, R, L]`` int64; a response continues after its prompt's maximum."""
    positions = torch.zeros(prompts[0].shape[0], rows, length, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        positions[:, row, : prompt.shape[1]] = prompt
    for response in responses:
        first = int(prompts[response.row].max()) + 1 if response.prompt_length else 0
        positions[:, response.row, response.start : response.end] = torch.arange(first, first + len(response.ids))
    return positions


def _token_inputs(owners: Sequence[Sample], rows: int, length: int) -> dict[str, Tensor]:
    """Returns the per-token inputs, ``[R, L]`` each: 0 for responses, padding, and prompts without these inputs."""
    inputs: dict[str, Tensor] = {}
    for row, owner in enumerate(owners):
        for name, values in owner.token_inputs.items():
            if name not in inputs:
                inputs[name] = values.new_zeros(rows, length)
            inputs[name][row, : len(values)] = values
    return inputs


def _image_inputs(owners: Sequence[Sample]) -> dict[str, Tensor]:
    """Concatenates the image inputs of all prompts that have images."""
    with_images = [owner for owner in owners if owner.image_inputs]
    if not with_images:
        return {}
    names = list(with_images[0].image_inputs)
    for owner in with_images:
        if set(owner.image_inputs) != set(names):
            raise ValueError(
                f"image_inputs must have the same names in all samples of a batch, got {sorted(names)} in "
                f"{with_images[0].name} and {sorted(owner.image_inputs)} in {owner.name}"
            )
    return {name: _padded_cat(name, [owner.image_inputs[name] for owner in with_images]) for name in names}


def _padded_cat(name: str, tensors: Sequence[Tensor]) -> Tensor:
    """Concatenates tensors along the first axis after padding the other axes with zeros to their largest size."""
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
