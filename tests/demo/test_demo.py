"""The digits demo: its task, its pairs, and one run from end to end that is too short to learn anything."""

# ruff: noqa: E402 - these packages come with an extra, and without them there is nothing to test here
import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

for package in ("torch", "transformers", "sklearn", "matplotlib", "jinja2", "rich"):
    pytest.importorskip(package)

import torch

from mpo_ext.demo import digits, pairs, run
from mpo_ext.demo.model import build_model, build_tokenizer, collate, generate, prompt_ids, response_ids
from mpo_ext.demo.settings import Settings
from mpo_ext.demo.train import METHODS, pair_order

BACKEND = "reference"


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    return build_model(tokenizer, hidden_size=32, layers=1)


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


def test_right_responses_parse_to_the_truth(tasks: list[digits.Task]) -> None:
    assert {task.form for task in tasks} == set(digits.FORMS)
    assert {task.region for task in tasks} == set(digits.REGIONS)
    for task in tasks:
        assert digits.parse_answer(task.response, task.form) == task.answer


def test_the_step_by_step_form_reads_the_region() -> None:
    task = digits.Task(None, (3, 5, 2, 9), "sum", "right column", "cot")
    assert task.response == "top-right 5 sum 5 , bottom-right 9 sum 14 . Final answer: 14"


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
def test_a_response_without_the_form_asked_for_is_unparsable(text: str, form: str) -> None:
    assert digits.parse_answer(text, form) is None


def test_every_word_has_its_token(tokenizer, tasks: list[digits.Task]) -> None:
    for task in tasks:
        ids = prompt_ids(tokenizer, task) + response_ids(tokenizer, task.response)
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(response_ids(tokenizer, task.response)) == task.response
    assert len({len(prompt_ids(tokenizer, task)) for task in tasks}) == 1


def test_only_the_response_and_its_end_are_scored(tokenizer) -> None:
    tasks = [make_task("cot"), make_task("direct")]
    batch = collate(tokenizer, tasks, [response_ids(tokenizer, task.response) for task in tasks])
    for task, ids, labels, mask in zip(
        tasks, batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True
    ):
        scored = labels != -100
        expected = [*response_ids(tokenizer, task.response), tokenizer.eos_token_id]
        assert ids[scored].tolist() == labels[scored].tolist() == expected
        assert mask.sum() == len(prompt_ids(tokenizer, task)) + len(expected)


def test_correctness_pairs_join_right_with_wrong_and_unreadable(tokenizer) -> None:
    task = make_task()
    right = "top-left 3 sum 3 , top-right 5 sum 8 . Final answer: 8"
    wrong = "top-left 3 sum 3 , top-right 6 sum 9 . Final answer: 9"
    samples = [[response_ids(tokenizer, text) for text in (right, wrong, "sum sum", right)]]
    made = pairs.correctness_pairs(tokenizer, [task], samples, np.random.default_rng(0), pairs_per_question=100)
    found = {(tokenizer.decode(pair.chosen), tokenizer.decode(pair.rejected), pair.source) for pair in made}
    assert found == {(right, wrong, "correctness"), (right, "sum sum", "format")}
    assert len(made) == 2


@pytest.mark.parametrize("texts", [["8", "8"], ["9", "7"]], ids=["all right", "all wrong"])
def test_a_question_without_both_kinds_gives_no_pair(tokenizer, texts: list[str]) -> None:
    samples = [[response_ids(tokenizer, text) for text in texts]]
    assert not pairs.correctness_pairs(
        tokenizer, [make_task("direct")], samples, np.random.default_rng(0), pairs_per_question=4
    )


def test_dropout_ntp_keeps_the_first_half_token_by_token(tokenizer, model) -> None:
    tasks = [make_task("cot"), make_task("cot", (9, 9, 1, 1))] * 4
    chosen = [response_ids(tokenizer, task.response) for task in tasks]
    made = pairs.dropout_ntp_pairs(model, tokenizer, tasks, chosen)
    assert made
    for pair in made:
        assert pair.cut == len(pair.chosen) // 2 > 0
        assert pair.rejected[: pair.cut] == pair.chosen[: pair.cut]
        assert pair.rejected != pair.chosen
        assert pair.task.image is not None


def test_dropout_ntp_never_shows_the_image(tokenizer, model, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def watch(model, tokenizer, tasks, **options):
        seen.extend(tasks)
        return generate(model, tokenizer, tasks, **options)

    monkeypatch.setattr(pairs, "generate", watch)
    pairs.dropout_ntp_pairs(model, tokenizer, [make_task()], [response_ids(tokenizer, make_task().response)])
    assert [task.image for task in seen] == [None]
    assert "<IMG_CONTEXT>" not in tokenizer.decode(prompt_ids(tokenizer, seen[0]))


@pytest.mark.parametrize(
    ("rejected", "is_pair"),
    [
        ("top-left 3 sum 3 , top-right", False),
        ("top-left 3 sum 3 , top-right 5 sum 8 . Final answer: 8", False),
        ("top-left 3 sum 3 , top-right 4 sum 8 . Final answer: 8", False),
        ("top-left 3 sum 3 , top-right 4 sum 7 . Final answer: 7", True),
        ("top-left 3 sum 3 , top-right 4 4", True),
    ],
    ids=["empty", "equal", "right after all", "wrong", "unreadable"],
)
def test_dropout_ntp_refuses_what_is_no_negative(tokenizer, rejected: str, is_pair: bool) -> None:
    task = make_task()
    chosen = tuple(response_ids(tokenizer, task.response))
    pair = pairs.Pair(task, chosen, tuple(response_ids(tokenizer, rejected)), "dropout_ntp", len(chosen) // 2)
    assert pairs.is_dropout_ntp_pair(tokenizer, pair) == is_pair


def test_a_response_too_short_to_cut_makes_no_pair(tokenizer, model) -> None:
    task = make_task("direct")
    assert not pairs.dropout_ntp_pairs(model, tokenizer, [task], [response_ids(tokenizer, task.response)])


def test_samples_never_hold_tokens_that_stand_for_something_else(tokenizer, model) -> None:
    responses = generate(model, tokenizer, [make_task()] * 200, temperature=5.0, max_tokens=20)
    drawn = {token for response in responses for token in response}
    assert len(drawn) > 50
    assert not drawn & set(tokenizer.all_special_ids)


def test_branches_differ_in_their_weights_only() -> None:
    assert {(m.dpo_weight, m.bco_weight, m.ntp_weight) for m in METHODS.values()} == {
        (0, 0, 1),
        (1, 0, 0),
        (0.8, 0.2, 1.0),
    }
    settings = Settings(branch_steps=5, branch_batch=8)
    order = pair_order(20, settings)
    assert order == pair_order(20, settings)
    assert sorted(row for rows in order for row in rows)[::2] == list(range(20))


def test_a_quick_run_leaves_all_files(tmp_path: Path) -> None:
    out = tmp_path / "results"
    command = [
        sys.executable,
        "-c",
        _CLI,
        "demo",
        "--quick",
        "--threads",
        "1",
        "--backend",
        BACKEND,
        "--out",
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "MPO" in done.stdout

    results = json.loads((out / "results.json").read_text())
    (only,) = results["runs"]
    assert set(only["accuracy"]) == {"SFT start", "SFT", "DPO", "MPO"}
    for forms in only["accuracy"].values():
        for form in digits.FORMS:
            assert 0 <= forms[form]["accuracy"] <= 1
            assert forms[form]["count"] == 20
    steps = only["settings"]["branch_steps"]
    assert {method: len(curve) for method, curve in only["branch_curves"].items()} == dict.fromkeys(METHODS, steps)
    first = only["branch_curves"]["MPO"][0]
    assert first["dpo_loss"] == pytest.approx(np.log(2), abs=1e-4)  # policy and reference are still one
    assert first["bco_loss"] == pytest.approx(2 * np.log(2), abs=1e-4)
    assert (out / "table.md").read_text().count("\n| ") == 5
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "pairs.html").read_text()
    assert page.count("<article") == min(400, sum(only["pair_counts"].values()))
    assert "http" not in page.replace("http-equiv", "")  # nothing is loaded from elsewhere


_CLI = """
import argparse, sys
from mpo_ext.demo import run
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


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--seeds", "0"], "argument --seeds: must be an integer of at least 1, got '0'"),
        (["--threads", "two"], "argument --threads: must be an integer of at least 1, got 'two'"),
        (["--seed", "-1"], "argument --seed: must be an integer of at least 0, got '-1'"),
    ],
)
def test_bad_arguments_are_named(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(*argv)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    args = parse("--out", str(tmp_path / "file"))
    assert args.run(args) == 1
    assert "--out must be a folder that can be written, got" in capsys.readouterr().err


def test_a_missing_package_comes_with_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "_NEEDS", {"no_such_module": "scikit-learn"})
    args = parse()
    assert args.run(args) == 1
    assert capsys.readouterr().err == "mpo-ext demo needs scikit-learn: pip install 'mpo-ext[demo]'\n"


def test_an_unknown_form_is_named() -> None:
    with pytest.raises(ValueError, match="form must be one of direct, cot or None, got 'chain'"):
        digits.sample_tasks(digits.load_digits()["train"], 1, np.random.default_rng(0), "chain")
