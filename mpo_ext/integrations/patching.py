"""Replaces functions of other packages and restores them. Checks the packages' versions and sources first."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import inspect
import os
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

from mpo_ext.checks import did_you_mean
from mpo_ext.integrations.sources import KNOWN, KnownSources

_ABSENT = object()


class Replacement(NamedTuple):
    """An attribute of a class or module, and its new value."""

    owner: Any
    name: str
    value: Any


class _Applied(NamedTuple):
    owner: Any
    name: str
    before: Any  # _ABSENT if the owner itself had no such attribute
    value: Any


_applied: dict[str, list[_Applied]] = {}


def patch(name: str, **options: Any) -> None:
    """Makes another trainer compute its loss or its log-probs with mpo_ext, until ``unpatch``.

    Prints a line that describes the change. Without options, the values of the losses change only by rounding.

    Args:
        name: Name of the trainer. In "trl", "axolotl", "llama-factory" and "ms-swift", the preference loss is
            replaced. In "openrlhf", "verl" and "unsloth", the log-probs of tokens are replaced.
        options: The only option is ``reward_shift``, for trainers whose preference loss is replaced. It is a mapping
            with settings of ``RewardShift``, such as ``{"mode": "cumulative"}``. Without this option, the trainer's
            own reward shift applies: fixed at 0 in TRL and axolotl, "cumulative" in LLaMA-Factory and ms-swift.

    Raises:
        ImportError: If the trainer's package is not installed.
        RuntimeError: If mpo_ext does not know the version or the source of the package (see ``check_sources``). Also
            if the trainer is already patched, or if another patch of mpo_ext has replaced one of the functions.
        TypeError: If an option, or a setting of ``reward_shift``, does not exist or has the wrong type.
        ValueError: If ``name`` is unknown, or an option has a value that is not allowed.
    """
    version = check_sources(name)
    if name in _applied:
        raise RuntimeError(f"name must be a trainer without a patch, got {name!r}, which is patched: unpatch it first")
    module = importlib.import_module(f".{KNOWN[name].module}", __package__)
    known_options = inspect.signature(module.replacements).parameters
    if unknown := [key for key in options if key not in known_options]:
        allowed = f"be among {', '.join(known_options)}" if known_options else "not be given"
        raise TypeError(f"options of patch({name!r}) must {allowed}, got {', '.join(unknown)}")
    replacements, summary = module.replacements(**options)
    for other, changes in _applied.items():
        for change in changes:
            if any(change.owner is owner and change.name == attribute for owner, attribute, _ in replacements):
                raise RuntimeError(
                    f"{_title(change.owner)}.{change.name} must be without a patch for patch({name!r}), got that of "
                    f"{other!r}, which has the same effect: keep it, or undo it first"
                )
    _applied[name] = [_replace(replacement) for replacement in replacements]
    if os.environ.get("RANK", "0") == "0":
        newest = max(KNOWN[name].versions, key=_key)
        tested = f" (tested with {newest})" if _is_later(".".join(version.split(".")[:2]), newest) else ""
        print(f"mpo_ext: {KNOWN[name].package} {version}{tested} patched: {summary}", file=sys.stderr)


def unpatch(name: str) -> None:
    """Restores a trainer that ``patch`` changed.

    Raises:
        RuntimeError: If the trainer is not patched, or another patch was applied after the patch of mpo_ext.
        ValueError: If ``name`` is unknown.
    """
    _known(name)
    if name not in _applied:
        raise RuntimeError(f"name must be a trainer with a patch, got {name!r}, which is not patched")
    for change in _applied[name]:
        if vars(change.owner).get(change.name) is not change.value:
            raise RuntimeError(
                f"{_title(change.owner)}.{change.name} must be the function of mpo_ext, got "
                f"{vars(change.owner).get(change.name)!r}: undo the later patch first"
            )
    for change in reversed(_applied.pop(name)):
        if change.before is _ABSENT:
            delattr(change.owner, change.name)
        else:
            setattr(change.owner, change.name, change.before)
        if isinstance(change.owner, ModuleType):  # modules that were imported since then have the new function
            for module, attribute in _holders(change.value, change.owner.__name__.partition(".")[0]):
                setattr(module, attribute, change.before)


def replace_in_modules(function: Any, value: Any, *packages: str) -> list[Replacement]:
    """Returns a ``Replacement`` with the new value ``value`` for each module attribute that is ``function``.

    All imported modules of ``packages`` are searched. An attribute may have another name than the function.
    """
    return [Replacement(module, name, value) for package in packages for module, name in _holders(function, package)]


def check_sources(name: str) -> str:
    """Checks the version and the functions of a trainer's package, and returns the version.

    In a tested version, the functions must have the tested source. In a later version, the functions must have the
    same source as in the last tested version.

    Raises:
        ImportError: If the package is not installed.
        RuntimeError: If an untested version is older than the last tested version, or a function has another source.
        ValueError: If ``name`` is unknown.
    """
    package, _, versions = _known(name)
    newest = max(versions, key=_key)
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(f"{package} must be installed: pip install '{package}=={newest}.*'") from None
    minor = ".".join(version.split(".")[:2])
    is_later = minor not in versions and _is_later(minor, newest)
    known = versions[newest] if is_later else versions.get(minor)
    if known is None:
        raise RuntimeError(
            f"{package} must have a version that mpo_ext knows ({', '.join(sorted(versions, key=_key))}), got "
            f"{version}: pip install '{package}=={newest}.*'"
        )
    for path, expected in known.items():
        found = source_hash(path)
        if found != expected and is_later:
            raise RuntimeError(
                f"{package} must have a version that mpo_ext knows ({', '.join(sorted(versions, key=_key))}), or a "
                f"later one with the same functions, got {version} with another {path}: pip install "
                f"'{package}=={newest}.*'"
            )
        if found != expected:
            raise RuntimeError(
                f"{path} of {package} {version} must have the source that mpo_ext knows (hash {expected}), got hash "
                f"{found}: another patch or another build of {package} changed it"
            )
    return version


def _is_later(version: str, newest: str) -> bool:
    try:
        return _key(version) > _key(newest)
    except ValueError:  # "1.17rc1" is not a released version
        return False


def source_hash(path: str) -> str:
    """Returns the first 16 hexadecimal digits of the SHA-256 of a function's source; "none" if it has no source.

    ``path`` names the function, such as "module:Class.method".
    """
    module, _, names = path.partition(":")
    function: Any = importlib.import_module(module)
    for name in names.split("."):
        function = getattr(function, name, None)
    for change in (change for changes in _applied.values() for change in changes):
        if change.value is function and change.before is not _ABSENT:
            function = change.before  # the function that mpo_ext itself has replaced
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):
        return "none"
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def _holders(value: Any, package: str) -> Iterator[tuple[ModuleType, str]]:
    """Yields ``(module, name)`` for each name of the object ``value`` in the imported modules of a package."""
    for title, other in list(sys.modules.items()):
        if title.partition(".")[0] == package and isinstance(other, ModuleType):
            yield from ((other, name) for name, held in list(vars(other).items()) if held is value)


def _known(name: str) -> KnownSources:
    if name not in KNOWN:
        hint = did_you_mean(name, KNOWN, f"; known names: {', '.join(KNOWN)}")
        raise ValueError(f"name must be the name of a trainer that mpo_ext can patch, got {name!r}{hint}")
    return KNOWN[name]


def _replace(replacement: Replacement) -> _Applied:
    owner, name, value = replacement
    before = vars(owner).get(name, _ABSENT)
    setattr(owner, name, value)
    return _Applied(owner, name, before, value)


def _key(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def _title(owner: Any) -> str:
    return str(getattr(owner, "__qualname__", None) or owner.__name__)
