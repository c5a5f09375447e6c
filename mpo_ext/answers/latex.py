r"""Writes mathematical answers as LaTeX for math-verify, and finds the parts that math-verify would drop or misread.

math-verify drops symbols and commands that it does not know: it reads ``2\foo`` as 2. An expression with such a part
is therefore unreadable.
"""

import re
import unicodedata

from mpo_ext.answers.normalize import BRACES, closing_brace, fold

_SYMBOLS = {"\u00d7": "\\times ", "\u00b7": "\\cdot ", "\u22c5": "\\cdot ", "\u2219": "\\cdot ", "\u00f7": "\\div "}
_SYMBOLS |= {"\u221e": "\\infty ", "\u2264": "\\le ", "\u2265": "\\ge ", "\u2260": "\\ne ", "\u00b1": "\\pm "}
_SYMBOLS |= {"\u222a": "\\cup ", "\u2229": "\\cap ", "\u2205": "\\emptyset ", "\u2220": "\\angle ", "\u2044": "/"}
_SYMBOLS |= {"\u25b3": "\\triangle ", "\u211d": "\\mathbb{R}", "\u00b0": "^{\\circ}", "\u2032": "'", "\u2026": "..."}
_SYMBOLS |= {"**": "^", "\\varnothing": "\\emptyset ", "\\varepsilon": "\\epsilon ", "\\leqslant": "\\le "}
_SYMBOLS |= {"\\geqslant": "\\ge ", "\\ldots": "...", "\\dots": "...", "\u00a0": " ", "\u2009": " ", "{,}": ","}
_GREEK = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho final sigma tau"
_GREEK += " upsilon phi chi psi omega"
_CAPITALS = "Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega"
_GREEK_LETTERS = {chr(0x3B1 + index): f"\\{name} " for index, name in enumerate(_GREEK.split())}
_GREEK_LETTERS |= {
    chr(0x391 + index): f"\\{name.title()} "
    for index, name in enumerate(_GREEK.split())
    if name.title() in _CAPITALS.split()
}
_GREEK_LETTERS |= {"\u00b5": "\\mu "}
_GREEK_RUN = re.compile(r"[\u0370-\u03ff\u00b5]+")
_RAISED = re.compile(r"[\u2070\u00b9\u00b2\u00b3\u2074-\u207b\u207f]+")
_LOWERED = re.compile(r"[\u2080-\u208b\u2090-\u2099]+")
_ROOTS = {"\u221a": "", "\u221b": "[3]", "\u221c": "[4]"}
# "√2x" and "√x²" have two readings: the root sign remains, so that the expression is unreadable.
_ROOT = re.compile(
    r"([\u221a-\u221c])\s*(?:\{([^{}]*)\}|\(([^()]*)\)|([0-9]+(?:\.[0-9]+)?|[A-Za-z\u03b1-\u03c9]))(?!\s*[\w^!({.\\])"
)
_FRACTION = re.compile(r"(?<![\w.])[\u00bc-\u00be\u2150-\u215e](?![0-9.])")

_NAMES = "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|log|ln|exp"
_SQRT = re.compile(r"(?<![\\A-Za-z])\\?sqrt\s*(?:\(([^()]*)\)|([0-9]+(?:\.[0-9]+)?|[A-Za-z])(?![\w.^]))")
_WHOLE_NAME = re.compile(rf"(?<![\\A-Za-z])({_NAMES}|pi|infty)(?![A-Za-z])")
_JOINED_NAME = re.compile(r"(?<![\\A-Za-z])(sin|cos|tan|log|ln)([a-z])(?![A-Za-z])")  # "sinx"
_LETTERS_AND_NAME = re.compile(r"(?<![\\A-Za-z])([A-Za-z]{1,3})(sin|cos|tan|log|ln)(?=\s*[\\({^])")  # "mgsin(x)"
_REPEATING = re.compile(r"(?<![0-9.])([0-9]*)\.([0-9]*)\\(?:overline|bar|dot)\s*(?:\{([0-9]+)\}|([0-9]))(?![0-9.\\])")
_THOUSANDS = re.compile(r"(?<![0-9,.])[0-9]{1,3}(?:,[0-9]{3})+(?=[A-Za-z\\])")
_DEGREES = re.compile(r"([0-9]+(?:\.[0-9]+)?|(?<![\\A-Za-z])[A-Za-z])\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))")
_COMMON_LOGARITHM = re.compile(r"\\lg(?![A-Za-z])")
_SIGNED_POWER = re.compile(r"\^\s*(-)\s*([0-9]+|[A-Za-z])(?![\w.])")
_SIMPLE_FRACTION = re.compile(r"(?<![\w.^{/])([0-9]+)\s*/\s*([0-9]+)\s*(?=[A-Za-z(\\])")
_TRIGONOMETRIC = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")

_KNOWN = (
    "frac dfrac tfrac cfrac sqrt cdot times div left right text mathrm textrm mbox infty le leq ge geq ne neq lt gt"
)
_KNOWN += " cup cap emptyset circ degree binom dbinom tbinom cot sec csc coth lg max min int sum prod pm mp lfloor"
_KNOWN += " rfloor lceil rceil lvert rvert vert in displaystyle quad qquad varphi vartheta varrho big Big bigl bigr"
_COMMANDS = frozenset(f"{_KNOWN} {_GREEK} {_CAPITALS} {_NAMES.replace('|', ' ')}".split())
_ACCENT = re.compile(
    r"\\(vec|hat|bar|tilde|dot|ddot|overline|overrightarrow|mathbf|boldsymbol|mathcal|mathbb)(?![A-Za-z])\s*"
    r"(\{[^{}]*\}|\\?[A-Za-z]+)"
)
_DELIMITER = re.compile(r"(?<!\\)\$|(?<!\\)\\[()]")
_ENVIRONMENT = re.compile(r"\\(?:begin|end)\s*\{(?:[pbvBV]?matrix|array)\}")
_UNKNOWN = re.compile(
    r"[^\x20-\x7e\s]|[#@?\"`;]|\.\.\.|\\circ\s*\}?\s*[A-Z]"  # "25^\circ C" is a temperature
    r"|(?<!_)[0-9](?:\s|\\[,:!])+[0-9]|\.[0-9]*\(|!\s*!|\|\s*_"  # math-verify adds the numbers in "2 3 x"
    r"|(?<![\\A-Za-z])(?:mod|MOD)(?![A-Za-z])|[0-9]\s*[CPXx]\s*[0-9]"
    r"|(?<!\\frac )(?<![\\A-Za-z])[A-Za-z]+[0-9]|[0-9][eE]-[0-9]|\\sqrt\s*[0-9]{2}"  # "x2" has several readings
)
_DANGLING = re.compile(
    r"(?:[-+*/^_=<>,(\[{]|\\(?:cdot|times|div|frac|sqrt|pm|mp|le|ge|ne|cup|cap|in))\s*\$*\s*$|^\s*\$*\s*[*/^_=<>,)\]]"
)
# Labels, transposes, number bases and dates: math-verify reads them as products, powers or differences, or drops them.
_LABELS = re.compile(
    r"\\(?:angle|measuredangle|triangle|prime|top|intercal)(?![A-Za-z])|[A-Za-z)\]}]\s*'"
    r"|[A-Z]\)?\s*\^\s*\{?\s*(?:\\mathrm\s*\{\s*)?T(?![a-z])|[0-9]\s*_\s*\{?\s*[0-9]"
    r"|(?<![0-9])[0-9]{1,2}:[0-5][0-9]\s*[AaPp]\.?\s*[Mm]|(?<!\w)(?:[A-F]{2,}\s*_\s*\{?\s*16|0[box][0-9A-Fa-f]+)(?!\w)"
    r"|(?<![0-9])(?:[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}|[0-9]{1,2}-[0-9]{1,2}-[0-9]{4})(?![0-9])"
    r"|(?<![0-9])(?:[0-9]{4}([./])[0-9]{1,2}\1[0-9]{1,2}|[0-9]{1,2}([./])[0-9]{1,2}\2[0-9]{2,4})(?![0-9])"
)
_RANGE = re.compile(r"[0-9]+(?:\.[0-9]+)?\s*-\s*[0-9]+(?:\.[0-9]+)?")
_TIME = re.compile(r"[0-9]{1,2}:[0-5][0-9]")
_PRIME = re.compile(r"[A-Za-z)\]}]\s*['\u2032](?![A-Za-z])")
_DERIVATIVE = re.compile(
    r"^(?:[A-Za-z]'+\s*(?:\([^()=]*\))?|\\[dt]?frac\s*\{d[A-Za-z]\}\s*\{d[A-Za-z]\}|d[A-Za-z]/d[A-Za-z])\s*=(?=[^=]*$)"
)
_LETTER = re.compile(r"\\(?:begin|end|mathbb)\s*\{[^{}]*\}|\\[A-Za-z]+|[A-Za-z]")
_FREE_LETTERS = "kjqwzvuycbnmhrtlsxpa"  # no letters that have a meaning, such as "d", "e", "f" and "i"
_RUN = re.compile(r"\\?[^\W\d_]+")
_WORDS = "no yes up on in a all any odd one two six ten egg ice arm ear eye oak owl ash old air oil out"
_SHORT_WORDS = frozenset(_WORDS.split())


def to_latex(text: str) -> str:
    r"""Returns an expression with signs and names replaced by LaTeX: "2√3" becomes "2\sqrt{3}", and "sin x" "\sin x".

    Signs with several readings remain. ``is_readable`` finds them.
    """
    text = _without_box(_DELIMITER.sub("", text))
    text = _RAISED.sub(lambda match: f"^{{{_plain(match[0])}}}", text)
    text = _LOWERED.sub(lambda match: f"_{{{_plain(match[0])}}}", text)
    text = _FRACTION.sub(_fraction, text)
    before = ""
    while text != before:  # a root may contain a root
        before = text
        text = _ROOT.sub(lambda match: f"\\sqrt{_ROOTS[match[1]]}{{{match[2] or match[3] or match[4]}}}", text)
    text = _GREEK_RUN.sub(_greek, text)
    for symbol, name in _SYMBOLS.items():
        text = text.replace(symbol, name)
    text = _REPEATING.sub(_repeating, text)
    if not re.search(r"[()\[\]{}]", text[: text.find(",") + 1]):  # in "(1,234x)", the comma may separate two values
        text = _THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
    text = _COMMON_LOGARITHM.sub(r"\\log_{10}", text)
    text = _SIGNED_POWER.sub(r"^{\1\2}", text)
    text = _ACCENT.sub(lambda match: f"\\{match[1]}{{{match[2].strip('{}')}}}", text)
    text = _SQRT.sub(lambda match: f"\\sqrt{{{match[1] or match[2]}}}", text)
    text = _LETTERS_AND_NAME.sub(lambda match: match[0] if match[0] in _COMMANDS else f"{match[1]}\\{match[2]} ", text)
    text = _JOINED_NAME.sub(lambda match: match[0] if match[0] in _COMMANDS else f"\\{match[1]} {match[2]}", text)
    return _WHOLE_NAME.sub(r"\\\1 ", text).strip()


def _without_box(text: str) -> str:
    r"""Removes a ``\boxed{}`` around an expression, or around the right side of an equation."""
    box = re.search(r"(?:^|=)\s*(\\boxed\s*)(?=\{)", text)
    if box is None or closing_brace(text, box.end()) != len(text) - 1:
        return text
    return text[: box.start(1)] + text[box.end() + 1 : -1]


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text).replace("\u2212", "-")


def _fraction(match: re.Match[str]) -> str:
    numerator, _, denominator = _plain(match[0]).partition("\u2044")
    return f"\\frac{{{numerator}}}{{{denominator}}}"


def _greek(match: re.Match[str]) -> str:
    """Returns the names of one or two Greek letters. A longer run is a word."""
    return match[0] if len(match[0]) > 2 else "".join(_GREEK_LETTERS.get(letter, letter) for letter in match[0])


def _repeating(match: re.Match[str]) -> str:
    r"""Returns a repeating decimal as a fraction: "0.1\overline{6}" becomes 15/90."""
    period = match[3] or match[4]
    whole = match[1] + match[2]
    numerator = int(whole + period) - int(whole or "0")
    return f"\\frac{{{numerator}}}{{{'9' * len(period)}{'0' * len(match[2])}}}"


def is_readable(text: str) -> bool:
    """Returns whether math-verify reads all parts of an expression. The text is a result of ``to_latex``."""
    braces = [brace[0] for brace in BRACES.finditer(text)]
    if braces.count("{") != braces.count("}") or braces.count("\\{") != braces.count("\\}"):
        return False
    if sum(text.count(mark) for mark in "([") != sum(text.count(mark) for mark in ")]"):
        return False
    bare = _ENVIRONMENT.sub(" ", text)
    if ("&" in bare and bare == text) or _UNKNOWN.search(bare) or _DANGLING.search(bare):
        return False
    commands = re.findall(r"\\([A-Za-z]+)", _ACCENT.sub(r"\2", bare))
    return all(command in _COMMANDS for command in commands)


def is_notation_unclear(first: str, second: str) -> bool:
    r"""Returns whether labels and accents prevent a comparison of two expressions that are written differently.

    math-verify reads the label "\angle ABC" as a product of letters, and drops the accent of "\mathbf{x}".
    """
    if _LABELS.search(first) or _LABELS.search(second):
        return True
    if first.count("_") != second.count("_") and re.sub(r"[_{}\s]", "", first) == re.sub(r"[_{}\s]", "", second):
        return True  # "x1" and "x_1"
    accents = [
        sorted((match[1], match[2].strip("{}")) for match in _ACCENT.finditer(text)) for text in (first, second)
    ]
    return accents[0] != accents[1]


def has_prime(text: str) -> bool:
    """Returns whether a text has a variable with a prime, such as "2A'". In 5'6", the mark is a unit."""
    return _PRIME.search(text) is not None


def without_derivative(first: str, second: str) -> tuple[str, str]:
    """Removes the name of a derivative if the other text has no equals sign: "f'(x) = 2x" and "2x"."""
    if "=" not in second:
        first = _DERIVATIVE.sub("", first).strip()
    elif "=" not in first:
        second = _DERIVATIVE.sub("", second).strip()
    return first, second


def rename_capitals(*texts: str) -> list[str] | None:
    r"""Renames capital letters in expressions, because math-verify reads "R" as "r", and "\gamma" as a constant.

    Letters are renamed if they occur in both cases, and also "D", "E" and "I", which have a meaning as small letters.

    Returns:
        The expressions, all with the same new names. None if there are not enough letters.
    """
    symbols = {symbol for text in texts for symbol in _LETTER.findall(text) if "{" not in symbol}
    renamed = sorted(
        symbol
        for symbol in symbols
        if symbol in ("D", "E", "I", "\\gamma", "\\Gamma")
        or (symbol != symbol.lower() and symbol.lower() in symbols and symbol.strip("\\") not in _NAMES)
    )
    free = [letter for letter in _FREE_LETTERS if letter not in symbols and letter.upper() not in symbols]
    if len(free) < len(renamed):
        return None
    names = dict(zip(renamed, free, strict=False))
    return [
        _LETTER.sub(lambda match: names[match[0]] + " " if match[0] in names else match[0], text) for text in texts
    ]


def in_radians(text: str, other: str) -> str:
    r"""Returns an expression with its degrees in radians, if it needs radians to be compared with another expression.

    It needs radians in a trigonometric function ("\sin 30^\circ"), or if the other expression has \pi and no degrees.
    """
    needs_radians = _TRIGONOMETRIC.search(text) or (r"\pi" in other and not _DEGREES.search(other))
    return _DEGREES.sub(r"(\\frac{\1\\pi}{180})", text) if needs_radians else text


def with_fractions(text: str) -> str:
    r"""Returns an expression in which a fraction of numbers ends at its digits: "1/2x" becomes "\frac{1}{2}x"."""
    return _SIMPLE_FRACTION.sub(r"\\frac{\1}{\2}", text)


def may_be_range_or_time(first: str, second: str) -> bool:
    """Returns whether two expressions may be ranges or times instead of differences or ratios of numbers.

    Examples are "2010-2012" and "10:30".
    """
    texts = first, second
    return any(_RANGE.fullmatch(text) for text in texts) or all(_TIME.fullmatch(text) for text in texts)


def canonical(text: str) -> str:
    """Returns an expression without spaces beside signs and commands, and without braces around single characters."""
    return re.sub(r"\s*(\\[A-Za-z]+|[^\w\s])\s*", r"\1", re.sub(r"([_^])\s*\{(\w)\}", r"\1\2", text))


def _without_spaces(text: str) -> str:
    return "".join(text.split())


def is_same_but_case(first: str, second: str) -> bool:
    """Returns whether two different texts are equal apart from case and spaces, and may differ in meaning.

    Words in other case have the same meaning ("Yes" and "yes"), variables may not ("V/R" and "v/r").
    """
    if _without_spaces(fold(first)) != _without_spaces(fold(second)) or _without_spaces(first) == _without_spaces(
        second
    ):
        return False
    runs, others = _RUN.findall(first), _RUN.findall(second)
    if len(runs) != len(others):
        return True
    is_alone = len(runs) == 1
    return any(run != other and not _is_word(run, other, is_alone) for run, other in zip(runs, others, strict=True))


def _is_word(first: str, second: str, is_alone: bool) -> bool:
    """Returns whether a run of letters, which two texts write in different case, is a word of ordinary language."""
    if first.startswith("\\") or not all(run.islower() or run.istitle() or run.isupper() for run in (first, second)):
        return False
    word = first.casefold()
    if word in _SHORT_WORDS:
        return len(word) > 1 or not is_alone
    if not word.isascii() or word in ("dne", "nan"):
        return len(word) > 1
    if word in "abcdefghijklmnopqrstuvwxyz" or not re.search("[aeiouy]", word):
        return False  # the letters of a figure ("abc"), or a product
    return len(word) > 3 or re.fullmatch("[^aeiou][aeiouy].", word) is not None


def is_word(text: str) -> bool:
    """Returns whether a run of at most three letters is a word, such as "red". Other runs are products, as "xy"."""
    return _is_word(text, text.casefold(), True)
