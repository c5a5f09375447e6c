"""Tests that a resuming run detects changed data, a changed processor and changed libraries."""

import dataclasses
import datetime
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from digits_run import recipe, tiny, write_pairs
from run_recipe import Job, run, text_of
from safetensors.torch import load_file
from tokenizers import Tokenizer, normalizers

from mpo_ext.checks import LinesError
from mpo_ext.train import inputs, loop, model_card, output, reference_file

Edit = Callable[[list[dict[str, Any]]], Any]
TODAY = datetime.date(2024, 7, 26)
DATED = "{{ strftime_now('%d') }} "


class FixedDate(datetime.date):
    day_of_run = TODAY

    @classmethod
    def today(cls) -> datetime.date:
        return cls.day_of_run


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disables the model card, because drawing its curves takes longer than the run."""
    monkeypatch.setattr(model_card, "write_card", lambda *args, **values: None)


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return write_pairs(tmp_path / "data", 12, text_only=3)


def train(out: Path, data: Path, steps: int, *, processor: Any = None, model: Any = None, **settings: Any) -> None:
    AcceleratorState._reset_state(True)
    whole, own = tiny()
    model = model or whole
    values = {"optim__max_steps": steps, "optim__batch_size": 4, "optim__epochs": 3, "data__workers": 0, **settings}
    assert loop.train(recipe(out, data, **values), model=model, processor=processor or own) == 0


def edit_lines(path: Path, edit: Edit) -> None:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    edit(lines)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def refusal(out: Path, data: Path, **settings: Any) -> str:
    """Resumes a run after its first step; this must be refused. Returns the error message."""
    with pytest.raises(LinesError, match="data, processor and start model must be those of") as error:
        train(out, data, 2, **settings)
    assert "output.resume_changed_data=true accepts the changes" in str(error.value)
    assert len((out / "log.jsonl").read_text().splitlines()) == 1
    return str(error.value)


# Data

EDITS: dict[str, tuple[Edit, str]] = {
    "append": (lambda lines: lines.append(lines[0]), "lines were added at its end (12 lines before, 13 now)"),
    "edit": (lambda lines: lines[4].update(rejected="7"), "the first change is line 5"),
    "edit the question": (lambda lines: lines[11].update(question="Which ?"), "the first change is line 12"),
    "remove": (lambda lines: lines.pop(3), "the first change is line 4, empty lines not counted (12 lines before, 11"),
    "reorder": (lambda lines: lines.reverse(), "its lines are in another order from line 1 on"),
    "break": (lambda lines: lines[2].pop("chosen"), "the first change is line 3"),
    "exchange the responses": (
        lambda lines: lines[1].update(chosen=lines[1]["rejected"], rejected=lines[1]["chosen"]),
        "the first change is line 2",
    ),
}


@pytest.mark.parametrize("name", EDITS)
def test_changed_lines_are_refused(tmp_path: Path, pairs: Path, name: str) -> None:
    edit, words = EDITS[name]
    train(tmp_path / "run", pairs, 1, data__skip_bad=True)
    edit_lines(pairs, edit)
    assert f"{pairs}: {words}" in refusal(tmp_path / "run", pairs, data__skip_bad=True)


@pytest.mark.parametrize("name", ["append", "break"])
def test_changed_lines_are_accepted_on_demand(tmp_path: Path, pairs: Path, name: str, capsys: Any) -> None:
    edit, words = EDITS[name]
    settings = {"data__skip_bad": True}
    train(tmp_path / "run", pairs, 1, **settings)
    edit_lines(pairs, edit)
    capsys.readouterr()
    train(tmp_path / "run", pairs, 2, output__resume_changed_data=True, **settings)
    text = capsys.readouterr().err
    assert f"since the checkpoint, accepted by output.resume_changed_data: {pairs}: {words}" in text
    assert "this epoch may visit some pairs twice and leave out others" in text
    train(tmp_path / "run", pairs, 3, **settings)  # the next checkpoint knows the new data
    assert "accepted" not in capsys.readouterr().err


def test_unchanged_data_resume_without_a_word(tmp_path: Path, pairs: Path, capsys: Any) -> None:
    train(tmp_path / "run", pairs, 1)
    pairs.write_text(pairs.read_text().replace("\n", "\r\n") + "\r\n")  # the same lines
    capsys.readouterr()
    train(tmp_path / "run", pairs, 2)
    said = [line for line in capsys.readouterr().err.splitlines() if "since the checkpoint" in line]
    assert said == ["since the checkpoint: optim.max_steps was 1, is 2"]


def test_a_moved_folder_is_no_change(tmp_path: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    train(Path("run"), Path("data/pairs.jsonl"), 1)
    (tmp_path / "elsewhere").mkdir()
    for name in ("run", "data"):
        (tmp_path / name).rename(tmp_path / "elsewhere" / name)
    monkeypatch.chdir(tmp_path / "elsewhere")
    train(Path("run"), Path("data/pairs.jsonl"), 2)


def test_two_files_that_are_swapped(tmp_path: Path, pairs: Path) -> None:
    other = write_pairs(tmp_path / "other", 5, seed=3, text_only=1)
    sources = {"data__train": [str(pairs), str(other)], "data__skip_bad": True}
    train(tmp_path / "run", pairs, 1, **sources)
    texts = pairs.read_text(), other.read_text()
    pairs.write_text(texts[1])
    other.write_text(texts[0])
    text = refusal(tmp_path / "run", pairs, **sources)
    assert f"{pairs}: it holds what {other} held" in text
    assert f"{other}: it holds what {pairs} held" in text


def test_the_subsets_of_a_meta_file(tmp_path: Path, pairs: Path) -> None:
    meta = {name: {"root": "data", "annotation": f"data/{name}.jsonl", "repeat_time": 1} for name in ("one", "two")}
    lines = [json.loads(line) for line in pairs.read_text().splitlines()]
    rows = [{**line, "image": line["images"]} for line in lines]
    for row in rows:
        del row["images"]
    for name, part in (("one", rows[:7]), ("two", rows[7:])):
        (tmp_path / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    path = tmp_path / "meta.json"
    path.write_text(json.dumps(meta))
    train(tmp_path / "run", path, 1)
    path.write_text(json.dumps(meta | {"two": {**meta["two"], "repeat_time": 2}}))
    assert f"{path}: two: repeat_time was 1.0, is 2.0" in refusal(tmp_path / "run", path)
    path.write_text(json.dumps({"one": meta["one"]}))
    assert "the subsets were one, two, are one" in refusal(tmp_path / "run", path)
    path.write_text(json.dumps({"two": meta["two"], "one": meta["one"]}))
    assert "it holds what" in refusal(tmp_path / "run", path)
    path.write_text(json.dumps(meta))
    edit_lines(tmp_path / "data" / "two.jsonl", lambda lines: lines[1].update(chosen="8"))
    assert f"{tmp_path}/data/two.jsonl: the first change is line 2" in refusal(tmp_path / "run", path)


def test_images_of_another_size_or_content(tmp_path: Path, pairs: Path) -> None:
    train(tmp_path / "run", pairs, 1)
    encoded = state_of(tmp_path / "run")["inputs"]["pairs"]
    line = next(pair["name"] for pair in encoded if pair["files"])
    lines = pairs.read_text().splitlines()
    image = tmp_path / "data" / json.loads(lines[int(line.rpartition(":")[2]) - 1])["images"][0]
    content = image.read_bytes()
    image.write_bytes(content + b"\0")
    assert f"1 of the 8 compared images have another size, as {image}: " in refusal(tmp_path / "run", pairs)
    image.write_bytes(content[:-1] + b"\0")  # the checksum of the last chunk, which no reader checks
    assert f"{line}: the content of its images has changed" in refusal(tmp_path / "run", pairs)
    image.write_bytes(content)
    train(tmp_path / "run", pairs, 2)


def test_pairs_with_equal_texts_and_other_images_have_not_changed(tmp_path: Path) -> None:
    """Tests that a run resumes if all pairs have equal texts and different images.

    The check for changed pairs must compare each pair with itself, not with another pair that has equal texts.
    """
    data = write_pairs(tmp_path / "data", 12)

    def set_equal(lines: list[dict[str, Any]]) -> None:
        for line in lines[1:]:
            line.update({name: lines[0][name] for name in ("question", "chosen", "rejected")})

    edit_lines(data, set_equal)
    train(tmp_path / "run", data, 1)
    encoded = state_of(tmp_path / "run")["inputs"]["pairs"]
    assert len({pair["content"] for pair in encoded}) == 1
    image = tmp_path / "data" / f"0-{int(encoded[3]['name'].rpartition(':')[2]) - 1}.png"
    content = image.read_bytes()
    image.write_bytes(content[:-1] + b"\0")
    assert f"{encoded[3]['name']}: the content of its images has changed" in refusal(tmp_path / "run", data)
    image.write_bytes(content)
    train(tmp_path / "run", data, 2)  # was refused: pairs were compared with another pair of the same texts


def test_a_repaired_image_is_no_change(tmp_path: Path, pairs: Path) -> None:
    image = next((tmp_path / "data").glob("*.png"))
    content = image.read_bytes()
    image.unlink()
    train(tmp_path / "run", pairs, 1, data__skip_bad=True)
    image.write_bytes(content)
    train(tmp_path / "run", pairs, 2, data__skip_bad=True)


def test_a_dataset_folder(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="needs datasets, which dev installs")
    rows = [{"prompt": "Read row 1 .", "chosen": f"{number} , 2", "rejected": "3"} for number in range(8)]
    folder = tmp_path / "dataset"
    datasets.Dataset.from_list(rows).save_to_disk(str(folder))
    train(tmp_path / "run", folder, 1)
    datasets.Dataset.from_list([*rows[:-1], {**rows[-1], "rejected": "4"}]).save_to_disk(str(tmp_path / "new"))
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    (tmp_path / "new").rename(folder)
    assert "its content has changed (" in refusal(tmp_path / "run", folder)


def test_changed_evaluation_data_are_evaluated_again(tmp_path: Path, pairs: Path, capsys: Any) -> None:
    evaluation = write_pairs(tmp_path / "eval", 4, seed=1)
    settings = {"data__eval": [str(evaluation)]}
    train(tmp_path / "run", pairs, 1, **settings)
    edit_lines(evaluation, lambda lines: lines.append(lines[0]))
    capsys.readouterr()
    train(tmp_path / "run", pairs, 1, **settings)
    text = capsys.readouterr().err
    assert f"since the checkpoint: evaluation: {evaluation}: lines were added at its end" in text
    assert "evaluation after step 1" in text
    assert "already finished" not in text
    train(tmp_path / "run", pairs, 1, **settings)
    assert "already finished" in capsys.readouterr().err
    train(tmp_path / "run", pairs, 1, data__eval=[str(pairs)])
    text = capsys.readouterr().err
    assert "since the checkpoint: data.eval was " in text
    assert "since the checkpoint: evaluation: " not in text  # the message about the setting suffices


def state_of(out: Path) -> dict[str, Any]:
    (folder,) = [path for path in (out / "checkpoints").glob("step-*")][-1:]
    return json.loads((folder / "state.json").read_text())


def rewrite_state(out: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Edits the state in each checkpoint, to imitate another version of mpo_ext."""
    for folder in (out / "checkpoints").glob("step-*"):
        state = json.loads((folder / "state.json").read_text())
        edit(state)
        (folder / "state.json").write_text(json.dumps(state))
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"]["state.json"] = (folder / "state.json").stat().st_size
        del manifest["digest"], manifest["digests"]
        (folder / "manifest.json").write_text(json.dumps(manifest))


def test_an_old_checkpoint_resumes_with_the_same_bits(tmp_path: Path, pairs: Path, capsys: Any) -> None:
    def forget(state: dict[str, Any]) -> None:
        del state["inputs"], state["recipe"]["output"]["resume_changed_data"]

    for name in ("old", "new"):
        train(tmp_path / name, pairs, 1)
        if name == "old":
            rewrite_state(tmp_path / name, forget)
        capsys.readouterr()
        train(tmp_path / name, pairs, 2)
        text = capsys.readouterr().err
        assert ("the data cannot be compared with those of" in text) == (name == "old")
        assert "resume_changed_data" not in text
    old, new = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("old", "new"))
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)


# The processor


def with_template(text: str) -> Callable[[Any], Any]:
    def change(processor: Any) -> None:
        processor.chat_template = processor.chat_template.replace("{{ '<|user|> '", text)

    return change


def swap_two_words(processor: Any) -> None:
    """Exchanges the token ids of two words. The size of the vocabulary stays the same."""
    values = json.loads(processor.tokenizer.backend_tokenizer.to_str())
    vocabulary = values["model"]["vocab"]
    vocabulary["1"], vocabulary["2"] = vocabulary["2"], vocabulary["1"]
    processor.tokenizer._tokenizer = Tokenizer.from_str(json.dumps(values))


def set_end(processor: Any) -> None:
    processor.tokenizer.eos_token = "<|user|>"


def set_size(processor: Any) -> None:
    processor.image_processor.size = {"height": 64, "width": 64}


def set_mean(processor: Any) -> None:
    processor.image_processor.image_mean = [0.5] * 3


def set_lowercase(processor: Any) -> None:
    processor.tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()


PROCESSORS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "template": (with_template("{{ 'user <|user|> '"), "chat_template was"),
    "template of other conversations": (
        with_template("{{ 'x' if tools else '' }}{{ '<|user|> '"),
        "chat_template was",
    ),
    "end token": (set_end, "special_tokens.eos_token was '<|im_end|>', is '<|user|>'"),
    "image size": (set_size, "image_processor.size.height was 32, is 64"),
    "image mean": (set_mean, "image_processor.image_mean was [0.3, 0.3, 0.3], is [0.5, 0.5, 0.5]"),
    "vocabulary": (swap_two_words, "tokenizer was"),
    "normalizer": (set_lowercase, "tokenizer was"),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_changed_processor_is_refused_by_name(tmp_path: Path, pairs: Path, name: str) -> None:
    change, words = PROCESSORS[name]
    train(tmp_path / "run", pairs, 1)
    _, processor = tiny()
    change(processor)
    text = refusal(tmp_path / "run", pairs, processor=processor)
    assert words in text
    if name in ("template", "vocabulary"):
        assert re.search(r"pairs.jsonl:\d+: the pair has other token ids than before", text)


def test_padding_does_not_change_a_processor(tmp_path: Path, pairs: Path) -> None:
    train(tmp_path / "run", pairs, 1)
    _, processor = tiny()
    processor.tokenizer(["1 2 3", "1"], padding=True, truncation=True, max_length=2)
    train(tmp_path / "run", pairs, 2, processor=processor)


def test_other_versions_are_refused_only_with_another_encoding(
    tmp_path: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    train(tmp_path / "run", pairs, 1)
    versions = {**inputs.library_versions(), "transformers": "99.0"}
    monkeypatch.setattr(inputs, "library_versions", lambda: versions)

    def other_form(chat: Any, end_ids: Any) -> dict[str, Any]:
        return {**parts(chat, end_ids), "tokenizer": "written in another form"}

    parts = inputs.processor_parts
    monkeypatch.setattr(inputs, "processor_parts", other_form)
    capsys.readouterr()
    train(tmp_path / "run", pairs, 2)
    text = capsys.readouterr().err
    assert re.search(
        r"transformers was '[\d.]+', is '99.0' \(the first 8 compared pairs are encoded as before\)", text
    )
    assert re.search(r"tokenizer was '\w+', is 'written in another form' \(the first 8", text)
    versions["tokenizers"] = "98.0"

    original = inputs._hash_tokens
    monkeypatch.setattr(inputs, "_hash_tokens", lambda sample: original(sample)[::-1])
    with pytest.raises(LinesError, match=r"is '98.0'(.|\n)*the pair has other token ids than before"):
        train(tmp_path / "run", pairs, 3)


def test_pixels_that_differ_by_rounding_are_said(
    tmp_path: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    train(tmp_path / "run", pairs, 1)
    encoded_pairs = inputs._encoded_pairs
    monkeypatch.setattr(
        inputs, "_encoded_pairs", lambda data: [{**pair, "digest": "other"} for pair in encoded_pairs(data)]
    )
    train(tmp_path / "run", pairs, 2)
    assert "the pixels differ by rounding" in capsys.readouterr().err
    versions = {**inputs.library_versions(), "pillow": "99.0"}
    monkeypatch.setattr(inputs, "library_versions", lambda: versions)
    monkeypatch.setattr(
        inputs, "_encoded_pairs", lambda data: [{**pair, "digest": "third"} for pair in encoded_pairs(data)]
    )
    with pytest.raises(LinesError, match=r"pillow was '.*', is '99.0'(.|\n)*the pair has other pixels than before"):
        train(tmp_path / "run", pairs, 3)


# The start model


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"model__lora": {"rank": 2}},
        {"model__freeze": ["vision_tower"], "loss__dpo_weight": 0.0, "loss__bco_weight": 0.0},
    ],
    ids=["reference", "adapters", "frozen"],
)
def test_another_start_model_is_refused(tmp_path: Path, pairs: Path, settings: dict[str, Any]) -> None:
    train(tmp_path / "run", pairs, 1, **settings)
    text = refusal(tmp_path / "run", pairs, model=tiny(seed=1)[0], **settings)
    assert "model.path: the model has other weights than at the beginning of the run" in text
    train(tmp_path / "run", pairs, 2, **settings)


@pytest.mark.parametrize(
    "settings",
    [{"loss__dpo_weight": 0.0, "loss__bco_weight": 0.0}, {"reference__sync_every": 1}],
    ids=["no reference", "moving reference"],
)
def test_a_start_model_that_a_checkpoint_holds_may_change(
    tmp_path: Path, pairs: Path, settings: dict[str, Any]
) -> None:
    train(tmp_path / "run", pairs, 1, **settings)
    train(tmp_path / "run", pairs, 2, model=tiny(seed=1)[0], **settings)


# Dates


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> type[FixedDate]:
    """Replaces the trainer's date by a fixed date, which tests can change."""
    module = dataclasses.make_dataclass("FakeDatetime", [])
    module.date = FixedDate
    monkeypatch.setattr(output, "datetime", module)
    monkeypatch.setattr(FixedDate, "day_of_run", TODAY)
    return FixedDate


def dated_processor() -> Any:
    _, processor = tiny()
    processor.chat_template = DATED + processor.chat_template
    return processor


def test_a_resumed_run_keeps_its_date(tmp_path: Path, pairs: Path, clock: type[FixedDate]) -> None:
    train(tmp_path / "run", pairs, 1, processor=dated_processor())
    before = state_of(tmp_path / "run")["inputs"]
    assert before["date"] == "2024-07-26"
    assert before["processor"]["date"] == "2024-07-26"
    clock.day_of_run = TODAY + datetime.timedelta(days=1)
    train(tmp_path / "run", pairs, 2, processor=dated_processor())
    assert state_of(tmp_path / "run")["inputs"] == before
    train(tmp_path / "tomorrow", pairs, 1, processor=dated_processor())
    assert state_of(tmp_path / "tomorrow")["inputs"]["date"] == "2024-07-27"


def test_stored_log_probs_keep_their_date(tmp_path: Path, pairs: Path, clock: type[FixedDate]) -> None:
    settings = {"reference__kind": "precomputed", "reference__file": str(tmp_path / "reference.jsonl")}
    train(tmp_path / "run", pairs, 1, processor=dated_processor(), **settings)
    clock.day_of_run = TODAY + datetime.timedelta(days=1)
    train(tmp_path / "run", pairs, 2, processor=dated_processor(), **settings)
    train(tmp_path / "next", pairs, 1, processor=dated_processor(), **settings)
    assert state_of(tmp_path / "next")["inputs"]["date"] == "2024-07-26"


# Stored log-probs


# The tiny model takes images of one size only.
@pytest.mark.parametrize("name", sorted(PROCESSORS.keys() - {"image size"}))
def test_stored_log_probs_of_another_processor_are_refused_by_name(tmp_path: Path, pairs: Path, name: str) -> None:
    change, words = PROCESSORS[name]
    settings = {"reference__kind": "precomputed", "reference__file": str(tmp_path / "reference.jsonl")}
    train(tmp_path / "one", pairs, 1, **settings)
    _, processor = tiny()
    change(processor)
    with pytest.raises(LinesError, match=r"reference.file must have been made for this run") as error:
        train(tmp_path / "two", pairs, 1, processor=processor, **settings)
    assert words in str(error.value)
    assert "delete it to compute it again, or name another file" in str(error.value)


def test_old_files_of_log_probs_still_work(tmp_path: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "reference.jsonl"
    settings = {"reference__kind": "precomputed", "reference__file": str(path)}
    train(tmp_path / "one", pairs, 1, **settings)
    header, *records = path.read_text().splitlines()
    values = json.loads(header)
    for name in ("processor", "versions", "date"):
        del values["settings"][name]
    path.write_text("\n".join([json.dumps(values), *records]) + "\n")
    train(tmp_path / "two", pairs, 1, **settings)
    _, processor = tiny()
    with_template("{{ 'user <|user|> '")(processor)
    with pytest.raises(ValueError, match="the images, the processor, or the date in the prompts have changed"):
        train(tmp_path / "three", pairs, 1, processor=processor, **settings)


def test_log_probs_of_other_versions_are_used_as_far_as_they_fit(
    tmp_path: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"reference__kind": "precomputed", "reference__file": str(tmp_path / "reference.jsonl")}
    train(tmp_path / "one", pairs, 1, **settings)
    monkeypatch.setattr(reference_file, "library_versions", lambda: {"transformers": "99.0"})
    train(tmp_path / "two", pairs, 1, **settings)
    _, processor = tiny()
    set_mean(processor)
    with pytest.raises(ValueError, match=r"image_mean was \[0.3, 0.3, 0.3\], is \[0.5(.|\n)*transformers was"):
        train(tmp_path / "three", pairs, 1, processor=processor, **settings)


# Several ranks


def test_all_ranks_refuse_changed_data(tmp_path: Path, pairs: Path) -> None:
    settings = {"optim__batch_size": 4, "optim__max_steps": 1, "data__train": [str(pairs)] * 3}
    job = Job(tmp_path / "run", pairs, settings, world_size=2)
    assert run(job) == [0, 0], text_of(job)
    edit_lines(pairs, lambda lines: lines.append(lines[0]))
    job = dataclasses.replace(job, settings={**settings, "optim__max_steps": 2})
    assert run(job) == [1, 1], text_of(job)
    assert text_of(job).count(f"{pairs}: lines were added at its end (12 lines before, 13 now)") >= 3
    job = dataclasses.replace(job, settings={**job.settings, "output__resume_changed_data": True})
    assert run(job) == [0, 0], text_of(job)
