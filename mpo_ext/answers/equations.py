"""Tells equations that name their right side ("x = 7") from those that compute with an unknown ("2x = 6")."""

import re

from mpo_ext.answers.units import parse_unit

_GREEK = (
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau"
    " upsilon phi varphi chi psi omega"
)
_GREEK_COMMAND = re.compile(rf"\\(?:{'|'.join(_GREEK.split())})(?![A-Za-z])")
_DECORATION = re.compile(
    r"\\(?:angle|measuredangle|triangle|Delta|bar|hat|vec|overline|widehat|overrightarrow|dot|left|right)(?![A-Za-z])"
)
_SUBSCRIPT = re.compile(r"(?<=[^\W\d_])_(?:\{[^{}]*\}|[^\W_]+)")
# Expressions with a bound variable, such as limits, which have a value
_BOUND = re.compile(
    r"(?:\\displaystyle\s*)?(?:\\?lim|\\(?:i{1,3}|oi)nt|\\sum|\\prod|\\max|\\min)(?![A-Za-z])|[\u222b\u2211\u220f]"
)
_UNIT_NOTE = re.compile(r"(?:\bin\s+|\()([^()\s]+)\)?$")
_TIMES = re.compile(r"(?<=[0-9])\s*[xX]\s*(?=[0-9])|(?<=[0-9])[CP](?=[0-9])")
_EULER = re.compile(r"(?<![^\W\d_])e(?=\s*\^)")
_ARTICLE = re.compile(r"(?<![^\W_])a\s+(?=[^\W\d_]{2}|[0-9])")
# f(2), f'(x), f^{-1}(2) and P(A | B), but not the product x(x + 1)
_APPLICATION = re.compile(
    r"(?<![^\W\d_])(?:[PE][(\[][^()\[\]]*[)\]]|[^\W\d_]['\u2032]*(?:\^\{?-1\}?)?\(\s*-?[\w\s.]*\))"
)
_SUPERSCRIPTS = r"\u00b2\u00b3\u00b9\u2070-\u2079"
_VARIABLE = rf"(?<![^\W\d_])(?<![\\\u00b0])(?!\u03c0)[^\W\d_{_SUPERSCRIPTS}](?![^\W\d_{_SUPERSCRIPTS}])"
_FUNCTIONS = "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln lg exp sqrt abs frac dfrac tfrac cdot"
_OPERATOR_WORDS = (
    "plus minus times squared cubed half twice double triple thrice third quarter square cube root percent divided"
    " multiplied factorial two three four five six seven eight nine ten"
)
_OPERATOR = re.compile(
    r"[+*/^|!%\u00d7\u00b7\u22c5\u00f7\u221a\u2223\u00b2\u00b3\u2070-\u2079]|:(?=\S)|-(?![^\W\d_]{2})|(?<![^\W\d_])-"
    rf"|(?<![A-Za-z])(?:{'|'.join([*_FUNCTIONS.split(), *_OPERATOR_WORDS.split()])})(?![A-Za-z])",
    re.IGNORECASE,
)
_COEFFICIENT = re.compile(rf"[0-9.)]\s*\(?\s*{_VARIABLE}|{_VARIABLE}\s*\(|{_VARIABLE}\s+{_VARIABLE}")
# "xy", "2AB" and "AB^2"
_PRODUCT = re.compile(r"(?!pi|it|id)[a-z]{2}|[0-9.]+\s*[A-Z]{2,3}|[A-Z]{2,3}\s*[\^\u00b2\u00b3].*")
_JOINT = re.compile(r"\s[-+/]\s|[*\u00d7\u00b7\u22c5\u00f7]")
_PART_OF = re.compile(
    r"\b(?:half|twice|double|triple|thrice|quarter|third)\s+(?:of|the|an?|his|her|its|their|my|our)\b|%\s*of\b",
    re.IGNORECASE,
)


def computes_with_unknown(left: str, unit: str) -> bool:
    """Returns whether the left side of an equation computes with an unknown, so that the right side is another value.

    True for "2x", "x + 1", "|x|", "half of x" and "2 * width". False for names ("x_1", "AB", "f(2)", "the area") and
    for arithmetic with numbers and units ("3 + 4", "3 m + 4 m"). ``unit`` is the unit of the right side.
    """
    if _BOUND.match(left):
        return False
    text = _SUBSCRIPT.sub("", _DECORATION.sub("\u2220", _GREEK_COMMAND.sub("\u03b8", left))).strip()
    note = _UNIT_NOTE.search(text)
    parsed = note and parse_unit(note[1])
    if note and parsed and parsed.is_known and text[: note.start()].strip():  # "speed (m/s)"
        text = text[: note.start()].strip()
    text = _EULER.sub("1", _ARTICLE.sub("", _TIMES.sub(" * ", text)))
    text = _APPLICATION.sub("F", text)
    units = set(re.findall(_VARIABLE, unit))
    if units:
        text = re.sub(rf"(?<=[0-9])\s*(?:{'|'.join(map(re.escape, units))})(?![^\W\d_])", "", text)
    if re.search(_VARIABLE, text):
        return bool(_OPERATOR.search(text) or _COEFFICIENT.search(text))
    if _PRODUCT.fullmatch(text):
        return True
    operands = _JOINT.split(text)
    if len(operands) > 1 and any(
        re.search(r"[^\W\d_]", each) and not re.search("[0-9\u03c0]", each) for each in operands
    ):
        return True
    part = _PART_OF.search(text)
    return bool(part) and not re.search("[0-9]", text[part.end() if part else 0 :])


def is_value_of_equation_unclear(first: str, second: str) -> bool:
    """Returns whether a text is an equation of an unknown, such as "2x = 6", and the other text a value, such as "6".

    The value may be the unknown or the right side of the equation.
    """
    return any(
        _is_equation_of_unknown(text) and _is_value(value) for text, value in ((first, second), (second, first))
    )


def _is_value(text: str) -> bool:
    left, equal, right = text.partition("=")
    return not equal or not (computes_with_unknown(left.strip(), "") or re.search(_VARIABLE, right))


def _is_equation_of_unknown(text: str) -> bool:
    """Returns whether a text is an equation of an unknown that does not name its value, such as "2x = 6".

    False for "x = 6", "3 + 3 = 6" and texts that are not equations.
    """
    if re.search(r"[<>\u2260\u2264\u2265]|[!:]=|\\(?:ne|le|ge|lt|gt|neq|leq|geq)(?![A-Za-z])", text):
        return False
    left, equal, right = text.partition("=")
    if not equal:
        return False
    has_letter = re.search(r"[^\W\d_]", left)
    return computes_with_unknown(left.strip(), "") or (not has_letter and computes_with_unknown(right.strip(), ""))
