"""Extracts the answer from a response."""

import re

from mpo_ext.answers.normalize import BRACES, clean_answer, closing_brace
from mpo_ext.answers.units import parse_unit

STYLES = ("final_answer", "boxed", "answer", "direct")
REGEX_PREFIX = "regex:"

_EMPHASIS = r"(?:\*{1,3}|_{1,3})"
_MARKERS = {
    # Spaces can be matched in one way only, so that the time is linear.
    "final_answer": re.compile(
        rf"(?<![^\W_])final\s+answer{_EMPHASIS}?(?:\s+is)?\s*(?:{_EMPHASIS}\s*)?[:\uff1a]", re.I
    ),
    "answer": re.compile(rf"(?<![^\W_])answer{_EMPHASIS}?(?:\s+is)?\s*(?:{_EMPHASIS}\s*)?[:\uff1a]", re.I),
}
_CLOSED_EMPHASIS = re.compile(rf"(?:{_EMPHASIS}|\}})(?=\s|$)")  # "}" closes \textbf{Final answer:}
_OPENING_EMPHASIS = re.compile(r"(?<![*_])[*_]{1,3}$")
_BULLET = re.compile(r"\s*[-*\u2013\u2022]\s+(?=\S)")
_SPACING = re.compile(r"(?:\\[,;:! ]|\\q?quad(?![A-Za-z])|\s)+")
_END_MARK = re.compile(r"\\(?:checkmark|blacksquare|square|qed|Box|hfill|newline|end)(?![A-Za-z])")
_OPERAND = r"(?:[-+\u2212]?\s*(?:[0-9.$(\u221a]|\\[A-Za-z(]|[A-Za-z](?![A-Za-z])(?!\s+[a-z]{2})))"
#: The beginning of a text after a box that belongs to the answer, such as "\times 10^3", "or 3" and "million".
_PART = re.compile(
    r"[0-9%\u00b0^/\u221a]|\$|\\[(%$]|\\(?!text|mathrm|textrm|mbox)[A-Za-z]"
    r"|\\(?:text|mathrm|textrm|mbox)\s*\{\s*(?:(?:or|and)\b|\w+(?:\s+\w+)?\s*\})"
    rf"|[-+*=<>,;:\u2212\u2013\u00d7\u00b7\u22c5\u00f7\u00b1\u2264\u2265\u2260&|]+\s*{_OPERAND}|[xX]\s*10\b"
    rf"|[(?]*\s*(?:or|nor)\b|\.[0-9]|(?:and|to)\s+(?:{_OPERAND}|\S+(?:\s+\S+)?$)|(?:mod|\(mod)\b"
    r"|(?:hundred|thousand|million|billion|trillion|dozen|percent|per\s+cent|degrees?)\b"
    r"|[A-Za-z](?:\s*[\^_]\s*\{?\w+\}?)?$"
)
_JOINED = re.compile(r"[A-Za-z(\[{!']|[.,][0-9]")  # belongs to the answer if no space separates it from the box
_ATOM = re.compile(r"[\w.,\s]*|\\[A-Za-z]+(?:\{[^{}]*\}){0,2}")
_MATH_BLOCKS = (("\\[", "\\]"), ("$$", "$$"))


def extract_answer(response: str, style: str | re.Pattern[str] = "final_answer") -> str | None:
    r"""Extracts the answer from a response.

    The style is the form of the answer that the prompt asked for:

    - "final_answer": the rest of the line after the last "Final answer:". If the rest is empty, the next line with
      text is used. If the text begins with ``\boxed{}``, ``$$`` or ``\[``, only the content of the box or math block
      is used. Text after the box or block is kept if it continues the answer: a unit, an operator with a number
      or a variable, a TeX command, "or" with another answer, a percent sign, "million", or a box with another answer.
    - "answer": the same after the last "Answer:".
    - "boxed": the content of the last ``\boxed{...}``.
    - "direct": the whole response.
    - ``regex:PATTERN`` or a compiled pattern: the group in the last match that is not empty. The pattern must have
      exactly one group.

    Args:
        response: Text that the model generated.
        style: Style of the answer.

    Returns:
        The answer without markdown, math delimiters and a final period. None if there is no readable answer, for
        example because the marker, the box or the closing brace is missing.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the style is unknown, or its pattern is invalid or does not have exactly one group.
    """
    if not isinstance(response, str):
        raise TypeError(f"response must be a string, got {response!r}")
    if isinstance(style, re.Pattern):
        extracted = _last_group(style, response)
    elif not isinstance(style, str):
        raise TypeError(f"style must be a string or a compiled pattern, got {style!r}")
    elif style.startswith(REGEX_PREFIX):
        extracted = _last_group(_compile(style.removeprefix(REGEX_PREFIX)), response)
    elif style == "boxed":
        extracted = last_box(response)
    elif style == "direct":
        extracted = response
    elif style in _MARKERS:
        extracted = _after_marker(_MARKERS[style], response)
    else:
        raise ValueError(f"style must be one of {', '.join(STYLES)} or '{REGEX_PREFIX}...', got {style!r}")
    answer = clean_answer(extracted or "")
    return answer if answer.strip(".\u2026 \"'\u201d") else None  # a model that repeats the instruction writes dots


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"style must hold a regular expression, got {pattern!r}: {error}") from None


def _last_group(pattern: re.Pattern[str], response: str) -> str | None:
    if pattern.groups != 1:
        raise ValueError(f"style must have exactly one group, got {pattern.pattern!r} with {pattern.groups}")
    matches = [match for match in pattern.finditer(response) if match[0]]  # "(.*)" also matches the empty end
    return matches[-1].group(1) if matches else None


def last_box(response: str) -> str | None:
    r"""Returns the content of the last ``\boxed{}`` in a text.

    Returns None if there is no box, or if the last box has no closing brace.
    """
    boxes = list(re.finditer(r"\\boxed\s*(?=\{)", response))
    if not boxes:
        return None
    opening = boxes[-1].end()
    closing = closing_brace(response, opening)
    return None if closing is None else response[opening + 1 : closing]


def all_boxes(text: str) -> list[str]:
    r"""Returns the contents of all ``\boxed{}`` in a text, in order. Boxes without a closing brace are skipped."""
    openings = {box.end() for box in re.finditer(r"\\boxed\s*(?=\{)", text)}
    contents: dict[int, str] = {}
    open_braces: list[int] = []
    for brace in BRACES.finditer(text):
        if brace[0] == "{":
            open_braces.append(brace.start())
        elif brace[0] == "}" and open_braces and (opening := open_braces.pop()) in openings:
            contents[opening] = text[opening + 1 : brace.start()]
    return [contents[opening] for opening in sorted(contents)]


def _with_tail(answer: str, after: str) -> str:
    r"""Returns the answer, followed by the rest of its line if this rest belongs to the answer.

    The rest belongs to the answer if it is a known unit, contains a box with another answer, or continues the answer,
    as in "\boxed{5} \times 10^3". ``after`` is the text after the answer.
    """
    line = after.partition("\n")[0]
    tail = line.strip("*_` \t.;:")
    others = all_boxes(tail)
    unit = parse_unit(tail) if tail else None
    boxes = all_boxes(answer)
    if any(other != box for other in others for box in boxes or [answer]) or (unit is not None and unit.is_known):
        return f"{answer} {tail}"
    inner = boxes[-1].strip() if boxes else answer  # without other boxes, the box is the whole answer
    rest = line.strip("` \t").rstrip("*_.;:")
    spacing = _SPACING.match(rest)
    rest = rest[spacing.end() :] if spacing else rest
    is_joined = _JOINED.match(line) is not None and not re.fullmatch(r"!+", tail)
    if others or _END_MARK.match(rest) or not (_PART.match(rest) or is_joined):
        return inner if boxes else answer
    is_word = re.match(r"[A-Za-z,;]|\\text", rest) is not None and not is_joined
    is_atom = _ATOM.fullmatch(inner) or (rest[0] not in "^!" and _ATOM.fullmatch(inner.lstrip("+-\u2212")))
    return f"{inner if is_word or is_atom else f'({inner})'}{'' if is_joined else ' '}{rest}"


def _after_marker(marker: re.Pattern[str], response: str) -> str | None:
    markers = list(marker.finditer(response))
    if not markers:
        return None
    rest = response[markers[-1].end() :]
    closed = _CLOSED_EMPHASIS.match(rest)
    rest = rest[closed.end() :] if closed else rest
    is_next_line = "\n" in rest[: len(rest) - len(rest.lstrip())]
    rest = rest.lstrip()
    if is_next_line and _BULLET.match(rest):
        return _list_items(rest)
    for opening, closing in _MATH_BLOCKS:
        inner, delimiter, after = rest.removeprefix(opening).partition(closing)
        if rest.startswith(opening) and delimiter:
            return _with_tail(" ".join(inner.split()), after)
    box = re.match(r"\\boxed\s*(?=\{)", rest)
    if box:
        end = closing_brace(rest, box.end())
        if end is None:
            return None
        after = rest[end + 1 :]
        return _with_tail(rest[: end + 1], after) if after.strip() else rest[box.end() + 1 : end]
    emphasis = _OPENING_EMPHASIS.search(response, 0, markers[-1].start())
    for line in rest.splitlines():
        if line.strip("*_` \t"):
            is_lone = emphasis is not None and not closed and line.count(emphasis[0]) == 1
            return line.rstrip().removesuffix(emphasis[0]) if emphasis is not None and is_lone else line
    return None


def _list_items(text: str) -> str:
    """Returns the items of the Markdown list at the beginning of a text, without bullets and separated by commas."""
    items = []
    for line in text.splitlines():
        bullet = _BULLET.match(line)
        if bullet is None:
            break
        items.append(line[bullet.end() :].strip())
    return ", ".join(items)
