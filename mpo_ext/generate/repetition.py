"""Finds responses that repeat themselves."""

import re

_PERIODS = 400
_LEAST_REPEATS = 5
_LEAST_REPEATED_CHARS = 60
_GRAM = 6
_LEAST_GRAMS = 60
_UNIT = re.compile(r"[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+|\S")


def is_degenerate(text: str) -> bool:
    """Returns whether a response repeats itself. One of two conditions is enough.

    - The response ends with the same passage at least 5 times in a row. The repetitions have at least 60 characters in
      total, and the passage has at most 400 characters. The passage is not only white space.
    - The response has at least 60 sequences of 6 words, and more than half of them repeat an earlier sequence. Each
      punctuation mark and each Chinese, Japanese or Korean character counts as a word.
    """
    for period in range(1, min(_PERIODS, len(text) // _LEAST_REPEATS) + 1):
        needed = max(_LEAST_REPEATS * period, _LEAST_REPEATED_CHARS)
        if len(text) < needed or text[-1] != text[-1 - period] or text[-period:] != text[-2 * period : -period]:
            continue
        if text[-needed:-period] == text[-needed + period :] and not text[-period:].isspace():
            return True
    units = _UNIT.findall(text)
    grams = list(zip(*(units[start:] for start in range(_GRAM)), strict=False))
    return len(grams) >= _LEAST_GRAMS and len(set(grams)) * 2 < len(grams)
