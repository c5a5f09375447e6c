"""Extracts the answer from a response."""

import re

from mpo_ext.answers.normalize import BRACES, clean_answer, closing_brace
from mpo_ext.answers.units import parse_unit

STYLES = ("final_answer", "boxed", "answer", "direct")
REGEX_PREFIX = "regex:"

_EMPHASIS = r"(?:\*\*|__|\*|_)"
_MARKERS = {
    # Spaces can be matched in one way only, so that the time is linear.
    "final_answer": re.compile(rf"(?<!\w)final\s+answer{_EMPHASIS}?(?:\s+is)?\s*(?:{_EMPHASIS}\s*)?[:\uff1a]", re.I),
    "answer": re.compile(rf"(?<![^\W_])answer{_EMPHASIS}?(?:\s+is)?\s*(?:{_EMPHASIS}\s*)?[:\uff1a]", re.I),
}
_CLOSED_EMPHASIS = re.compile(rf"{_EMPHASIS}(?=\s|$)")
_MATH_BLOCKS = (("\\[", "\\]"), ("$$", "$$"))


def extract_answer(response: str, style: str | re.Pattern[str] = "final_answer") -> str | None:
    r"""Extracts the answer from a response.

    The style is the form of the answer that the prompt asked for:

    - "final_answer": the rest of the line after the last "Final answer:". If the rest is empty, the next line with
      text is used. If the text begins with ``\boxed{}``, ``$$`` or ``\[``, only the content of the box or math block
      is used. Text after the box or block is kept if it is a known unit, or has a box with another answer.
    - "answer": the same after the last "Answer:".
    - "boxed": the content of the last ``\boxed{...}``.
    - "direct": the whole response.
    - ``regex:PATTERN`` or a compiled pattern: the group in the last match. The pattern must have exactly one group.

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
    matches = list(pattern.finditer(response))
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
    """Returns the answer, followed by the rest of its line if this rest belongs to the answer.

    The rest belongs to the answer if it is a known unit, or contains a box with another answer. ``after`` is the text
    after the answer.
    """
    tail = after.partition("\n")[0].strip("*_` \t.;:")
    others = all_boxes(tail)
    unit = parse_unit(tail) if tail else None
    is_part = any(other != box for other in others for box in all_boxes(answer) or [answer])
    return f"{answer} {tail}" if is_part or (unit is not None and unit.is_known) else answer


def _after_marker(marker: re.Pattern[str], response: str) -> str | None:
    markers = list(marker.finditer(response))
    if not markers:
        return None
    rest = response[markers[-1].end() :]
    closed = _CLOSED_EMPHASIS.match(rest)
    rest = rest[closed.end() :].lstrip() if closed else rest.lstrip()
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
    for line in rest.splitlines():
        if line.strip("*_` \t"):
            return line
    return None
