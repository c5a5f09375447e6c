"""Reads English number words: "twenty-one", "minus three", "a hundred and five", "two thirds", "seven and a half"."""

import re
from fractions import Fraction

_UNITS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
#: Values of the words from "zero" to "nineteen".
SMALL = {word: value for value, word in enumerate(f"{_UNITS} seventeen eighteen nineteen".split())}
_TENS_NAMES = "twenty thirty forty fifty sixty seventy eighty ninety"
#: Values of the words from "twenty" to "ninety".
TENS = dict(zip(_TENS_NAMES.split(), range(20, 100, 10), strict=True))
LARGE = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "lakh": 10**5, "crore": 10**7}
_PARTS_NAMES = "third fourth fifth sixth seventh eighth ninth tenth"
_PARTS = {name: value for value, name in enumerate(_PARTS_NAMES.split(), 3)}
_PARTS |= {"half": 2, "quarter": 4}
_PARTS |= {("halves" if name == "half" else f"{name}s"): value for name, value in list(_PARTS.items())}
_SIGNS = {"minus": -1, "negative": -1, "plus": 1, "positive": 1}
#: Finds texts that may hold a number in words.
ANY_WORD = re.compile("|".join(["half", "hundred", "dozen", *SMALL, *TENS, *LARGE, *_PARTS]), re.IGNORECASE)
_WORD = re.compile(r"[^\W\d_]+")
# "twenty-fifths" may be 25ths, and "twenty fifth" is an ordinal number; "twenty fifths" is 4.
_LARGE_ORDINAL = re.compile(
    rf"\b(?:{'|'.join([*TENS, 'hundred', *LARGE])})"
    rf"(?:-(?:{'|'.join(_PARTS)})|\s+(?:and\s+)?(?:{'|'.join(_PARTS_NAMES.split())}))\b",
    re.IGNORECASE,
)


def read_number_words(text: str) -> tuple[Fraction, int] | None:
    """Reads a number in English words at the start of a text.

    Returns the number and the index of the character after it. Returns None if the text does not begin with a number
    in words.
    """
    words = [(match.group().casefold(), match.end()) for match in _WORD.finditer(text)]
    starts = [match.start() for match in _WORD.finditer(text)]
    gaps = [text[end:start] for (_, end), start in zip(words, starts[1:], strict=False)]
    count = next((index + 1 for index, gap in enumerate(gaps) if gap.strip(" -")), len(words))
    names = [word for word, _ in words[:count]]
    if not names or starts[0] != 0 or _LARGE_ORDINAL.search(text):
        return None
    sign = _SIGNS.get(names[0], 0)
    found = _read(names, 1 if sign else 0)
    if found is None:
        return None
    value, used = found
    return (sign or 1) * value, words[used - 1][1]


def _read(names: list[str], start: int) -> tuple[Fraction, int] | None:
    """Reads the number that begins with the word ``names[start]``.

    Returns the number and the index of the next word, or None if no number begins there.
    """

    def name(index: int) -> str:
        return names[index] if index < len(names) else ""

    article = name(start) in ("a", "an")
    if article and name(start + 1) in _PARTS:
        return Fraction(1, _PARTS[name(start + 1)]), start + 2
    if name(start) == "half":
        return (Fraction(1, 2), start + 1) if len(names) == start + 1 else None
    whole = _read_whole(names, start)
    if whole is None:
        return None
    number, end = Fraction(whole[0]), whole[1]
    if name(end) in _PARTS:
        return number / _PARTS[name(end)], end + 1
    if name(end) == "point":
        digits = ""
        while name(end + 1) in SMALL and SMALL[name(end + 1)] < 10:
            end, digits = end + 1, digits + str(SMALL[name(end + 1)])
        return (number + Fraction(f"0.{digits}"), end + 1) if digits else None
    if name(end) == "and":
        part = _read(names, end + 1)
        if part is not None and part[0] < 1 and name(part[1] - 1) in _PARTS:
            return number + part[0], part[1]
    return number, end


def _read_whole(names: list[str], start: int) -> tuple[int, int] | None:
    """Reads the whole number that begins with the word ``names[start]``.

    Returns the number and the index of the next word, or None if no whole number begins there.
    """
    total = group = 0
    index, last, largest = start, "", 10**15
    if names[index : index + 1] in (["a"], ["an"]):
        if names[index + 1 : index + 2] not in ([name] for name in ("hundred", "dozen", *LARGE)):
            return None
        index, group, last = index + 1, 1, "article"
    while index < len(names):
        name = names[index]
        following = names[index + 1 : index + 2]
        if name in SMALL and last in ("", "hundred", "large", "and", "tens"):
            if last == "tens" and not 0 < SMALL[name] < 10:
                return None
            group, last = group + SMALL[name], "small"
        elif name in TENS and last in ("", "hundred", "large", "and"):
            group, last = group + TENS[name], "tens"
        elif name == "hundred" and last in ("", "small", "article") and 0 < (group or 1) < 100:
            group, last = 100 * (group or 1), "hundred"
        elif name == "dozen" and last in ("", "small", "tens", "article") and not total:
            return 12 * (group or 1), index + 1
        elif name in LARGE and LARGE[name] < largest and last:
            total, group, largest, last = total + group * LARGE[name], 0, LARGE[name], "large"
        elif (
            name == "and"
            and last in ("hundred", "large")
            and following
            and (following[0] in SMALL or following[0] in TENS)
        ):
            last = "and"
        elif name in SMALL or name in TENS or name == "hundred":
            return None  # "seven eight": several numbers
        else:
            break
        index += 1
    return (total + group, index) if last not in ("", "article", "and") else None
