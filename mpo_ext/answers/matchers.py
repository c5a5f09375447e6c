"""Defines ``CustomMatcher``, ``AnyMatcher``, the table ``MATCHERS`` of all matchers, and ``is_same_answer``."""

import dataclasses
import functools
import importlib
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, cast

from mpo_ext.answers.base import Matcher, Verdict, rank
from mpo_ext.answers.choices import ChoiceMatcher
from mpo_ext.answers.math import MathMatcher
from mpo_ext.answers.normalize import fold
from mpo_ext.answers.numbers import ChartMatcher, NumberMatcher
from mpo_ext.answers.text import AnlsMatcher, ExactMatcher, VqaMatcher
from mpo_ext.checks import check_number, did_you_mean


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CustomMatcher(Matcher):
    """Compares answers with the user's own function.

    ``function(prediction, truth)`` returns a bool, a Verdict, a score in [0, 1], or None if the answer is unreadable.

    Attributes:
        function: The function, or its import path "module:function". An import path also works in other processes.
        accept: Minimum score counted as correct.
    """

    kind: ClassVar[str] = "custom"
    longest: ClassVar[int | None] = None
    function: str | Callable[[str, str], bool | float | Verdict | None]
    accept: float = 1.0

    def __post_init__(self) -> None:
        check_number("accept", self.accept, "[0, 1]")
        if isinstance(self.function, str):
            load_function(self.function)
        elif not callable(self.function):
            raise TypeError(f"function must be callable or 'module:function', got {self.function!r}")

    def _compare(self, prediction: str, truth: str) -> Verdict:
        function = load_function(self.function) if isinstance(self.function, str) else self.function
        name = self.function if isinstance(self.function, str) else getattr(function, "__name__", "function")
        result = _plain(function(prediction, truth))
        if isinstance(result, Verdict):
            correct = _plain(result.correct)
            return result if correct is result.correct else dataclasses.replace(result, correct=correct)
        if result is None or isinstance(result, bool):
            return self._verdict(result, name, prediction, truth)
        check_number(f"the score of {name}", result, "[0, 1]")
        return Verdict(bool(result >= self.accept), float(result), f"{self.kind}:{name}", prediction, truth)


def _plain(value: Any) -> Any:
    """Returns a scalar of numpy or torch as a bool or a number of Python, and any other value unchanged."""
    return value.item() if hasattr(value, "item") and callable(value.item) else value


@functools.cache
def load_function(name: str) -> Callable[[str, str], bool | float | Verdict | None]:
    """Imports and returns the function with the import path "module:function"."""
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise ValueError(f"function must be named as 'module:function', got {name!r}")
    try:
        function = functools.reduce(getattr, attribute.split("."), cast(Any, importlib.import_module(module)))
    except (ImportError, AttributeError) as error:
        raise ValueError(f"function must name a function that can be imported, got {name!r}: {error}") from error
    if not callable(function):
        raise TypeError(f"function must name a function, got {name!r}, a {type(function).__name__}")
    return function


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AnyMatcher(Matcher):
    """Accepts an answer if at least one of several matchers accepts it.

    If all matchers call the answer wrong, the answer is wrong. If no matcher accepts the answer and at least one
    matcher calls it unreadable, the answer is unreadable.

    Attributes:
        matchers: The matchers, called in this order. Each is a ``Matcher``, a kind such as "number", or a mapping with
            the kind and options, such as ``{"kind": "number", "relative": 0.01}``.
    """

    kind: ClassVar[str] = "any"
    longest: ClassVar[int | None] = None
    matchers: Sequence[Matcher | str | Mapping[str, Any]]

    def __post_init__(self) -> None:
        if isinstance(self.matchers, str) or not isinstance(self.matchers, Sequence) or not self.matchers:
            raise ValueError(f"matchers must be a list of at least one matcher, got {self.matchers!r}")
        object.__setattr__(self, "matchers", tuple(map(_build, self.matchers)))

    def __call__(self, prediction: str, truth: str | Sequence[str]) -> Verdict:
        """Returns the verdict of the first matcher that accepts the answer.

        If no matcher accepts the answer, returns the verdict with the highest ``rank``.
        """
        best: Verdict | None = None
        for rule in cast(Sequence[Matcher], self.matchers):
            verdict = rule(prediction, truth)
            if verdict.correct:
                return verdict
            if best is None or rank(verdict) > rank(best):
                best = verdict
        assert best is not None
        return best

    def with_options(self, options: Sequence[str] | Mapping[str, str]) -> "AnyMatcher":
        """Returns an ``AnyMatcher`` whose matchers know the answer options of a question.

        A ``ChoiceMatcher`` that already has options keeps them.
        """
        rules = cast(Sequence[Matcher], self.matchers)
        changed = [rule.with_options(options) for rule in rules]
        return self if all(map(operator.is_, rules, changed)) else AnyMatcher(matchers=changed)

    def _compare(self, prediction: str, truth: str) -> Verdict:
        return self(prediction, truth)


def _build(value: Matcher | str | Mapping[str, Any]) -> Matcher:
    if isinstance(value, Matcher):
        return value
    if isinstance(value, str):
        return matcher(value)
    if not isinstance(value, Mapping) or "kind" not in value:
        raise TypeError(f"matchers must hold matchers, kinds or mappings with a kind, got {value!r}")
    return matcher(**value)


_BASIC = (ExactMatcher, ChoiceMatcher, NumberMatcher, ChartMatcher, AnlsMatcher, VqaMatcher, MathMatcher)
MATCHERS: dict[str, type[Matcher]] = {each.kind: each for each in (*_BASIC, CustomMatcher, AnyMatcher)}


def matcher(kind: str, **options: Any) -> Matcher:
    """Creates and returns a matcher.

    Args:
        kind: Kind of the matcher, a key of ``MATCHERS``.
        options: Options of the matcher, by name: the attributes of its class.

    Raises:
        ImportError: If the matcher needs a package that is not installed.
        TypeError: If an option has the wrong type.
        ValueError: If the kind or an option is unknown, a required option is missing, or an option is out of range.
    """
    if kind not in MATCHERS:
        raise ValueError(f"kind must be one of {', '.join(MATCHERS)}, got {kind!r}{did_you_mean(kind, MATCHERS)}")
    fields = {field.name: field for field in dataclasses.fields(MATCHERS[kind]) if field.init}
    for name in options:
        if name not in fields:
            known = f"; its options: {', '.join(fields)}" if fields else "; it has no options"
            raise ValueError(f"unknown option {name!r} of the matcher {kind!r}{did_you_mean(name, fields, known)}")
    for name, field in fields.items():
        if field.default is dataclasses.MISSING and name not in options:
            raise ValueError(f"the matcher {kind!r} needs the option {name!r}")
    return MATCHERS[kind](**options)


def is_same_answer(first: str | None, second: str | None, matcher: Matcher) -> bool:
    """Returns whether two answers are the same.

    Two answers are the same if they differ only in case and spaces. They are also the same if the matcher accepts one
    answer as the prediction and the other answer as the truth. A missing answer (None) differs from every answer. It
    also differs from another missing answer, and from the text "None".
    """
    if first is None or second is None:
        return False
    return fold(first) == fold(second) or bool(matcher(first, second).correct or matcher(second, first).correct)
