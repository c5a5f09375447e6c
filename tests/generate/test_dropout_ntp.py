"""Tests the pipeline DropoutNTP: where it cuts responses, which prompts it makes, which continuations it rejects."""

import json
from pathlib import Path
from typing import Any

import pytest
from stub_engine import StubEngine

from mpo_ext.chat import Conversation
from mpo_ext.generate.dropout_ntp import DropoutNTP, DropoutNTPConfig
from mpo_ext.generate.engine import Generation, SamplingConfig
from mpo_ext.generate.items import Item, item_files, read_items
from mpo_ext.generate.outputs import ItemResult
from mpo_ext.generate.questions import without_placeholders
from mpo_ext.generate.runner import run

CHOSEN = "The left bar is 3, the right bar is 4. Together they are 7.\nFinal answer: 7"


def pairs_of(item: Item, text: str, finish: str = "stop", **options: Any) -> ItemResult:
    """Returns the pipeline's result for a question to which the model always gives the continuation ``text``."""
    pipeline = DropoutNTP(DropoutNTPConfig(**options))
    engine = StubEngine(script=dict.fromkeys(pipeline.keys(item), Generation(tuple(map(ord, text)), text, finish)))
    (records,) = pipeline.sample([item], engine)
    return pipeline.make_pairs(item, records, engine.name)


@pytest.mark.parametrize("keep", [0, 0.25, 0.5, 0.75])
def test_the_share_that_is_kept(keep: float) -> None:
    outcome = pairs_of(Item(question="Q", chosen=CHOSEN), " and so on", keep=keep)
    ((_, pair),) = outcome.lines
    cut = int(len(CHOSEN) * keep)
    assert pair["rejected"] == CHOSEN[:cut] + " and so on"
    assert pair["provenance"]["cut"] == {"characters": cut, "tokens": cut}


def test_words_are_cut_as_the_authors_cut_them() -> None:
    outcome = pairs_of(Item(question="Q", chosen="one two\nthree four five"), " six", unit="words")
    assert outcome.lines[0][1]["rejected"] == "one two\nthree six"
    one_word = Item(question="Q", chosen="\u8fd9\u662f\u4e00\u53ea\u732b")
    assert pairs_of(one_word, "\u72d7", unit="words").skipped == {"chosen response too short to cut": 1}
    assert pairs_of(one_word, "\u72d7").lines[0][1]["rejected"] == "\u8fd9\u662f\u72d7"


def test_a_cut_in_tokens_keeps_characters_whole() -> None:
    class Bytes(StubEngine):
        def encode(self, text: str) -> list[int]:
            return list(text.encode())

        def decode(self, token_ids: Any) -> str:
            return bytes(token_ids).decode(errors="replace")

    for keep in (0.1, 0.25, 0.4, 0.5, 0.75, 0.9):
        prefix = DropoutNTP(DropoutNTPConfig(keep=keep)).cut("\u8fd9\u662f\u4e00\u53ea\u732b", Conversation(), Bytes())
        assert "\u8fd9\u662f\u4e00\u53ea\u732b".startswith(prefix.text)
        assert len(prefix.token_ids) == len(prefix.text.encode()) > 15 * keep - 3


def test_the_model_sees_the_question_without_its_image(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    item = Item(question="<image>\nHow many?", images=("a.png",), chosen=CHOSEN, image_root=str(tmp_path))
    engine = StubEngine()
    DropoutNTP().sample([item], engine)
    DropoutNTP(DropoutNTPConfig(with_image=True)).sample([item], engine)
    blind, seeing = engine.requests
    assert (blind.question, blind.images) == ("How many?", ())
    assert (seeing.question, [image.size for image in seeing.images]) == ("<image>\nHow many?", [(4, 4)])
    assert engine.decode(blind.prefix_ids) == CHOSEN[: len(CHOSEN) // 2]


def test_the_pair_keeps_the_image_and_the_whole_question() -> None:
    ((_, pair),) = pairs_of(Item(question="<image>\nWhy?", images=("missing.png",), chosen=CHOSEN), " never").lines
    assert (pair["question"], pair["images"], pair["chosen"]) == ("<image>\nWhy?", ["missing.png"], CHOSEN)


@pytest.mark.parametrize(
    ("question", "expected"),
    [("<image>\nWhy?", "Why?"), ("See <image> and <image>\n.", "See  and ."), ("Why?", "Why?")],
)
def test_placeholders_go(question: str, expected: str) -> None:
    assert without_placeholders(question) == expected


REST = CHOSEN[len(CHOSEN) // 2 :]


@pytest.mark.parametrize(
    ("text", "finish", "reason"),
    [
        (REST, "stop", "continuation equals the chosen response"),
        (f"{REST} \n", "stop", "continuation equals the chosen response"),
        ("", "stop", "continuation is empty"),
        (" and 8", "length", "continuation cut off at max_new_tokens"),
        (" and then" * 20, "stop", "continuation repeats itself"),
        (" half \ufffd", "stop", "continuation holds a broken character"),
        (" is 5.\nFinal answer: 7", "stop", "answer is still right"),
        (" is 5.\nFinal answer: seven", "stop", "answer is still right"),
    ],
)
def test_continuations_that_teach_nothing_are_refused(text: str, finish: str, reason: str) -> None:
    outcome = pairs_of(Item(question="Q", chosen=CHOSEN, truths=("7",)), text, finish)
    assert outcome.skipped == {reason: 1}
    assert outcome.lines == []
    assert outcome.tokens == len(text)


@pytest.mark.parametrize(
    ("text", "finish", "options"),
    [
        (" is 5.\nFinal answer: 8", "stop", {}),
        (" is 5.\nFinal answer: 17", "stop", {}),
        (" is 5.\nFinal answer: -7", "stop", {"matcher": {"kind": "number"}}),
        (" and nothing more", "stop", {}),
        (" and 8", "length", {"allow_truncated": True}),
        (" is 5.\nFinal answer: 7", "stop", {"matcher": None}),
    ],
)
def test_negatives_are_taken(text: str, finish: str, options: dict) -> None:
    outcome = pairs_of(Item(question="Q", chosen=CHOSEN, truths=("7",)), text, finish, **options)
    assert [pair["rejected"] for _, pair in outcome.lines] == [CHOSEN[: len(CHOSEN) // 2] + text]
    assert outcome.skipped == {}


def test_equal_samples_give_one_pair() -> None:
    outcome = pairs_of(Item(question="Q", chosen=CHOSEN), " never", samples=3)
    assert len(outcome.lines) == 1
    assert outcome.skipped == {"continuation is a duplicate": 2}


def test_samples_have_seeds_of_their_own() -> None:
    engine = StubEngine()
    item = Item(question="Q", chosen=CHOSEN)
    for seed in (0, 1):
        DropoutNTP(DropoutNTPConfig(samples=4, seed=seed)).sample([item], engine)
    assert len({request.seed for request in engine.requests}) == 8


def test_a_missing_chosen_response_is_sampled_with_the_image(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    item = Item(question="<image>\nWhy?", images=("a.png",), image_root=str(tmp_path))
    pipeline = DropoutNTP(DropoutNTPConfig(sample_chosen=True))
    (key,) = pipeline.keys(item)
    script = {item.digest: Generation((), "It is red.", "stop"), key: Generation((33,), "!", "stop")}
    engine = StubEngine(script=script)
    (records,) = pipeline.sample([item], engine)
    ((_, pair),) = pipeline.make_pairs(item, records, "stub").lines
    assert [len(request.images) for request in engine.requests] == [1, 0]
    assert (pair["chosen"], pair["rejected"]) == ("It is red.", "It is!")
    assert pair["provenance"]["chosen_source"] == "sample"
    for text, finish, reason in (
        ("It is red.\nFinal answer: 8", "stop", "sampled chosen response is wrong"),
        ("It is red.", "length", "sampled chosen response cut off at max_new_tokens"),
        ("red red red " * 30, "stop", "sampled chosen response repeats itself"),
        ("  \n ", "stop", "sampled chosen response is empty"),
        ("", "stop", "sampled chosen response is empty"),
    ):
        known = Item(question="Why?", truths=("7",))
        engine.script = {known.digest: Generation((), text, finish)}
        (records,) = pipeline.sample([known], engine)
        assert pipeline.make_pairs(known, records, "stub").skipped == {reason: 1}


def test_unsolved_questions_are_items_for_it(tmp_path: Path) -> None:
    from mpo_ext.generate.correctness import Correctness, CorrectnessConfig

    items = tmp_path / "items.jsonl"
    items.write_text("".join(json.dumps({"question": f"Q{n}", "answer_gt": "impossible"}) + "\n" for n in range(9)))
    pipeline = Correctness(CorrectnessConfig(samples=4))
    first = run(pipeline, StubEngine(), items, tmp_path / "first", stream=None)
    unsolved = tmp_path / "first" / "unsolved.jsonl"
    taken = DropoutNTP(DropoutNTPConfig(allow_wrong_chosen=True))
    second = run(taken, StubEngine(), unsolved, tmp_path / "second", stream=None)
    assert first.lines == {"pairs": 0, "format_pairs": 0, "unsolved": 9}
    assert second.items == 9
    assert second.pairs > 4
    note = "pairs whose chosen response is a sample that was wrong"
    assert second.notes == {note: second.pairs}
    assert f"{note}: {second.pairs}" in str(second)
    pair = json.loads((tmp_path / "second" / "pairs.jsonl").read_text().splitlines()[0])
    assert pair["provenance"]["chosen_source"] == "wrong sample"


def test_a_chosen_response_that_was_wrong_is_left_out_and_counted(tmp_path: Path) -> None:
    item = {"question": "Q", "answer_gt": "5", "chosen": "It is 6 .", "chosen_source": "wrong sample"}
    items = tmp_path / "items.jsonl"
    items.write_text(json.dumps(item) + "\n" + json.dumps({**item, "chosen_source": "input"}) + "\n")
    engine = StubEngine()
    summary = run(DropoutNTP(), engine, items, tmp_path / "out", stream=None)
    assert summary.skipped["chosen is a sample that was wrong (--allow-wrong-chosen takes it)"] == 1
    assert len(engine.requests) == 1
    # A journal from before this rule resumes, and its records give no pair.
    assert "allow_wrong_chosen" not in DropoutNTP().settings()
    (wrong, _) = read_items(item_files(items))
    records = [{"key": "k", "text": "It is 7 .", "finish": "stop", "tokens": 2, "cut": {"characters": 5, "tokens": 2}}]
    assert not DropoutNTP().make_pairs(wrong, records, "stub").lines
    assert DropoutNTP(DropoutNTPConfig(allow_wrong_chosen=True)).make_pairs(wrong, records, "stub").lines


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"keep": 1.0}, ValueError, r"keep must be in \[0, 1\), got 1.0"),
        ({"keep": "half"}, TypeError, r"keep must be a number, got 'half'"),
        ({"unit": "bytes"}, ValueError, r"unit must be one of tokens, words, got 'bytes'"),
        ({"samples": 0}, ValueError, r"samples must be at least 1, got 0"),
        ({"style": "loud"}, ValueError, r"style must be one of .* got 'loud'"),
        ({"matcher": {"kind": "guess"}}, ValueError, r"kind must be one of .* got 'guess'"),
    ],
)
def test_bad_settings_are_named(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DropoutNTP(DropoutNTPConfig(**options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature must be finite and not negative, got -1"),
        ({"top_p": 0}, r"top_p must be in \(0, 1\], got 0"),
        ({"top_k": -1}, "top_k must be at least 0, got -1"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
    ],
)
def test_bad_sampling_settings_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**options)


@pytest.mark.parametrize(
    ("ending", "matcher", "skipped"),
    [
        ("\nFinal answer: 8", {"kind": "number"}, {}),
        ("\nFinal answer: seven", {"kind": "number"}, {"answer is still right": 1}),
        ("\nFinal answer: 7 apples", {"kind": "number"}, {"answer is unreadable, and may still be right": 1}),
        ("\nIt is 7 apples", {"kind": "number"}, {}),  # no answer in this style: the method needs none
        ("\nFinal answer: 7 apples", None, {}),
    ],
)
def test_an_unreadable_answer_may_still_be_right(ending: str, matcher: dict | None, skipped: dict[str, int]) -> None:
    outcome = pairs_of(Item(question="Q", chosen=CHOSEN, truths=("7",)), ending, matcher=matcher)
    assert outcome.skipped == skipped
    assert len(outcome.lines) == 1 - len(skipped)


def test_a_sampled_chosen_response_has_a_right_answer_if_the_answer_is_known() -> None:
    item = Item(question="Why?", truths=("7",))
    pipeline = DropoutNTP(DropoutNTPConfig(sample_chosen=True, matcher={"kind": "number"}))
    (key,) = pipeline.keys(item)
    for text, skipped in (
        ("Long enough.\nFinal answer: seven", {}),
        ("Long enough.\nFinal answer: 7 or 8", {"sampled chosen response has no readable answer": 1}),
        ("Long enough.\nIt is 7.", {"sampled chosen response has no readable answer": 1}),
    ):
        engine = StubEngine(script={item.digest: Generation((), text, "stop"), key: Generation((33,), "!", "stop")})
        (records,) = pipeline.sample([item], engine)
        assert pipeline.make_pairs(item, records, "stub").skipped == skipped


def test_an_empty_sampled_response_of_an_older_journal_makes_no_pair() -> None:
    item = Item(question="Why?")
    pipeline = DropoutNTP(DropoutNTPConfig(sample_chosen=True))
    (key,) = pipeline.keys(item)
    record = {
        "key": key,
        "chosen": " \n",
        "chosen_tokens": 2,
        "text": " red",
        "finish": "stop",
        "tokens": 1,
        "cut": {},
    }
    assert pipeline.make_pairs(item, [record], "stub").skipped == {"sampled chosen response is empty": 1}
