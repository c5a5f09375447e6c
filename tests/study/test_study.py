"""Tests the runs, pairs, results and tables of the study. Also makes a short complete run."""

# ruff: noqa: E402 - these packages come with an extra, and without them there is nothing to test here
import copy
import dataclasses
import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

for package in ("torch", "transformers", "sklearn", "matplotlib", "rich", "PIL", "accelerate", "yaml"):
    pytest.importorskip(package)

from benchmarks.study import __main__ as command
from benchmarks.study import language_prior, perception, perception_start, rows, runs, start, training
from benchmarks.study import results as study_results
from benchmarks.study import tables as study
from benchmarks.study.declare import SFT, START
from benchmarks.study.settings import PriorSettings, StudySettings
from benchmarks.study.verdicts import t_test_p, verdicts
from mpo_ext.data import Pair, open_pairs
from mpo_ext.demo import digits
from mpo_ext.demo.model import build_processor
from mpo_ext.train.recipe import LossRecipe

# What the paper compares: its tables of losses, of keep ratios, of data, of rates and weights, and of text.
WANTED_LOSSES = {"DPO", "BCO", "IPO", "cDPO", "robust DPO", "SPPO", "AOT", "RSO (hinge)", "TR-DPO", "ORPO"}


def make_result(seed: int, row: str, cot: float, direct: float = 0.1, **more: Any) -> dict[str, Any]:
    numbers = {"unparsable": 0.02, "tokens": 10.0, "count": 100}
    evaluation = {
        "direct": {"accuracy": direct, **numbers},
        "cot": {"accuracy": cot, **numbers, "hallucinated": 0.3, "follow_prior": 0.2},
        "text": {"accuracy": 0.5, **numbers},
    }
    return {"seed": seed, "row": row, "status": "measured", "evaluation": evaluation, "seconds": 1.0, **more}


def make_document(seeds: tuple[int, ...] = (0, 1, 2)) -> dict[str, Any]:
    """Returns the contents of a study result file.

    All runs have equal results, except for the accuracies of SFT and MPO, which depend on the seed.
    """
    results = []
    for seed in seeds:
        for row in (START, *perception.ROWS):
            cot = {START: 0.4, SFT: 0.5 + 0.1 * seed, "MPO": 0.5 + 0.2 * seed}.get(row, 0.4)
            results.append(make_result(seed, row, cot))
    return {
        "schema": 1,
        "benchmark": "study",
        "quick": False,
        "environment": {
            "cpu": "a CPU", "cores": 2, "threads": 1, "os": "Linux", "python": "3.11", "versions": {"torch": "2.13.0"},
            "commit": "abc1234", "modified": False, "command": "python -m benchmarks.study",
            "started": "2026-11-28T00:00:00+00:00", "ended": "2026-11-28T01:00:00+00:00",
            "load_before": [0.0] * 3, "load_after": [0.0] * 3,
        },
        "settings": dataclasses.asdict(StudySettings()),
        "seconds": 3600.0,
        "seeds": list(seeds),
        "starts": [{"seed": seed, "pairs": dict.fromkeys(perception.PAIR_FILES, 7)} for seed in seeds],
        "results": results,
    }  # fmt: skip


def line_of(block: str, label: str) -> list[str]:
    (line,) = [line for line in block.splitlines() if re.match(rf"\| {re.escape(label)} +\|", line)]
    return [cell.strip() for cell in line.strip("|").split("|")]


# ---------------------------------------------------------------------------------------------------------------- rows


def test_every_comparison_of_the_paper_has_its_rows() -> None:
    rows = set(perception.ROWS)
    assert {"SFT", "MPO"} <= rows
    assert {name for loss in WANTED_LOSSES for name in (loss, f"{loss} + SFT")} <= rows
    assert [perception.ROWS[f"MPO, DropoutNTP {keep:g}"].pairs for keep in (0.25, 0.5, 0.75)] == list(perception.KEEPS)
    assert list(perception.KEEPS.values()) == [0.25, 0.5, 0.75]
    assert {row.pairs for row in perception.ROWS.values()} == set(perception.PAIR_FILES)
    assert {row.rate for row in perception.ROWS.values()} == {0.1, 0.4, 1, 4, 10}
    assert {"MPO, delta 0", "MPO, delta ema", "text, SFT", "text, DPO", "text, MPO"} <= rows
    weights = {(row.loss["dpo_weight"], row.loss["bco_weight"]) for row in perception.ROWS.values()}
    assert {(0.5, 0.5), (0.75, 0.25), (0.8, 0.2), (0.9, 1 - 0.9)} <= weights
    assert {row.loss["ntp_weight"] for row in perception.ROWS.values()} >= {0, 0.01, 0.5, 1, 2, 5}


def test_every_row_is_shown_and_every_shown_row_is_run() -> None:
    shown = {row for table in perception.TABLES.values() for _, row in table.rows}
    assert shown - {START} == set(perception.ROWS)
    for table in perception.TABLES.values():
        labels = [label for label, _ in table.rows]
        assert len(set(labels)) == len(labels)
        assert set(table.paper) <= {row for _, row in table.rows}


def test_no_two_rows_are_the_same_run() -> None:
    seen = [json.dumps(dataclasses.asdict(row), sort_keys=True) for row in perception.ROWS.values()]
    assert len(set(seen)) == len(seen)
    assert len({study_results.slug(name) for name in perception.ROWS}) == len(perception.ROWS)


@pytest.mark.parametrize("row", perception.ROWS)
def test_the_recipe_of_a_row_has_the_values_of_the_row(row: str, tmp_path: Path) -> None:
    settings, run_of = StudySettings(seed=3, branch_steps=100, branch_batch=32), perception.ROWS[row]
    recipe = rows.row_recipe(run_of, settings, tmp_path, tmp_path / "run")
    plain = LossRecipe()
    for name in ("dpo_weight", "bco_weight", "ntp_weight", "preference", "label_smoothing"):
        assert getattr(recipe.loss, name) == run_of.loss.get(name, getattr(plain, name))
    assert recipe.loss.beta == 0.1
    assert recipe.optim.learning_rate == pytest.approx(settings.branch_rate * run_of.rate)
    assert (recipe.optim.max_steps, recipe.optim.batch_size, recipe.optim.seed) == (100, 32, 3)
    assert recipe.data.train[0].path == str(tmp_path / f"pairs-{study_results.slug(run_of.pairs)}.jsonl")
    if row.startswith("TR-DPO"):
        assert (recipe.reference.kind, recipe.reference.sync_every, recipe.reference.sync_mix) == ("copy", 25, 0.6)
    else:
        assert recipe.reference.file == str(tmp_path / f"reference-{study_results.slug(run_of.pairs)}.jsonl")
    delta = {"MPO, delta 0": "fixed", "MPO, delta ema": "ema"}.get(row, "cumulative")
    assert recipe.reward_shift.mode == delta


def test_the_losses_by_name() -> None:
    rows = perception.ROWS
    assert rows["cDPO"].loss["label_smoothing"] > 0
    assert "preference" not in rows["cDPO"].loss
    assert rows["robust DPO"].loss["label_smoothing"] > 0
    preferences = {name: rows[name].loss.get("preference") for name in ("IPO", "SPPO", "AOT", "RSO (hinge)", "ORPO")}
    assert list(preferences.values()) == ["ipo", "sppo_hard", "aot", "hinge", "orpo"]
    for name in WANTED_LOSSES:
        assert rows[name].loss["ntp_weight"] == 0
        assert dataclasses.replace(rows[f"{name} + SFT"], loss={**rows[name].loss}) == rows[name]
        assert rows[f"{name} + SFT"].loss["ntp_weight"] == 1


# --------------------------------------------------------------------------------------------------------------- pairs


def test_a_question_in_words_names_its_digits_in_known_words() -> None:
    task = digits.sample_tasks(digits.load_digits()["train"], 1, np.random.default_rng(0), "cot")[0]
    task = digits.in_words(dataclasses.replace(task, values=(3, 5, 2, 9), region="top row"))
    named = "top-left 3 , top-right 5 , bottom-left 2 , bottom-right 9"
    assert task.question == f"{named} . What is the sum of the top row ? Think stepwise."
    assert task.picture is None
    assert task.answer == 8
    tokenizer = build_processor().tokenizer
    assert tokenizer.unk_token_id not in tokenizer.encode(task.question)


def make_pool(**counts: int) -> dict[str, list[Pair]]:
    sizes = {"direct": 50, "cot": 60, "text": 20, "DropoutNTP 0.25": 40, "DropoutNTP 0.5": 50, "DropoutNTP 0.75": 30}
    return {
        kind: [Pair(f"{kind} {number}", "right", "wrong") for number in range(counts.get(kind, size))]
        for kind, size in sizes.items()
    }


def kinds_of(pairs: list[Pair]) -> dict[str, int]:
    kinds = [pair.question.rpartition(" ")[0] for pair in pairs]
    return {kind: kinds.count(kind) for kind in set(kinds)}


def test_files_of_pairs_hold_the_kinds_in_their_names() -> None:
    settings = StudySettings(pairs=40, kind_pairs=100, mixed_shares=(0.25, 0.5, 0.25))
    files = perception_start.choose(make_pool(), settings, np.random.default_rng(0))
    assert tuple(sorted(files)) == tuple(sorted(perception.PAIR_FILES))
    assert kinds_of(files["mixed"]) == {"direct": 10, "cot": 20, "DropoutNTP 0.5": 10}
    assert kinds_of(files["correctness"]) == {"cot": 30}  # as many as the smallest kind has
    assert [kinds_of(files[name]) for name in perception.KEEPS] == [{name: 30} for name in perception.KEEPS]
    assert kinds_of(files["correctness and DropoutNTP"]) == {"cot": 15, "DropoutNTP 0.5": 15}
    assert kinds_of(files["text"]) == {"text": 20}


def test_shares_of_the_pairs_are_nested() -> None:
    settings = StudySettings(pairs=40)
    files = perception_start.choose(make_pool(), settings, np.random.default_rng(1))
    parts = [files[name] for name in (*perception.SHARES, "mixed")]
    assert [len(part) for part in parts] == [4, 16, 28, 40]
    for smaller, larger in itertools.pairwise(parts):
        assert smaller == larger[: len(smaller)]
    assert len(kinds_of(files["mixed 40%"])) == 3  # the order is mixed


def test_an_empty_file_of_pairs_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"pairs 'text' must be at least one, got none of 50 direct, .* 0 text"):
        perception_start.choose(make_pool(text=0), StudySettings(pairs=40), np.random.default_rng(0))


# -------------------------------------------------------------------------------------------------------------- tables


def test_means_deviations_and_paired_differences() -> None:
    document = make_document()
    study.check(document)
    block = study.tables(document)["study_main"]
    # By seed: MPO 50, 70, 90; SFT 50, 60, 70; the start 40. MPO less SFT: 0, 10, 20; less the start: 10, 30, 50.
    mpo = line_of(block, "MPO")
    assert mpo[1:4] == ["10.0 ± 0.0", "70.0 ± 20.0", "50.0 ± 0.0"]
    assert mpo[4:7] == ["+30.0 ± 20.0", "+10.0 ± 10.0", "+0.0 ± 0.0"]
    assert mpo[7:] == ["2.0 / 2.0", "10.0", "3", "77.2 / 79.2"]
    assert line_of(block, "SFT start")[4:6] == ["", "-20.0 ± 10.0"]
    assert line_of(block, "SFT")[4:6] == ["+20.0 ± 10.0", ""]


def test_differences_are_of_seeds_that_have_both() -> None:
    document = make_document()
    (mpo,) = [one for one in document["results"] if (one["seed"], one["row"]) == (2, "MPO")]
    mpo.update(status="failed", reason="FloatingPointError: loss | <nan>")
    study.check(document)
    cells = line_of(study.tables(document)["study_main"], "MPO")
    assert cells[2] == "60.0 ± 14.1"
    assert cells[5] == "+5.0 ± 7.1"
    assert cells[9] == "2"


def test_one_seed_has_no_deviation() -> None:
    cells = line_of(study.tables(make_document((0,)))["study_main"], "MPO")
    assert cells[2] == "50.0"
    assert cells[5] == "+0.0"


def test_a_failed_run_is_listed() -> None:
    document = make_document()
    assert "No run failed." in study.tables(document)["study_setup"]
    (row,) = [one for one in document["results"] if (one["seed"], one["row"]) == (1, "IPO")]
    row.update(status="failed", reason="ValueError: a | b")
    setup = study.tables(document)["study_setup"]
    assert "Failed: IPO (seed 1: ValueError: a / b)." in setup
    assert "were not made" not in setup
    row.update(reason=study.NOT_RUN)
    setup = study.tables(document)["study_setup"]
    assert "No run failed. 1 declared runs were not made." in setup


def test_there_is_a_block_for_each_table() -> None:
    document = make_document()
    blocks = study.tables(document)
    assert set(blocks) == {"study_setup", "study_differences", *(f"study_{name}" for name in perception.TABLES)}
    for name, table in perception.TABLES.items():
        assert blocks[f"study_{name}"].count("\n") == len(table.rows) + 2
        assert f"## {table.title}\n" in study.markdown(document)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "schema must be 1, got 2"),
        ({"benchmark": "logits"}, "benchmark must be 'study', got 'logits'"),
        ({"seeds": []}, r"seeds must be a list of seeds, each once, got \[\]"),
        ({"results": []}, "results must be complete, got"),
        ({"starts": []}, r"starts must be one per seed, got \[\]"),
    ],
)
def test_a_bad_result_file_is_rejected(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "study.json"
    path.write_text(json.dumps({**make_document(), **change}))
    with pytest.raises(ValueError, match=f"study.json: {message}"):
        study.load(path)


@pytest.mark.parametrize(
    ("quantity", "value", "rule"),
    [
        ("accuracy", float("nan"), "a share"),
        ("accuracy", 1.5, "a share"),
        ("unparsable", True, "a share"),
        ("tokens", float("inf"), "finite and not negative"),
        ("tokens", -1.0, "finite and not negative"),
    ],
)
def test_a_bad_number_is_rejected(quantity: str, value: float, rule: str) -> None:
    document = make_document()
    document["results"][5]["evaluation"]["cot"][quantity] = value
    with pytest.raises(ValueError, match=rf"results\[5\].evaluation.cot.{quantity} must be {rule}, got {value}"):
        study.check(document)


def test_a_run_that_is_listed_twice_is_rejected() -> None:
    document = make_document()
    document["results"].append(copy.deepcopy(document["results"][0]))
    with pytest.raises(ValueError, match=r"results\[\d+\] must be of a seed and a row, once, got \(0, 'SFT start'\)"):
        study.check(document)


def make_prior_document(gains: dict[int, float]) -> dict[str, Any]:
    """Returns the contents of a result file of the task "language-prior".

    ``gains`` maps a seed to MPO's advantage over SFT.
    """
    task, results = language_prior.TASK, []
    for seed, gain in gains.items():
        for row in (*task.starts, *task.rows):
            result = make_result(seed, row, 0.5 + gain * (row == "MPO"))
            results.append(result)
    starts = [{"seed": seed, "pairs": dict.fromkeys(task.pair_files, 7)} for seed in gains]
    document = {**make_document(), "task": "language-prior", "seeds": list(gains), "results": results}
    return {**document, "starts": starts, "settings": dataclasses.asdict(PriorSettings())}


def test_the_language_prior_has_its_tables_and_verdicts() -> None:
    document = make_prior_document({1: 0.03, 2: 0.032, 3: 0.034, 4: 0.03, 5: 0.031})
    study.check(document)
    blocks = study.tables(document)
    (line,) = [line for line in blocks["prior_findings"].splitlines() if re.match(r"\| MPO +\| +SFT \|", line)]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[2:] == ["CoT", "higher", "higher", "same", "+3.1 ± 0.1", "5"]
    assert "opposite" not in blocks["prior_findings"]
    assert set(blocks) == {
        "prior_setup",
        "prior_differences",
        "prior_findings",
        "prior_best_rates",
        "prior_labels",
        "prior_cost",
        *(f"prior_{name}" for name in language_prior.TABLES),
    }
    assert line_of(blocks["prior_main"], "MPO")[9:12] == ["30.0", "20.0", "5"]
    assert line_of(blocks["prior_robust"], "MPO, width 64")[5] == "+0.0 ± 0.0"  # compared with its own SFT
    lines = [line for line in blocks["prior_differences"].splitlines() if "SFT, DPO and MPO" in line]
    first = [cell.strip() for cell in lines[0].strip("|").split("|")]
    assert first[1:6] == ["MPO", "SFT", "CoT", "+3.1 ± 0.1", "5"]
    assert first[7:] == ["higher", "higher"]
    assert "not significant" in lines[3]  # DPO and the start are equal
    noisy = study.tables(make_prior_document({1: 0.03, 2: -0.02, 3: 0.05}))["prior_differences"]
    assert " higher | higher |" not in noisy
    assert "study_main" in study.BLOCKS
    assert "prior_main" in study.BLOCKS


def test_a_difference_with_one_seed_has_the_error_of_its_questions() -> None:
    document = make_prior_document({1: 0.2})
    (sft,) = [each for each in document["results"] if each["row"] == "SFT"]
    (mpo,) = [each for each in document["results"] if each["row"] == "MPO"]
    assert study.question_error(document, "MPO", "SFT") is None
    mpo["evaluation"]["cot"]["right"] = training.encode_right([True, True, False, False, True])
    sft["evaluation"]["cot"]["right"] = training.encode_right([False, True, False, True, False])
    assert study.question_error(document, "MPO", "SFT") == pytest.approx(100 * (0.7 / 5) ** 0.5)
    # A seed that only one row has does not count: its questions are others.
    other = copy.deepcopy(mpo)
    other["seed"] = 0
    other["evaluation"]["cot"]["right"] = training.encode_right([False] * 5)
    alone = {**document, "results": [other, *document["results"]]}
    assert study.question_error(alone, "MPO", "SFT") == pytest.approx(100 * (0.7 / 5) ** 0.5)
    assert study.question_error({**document, "results": [other, sft]}, "MPO", "SFT") is None
    (line,) = [
        line for line in study.tables(document)["prior_differences"].splitlines() if "± 37.4 (questions)" in line
    ]
    assert "one seed, no verdict" in line


def test_every_row_of_the_language_prior_is_shown_and_differs() -> None:
    task = language_prior.TASK
    shown = {row for table in task.tables.values() for _, row in table.rows}
    assert shown == {*task.starts, *task.rows}
    assert len({json.dumps(dataclasses.asdict(row), sort_keys=True) for row in task.rows.values()}) == len(task.rows)
    assert {row.pairs for row in task.rows.values()} == set(task.pair_files)
    for name, family in task.differences.items():
        assert name in task.tables
        for row, other, _ in family:
            assert {row, other} <= {*task.rows, *task.starts}
    for changes in task.starts.values():
        dataclasses.replace(PriorSettings(), **changes)
    assert set(task.choose(("strength",))) == {
        f"{method}{suffix}"
        for method in ("SFT", "MPO")
        for suffix in ("", *(f", prior {s:g}" for s in (0, 0.5, 0.75, 0.95)))
    }


def test_the_t_test_has_published_values() -> None:
    # Quantiles of Student's distribution for two-sided 5 %.
    for freedom, quantile in ((1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (10, 2.228), (29, 2.045)):
        assert t_test_p(quantile, freedom) == pytest.approx(0.05, abs=2e-4)
        assert t_test_p(-quantile, freedom) == pytest.approx(0.05, abs=2e-4)
    assert t_test_p(0, 4) == pytest.approx(1)


def test_verdicts_are_corrected_for_their_number() -> None:
    (alone,) = verdicts([[1.0, 2.0, 3.0]])
    assert alone.p == pytest.approx(0.0742, abs=1e-4)  # t = 2 * sqrt(3) with 2 degrees of freedom
    assert alone.error == pytest.approx(1 / 3**0.5)
    clear = [3.0, 3.3, 2.9, 3.1]  # p is about 0.0001, before the correction
    family = verdicts([clear, [1.0, -1.0, 0.5, 0.2], [-x for x in clear], [5.0], []])
    assert [each.text for each in family] == [
        "higher",
        "not significant",
        "lower",
        "not significant",
        "not significant",
    ]
    assert [each.p is None for each in family] == [False, False, False, True, True]
    assert family[0].p == pytest.approx(3 * verdicts([clear])[0].p)
    assert family[1].p >= family[2].p >= family[0].p


# ---------------------------------------------------------------------------------------------------------- running it


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch):
    """Replaces the study's runs by instant runs. Returns (list, set).

    The list collects (seed, name) of each run. If a test adds a name to the set, the runs with this name fail.
    """
    asked: list[tuple[int, str]] = []
    failing: set[str] = set()

    def task(folder: Path, settings: StudySettings, row: str) -> dict[str, Any]:
        found = study_results.read(folder.parent, settings, row)
        if found is not None and row == START:
            return found
        asked.append((settings.seed, row))
        if row in failing:
            raise FloatingPointError(f"loss of {row} is not finite\nmore of it")
        result = make_result(settings.seed, row, 0.5, cpu_seconds=2.0)
        return study_results.save(folder.parent, settings, row, {**result, "pairs": {"mixed": 3}})

    monkeypatch.setattr(start, "prepare", task)
    monkeypatch.setattr(rows, "run_row", task)
    monkeypatch.setattr(study_results, "save_plot", lambda path, document: path.write_text("drawn"))
    return asked, failing


def run_study(out: Path, seeds: range = range(2), **more: Any) -> int:
    arguments = {
        "task": "perception",
        "quick": True,
        "threads": 1,
        "backend": "reference",
        "jobs": 1,
        "command": "python -m benchmarks.study",
    }
    return runs.run(out=out, seeds=seeds, **{**arguments, **more})


def test_an_interrupted_study_resumes(scripted, tmp_path: Path) -> None:
    asked, _ = scripted
    assert run_study(tmp_path) == 0
    assert len(asked) == 2 * (len(perception.ROWS) + 1)
    document = study.load(tmp_path / "study.json")
    assert document["seconds"] == 2.0 * len(asked)
    assert document["starts"][1] == {"seed": 1, "pairs": {"mixed": 3}, "sampling": {}, "labels": {}, "curve": {}}
    before = dict(document, environment=None)
    asked.clear()
    (tmp_path / "seed-1" / "results" / "ipo.json").unlink()
    assert run_study(tmp_path) == 0
    assert asked == [(1, "IPO")]
    assert dict(study.load(tmp_path / "study.json"), environment=None) == before
    assert (tmp_path / "study.png").read_text() == (tmp_path / "study.svg").read_text() == "drawn"


def test_main_rows_are_run_first_over_all_seeds_and_others_seed_by_seed(scripted, tmp_path: Path) -> None:
    asked, _ = scripted
    assert run_study(tmp_path) == 0
    names = [
        row
        for row in perception.ROWS
        if row in {row for name in perception.TASK.main for _, row in perception.TABLES[name].rows}
    ]
    others = [row for row in perception.ROWS if row not in names]
    first = [(seed, row) for row in (START, *names) for seed in range(2)]
    assert asked == first + [(seed, row) for seed in range(2) for row in others]


def test_rows_with_changed_settings_run_again(scripted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, _ = scripted
    run_study(tmp_path, range(1))
    asked.clear()
    rows = {**perception.ROWS, "MPO": dataclasses.replace(perception.ROWS["MPO"], rate=0.5)}
    monkeypatch.setitem(study.TASKS, "perception", dataclasses.replace(perception.TASK, rows=rows))
    run_study(tmp_path, range(1))
    assert asked == [(0, "MPO")]
    asked.clear()
    run_study(tmp_path, range(1), backend=None)
    assert len(asked) == len(rows) + 1


def test_a_row_that_fails_is_listed_and_run_again(scripted, tmp_path: Path, capsys) -> None:
    asked, failing = scripted
    failing.add("IPO")
    assert run_study(tmp_path, range(1)) == 1
    assert len(asked) == len(perception.ROWS) + 1
    assert "failed: seed 0, IPO: FloatingPointError: loss of IPO is not finite" in capsys.readouterr().out
    document = study.load(tmp_path / "study.json")
    (ipo,) = [one for one in document["results"] if one["row"] == "IPO"]
    assert ipo["reason"] == "FloatingPointError: loss of IPO is not finite"
    assert "Failed: IPO (seed 0: FloatingPointError" in (tmp_path / "study.md").read_text()
    failing.clear()
    asked.clear()
    assert run_study(tmp_path, range(1)) == 0
    assert asked == [(0, "IPO")]


def test_rows_without_a_start_are_listed(scripted, tmp_path: Path) -> None:
    asked, failing = scripted
    failing.add(START)
    assert run_study(tmp_path) == 1
    assert asked == [(0, START), (1, START)]
    results = study.load(tmp_path / "study.json")["results"]
    assert {one["status"] for one in results} == {"failed"}
    assert sum(one["reason"].startswith("no start: FloatingPointError: loss of") for one in results) == 2 * len(
        perception.ROWS
    )


def test_an_interrupt_keeps_complete_results(scripted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, _ = scripted
    working = rows.run_row

    def interrupted(folder: Path, settings: StudySettings, row: str) -> dict[str, Any]:
        if row == "BCO":
            raise KeyboardInterrupt
        return working(folder, settings, row)

    monkeypatch.setattr(rows, "run_row", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_study(tmp_path, range(1))
    done = len(asked)
    monkeypatch.setattr(rows, "run_row", working)
    assert run_study(tmp_path, range(1)) == 0
    assert len(asked) == len(perception.ROWS) + 1
    assert done == 1 + list(perception.ROWS).index("BCO")


def test_the_quick_study_runs_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[set[int]] = []
    sample_tasks = digits.sample_tasks

    def sample(split: digits.Digits, *args: Any) -> list[digits.Task]:
        drawn.append(set(split.indices.tolist()))
        return sample_tasks(split, *args)

    monkeypatch.setattr(digits, "sample_tasks", sample)
    assert run_study(tmp_path, range(1)) == 0
    sizes = {"first training": 700, "validation": 247, "pairs": 400, "held-out": 450}
    assert [len(each) for each in dict.fromkeys(map(frozenset, drawn))] == list(sizes.values())
    assert len(set.union(*drawn)) == sum(sizes.values())  # no digit is in two of them
    document = study.load(tmp_path / "study.json")
    results = {one["row"]: one for one in document["results"]}
    for name, row in perception.ROWS.items():
        assert results[name]["steps"] == 4
        first = results[name]["log"]["first"]
        assert ("dpo_loss" in first) == (row.loss["dpo_weight"] > 0 or row.loss["bco_weight"] > 0)
    pairs = document["starts"][0]["pairs"]
    assert set(pairs) == set(perception.PAIR_FILES)
    seed = tmp_path / "seed-0"
    for name, count in pairs.items():
        found = [pair for _, pair in open_pairs(seed / f"pairs-{study_results.slug(name)}.jsonl").scan()]
        assert len(found) == count
        assert all(len(pair.images) == (name != "text") for pair in found)
        lines = (seed / f"reference-{study_results.slug(name)}.jsonl").read_text().splitlines()
        assert len(lines) == count + 1
    for name, keep in perception.KEEPS.items():
        found = [pair for _, pair in open_pairs(seed / f"pairs-{study_results.slug(name)}.jsonl").scan()]
        assert {pair.provenance["keep"] for pair in found} == {keep}
    # All rows of the mixed pairs begin at the same model: policy and reference are one.
    log = {name: one["log"] for name, one in results.items() if "log" in one}
    assert log["MPO"]["first"]["reward_accuracy"] == pytest.approx(log["MPO, delta 0"]["first"]["reward_accuracy"])
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "study.svg").read_text()
    assert not (seed / "runs").exists() or not list((seed / "runs").iterdir())


def test_starts_with_other_settings_have_their_own_folder_and_rows(scripted, tmp_path: Path) -> None:
    asked, _ = scripted
    assert run_study(tmp_path, range(1, 2), task="language-prior", only=("robust",)) == 0
    starts = [f"{START}{suffix}" for suffix in ("", *(f", {name}" for name in language_prior.OTHERS))]
    rows = [f"{method}, {name}" for name in language_prior.OTHERS for method in ("SFT", "MPO")]
    assert sorted(asked) == sorted((1, row) for row in (*starts, *rows))
    # The rows of a start run before the next start.
    assert [row for _, row in asked][1:5] == [f"{name}, descending prior" for name in (START, "SFT", "MPO")] + [
        starts[2]
    ]
    document = study.load(tmp_path / "study.json")
    assert (document["task"], document["seeds"]) == ("language-prior", [1])
    measured = {result["row"] for result in document["results"] if result["status"] == "measured"}
    assert measured == {*starts, *rows}
    asked.clear()
    assert run_study(tmp_path, range(1, 2), task="language-prior", only=("robust", "main")) == 0
    assert sorted(asked) == [(1, "DPO"), (1, "MPO"), (1, "SFT")]


def test_a_quick_study_of_the_language_prior_runs(tmp_path: Path) -> None:
    assert run_study(tmp_path, range(1), task="language-prior", only=("main", "keep", "text")) == 0
    document = study.load(tmp_path / "study.json")
    results = {one["row"]: one for one in document["results"] if one["status"] == "measured"}
    assert {START, "SFT", "DPO", "MPO", "MPO, DropoutNTP 0", "text, MPO"} <= set(results)
    assert set(document["starts"][0]["pairs"]) == set(language_prior.PAIR_FILES)
    for result in results.values():
        assert 0 <= result["evaluation"]["cot"]["hallucinated"] <= 1
        assert result["evaluation"]["text"]["count"] == 8
    seed = tmp_path / "seed-0"
    for name, keep in language_prior.KEEPS.items():
        pairs = [pair for _, pair in open_pairs(seed / f"pairs-{study_results.slug(name)}.jsonl").scan()]
        assert {pair.provenance["keep"] for pair in pairs} == {keep}
        assert all(pair.answer_gt is None for pair in pairs)


# ------------------------------------------------------------------------------------------------------------- command


def test_the_command_of_a_study_is_in_its_file(scripted, tmp_path: Path) -> None:
    assert (
        command.main(["--task", "perception", "--quick", "--seeds", "2", "--threads", "1", "--out", str(tmp_path)])
        == 0
    )
    document = study.load(tmp_path / "study.json")
    assert (
        document["environment"]["command"]
        == "python -m benchmarks.study --task perception --seeds 2 --threads 1 --quick"
    )
    assert document["seeds"] == [0, 1]


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (["--seed", "3", "--jobs", "2", "--backend", "cpu"], "--seed 3 --jobs 2 --backend cpu"),
        (["--seeds", "1", "--jobs", "1", "--quick"], "--quick"),
    ],
)
def test_options_with_their_default_are_left_out_of_the_command(arguments: list[str], options: str) -> None:
    args = command.parser().parse_args(arguments)
    assert command.command_of(args) == f"python -m benchmarks.study {options}"


def test_an_interrupt_exits_with_130(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def interrupt(**_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "run", interrupt)
    assert command.main(["--out", str(tmp_path)]) == 130
    assert "the same command resumes the study" in capsys.readouterr().err


def test_bad_options_are_rejected(tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main(["--jobs", "0"])
    assert "must be an integer of at least 1, got '0'" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert command.main(["--out", str(tmp_path / "file" / "study")]) == 1
    assert "--out must be a folder that can be written" in capsys.readouterr().err
