"""Reads and compares units of measurement: 7 m equals 700 cm and differs from 7 km."""

import dataclasses
import functools
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Literal

Dimension = tuple[tuple[str, int], ...]

_TEN = Fraction(10)
_PREFIXES = {"n": -9, "\u00b5": -6, "\u03bc": -6, "u": -6, "m": -3, "c": -2, "d": -1, "k": 3, "M": 6, "G": 9, "T": 12}
_PREFIX_WORDS = {"nano": -9, "micro": -6, "milli": -3, "centi": -2, "deci": -1, "kilo": 3, "mega": 6, "giga": 9}
# Units that take prefixes: symbol, words, factor, dimension. "C", "F", "K" and "B" are left out: they are ambiguous.
_SCALED = (
    ("m", "metre meter", "1", {"m": 1}),
    ("g", "gram gramme", "1/1000", {"kg": 1}),
    ("s", "second", "1", {"s": 1}),
    ("L", "litre liter", "1/1000", {"m": 3}),
    ("l", "", "1/1000", {"m": 3}),
    ("Hz", "hertz", "1", {"s": -1}),
    ("N", "newton", "1", {"kg": 1, "m": 1, "s": -2}),
    ("J", "joule", "1", {"kg": 1, "m": 2, "s": -2}),
    ("W", "watt", "1", {"kg": 1, "m": 2, "s": -3}),
    ("Wh", "", "3600", {"kg": 1, "m": 2, "s": -2}),
    ("Pa", "pascal", "1", {"kg": 1, "m": -1, "s": -2}),
    ("A", "ampere amp", "1", {"A": 1}),
    ("V", "volt", "1", {"kg": 1, "m": 2, "s": -3, "A": -1}),
    ("Nm", "", "1", {"kg": 1, "m": 2, "s": -2}),
    ("\u03a9", "ohm", "1", {"kg": 1, "m": 2, "s": -3, "A": -2}),
    ("\u2126", "", "1", {"kg": 1, "m": 2, "s": -3, "A": -2}),
    ("mol", "mole", "1", {"mol": 1}),
)
# Units without prefixes: all their names, factor, dimension.
_PLAIN = (
    ("min minute minutes mins", "60", {"s": 1}),
    ("h hr hrs hour hours", "3600", {"s": 1}),
    ("sec secs", "1", {"s": 1}),
    ("d day days", "86400", {"s": 1}),
    ("wk week weeks", "604800", {"s": 1}),
    ("month months", "1", {"month": 1}),
    ("yr yrs year years", "12", {"month": 1}),
    ("in inch inches", "0.0254", {"m": 1}),
    ("ft foot feet", "0.3048", {"m": 1}),
    ("yd yard yards", "0.9144", {"m": 1}),
    ("mi mile miles", "1609.344", {"m": 1}),
    ("mph", "0.44704", {"m": 1, "s": -1}),
    ("kmh kph kmph", "5/18", {"m": 1, "s": -1}),
    ("mps", "1", {"m": 1, "s": -1}),
    ("lbf", "4.4482216152605", {"kg": 1, "m": 1, "s": -2}),
    ("psi", "44482216152605/6451600000", {"kg": 1, "m": -1, "s": -2}),
    ("px pixel pixels", "1", {"pixel": 1}),
    ("dB decibel decibels", "1", {"decibel": 1}),
    ("t tonne tonnes", "1000", {"kg": 1}),
    ("mcg", "1/1000000000", {"kg": 1}),
    ("lb lbs pound pounds", "0.45359237", {"kg": 1}),
    ("oz ounce ounces", "0.028349523125", {"kg": 1}),
    ("ha hectare hectares", "10000", {"m": 2}),
    ("rpm", "1/60", {"s": -1}),
    ("\u00b0 deg degree degrees", "1", {"degree": 1}),
    ("rad radian radians", "1", {"radian": 1}),
)
# A kilobyte may have 1000 or 1024 bytes, so each unit of data is a separate base unit.
_DATA_PREFIXES = {"": "", "k": "kilo", "K": "kilo", "M": "mega", "G": "giga", "T": "tera", "P": "peta"}
_DATA = {"B": "byte", "b": "bit"}
# Symbols of other units, which differ from a known unit only in case ("mS" and "ms", "mM" and "mm", "kn" and "kN").
_OTHER_SYMBOLS = "mM nM uM \u00b5M \u03bcM mG kn knot MPS PSI PX"
_OTHER_SYMBOLS += "".join(f" {prefix}{symbol}" for prefix in "numk\u00b5\u03bcMG" for symbol in "ST")
_TEMPERATURES = {"\u00b0c": "celsius", "\u00b0f": "fahrenheit", "kelvin": "kelvin", "kelvins": "kelvin"}
_TEMPERATURES |= {"celsius": "celsius", "fahrenheit": "fahrenheit", "centigrade": "celsius"}

# Words after a number that change its value ("7 tenths"), or that belong to a sentence ("7 or more").
_VAGUE_WORDS = (
    "a an and as at below above between but by for from half halves hundredth hundredths if in into is less left"
    " loss lower higher minus more most least no not of off on or out over pair pairs plus point quarter quarters"
    " rest score shared than the then third thirds fourth fourths fifth fifths sixth sixths seventh sevenths eighth"
    " eighths ninth ninths tenth tenths thousandth thousandths times to under until versus vs where while with am pm"
    " bc ad bce ce o'clock x y z i j e pi sqrt couple couples gross remainder each unless which that was were are"
    " be k kilo mn mln mio bn mrd tsd b lots because since so maybe perhaps about approximately however wait"
    " fewer short behind deficit debt wrong incorrect doubled tripled halved inverse reciprocal mod"
    " squared cubed factorial root choose repeating recurring thou grand mil mill lac lacs cr"
    " quadrillion quadrillions quintillion quintillions sextillion sextillions"
)
_ORDINALS = (
    "eleventh twelfth thirteenth fourteenth fifteenth sixteenth seventeenth eighteenth nineteenth twentieth thirtieth"
    " fortieth fiftieth sixtieth seventieth eightieth ninetieth millionth billionth trillionth"
)
_VAGUE = frozenset([*_VAGUE_WORDS.split(), *_ORDINALS.split(), *(f"{name}s" for name in _ORDINALS.split()), "\u03c0"])
# Letters that are variables or functions and not units ("2r", "2\u03b8", "2xy", "2 cos x")
_SYMBOLS = re.compile(
    r"[^\W\d_BCFGHMSTu]|(?!cc)[abcxyz]{2,3}|\w*[\u0370-\u03a8\u03aa-\u03bb\u03bd-\u03ff]\w*"
    r"|(?:arc)?(?:sin|cos|tan|cot|csc)h?[A-Zaxy\u03b8]?|(?:log|ln|exp)[xy]?"
)
_LETTER = r"[^\W\d_\u00b2\u00b3\u00b9\u2070-\u2079]"  # superscripts count as letters in regular expressions
_TOKEN = re.compile(
    r"\s*(\*|\u00b7|\u22c5|\u2219|/|per\b)?\s*"
    rf"((?:\u00b0\s?)?{_LETTER}+\.?|\u00b0)"
    r"(?:(?:\s*\^\s*\{?\s*(-?[1-9])\s*\}?|([23]))(?![0-9])|(\u207b?[\u00b9\u00b2\u00b3\u2074-\u2079]))?"
)
_SUPERSCRIPT = str.maketrans("\u207b\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079", "-123456789")
_DEGREES_OF = re.compile(r"\b(?:degrees?|deg\.?)\s+(?=[CFK]\b)")
_MAX_WORDS = 4


@dataclasses.dataclass(frozen=True, slots=True)
class Unit:
    """A unit of measurement.

    Attributes:
        dimension: (base unit, power) pairs, sorted by name: ``(("m", 1), ("s", -1))`` for "km/h". An unknown word
            counts as a base unit.
        factor: Value of the unit in its base units: 1/100 for "cm".
        is_known: Whether every word of the unit is a known unit.
        other: The other reading of a product after a quotient, or None: J/(g K) for "J/g K", read as (J/g) K.
    """

    dimension: Dimension
    factor: Fraction = Fraction(1)
    is_known: bool = True
    other: "Unit | None" = None


@functools.cache
def _units() -> dict[str, tuple[Fraction, dict[str, int]]]:
    units: dict[str, tuple[Fraction, dict[str, int]]] = {}
    for symbol, words, text, dimension in _SCALED:
        factor = Fraction(text)
        units[symbol] = (factor, dimension)
        units |= {f"{prefix}{symbol}": (factor * _TEN**power, dimension) for prefix, power in _PREFIXES.items()}
        for word in words.split():
            for name in (word, f"{word}s"):
                units[name] = (factor, dimension)
                units |= {f"{pre}{name}": (factor * _TEN**power, dimension) for pre, power in _PREFIX_WORDS.items()}
    for symbol, word in _DATA.items():
        for prefix, pre in _DATA_PREFIXES.items():
            base = f"{pre}{word}"
            names = [base, f"{base}s", *([f"{prefix}{symbol}"] if prefix else [])]
            names += [f"{prefix}bit", f"{prefix}bits"] if symbol == "b" else []
            units |= dict.fromkeys(names, (Fraction(1), {base: 1}))
            units[f"{prefix}{symbol}ps"] = (Fraction(1), {base: 1, "s": -1})
    for plain, text, dimension in _PLAIN:
        units |= dict.fromkeys(plain.split(), (Fraction(text), dimension))
    return units


@functools.cache
def _folded_units() -> dict[str, tuple[Fraction, dict[str, int]]]:
    """Returns the units of ``_units`` by lower-case name.

    Single letters are left out. So are names that are ambiguous in lower case, such as "mW" and "MW".
    """
    units = _units() | {name: (Fraction(0), {}) for name in _OTHER_SYMBOLS.split() if name not in _units()}
    folded: dict[str, tuple[Fraction, dict[str, int]]] = {}
    for name, unit in units.items():
        if len(name) == 1:
            continue
        same = folded.setdefault(name.casefold(), unit)
        if same != unit:
            folded[name.casefold()] = (Fraction(0), {})
    return {name: unit for name, unit in folded.items() if unit[0]}


@functools.lru_cache(maxsize=4096)
def parse_unit(text: str) -> Unit | None:
    """Returns the unit in the text that follows a number, or None if the text does not name a unit.

    A unit may be a product or a quotient with powers ("N m", "kg/m^3", "m s⁻²", "square metres", "miles per hour").
    Unknown words count as an unknown unit ("apples"). Words that may change the value ("tenths", "or more") give None.
    More than four words also give None.
    """
    text = _DEGREES_OF.sub("\u00b0", text.strip())
    terms = _terms(text)
    if not terms:
        return None
    unit = _product([(word, power) for word, power, _ in terms], text)
    if not any(is_unclear for _, _, is_unclear in terms):
        return unit
    other = _product([(word, -power if is_unclear else power) for word, power, is_unclear in terms], text)
    return dataclasses.replace(unit, other=other)


def _terms(text: str) -> list[tuple[str, int, bool]] | None:
    """Splits a unit into words.

    Returns (word, power, is_unclear) for each word, or None if the text does not name a unit. ``is_unclear`` tells
    whether the word follows a quotient without another "/", as "K" in "J/g K", so that its sign is unclear.
    """
    terms: list[tuple[str, int, bool]] = []
    position, words, next_power, next_sign, is_quotient = 0, 0, 1, "", False
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None or words == _MAX_WORDS:
            return None
        word, position, words = match[2], match.end(), words + 1
        lower = word.casefold().rstrip(".")
        sign = match[1] or next_sign
        if lower in ("square", "sq", "cubic", "cu"):
            next_power, next_sign = (3 if lower.startswith("cu") else 2), sign
            continue
        if lower in ("squared", "cubed") and terms:
            latest, power, is_unclear = terms[-1]
            terms[-1] = latest, power * (2 if lower == "squared" else 3), is_unclear
            continue
        is_inch = lower == "in" and (sign or next_power != 1 or any(match.groups()[2:]) or text == word)
        if (word if len(word) == 1 else lower) in _VAGUE and not is_inch:
            return None
        if _SYMBOLS.fullmatch(word.rstrip(".")) and _find(word, text) is None:
            return None
        power = int(match[3] or match[4] or (match[5] or "1").translate(_SUPERSCRIPT)) * next_power
        is_divided = sign in ("/", "per")
        terms.append((word, -power if is_divided else power, is_quotient and not is_divided and power > 0))
        is_quotient, next_power, next_sign = is_quotient or is_divided, 1, ""
    return None if next_power != 1 else terms  # "5 square": the unit is missing


def _product(terms: list[tuple[str, int]], text: str) -> Unit:
    powers: dict[str, int] = {}
    factor, is_known = Fraction(1), True
    for word, power in terms:
        unit = _find(word, text)
        is_known = is_known and unit is not None
        size, bases = unit or (Fraction(1), {_singular(word): 1})
        factor *= size**power
        for base, exponent in bases.items():
            powers[base] = powers.get(base, 0) + exponent * power
    dimension = tuple(sorted((base, power) for base, power in powers.items() if power))
    return Unit(dimension, factor, is_known)


def _find(word: str, text: str) -> tuple[Fraction, dict[str, int]] | None:
    """Returns the factor and the dimension of ``word``, or None if ``word`` does not name a known unit.

    ``text`` is the expression that contains the word. For example, "degrees" means a temperature if the text is
    "degrees Celsius", otherwise an angle.
    """
    name = word.replace(" ", "").rstrip(".")
    scale = "kelvin" if name in ("K", "\u00b0K") else _TEMPERATURES.get(name.casefold())
    if scale is not None:
        return Fraction(1), {scale: 1}
    if name in ("degree", "degrees", "deg", "\u00b0") and any(scale in text.casefold() for scale in _TEMPERATURES):
        return Fraction(1), {}  # "degrees Celsius": the scale itself is the unit
    return _units().get(name) or _folded_units().get(name.casefold())


def fold_unit(text: str) -> str:
    """Returns a unit with its words in lower case. Symbols keep their case: "GB" and "Gb" are different units."""
    return " ".join(map(_fold_word, text.split()))


def _fold_word(word: str) -> str:
    is_word = word.islower() or word.istitle() or (word.isupper() and len(word) > 3)
    return word.casefold() if len(word) > 2 and is_word else word


def is_case_off(first: str, second: str) -> bool:
    """Returns whether two texts differ only in case, and the case may change a unit, as in "5 M" and "5 m"."""
    if first == second or first.casefold() != second.casefold():
        return False
    symbols = zip(_AFTER_NUMBER.findall(first), _AFTER_NUMBER.findall(second), strict=False)
    return any(
        fold_unit(symbol) != fold_unit(other) and compare_units(symbol, other) != 1 for symbol, other in symbols
    )


_AFTER_NUMBER = re.compile(rf"[0-9)}}]\s*(?:\\(?:text|mathrm|textrm|mbox)\s*\{{\s*)?({_LETTER}+)")


def _singular(word: str) -> str:
    word = _fold_word(word.rstrip("."))
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


def compare_units(first: str, second: str) -> Fraction | Literal["different", "unclear"]:
    """Compares two units.

    Returns:
        A factor, "different" or "unclear". The factor converts a value from the first unit to the second. "different"
        means that the units measure different quantities. "unclear" means that a unit is unknown or ambiguous, or that
        no constant factor converts the units. Examples are °C and °F, or months and seconds. Two different units of
        data, such as bytes and kilobytes, are also "unclear", because a kilobyte may have 1000 or 1024 bytes.
    """
    if first == second:
        return Fraction(1)
    left, right = parse_unit(first), parse_unit(second)
    if left is None or right is None:
        return "unclear"
    result = _compare_parsed(left, right)
    if (left.other or right.other) and result != _compare_parsed(left.other or left, right.other or right):
        return "unclear"
    if result != "different":
        return result
    for pattern, name in _OTHER_MEANINGS:
        left, right = (parse_unit(pattern.sub(name, text)) for text in (first, second))
        if left and right and left.dimension == right.dimension:
            is_pressure = left.dimension == _PRESSURE  # "pounds per square inch"
            return left.factor / right.factor if name == "lbf" and is_pressure else "unclear"
    return "different"


def _compare_parsed(left: Unit, right: Unit) -> Fraction | Literal["different", "unclear"]:
    if left.dimension == right.dimension:
        return left.factor / right.factor
    if not (left.is_known and right.is_known):
        return "unclear"
    scales = {"celsius", "fahrenheit", "kelvin", "degree", "radian"}
    if all(len(unit.dimension) == 1 and unit.dimension[0][0] in scales for unit in (left, right)):
        return "unclear"
    if {base for base, _ in left.dimension} & _DATA_BASES and {base for base, _ in right.dimension} & _DATA_BASES:
        return "unclear"
    if any(_with_bases(left.dimension, names) == _with_bases(right.dimension, names) for names in _SIMILAR_BASES):
        return "unclear"
    return "different"


def _with_bases(dimension: Dimension, names: Mapping[str, str]) -> dict[str, int]:
    """Returns a dimension as a dict with base units renamed by ``names``. Leaves out base units with the name ""."""
    powers: dict[str, int] = {}
    for base, power in dimension:
        name = names.get(base, base)
        powers[name] = powers.get(name, 0) + power
    return {base: power for base, power in powers.items() if base and power}


_TEMPERATURE_BASES = dict.fromkeys(("celsius", "fahrenheit", "kelvin"), "temperature")
# Base units between which no constant factor converts, or which are often left out: radians, and degrees, which may be
# angles or temperatures. Months have no fixed number of days.
_SIMILAR_BASES: tuple[Mapping[str, str], ...] = (
    {**_TEMPERATURE_BASES, "degree": "", "radian": "", "month": "s"},
    {**_TEMPERATURE_BASES, "degree": "temperature", "radian": "", "month": "s"},
)
_PRESSURE: Dimension = (("kg", 1), ("m", -1), ("s", -2))
# Words with a second meaning: "m" may be minutes, a pound may be a force, "ms^{-1}" may be m/s, and "Nm^2" N m^2.
_OTHER_MEANINGS = (
    (re.compile(rf"(?<!{_LETTER})m(?!{_LETTER})"), "min"),
    (re.compile(rf"(?<!{_LETTER})(?:lbs?|pounds?)(?!{_LETTER})", re.IGNORECASE), "lbf"),
    (re.compile(rf"(?<!{_LETTER})ms(?=\s*\^?\s*\{{?\s*[-\u207b])"), "m s"),
    (re.compile(rf"(?<!{_LETTER})([kMm]?N)m(?=\s*\^|[23\u00b2\u00b3\u207b])"), r"\1 m"),
)
_DATA_BASES = frozenset(f"{pre}{word}" for pre in _DATA_PREFIXES.values() for word in _DATA.values())
_SCALES = frozenset({"celsius", "fahrenheit", "kelvin"})
_DATA_FACTORS = frozenset(bits * size for bits in (1, 8) for size in (1, 1000, 1024, 10**6, 1 << 20, 10**9, 1 << 30))
_FACTORS = (
    "3 7 12 14 16 24 30 36 52 60 144 168 180 360 365 1440 1760 3600 5280 86400 3.6 2.2 1.8 2.54 30.48 0.3048 0.9144"
    " 1.609344 1.61 1.6 0.45359237 28.349523125"
)
_CONVERSIONS = frozenset(map(Fraction, _FACTORS.split()))


def may_be_converted(first: Fraction, second: Fraction, unit: str) -> bool:
    """Returns whether a value with the unit ``unit`` may be the same quantity as a value without a unit.

    ``first`` and ``second`` are these values, in either order. The result is True in the following cases:

    - The values differ only in the sign.
    - ``parse_unit`` cannot read ``unit``.
    - ``unit`` is a temperature. The values are the same temperature in Celsius, Fahrenheit or kelvin.
    - ``unit`` is "K", and one value is 1000 times the other, because "K" may mean thousand.
    - ``unit`` is not a temperature, and the ratio of the values is a power of ten.
    - ``unit`` is a known unit, but not a temperature, and the ratio is a usual factor between units, such as 60.
    - ``unit`` is a unit of data, such as "MB", and the ratio is a usual factor between such units, such as 1024.
    """
    parsed = parse_unit(unit)
    if first == -second or parsed is None:
        return True
    if parsed.is_known and {base for base, _ in parsed.dimension} & _SCALES:
        is_thousand = unit == "K" and (first == 1000 * second or second == 1000 * first)
        return is_thousand or _is_temperature(first, second)
    if not first or not second:
        return False
    ratio = abs(first / second)
    ratio = 1 / ratio if ratio < 1 else ratio
    is_power = ratio.denominator == 1 and str(ratio.numerator).rstrip("0") == "1"
    if {base for base, _ in parsed.dimension} & _DATA_BASES and ratio in _DATA_FACTORS:
        return True
    return is_power or (parsed.is_known and (ratio in _CONVERSIONS or 1 / ratio in _CONVERSIONS))


def _is_temperature(first: Fraction, second: Fraction) -> bool:
    zeros = (Fraction("273.15"), Fraction(273))  # of Celsius in kelvin, exact and rounded
    for celsius, other in ((first, second), (second, first)):
        if other == celsius * Fraction(9, 5) + 32 or other - celsius in zeros:
            return True
    for fahrenheit, kelvin in ((first, second), (second, first)):
        if kelvin - (fahrenheit - 32) * Fraction(5, 9) in zeros:
            return True
    return False
