"""Loads the compiled module and turns a failed import into something a user can act on."""

import importlib.metadata
import importlib.util
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

import mpo_ext


def _load() -> ModuleType:
    try:
        from mpo_ext import _C
    except ImportError as error:
        module = _load_installed()
        if module is None:
            raise ImportError(_advice(error)) from error
        return module
    return _C


def _load_installed() -> ModuleType | None:
    """The module of an installed mpo_ext of this very version.

    After ``pip install .``, a Python that is started in the checkout imports the source folder, which has no compiled
    module: then the installed one serves.
    """
    for distribution in importlib.metadata.distributions(name="mpo-ext"):
        if distribution.version != mpo_ext.__version__:
            continue
        for suffix in EXTENSION_SUFFIXES:
            path = Path(str(distribution.locate_file(f"mpo_ext/_C{suffix}")))
            spec = importlib.util.spec_from_file_location("mpo_ext._C", path)
            if path.exists() and spec is not None and spec.loader is not None:
                module = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(module)
                sys.modules["mpo_ext._C"] = module
                return module
    return None


def _advice(error: ImportError) -> str:
    here = Path(__file__).parent.parent
    built = sorted(path.name for path in here.glob("_C*"))
    return (
        f"The compiled part of mpo_ext did not load: {error}\n"
        f"  looked in: {here}\n"
        f"  found:     {', '.join(built) or 'nothing'}\n"
        + (
            "It was built for another Python or machine. Build it again: pip install --force-reinstall --no-deps ."
            if built
            else "If that is the source tree, install the package: pip install . (or, in place, pip install -e .)"
        )
    )


_C = _load()


def cpu_isas() -> list[str]:
    """Returns the instruction sets of the CPU kernels that run on this machine, the best first."""
    return list(_C.cpu_isas())


__all__ = ["_C", "cpu_isas"]
