"""Tests complete evaluations with scripted engines: numbers, killed runs, and bad input."""

import importlib.util
import json
import math
import multiprocessing
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from scripted_engine import ScriptedEngine, SeeingEngine, write_lines
from stub_engine import StubEngine

from mpo_ext.evaluate.cells import EvaluationRun
from mpo_ext.evaluate.run import evaluate
from mpo_ext.evaluate.scoring import EvaluationConfig
from mpo_ext.generate.engine import SamplingConfig, derive_seed
from mpo_ext.generate.sampler import read_samples
from mpo_ext.journal import SettingsMismatchError, read_header, read_records

KILLS = int(os.environ.get("MPO_KILLS", "3"))
COT = EvaluationConfig(prompts=("cot",))
DRAWN = EvaluationConfig(prompts=("direct", "cot"), samples=4, temperature=0.7, style="final_answer")


@pytest.fixture
def items(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "items.jsonl", [{"question": f"Q{n}", "answer_gt": "7"} for n in range(20)])


def final(answer: object) -> str:
    return f"So.\nFinal answer: {answer}"


def outputs(out: Path) -> dict[str, bytes]:
    """Returns the files of an evaluation, except journals and lock files, as a dict from path to content."""
    paths = [path for path in out.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {str(path.relative_to(out)): path.read_bytes() for path in paths if "journals" not in path.parts}


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_numbers_are_those_of_the_answers(tmp_path: Path) -> None:
    questions = ["one", "two", "three", "four", "five", "six"]
    data = write_lines(
        tmp_path / "mine.jsonl",
        [
            *({"question": each, "answer_gt": str(number)} for number, each in enumerate(questions)),
            {"question": "no truth"},
            {"question": "no image", "image": "none.png", "answer_gt": "1"},
            "not JSON\n",
        ],
    )
    early = {each: [final(0)] for each in questions}  # right only for the first question
    early["five"] = ["no marker at all..."]
    late = {each: [final(number)] for number, each in enumerate(questions)} | {"one": [final("x")]}
    models = {"early": ScriptedEngine(early), "late": ScriptedEngine(late)}
    results = evaluate(models, {"mine": data}, tmp_path / "out", config=COT)
    assert results == json.loads((tmp_path / "out" / "results.json").read_text())
    first, second = results["results"]
    assert (first["model"], first["data"], first["prompt"], first["questions"]) == ("early", "mine", "cot", 6)
    assert first["accuracy"] == pytest.approx(1 / 6)
    assert first["standard_error"] == pytest.approx(math.sqrt(1 / 6 * 5 / 6 / 5))
    assert first["interval"][0] < 1 / 6 < first["interval"][1]
    assert (first["unreadable"], first["cut_off"]) == (pytest.approx(1 / 6), pytest.approx(1 / 6))
    assert first["tokens_per_response"] == pytest.approx((5 * len(final(0)) + 19) / 6)
    assert first["refused"] == {"no true answer": 1, "image cannot be read": 1, "unreadable line": 1}
    assert "pass_at" not in first
    assert second["accuracy"] == pytest.approx(5 / 6)
    (compared,) = results["comparisons"]
    assert (compared["first"], compared["second"]) == (
        {"model": "early", "prompt": "cot"},
        {"model": "late", "prompt": "cot"},
    )
    assert (compared["gained"], compared["lost"], compared["questions"]) == (5, 1, 6)
    assert compared["difference"] == pytest.approx(4 / 6)
    assert compared["p"] == 2 * (1 + 6) / 2**6

    predictions = lines_of(tmp_path / "out" / "predictions-early.jsonl")
    assert len(predictions) == 9
    assert predictions[1] == {
        "data": "mine", "prompt": "cot", "index": 1, "question": "two", "images": [], "truth": ["1"], "sample": 0,
        "response": final(0), "answer": "0", "correct": False, "unreadable": False, "rule": "vqa:normalized",
        "tokens": len(final(0)), "finish": "stop",
    }  # fmt: skip
    assert (predictions[4]["answer"], predictions[4]["correct"], predictions[4]["finish"]) == (None, False, "length")
    assert [line["problem"] for line in predictions[6:]] == [
        "no true answer",
        "image cannot be read",
        "unreadable line",
    ]
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| mine, cot | 16.7 ± 16.7 | 83.3 ± 16.7 |" in table
    assert "+66.7" in table
    assert "image cannot be read" in table


def test_samples_give_mean_pass_at_k_and_majority(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "d.jsonl", [{"question": each, "answer_gt": "7"} for each in ("a", "b")])
    answers = {"a": [final(8), final("7."), final("8"), final(8)], "b": [final(7), "?", "?", "?"]}
    config = EvaluationConfig(prompts=("cot",), samples=4, temperature=1.0)
    (row,) = evaluate({"m": ScriptedEngine(answers)}, {"d": data}, tmp_path / "out", config=config)["results"]
    assert (row["accuracy"], row["standard_error"]) == (0.25, 0.0)
    assert row["unreadable"] == 3 / 8
    assert {k: each["accuracy"] for k, each in row["pass_at"].items()} == {"2": 0.5, "4": 1.0}
    assert row["majority"] == {"accuracy": 0.5, "standard_error": 0.5}
    assert len(lines_of(tmp_path / "out" / "predictions-m.jsonl")) == 8
    table = (tmp_path / "out" / "table.md").read_text()
    assert "majority %" in table
    assert "pass@4 %" in table


@pytest.mark.parametrize(
    ("matcher", "truth", "answers"),
    [
        ({"kind": "exact"}, "yes", ["Yes", "yes", "yes"]),
        ({"kind": "number", "units": "any"}, "5 mW", ["5 MW", "5 mW", "5 mW"]),
    ],
)
def test_the_majority_counts_case_as_the_matcher_does(
    matcher: dict[str, Any], truth: str, answers: list[str], tmp_path: Path
) -> None:
    data = write_lines(tmp_path / "d.jsonl", [{"question": "a", "answer_gt": truth}])
    config = EvaluationConfig(prompts=("cot",), samples=3, temperature=1.0, matcher=matcher)
    engine = ScriptedEngine({"a": [f"Final answer: {answer}" for answer in answers]})
    (row,) = evaluate({"m": engine}, {"d": data}, tmp_path / "out", config=config)["results"]
    assert row["accuracy"] == pytest.approx(2 / 3)
    assert row["majority"]["accuracy"] == 1.0


def test_prompts_and_lengths_go_to_the_engine(items: Path, tmp_path: Path) -> None:
    engine = StubEngine()
    config = EvaluationConfig(prompts=("direct", "cot", "none"))
    results = evaluate({"m": engine}, {"d": items}, tmp_path / "out", config=config, limit=1)
    direct, cot, plain = engine.requests
    assert direct.question.startswith("Q0\n\n")
    assert cot.question.startswith("Q0\n\nReason step by step")
    assert plain.question == "Q0"
    assert [each.sampling.max_new_tokens for each in engine.requests] == [100, 4096, 4096]
    assert direct.sampling == SamplingConfig(temperature=0, max_new_tokens=100)
    assert direct.seed == derive_seed(0, "evaluation", direct.key)
    styles = {name: each["style"] for name, each in results["settings"]["prompts"].items()}
    assert styles == {"direct": "direct", "cot": "final_answer", "none": "final_answer"}
    within = [each for each in results["comparisons"] if each["first"]["model"] == each["second"]["model"]]
    assert [(each["first"]["prompt"], each["second"]["prompt"]) for each in within] == [
        ("direct", "cot"), ("direct", "none"), ("cot", "none")
    ]  # fmt: skip


def test_several_files_are_also_taken_together(items: Path, tmp_path: Path) -> None:
    other = write_lines(tmp_path / "other.jsonl", [{"question": "Z", "answer_gt": "1"}] * 2)
    engine = ScriptedEngine({f"Q{n}": [final(7 if n < 5 else 0)] for n in range(20)} | {"Z": [final(1)]})
    results = evaluate({"m": engine}, {"d": items, "e": other}, tmp_path / "out", config=COT)
    found = {row["data"]: (row["questions"], row["accuracy"]) for row in results["results"]}
    assert found == {"d": (20, 0.25), "e": (2, 1.0), "all": (22, pytest.approx(7 / 22))}


def run_until_killed(target: Callable[[], Any], after_s: float) -> bool:
    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    process.join(after_s)
    process.kill()
    process.join()
    return process.exitcode != 0


def test_a_killed_evaluation_ends_with_the_same_bytes(
    items: Path, tmp_path: Path, record_property: Callable[[str, Any], None]
) -> None:
    def run(out: Path, engine: Callable[[], StubEngine] = StubEngine) -> Any:
        models = {"a": engine(), "b": engine()}
        exports = ["vlmevalkit", "lmms-eval"]
        return evaluate(
            models, {"d": items}, out, config=DRAWN, run=EvaluationRun(block_size=8), exports=exports
        ), models

    run(tmp_path / "whole")
    expected = outputs(tmp_path / "whole")
    assert len(expected) == 7 + 16 + 4
    rng, kills = random.Random(0), 0
    for attempt in range(10 * KILLS):
        out = tmp_path / f"killed-{attempt}"
        kills += run_until_killed(lambda out=out: run(out, lambda: StubEngine(delay_s=0.002)), rng.uniform(0.05, 0.6))
        done = sum(len(path.read_bytes().splitlines()) - 1 for path in out.rglob("journal-*.jsonl"))
        _, models = run(out)
        asked = sum(len(engine.requests) for engine in models.values())
        assert asked <= 2 * 2 * 20 * 4 - done + 8
        assert outputs(out) == expected
        assert evaluate({"a": StubEngine(), "b": StubEngine()}, {"d": items}, out, config=DRAWN) is not None
        if kills >= KILLS:
            record_property("cases", kills)
            return
    pytest.fail(f"{kills} kills of {KILLS}")


def test_only_what_is_new_is_asked(items: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    evaluate({"a": StubEngine()}, {"d": items}, out, config=COT, limit=5)
    engines = {"a": StubEngine(), "b": StubEngine()}
    results = evaluate(engines, {"d": items}, out, config=COT, limit=5)
    assert [len(engine.requests) for engine in engines.values()] == [0, 5]
    assert [row["model"] for row in results["results"]] == ["a", "b"]
    engine = StubEngine()
    evaluate({"a": engine}, {"d": items}, out, config=COT, run=EvaluationRun(block_size=5))
    assert len(engine.requests) == 15


def test_another_matcher_or_style_scores_again_without_the_model(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "d.jsonl", [{"question": "a", "answer_gt": "7"}])
    engine = ScriptedEngine({"a": ["Final answer: 7.2\nAnswer: 7"]})
    accuracies = []
    for options in (
        {},
        {"matcher": {"kind": "number", "relative": 0.1}},
        {"style": "answer"},
    ):
        config = EvaluationConfig(prompts=("cot",), **options)
        results = evaluate({"m": engine}, {"d": data}, tmp_path / "out", config=config)
        accuracies.append(results["results"][0]["accuracy"])
    assert accuracies == [0.0, 1.0, 1.0]
    assert len(engine.requests) == 1


def test_other_answers_under_a_name_are_refused(items: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    evaluate({"m": ScriptedEngine({f"Q{n}": [final(1)] for n in range(20)})}, {"d": items}, out, config=COT)
    other = ScriptedEngine({f"Q{n}": [final(1)] for n in range(20)}, name="other")
    with pytest.raises(SettingsMismatchError, match=r"engine.model: 'scripted' in the file, 'other' now"):
        evaluate({"m": other}, {"d": items}, out, config=COT)
    longer = EvaluationConfig(prompts=("cot",), max_new_tokens=5)
    with pytest.raises(SettingsMismatchError, match=r"pipeline.sampling.max_new_tokens: 4096 in the file, 5 now"):
        evaluate({"m": ScriptedEngine({})}, {"d": items}, out, config=longer)
    write_lines(items, [{"question": "Q0", "answer_gt": "8"}])
    with pytest.raises(SettingsMismatchError, match=r"input.blake2b"):
        evaluate({"m": ScriptedEngine({})}, {"d": items}, out, config=COT)


def test_the_journal_has_only_settings_that_the_responses_depend_on(items: Path, tmp_path: Path) -> None:
    """Checks the settings in the first line of the journal, the file of sampled responses.

    An evaluation resumes only from a journal with equal settings. So the journal must not hold scoring settings.
    """
    evaluate({"m": StubEngine()}, {"d": items}, tmp_path / "out", config=COT)
    (journal,) = (tmp_path / "out").rglob("journal-*.jsonl")
    settings = read_header(journal)
    assert settings is not None
    template = settings["pipeline"].pop("template")
    assert template.startswith("{question}")
    assert settings == {
        "pipeline": {
            "name": "evaluation",
            "prompt": "cot",
            "samples": 1,
            "sampling": {"temperature": 0.0, "top_p": 1.0, "top_k": 50, "max_new_tokens": 4096},
            "seed": 0,
        },
        "engine": {"engine": "stub"},
        "input": {"blake2b": settings["input"]["blake2b"]},
        "processes": 1,
    }
    assert [list(record) for record in read_records(journal)] == [["key", "text", "finish", "tokens"]] * 20


def test_the_results_read_each_journal_once(items: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders: list[Path] = []

    def counted(pipeline: Any, source: Any, folder: Path, **kept: Any) -> Any:
        folders.append(folder)
        return read_samples(pipeline, source, folder, **kept)

    monkeypatch.setattr("mpo_ext.evaluate.cells.read_samples", counted)
    evaluate({"a": StubEngine(), "b": StubEngine()}, {"d": items}, tmp_path / "out", config=DRAWN)
    assert len(set(folders)) == len(folders) == 4


def test_several_processes_give_the_results_of_one(items: Path, tmp_path: Path) -> None:
    ranks = [EvaluationRun(rank=rank, world_size=2) for rank in range(2)]
    evaluate({"m": StubEngine()}, {"d": items}, tmp_path / "one", config=DRAWN)
    assert evaluate({"m": StubEngine()}, {"d": items}, tmp_path / "two", config=DRAWN, run=ranks[1]) is None
    assert outputs(tmp_path / "two") == {}
    assert evaluate({"m": StubEngine()}, {"d": items}, tmp_path / "two", config=DRAWN, run=ranks[0]) is not None
    assert outputs(tmp_path / "two") == outputs(tmp_path / "one")


def test_the_picture_has_the_same_bytes_each_time_and_no_date(items: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib, which dev installs")
    for name in ("one", "two"):
        evaluate({"m": StubEngine()}, {"d": items}, tmp_path / name, config=COT)
    svg = (tmp_path / "one" / "accuracy.svg").read_text()
    assert svg == (tmp_path / "two" / "accuracy.svg").read_text()
    assert "<dc:date>" not in svg
    assert (tmp_path / "one" / "accuracy.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("package", "missing"), [("matplotlib", ["accuracy.png", "accuracy.svg"]), ("jinja2", ["failures.html"])]
)
def test_a_missing_package_is_named_and_leaves_the_rest(
    package: str, missing: list[str], items: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    import sys

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest)
    )
    run = EvaluationRun(stream=sys.stderr)
    assert evaluate({"m": StubEngine()}, {"d": items}, tmp_path / "out", config=COT, run=run) is not None
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert not names & set(missing)
    assert {"results.json", "table.md", "predictions-m.jsonl"} <= names
    assert f"{package} is not installed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"prompts": ()}, ValueError, "prompts must be different names of templates, got ()"),
        ({"prompts": ("cot", "cot")}, ValueError, "prompts must be different names"),
        ({"prompts": ("cto",)}, ValueError, "did you mean 'cot'?"),
        ({"samples": 0}, ValueError, "samples must be at least 1, got 0"),
        ({"samples": 3}, ValueError, "samples must be 1 at temperature 0, where all are the same, got 3"),
        ({"temperature": -1}, ValueError, "temperature must be finite and not negative, got -1"),
        ({"temperature": "0"}, TypeError, "temperature must be a number, got '0'"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1, got 0"),
        ({"style": "guess"}, ValueError, "style must be one of"),
        ({"matcher": {"kind": "guess"}}, ValueError, "kind must be one of"),
        ({"matcher": "vqa"}, TypeError, "matcher must be a mapping with a kind, got 'vqa'"),
        ({"matcher": {"kind": "custom", "function": len}}, TypeError, "matcher.function must be JSON"),
    ],
)
def test_bad_settings_are_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        EvaluationConfig(**options)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": {}}, "models must name at least one, got none"),
        ({"data": {}}, "data must name at least one, got none"),
        (
            {"models": {"a/b": StubEngine(), "a-B": StubEngine()}},
            "models must have names that differ as names of files",
        ),
        ({"models": {"/": StubEngine()}}, "models must have names with letters or digits, and not 'all', got '/'"),
        ({"models": {"m": "./nowhere"}}, "model must be a folder or a name on the hub, got './nowhere'"),
        ({"exports": ["excel"]}, "exports must be among vlmevalkit, lmms-eval, got 'excel'"),
        ({"limit": 0}, "limit must be at least 1, got 0"),
        ({"page_limit": 0}, "page_limit must be at least 1, got 0"),
        ({"lines": [{"question": "x"}, "{\n"]}, "1 with no true answer, 1 with unreadable line"),
        ({"lines": [{"problem": "x", "answer": "7"}]}, "no question (the question must be in 'question', or in"),
        ({"lines": []}, "data must hold questions with a true answer"),
    ],
)
def test_bad_arguments_are_named_before_anything_is_asked(
    options: dict[str, Any], message: str, items: Path, tmp_path: Path
) -> None:
    engine = StubEngine()
    arguments: dict[str, Any] = {"models": {"m": engine}, "data": {"d": items}, **options}
    if "lines" in arguments:
        write_lines(items, arguments.pop("lines"))
    with pytest.raises(ValueError, match=r".") as caught:
        evaluate(out=tmp_path / "out", **arguments)
    assert message in str(caught.value)
    assert not engine.requests
    assert not (tmp_path / "out").exists()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"none\.jsonl"):
        evaluate({"m": StubEngine()}, {"d": tmp_path / "none.jsonl"}, tmp_path / "out")


def test_unreadable_answers_are_counted_and_are_not_right(tmp_path: Path) -> None:
    """Evaluates four responses. Two are unreadable: "7 apples" is ambiguous, and "It is 7" has no final answer."""
    data = write_lines(tmp_path / "d.jsonl", [{"question": each, "answer_gt": "7"} for each in "abcd"])
    answers = {"a": [final("seven")], "b": [final("7 apples")], "c": [final(8)], "d": ["It is 7"]}
    config = EvaluationConfig(prompts=("cot",), matcher={"kind": "number"})
    results = evaluate({"m": ScriptedEngine(answers)}, {"d": data}, tmp_path / "out", config=config)
    (row,) = results["results"]
    assert (row["accuracy"], row["unreadable"]) == (0.25, 0.5)
    lines = lines_of(tmp_path / "out" / "predictions-m.jsonl")
    assert [(line["correct"], line["unreadable"]) for line in lines] == [
        (True, False), (False, True), (False, False), (False, True),
    ]  # fmt: skip
    table = (tmp_path / "out" / "table.md").read_text()
    assert "Unreadable: no answer can be extracted" in table
    assert " 50.0 |" in table


def test_the_options_of_each_item_decide_about_its_answers(tmp_path: Path) -> None:
    items = [
        {"question": "a", "options": ["Rome", "Paris"], "answer": "B"},
        {"question": "b", "options": "['x', 'y']", "answer": "B"},
    ]
    data = write_lines(tmp_path / "d.jsonl", items)
    answers = {"a": [final("Paris"), final("Rome"), final("Paris")], "b": [final("Paris"), final("y"), final("(B)")]}
    config = EvaluationConfig(prompts=("cot",), samples=3, temperature=1.0, matcher={"kind": "choice"})
    (row,) = evaluate({"m": ScriptedEngine(answers)}, {"d": data}, tmp_path / "out", config=config)["results"]
    assert row["accuracy"] == pytest.approx(4 / 6)
    assert row["unreadable"] == pytest.approx(1 / 6)
    assert row["majority"]["accuracy"] == 1.0  # "y" and "(B)" are the same answer


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    lines = [{"question": f"Q{n}", "image": "a.png", "answer_gt": "7"} for n in range(4)]
    return write_lines(tmp_path / "seen.jsonl", [*lines, {"question": "no image", "answer_gt": "7"}])


def test_a_json_array_of_questions_takes_the_image_root(pictures: Path, tmp_path: Path) -> None:
    array = tmp_path / "array.json"
    array.write_text(json.dumps([json.loads(line) for line in pictures.read_text().splitlines()]))
    answers = {name: [final(7)] for name in [*(f"Q{n}" for n in range(4)), "no image"]}
    config = EvaluationConfig(prompts=("cot",), matcher={"kind": "number"})
    (cell,) = evaluate(
        {"m": SeeingEngine(answers, answers)}, {"d": array}, tmp_path / "out", config=config, image_root=str(tmp_path),
        root_map=[("old", "new")],  # for other files of the evaluation
    )["results"]  # fmt: skip
    assert (cell["questions"], cell.get("refused", {})) == (5, {})
    with pytest.raises(FileNotFoundError, match=r"file of items or questions, got .*none.json: it does not exist"):
        evaluate({"m": SeeingEngine({}, {})}, {"d": tmp_path / "none.json"}, tmp_path / "out", config=config)


def test_without_the_image_the_same_questions_are_compared(pictures: Path, tmp_path: Path) -> None:
    questions = [*(f"Q{n}" for n in range(4)), "no image"]
    answers = dict(zip(questions, ([final(7)], [final(7)], [final(5)], ["?"], [final(7)]), strict=True))
    blind = dict(zip(questions, ([final("7.0")], [final(8)], [final(5)], ["?"], [final(7)]), strict=True))
    engine = SeeingEngine(answers, blind)
    config = EvaluationConfig(prompts=("cot",), matcher={"kind": "number"}, without_image=True)
    root = {"image_root": str(tmp_path)}
    results = evaluate({"m": engine}, {"d": pictures}, tmp_path / "out", config=config, **root)
    seen, unseen = results["results"]
    assert (seen["prompt"], seen["questions"], seen["accuracy"]) == ("cot", 5, 0.6)
    assert (unseen["prompt"], unseen["questions"], unseen["accuracy"]) == ("cot-without-image", 4, 0.25)
    assert unseen["refused"] == {"no image that could be left out": 1}
    (row,) = results["without_image"]
    assert (row["model"], row["data"], row["prompt"], row["questions"]) == ("m", "d", "cot", 4)
    assert (row["with_image"]["accuracy"], row["without_image"]["accuracy"]) == (0.5, 0.25)
    # 7 and 7.0 are the same answer, 5 stays the same although it is wrong, and "?" has no answer.
    assert row["unchanged"]["share"] == 0.5
    assert row["comparison"]["difference"] == 0.25
    assert (row["comparison"]["gained"], row["comparison"]["lost"]) == (1, 0)
    assert results["comparisons"] == []
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| d, cot |     m |         4 |  50.0 ± 28.9 |" in table
    assert "Questions that were not asked" not in table
    lines = lines_of(tmp_path / "out" / "predictions-m.jsonl")
    assert [line["prompt"] for line in lines] == ["cot"] * 5 + ["cot-without-image"] * 5

    # Without the option, the same folder holds the same journal, and the results lack the comparison.
    plain = EvaluationConfig(prompts=("cot",), matcher={"kind": "number"})
    before = (tmp_path / "out" / "journals" / "m" / "d-cot").exists()
    assert before
    engine.blind = {}
    assert "without_image" not in evaluate({"m": engine}, {"d": pictures}, tmp_path / "out", config=plain, **root)


def test_the_mark_of_the_image_is_left_out_with_it(tmp_path: Path) -> None:
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    line = {"question": "<image>\nHow many?", "image": "a.png", "answer_gt": "7"}
    data = write_lines(tmp_path / "d.jsonl", [line])
    engine = StubEngine()
    config = EvaluationConfig(prompts=("none",), without_image=True)
    evaluate({"m": engine}, {"d": data}, tmp_path / "out", config=config, image_root=str(tmp_path))
    seen, blind = engine.requests
    assert (seen.question, len(seen.images)) == ("<image>\nHow many?", 1)
    assert (blind.question, len(blind.images)) == ("How many?", 0)


def test_without_the_image_several_files_are_taken_together(pictures: Path, tmp_path: Path) -> None:
    other = write_lines(tmp_path / "other.jsonl", [{"question": "Z", "image": "a.png", "answer_gt": "1"}])
    answers = {"Z": [final(1)], **{f"Q{n}": [final(7)] for n in range(4)}, "no image": [final(7)]}
    engine = SeeingEngine(answers, {**answers, "Z": [final(2)]})
    config = EvaluationConfig(prompts=("cot",), without_image=True)
    data = {"d": pictures, "e": other}
    results = evaluate({"m": engine}, data, tmp_path / "out", config=config, image_root=str(tmp_path))
    shares = {row["data"]: (row["questions"], row["unchanged"]["share"]) for row in results["without_image"]}
    assert shares == {"d": (4, 1.0), "e": (1, 0.0), "all": (5, 0.8)}


@pytest.mark.parametrize(
    ("truths", "share"),
    [(["A", "B", "A", "C"], 0.5), (["A", "B", ["A", "C"], "C"], None), ([["A"], "A", "B", "C"], 0.5)],
)
def test_the_most_frequent_true_answer_is_a_bound_of_chance(
    truths: list[Any], share: float | None, tmp_path: Path
) -> None:
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    lines = [{"question": "Q", "image": "a.png", "answer_gt": truth} for truth in truths]
    lines += [{"question": "Q", "answer_gt": "B"}, {"question": "Q", "image": "gone.png", "answer_gt": "B"}]
    data = write_lines(tmp_path / "d.jsonl", lines)
    config = EvaluationConfig(prompts=("cot",), without_image=True)
    root = {"image_root": str(tmp_path)}
    results = evaluate({"m": StubEngine()}, {"d": data}, tmp_path / "out", config=config, **root)
    assert [row["most_frequent_truth"] for row in results["without_image"]] == [share]
    table = (tmp_path / "out" / "table.md").read_text()
    assert ("d: most frequent true answer: 50.0 % of the questions.\n" in table) == (share is not None)
    assert ("always gives this answer" in table) == (share is not None)


def test_the_most_frequent_true_option_counts_in_any_spelling(tmp_path: Path) -> None:
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    options = ["Rome", "Paris"]
    truths = ["B", "Paris", "B. Paris", "A"]
    lines = [{"question": "Q", "image": "a.png", "options": options, "answer_gt": truth} for truth in truths]
    data = write_lines(tmp_path / "d.jsonl", lines)
    config = EvaluationConfig(prompts=("direct",), without_image=True)
    results = evaluate({"m": StubEngine()}, {"d": data}, tmp_path / "out", config=config, image_root=str(tmp_path))
    assert [row["most_frequent_truth"] for row in results["without_image"]] == [0.75]
