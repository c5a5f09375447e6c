"""Imports one module of a large package without running the package's __init__ code and its many imports."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def add_bare_packages(*names: str) -> None:
    """Registers empty packages, so that their modules can be imported without the packages' __init__ code.

    ``names`` starts with the outermost package.
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
