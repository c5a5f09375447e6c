"""Loads the compiled module and turns a failed import into something a user can act on."""

from pathlib import Path

try:
    from mpo_ext import _C
except ImportError as error:
    here = Path(__file__).parent
    built = sorted(path.name for path in here.glob("_C*"))
    raise ImportError(
        f"The compiled part of mpo_ext did not load: {error}\n"
        f"  looked in: {here}\n"
        f"  found:     {', '.join(built) or 'nothing'}\n"
        + (
            "It was built for another Python or machine. Build it again: pip install --force-reinstall --no-deps ."
            if built
            else "If that is the source tree, run from another folder, or install it in place: pip install -e ."
        )
    ) from error


def cpu_isas() -> list[str]:
    """Returns the instruction sets of the CPU kernels that run on this machine, the best first."""
    return list(_C.cpu_isas())  # type: ignore[attr-defined]


__all__ = ["_C", "cpu_isas"]
