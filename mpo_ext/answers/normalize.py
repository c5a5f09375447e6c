"""Normalizes answers for comparisons."""

import re
import unicodedata

_WRAPPERS = (("**", "**"), ("*", "*"), ("`", "`"), ("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"))
# Maximum number of wrappings to remove, which is smaller for an answer of more than _LONG characters, to save time.
_MAX_WRAPPINGS, _LONG, _MAX_WRAPPINGS_OF_LONG = 50, 2000, 4
#: Braces and escaped characters; an escaped brace does not count.
BRACES = re.compile(r"\\.|[{}]", re.DOTALL)
_MARKUP = re.compile(r"[*`$\\.\u3002]")
_TEXT_COMMAND = re.compile(r"\\(?:boxed|text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*(?=\{)")
# Maps full-width characters and minus-like signs to ASCII. NFKC would also turn a superscript into a digit.
TO_ASCII: dict[int, int | str] = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
TO_ASCII |= {0x3000: " ", **dict.fromkeys((0x2212, 0xFE63, 0x2010, 0x2011, 0x2012, 0x2013), "-")}


def fold(text: str) -> str:
    """Returns a text in lower case with single spaces.

    Full-width characters and minus signs become ASCII. Other characters get their composed form (NFC): an "e" with a
    separate accent equals "é".
    """
    if text.isascii():
        return " ".join(text.casefold().split())
    text = unicodedata.normalize("NFC", text).translate(TO_ASCII).casefold()
    return " ".join(unicodedata.normalize("NFC", text).split())


def clean_answer(answer: str) -> str:
    r"""Removes a final period, markdown, math delimiters, ``\boxed{}`` and ``\text{}`` around an answer."""
    if not _MARKUP.search(answer):
        return answer.strip()
    for _ in range(_MAX_WRAPPINGS if len(answer) <= _LONG else _MAX_WRAPPINGS_OF_LONG):
        before = answer
        answer = answer.strip()
        for left, right in _WRAPPERS:
            inner = answer[len(left) : len(answer) - len(right)]
            if answer.startswith(left) and answer.endswith(right) and inner.strip() and left not in inner:
                answer = inner
                break
        if answer.count("**") == 1:  # the other ** was cut off, as in "7**" from "**Answer: 7**"
            answer = answer.removeprefix("**").removesuffix("**")
        command = _TEXT_COMMAND.match(answer)
        if command and closing_brace(answer, command.end()) == len(answer) - 1:
            answer = answer[command.end() + 1 : -1]
        is_abbreviation = re.search(r"[^\W\d]\.[^\W\d]\.$", answer)
        if answer.endswith((".", "\u3002")) and not answer.endswith("..") and not is_abbreviation:
            answer = answer[:-1]
        if answer == before:
            break
    return answer


def closing_brace(text: str, opening: int) -> int | None:
    """Returns the index of the brace that closes the brace at index ``opening``, or None.

    Escaped braces do not count.
    """
    depth = 0
    for brace in BRACES.finditer(text, opening):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0 and brace[0] == "}":
            return brace.start()
    return None
