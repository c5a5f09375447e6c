"""Tests how pairs become a batch, and the errors for samples that cannot be batched.

A row of a batch holds one response, or several responses with their shared prompts.
"""

from __future__ import annotations

import dataclasses
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from families import PAD, build, sample, samples_of
from single_forwards import (
    assert_same,
    batch_of,
    gradients,
    loss_of,
)

from mpo_ext.train.batch import collate
from mpo_ext.train.encode import Sample
from mpo_ext.train.masks import prompt_positions


def test_the_rows_of_both_layouts() -> None:
    one = sample("llama", 1, prompt=1, text=3, chosen=2, rejected=1)
    two = sample("llama", 2, prompt=2, text=2, chosen=1, rejected=3)
    three = sample("llama", 3, prompt=1, text=3, chosen=1, rejected=1)
    batch = collate([one, two, three], "shared", pad_id=PAD)
    assert batch.segments.tolist() == [[0, 0, 0, 1, 1, 2, 3, 4], [0, 0, 1, 2, 2, 2, -1, -1]]
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 4, 3, 3, 3], [0, 1, 2, 2, 3, 4, 0, 0]]
    assert batch.inputs["input_ids"][0].tolist() == torch.cat(
        [one.prompt_ids, one.chosen_ids, one.rejected_ids, three.chosen_ids, three.rejected_ids]
    ).tolist()  # fmt: skip
    assert batch.inputs["input_ids"][1, 6:].tolist() == [PAD, PAD]
    assert batch.index.tolist() == [2, 3, 9, 2, 2, 9, 11, 12, 2]
    assert batch.cu_seqlens.tolist() == [0, 2, 3, 4, 5, 8, 9]
    labels = [one.chosen_ids, two.chosen_ids, three.chosen_ids, one.rejected_ids, two.rejected_ids, three.rejected_ids]
    assert torch.equal(batch.labels, torch.cat(labels))
    assert batch.names == ("file:1", "file:2", "file:3")
    assert batch.keys == ("key1", "key2", "key3")
    assert batch.digests == ("digest1", "digest2", "digest3")
    assert (batch.pairs, batch.rows, batch.positions, batch.tokens, batch.projected_rows) == (3, 2, 16, 14, 9)

    batch = collate([one, two, three], "packed", pad_id=PAD)
    assert batch.segments.tolist() == [[0, 0, 0, 1, 1, 2, 3, 4, 0, 0, 1, 2, 2, 2]]
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 4, 3, 3, 3, 0, 1, 2, 2, 3, 4]]
    assert batch.index.tolist() == [2, 3, 9, 2, 2, 9, 11, 12, 2]
    assert batch.segment_lengths == (((3, 2, 1, 1, 1), (2, 1, 3)),)
    assert torch.equal(batch.labels, torch.cat(labels))
    assert (batch.pairs, batch.rows, batch.positions, batch.tokens, batch.projected_rows) == (3, 1, 14, 14, 9)
    shared = collate([one, two, three], "shared", pad_id=PAD)
    assert torch.equal(batch.inputs["input_ids"][0], shared.inputs["input_ids"][shared.segments >= 0])

    batch = collate([one, two], "separate", pad_id=PAD)
    assert batch.segments.tolist() == [[0, 0, 0, 1, 1], [0, 0, 1, -1, -1], [0, 0, 0, 1, -1], [0, 0, 1, 1, 1]]
    assert set(batch.inputs) == {"input_ids"}
    assert batch.index.tolist() == [2, 3, 6, 12, 16, 17, 18]
    assert torch.equal(
        batch.labels, torch.cat([one.chosen_ids, two.chosen_ids, one.rejected_ids, two.rejected_ids])
    )  # fmt: skip


def test_a_packed_row_has_the_inputs_of_its_prompts_at_their_places() -> None:
    one, two = sample("gemma3_vlm", 1, images=2), sample("gemma3_vlm", 2, text=4, images=1)
    blank = dataclasses.replace(two, prompt_key="blank", chosen_ids=two.chosen_ids[:0])
    batch = collate([one, two], "packed", pad_id=PAD, blank=blank)  # not needed: there are images
    types = [one.token_inputs["token_type_ids"], torch.zeros(7), two.token_inputs["token_type_ids"], torch.zeros(7)]
    assert batch.inputs["token_type_ids"].tolist() == [torch.cat(types).tolist()]
    assert [len(blocks) for blocks in batch.image_blocks[0]] == [2, 1]
    assert torch.equal(batch.inputs["pixel_values"][:2], one.image_inputs["pixel_values"])
    text = sample("gemma3_vlm", 3)
    batch = collate([text, text], "packed", pad_id=PAD, blank=blank)
    assert batch.segment_lengths == (((5, 4, 3, 4, 3), (len(two.prompt_ids),)),)
    assert batch.positions == 5 + 4 + 3 + 4 + 3 + len(two.prompt_ids)
    assert [len(blocks) for blocks in batch.image_blocks[0]] == [0, 1]


def test_a_packed_row_has_rotary_positions_of_several_axes() -> None:
    model = build("qwen2_5_vl")
    samples = samples_of("qwen2_5_vl")
    shared, packed = (
        collate(samples, layout, pad_id=PAD, positions=prompt_positions(model)) for layout in ("shared", "packed")
    )
    assert packed.inputs["position_ids"].shape == (3, 1, shared.tokens)
    assert torch.equal(packed.inputs["position_ids"][:, 0], shared.inputs["position_ids"][:, shared.segments >= 0])


def test_a_packed_row_may_hold_empty_prompts_and_empty_responses() -> None:
    empty = sample("llama", 1, text=0, chosen=0, rejected=0)
    only_prompt = sample("llama", 2, text=2, chosen=0, rejected=0)
    batch = collate([empty, only_prompt, sample("llama", 3, text=3, chosen=2, rejected=0)], "packed", pad_id=PAD)
    assert batch.segments.tolist() == [[0, 0, 0, 0, 0, 1, 1]]
    assert batch.segment_lengths == (((), (2,), (3, 2)),)
    assert batch.index.tolist() == [0, 1, 4, 5, 0, 1, 4]
    assert collate([empty], "packed", pad_id=PAD).segments.tolist() == [[-1]]


def test_collation_can_go_to_a_worker_and_its_batch_come_back() -> None:
    model = build("qwen2_vl")
    samples = samples_of("qwen2_vl")
    work = partial(collate, layout="shared", pad_id=PAD, positions=prompt_positions(model))
    pickled = pickle.dumps(work)
    assert len(pickled) < 20_000  # without weights
    batch = pickle.loads(pickle.dumps(pickle.loads(pickled)(samples)))
    assert_same(
        gradients(model, loss_of(model, batch)),
        gradients(model, loss_of(model, batch_of(model, samples, "shared"))),
        0,
    )


def test_to_moves_all_but_the_labels() -> None:
    batch = collate([sample("internvl", 1, images=1)], "shared", pad_id=PAD)
    moved = batch.to("meta")
    tensors = [moved.segments, moved.index, moved.cu_seqlens, *moved.inputs.values()]
    assert all(tensor.is_meta for tensor in tensors)
    assert moved.labels is batch.labels
    assert dataclasses.replace(moved, inputs={}).names == batch.names


def test_image_inputs_of_unequal_sizes_are_padded_with_zeros() -> None:
    samples = [sample("smolvlm", 1, images=2), sample("smolvlm", 2), sample("smolvlm", 3, images=3)]
    batch = collate(samples, "shared", pad_id=PAD)
    assert batch.inputs["pixel_values"].shape == (2, 3, 1, 8, 8)
    assert torch.equal(batch.inputs["pixel_values"][0, :2], samples[0].image_inputs["pixel_values"][0])
    assert not batch.inputs["pixel_values"][0, 2].any()


def changed(one: Sample, **values: Any) -> Sample:
    return dataclasses.replace(one, **values)


FIRST = sample("internvl", 1, images=1)


@pytest.mark.parametrize(
    ("samples", "kind", "error", "message"),
    [
        ([], "shared", ValueError, "samples must hold at least one sample, got none"),
        ([FIRST], "dense", ValueError, "layout must be one of packed, shared, masked, separate, got 'dense'"),
        (
            [changed(FIRST, chosen_ids=FIRST.chosen_ids.int())],
            "shared",
            TypeError,
            "chosen_ids must be int64, got torch.int32 in file:1",
        ),
        (
            [changed(FIRST, prompt_ids=FIRST.prompt_ids.unsqueeze(0))],
            "shared",
            ValueError,
            r"prompt_ids must have one axis, got shape \(1, 6\) in file:1",
        ),
        (
            [changed(FIRST, prompt_ids=FIRST.prompt_ids[:0])],
            "separate",
            ValueError,
            "prompt_ids must hold a token to predict the response from, got none in file:1",
        ),
        (
            [changed(FIRST, token_inputs={"types": torch.zeros(2)})],
            "separate",
            ValueError,
            r"types must have the shape of prompt_ids, \(6,\), got \(2,\) in file:1",
        ),
        (
            [FIRST, changed(FIRST, prompt_ids=FIRST.prompt_ids[1:], name="other")],
            "shared",
            ValueError,
            "one prompt_key must have one prompt, got two for 'prompt1': in file:1 and in other",
        ),
        (
            [FIRST, changed(FIRST, image_inputs={"pixel_values": torch.zeros(2, 1, 8, 8)}, name="other")],
            "shared",
            ValueError,
            "one prompt_key must have one prompt, got two for 'prompt1': in file:1 and in other",
        ),
        (
            [FIRST, changed(FIRST, image_inputs={"pixels": torch.zeros(1)}, name="other")],
            "separate",
            ValueError,
            r"image_inputs must have the same names.*\['pixel_values'\] in file:1 and \['pixels'\] in other",
        ),
        (
            [FIRST, changed(FIRST, image_inputs={"pixel_values": torch.zeros(1, 8)})],
            "separate",
            ValueError,
            r"pixel_values must have the same axes.*got \(1, 1, 8, 8\) torch.float32, \(1, 8\)",
        ),
    ],
)
def test_bad_samples_are_refused(samples: list[Sample], kind: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        collate(samples, kind, pad_id=PAD)
