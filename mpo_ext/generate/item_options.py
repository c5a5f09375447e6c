"""Reads the options of items, and converts answers that are option indices to letters."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mpo_ext.answers import label_options
from mpo_ext.data.literals import read_literal

_COLUMNS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_LISTS = ("options", "choices", "candidates")
# Names of fields with one option each: "A", "choice_a", "option_a", "opa".
_SERIES = (
    "{upper}",
    "choice_{lower}",
    "choice_{upper}",
    "option_{lower}",
    "option_{upper}",
    "op{lower}",
    "option{upper}",
)
_OPTIONS_NAME = re.compile(
    r"(?:^|_)(?:choices?|options?|opts?|candidates?|distractors?|endings?)_?(?:[0-9]+|[a-z])?(?:_|$)"
)
_LETTERED = re.compile(r"(?:\(([A-Z])\)|([A-Z])[.):])\s+(?=\S)")  # "A. cat", "(A) cat", "A) cat", "A: cat"
_METADATA = re.compile(r"(?:^|_)(?:ids?|types?|count|num|number|n|source|format|style|language|split)(?:_|$)")


class FormError(ValueError):
    """Raised for an item that cannot be used; the message is the item's ``problem``."""


def is_missing(value: Any) -> bool:
    """Returns whether a value is the text "nan" or "NaN", which pandas writes for a missing value."""
    return isinstance(value, str) and value.strip() in ("nan", "NaN")


def is_nan(value: Any) -> bool:
    """Returns whether a value is the number NaN, with which tables write a missing value."""
    return isinstance(value, float) and math.isnan(value)


def is_null(value: Any) -> bool:
    """Returns whether a value is missing: None, NaN, or the text "nan"."""
    return value is None or is_nan(value) or is_missing(value)


def shows_options(question: str, options: Sequence[str] | Mapping[str, str]) -> bool:
    """Returns whether a question shows all its options in a form such as "A. text"."""
    return all(_shows_option(question, *option) for option in label_options(options).items())


def _shows_option(question: str, letter: str, text: str) -> bool:
    """Returns whether a question shows an option in a form such as "A. text".

    "A. 12" does not show the option "1", and "AA. 1" does not show the option A.
    """
    forms = (f"{letter}. {text}", f"({letter}) {text}", f"{letter}) {text}", f"{letter}: {text}")
    # Only ASCII words are separated by spaces.
    end = r"(?![A-Za-z0-9]|[.,][0-9])" if re.search(r"[A-Za-z0-9]\Z", text) else ""
    return any(re.search(rf"(?<![A-Za-z0-9]){re.escape(form)}{end}", question) for form in forms)


def take_options(rest: dict[str, Any]) -> tuple[list[str] | dict[str, str] | None, bool]:
    """Removes the options from ``rest``, the fields of an item, and returns the options.

    Returns:
        - The options as a list of texts or a dict from letter to text; None if the item has no options.
        - Whether an integer answer is the index of an option, as in ScienceQA.

    Raises:
        FormError: If options cannot be read, or if an unknown field looks like options.
    """
    taken = {key: rest.pop(key) for key in _LISTS if key in rest}
    options = [(key, parsed) for key, value in taken.items() if (parsed := parse_options(key, value)) is not None]
    for key, parsed in options[1:]:
        if parsed != options[0][1]:
            raise FormError(f"{options[0][0]} and {key} differ")
    if options:
        return options[0][1], options[0][0] == "choices"
    series = [texts for name in _SERIES if (texts := _take_series(rest, name)) is not None]
    if len(series) > 1 and any(texts != series[0] for texts in series):
        raise FormError("options must be given once, got different options in two series of fields")
    if series:
        return series[0], False
    for key, value in rest.items():
        name = re.sub("([a-z])([A-Z])", r"\1_\2", key).casefold().replace("-", "_").replace(" ", "_")
        is_content = isinstance(value, (str, list, tuple, Mapping)) and bool(value) and not is_missing(value)
        if is_content and _OPTIONS_NAME.search(name) and not _METADATA.search(name):
            raise FormError(f"the field {key!r} looks like options, and is not read: name it options")
    letters = {letter for letter in _COLUMNS.lower() if _is_text(rest.get(letter))}
    answers = {str(rest.get(name)).strip().casefold() for name in ("answer_gt", "answer", "label")}
    if {"a", "b"} <= letters and answers & letters:
        raise FormError("the fields 'a' and 'b' look like options, and are not read: name them A and B")
    return None, False


def _take_series(rest: dict[str, Any], name: str) -> list[str] | None:
    """Removes fields such as ``choice_a`` and ``choice_b`` from ``rest``, and returns their values, the options.

    ``name`` is the format string of the field names, here ``"choice_{lower}"``. With fewer than two options, nothing
    is removed, and None is returned.
    """
    keys = {letter: name.format(upper=letter, lower=letter.lower()) for letter in _COLUMNS}
    values = {letter: rest[key] for letter, key in keys.items() if key in rest}
    texts: list[str] = []
    for letter in _COLUMNS:
        if not _is_text(values.get(letter)):
            break
        texts.append(str(values[letter]))
    if len(texts) < 2:
        return None
    for letter in _COLUMNS[len(texts) :]:
        if _is_text(values.get(letter)):
            raise FormError(f"option {letter} stands after an empty option")
        value = values.get(letter)
        if not (value is None or isinstance(value, str) or is_nan(value)):
            raise FormError(f"option {letter} must be a text")
    for letter in values:
        del rest[keys[letter]]  # the remaining fields are empty: the question has fewer options than others
    return texts


def _is_text(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and not is_nan(value)
    return is_number or (isinstance(value, str) and bool(value.strip()) and not is_missing(value))


def parse_options(key: str, value: Any) -> list[str] | dict[str, str] | None:
    """Converts options to a list of texts, or to a dict from letter to text. Returns None for an empty value.

    If each text begins with the letter of its option, as in "A. cat", the letters are removed.

    Args:
        key: Name of the field in error messages.
        value: A list of texts, a dict from letter to text, or a dict with two lists, ``text`` and ``label``. Each of
            these may also be written as a string in Python or JSON notation, as in MMMU.

    Raises:
        FormError: If the value has another form, or more than 26 options. Also raised if the labels are not different
            letters from A to Z, or the texts begin with these letters in another order.
    """
    if isinstance(value, str):
        if not value.strip() or is_missing(value):
            return None
        try:
            value = read_literal(value)
        except ValueError:
            raise FormError(f"{key} must be a list of texts") from None
        if isinstance(value, str):
            raise FormError(f"{key} must be a list of texts")
    if value is None or is_nan(value) or (isinstance(value, (Sequence, Mapping)) and not value):
        return None
    if isinstance(value, Mapping) and set(value) == {"text", "label"}:
        texts, labels = value["text"], value["label"]
        if not isinstance(texts, list) or not isinstance(labels, list) or len(texts) != len(labels):
            raise FormError(f"{key} must have as many texts as labels")
        value = dict(zip(map(str, labels), texts, strict=True))
    if isinstance(value, Mapping):
        options: list[str] | dict[str, str] = {
            str(label).strip().upper(): _option(key, t) for label, t in value.items()
        }
        if len(options) < len(value):
            raise FormError(f"{key} must have different labels")
    elif isinstance(value, (list, tuple)):
        options = [_option(key, text) for text in value]
    else:
        raise FormError(f"{key} must be a list of texts")
    try:
        labels = label_options(options)
    except (TypeError, ValueError):
        raise FormError(f"{key} must be 1 to 26 texts, labelled A to Z if they have labels") from None
    matches = [_LETTERED.match(text) for text in labels.values()]
    letters = [match[1] or match[2] for match in matches if match]
    if len(labels) < 2 or sorted(letters) != sorted(labels):
        return options
    if letters != list(labels):
        raise FormError(f"{key} must have texts whose letters are in order, such as 'A. cat' before 'B. dog'")
    texts = [text[match.end() :] for text, match in zip(labels.values(), matches, strict=True) if match]
    return dict(zip(labels, texts, strict=True)) if isinstance(options, dict) else texts


def _option(key: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)) or is_nan(value):
        raise FormError(f"{key} must hold texts")
    return str(value)


def indexed_answer(answer: int, options: list[str] | dict[str, str], *, is_index: bool) -> str:
    """Returns the letter of the option to which an integer answer refers.

    With ``is_index``, the answer is an index, and 0 is the first option. If the index is out of range, the answer must
    be the text of an option, such as "4" for the answer 4.

    Without ``is_index``, the answer must be the text of an option. It must not be the index of another option.

    Args:
        answer: The answer.
        options: Texts of the options, or a dict from letter to text.
        is_index: Whether an integer answer is the index of an option, as in ScienceQA.

    Raises:
        FormError: If the answer may refer to several options, or refers to no option.
    """
    labels = label_options(options)
    matching = [label for label, text in labels.items() if text.strip() == str(answer)]
    letter = list(labels)[answer] if 0 <= answer < len(labels) else None
    if is_index and letter is not None:
        return letter
    if len(matching) == 1 and letter in (None, *matching):
        return matching[0]
    raise FormError("answer must be a letter or the text of an option: a number may be an index from 0 or from 1")


def numbered_answer(answer: str, options: list[str] | dict[str, str], *, is_index: bool) -> str:
    """Returns the option to which a number in a string, such as ``"2"``, refers.

    If ``answer`` equals the text of an option, the result is ``answer``. Otherwise, the result is the letter from
    ``indexed_answer``.

    Args:
        answer: The number as a string.
        options: Texts of the options, or a dict from letter to text.
        is_index: Whether an integer answer is the index of an option (0 for the first option), as in ScienceQA. False:
            the answer must be the text of an option.

    Raises:
        FormError: If the answer fits several options, or no option.
    """
    labels = label_options(options)
    matching = [label for label, text in labels.items() if text.strip() == answer.strip()]
    index = int(float(answer))
    if matching and (not is_index or not 0 <= index < len(labels) or matching == [list(labels)[index]]):
        return answer
    if matching:
        raise FormError("answer must be a letter or the text of an option: this number may be the text or the index")
    return indexed_answer(index, options, is_index=is_index)
