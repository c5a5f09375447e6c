"""The matcher for multiple-choice answers."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import ClassVar

from mpo_ext.answers.base import Matcher, Verdict
from mpo_ext.answers.normalize import TO_ASCII, clean_answer, fold

_LONE_LETTER = re.compile(r"[(\[]?\s*([A-Za-z])\s*[)\].:]*")
_NAMED_LETTER = re.compile(
    r"(?:the\s+)?(?:correct\s+)?(?:answer|option|choice)(?:\s+is)?\s*:?\s*\(?([A-Za-z])\)?", re.IGNORECASE
)
_LETTER_AND_TEXT = re.compile(r"(?:[(\[]([A-Za-z])[)\]]\s*[.:]?|([A-Za-z])\s*[).:](?=\s))\s*(.+)", re.S)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceMatcher(Matcher):
    """Compares multiple-choice answers by the letter, in any of its usual forms, or by the text of the option.

    An answer with a letter and the text of another option ("B. Paris" if Paris is C) selects no option.

    Attributes:
        options: Option texts in the order A, B, ..., or a mapping from letter to text; None if they are unknown.
    """

    kind: ClassVar[str] = "choice"
    options: Sequence[str] | Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        if self.options is None:
            return
        if isinstance(self.options, str) or not isinstance(self.options, Sequence | Mapping):
            raise TypeError(f"options must be a list of texts or a mapping from letter to text, got {self.options!r}")
        label_options(self.options)

    def _compare(self, prediction: str, truth: str) -> Verdict:
        options = {} if self.options is None else label_options(self.options)
        texts = {label: _option_text(text) for label, text in options.items()}
        predicted, predicted_text = _read_choice(prediction, texts)
        true, true_text = _read_choice(truth, texts)
        if predicted and true:
            return self._verdict(predicted == true, "letter", predicted, true)
        same = predicted_text != "" and predicted_text == true_text
        return self._verdict(same, "text", predicted or predicted_text, true or true_text)


def label_options(options: Sequence[str] | Mapping[str, str]) -> dict[str, str]:
    """Returns the option texts by letter: A, B, ... for a list of texts, the keys for a mapping."""
    is_labelled = isinstance(options, Mapping)
    texts = list(options.values()) if isinstance(options, Mapping) else list(options)
    labels = list(options) if is_labelled else [chr(ord("A") + index) for index in range(len(texts))]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError(f"options must hold strings, got {options!r}")
    if not 0 < len(labels) <= 26:
        raise ValueError(f"options must hold 1 to 26 texts, got {len(labels)}")
    for label in labels:
        if not isinstance(label, str) or not re.fullmatch("[A-Z]", label):
            raise ValueError(f"options must be labelled with single letters A to Z, got {label!r}")
    return dict(zip(labels, texts, strict=True))


def _option_text(text: str) -> str:
    return fold(clean_answer(text.strip().strip("\"'")))


def _read_choice(answer: str, texts: Mapping[str, str]) -> tuple[str | None, str]:
    """Returns the letter of the option that an answer names, or None, and the normalized text of the answer.

    A letter stands alone, in brackets, or before a period, bracket or colon. The "A" in "A cat" is an article.
    """
    answer = clean_answer(answer.translate(TO_ASCII))
    whole = _option_text(answer)
    lone = _LONE_LETTER.fullmatch(answer) or _NAMED_LETTER.fullmatch(answer)
    if lone and (not texts or lone.group(1).upper() in texts):
        return lone.group(1).upper(), whole
    owners = [label for label, text in texts.items() if text == whole and text]
    if len(owners) == 1:
        return owners[0], whole
    both = _LETTER_AND_TEXT.fullmatch(answer)
    if both:
        label, text = (both.group(1) or both.group(2)).upper(), _option_text(both.group(3))
        owners = [owner for owner, option in texts.items() if option == text and text]
        if (not texts or label in texts) and (not owners or label in owners):
            return label, text
    return None, whole
