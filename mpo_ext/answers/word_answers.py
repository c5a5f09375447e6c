"""Compares answers that consist of words. The result is equal, different or unclear."""

import functools
import re

from mpo_ext.answers.normalize import clean_answer, fold
from mpo_ext.answers.word_forms import may_be_same_forms

_LEAD = re.compile(r"(?:(?:the|my)\s+)?(?:(?:final|correct|right)\s+)*(?:answer|it)(?:\s+is|\s*:|\s*=)\s*:?\s*", re.I)
_WORD = re.compile(r"[+-]?(?:[0-9]+(?:[.,/][0-9]+)*|\.[0-9]+)|[<>\u2264\u2265]=?|[^\W_]+")
_NO_ANSWER = re.compile(
    r"(?:i|we)\s+(?:do\s+not|don't|don\u2019t|cannot|can't|can\u2019t|could\s+not|couldn't|am\s+not|am\s+unable)\b.*"
    r"|(?:i'm|i\u2019m)\s+(?:not|unable|sorry)\b.*|(?:sorry|unfortunately)\b.*|unable\s+to\b.*|it\s+depends\b.*"
    r"|.*\b(?:cannot|can't|can\s+not|could\s+not)\s+be\s+\w+.*"
    r"|(?:unknown|unclear|unanswerable|unsure|uncertain|undetermined|n/?a|null|nan|tbd|none\s+given|no\s+answer)"
    r"|(?:not|no|insufficient|not\s+enough)\s+(?:sure|clear|certain|available|applicable|given|visible|known|specified"
    r"|shown|mentioned|provided|stated|data|information|idea)\b.*|[?.\-_\u2026 ]+",
    re.DOTALL,
)


@functools.lru_cache(maxsize=1 << 14)
def is_no_answer(text: str) -> bool:
    """Returns whether a text declines to answer ("i don't know", "n/a", "?"). The text is a result of ``fold``."""
    return _NO_ANSWER.fullmatch(text) is not None


def without_lead(text: str) -> str:
    """Returns a text without a phrase such as "The answer is" at its beginning."""
    lead = _LEAD.match(text)
    return text[lead.end() :] if lead and lead.end() < len(text) else text


def compare_texts(first: str, second: str) -> bool | None:
    """Returns whether two answers in words are equal, ignoring case and phrases such as "The answer is".

    The result is None (unclear) if one answer contains the other ("a brown dog" and "dog"), or if only the forms of
    the words differ ("grey" and "gray"). It is also None if one of the texts is empty or declines to answer.
    """
    return compare_folded(fold(clean_answer(first)), fold(clean_answer(second)))


def compare_folded(first: str, second: str) -> bool | None:
    """Returns the result of ``compare_texts`` for two texts that are results of ``fold``."""
    if first == second != "":
        return True
    if not first or not second or is_no_answer(first) or is_no_answer(second):
        return None
    first, second = without_lead(first), without_lead(second)
    if first == second or clean_answer(first) == clean_answer(second):
        return True
    return None if may_be_same_words(first, second) or may_be_same_forms(first, second) else False


@functools.lru_cache(maxsize=1 << 14)
def _words(text: str) -> tuple[str, ...]:
    return tuple(_WORD.findall(text))


def may_be_same_words(first: str, second: str) -> bool:
    """Returns whether all words of one text occur consecutively in the other.

    Both texts are results of ``fold``.
    """
    shorter, longer = sorted((_words(first), _words(second)), key=len)
    if not shorter:
        return (
            bool(first) and bool(second) and not _WORD.search(first + second) and (first in second or second in first)
        )
    return any(longer[start : start + len(shorter)] == shorter for start in range(len(longer) - len(shorter) + 1))
