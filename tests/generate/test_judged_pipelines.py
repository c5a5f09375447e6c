"""Tests the pipelines with a model as judge: RLAIF-V, and the judge of whole responses."""

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from stub_engine import StubEngine
from test_feeding import StreamingStub
from test_runner import outputs, run, run_until_killed, write_items

from mpo_ext.generate.choices import quoted
from mpo_ext.generate.claims import read_list, split_sentences
from mpo_ext.generate.engine import Generation, Request
from mpo_ext.generate.items import Item
from mpo_ext.generate.judge import Judge, JudgeConfig
from mpo_ext.generate.rlaif_v import RlaifV, RlaifVConfig
from mpo_ext.generate.routing import RoutedEngine
from mpo_ext.generate.sampler import journal_path

JUDGED: dict[str, Callable[[], Any]] = {
    "rlaif_v": lambda: RlaifV(RlaifVConfig(samples=4)),
    "sentences": lambda: RlaifV(RlaifVConfig(samples=4, claims="sentences", questions="statement")),
    "pairwise": lambda: Judge(JudgeConfig(samples=4)),
    "pointwise": lambda: Judge(JudgeConfig(samples=4, mode="pointwise", min_gap=0.1)),
}


class ScriptedEngine(StubEngine):
    """An engine that answers one question after the other with the texts ``answers``.

    The function ``judge`` answers all other requests.
    """

    def __init__(self, answers: Sequence[str], judge: Callable[[Request], str | tuple[float, ...]]) -> None:
        super().__init__()
        self.answers, self.judge = list(answers), judge

    def _answer(self, request: Request) -> Generation:
        reply = self.answers.pop(0) if request.role == "answer" else self.judge(request)
        if isinstance(reply, str):
            return Generation(tuple(self.encode(reply)), reply, "stop")
        return Generation((1,), "?", "length", choice_probs=reply)


def made(pipeline: Any, engine: StubEngine, item: Item | None = None) -> tuple[list[dict[str, Any]], Any, Any]:
    """Runs a pipeline on a question. Returns (pairs, result of ``make_pairs``, records of ``sample``).

    A record describes one sampled response.
    """
    item = item or Item(question="What is shown?")
    (records,) = pipeline.sample([item], engine)
    result = pipeline.make_pairs(item, json.loads(json.dumps(records)), "model")
    return [line for _, line in result.lines], result, records


def claims_judge(request: Request) -> str | tuple[float, ...]:
    """Acts as RLAIF-V's judge: splits answers at commas into claims, and rejects claims with the word "bad"."""
    if request.choices:
        return (0.2, 0.7) if "bad" in request.question else (0.9, 0.05)
    if "Statements:" in request.question:
        return "\n".join(f"{line}, is it?" for line in request.question.partition("Statements:\n")[2].splitlines())
    return "Facts:\n" + "\n".join(f"- {part}" for part in request.question.rpartition("Answer: ")[2].split(", "))


def test_pairs_have_fewer_rejected_claims_on_the_chosen_side() -> None:
    pipeline = RlaifV(RlaifVConfig(samples=4, pairs_per_question=0, sampling=RlaifVConfig().rewriting))
    engine = ScriptedEngine(["a, b", "a, bad", "bad 1, bad 2", "a,  b"], claims_judge)
    pairs, result, records = made(pipeline, engine)
    assert [record["claims"] for record in records[:3]] == [["a", "b"], ["a", "bad"], ["bad 1", "bad 2"]]
    found = {(pair["chosen"], pair["rejected"]): pair["provenance"]["rejected_claims"] for pair in pairs}
    assert found == {("a, b", "a, bad"): [0, 1], ("a, bad", "bad 1, bad 2"): [1, 2], ("a, b", "bad 1, bad 2"): [0, 2]}
    assert result.skipped == {"sample is a duplicate": 1}
    questions = [request.question for request in engine.requests if request.choices]
    assert [question.partition(",")[0] for question in questions] == ["a", "b", "bad", "bad 1", "bad 2"]  # "a" once
    assert [len(record["verdicts"]) for record in records[:3]] == [2, 2, 2]
    assert result.stage_tokens["verdicts"] == 5
    assert result.tokens == sum(result.stage_tokens.values())
    assert result.stage_tokens["responses"] == sum(map(len, ["a, b", "a, bad", "bad 1, bad 2", "a,  b"]))
    assert result.stage_tokens["claims"] > 0 < result.stage_tokens["questions"]


def test_the_gap_and_the_lengths_limit_the_pairs() -> None:
    answers = ["a", "a, bad", "bad 1, bad 2"]
    config = {"samples": 3, "pairs_per_question": 0}
    pairs, result, _ = made(RlaifV(RlaifVConfig(**config, min_gap=2)), ScriptedEngine(answers, claims_judge))
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == [("a", "bad 1, bad 2")]
    assert result.notes == {"possible pairs left out: scores are too similar": 2}
    pairs, result, _ = made(RlaifV(RlaifVConfig(**config, max_shorter=0.5)), ScriptedEngine(answers, claims_judge))
    assert {(pair["chosen"], pair["rejected"]) for pair in pairs} == {("a", "a, bad"), ("a, bad", "bad 1, bad 2")}
    assert result.notes == {"possible pairs left out: chosen response is much shorter": 1}
    assert len(made(RlaifV(RlaifVConfig(samples=3)), ScriptedEngine(answers, claims_judge))[0]) == 2


@pytest.mark.parametrize(
    ("judge", "reason"),
    [
        (lambda request: "maybe" if request.choices else claims_judge(request), "verdict on a claim is neither yes"),
        (lambda request: "- one" if "Statements:" in request.question else claims_judge(request), "number of quest"),
        (lambda request: "..." if "Answer: " in request.question else claims_judge(request), "response without a cl"),
    ],
)
def test_a_response_whose_claims_cannot_be_judged_is_skipped(judge: Any, reason: str) -> None:
    pairs, result, _ = made(RlaifV(RlaifVConfig(samples=2)), ScriptedEngine(["a, b", "a, bad"], judge))
    assert pairs == []
    assert {key[: len(reason)]: count for key, count in result.skipped.items() if key.startswith(reason)} == {
        reason: 2
    }


def test_generated_verdicts_replace_probabilities() -> None:
    def judge(request: Request) -> Any:
        return ("No, bad." if "bad" in request.question else "yes") if request.choices else claims_judge(request)

    pairs, _, records = made(RlaifV(RlaifVConfig(samples=2)), ScriptedEngine(["a, b", "a, bad"], judge))
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == [("a, b", "a, bad")]
    assert records[1]["verdicts"] == [[1.0, 0.0], [0.0, 1.0]]


def test_an_unclear_verdict_is_noted() -> None:
    def judge(request: Request) -> Any:
        return (0.1, 0.3) if "bad" in request.question and request.choices else claims_judge(request)

    pairs, result, _ = made(RlaifV(RlaifVConfig(samples=2)), ScriptedEngine(["a, b", "a, bad"], judge))
    assert len(pairs) == 1
    assert result.notes == {"pairs with an unclear verdict: P(yes) + P(no) is below 0.5": 1}


def test_a_refused_prompt_costs_only_its_response() -> None:
    class Refusing(ScriptedEngine):
        def _answer(self, request: Request) -> Generation:
            if request.role == "judge" and "bad" in request.question and "Statements" in request.question:
                return Generation((), "", "length", refusal="too long")
            return super()._answer(request)

    pairs, result, records = made(RlaifV(RlaifVConfig(samples=3)), Refusing(["a", "bad", "a, b"], claims_judge))
    assert pairs == []
    assert result.skipped["prompt for the questions refused by the engine"] == 1
    assert (records[1]["refusal"], "verdicts" in records[0]) == ("too long", True)


@pytest.mark.parametrize(
    ("text", "entries"),
    [
        ("Here they are:\n- one\n* two\n3. three\n4) four\n\n", ["one", "two", "three", "four"]),
        ("Facts:\nno marks\nhere", ["no marks", "here"]),
        ("- -5 is shown\n- ...", ["-5 is shown"]),
        ("1990 was cold.\nIt rained.", ["1990 was cold.", "It rained."]),
        ("", []),
    ],
)
def test_lists_of_a_model_are_read(text: str, entries: list[str]) -> None:
    assert read_list(text) == entries


def test_sentences_end_at_marks_and_lines() -> None:
    text = "It is 3.5 m. Is it?\nYes!\u3002\u4e00\u53ea\u732b\u3002\u4e24\u53ea\u72d7\u3002 ..."
    sentences = ["It is 3.5 m.", "Is it?", "Yes!\u3002", "\u4e00\u53ea\u732b\u3002", "\u4e24\u53ea\u72d7\u3002"]
    assert split_sentences(text) == sentences


def test_a_prompt_must_hold_its_fields() -> None:
    with pytest.raises(ValueError, match=r"claims_prompt must hold \{answer\} once, got 0 of them"):
        RlaifVConfig(claims_prompt="{question}")
    with pytest.raises(ValueError, match="best_rating must be at most 9, so that a rating is one digit, got 10"):
        JudgeConfig(best_rating=10)


def test_a_comparison_counts_if_both_orders_agree() -> None:
    def judge(request: Request) -> tuple[float, ...]:
        first = request.question.partition("Response A: ")[2].partition("\n")[0]
        second = request.question.partition("Response B: ")[2].partition("\n")[0]
        if "odd" in first + second:
            return (0.6, 0.2)  # always the first response
        return (0.6, 0.2) if first > second else (0.1, 0.3)

    pipeline = Judge(JudgeConfig(samples=4, pairs_per_question=0))
    pairs, result, _ = made(pipeline, ScriptedEngine(["b", "a", "odd", "c"], judge))
    found = {(pair["chosen"], pair["rejected"]): pair["provenance"]["scores"] for pair in pairs}
    assert found == {("b", "a"): [0.75, 0.25], ("c", "a"): [0.75, 0.25], ("c", "b"): [0.75, 0.25]}
    assert result.notes == {"comparisons whose verdict changes with the order of the responses": 3}
    assert result.stage_tokens == {"responses": 6, "verdicts": 12}
    limited = Judge(JudgeConfig(samples=4, pairs_per_question=1))
    assert sum(len(record.get("comparisons", ())) for record in made(limited, ScriptedEngine("bcad", judge))[2]) == 2


@pytest.mark.parametrize(
    ("in_order", "swapped", "note"),
    [
        ((0.5, 0.5), (0.5, 0.5), "comparisons that end in a tie"),
        ((0.6, 0.4), (0.5, 0.5), "comparisons that end in a tie"),
        ((0.5, 0.5), (0.6, 0.4), "comparisons that end in a tie"),
        ((0.4, 0.6), (0.5, 0.5), "comparisons that end in a tie"),
        ((0.6, 0.4), (0.6, 0.4), "comparisons whose verdict changes with the order of the responses"),
        ((0.4, 0.6), (0.4, 0.6), "comparisons whose verdict changes with the order of the responses"),
    ],
)
def test_a_tie_in_one_order_is_no_preference(
    in_order: tuple[float, ...], swapped: tuple[float, ...], note: str
) -> None:
    def judge(request: Request) -> tuple[float, ...]:
        return in_order if "Response A: good" in request.question else swapped

    pairs, result, _ = made(Judge(JudgeConfig(samples=2)), ScriptedEngine(["bad", "good"], judge))
    assert pairs == []
    assert result.notes == {note: 1}


def test_prompts_of_a_judge_quote_no_placeholder() -> None:
    assert quoted("<video>\nSee <image> and <video>.") == " \nSee   and  ."


@pytest.mark.parametrize(
    ("text", "is_pair"),
    [("{}", True), ("**Response {}**", True), ("Answer: {}.", True), ("{} good question", False), ("A or B", False)],
)
def test_a_generated_comparison_is_read(text: str, is_pair: bool) -> None:
    def judge(request: Request) -> str:
        return text.format("A" if "Response A: good" in request.question else "B")

    pairs, result, _ = made(Judge(JudgeConfig(samples=2)), ScriptedEngine(["bad", "good"], judge))
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == [("good", "bad")] * is_pair
    assert result.notes.get("comparisons whose verdict cannot be read", 0) == (not is_pair)


def test_ratings_are_means_of_probabilities_or_numbers() -> None:
    def judge(request: Request) -> Any:
        response = request.question.partition("Response: ")[2].partition("\n")[0]
        return {"good": (0.0, 0.0, 0.0, 0.25, 0.25), "fair": "Rating: 4/5", "poor": "1", "odd": "6"}[response]

    config = JudgeConfig(samples=4, mode="pointwise", pairs_per_question=0, min_gap=0.6)
    pairs, result, records = made(Judge(config), ScriptedEngine(["good", "fair", "poor", "odd"], judge))
    assert [record["rating"] for record in records] == [4.5, 4.0, 1.0, None]
    assert {(pair["chosen"], pair["rejected"]) for pair in pairs} == {("good", "poor"), ("fair", "poor")}
    assert result.skipped == {"rating cannot be read": 1}
    assert result.notes == {"possible pairs left out: scores are too similar": 1}


@pytest.mark.parametrize("name", JUDGED)
def test_a_judged_journal_cut_anywhere_is_completed(name: str, tmp_path: Path) -> None:
    items = write_items(tmp_path / "items.jsonl", 5)
    assert run(JUDGED[name](), items, tmp_path / "whole", block_size=8).pairs > 0
    journal = journal_path(tmp_path / "whole", 0, 1).read_bytes()
    expected = outputs(tmp_path / "whole")
    for size in range(0, len(journal), len(journal) // 23):
        journal_path(tmp_path / "whole", 0, 1).write_bytes(journal[:size])
        run(JUDGED[name](), items, tmp_path / "whole", block_size=8)
        assert journal_path(tmp_path / "whole", 0, 1).read_bytes() == journal
        assert outputs(tmp_path / "whole") == expected


@pytest.mark.parametrize("name", ["rlaif_v", "pairwise"])
def test_a_killed_judged_run_ends_with_the_same_bytes(name: str, tmp_path: Path) -> None:
    items = write_items(tmp_path / "items.jsonl", 20)
    run(JUDGED[name](), items, tmp_path / "whole")
    rng, kills = random.Random(name), 0
    for attempt in range(40):  # a run that was not killed in time ends whole: the next attempt begins again
        out = tmp_path / f"killed-{attempt}"
        for _ in range(2):
            kills += run_until_killed(
                lambda out=out: run(JUDGED[name](), items, out, StubEngine(delay_s=0.001), block_size=8),
                rng.uniform(0.02, 0.2),
            )
        run(JUDGED[name](), items, out, block_size=8)
        assert outputs(out) == outputs(tmp_path / "whole")
        if kills >= 2:
            return
    pytest.fail(f"only {kills} runs were killed before their end")


@pytest.mark.parametrize("name", JUDGED)
def test_a_streaming_engine_gives_the_same_judged_pairs(name: str, tmp_path: Path) -> None:
    items = write_items(tmp_path / "items.jsonl", 9)
    run(JUDGED[name](), items, tmp_path / "plain", block_size=4)
    run(JUDGED[name](), items, tmp_path / "streamed", StreamingStub(6), block_size=4)
    assert outputs(tmp_path / "streamed") == outputs(tmp_path / "plain")


def test_the_summary_has_the_tokens_of_each_stage(tmp_path: Path) -> None:
    items = write_items(tmp_path / "items.jsonl", 5)
    summary = run(JUDGED["rlaif_v"](), items, tmp_path / "out").to_dict()
    stages = summary["generated_tokens_by_stage"]
    assert list(stages) == ["responses", "claims", "questions", "verdicts"]
    assert sum(stages.values()) == summary["generated_tokens"]


def test_each_request_goes_to_the_engine_of_its_role(tmp_path: Path) -> None:
    items = write_items(tmp_path / "items.jsonl", 3)
    answer, judge = StubEngine(), StubEngine()
    engine = RoutedEngine(answer, judge)
    assert engine.settings() == {"engine": "stub", "judge": {"engine": "stub"}}
    run(JUDGED["rlaif_v"](), items, tmp_path / "routed", engine)
    run(JUDGED["rlaif_v"](), items, tmp_path / "one")
    assert {request.role for request in answer.requests} == {"answer"}
    assert {request.role for request in judge.requests} == {"judge"}
    assert outputs(tmp_path / "routed") == outputs(tmp_path / "one")
