"""Building blocks of recipe sections: types of settings, the decorator ``section``, and error messages."""

import dataclasses
import functools
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

import pydantic
import pydantic.dataclasses
from pydantic import AfterValidator, BeforeValidator, PlainValidator, StrictFloat, StrictInt, StrictStr
from pydantic_core import PydanticCustomError
from typing_extensions import dataclass_transform

from mpo_ext.checks import closest, shorten

T = TypeVar("T")

# Expected types in messages, by the type of pydantic's error.
_TYPES = {"bool_type": "true or false", "int_type": "an integer", "float_type": "a number", "string_type": "a string"}


def wrong_type(words: str) -> PydanticCustomError:
    """Returns the exception for a value of the wrong type. ``words`` is the required type, such as "a section"."""
    return PydanticCustomError("wrong_type", words)  # type: ignore[arg-type]  # pydantic wants a literal


def _rule(words: str, holds: Callable[[Any], bool]) -> AfterValidator:
    """Returns a validator that accepts values for which ``holds`` is True. ``words`` names the rule in messages."""

    def check(value: Any) -> Any:
        if not holds(value):
            raise PydanticCustomError("rule", words)  # type: ignore[arg-type]
        return value

    return AfterValidator(check)


def list_of(elements: str, size: int | None = None) -> BeforeValidator:
    """Returns a validator that converts a list to a tuple, and rejects other values.

    ``elements`` is the name of the elements in messages, such as "strings". ``size`` is the required length; None
    allows any length.
    """

    def convert(value: Any) -> Any:
        if not isinstance(value, (list, tuple)) or (size is not None and len(value) != size):
            raise wrong_type(f"a list of {'' if size is None else f'{size} '}{elements}")
        return tuple(value)

    return BeforeValidator(convert)


def _to_section(value: Any) -> Any:
    if value is None:
        return {}  # all lines of the section are comments
    if not isinstance(value, Mapping) and not dataclasses.is_dataclass(value):
        raise wrong_type("a section")
    return value


#: Parts of a model that recipes may name.
MODEL_PARTS = ("vision_tower", "projector", "language_model")

Number = StrictFloat
NOT_EMPTY = _rule("not empty", bool)
Text = Annotated[StrictStr, NOT_EMPTY]
Positive = Annotated[StrictFloat, _rule("positive and finite", lambda value: 0 < value < math.inf)]
NotNegative = Annotated[StrictFloat, _rule("finite and not negative", lambda value: 0 <= value < math.inf)]
Fraction = Annotated[StrictFloat, _rule("in [0, 1)", lambda value: 0 <= value < 1)]
PositiveFraction = Annotated[StrictFloat, _rule("in (0, 1]", lambda value: 0 < value <= 1)]
Count = Annotated[StrictInt, _rule("at least 0", lambda value: value >= 0)]
PositiveCount = Annotated[StrictInt, _rule("at least 1", lambda value: value >= 1)]
Length = Annotated[StrictInt, _rule("at least 2", lambda value: value >= 2)]
Strings = Annotated[tuple[StrictStr, ...], list_of("strings")]
TwoStrings = Annotated[tuple[StrictStr, StrictStr], list_of("strings", 2)]
TwoFractions = Annotated[
    tuple[StrictFloat, StrictFloat],
    list_of("numbers", 2),
    _rule("in [0, 1)", lambda values: all(0 <= value < 1 for value in values)),
]
Section = Annotated[T, BeforeValidator(_to_section)]

_STRINGS: pydantic.TypeAdapter[tuple[str, ...]] = pydantic.TypeAdapter(Strings)


def _to_string_or_strings(value: Any) -> Any:
    if isinstance(value, str):
        return value
    if not isinstance(value, (list, tuple)):
        raise wrong_type("a string or a list of strings")
    return _STRINGS.validate_python(value)


StringOrStrings = Annotated[str | tuple[str, ...], PlainValidator(_to_string_or_strings), NOT_EMPTY]


def _to_shared_prefix(value: Any) -> Any:
    if not isinstance(value, bool) and value not in ("padded", "masked"):
        raise wrong_type("true, false, 'padded' or 'masked'")
    return value


SharedPrefix = Annotated[bool | Literal["padded", "masked"], PlainValidator(_to_shared_prefix)]


@dataclass_transform(kw_only_default=True, frozen_default=True)
def section(kind: type[T]) -> type[T]:
    """Class decorator. The class becomes a recipe section: a frozen dataclass that converts and checks its arguments.

    A mapping becomes a section, and a list becomes a tuple. If a setting is a float, an int becomes a float.

    A value of the wrong type raises TypeError. Any other invalid value raises ValueError. An error message begins with
    the full name of the setting, such as "optim.batch_size".
    """
    config = pydantic.ConfigDict(extra="forbid")
    built: Any = pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=config)(kind)
    validate = built.__init__

    @functools.wraps(validate)
    def __init__(self: Any, **values: Any) -> None:  # noqa: N807
        try:
            validate(self, **values)
        except pydantic.ValidationError as error:
            raise _describe(error, built) from None

    built.__init__ = __init__
    return built


def _describe(error: pydantic.ValidationError, kind: type) -> Exception:
    """Converts a pydantic error to the exception to raise.

    If a setting is unknown, the exception reports this setting instead of other errors. ``kind`` is the class of the
    section that was validated.
    """
    unknown = ("unexpected_keyword_argument", "invalid_key")
    details = min(error.errors(include_url=False), key=lambda details: details["type"] not in unknown)
    where = _dotted(details["loc"])
    value = details["input"]
    if details["type"] in unknown:
        *parents, key = details["loc"]
        return ValueError(
            f"unknown setting {_dotted((*parents, str(key)))}{_nearest_setting(parents, str(key), kind)}"
        )
    if details["type"] == "missing":
        return ValueError(f"{where} must be given")
    if details["type"] == "value_error":  # raised by __post_init__ of a section, whose messages name the setting
        return ValueError(f"{where}.{details['ctx']['error']}".lstrip("."))
    words = _TYPES.get(details["type"], details["msg"])
    if details["type"] == "literal_error":
        words = details["ctx"]["expected"]
    message = f"{where} must {'not be empty' if words == 'not empty' else f'be {words}'}, got {shorten(value)}"
    if details["type"] == "string_type" and isinstance(value, (bool, int, float)):
        message += ": put it in quotes"
    is_value = details["type"] == "rule" or (details["type"] == "literal_error" and isinstance(value, str))
    return ValueError(message) if is_value else TypeError(message)


def _dotted(parts: Sequence[int | str]) -> str:
    """Returns the dotted name of a setting, such as ``data.train[1].root``, from the parts of its location."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).lstrip(".")


def _nearest_setting(parents: Sequence[int | str], key: str, kind: type) -> str:
    """Returns a hint for the error message about the unknown setting ``key``.

    The hint suggests a similar name in the same section. Without a similar name, it suggests the same name in another
    section. Otherwise, the hint lists all names in the section.

    ``kind`` is the recipe class or the class of a section. ``parents`` is the location of the section within ``kind``.
    """
    settings = _settings(kind)
    path = [parent for parent in parents if isinstance(parent, str)]
    known = settings.get(".".join(path))
    names = settings[".".join([*path[:-1], "*"])] if known is None else known
    prefix = _dotted((*parents, ""))
    close = closest(key, names)
    if close is not None:
        return f"; did you mean {prefix}{close}?"
    elsewhere = [f"{where}.{key}".lstrip(".") for where, others in settings.items() if key in others]
    if elsewhere:
        return f"; did you mean {elsewhere[0]}?"
    return f"; known settings: {', '.join(f'{prefix}{name}' for name in names)}"


def setting_names(kind: type) -> list[str]:
    """Returns the dotted names of all settings of a recipe, such as ``optim.learning_rate``."""
    return [f"{where}.{name}".lstrip(".") for where, names in _settings(kind).items() for name in names]


def _settings(kind: type, where: str = "") -> dict[str, list[str]]:
    """Returns the names of the settings in each section of ``kind``, as a dict from section to names.

    A section has a dotted name, such as "optim.groups.*". The ``*`` stands for any entry of a mapping. ``where`` is
    the name of ``kind`` as a section; "" for the outermost section.
    """
    hints = typing.get_type_hints(kind)
    settings = {where: list(hints)}
    for name, hint in hints.items():
        below = f"{where}.{name}".lstrip(".")
        options = [hint, *typing.get_args(hint)]
        if typing.get_origin(hint) is dict:
            options, below = [options[-1], *typing.get_args(options[-1])], f"{below}.*"
        for option in options:
            if dataclasses.is_dataclass(option):
                settings |= _settings(typing.cast(type, option), below)
    return settings
