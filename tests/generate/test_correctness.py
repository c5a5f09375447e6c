"""Tests the pipeline Correctness: which samples become pairs, and which questions give no pair."""

import collections
import itertools
import random
from typing import Any

import pytest
from stub_engine import StubEngine

from mpo_ext.generate.correctness import Correctness, CorrectnessConfig
from mpo_ext.generate.engine import Generation
from mpo_ext.generate.items import Item
from mpo_ext.generate.outputs import ItemResult

ITEM = Item(question="How many?", truths=("7",))


def judged(texts: list[str], item: Item = ITEM, finish: dict[str, str] | None = None, **options: Any) -> ItemResult:
    """Returns the pipeline's result for a question. The model gives the responses ``texts``."""
    pipeline = Correctness(CorrectnessConfig(samples=len(texts), **options))
    script = {
        key: Generation(tuple(map(ord, text)), text, (finish or {}).get(text, "stop"))
        for key, text in zip(pipeline.keys(item), texts, strict=True)
    }
    engine = StubEngine(script=script)
    (records,) = pipeline.sample([item], engine)
    return pipeline.make_pairs(item, records, engine.name)


def answered(answer: object, steps: str = "Counting.") -> str:
    return f"{steps}\nFinal answer: {answer}"


def pairs(outcome: ItemResult, output: str = "pairs") -> list[tuple[str, str]]:
    return [(line["chosen"], line["rejected"]) for name, line in outcome.lines if name == output]


def test_right_samples_meet_wrong_and_unreadable_ones() -> None:
    outcome = judged([answered(7), answered(8), answered(9), "I cannot say."])
    assert sorted(pairs(outcome)) == [(answered(7), answered(8)), (answered(7), answered(9))]
    assert pairs(outcome, "format_pairs") == [(answered(7), "I cannot say.")]
    for name, line in outcome.lines:
        provenance = line["provenance"]
        assert provenance["pipeline"] == {"pairs": "correctness", "format_pairs": "format"}[name]
        assert provenance["chosen_answer"] == "7"
        assert provenance["accuracy"] == 0.25
        assert line["answer_gt"] == "7"


def test_the_same_answer_is_never_on_both_sides() -> None:
    """Tests that 7.4 and 7.5 make no pair, because they count as the same answer.

    For the truth 7 and a tolerance of 6%, 7.4 is right and 7.5 is wrong.
    """
    options = {"matcher": {"kind": "number", "relative": 0.06}}
    outcome = judged([answered("7.4"), answered("7.5"), answered("12")], **options)
    assert pairs(outcome) == [(answered("7.4"), answered("12"))]
    assert outcome.skipped["same answer on both sides"] == 1


@pytest.mark.parametrize(("right", "wrong"), [("1", "12"), ("no", "none"), ("D", "A"), ("5", "-5")])
def test_answers_that_contain_each_other_make_pairs(right: str, wrong: str) -> None:
    item = Item(question="Q", truths=(right,))
    assert pairs(judged([answered(right), answered(wrong)], item)) == [(answered(right), answered(wrong))]


@pytest.mark.parametrize("right", ["no", "one", "n", "none"])
def test_unreadable_samples_are_paired_whatever_the_answer(right: str) -> None:
    item = Item(question="Q", truths=(right,))
    outcome = judged([answered(right), "Hm."], item, matcher={"kind": "exact"})
    assert pairs(outcome, "format_pairs") == [(answered(right), "Hm.")]


def test_a_question_gives_no_more_pairs_than_asked() -> None:
    texts = [answered(7, f"Way {n}.") for n in range(5)] + [answered(8, f"Way {n}.") for n in range(5)]
    assert len(pairs(judged(texts))) == 15
    assert len(pairs(judged(texts, pairs_per_question=0))) == 25
    assert len(pairs(judged(texts, pairs_per_question=4))) == 4


def test_the_choice_depends_on_the_seed_and_on_no_order() -> None:
    texts = [answered(7, f"Way {n}.") for n in range(6)] + [answered(8, f"Way {n}.") for n in range(6)]
    expected = pairs(judged(texts))
    for attempt in range(5):
        random.Random(attempt).shuffle(texts)
        assert pairs(judged(texts)) == expected
    assert set(pairs(judged(texts, seed=1))) != set(expected)


def test_a_response_is_used_no_more_often_than_allowed() -> None:
    texts = [answered(7, f"Way {n}.") for n in range(3)] + [answered(8, f"Way {n}.") for n in range(6)]
    found = pairs(judged(texts, reuse_limit=2))
    assert len(found) == 6
    for side in (0, 1):
        assert max(collections.Counter(pair[side] for pair in found).values()) <= 2


def test_equal_responses_count_once_unless_told_otherwise() -> None:
    texts = [answered(7), answered(7) + "\n", answered(8), answered(8), answered(9)]
    outcome = judged(texts)
    assert len(pairs(outcome)) == 2
    assert outcome.skipped["sample is a duplicate"] == 2
    assert len(pairs(judged(texts, dedupe=False))) == 4  # no pair twice


def test_lengths_are_balanced_where_asked() -> None:
    right = [answered(7, "a " * count) for count in (10, 40, 160)]
    wrong = [answered(8, "b c " * count) for count in (5, 20, 80)]
    options = {"pairs_per_question": 3, "allow_degenerate": True}
    even = pairs(judged(right + wrong, length_balance=True, **options))
    assert sorted(even) == sorted(zip(right, wrong, strict=True))


@pytest.mark.parametrize(("accuracy", "count"), [((0.0, 1.0), 1), ((0.25, 0.25), 1), ((0.3, 1.0), 0), ((0.0, 0.2), 0)])
def test_the_accuracy_band(accuracy: tuple[float, float], count: int) -> None:
    outcome = judged([answered(7), answered(8), answered(8), answered(8)], accuracy=accuracy)
    assert len(pairs(outcome)) == count
    assert outcome.skipped["accuracy outside the band"] == 1 - count


def test_samples_that_teach_nothing_are_refused() -> None:
    loop = "I see a cat. " * 20
    texts = [answered(7), answered(8), "Cut", " ", loop]
    outcome = judged(texts, finish={"Cut": "length"})
    assert outcome.skipped == {
        "sample cut off at max_new_tokens": 1,
        "sample is empty": 1,
        "sample repeats itself": 1,
    }
    assert len(outcome.lines) == 1
    both = judged(texts, finish={"Cut": "length"}, allow_truncated=True, allow_degenerate=True)
    assert {rejected for _, rejected in pairs(both, "format_pairs")} == {"Cut", loop}


def test_questions_without_a_right_or_a_wrong_sample_give_no_pair() -> None:
    right_only = judged([answered(7), answered(7, "Looking.")])
    assert (right_only.lines, right_only.skipped) == ([], {"question with right answers only": 1})
    wrong_only = judged([answered(8), "Hm."])
    assert wrong_only.skipped == {"question without a right answer": 1}
    ((name, line),) = wrong_only.lines
    assert name == "unsolved"
    assert line == {
        "question": "How many?",
        "chosen": answered(8),
        "answer_gt": "7",
        "chosen_source": "wrong sample",
    }
    ((_, line),) = judged(["Hm.", "Hm?"]).lines
    assert "chosen" not in line


def test_an_unsolved_question_keeps_the_response_it_came_with() -> None:
    item = Item(question="Q", truths=("7",), chosen="By hand.\nFinal answer: 7")
    ((_, line),) = judged([answered(8), answered(9)], item).lines
    assert (line["chosen"], line["chosen_source"]) == (item.chosen, "input")


def test_any_of_several_truths_is_right() -> None:
    item = Item.from_dict({"question": "Q", "answer": ["7", "seven o'clock"]})
    outcome = judged([answered("seven o'clock"), answered(8)], item, matcher={"kind": "exact"})
    assert pairs(outcome) == [(answered("seven o'clock"), answered(8))]


def test_each_answer_is_matched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = Correctness(CorrectnessConfig(samples=6))
    texts = itertools.cycle([answered(7), answered(8, "x"), answered(8, "y")])
    script = {key: Generation((1,), next(texts), "stop") for key in pipeline.keys(ITEM)}
    asked: list[str] = []
    real = pipeline.scorer.matcher
    monkeypatch.setattr(pipeline.scorer, "matcher", lambda answer, truth: asked.append(answer) or real(answer, truth))
    pipeline.sample([ITEM], StubEngine(script=script))
    assert sorted(asked) == ["7", "8"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 1}, "samples must be at least 2, got 1"),
        ({"accuracy": (0.5, 0.2)}, r"accuracy must be two numbers in \[0, 1\], the lower first, got \(0.5, 0.2\)"),
        ({"pairs_per_question": -1}, "pairs_per_question must be at least 0, got -1"),
    ],
)
def test_bad_settings_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CorrectnessConfig(**options)


def test_a_template_is_in_the_prompt_and_in_the_pair() -> None:
    from mpo_ext.generate.prompts import TEMPLATES, render

    (name, template), *_ = TEMPLATES.items()
    pipeline = Correctness(CorrectnessConfig(samples=2, template=name, style="direct"))
    texts = dict(zip(pipeline.keys(ITEM), ("7", "8"), strict=True))
    engine = StubEngine(script={key: Generation((1,), text, "stop") for key, text in texts.items()})
    (records,) = pipeline.sample([ITEM], engine)
    ((_, pair),) = pipeline.make_pairs(ITEM, records, "stub").lines
    assert pair["question"] == engine.requests[0].question == render(template, "How many?") != "How many?"


def test_only_surely_wrong_samples_are_rejected() -> None:
    """Checks 10,000 samples in many forms: only right answers are chosen, and only clearly wrong ones are rejected."""
    rng = random.Random(0)
    right = [
        "{}",
        "{}.0",
        "x = {}",
        "about {}",
        "${}$",
        "The answer is $\\boxed{{{}}}$.",
        "**{}**",
        "{} ",
        "{}%",
        "\\${}",
    ]
    unsure = [
        "{} apples",
        "{}k",
        "{} or 3",
        "{}-40",
        "between 1 and {}",
        "at least {}",
        "not {}",
        "{}th",
        "{} million",
        "?",
    ]
    by_text: dict[str, str] = {}
    outcomes: collections.Counter[str] = collections.Counter()
    pipeline = Correctness(CorrectnessConfig(samples=20, matcher={"kind": "number"}, pairs_per_question=0))
    for number in range(500):
        truth = rng.randrange(20, 100)
        item = Item(question=f"Question {number}?", truths=(str(truth),))
        script = {}
        for key in pipeline.keys(item):
            kind = rng.choice(["right", "wrong", "unreadable", "missing"])
            value = truth + rng.randrange(1, 9) if kind == "wrong" else truth
            form = rng.choice(unsure if kind == "unreadable" else right)
            if kind == "wrong" and form.startswith("about"):
                form = "{}"
            text = answered(form.format(value), f"{key}.") if kind != "missing" else f"{key}. It is {truth}."
            by_text[text] = kind
            script[key] = Generation((1,), text, "stop")
        (records,) = pipeline.sample([item], StubEngine(script=script))
        outcome = pipeline.make_pairs(item, records, "stub")
        outcomes.update(name for name, _ in outcome.lines)
        outcomes["unreadable"] += outcome.skipped["answer of the sample is unreadable"]
        assert {by_text[chosen] for chosen, _ in pairs(outcome)} <= {"right"}
        assert {by_text[rejected] for _, rejected in pairs(outcome)} <= {"wrong"}
        assert {by_text[rejected] for _, rejected in pairs(outcome, "format_pairs")} <= {"missing"}
    counts = collections.Counter(by_text.values())
    assert counts.total() == 10_000
    assert outcomes["pairs"] > 10_000
    assert outcomes["unreadable"] == counts["unreadable"]


def test_samples_of_older_journals_are_scored_again() -> None:
    """Tests that stored scores are computed again, because earlier versions stored some wrong ones.

    Earlier versions stored the answer "7 apples" as wrong when the truth is 7. The matcher cannot read this answer, so
    it is neither right nor wrong, and must not be the rejected response.
    """
    pipeline = Correctness(CorrectnessConfig(samples=3, matcher={"kind": "number"}))
    old = [("7", True), ("7 apples", False), ("8", False)]
    records = [
        {"key": key, "text": answered(answer), "finish": "stop", "tokens": 1, "answer": answer}
        | {"correct": correct, "score": float(correct), "rule": "number:value"}
        for key, (answer, correct) in zip(pipeline.keys(ITEM), old, strict=True)
    ]
    assert pairs(pipeline.make_pairs(ITEM, records, "stub")) == [(answered(7), answered(8))]


def test_a_wrong_chosen_response_stays_marked() -> None:
    first = judged([answered(8), answered(9)], Item(question="How many?", truths=("7",)))
    ((name, line),) = first.lines
    assert (name, line["chosen_source"]) == ("unsolved", "wrong sample")
    again = Item.from_dict(line)
    assert judged([answered(8), answered(9)], again).lines[0][1] == line
    given = judged([answered(8)] * 2, Item(question="Q", truths=("7",), chosen="7"))
    assert given.lines[0][1]["chosen_source"] == "input"
    ((name, pair),) = judged([answered(7), answered(9)], again).lines
    assert (name, pair["chosen"], "chosen_source" in pair) == ("pairs", answered(7), False)


def test_the_options_of_an_item_decide_about_its_answers() -> None:
    item = Item.from_dict({"question": "Where?", "options": ["Rome", "Paris"], "answer": "B"})
    outcome = judged([answered("Paris"), answered("Rome"), answered("London")], item, matcher={"kind": "choice"})
    assert pairs(outcome) == [(answered("Paris"), answered("Rome"))]
    assert outcome.skipped["answer of the sample is unreadable"] == 1


@pytest.mark.parametrize(
    "matcher",
    [
        {"kind": "vqa"}, {"kind": "number"}, {"kind": "math"}, {"kind": "anls"}, {"kind": "chart"}, {"kind": "exact"},
        {"kind": "any", "matchers": ["vqa", "number"]},
    ],
)  # fmt: skip
@pytest.mark.parametrize("truth", ["B", "Paris"])
def test_a_matcher_without_options_does_not_decide_about_options(matcher: dict[str, Any], truth: str) -> None:
    item = Item.from_dict({"question": "Where?", "options": ["Rome", "Paris"], "answer": truth})
    for right in ("Paris", "B", "(B)", "B. Paris"):
        outcome = judged([answered(right), answered("A")], item, matcher=matcher)
        assert pairs(outcome) == [(answered(right), answered("A"))]
