"""Tests that the word check finds each banned phrase, also across a line break, and accepts plain sentences."""

import importlib.util
from pathlib import Path

import pytest

SPEC = importlib.util.spec_from_file_location("check_words", Path(__file__).parents[1] / "tools" / "check_words.py")
assert SPEC is not None
assert SPEC.loader is not None
check_words = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(check_words)


@pytest.mark.parametrize(
    "text",
    [
        "a run goes on",  # words: ignore
        "# the run that was\n# ended early",  # words: ignore
        "Begins anew.",  # words: ignore
        "    // a file of its\n    // own",  # words: ignore
        "the value is no number",  # words: ignore
    ],
)
def test_a_banned_phrase_is_found_with_its_line(text: str) -> None:
    ((number, message),) = check_words.check_text(f"first line\n{text}\n")
    assert number == 2
    assert "write" in message


def test_plain_sentences_pass() -> None:
    text = "The interrupted run resumes.\nThe value is no longer used, and a file that is missing is an error.\n"
    assert list(check_words.check_text(text)) == []


def test_a_docstring_must_begin_with_its_verb() -> None:
    bad = 'def f():\n    """What it returns."""\n'
    assert [number for number, _ in check_words.check_docstrings(bad)] == [2]
    assert list(check_words.check_docstrings('def f():\n    """Returns 1."""\n')) == []


def test_a_line_can_keep_a_phrase_on_purpose() -> None:
    assert list(check_words.check_text("begins anew  # words: ignore\n")) == []


def test_every_tracked_file_passes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    status = check_words.main([])
    assert status == 0, capsys.readouterr().out


def test_other_files_are_not_checked_in_place_of_a_skipped_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_words.main(["LICENSE"]) == 0
    assert capsys.readouterr().out == "words: 0 files are clean\n"
