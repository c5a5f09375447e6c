"""Loads the compiled module ``mpo_ext._C``. If loading fails, the error tells how to repair the installation."""

import functools
import importlib.metadata
from collections.abc import Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

#: True if this copy has no compiled module on purpose. tools/hub_kernel.py sets it in the variant torch-universal.
PURE_PYTHON = False


@functools.cache
def compiled() -> ModuleType:
    """Returns the compiled module ``mpo_ext._C``.

    Raises:
        ImportError: If the module is missing or does not load.
    """
    if PURE_PYTHON:
        raise ImportError("this build of mpo_ext has no compiled kernels; pip install mpo-ext installs them")
    try:
        from mpo_ext import _C
    except ImportError as error:
        raise ImportError(_advice(error)) from error
    return _C


def cpu_isas() -> list[str]:
    """Returns the instruction sets of the CPU kernels that this machine supports, fastest first."""
    return list(compiled().cpu_isas())


def _advice(error: ImportError) -> str:
    here = Path(__file__).parent.parent
    built = sorted(path.name for path in here.glob("_C*"))
    elsewhere = next(_installed_elsewhere(here), None)
    if built:
        advice = "It was built for another Python or machine; rebuild it: pip install --force-reinstall --no-deps ."
    elif elsewhere is not None:
        # Its module is not used, because it may have been built from other sources than the Python files here.
        advice = (
            f"mpo_ext is installed in {elsewhere}, but Python imports the source tree. Start Python in another "
            "folder, or install the source tree in place: pip install -e ."
        )
    else:
        advice = "If that is the source tree, install the package: pip install . (or, in place, pip install -e .)"
    return (
        f"The compiled part of mpo_ext did not load: {error}\n"
        f"  looked in: {here}\n"
        f"  found:     {', '.join(built) or 'nothing'}\n"
        f"{advice}"
    )


def _installed_elsewhere(here: Path) -> Iterator[Path]:
    """Yields the folders of other installed copies of mpo_ext that contain a compiled module."""
    for distribution in importlib.metadata.distributions(name="mpo-ext"):
        folder = Path(str(distribution.locate_file("mpo_ext")))
        if folder != here and any((folder / f"_C{suffix}").exists() for suffix in EXTENSION_SUFFIXES):
            yield folder
