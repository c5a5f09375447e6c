"""Checks of arguments and the texts of their errors: ``<argument> must be <rule>, got <value>``."""

import difflib
import math
import numbers
import os
from collections.abc import Iterable


def install_hint(extra: str) -> str:
    """Says how the packages of an extra are installed: true whether or not mpo-ext comes from a package index."""
    return f"install the extra '{extra}' of mpo-ext (in its source tree: pip install '.[{extra}]')"


class LinesError(ValueError):
    """An error whose message is several lines, which a command prints as they are."""


def check_number(name: str, value: object) -> None:
    """Raises TypeError unless the value is a real number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")


def check_integer(name: str, value: object, *, least: int) -> None:
    """Raises unless the value is an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raises ValueError unless the value is one of the choices; the message names the nearest one."""
    known = list(choices)
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}{did_you_mean(value, known)}")


def did_you_mean(word: object, known: Iterable[str], otherwise: str = "") -> str:
    """Returns ``; did you mean 'x'?`` for the known word that is nearest, or ``otherwise`` if none is near."""
    close = difflib.get_close_matches(str(word), list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else otherwise


def check_model_path(name: str, path: str) -> None:
    """Raises where a path that can only be one of a folder here is none, which the hub would be asked for.

    Args:
        name: What the path is called in the message.
        path: Folder of a model, or its id on the hub.

    Raises:
        FileNotFoundError: If there is no such folder.
    """
    if os.path.exists(path) or "://" in path:
        return
    parent = os.path.dirname(path)
    if path.startswith((".", "/", "~")) or path.count("/") > 1 or (parent and os.path.isdir(parent)):
        raise FileNotFoundError(f"{name} must be a folder here or a hub id, got {path}: there is no such folder")


def check_json(name: str, value: object) -> None:
    """Raises unless the value survives JSON unchanged.

    Args:
        name: What the value is called in the message; its parts are named ``name.key`` and ``name[index]``.
        value: Anything.

    Raises:
        TypeError: If something in it is not None, a bool, an int, a float, a str, a list or a dict with str keys.
        ValueError: If a number is not finite, or a text holds half of a surrogate pair.
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
            check_text(f"{name}: a key", key)
            check_json(f"{name}.{key}", part)
    elif isinstance(value, list):
        for index, part in enumerate(value):
            check_json(f"{name}[{index}]", part)
    elif value is not None and not isinstance(value, (bool, int)):
        raise TypeError(f"{name} must be JSON (None, bool, int, float, str, list, dict), got {type_and_value(value)}")


def check_text(name: str, value: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} must be text that UTF-8 can hold, got the lone surrogate {value[error.start]!r} "
            f"at character {error.start}"
        ) from None


def shorten(value: object, limit: int = 80) -> str:
    """Returns the repr of a value for a message, cut to ``limit`` characters."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def type_and_value(value: object) -> str:
    """Returns the type of a value and its shortened repr, for a message."""
    return f"{type(value).__name__} {shorten(value)}"
