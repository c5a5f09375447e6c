"""Reads the true answers of items."""

import re
from collections.abc import Mapping
from typing import Any

from mpo_ext.answers import label_options
from mpo_ext.answers.choices import read_choice
from mpo_ext.data.literals import read_literal
from mpo_ext.generate.item_options import FormError, indexed_answer, is_null, numbered_answer

_ANSWERS = ("answer_gt", "answer", "label", "answers")
_LETTERS = re.compile(r"[(\[]?[A-Za-z][)\].:]*(?:\s*[,;&]\s*[(\[]?[A-Za-z][)\].:]*)*")
# Names of fields that look like a true answer. Such a field is an error if the item has no other answer.
_ANSWER_NAME = re.compile(r"(?:^|_)(?:answers?|ground_?truths?)(?:_|$)|^(?:gt|gold|target)$")
_METADATA = re.compile(
    r"(?:^|_)(?:ids?|types?|format|style|source|language|category|count|num|number|n|length|unit|units|precision|range"
    r"|confidence|options|choices|candidates|explanation|rationale|reason|reasoning|instruction|prompt|chosen|rejected"
    r"|box|boxes|bbox|bboxes|mask|masks|split)(?:_|$)"
)

Options = list[str] | dict[str, str] | None


def take_truths(rest: dict[str, Any], options: Options, *, is_index: bool) -> list[str]:
    """Removes the answer field from ``rest``, and returns the true answers as texts. Returns [] without an answer.

    ``is_index`` says whether an integer answer is the index of an option, as in ScienceQA.

    Raises:
        FormError: If an answer cannot be read, or if ``answer_gt`` and ``answer`` differ. Also raised if the item has
            no answer, but an unknown field that looks like a true answer.
    """
    for name in _ANSWERS:
        if name in rest and _is_blank(rest[name]) and (rest[name] is not None or name in ("answer_gt", "answer")):
            del rest[name]  # test splits have no answers
    given = [name for name in _ANSWERS if rest.get(name) is not None]
    if not given:
        _refuse_unread(rest)
        return []
    truths = _read(given[0], rest, options, is_index=is_index)
    if given[:2] == ["answer_gt", "answer"] and set(_read("answer", rest, options, is_index=is_index)) != set(truths):
        raise FormError("the true answer must be given once, got answer_gt and answer with other texts")
    del rest[given[0]]
    return truths


def _refuse_unread(rest: Mapping[str, Any]) -> None:
    """Raises FormError if an unknown field looks like the true answer."""
    for key, value in rest.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        name = re.sub("([a-z])([A-Z])", r"\1_\2", key).casefold().replace("-", "_").replace(" ", "_")
        is_answer = bool(values) and all(
            isinstance(each, (str, int, float)) and not isinstance(each, bool) and not _is_blank(each)
            for each in values
        )
        if is_answer and _ANSWER_NAME.search(name) and not _METADATA.search(name):
            raise FormError(f"the field {key!r} looks like a true answer, and is not read: name it answer_gt")


def _read(name: str, rest: Mapping[str, Any], options: Options, *, is_index: bool) -> list[str]:
    """Returns the true answers in the field ``name`` as texts."""
    answer = rest[name]
    if isinstance(answer, str) and answer.strip() == "?" and (options is not None or "question_type" in rest):
        return []  # test splits have no answers
    if isinstance(answer, str) and (texts := _listed_answers(answer)):
        if rest.get("question_type") == "open":
            answer = texts
        elif all(isinstance(text, str) for text in texts):
            raise FormError(f"{name} must be a text or a list of texts, got a list written as text")
    if name == "label" and isinstance(answer, int) and answer in (0, 1) and options is None:
        raise FormError("label must be a text: 0 and 1 may also mean no and yes")
    if isinstance(answer, int) and not isinstance(answer, bool) and options is not None:
        return [indexed_answer(answer, options, is_index=is_index)]
    is_list = isinstance(answer, (list, tuple))
    answers = [each for each in answer if not _is_blank(each)] if is_list else [answer]
    if not all(isinstance(each, (str, int, float)) for each in answers):
        raise FormError(f"{name} must hold texts" if is_list else f"{name} must be a text or a list of texts")
    if options is None and any(isinstance(each, bool) for each in answers):
        raise FormError(f"{name} must be a text: true and false may also mean yes and no")
    return [_checked(_text(each), options, is_index=is_index) for each in answers]


def _text(answer: str | float) -> str:
    """Returns an answer as text. Tables store 7 as 7.0 if the column has missing values."""
    return str(int(answer)) if isinstance(answer, float) and answer.is_integer() else str(answer)


def _checked(text: str, options: Options, *, is_index: bool) -> str:
    """Checks a true answer, and converts an option index to the option's letter.

    ``is_index`` says whether an integer answer is the index of an option, as in ScienceQA.

    Raises:
        FormError: If the answer names no option, or if a number or a letter is ambiguous.
    """
    if options is None:
        return text
    if re.fullmatch(r"-?[0-9]{1,3}(?:\.0)?", text.strip()):
        return numbered_answer(text, options, is_index=is_index)
    labels = label_options(options)
    matching = [label for label, option in labels.items() if option.strip() == text.strip()]
    letter = text.strip().upper()
    if matching and letter in labels and matching != [letter]:
        raise FormError("answer must be a letter or the text of an option: this letter is also another option's text")
    if matching:
        return text
    if not _LETTERS.fullmatch(text.strip()):
        choice = read_choice(text, tuple(labels.items()))
        if not choice.letters or choice.is_unclear:
            raise FormError("answer must be a letter or the text of an option, got another text")
        return text
    if not set(re.findall("[A-Z]", letter)) <= set(labels):
        raise FormError(
            f"answer must be a letter or the text of an option, got {text.strip()} for {len(labels)} options"
        )
    return text


def _is_blank(value: Any) -> bool:
    """Returns whether an answer is missing: None, NaN, the text "nan", or only white space."""
    return is_null(value) or (isinstance(value, str) and not value.strip())


def _listed_answers(answer: str) -> list[Any] | None:
    """Parses a list that is written as text, as in MMMU: ``"['5', 'five']"`` becomes ``["5", "five"]``.

    Returns None if ``answer`` is not the text of a list.
    """
    try:
        answers = read_literal(answer) if answer.strip().startswith("[") else None
    except ValueError:
        return None
    return answers if isinstance(answers, list) else None
