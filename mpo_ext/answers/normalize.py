"""Normal forms of answers."""

import re

_WRAPPERS = (("**", "**"), ("*", "*"), ("`", "`"), ("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"))
_TEXT_COMMAND = re.compile(r"\\(?:boxed|text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*(?=\{)")
# Full-width forms and the signs that stand for a minus, without what NFKC would do to 5 and its superscript.
ASCII_FORMS = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {
    0x3000: " ",
    0x2212: "-",
    0xFE63: "-",
    0x2010: "-",
    0x2011: "-",
    0x2012: "-",
    0x2013: "-",
}


def fold(text: str) -> str:
    """Lower case, single spaces, plain forms of full-width characters and of minus signs."""
    return " ".join(text.translate(ASCII_FORMS).casefold().split())


def clean_answer(answer: str) -> str:
    r"""Takes off what wraps an answer: markdown, math delimiters, a box, ``\text{}``, a final period."""
    before = None
    while answer != before:
        before = answer
        answer = answer.strip()
        for left, right in _WRAPPERS:
            inner = answer[len(left) : len(answer) - len(right)]
            if answer.startswith(left) and answer.endswith(right) and inner.strip() and left not in inner:
                answer = inner
                break
        if answer.count("**") == 1:  # its partner stood before the marker
            answer = answer.removeprefix("**").removesuffix("**")
        command = _TEXT_COMMAND.match(answer)
        if command and closing_brace(answer, command.end()) == len(answer) - 1:
            answer = answer[command.end() + 1 : -1]
        is_abbreviation = re.search(r"[^\W\d]\.[^\W\d]\.$", answer)
        if answer.endswith((".", "\u3002")) and not answer.endswith("..") and not is_abbreviation:
            answer = answer[:-1]
    return answer


def closing_brace(text: str, opening: int) -> int | None:
    """Position of the brace that closes the one at ``opening``; escaped braces do not count."""
    depth = 0
    position = opening
    while position < len(text):
        if text[position] == "\\":
            position += 1
        elif text[position] == "{":
            depth += 1
        elif text[position] == "}":
            depth -= 1
            if depth == 0:
                return position
        position += 1
    return None
