"""Tests training on pairs with videos.

Checks the model inputs. Rows with a shared prompt and separate rows must give the same training results.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import digits_run
import numpy as np
import pytest
import torch

pytest.importorskip("av", reason="needs the extra video")
import video_models
from PIL import Image
from video_files import write_frames, write_video

from mpo_ext.data.records import Pair
from mpo_ext.train.batch import collate
from mpo_ext.train.encode import BadPairError, Encoder, MissingImageError, Sample
from mpo_ext.train.loop import Trainer
from mpo_ext.train.masks import prompt_positions
from mpo_ext.train.proof import prove
from mpo_ext.videos import Video

FAMILIES = list(video_models.BUILDERS)


def built(family: str) -> tuple[Any, Any]:
    torch.manual_seed(0)
    return video_models.BUILDERS[family]()


def make_encoder(model: Any, processor: Any, **options: Any) -> Encoder:
    return Encoder(processor, image_token_id=model.config.image_token_id, **options)


def write_clips(folder: Path, count: int) -> Path:
    """Writes ``count`` pairs. In groups of five pairs, four pairs have a small clip, and the last has only text.

    The clips have different lengths. One of the four pairs with a clip also has an image.
    """
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(count):
        line: dict[str, Any] = {"question": f"What happens in clip {number}?", "images": []}
        line |= {"chosen": f"It moves {number}. " * int(rng.integers(1, 3)), "rejected": f"Nothing {number * 3}."}
        if number % 5 != 4:
            colours = rng.integers(0, 256, (3 + number % 4, 3)).tolist()
            write_video(folder / f"{number}.mp4", colours=colours, rate=2, size=(56, 28 * (1 + number % 2)))
            line["videos"] = [f"{number}.mp4"]
        if number % 5 == 1:
            line["question"] = f"<video>Compare with <image>\n{line['question']}"
            Image.fromarray(rng.integers(0, 255, (28, 56, 3), dtype=np.uint8)).save(folder / f"{number}.png")
            line["images"] = [f"{number}.png"]
        lines.append(json.dumps(line) + "\n")
    path = folder / "pairs.jsonl"
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clips(tmp_path_factory.mktemp("clips"), 20)


Run = tuple[Any, list[dict[str, float]], str]  # model, lines of the log, layout of the rows


def trained_from(model: Any, processor: Any, path: Path, out: Path, **options: Any) -> Run:
    """Trains one epoch on a file of pairs. Returns the model, the log lines and the row layout."""
    log: list[dict[str, float]] = []
    recipe = digits_run.recipe(out, path, optim__epochs=1, optim__batch_size=4, optim__micro_batch_size=2, **options)
    trainer = Trainer(
        recipe, model=model, processor=processor, save=False, on_step=lambda _, line: log.append(dict(line))
    )
    assert trainer.run() == 0
    return model, log, trainer.data.collator.layout


def trained(path: Path, out: Path, family: str, **options: Any) -> Run:
    return trained_from(*built(family), path, out, **options)


@pytest.mark.parametrize("family", ["Qwen2.5-VL", "Qwen3-VL"])
def test_an_epoch_equals_separate_rows(family: str, clips: Path, tmp_path: Path) -> None:
    """Trains on 20 pairs, most with a clip, once with shared prefixes and once with separate rows.

    Losses, rewards and final weights of both runs agree to 1e-5.
    """
    eps = {"optim__eps": 1e-4}  # with a smaller one, AdamW would turn rounding errors into steps
    shared, log, layout = trained(clips, tmp_path / "shared", family, **eps)
    separate, expected, other_layout = trained(clips, tmp_path / "separate", family, loss__shared_prefix=False, **eps)
    assert layout in ("packed", "shared")
    assert other_layout == "separate"
    start, _ = built(family)
    assert len(log) == len(expected) == 5
    for line, other in zip(log, expected, strict=True):
        for name in ("loss", "dpo_loss", "bco_loss", "ntp_loss", "chosen_reward", "rejected_reward"):
            assert line[name] == pytest.approx(other[name], abs=1e-5), name
    moved = 0.0
    pairs = zip(shared.named_parameters(), separate.parameters(), start.parameters(), strict=True)
    for (name, weight), other, first in pairs:
        assert (weight - other).abs().max() < 1e-5, name
        if "visual" in name:
            moved = max(moved, float((weight - first).detach().abs().max()))
    assert moved > 1e-3  # the vision tower learns from the videos


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_those_of_the_processor(family: str, clips: Path) -> None:
    """Checks that the encoder's token ids equal those of ``apply_chat_template`` for the same video frames."""
    model, processor = built(family)
    lines = [json.loads(line) for line in clips.read_text().splitlines()[:3]]
    pairs = [Pair.from_dict(line).map_paths(lambda path: str(clips.parent / path)) for line in lines]
    proof = prove(make_encoder(model, processor), [(pair, f"f:{k}") for k, pair in enumerate(pairs)])
    assert len(proof.pairs) == 3
    assert not proof.problems
    assert not [notice for notice in proof.notices if "compared" in notice]
    assert ("Frame1: " if family == "InternVL3.5" else "<video> x ") in proof.pairs[0].prompt


def encode(encoder: Encoder, pair: Pair) -> Sample:
    sample = encoder.encode(pair, "f:1")
    assert isinstance(sample, Sample), sample
    return sample


@pytest.mark.parametrize("family", FAMILIES)
def test_the_frames_reach_the_model(family: str, tmp_path: Path) -> None:
    """A video file and the list of its frames give the same prompt. Other frames give other pixels."""
    model, processor = built(family)
    encoder = make_encoder(model, processor)
    paths = write_frames(tmp_path / "frames", 4)
    write_video(tmp_path / "a.mkv", 4, rate=2, codec="ffv1")
    pair = Pair("<video>\nWhat?", "It moves.", "No.", videos=(Video(str(tmp_path / "a.mkv")),))
    sample = encode(encoder, pair)
    listed = encode(encoder, dataclasses.replace(pair, videos=(Video(frames=tuple(paths)),)))
    assert torch.equal(sample.prompt_ids, listed.prompt_ids)
    for name, values in sample.image_inputs.items():
        assert torch.allclose(values.double(), listed.image_inputs[name].double(), atol=0.05), name
    first = encode(encoder, dataclasses.replace(pair, videos=(Video(frames=tuple(paths[:2])),)))
    assert len(first.prompt_ids) < len(sample.prompt_ids)
    assert len({each.prompt_key for each in (sample, listed, first)}) == 3
    unplaced = encode(encoder, dataclasses.replace(pair, question="What?"))
    assert torch.equal(unplaced.prompt_ids, sample.prompt_ids)
    text = encoder.chat.decode(sample.prompt_ids.tolist())
    if family == "InternVL3.5":
        assert sample.image_inputs["pixel_values"].shape[0] >= 4
        assert [f"Frame{number}: <img>" in text for number in range(1, 6)] == [True] * 4 + [False]
    else:
        assert sample.image_inputs["video_grid_thw"].tolist() == [[2, 4, 4]]  # 64 x 48 becomes 56 x 56
        assert int((sample.prompt_ids == model.config.video_token_id).sum()) == 8
    if family == "Qwen2.5-VL":
        assert sample.image_inputs["second_per_grid_ts"].tolist() == [1.0]  # 2 frames per step at 2 frames per second
        faster = encode(encoder, dataclasses.replace(pair, videos=(Video(frames=tuple(paths), fps=4.0),)))
        assert faster.image_inputs["second_per_grid_ts"].tolist() == [0.5]
    if family == "Qwen3-VL":
        assert "<0.2 seconds>" in text
        assert "<1.2 seconds>" in text


def test_pixels_are_those_of_the_frames(tmp_path: Path) -> None:
    """Compares the video patches of a pair with patches computed by hand from the frames."""
    _, processor = built("Qwen2.5-VL")
    paths = []
    for number in range(3):
        paths.append(str(tmp_path / f"{number}.png"))
        Image.fromarray(video_models.gradient_picture((28, 28), number)).save(paths[-1])
    pair = Pair("What?", "It moves.", "No.", videos=(Video(frames=tuple(paths)),))
    values = encode(Encoder(processor), pair).image_inputs["pixel_values_videos"].view(2, 2, 2, 3, 2, 14, 14)
    frames = torch.stack([torch.from_numpy(np.array(Image.open(path))) for path in [*paths, paths[-1]]]) / 255
    mean, std = (torch.tensor(getattr(processor.image_processor, f"image_{name}")) for name in ("mean", "std"))
    frames = ((frames - mean) / std).permute(0, 3, 1, 2)  # [T, C, H, W]
    expected = frames.view(2, 2, 3, 2, 14, 2, 14).permute(0, 3, 5, 2, 1, 4, 6)
    assert torch.allclose(values, expected, atol=1e-5)


def test_positions_follow_the_rate(tmp_path: Path) -> None:
    """The temporal positions of Qwen2.5-VL count seconds, not frames."""
    model, processor = built("Qwen2.5-VL")
    paths = tuple(write_frames(tmp_path, 8))
    encoder, positions = make_encoder(model, processor), prompt_positions(model)
    assert positions is not None
    ends = []
    for fps in (1.0, 2.0):
        sample = encode(encoder, Pair("q", "c", "r", videos=(Video(frames=paths, fps=fps),)))
        times = positions(sample)[0][sample.prompt_ids == model.config.video_token_id]
        ends.append(int(times.max() - times.min()))
    assert ends == [12, 6]  # 3 steps of 2 frames, at 2 positions per second


@pytest.mark.parametrize("layout", ["shared", "masked", "separate", "packed"])
def test_batches_of_images_videos_and_texts(layout: Any, clips: Path) -> None:
    model, processor = built("Qwen2.5-VL")
    encoder = make_encoder(model, processor)
    lines = [json.loads(line) for line in clips.read_text().splitlines()[:5]]
    pairs = [Pair.from_dict(line).map_paths(lambda path: str(clips.parent / path)) for line in lines]
    image = Pair("<image>q", "c", "r", images=(str(clips.parent / "1.png"),))
    samples = [encode(encoder, pair) for pair in [*pairs, image]]
    batch = collate(samples, layout, pad_id=0, positions=prompt_positions(model))
    assert len(batch.inputs["video_grid_thw"]) == len(batch.inputs["second_per_grid_ts"]) == 4
    assert len(batch.inputs["image_grid_thw"]) == 2
    kinds = [sample.image_inputs.get("video_grid_thw") for sample in samples]
    expected = torch.cat([grid for grid in kinds if grid is not None])
    assert torch.equal(batch.inputs["video_grid_thw"], expected)


def test_bad_videos_are_named(tmp_path: Path) -> None:
    model, processor = built("Qwen2.5-VL")
    encoder = make_encoder(model, processor)
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(BadPairError, match=r"^f:1: videos\[0\] must be a video that can be read, got .*text.mp4: "):
        encoder.encode(Pair("q", "c", "r", videos=(Video(str(tmp_path / "text.mp4")),)), "f:1")
    with pytest.raises(MissingImageError, match=r"videos\[0\] must be a video"):
        encoder.encode(Pair("q", "c", "r", videos=(Video(str(tmp_path / "none.mp4")),)), "f:1")
    frames = Video(frames=tuple(write_frames(tmp_path, 2)))
    with pytest.raises(BadPairError, match="question must have one <video> for each of the 1 videos, got 2"):
        encoder.encode(Pair("<video><video>", "c", "r", videos=(frames,)), "f:1")
    with pytest.raises(BadPairError, match="videos must be none for a text model, got 1"):
        Encoder(processor.tokenizer).encode(Pair("q", "c", "r", videos=(frames,)), "f:1")
    with pytest.raises(BadPairError, match="0 image tokens for its 0 images"):
        encoder.encode(Pair("q <|video_pad|>", "c", "r"), "f:1")
    with pytest.raises(BadPairError, match="the prompt with its 1 videos must be valid for the processor"):
        encoder.encode(Pair("<video> <|video_pad|>", "c", "r", videos=(frames,)), "f:1")
