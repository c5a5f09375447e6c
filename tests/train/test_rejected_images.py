"""Tests pairs with separate images for the rejected response: each response has its own prompt in a batch."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import accelerate
import digits_run
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mpo_ext.data.records import Pair
from mpo_ext.train.batch import collate
from mpo_ext.train.dataset import Collator, RunData
from mpo_ext.train.encode import BadPairError, Encoder, MissingImageError, Sample, SkippedPair
from mpo_ext.train.loop import Trainer
from mpo_ext.train.masks import prompt_positions
from mpo_ext.train.shared_prefix import label_logp_and_precision


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a file of pairs about digit grids. In two of three pairs, the rejected response has another image."""
    path = digits_run.write_pairs(tmp_path_factory.mktemp("pairs"), 9)
    rng = np.random.default_rng(1)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for number, line in enumerate(lines):
        if number % 3:
            size = Image.open(path.parent / line["images"][0]).size
            name = f"noise-{number}.png"
            Image.fromarray(rng.integers(0, 255, (size[1], size[0]), dtype=np.uint8)).save(path.parent / name)
            line["rejected_images"] = [name]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def read(path: Path) -> list[Pair]:
    lines = map(json.loads, path.read_text().splitlines())
    return [Pair.from_dict(line).map_paths(lambda name: str(path.parent / name)) for line in lines]


def encoded(encoder: Encoder, pair: Pair) -> Sample:
    sample = encoder.encode(pair, "f:1")
    assert isinstance(sample, Sample), sample
    return sample


def logp(model: Any, samples: list[Sample], layout: Any) -> Tensor:
    """Returns the summed log-probs of all responses, chosen before rejected, ``[2B]``."""
    batch = collate(samples, layout, pad_id=0, positions=prompt_positions(model))
    with torch.no_grad():
        values = label_logp_and_precision(model, batch)[0]
    ends = batch.cu_seqlens.tolist()
    return torch.stack([values[start:end].sum() for start, end in itertools.pairwise(ends)])


def test_each_side_sees_its_images(pairs: Path) -> None:
    """Compares the log-probs of each pair with the log-probs of two ordinary pairs.

    In the first ordinary pair, both responses have the images of the chosen response. In the second ordinary pair,
    both have the images of the rejected response.
    """
    model, processor = digits_run.tiny()
    model.eval()
    encoder = Encoder(processor)
    data = read(pairs)
    samples = [encoded(encoder, pair) for pair in data]
    sides = []
    for images in ("images", "rejected_images"):
        alone = [dataclasses.replace(p, images=getattr(p, images) or p.images, rejected_images=()) for p in data]
        sides.append(logp(model, [encoded(encoder, pair) for pair in alone], "separate"))
    count = len(data)
    expected = torch.cat([sides[0][:count], sides[1][count:]])
    assert (sides[0] - sides[1])[count:].abs().max() > 1e-3
    for layout in ("shared", "masked", "separate"):
        assert torch.allclose(logp(model, samples, layout), expected, atol=1e-4), layout
    batch = collate(samples, "shared", pad_id=0)
    assert batch.rows == count + 6  # six pairs have two prompts
    assert collate(samples, "separate", pad_id=0).rows == 2 * count
    assert collate(samples, "shared", pad_id=0, with_rejected=False).rows == count


def test_an_epoch_equals_separate_rows(pairs: Path, tmp_path: Path) -> None:
    results = []
    for shared in (True, False):
        model, processor = digits_run.tiny()
        log: list[dict[str, float]] = []
        options = {"optim__epochs": 1, "optim__batch_size": 4, "optim__eps": 1e-4, "loss__shared_prefix": shared}
        options |= {} if shared else {"optim__micro_batch_size": 1, "optim__micro_batch_tokens": 2048}
        recipe = digits_run.recipe(tmp_path / str(shared), pairs, **options)
        trainer = Trainer(
            recipe,
            model=model,
            processor=processor,
            save=False,
            on_step=lambda _, line, log=log: log.append(dict(line)),
        )
        assert trainer.run() == 0
        results.append((model, log, trainer.data.collator.layout))
    (first, log, layout), (second, expected, other) = results
    assert (layout != "separate", other) == (True, "separate")
    assert len(log) == 3
    for line, wanted in zip(log, expected, strict=True):
        for name in ("loss", "chosen_reward", "rejected_reward"):
            assert line[name] == pytest.approx(wanted[name], abs=1e-5), name
    for (name, weight), value in zip(first.named_parameters(), second.parameters(), strict=True):
        assert (weight - value).abs().max() < 1e-5, name


@pytest.mark.parametrize("layout", ["packed", "shared", "separate"])
def test_a_limit_of_tokens_counts_both_prompts(layout: Any, pairs: Path, tmp_path: Path) -> None:
    encoder = Encoder(digits_run.tiny()[1])
    longest = max(collate([encoded(encoder, pair)], layout, pad_id=0).positions for pair in read(pairs))
    recipe = digits_run.recipe(
        tmp_path, pairs, optim__batch_size=9, optim__micro_batch_size=1, optim__micro_batch_tokens=2 * longest
    )
    data = RunData(recipe, accelerate.Accelerator(cpu=True), encoder, Collator(layout, 0, True, None))
    (step,) = data.load_steps(data.total_steps - 1)
    assert sum(count.pairs for count in step.counts) == 9
    assert len(step.batches) < 9
    assert max(batch.positions for batch in step.batches) <= 2 * longest


def test_digests_and_errors(pairs: Path) -> None:
    encoder = Encoder(digits_run.tiny()[1])
    pair = read(pairs)[1]
    sample, plain = encoded(encoder, pair), encoded(encoder, dataclasses.replace(pair, rejected_images=()))
    assert sample.digest != plain.digest
    assert sample.prompt_key == plain.prompt_key
    assert plain.rejected_prompt is None
    assert sample.rejected_prompt is not None
    assert sample.rejected_prompt.prompt_key != sample.prompt_key
    equal = dataclasses.replace(pair, rejected=pair.chosen)
    assert torch.equal(encoded(encoder, equal).chosen_ids, encoded(encoder, equal).rejected_ids)
    same_images = dataclasses.replace(equal, rejected_images=pair.images)
    assert isinstance(encoder.encode(same_images, "f:1"), SkippedPair)
    assert encoded(encoder, dataclasses.replace(pair, rejected_images=pair.images)).rejected_prompt is None
    with pytest.raises(MissingImageError, match=r"rejected_images\[0\] must be an image"):
        encoder.encode(dataclasses.replace(pair, rejected_images=("none.png",)), "f:1")
    with pytest.raises(ValueError, match="rejected_images must be one for each of the 1 images, got 2"):
        dataclasses.replace(pair, rejected_images=("a.png", "b.png"))
    with pytest.raises(BadPairError, match="images must be none for a text model"):
        Encoder(digits_run.tiny()[1].tokenizer).encode(pair, "f:1")
