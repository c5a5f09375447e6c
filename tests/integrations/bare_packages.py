"""Makes a single module of a large package importable, without running the package's __init__ code."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def add_bare_packages(*names: str) -> None:
    """Registers a package and subpackages without running their __init__ code.

    ``names`` has their full names, the outermost package first.
    """
    spec = importlib.util.find_spec(names[0])
    assert spec is not None
    assert spec.submodule_search_locations is not None
    (folder,) = spec.submodule_search_locations
    for name in names:
        package = ModuleType(name)
        package.__path__ = [str(Path(folder, *name.split(".")[1:]))]
        package.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        package.__spec__.submodule_search_locations = package.__path__
        sys.modules.setdefault(name, package)
