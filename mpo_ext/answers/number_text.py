"""Reads the number in an answer, with its unit, in the many forms in which models and people write numbers."""

import dataclasses
import functools
import re
import unicodedata
from fractions import Fraction

from mpo_ext.answers.equations import computes_with_unknown
from mpo_ext.answers.normalize import TO_ASCII, clean_answer, closing_brace
from mpo_ext.answers.number_words import ANY_WORD, LARGE, read_number_words
from mpo_ext.answers.units import compare_units, parse_unit

_LONGEST = 400
_PLAIN = re.compile(r"[+-]?[0-9]{1,100}(?:\.([0-9]{1,100}))?")

# Currencies: signs and names in texts, and the currency that each of them means.
_SIGNS = {"$": "$", "\u20ac": "EUR", "\u00a3": "GBP", "\u00a5": "\u00a5", "\u20b9": "INR"}
_CODES = {"us$": "$", "usd": "$", "u.s.$": "$", "dollar": "$", "dollars": "$", "eur": "EUR", "euro": "EUR"}
_CODES |= {"euros": "EUR", "gbp": "GBP", "inr": "INR", "rs": "INR", "rs.": "INR", "rupee": "INR", "rupees": "INR"}
_CODES |= {"jpy": "\u00a5", "yen": "\u00a5", "cny": "\u00a5", "rmb": "\u00a5", "yuan": "\u00a5"}
_CURRENCIES = _SIGNS | _CODES
_CURRENCY = r"(?:US\$|U\.S\.\$|USD|EUR|GBP|INR|JPY|CNY|RMB|Rs\.?(?=\s*[0-9])|[$\u20ac\u00a3\u00a5\u20b9])"
_NEGATIVE = re.compile(r"^(?:minus|negative)\s+(?=[0-9$.])", re.IGNORECASE)
_HEAD = re.compile(rf"([+-]?)\s*({_CURRENCY}?)\s*([+-]?)\s*", re.IGNORECASE)

_GROUPED = r"[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,3}(?: [0-9]{3})+|[0-9]{1,3}(?:['\u2019][0-9]{3})+"
_GROUPED += r"|[0-9]{1,2}(?:,[0-9]{2})+,[0-9]{3}"
_DIGITS = rf"(?:(?:(?:{_GROUPED})(?![0-9])|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)"
_POWER = r"(?:\^|\*\*)\s*(?:\{\s*([+-]?[0-9]{1,3})\s*\}|\(\s*([+-]?[0-9]{1,3})\s*\)|([+-]?[0-9]{1,3}))"
_RAISED = r"([\u207a\u207b]?[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]{1,3})"
_TIMES_TEN = rf"\s*(?:\*|[xX]|\u00d7|\u00b7|\u22c5|\u2022)\s*10\s*(?:{_POWER}|{_RAISED})"
_NO_MORE = r"(?![0-9,.']*[0-9])"
_AMOUNT = re.compile(rf"({_DIGITS})(?:[eE]([+-]?[0-9]{{1,3}})|{_TIMES_TEN})?{_NO_MORE}")
_INTEGER_POWER = re.compile(rf"([0-9]{{1,4}})\s*(?:{_POWER}|{_RAISED}){_NO_MORE}")
_FRACTION = re.compile(r"(?:([0-9]{1,30})\s+)?([0-9]{1,30})\s*/\s*([0-9]{1,30})(?![0-9.,/])")
_TEX_FRACTION = re.compile(
    r"([0-9]{1,30})?\s*\\[dtc]?frac\s*"
    r"(?:\{\s*([+-]?[0-9]{1,30})\s*\}|([0-9]))\s*(?:\{\s*([+-]?[0-9]{1,30})\s*\}|([0-9]))"
)
_SEASON = re.compile(r"(1[89][0-9]{2}|20[0-9]{2})\s*/\s*([0-9]{2}|[0-9]{4})(?![0-9])")
_FROM_RAISED = str.maketrans(
    "\u207a\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079", "+-0123456789"
)
_TWO_WAYS = re.compile(r"[0-9]{1,3}[.,][0-9]{3}")

_TEX_SPACES = re.compile(r"\\[,;:! ]|\\quad|~|\\left(?![a-z])|\\right(?![a-z])")
_TEX_OPENING = re.compile(r"\$|\\[(\[]|\\q?quad(?![A-Za-z])|\\[,;:! ]")
_NEGATED = re.compile(r"(?:^|[=:]|\bis)\s*-$")  # before a box, as in "x = -\boxed{7}"
# The end of a text before a box that changes the value in the box
_CONTINUED = re.compile(
    r"[-+*/^_(\[{}|<>0-9\u00b1\u00d7\u00b7\u22c5\u00f7\u221a\u2260\u2264\u2265]$"
    r"|\\(?:times|cdot|div|pm|mp|sqrt|frac|ne|neq|le|leq|ge|geq|lt|gt)$"
    r"|\b(?:not|or|nor|and|to|than|least|most|over|under|below|above|between|half|twice|plus|minus|times|by)$",
    re.IGNORECASE,
)
_TEX_TEXT = re.compile(r"\\(?:text|mathrm|textrm|mathbf|textbf|mbox|operatorname|rm|bf)\s*\{([^{}]*)\}")
_TEX_DEGREE = re.compile(r"\^\s*\{?\s*\\circ\s*\}?|\\degree|\u00ba|\\deg\b")
_TEX_SIGNS = {"\\%": "%", "\\times": "\u00d7", "\\cdot": "\u00b7", "\\approx": "\u2248", "\\pm": "\u00b1"}
_TEX_SIGNS |= {"{,}": ",", "\\sim": "\u2248", "\u223c": "\u2248", "\u2243": "\u2248", "\u2245": "\u2248"}
_TEX_OHM = re.compile(r"(?:(?<![^\W\d_])([kMGm])\s*)?\\Omega(?![A-Za-z])")
_TEX_MICRO = re.compile(r"\\mu(?:\s+(?=[A-Za-z])|\s*(?=\u03a9))")
_QUOTES = "\"'\u201c\u201d"
_SPACES = str.maketrans(dict.fromkeys("\u00a0\u2007\u2009\u200a\u202f\u205f", " ") | {"\u2044": "/", "\u200b": None})
_SPACES |= {0x2103: "\u00b0C", 0x2109: "\u00b0F"}

_LEAD = re.compile(
    r"(?:(?:so|thus|therefore|hence|then)\b,?\s+)?(?:the\s+|my\s+|our\s+)?(?:(?:final|correct|right|exact)\s+)*"
    r"(?:(?:it|that)['\u2019]s\b|(?:answer|result|solution|value|total|sum|it|there)\b\s*(?:is|are|equals|would\s+be|=|:)|(?:is|are|equals|=)"
    r"(?=\W))\s*:?\s*",
    re.IGNORECASE,
)
_EQUATION = re.compile(r"[^=<>!\u2248\u2260,;]*?(?:=|\u2248)\s*(?!=)")
_SEVERAL_CLAUSES = re.compile(r"\b(?:or|and|but|then|if|when|for|not|where|while)\b|[.?:]\s", re.IGNORECASE)
_CONCLUSION = re.compile(
    r"(?:\s*(?:\u2192|\u21d2|\u27f9|\\(?:implies|Rightarrow|Longrightarrow|rightarrow|to)(?![A-Za-z]))\s*"
    r"|\s(?:so|thus|hence|therefore)\s+)(?=[^\W\d_](?:_\{?\w{1,3}\}?)?\s*[=\u2248])",
    re.IGNORECASE,
)
_NAME = re.compile(r"[^\W\d_](?:_\{?\w{1,3}\}?)?|(?:m?\s*(?:\\angle|\u2220)\s*)?[A-Z]{1,3}")
_HEDGE = re.compile(r"(?:about|approximately|approx\.?|around|roughly|circa|ca\.|~|\u2248)\s*", re.IGNORECASE)
_SCALE = re.compile(rf"\s*({'|'.join(LARGE)}|hundred|dozen)s?\b", re.IGNORECASE)
_ORDINAL = re.compile(r"(?:st|[nr]d|th)\b")
_MAGNITUDES = ("k", "M", "B", "T", "bn", "Mio", "Mrd")
_SCALES = {**LARGE, "hundred": 100, "dozen": 12}


@dataclasses.dataclass(frozen=True, slots=True)
class Number:
    """A number read from a text.

    Attributes:
        value: Exact value, in the unit of the text.
        unit: A unit as the text writes it ("km"), a currency ("$", "EUR"), or "%"; "" if there is none.
        is_currency: Whether ``unit`` is a currency.
        is_approximate: Whether the text calls the number approximate ("about 7").
        decimals: Number of digits after the decimal point: 2 for "3.14", but 0 for "3.14e5".
        others: Other values that the text may mean. "1,234" may be 1.234 with a decimal comma. "7 million" may be 7 if
            the question asks for millions.
        name: Variable that has this value in the text ("x" in "x = 7"), or "".
    """

    value: Fraction
    unit: str = ""
    is_currency: bool = False
    is_approximate: bool = False
    decimals: int = 0
    others: tuple[Fraction, ...] = ()
    name: str = ""


def parse_number(text: str) -> Number | None:
    r"""Returns the number in an answer, or None if the answer holds no number, several numbers, or a sentence.

    A number may have a sign, thousands separators ("1,234", "1 234", "1'234"), decimals, a power of ten ("1e-3",
    "2 x 10^5", "10⁻³"), a fraction ("3/4", "1 1/2", "½", ``\frac{3}{4}``), a currency, a percent sign, a unit, and
    English words ("seven", "7 million", "minus three"). "The answer is", "x =", "about", markdown, math delimiters and
    ``\boxed{}`` may surround the number. Decimal commas are ambiguous, so "1,5" and "1.234,5" give None.
    """
    return None if len(text) > 2 * _LONGEST else _parse(text)


@functools.lru_cache(maxsize=1 << 14)
def _parse(text: str) -> Number | None:
    plain = _PLAIN.fullmatch(text)
    if plain:
        others = _other_values(text.lstrip("+-"), -1 if text[0] == "-" else 1)
        return Number(Fraction(text), decimals=len(plain[1] or ""), others=others)
    if text.isascii() and not re.search("[0-9]", text) and not ANY_WORD.search(text):
        return None
    normal = _normalize(text)
    if normal is None or not normal or len(normal) > _LONGEST:
        return None
    return _read_answer(normal)


def _normalize(text: str) -> str | None:
    r"""Removes the markup of an answer, and converts it to ASCII where possible.

    Returns None if the answer has boxes that ``_unbox`` cannot read.
    """
    text = text.translate(TO_ASCII).translate(_SPACES)
    if not text.isascii():
        text = "".join(map(_ascii_digit, unicodedata.normalize("NFC", text)))
    text = clean_answer(text)
    if "\\boxed" in text:
        unboxed = _unbox(text)
        if unboxed is None:
            return None
        text = unboxed
    if "\\" in text or "{,}" in text or "~" in text[1:]:
        text = _TEX_TEXT.sub(r" \1 ", _TEX_DEGREE.sub("\u00b0", text))
        text = text[:1] + _TEX_SPACES.sub(" ", text[1:]) if text.startswith("~") else _TEX_SPACES.sub(" ", text)
        for sign, plain in _TEX_SIGNS.items():
            text = text.replace(sign, plain)
        text = _TEX_MICRO.sub("\u00b5", _TEX_OHM.sub("\\1\u03a9", text))
    elif "\u00ba" in text:
        text = text.replace("\u00ba", "\u00b0")
    text = text.replace("\\$", "\ue000")
    text = re.sub(r"\$([^$]+)\$", r" \1 ", text).replace("\ue000", "$")
    text = text.replace("\\(", " ").replace("\\)", " ").replace("`", "")
    text = re.sub(r"\*\*(?=[^\s*])([^*]+)(?<=\S)\*\*", r"\1", text)
    return clean_answer(_unquote(" ".join(text.split())).rstrip(",;:"))


def _unquote(text: str) -> str:
    """Removes quotation marks around a text, but not the mark of feet, inches or minutes after a number ("6'")."""
    while len(text) > 2 and text[0] in _QUOTES and text[-1] in _QUOTES:
        text = text[1:-1].strip()
    return text.lstrip(_QUOTES).rstrip("\u201c\u201d" if re.search("[0-9]['\"]+$", text) else _QUOTES)


def _ascii_digit(character: str) -> str:
    if character.isascii():
        return character
    if character.isdecimal():
        return str(unicodedata.decimal(character))
    if "VULGAR FRACTION" in unicodedata.name(character, ""):
        return " " + unicodedata.normalize("NFKC", character).replace("\u2044", "/")
    return character


def _unbox(text: str) -> str | None:
    r"""Returns the content of the ``\boxed{}`` in a text, followed by the text after the box.

    "so \boxed{7} cm" gives "7 cm", and "-\boxed{7}" gives "-7". Boxes with different contents, or without a closing
    brace, give None. So do parts of expressions and of phrases, such as "2\boxed{7}" and "not \boxed{7}".
    """
    contents, rest = set(), ""
    for box in re.finditer(r"\\boxed\s*(?=\{)", text):
        end = closing_brace(text, box.end())
        before = _TEX_TEXT.sub(r" \1 ", _TEX_OPENING.sub(" ", text[: box.start()])).rstrip()
        is_negated = _NEGATED.search(before) is not None
        if end is None or (_CONTINUED.search(before) and not is_negated):
            return None
        content = text[box.end() + 1 : end].strip()
        contents.add(f"-{content}" if is_negated else content)
        rest = text[end + 1 :]
    if len(contents) != 1:
        return None
    rest = re.sub(r"^(?:\$+|\\\)|\\\])", "", rest.strip()).strip()
    return f"{contents.pop()} {rest}".strip().removesuffix(".").strip()


def _read_answer(text: str, is_named: bool = False) -> Number | None:
    """Reads an answer. ``is_named`` tells whether it is the right side of an equation whose left side is a name."""
    number = _read_amount(text)
    if number is not None:
        return number
    lead = _LEAD.match(text)
    if lead and lead.end():
        return _read_answer(text[lead.end() :], is_named) if lead.end() < len(text) else None
    hedge = _HEDGE.match(text)
    if hedge:
        number = _read_amount(text[hedge.end() :])
        return number and dataclasses.replace(number, is_approximate=True)
    equation = _EQUATION.match(text)
    if equation and not _SEVERAL_CLAUSES.search(equation.group()):
        return _read_equation(text, equation, is_named)
    return None


def _read_equation(text: str, equation: re.Match[str], is_named: bool) -> Number | None:
    """Reads the value of an equation: 7 for "x = 7", "3 + 4 = 7" and "7 = x". Returns None for "2x = 6"."""
    *steps, conclusion = _CONCLUSION.split(text)
    if steps:  # "2x = 6 \u2192 x = 3"
        number = _read_answer(conclusion)
        return number if number and all(_is_step(step, number.name) for step in steps) else None
    left, rest = equation.group().rstrip(" =\u2248"), text[equation.end() :]
    is_about = equation.group().rstrip().endswith("\u2248")
    if re.fullmatch(r"[^\W\d_]", rest):  # "7 = x"
        number, name = _read_amount(left), rest
    else:
        amount = _read_amount(left)
        number, name = _read_answer(rest, is_named or (amount is None and _has_name(left))), left
        if number is None or (amount and not _may_be_equation(amount, number)):
            return None
        if amount is None and not is_named and computes_with_unknown(left, number.unit):
            return None
    name = re.sub(r"^m?\s*(?:\\angle|\u2220)\s*", "\u2220", name) if _NAME.fullmatch(name) else ""
    return number and dataclasses.replace(number, is_approximate=is_about or number.is_approximate, name=name)


def _is_step(text: str, name: str) -> bool:
    """Returns whether a text is a step on the way to the value of ``name``, and not the value of something else."""
    left = text.partition("=")[0].strip()
    return left == name or not re.search(r"[^\W\d_]", left) or computes_with_unknown(left, "")


def _has_name(left: str) -> bool:
    return bool(re.search(r"[^\W\d_]", left)) and not computes_with_unknown(left, "")


def _may_be_equation(left: Number, right: Number) -> bool:
    """Returns whether the sides of an equation may be the same quantity, such as 5 m and 500 cm.

    Otherwise the letters after a number are unknowns, as in "2m = 6" and "6 = 2b".
    """
    if left.unit == "%" or not (left.unit or right.unit) or (left.is_currency and right.is_currency):
        return True
    if not left.unit:
        return right.unit == "%" or len(right.unit) > 1 or left.value == right.value
    if not right.unit or left.is_currency or right.is_currency or right.unit == "%":
        return False
    units = parse_unit(left.unit), parse_unit(right.unit)
    if left.unit != right.unit and not all(unit and unit.is_known for unit in units):
        return False
    factor = compare_units(left.unit, right.unit)
    if isinstance(factor, str):
        return factor == "unclear"
    return abs(left.value * factor - right.value) * 20 <= abs(right.value)  # 1 mile = 1.6 km is rounded


def _read_amount(text: str) -> Number | None:
    """Reads a text that consists of a number and an optional unit, such as "5 km". Returns None for other texts."""
    text = _NEGATIVE.sub("-", text)
    head = _HEAD.match(text)
    assert head is not None  # every part of the pattern is optional
    if head[1] and head[3]:
        return None
    sign = -1 if "-" in head[1] + head[3] else 1
    currency, start = _CURRENCIES.get(head[2].casefold(), ""), head.end()
    season = _SEASON.match(text, start)
    if season and int(season[2]) % 100 == (int(season[1]) + 1) % 100:
        return None  # "2018/19" is a season
    decimals = 0
    others: tuple[Fraction, ...] = ()
    read = _read_fraction(text, start) or _read_power(text, start)
    if read is None:
        amount = _AMOUNT.match(text, start)
        if amount:
            digits, exponent = amount[1], _exponent(amount, 2)
            value = Fraction(re.sub(r"[, '\u2019]", "", digits)) * Fraction(10) ** exponent
            decimals = len(digits.partition(".")[2]) if amount.end() == start + len(digits) else 0
            others = _other_values(digits, sign)
            read = value, amount.end()
        else:
            read = read_number_words(text[start:])
            if read is None:
                return None
            read = read[0], start + read[1]
    value, end = sign * read[0], read[1]
    scale = _SCALE.match(text, end)
    if scale:
        others += (value,)
        value, end, decimals = value * _SCALES[scale[1].casefold()], scale.end(), 0
    rest = text[end:].strip()
    if not rest:
        return Number(value, currency, bool(currency), False, decimals, others)
    return _with_unit(Number(value, currency, bool(currency), False, decimals, others), rest, text[end].isspace())


def _with_unit(number: Number, rest: str, is_apart: bool) -> Number | None:
    folded = rest.casefold()
    if folded in ("%", "percent", "per cent", "pct"):
        return None if number.unit else dataclasses.replace(number, unit="%")
    if folded in ("\u2030", "\\textperthousand", "per mille", "permille", "per mil"):
        value = number.value / 1000
        return None if number.unit else dataclasses.replace(number, value=value, decimals=0, others=(number.value,))
    currency = _CURRENCIES.get(folded)
    if currency is not None:
        return (
            None
            if number.unit and number.unit != currency
            else dataclasses.replace(number, unit=currency, is_currency=True)
        )
    if number.unit or (rest in _MAGNITUDES if is_apart else rest in (*_MAGNITUDES, "K")):
        return None  # "7K" is 7000, "300 K" a temperature
    unit = None if _ORDINAL.match(rest) else parse_unit(rest)
    if unit and not unit.is_known and not is_apart and re.fullmatch("[A-Z]{2,3}", rest):
        return None  # "2AB" is twice a length
    return None if unit is None else dataclasses.replace(number, unit=rest)


def _read_fraction(text: str, start: int) -> tuple[Fraction, int] | None:
    match = _TEX_FRACTION.match(text, start)
    if match:
        whole, numerator, denominator = int(match[1] or 0), int(match[2] or match[3]), int(match[4] or match[5])
        if match[1] and (numerator < 0 or denominator < 0):
            return None
    else:
        match = _FRACTION.match(text, start)
        if match is None:
            return None
        whole, numerator, denominator = int(match[1] or 0), int(match[2]), int(match[3])
        if match[1] and numerator >= denominator:
            return None
    return (whole + Fraction(numerator, denominator), match.end()) if denominator else None


def _read_power(text: str, start: int) -> tuple[Fraction, int] | None:
    match = _INTEGER_POWER.match(text, start)
    if match is None:
        return None
    base, exponent = int(match[1]), _exponent(match, 2)
    if base == 0 and exponent <= 0:
        return None
    return Fraction(base) ** exponent, match.end()


def _exponent(match: re.Match[str], first: int) -> int:
    """Returns the exponent in a match of a regular expression, or 0 if the match has no exponent.

    The exponent is the first non-empty group whose number is at least ``first``. It has digits or superscripts.
    """
    text = next((group for group in match.groups()[first - 1 :] if group), "0")
    return int(text.translate(_FROM_RAISED))


def _other_values(digits: str, sign: int) -> tuple[Fraction, ...]:
    """Returns other values that the text ``digits`` may mean: 1.234 for "1,234", and 1234 for "1.234".

    A text with spaces gives its parts: 1 and 234 for "1 234". All values are multiplied by ``sign`` (1 or -1).
    """
    if _TWO_WAYS.fullmatch(digits):
        other = digits.replace(",", ".") if "," in digits else digits.replace(".", "")
        return (sign * Fraction(other),)
    if " " in digits:
        return tuple(sign * Fraction(part) for part in digits.split())
    return ()
