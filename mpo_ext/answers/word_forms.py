"""Compares forms of words, dates and times of day: "grey" and "gray", "5 March" and "3/5", "1 pm" and "13:00".

All texts are results of ``normalize.fold``.
"""

import functools
import re
import unicodedata

from mpo_ext.answers.number_words import SMALL

_TOKEN = re.compile(r"[+-]?(?:[0-9]+(?:[.,/:][0-9]+)*|\.[0-9]+)|[<>\u2264\u2265]=?|[^\W\d_]+(?:['\u2019][^\W\d_]+)*")
_ORDINAL = re.compile(r"(?<![^\W_])([0-9]+)\s?(?:st|[nr]d|th)(?![^\W_])")
_POSSESSIVE = re.compile("(?<=[^\\W\\d_])['\u2019]s(?![^\\W_])")
_ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth"
_MONTHS = "january february march april may june july august september october november december"
#: Names of the months, in the order of the year
MONTHS = tuple(_MONTHS.split())
WEEKDAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
_LEFT_OUT = frozenset(("a", "an", "the", "and"))
_SAME = {"grey": "gray", "men": "man", "women": "woman", "children": "child", "people": "person", "usa": "us"}
_SAME |= {word: str(value) for word, value in SMALL.items()}
_SAME |= {word: str(value) for value, word in enumerate(_ORDINALS.split(), 1)}
_SAME |= {"sept": "september", "tues": "tuesday", "thurs": "thursday"}
_SAME |= {name[:3]: name for name in (*MONTHS, *WEEKDAYS)}
# Whole answers with the same meaning
_ANSWERS = (
    frozenset(("yes", "y", "yeah", "yep", "true", "correct")),
    frozenset(("no", "n", "nope", "false", "incorrect")),
    frozenset(("none", "nothing", "nobody", "nil", "zero", "0")),
)
_DATE = re.compile(r"[0-9]{1,4}([/.-])[0-9]{1,2}\1[0-9]{1,4}|[0-9]{1,2}/[0-9]{1,2}")
_TIME = re.compile(r"([0-9]{1,2})(?:([:.])([0-9]{2}))?(?::00)?\s*(?:([ap])\.?\s?m\.?)?")


def may_be_same_forms(first: str, second: str) -> bool:
    """Returns whether two different texts may have the same meaning, because only the forms of their words differ.

    The following forms may have the same meaning:

    - the same words in another order, or with other spaces, hyphens and accents ("ice cream", "icecream")
    - singular and plural, British and American spelling, "second", "2nd" and "2"
    - initials ("uk" for "united kingdom"), short names of months and days
    - the same date or time of day
    - "yes" and "true"
    """
    if any(first in same and second in same for same in _ANSWERS):
        return True
    left, right = _tokens(first), _tokens(second)
    if not left or not right:
        return False
    words, other_words = (tuple(map(_word_form, tokens)) for tokens in (left, right))
    if sorted(words) == sorted(other_words) or _are_joined(left, right):
        return True
    if _are_initials(words, other_words) or _are_initials(other_words, words):
        return True
    return _is_same_date(first, second) or bool(is_same_time(first, second))


@functools.lru_cache(maxsize=1 << 14)
def _tokens(text: str) -> tuple[str, ...]:
    plain = "".join(each for each in unicodedata.normalize("NFD", text) if not unicodedata.combining(each))
    plain = _POSSESSIVE.sub("s", _ORDINAL.sub(r"\1", plain))
    return tuple(token for token in _TOKEN.findall(plain) if token not in _LEFT_OUT)


def _word_form(word: str) -> str:
    """Returns a common form of a word: singular, with American spelling, and with digits for a number word."""
    word = _SAME.get(word, word)
    if len(word) < 4 or not word.isalpha():
        return word
    for ending, singular in (("ies", "y"), ("es", ""), ("s", ""), ("ie", "y"), ("e", "")):
        if word.endswith(ending) and not word.endswith(("ss", "us", "is")):
            word = word[: -len(ending)] + singular
            break
    if word.endswith("tr"):  # "centre" without "e"
        word = word[:-1] + "er"
    return word.replace("our", "or").replace("is", "iz")


def _are_joined(left: tuple[str, ...], right: tuple[str, ...]) -> bool:
    numbers, others = ([each for each in tokens if not each.isalpha()] for tokens in (left, right))
    letters = "".join(filter(str.isalpha, left))
    return letters != "" and numbers == others and letters == "".join(filter(str.isalpha, right))


def _are_initials(initials: tuple[str, ...], words: tuple[str, ...]) -> bool:
    text = "".join(initials)
    if not 2 <= len(text) <= 5 or not text.isalpha() or len(words) < 2:
        return False
    return text in ("".join(word[0] for word in words), "".join(word[0] for word in words if word != "of"))


def _is_same_date(first: str, second: str) -> bool:
    dates = _date(first), _date(second)
    if dates[0] is None or dates[1] is None:
        return False
    if len(dates[0]) == 2 and not re.search(r"[^\W\d_]", first + second):  # fractions
        return False
    if all(max(date) >= 100 for date in dates if date):
        return sorted(dates[0]) == sorted(dates[1])
    return sorted(number % 100 for number in dates[0]) == sorted(number % 100 for number in dates[1])


def _date(text: str) -> tuple[int, ...] | None:
    """Returns the numbers of a date, or None. The order of day and month is unknown. A month is its number."""
    words = [_SAME.get(token, token) for token in _tokens(text) if token.isalpha()]
    numbers = [int(number) for number in re.findall("[0-9]{1,4}", text)]
    if len(words) == 1 and words[0] in MONTHS and 1 <= len(numbers) <= 2:
        numbers.append(MONTHS.index(words[0]) + 1)
    elif not _DATE.fullmatch(text):
        return None
    return tuple(numbers)


def is_same_time(first: str, second: str) -> bool | None:
    """Returns whether two texts may be the same time of day, such as "1 pm", "1:00" and "13:00".

    Returns None if a text is not a time of day.
    """
    times = _time(first), _time(second)
    if times[0] is None or times[1] is None:
        return None
    return times[0][:2] == times[1][:2] and (times[0][2] == times[1][2] or not times[0][2] or not times[1][2])


def _time(text: str) -> tuple[int, int, str] | None:
    """Returns (hour, minute, half of the day) of a time of day, or None. The half is "a", "p" or ""."""
    match = _TIME.fullmatch(text)
    if match is None or not (match[2] == ":" or match[4]) or int(match[1]) > 24:
        return None
    hour = int(match[1])
    return hour % 12, int(match[3] or 0), match[4] or ("p" if hour > 12 else "")
