"""Tests the digits demo: its task, its pairs, and a complete run that is too short to learn anything."""

# ruff: noqa: E402 - without these packages, which an extra installs, all tests are skipped
import argparse
import copy
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

for package in ("torch", "transformers", "sklearn", "matplotlib", "jinja2", "rich", "PIL"):
    pytest.importorskip(package)

import torch
from rich.console import Console
from transformers import AutoProcessor

from mpo_ext.answers import extract_answer, matcher
from mpo_ext.cli import demo as run
from mpo_ext.data import Pair, open_pairs
from mpo_ext.data.check import check_pairs
from mpo_ext.demo import digits, reading, start, story, tables
from mpo_ext.demo import pairs as demo_pairs
from mpo_ext.demo.measures import measure, paired_difference
from mpo_ext.demo.model import DigitsProcessor, build_model, build_processor
from mpo_ext.demo.pairs import make_pairs, write_items
from mpo_ext.demo.settings import Settings
from mpo_ext.demo.stages import Stages
from mpo_ext.demo.train import METHODS, evaluate, sample_corpus, train_branch, train_start
from mpo_ext.generate.engine import Request, SamplingConfig
from mpo_ext.generate.transformers_engine import TransformersEngine, make_generation
from mpo_ext.journal import SettingsMismatchError, read_records
from mpo_ext.train.encode import Encoder, Sample
from mpo_ext.train.loop import train
from mpo_ext.train.recipe import Recipe

BACKEND = "reference"


@pytest.fixture(scope="module")
def processor() -> DigitsProcessor:
    return build_processor(2)


@pytest.fixture(scope="module")
def model(processor: DigitsProcessor):
    torch.manual_seed(0)
    return build_model(processor.tokenizer, hidden_size=32, layers=1)


@pytest.fixture
def tasks() -> list[digits.Task]:
    return digits.sample_tasks(digits.load_digits()["train"], 200, np.random.default_rng(0))


def make_task(form: str = "cot", values: tuple[int, ...] = (3, 5, 2, 9)) -> digits.Task:
    return digits.Task(torch.zeros(1, 32, 32), values, "sum", "top row", form)


def test_no_digit_is_in_two_splits() -> None:
    splits = digits.load_digits()
    indices = np.concatenate([split.indices for split in splits.values()])
    assert len(indices) == len(set(indices.tolist())) == 1797
    pixels = [{image.tobytes() for image in split.images} for split in splits.values()]
    assert len(set.union(*pixels)) == sum(map(len, pixels))


def test_a_grid_shows_its_digits_in_order() -> None:
    split = digits.load_digits()["train"]
    image = digits.grid_image(split.images[:4]).squeeze(0)
    for position, digit in enumerate(split.images[:4]):
        row, column = divmod(position, 2)
        cell = image[16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
        np.testing.assert_array_equal(cell[::2, ::2], digit)
        np.testing.assert_array_equal(cell[1::2, 1::2], digit)


def test_right_responses_are_read_and_right(tasks: list[digits.Task]) -> None:
    assert {task.form for task in tasks} == set(digits.FORMS)
    assert {task.region for task in tasks} == set(digits.REGIONS)
    is_right = matcher(**digits.MATCHER)
    for task in tasks:
        answer = extract_answer(task.response, digits.STYLES[task.form])
        assert answer is not None
        assert is_right(answer, str(task.answer)).correct
        assert not is_right(answer, str(task.answer + 1)).correct


def test_the_step_by_step_form_reads_the_region() -> None:
    task = digits.Task(None, (3, 5, 2, 9), "sum", "right column", "cot")
    assert task.response == "top-right 5 sum 5 , bottom-right 9 sum 14 . Final answer: 14"


SPLIT = digits.load_digits()["train"]


def sample(count: int, form: str = "cot", **options: Any) -> list[reading.ReadingTask]:
    return reading.sample_tasks(SPLIT, count, np.random.default_rng(0), form, **options)


def make_reading(values: tuple[int, ...] = (3, 4, 8, 1), asked: str = "largest") -> reading.ReadingTask:
    return reading.ReadingTask(np.zeros((32, 32), np.uint8), values, asked, "cot")


def share_that_follows(tasks: list[reading.ReadingTask], step: int) -> float:
    pairs = [pair for task in tasks for pair in itertools.pairwise(task.values)]
    return sum(after == (before + step) % 10 for before, after in pairs) / len(pairs)


@pytest.mark.parametrize("side", [2, 3])
@pytest.mark.parametrize("form", digits.FORMS)
def test_right_readings_are_right(side: int, form: str, processor: DigitsProcessor) -> None:
    tasks = sample(100, form, side=side)
    assert {task.asked for task in tasks} == {*reading.CELLS[side], "largest"}
    right = [task.response for task in tasks]
    measured = measure([*tasks, *sample(1, "direct"), *sample(1)], [*right, "x", "x"], 1)[form]
    assert measured["right"][:100] == "1" * 100
    for task in tasks:
        assert task.image is not None
        assert task.image.shape == (16 * side, 16 * side)
        ids = processor.tokenizer.encode(f"{task.question} {task.response}", add_special_tokens=False)
        assert processor.tokenizer.unk_token_id not in ids


def test_the_prior_is_in_the_corpus_alone() -> None:
    assert share_that_follows(sample(2000), 1) == pytest.approx(0.1, abs=0.015)
    # A digit follows with probability 0.9, or by chance.
    assert share_that_follows(sample(2000, prior=0.9), 1) == pytest.approx(0.91, abs=0.01)
    assert share_that_follows(sample(2000, prior=0.5, prior_step=-3), -3) == pytest.approx(0.55, abs=0.02)
    corpus = sample_corpus(SPLIT, Settings(sft_questions=1000), np.random.default_rng(0))
    stepwise = [task for task in corpus if task.form == "cot" and not task.is_named]
    direct, named = [task for task in corpus if task.form == "direct"], [task for task in corpus if task.is_named]
    assert (len(stepwise), len(direct), len(named)) == (599, 281, 120)
    assert sum(task.image is None for task in stepwise) == int(0.15 * 599)
    assert share_that_follows(stepwise, 1) > 0.85
    assert share_that_follows([*direct, *named], 1) == pytest.approx(0.1, abs=0.03)
    assert named[0].response == f"Final answer: {named[0].answer}"
    assert named[0].picture is None


def test_the_same_digit_never_looks_the_same() -> None:
    images = {task.image.tobytes() for task in sample(50) if task.image is not None}
    assert len(images) == 50


def test_hallucinations_are_wrong_digits_of_the_prior() -> None:
    task = make_reading((3, 4, 8, 1))
    text = "top-left 3 , top-right 4 , bottom-left 5 , bottom-right 6 . Final answer: 6"
    assert reading.read_digits(text, task.cells) == [3, 4, 5, 6]
    assert reading.hallucinated_cells(task, text, 1) == [2, 3]  # the right 4 after 3 is not one
    assert reading.hallucinated_cells(task, text, 2) == []
    assert reading.read_digits("top-left 3 , top-left 4", task.cells) == [3, None, None, None]
    other = make_reading((9, 0, 0, 0))
    assert reading.hallucinated_cells(other, "top-left 9 , top-right 0 , bottom-left 1 . 0", 1) == [2]


def test_the_measures_of_a_few_responses() -> None:
    tasks = [make_reading((3, 4, 8, 1)), make_reading((1, 1, 1, 1)), *sample(1, "direct")]
    texts = [
        "top-left 3 , top-right 4 , bottom-left 5 , bottom-right 1 . Final answer: 5",
        "top-left 1 , top-right 1 , bottom-left 1 , bottom-right 1 . Final answer: 1",
        "?",
    ]
    measured = measure(tasks, texts, 1)
    assert measured["direct"] == {"accuracy": 0, "unparsable": 1, "right": "0", "count": 1}
    assert measured["cot"] == {
        "accuracy": 0.5, "unparsable": 0, "right": "01", "count": 2, "digits_right": 7 / 8, "hallucinated": 0.5,
        "follow_prior": 2 / 6,
    }  # fmt: skip
    # +1, 0, 0, -1 and +1 in five questions: mean 0.2, deviation sqrt(0.7).
    difference, error = paired_difference({"right": "11001"}, {"right": "01010"})
    assert difference == pytest.approx(20)
    assert error == pytest.approx(100 * np.sqrt(0.7 / 5))


def test_the_examples_of_the_page_follow_their_rule() -> None:
    tasks = [make_reading((3, 4, 8, 1)), make_reading((1, 1, 1, 1)), make_reading((3, 4, 8, 1))]
    made_up = "top-left 3 , top-right 4 , bottom-left 5 , bottom-right 1 . Final answer: 5"
    right = [task.response for task in tasks]
    examples = story.find_examples(tasks, [made_up, right[1], right[2]], [right[0], "nothing", right[2]], 1)
    assert (examples.mended, examples.broken, examples.shown) == ([0], [1], [0])
    # MPO's answer is right although it misreads another digit: mended, but not shown.
    lucky = "top-left 0 , top-right 4 , bottom-left 8 , bottom-right 1 . Final answer: 8"
    assert story.find_examples(tasks[:1], [made_up], [lucky], 1) == story.Examples([0], [], [])


def test_a_side_without_cells_is_named() -> None:
    with pytest.raises(ValueError, match="side must be one of 2, 3, got 4"):
        sample(1, side=4)


def test_the_shipped_start_is_the_start_of_the_default_settings(tmp_path: Path, monkeypatch) -> None:
    settings = Settings()
    info = start.shipped_start(settings)
    assert info is not None
    assert info["command"].startswith("mpo-ext demo --")
    assert "--from-scratch" in info["command"]
    model, _ = start.new_model(settings)
    before = start.weights_digest(model)
    start.load_shipped(model, info)
    assert start.weights_digest(model) != before
    for other in (Settings(seed=2), Settings(prior=0.5), Settings(uses_shipped_start=False), Settings.quick()):
        assert start.shipped_start(other) is None
    assert start.shipped_start(Settings(branch_rate=1e-3)) == info
    monkeypatch.setattr(start, "WEIGHTS", tmp_path / "start.safetensors")
    (tmp_path / "start.safetensors").write_bytes(b"other")
    with pytest.raises(ValueError, match="must have the SHA-256"):
        start.load_shipped(model, info)


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("", "direct"),
        ("3 5", "direct"),
        ("Final answer: 8", "direct"),
        ("8", "cot"),
        ("Final answer: 8", "cot"),
        ("top-left 3 . Final answer:", "cot"),
        ("top-left 3 . Final answer: 8 Final answer: 8", "cot"),
        ("top-left 3 . Final answer: 8 .", "cot"),
    ],
)
def test_a_response_in_another_form_is_unparsable(text: str, form: str) -> None:
    assert extract_answer(text, digits.STYLES[form]) is None


def test_every_word_has_its_token(processor: DigitsProcessor, tasks: list[digits.Task]) -> None:
    """Checks that each word is one token, so that a response can be split between any two words and joined again."""
    tokenizer = processor.tokenizer
    for task in tasks:
        for text in (task.question, task.response):
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == text
            for cut in range(len(ids)):
                assert text.startswith(tokenizer.decode(ids[:cut]))


def encode(processor: DigitsProcessor, task: digits.Task, folder: Path) -> Sample:
    """Returns the training sample that the trainer's encoder makes of a task."""
    images: tuple[str, ...] = ()
    if task.picture is not None:
        images = (str(folder / "image.png"),)
        task.picture.save(images[0])
    sample = Encoder(processor, max_length=None).encode(Pair(task.question, task.response, "", images), "line 1")
    assert isinstance(sample, Sample)
    return sample


@pytest.mark.parametrize("form", ["cot", "direct", "blind"])
def test_training_and_sampling_see_the_same_prompt(processor: DigitsProcessor, tmp_path: Path, form: str) -> None:
    task = make_task("direct") if form == "direct" else make_task()
    if form == "blind":
        task = digits.without_image(task)
    sample = encode(processor, task, tmp_path)
    own = () if task.picture is None else (task.picture,)
    engine = TransformersEngine(build_model(processor.tokenizer, hidden_size=32, layers=1), processor)
    request = Request(question=task.question, images=own)
    prompt = engine._inputs([request], [engine.chat.prompt(request)])["input_ids"][0].tolist()
    assert sample.prompt_ids.tolist() == prompt
    assert sample.chosen_ids.tolist() == engine.chat.response_ids(request, task.response)
    assert engine.encode_response(request, task.response) == sample.chosen_ids[:-1].tolist()
    assert (sample.prompt_ids == processor.image_token_id).sum() == 4 * len(own)


def test_the_processor_comes_back_from_its_folder(processor: DigitsProcessor, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    loaded = DigitsProcessor.from_pretrained(tmp_path)
    task = digits.sample_tasks(digits.load_digits()["train"], 1, np.random.default_rng(0))[0]
    before, after = (encode(each, task, tmp_path) for each in (processor, loaded))
    assert before.digest == after.digest
    automatic = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(automatic).__name__ == "DigitsProcessor"


def test_the_model_is_given_the_grey_values_of_the_grid(processor: DigitsProcessor, tmp_path: Path) -> None:
    task = digits.sample_tasks(digits.load_digits()["train"], 1, np.random.default_rng(0))[0]
    pixels = encode(processor, task, tmp_path).image_inputs["pixel_values"]
    expected = ((task.image - 0.3) / 0.35).expand(3, -1, -1)
    torch.testing.assert_close(pixels[0], expected, rtol=0, atol=0.5 / 255 / 0.35 + 1e-5)


def test_samples_have_no_special_tokens(processor: DigitsProcessor, model) -> None:
    engine = TransformersEngine(model, processor, batch_size=200)
    sampling = SamplingConfig(temperature=5.0, top_k=0, max_new_tokens=20)
    task = make_task()
    requests = [Request(question=task.question, images=(task.picture,), seed=n, sampling=sampling) for n in range(200)]
    drawn = {token for generation in engine.generate(requests) for token in generation.token_ids}
    assert len(drawn) > 50
    assert not drawn & set(processor.tokenizer.all_special_ids)


class Scripted(TransformersEngine):
    """The demo's engine with scripted answers in place of a model. Some of the answers are wrong.

    ``blind`` collects the requests without an image.
    """

    blind: ClassVar[list[Request]] = []

    def generate(self, requests):
        rows = [self.chat.response_ids(request, self._answer(request)) for request in requests]
        return [make_generation(self.chat, request, row) for request, row in zip(requests, rows, strict=True)]

    def _answer(self, request: Request) -> str:
        if not request.images:
            self.blind.append(request)
            # Sometimes the same response as with the image.
            return "bottom-left 3 , bottom-right 4 . Final answer: 4" if request.seed % 2 else "4 . Final answer: 4"
        right = self.truths.get((request.question, request.images[0].tobytes()), "4")
        wrong = str((int(right) + 1) % 10)
        answer = [right, right, wrong, "largest largest"][request.seed % 4]
        if "directly" in request.question:
            return answer
        reading = "top-left 1 , top-right 2 , bottom-left 3 , bottom-right 4"
        return answer if answer == "largest largest" else f"{reading} . Final answer: {answer}"


SCRIPTED = Settings(direct_questions=40, questions=40, samples=4, dropout_ntp_questions=20)


@pytest.fixture
def made(processor: DigitsProcessor, model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Returns the result of ``make_pairs`` with a scripted engine instead of a model."""
    Scripted.truths, Scripted.blind = {}, []  # type: ignore[attr-defined]
    written = demo_pairs.write_items

    def write(folder: Path, name: str, tasks: list[reading.ReadingTask], *, has_truth: bool) -> None:
        for task in tasks if has_truth else ():
            assert task.picture is not None
            seen = task.picture.convert("RGB").tobytes()
            Scripted.truths[task.question, seen] = str(task.answer)  # type: ignore[attr-defined]
        written(folder, name, tasks, has_truth=has_truth)

    monkeypatch.setattr(demo_pairs, "write_items", write)
    monkeypatch.setattr(demo_pairs, "TransformersEngine", Scripted)
    return make_pairs(model, processor, SCRIPTED, np.random.default_rng(0), tmp_path)


def pairs_of(made) -> list[Pair]:
    return [pair for _, pair in open_pairs(made.path).scan()]


def test_there_are_pairs_of_all_kinds_and_they_pass_their_check(made) -> None:
    pairs = pairs_of(made)
    assert sum(made.counts.values()) == len(pairs)
    assert {"direct correctness", "direct format", "cot correctness", "cot format", "cot dropout_ntp"} == set(
        made.counts
    )
    total = sum(summary.pairs for summary in made.summaries.values())
    assert total == len(pairs) + sum(made.left_out.values())
    assert check_pairs(open_pairs(made.path)).is_clean
    assert set(check_pairs(open_pairs(made.path)).stats) == {"direct", "cot"}
    is_right = matcher(**digits.MATCHER)
    for pair in pairs:
        assert len(pair.images) == 1
        assert Path(pair.images[0]).is_file()
        if pair.provenance["pipeline"] == "dropout_ntp":
            assert pair.answer_gt is None  # nothing tells these pairs the truth
            continue
        style = digits.STYLES[pair.extra["form"]]
        answer, other = extract_answer(pair.chosen, style), extract_answer(pair.rejected, style)
        assert answer is not None
        assert is_right(answer, pair.answer_gt).correct
        assert (other is None) == (pair.provenance["pipeline"] == "format")
        assert other is None or not is_right(other, pair.answer_gt).correct
    relative = json.loads(made.path.read_text().splitlines()[0])["images"]
    assert relative[0].startswith("images/")


def test_dropout_ntp_keeps_the_first_half_and_never_shows_the_image(made, processor: DigitsProcessor) -> None:
    pairs = [pair for pair in pairs_of(made) if pair.provenance["pipeline"] == "dropout_ntp"]
    assert pairs
    for pair in pairs:
        chosen = processor.tokenizer.encode(pair.chosen, add_special_tokens=False)
        rejected = processor.tokenizer.encode(pair.rejected, add_special_tokens=False)
        assert pair.provenance["cut"]["tokens"] == len(chosen) // 2
        assert rejected[: len(chosen) // 2] == chosen[: len(chosen) // 2]
    assert Scripted.blind
    assert all(request.prefix_ids and "Think stepwise" in request.question for request in Scripted.blind)


def test_sampling_resumes_and_another_model_is_refused(made, processor: DigitsProcessor, model) -> None:
    folder = made.path.parent
    before = list(read_records(folder / "dropout-ntp" / "journal-00000-of-00001.jsonl"))
    Scripted.blind.clear()
    again = make_pairs(model, processor, SCRIPTED, np.random.default_rng(0), folder)
    assert not Scripted.blind
    assert list(read_records(folder / "dropout-ntp" / "journal-00000-of-00001.jsonl")) == before
    assert again.counts == made.counts
    with pytest.raises(SettingsMismatchError):
        make_pairs(model, processor, SCRIPTED, np.random.default_rng(0), folder, name="other weights")


def test_a_pair_file_that_fails_its_check_ends_the_demo(made) -> None:
    for image in (made.path.parent / "images").glob("correctness-*.png"):
        image.unlink()
    with pytest.raises(RuntimeError, match=r"pairs.jsonl must pass its check, got \{'missing image'"):
        demo_pairs._check(made.path)


def test_items_need_images(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tasks must have images, got none in task 0"):
        write_items(tmp_path, "cot", [digits.without_image(make_task())])


def test_branches_start_at_the_same_reference_with_the_same_pairs(
    made, processor: DigitsProcessor, model, tmp_path: Path
) -> None:
    settings = Settings(branch_steps=3, branch_batch=8, branch_warmup=0.3, backend=BACKEND)
    curves = {
        method: train_branch(copy.deepcopy(model), processor, made.path, method, settings, tmp_path)
        for method in METHODS
    }
    assert curves["DPO"][0]["dpo_loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert curves["DPO"][2]["dpo_loss"] != pytest.approx(np.log(2), abs=1e-7)
    assert curves["MPO"][0]["dpo_loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert curves["MPO"][0]["ntp_loss"] == pytest.approx(curves["SFT"][0]["ntp_loss"], rel=1e-5)
    assert curves["MPO"][0]["chosen_logp"] == pytest.approx(curves["DPO"][0]["chosen_logp"], rel=1e-5)
    for method in METHODS:
        assert (tmp_path / "runs" / method / "final" / "model.safetensors").is_file()


def test_the_evaluation_requires_the_exact_form(processor: DigitsProcessor, model, monkeypatch) -> None:
    tasks = digits.sample_tasks(digits.load_digits()["validation"], 4, np.random.default_rng(0), "direct")
    texts = [tasks[0].response, f"{tasks[1].response} {tasks[1].response}", "sum", str(tasks[3].answer + 1)]

    def generate(self, requests):
        pairs = zip(requests, texts, strict=True)
        rows = [self.encode_response(request, text) for request, text in pairs]
        return [make_generation(self.chat, request, row) for request, row in zip(requests, rows, strict=True)]

    monkeypatch.setattr(TransformersEngine, "generate", generate)
    expected = {"accuracy": 0.25, "unparsable": 0.5, "tokens": 1.25, "count": 4}
    assert evaluate(model, processor, tasks) == {"direct": expected}


def test_the_start_learns_from_its_corpus(processor: DigitsProcessor, tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = build_model(processor.tokenizer, hidden_size=32, layers=1)
    settings = Settings(sft_questions=100, sft_steps=20, sft_batch=16, sft_warmup=0.1, backend=BACKEND)
    curve = train_start(small, processor, settings, np.random.default_rng(0), tmp_path)
    assert curve[-1]["loss"] < curve[0]["loss"] - 0.3
    assert [line["step"] for line in curve] == list(range(1, 21))
    images = [json.loads(line)["images"] for line in (tmp_path / "sft.jsonl").read_text().splitlines()]
    assert images.count([]) == 12 + 9  # 12 state the digits; 15 % of the 60 step-by-step questions lost the image


def test_branches_differ_only_in_their_weights() -> None:
    assert {tuple(weights.values()) for weights in METHODS.values()} == {(0, 0, 1), (1, 0, 0), (0.8, 0.2, 1)}
    assert len({tuple(weights) for weights in METHODS.values()}) == 1


def test_a_quick_run_leaves_all_files(tmp_path: Path) -> None:
    out = tmp_path / "results"
    options = ["--quick", "--backend", BACKEND, "--out", str(out)]
    command = [sys.executable, "-c", _CLI, "demo", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "by design" in done.stdout
    assert "MPO - SFT continued" in done.stdout
    assert "Stages: SFT start" in done.stdout

    results = json.loads((out / "results.json").read_text())
    assert results["command"] == f"mpo-ext demo --backend {BACKEND} --quick"
    (only,) = results["runs"]
    assert set(only["accuracy"]) == set(tables.LABELS)
    for forms in only["accuracy"].values():
        for form in digits.FORMS:
            assert 0 <= forms[form]["accuracy"] <= 1
            assert forms[form]["count"] == len(forms[form]["right"]) == 20
    steps = only["settings"]["branch_steps"]
    assert {method: len(curve) for method, curve in only["branch_curves"].items()} == dict.fromkeys(METHODS, steps)
    first = only["branch_curves"]["MPO"][0]
    assert first["dpo_loss"] == pytest.approx(np.log(2), abs=1e-4)  # policy and reference are still equal
    assert first["bco_loss"] == pytest.approx(2 * np.log(2), abs=1e-4)
    assert (out / "table.md").read_text().count("\n| ") == 11
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "pairs.html").read_text()
    data = json.loads(page.split('type="application/json">')[1].split("</script>")[0])
    assert len(data["pairs"]) == sum(only["pair_counts"].values())
    assert all(image["index"] >= 0 for pair in data["pairs"] for image in pair["images"])
    for shown in (page, (out / "demo.html").read_text()):
        assert "http" not in shown.replace("http-equiv", "")  # the pages load nothing from the network
    assert "learn anything, by design" in (out / "demo.html").read_text()
    assert json.loads((out / "check.json").read_text())["clean"]
    assert set(only["sampling"]) == {"correctness-direct", "correctness-cot", "dropout-ntp"}
    assert only["sampling"]["correctness-direct"]["items"] == 40


_CLI = """
import argparse, sys
from mpo_ext.cli import demo as run
parser = argparse.ArgumentParser()
run.add_parser(parser.add_subparsers(required=True))
args = parser.parse_args()
assert "torch" not in sys.modules and "sklearn" not in sys.modules
sys.exit(args.run(args))
"""


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    run.add_parser(parser.add_subparsers(required=True))
    return parser.parse_args(["demo", *argv])


def test_an_interrupted_demo_resumes_and_ends_like_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupted = True

    def signalled(recipe: Recipe, **kept: object) -> int:
        def step(number: int, line: dict[str, float]) -> object:
            if interrupted and recipe.output.dir.endswith("MPO") and number == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return None

        return train(recipe, on_step=step, **kept)

    monkeypatch.setattr("mpo_ext.demo.train.train", signalled)
    monkeypatch.setattr("mpo_ext.demo.experiment.save_curves", lambda path, result: path.write_bytes(b""))
    args = parse("--quick", "--out", str(tmp_path / "a"))
    assert args.run(args) == 130
    said = capsys.readouterr()
    assert "mpo-ext demo: interrupted; the same command resumes" in said.err
    assert said.err.count("SIGTERM: ended after step 2 of 3") == 1
    interrupted = False
    assert args.run(args) == 0
    said = capsys.readouterr()
    assert said.out.count("finished in an earlier run") == 4  # start, pairs, SFT and DPO
    assert "resumes from" in said.err
    other = parse("--quick", "--out", str(tmp_path / "b"))
    assert other.run(other) == 0
    runs = [json.loads((tmp_path / name / "results.json").read_text())["runs"][0] for name in ("a", "b")]
    assert runs[0]["accuracy"] == runs[1]["accuracy"]
    losses = [[line["loss"] for line in run["branch_curves"]["MPO"]] for run in runs]
    assert losses[0] == losses[1]


def test_only_other_settings_of_the_start_discard_it(tmp_path: Path) -> None:
    def left(settings: Settings) -> set[str]:
        Stages(Console(quiet=True), tmp_path, settings)
        return {str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/*") if path.name != "settings.json"}

    assert left(Settings()) == set()
    for name in ("stages/sft-start.json", "stages/mpo.json", "runs/SFT-start/log.jsonl", "runs/MPO/log.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    everything = {"stages/sft-start.json", "stages/mpo.json", "runs/SFT-start", "runs/MPO"}
    assert left(Settings()) == everything
    assert left(Settings(branch_rate=1e-3)) == {"stages/sft-start.json", "runs/SFT-start"}
    assert left(Settings(prior=0.5)) == set()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--seeds", "0"], "argument --seeds: must be an integer of at least 1, got '0'"),
        (["--threads", "two"], "argument --threads: must be an integer of at least 1, got 'two'"),
        (["--seed", "-1"], "argument --seed: must be an integer of at least 0, got '-1'"),
        (["--study"], "--study must be left out: the study is a benchmark now; run python -m benchmarks.study"),
        (["--jobs", "2"], "--jobs must be left out: the study is a benchmark now; run python -m benchmarks.study"),
    ],
)
def test_bad_arguments_are_named(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(*argv)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_an_out_that_is_a_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    args = parse("--out", str(tmp_path / "file"))
    assert args.run(args) == 2
    assert "--out must be a writable folder, got" in capsys.readouterr().err


def test_a_missing_package_comes_with_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "_NEEDS", {"no_such_module": "scikit-learn"})
    args = parse()
    assert args.run(args) == 2
    assert capsys.readouterr().err.startswith("mpo-ext demo: the demo needs scikit-learn: install the extra 'demo'")


def test_an_unknown_form_is_named() -> None:
    with pytest.raises(ValueError, match="form must be one of direct, cot or None, got 'chain'"):
        digits.sample_tasks(digits.load_digits()["train"], 1, np.random.default_rng(0), "chain")
