"""The matcher for multiple-choice answers."""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import ClassVar

from mpo_ext.answers.base import Matcher, Verdict
from mpo_ext.answers.extract import all_boxes, last_box
from mpo_ext.answers.normalize import TO_ASCII, clean_answer, fold
from mpo_ext.answers.number_text import parse_number
from mpo_ext.answers.numbers import NumberRule
from mpo_ext.answers.word_answers import compare_texts, is_no_answer
from mpo_ext.checks import shorten

_LONE_LETTER = re.compile(r"[(\[{]?\s*([A-Za-z])\s*[)\]}.:,]*")
_LEAD = re.compile(
    r"(?:(?:so|thus|therefore|hence)\b,?\s+)?(?:(?:i\s+(?:choose|pick|select|think|believe)|(?:the|my)\b)\s+)?"
    r"(?:(?:best|correct|final|right)\s+)*"
    r"(?:(?:answer|option|options|choice|choices|letter|letters|it)\b(?:\s+(?:is|are|would\s+be))?\s*:?\s*)+",
    re.IGNORECASE,
)
_TAIL = re.compile(
    r"\s+(?:(?:is|are)\s+(?:the\s+)?(?:correct|right|true|best)(?:\s+(?:answer|option|choice)s?)?)$", re.I
)
_SEPARATOR = r"(?:\s*(?:,|;|&|\+|\band\b)\s*)+"
_BRACKETED = r"(?:[(\[]\s*[A-Za-z]\s*[)\]]|[A-Za-z]\b[).]?)"
_SEVERAL = re.compile(rf"{_BRACKETED}(?:{_SEPARATOR}{_BRACKETED})+\s*", re.IGNORECASE)
_ROW = re.compile(r"(?:[(\[]\s*[A-Za-z]\s*[)\]]\s*){2,}|[A-Z](?:\s+[A-Z])+|[A-Z]{2,}")
_LETTER_AND_TEXT = re.compile(
    r"(?:[(\[]\s*([A-Za-z])\s*[)\]]\s*[.:,-]?|([A-Za-z])\s*[).:](?=\s)|([A-Z])\s+[-,=](?=\s)|([A-Z])(?=\s*[(\[\n]))\s*(.+)",
    re.S,
)
_DOUBT = re.compile(
    r"\b(?:or|not|wrong|incorrect|instead|but|wait|either|neither|isn't|cannot|can't|answer|option|choice|however)\b"
)
_NAMED_LETTERS = re.compile(
    rf"(?:either\s+|not\s+|neither\s+|both\s+)?{_BRACKETED}(?:\s*(?:/|\b(?:or|nor|and)\b)\s*{_BRACKETED})*\s*\??", re.I
)
_LAST_UNKNOWN = "J"  # if the options are unknown, letters after "J" are read as a word ("NO"), not as a selection
_OTHER_LETTER = re.compile(
    r"[(\[]\s*([A-Za-z])\s*[)\]]|(?<!\w)([B-HJ-Z])(?!\w)|(?<!\w)([AI])\s*[:=](?!\w)|(?<=[,;\n])\s*([AI])[.)](?=\s)"
)
_DENIED = re.compile(
    r"\W*(?:is|are|was|were|seems|looks|has\s+been)\b.*\b(?:false|untrue|invalid|impossible|eliminated|excluded|ruled)\b"
)
_DOUBTED_BOX = re.compile(
    r"(?:\b(?:not|or|nor|and|either|neither|maybe)|/)[\W_]*\\boxed|\\boxed\s*\{[^{}]*(?:\{[^{}]*\})?[^{}]*\}[\s$*).,(]*"
    r"(?:[/?&]|[,;][\s$(]*[A-Z](?!\w)|\b(?:or|nor|and|but|not|is|are|maybe|perhaps)\b(?!\s+(?:the\s+)?(?:correct|right|true|best|answer)))",
    re.IGNORECASE,
)
_NUMBERS = NumberRule(relative=1e-6, absolute=1e-9, units="any")
_FALSE = frozenset(("false", "untrue", "invalid", "no"))


@dataclasses.dataclass(frozen=True, slots=True)
class Choice:
    """The options that an answer selects.

    Attributes:
        letters: Letters of the selected options, sorted, such as "AC"; "" if the answer selects no option.
        text: Normalized text of the answer, such as "paris" for "B. Paris".
        is_unclear: Whether the selection is unclear. "A or B" is unclear. "B. Paris" is unclear if Paris is option C.
            A letter that no option has is also unclear.
    """

    letters: str
    text: str
    is_unclear: bool = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceMatcher(Matcher):
    """Compares multiple-choice answers by the letter of the option, or by its text.

    An answer with several letters ("A, C", "AC", "(A)(C)") is right if the truth has the same letters.

    An answer is unreadable in cases such as the following:

    - It names several options without a decision ("A or B").
    - It names a letter that no option has.
    - It names a letter with another text than that of its option ("B. Paris" if B is Rome).
    - It names an option with the same text as the true option, but another letter.
    - It is a text that differs from the texts of all known options.
    - The options are unknown, and only the answer or only the truth has a letter ("Paris" and "C").

    Attributes:
        options: Option texts in the order A, B, ..., or a mapping from letter to text. If None, sampling and
            evaluation use the options of each question.
    """

    kind: ClassVar[str] = "choice"
    options: Sequence[str] | Mapping[str, str] | None = None
    _labels: tuple[tuple[str, str], ...] = dataclasses.field(default=(), init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.options is None:
            return
        if isinstance(self.options, str) or not isinstance(self.options, Sequence | Mapping):
            raise TypeError(
                f"options must be a list of texts or a mapping from letter to text, got {shorten(self.options)}"
            )
        object.__setattr__(self, "_labels", tuple(label_options(self.options).items()))

    def with_options(self, options: Sequence[str] | Mapping[str, str]) -> "ChoiceMatcher":
        """Returns a matcher with these options. If this matcher already has options, it returns itself."""
        return self if self.options is not None else ChoiceMatcher(options=options)

    def _compare(self, prediction: str, truth: str) -> Verdict:
        labels = self._labels
        predicted, true = read_choice(prediction, labels), read_choice(truth, labels)
        form, true_form = predicted.letters or predicted.text, true.letters or true.text
        if predicted.letters and true.letters:
            if predicted.is_unclear or true.is_unclear:
                return self._verdict(None, "unclear letter", form, true_form)
            same = predicted.letters == true.letters
            if not same and not labels and _has_text(predicted) and predicted.text == true.text:
                return self._verdict(None, "unclear letter", form, true_form)  # same text: options may be reordered
            if not same and _have_equal_texts(predicted.letters, true.letters, labels):
                return self._verdict(None, "unclear letter", form, true_form)  # two options with the same text
            return self._verdict(same, "letter", form, true_form)
        if predicted.text == true.text != "" or fold(prediction) == fold(truth) != "":
            return self._verdict(True, "text", form, true_form)
        if predicted.is_unclear or true.is_unclear or predicted.letters or true.letters:
            return self._verdict(None, "text", form, true_form)  # unclear, or only one of the two names an option
        # Without letters, the truth is the text of an unknown option: the answers are compared as texts.
        correct = compare_texts(predicted.text, true.text)
        return self._verdict(None if correct is False and labels else correct, "text", form, true_form)


def _read_boxes(answer: str, boxes: Sequence[str], labels: tuple[tuple[str, str], ...]) -> Choice:
    r"""Returns the selection in an answer with several ``\boxed{}``.

    ``boxes`` are the contents of the boxes, at least two of which differ. If all contents mean the same letter
    ("\boxed{A}, \boxed{(A)}"), the selection is this letter. If the answer is a list of letters ("\boxed{A},
    \boxed{C}"), all letters are selected. In all other cases, such as "\boxed{A} or \boxed{C}", the selection is
    unclear.
    """
    choices = {read_choice(box, labels) for box in boxes}
    letters = {choice.letters for choice in choices}
    if len(letters) == 1 and "" not in letters and not any(choice.is_unclear for choice in choices):
        return next(iter(choices))
    bare = answer.replace("$", "")
    for box in boxes:
        letter = _lone_letter(clean_answer(box))
        bare = re.sub(r"\\boxed\s*\{" + re.escape(box) + r"\}", letter or "?", bare)
    choice = read_choice(bare, labels)
    return choice if len(choice.letters) > 1 else Choice("", _option_text(answer), True)


def _have_equal_texts(first: str, second: str, labels: tuple[tuple[str, str], ...]) -> bool:
    """Returns whether the options with the letters ``first`` have the same texts as those with ``second``."""
    texts = _option_texts(labels)
    if not set(first + second) <= set(texts):
        return False
    return sorted(texts[letter] for letter in first) == sorted(texts[letter] for letter in second)


def _contradicts(text: str, option: str) -> bool:
    """Returns whether a text differs from an option, also as a number: "4 metres" does not contradict "4 m"."""
    if compare_texts(text, option) is not False:
        return False
    number, true = parse_number(text), parse_number(option)
    return number is None or true is None or _NUMBERS.compare(number, true)[0] is not True


def _has_text(choice: Choice) -> bool:
    return choice.text.casefold() not in ("", choice.letters.casefold())


def label_options(options: Sequence[str] | Mapping[str, str]) -> dict[str, str]:
    """Returns a mapping from letter to option text. The texts in a list get the letters A, B, ... in order.

    Raises:
        TypeError: If an option is not a string.
        ValueError: If there are not 1 to 26 options, or a key of the mapping is not a single letter A to Z.
    """
    is_labelled = isinstance(options, Mapping)
    texts = list(options.values()) if isinstance(options, Mapping) else list(options)
    labels = list(options) if is_labelled else [chr(ord("A") + index) for index in range(len(texts))]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError(f"options must hold strings, got {shorten(options)}")
    if not 0 < len(labels) <= 26:
        raise ValueError(f"options must hold 1 to 26 texts, got {len(labels)}")
    for label in labels:
        if not isinstance(label, str) or not re.fullmatch("[A-Z]", label):
            raise ValueError(f"options must be labelled with single letters A to Z, got {shorten(label)}")
    return dict(zip(labels, texts, strict=True))


@functools.lru_cache(maxsize=1 << 12)
def _option_texts(labels: tuple[tuple[str, str], ...]) -> dict[str, str]:
    return {label: _option_text(text.translate(TO_ASCII)) for label, text in labels}


def _option_text(text: str) -> str:
    return fold(clean_answer(text.strip().strip("\"'\u201c\u201d\u2018\u2019")))


@functools.lru_cache(maxsize=1 << 14)
def read_choice(answer: str, labels: tuple[tuple[str, str], ...]) -> Choice:
    """Returns the selection in an answer.

    A letter selects an option if it stands alone or in brackets. It also selects an option before a period, a colon or
    a closing bracket, and after words such as "the answer is". The "A" in "A cat" is an article and selects no option.

    Args:
        answer: The answer that was extracted from a response.
        labels: Letter and text of each option; () if the options are unknown.
    """
    texts = _option_texts(labels)
    answer = clean_answer(answer.translate(TO_ASCII))
    whole = _option_text(answer)
    owners = "".join(label for label, text in texts.items() if text == whole and text)
    lone = _lone_letter(answer)
    if lone and (not texts or lone in texts):
        # The answer "A" is unclear if another option has the text "A".
        return Choice(lone, whole, bool(owners) and lone not in owners)
    if owners:
        return Choice(owners, whole, len(owners) > 1)
    if lone:
        return Choice("", whole, True)
    boxes = all_boxes(answer)
    if len(set(boxes)) > 1:
        return _read_boxes(answer, boxes, labels)
    boxed = last_box(answer) if boxes else None
    if boxed and boxed.strip() != answer:
        return Choice("", whole, True) if _DOUBTED_BOX.search(answer) else read_choice(boxed, labels)
    bare = _without_phrases(answer)
    if bare != answer:
        choice = read_choice(bare, labels)
        if choice.letters or choice.is_unclear:
            return choice
    several = _several_letters(answer)
    if several and (texts or several[-1] <= _LAST_UNKNOWN):
        return Choice("", whole, True) if texts and not set(several) <= set(texts) else Choice(several, whole)
    both = _LETTER_AND_TEXT.fullmatch(answer)
    if both:
        letter = next(group for group in both.groups()[:4] if group).upper()
        return _letter_and_text(letter, both[5], whole, texts)
    if is_no_answer(whole) or (texts and _may_name_option(whole, texts)):
        return Choice("", whole, True)
    return Choice("", whole, bool(_names_options(answer)))


def _may_name_option(text: str, texts: Mapping[str, str]) -> bool:
    """Returns whether a text may mean one of the options, such as "a brown dog" for the option "dog".

    ``texts`` maps letters to option texts.
    """
    return any(compare_texts(text, option) is not False for option in texts.values() if option)


def _names_options(answer: str) -> bool:
    """Returns whether an answer such as "A or B" names letters without selecting one of them."""
    return _NAMED_LETTERS.fullmatch(answer) is not None


def _lone_letter(answer: str) -> str:
    lone = _LONE_LETTER.fullmatch(answer)
    return lone[1].upper() if lone else ""


def _without_phrases(answer: str) -> str:
    """Removes phrases such as "The answer is" at the beginning and "is correct" at the end of an answer."""
    lead = _LEAD.match(answer)
    if lead and 0 < lead.end() < len(answer):
        answer = answer[lead.end() :]
    return clean_answer(_TAIL.sub("", answer.replace("**", "")))


def _several_letters(answer: str) -> str:
    """Returns the sorted letters of an answer such as "A, C", "A and C", "(A)(C)", "A C" or "AC".

    Returns "" for other answers.
    """
    if not _SEVERAL.fullmatch(answer) and not _ROW.fullmatch(answer):
        return ""
    letters = re.sub(r"\band\b|[^A-Za-z]", "", answer, flags=re.IGNORECASE).upper()
    is_word = answer.isalpha() and list(letters) != sorted(letters)  # "BAD" is a word, "ABD" a selection
    return "" if is_word or len(set(letters)) < len(letters) else "".join(sorted(letters))


def _letter_and_text(letter: str, rest: str, whole: str, texts: Mapping[str, str]) -> Choice:
    """Returns the selection in an answer that consists of a letter and a text, such as "B. Paris".

    Args:
        letter: The letter, such as "B".
        rest: The text after the letter, such as "Paris".
        whole: Normalized text of the whole answer, such as "b. paris".
        texts: Option texts by letter; empty if the options are unknown.
    """
    bracketed = re.fullmatch(r"\(([^()]*)\)|\[([^\[\]]*)\]", rest.strip())  # "B (Paris)"
    text = _option_text((bracketed[1] or bracketed[2] or "") if bracketed else rest)
    owners = [owner for owner, option in texts.items() if option == text and text]
    if texts and letter not in texts:
        return Choice("", whole, True)
    if letter in owners:
        return Choice(letter, text)
    if owners:
        return Choice("", whole, True)
    if texts and texts[letter] and _contradicts(text, texts[letter]):
        return Choice("", whole, True)
    others = {match[match.lastindex or 0].upper() for match in _OTHER_LETTER.finditer(rest)} - {letter}
    if texts:
        others &= set(texts)
        for owner, option in texts.items():  # "D. blue and yellow" if D is yellow and A is blue
            if option and compare_texts(text, option) is not False and compare_texts(texts[letter], option) is False:
                others.add(owner)
    is_other_option = bool(texts) and not compare_texts(text, texts[letter])
    is_denied = bool(_DOUBT.search(text) or _DENIED.match(text)) and (is_other_option or not texts)
    if others or is_denied or (is_other_option and text in _FALSE):
        return Choice("", whole, True)
    return Choice(letter, text)
