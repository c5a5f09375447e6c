"""Functions that check arguments. Their error messages have the form ``<argument> must be <rule>, got <value>``."""

import difflib
import math
import numbers
import os
import re
from collections.abc import Iterable

_INTERVAL_RULES = {"(-inf, inf)": "finite", "(0, inf)": "positive and finite", "[0, inf)": "finite and not negative"}


def install_hint(extra: str) -> str:
    """Returns advice for an error message, such as "install the extra 'train' of mpo-ext (...)"."""
    return f"install the extra '{extra}' of mpo-ext (in its source tree: pip install '.[{extra}]')"


#: Number of levels of nested lists and dicts that ``is_nested_deeply`` accepts.
MAX_DEPTH = 100


class DefectError(ValueError):
    """Raised if lines of a data file are defective. Errors in arguments or settings raise other exceptions."""


class LinesError(ValueError):
    """An error whose message has several lines. Commands print the messages of all other errors in one line."""


def check_number(name: str, value: object, interval: str = "") -> None:
    """Checks that a value is a real number in an interval.

    ``name`` is the name of the argument in the message. ``interval`` is in mathematical notation, such as ``"[0, 1)"``
    or ``"(0, inf)"``. NaN lies in no interval. If ``interval`` is empty, every number is allowed, even NaN.

    Raises:
        TypeError: If the value is a bool or not a real number.
        ValueError: If the value is outside the interval.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        real = float(value)
    except OverflowError:  # an integer beyond the range of a float
        real = math.copysign(math.inf, value > 0 or -1)  # type: ignore[operator]
    if interval and not _contains(interval, real):
        raise ValueError(f"{name} must be {_INTERVAL_RULES.get(interval, f'in {interval}')}, got {value}")


def _contains(interval: str, value: float) -> bool:
    low, high = map(float, interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    return above and (value <= high if interval[-1] == "]" else value < high)


def check_integer(name: str, value: object, *, least: int | None = None) -> None:
    """Raises TypeError if the value is a bool or not an integer, and ValueError if the value is below ``least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_index(index: int, size: int) -> int:
    """Returns the index, or ``index + size`` if it is negative. Raises IndexError if the index is out of range."""
    if not -size <= index < size:
        raise IndexError(f"index must be in [{-size}, {size}), got {index}")
    return index % size


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raises ValueError unless the value is one of the choices; the message suggests the most similar choice."""
    known = list(choices)
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}{did_you_mean(value, known)}")


def did_you_mean(word: object, known: Iterable[str], otherwise: str = "") -> str:
    """Returns ``; did you mean 'x'?``, where x is the known word most similar to ``word``.

    Returns ``otherwise`` if no known word is similar.
    """
    close = closest(str(word), known)
    return otherwise if close is None else f"; did you mean {close!r}?"


def closest(word: str, known: Iterable[str]) -> str | None:
    """Returns the known word that ``word`` probably means; None if there is none.

    For the initials of exactly one known word, such as ``lr`` for ``learning_rate``, returns this word. Otherwise,
    returns the known word that is most similar to ``word``.
    """
    names = list(known)
    abbreviated = [name for name in names if len(word) > 1 and "".join(re.findall(r"(?<![a-z])[a-z]", name)) == word]
    if len(abbreviated) == 1:
        return abbreviated[0]
    return next(iter(difflib.get_close_matches(word, names, n=1)), None)


def check_model_path(name: str, path: str, revision: str | None = None) -> None:
    """Raises FileNotFoundError if a model's path, such as "./model", does not exist.

    A path that may be a model id on the hub, such as "OpenGVLab/InternVL3-1B-hf", is accepted. Raises ValueError for a
    folder with a ``revision``, which only a model of the hub has.
    """
    if revision is not None and os.path.exists(path):
        setting = f"{name.removesuffix('path')}revision"
        raise ValueError(f"{setting} must be None for a folder, which has no revisions, got {revision!r} with {path}")
    if os.path.exists(path) or "://" in path:
        return
    parent = os.path.dirname(path)
    if path.startswith((".", "/", "~")) or path.count("/") > 1 or (parent and os.path.isdir(parent)):
        raise FileNotFoundError(f"{name} must be a folder here or a hub id, got {path}: the folder does not exist")


def check_is_no_run(name: str, path: str) -> None:
    """Raises ValueError if ``path`` is the output folder of a training run instead of the folder of a model.

    The error message names the subfolder ``final``, which holds the run's model.
    """
    final = os.path.join(path, "final")
    if not os.path.exists(os.path.join(path, "config.json")) and os.path.exists(os.path.join(final, "config.json")):
        raise ValueError(f"{name} must be the folder of a model, got {path}, of a run whose model is {final}")


def environment_integer(name: str, default: int) -> int:
    """Returns the integer in the environment variable ``name``, or ``default`` if the variable is not set or empty.

    Raises:
        ValueError: If the value is not an integer of at least 0.
    """
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    if not text.isascii() or not text.isdigit():
        raise ValueError(f"{name} must be an integer of at least 0 in the environment, got {text!r}")
    return int(text)


def is_nested_deeply(value: object) -> bool:
    """Returns whether lists and dicts are nested more than ``MAX_DEPTH`` levels deep.

    Recursive functions could fail on such a value.
    """
    level = [value]
    for _ in range(MAX_DEPTH):
        parts = [part.values() if isinstance(part, dict) else part for part in level if isinstance(part, (dict, list))]
        level = [inner for part in parts for inner in part if isinstance(inner, (dict, list))]
        if not level:
            return False
    return True


def check_json(name: str, value: object) -> None:
    """Checks that a value can be stored as JSON and read back unchanged.

    Messages refer to parts of the value as ``name.key`` and ``name[index]``.

    Raises:
        TypeError: If a value at any depth is not None, a bool, an int, a float, a str, a list or a dict with str keys.
        ValueError: If a number is not finite, or a string contains a lone surrogate.
    """
    if isinstance(value, str):
        check_text(name, value)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")
    elif isinstance(value, dict):
        for key, part in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{name} must have keys of type str, got {type_and_value(key)}")
            if not key.isascii():
                check_text(f"{name}: a key", key)
            # Fast path: millions of values are checked, and most need neither a recursive call nor a dotted name.
            if (type(part) is str and part.isascii()) or type(part) is int or part is None:
                continue
            check_json(f"{name}.{key}", part)
    elif isinstance(value, list):
        for index, part in enumerate(value):
            check_json(f"{name}[{index}]", part)
    elif value is not None and not isinstance(value, (bool, int)):
        raise TypeError(f"{name} must be JSON (None, bool, int, float, str, list, dict), got {type_and_value(value)}")


def check_text(name: str, value: str) -> None:
    """Raises ValueError if the string ``value`` cannot be encoded as UTF-8."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} must be text that UTF-8 can hold, got the lone surrogate {value[error.start]!r} "
            f"at character {error.start}"
        ) from None


def shorten(value: object, limit: int = 80) -> str:
    """Returns the repr of a value, shortened to ``limit`` characters for a message."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def type_and_value(value: object) -> str:
    """Returns the name of a value's type and the value's shortened repr, for a message."""
    return f"{type(value).__name__} {shorten(value)}"
