"""Reads and writes recipes as YAML 1.2 text, and applies ``KEY=VALUE`` overrides."""

import functools
import io
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from mpo_ext.checks import install_hint, shorten

T = TypeVar("T")

# Pattern and first characters of each type in YAML 1.2's core schema, in which 1_000 and 2024-11-15 are strings.
_CORE_SCHEMA = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}


_MAX_VALUES, _MAX_DEPTH = 1_000_000, 50


def read_recipe_file(
    path: str | os.PathLike[str], overrides: Sequence[str], build: Callable[[dict[str, Any]], T]
) -> T:
    """Reads a recipe file, applies overrides ``KEY=VALUE``, and returns ``build(settings)``.

    Raises:
        OSError: If the file cannot be read.
        ImportError: If ruamel.yaml is not installed.
        ValueError: If the file is not YAML, an override is invalid, or ``build`` raises ValueError. The message names
            the file and the overrides.
        TypeError: If the file is not a mapping, or ``build`` raises TypeError.
    """
    source = os.fspath(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"recipe must exist, got {source}")
    try:
        values = parse_yaml(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # UnicodeDecodeError is a ValueError
        raise ValueError(f"{source}: a recipe must be YAML: {error}") from error
    if overrides:
        source = f"{source} with {' '.join(overrides)}"
    try:
        if not isinstance(values, Mapping):
            raise TypeError(f"a recipe must be a mapping of sections, got {shorten(values)}")
        values = _without_aliases(values)  # an override of one place must not change the others
        for override in overrides:
            apply_override(values, override)
        return build({str(name): value for name, value in values.items()})
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{source}: {error}") from error


def parse_yaml(text: str) -> Any:
    """Returns the parsed YAML text.

    Raises:
        ValueError: If the text is not YAML, or a mapping contains a key twice. Also if values are nested more than 50
            deep or contain themselves, or if aliases expand the text to more than 1,000,000 values.
    """
    ruamel = _import_ruamel()
    try:
        values = _yaml(dumps=False).load(text)
    except ruamel.error.YAMLError as error:
        raise ValueError(str(error)) from error
    except RecursionError:
        raise ValueError(f"values must be nested at most {_MAX_DEPTH} deep") from None
    _count_values(values, {}, 0)
    return values


def _count_values(value: Any, known: dict[int, int], depth: int) -> int:
    """Returns the number of values in a parsed YAML value. Each alias counts as a full copy.

    ``known`` is a dict from the id of a dict or list to its count. The count -1 means that counting has not finished
    yet. Raises ``ValueError`` if the value contains itself, is nested too deep, or has too many values.
    """
    if not isinstance(value, (dict, list)):
        return 1
    count = known.get(id(value), 0)
    if count < 0 or depth > _MAX_DEPTH:
        cause = "must not contain themselves through an alias" if count < 0 else f"must be at most {_MAX_DEPTH} deep"
        raise ValueError(f"nested values {cause}")
    if not count:
        known[id(value)] = -1
        parts = value.values() if isinstance(value, dict) else value
        count = 1 + sum(_count_values(part, known, depth + 1) for part in parts)
        known[id(value)] = count
    if count > _MAX_VALUES:
        raise ValueError(f"aliases must expand to at most {_MAX_VALUES:,} values, got {count:,}")
    return count


def _without_aliases(value: Any) -> Any:
    """Returns a copy of a parsed YAML value in which no dict or list occurs twice."""
    if isinstance(value, dict):
        return {key: _without_aliases(part) for key, part in value.items()}
    return [_without_aliases(part) for part in value] if isinstance(value, list) else value


def dump_yaml(values: Any) -> str:
    """Returns values as YAML text. Strings that YAML may read as another type, such as "no" and "1e-6", are quoted."""
    stream = io.StringIO()
    _yaml(dumps=True).dump(values, stream)
    return stream.getvalue()


def apply_override(values: Any, override: str) -> None:
    """Sets a value in a parsed recipe in place, by an override such as ``optim.learning_rate=1e-6``.

    The key is the dotted name of a setting. The value is YAML.
    """
    key, equals, text = override.partition("=")
    *sections, name = key.strip().split(".")
    if not equals or not all((*sections, name)):
        raise ValueError(f"an override must read KEY=VALUE, got {override!r}")
    try:
        value = _without_aliases(parse_yaml(text))
    except ValueError as error:
        raise ValueError(f"{key} must have a value in YAML, got {text!r}: {error}") from error
    for level, section in enumerate(sections, start=1):
        if values.get(section) is None:
            values[section] = {}
        values = values[section]
        if not isinstance(values, dict):
            path = ".".join(sections[:level])
            raise ValueError(
                f"{key} must be in a section, but {path} is {shorten(values)}: override {path} as a whole"
            )
    values[name] = value


def _import_ruamel() -> Any:
    try:
        import ruamel.yaml
    except ImportError as error:
        raise ImportError(f"recipes need ruamel.yaml: {install_hint('train')}") from error
    return ruamel.yaml


@functools.cache
def _yaml(*, dumps: bool) -> Any:
    """Returns an object that parses YAML 1.2.

    With ``dumps``, the object writes YAML. Parsers of YAML 1.1 and YAML 1.2 read the written text alike.
    """
    ruamel = _import_ruamel()
    rules = [
        (f"tag:yaml.org,2002:{name}", re.compile(f"(?:{p})$"), first) for name, (p, first) in _CORE_SCHEMA.items()
    ]
    if dumps:
        rules += [(tag, pattern, first) for _, tag, pattern, first in ruamel.resolver.implicit_resolvers]
    table: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    for tag, pattern, first in rules:
        for character in first:
            table.setdefault(character, []).append((tag, pattern))

    class Resolver(ruamel.resolver.VersionedResolver):  # type: ignore[misc, name-defined]
        @property
        def versioned_resolver(self) -> dict[str, Any]:
            return table

    class Constructor(ruamel.constructor.SafeConstructor):  # type: ignore[misc, name-defined]
        def check_mapping_key(self, node: Any, key_node: Any, mapping: Any, key: Any, value: Any) -> bool:
            if key in mapping:
                raise ruamel.constructor.DuplicateKeyError(
                    None, None, f"a setting must be given once, got {key!r} again", key_node.start_mark
                )
            return True

    class Representer(ruamel.representer.SafeRepresenter):  # type: ignore[misc, name-defined]
        def represent_float(self, data: float) -> Any:
            text = repr(data)  # YAML 1.1 reads 1e-06 as a string
            return self.represent_scalar("tag:yaml.org,2002:float", text if "." in text else text.replace("e", ".0e"))

    Representer.add_representer(float, Representer.represent_float)
    yaml = ruamel.YAML(typ="safe", pure=True)
    yaml.Resolver, yaml.Constructor, yaml.Representer = Resolver, Constructor, Representer
    yaml.default_flow_style, yaml.width, yaml.sort_base_mapping_type_on_output = False, 100, False
    return yaml
