"""Functions that several commands share: late settings, errors, broken pipes."""

import argparse
import os
import sys
from typing import Any

from mpo_ext.checks import LinesError, install_hint


def accept_late_settings(parser: argparse.ArgumentParser) -> None:
    """Makes a parser accept settings (KEY=VALUE) after an option, which argparse does not assign to ``overrides``."""
    parse = parser.parse_known_args

    def parse_known_args(args: Any = None, namespace: Any = None) -> Any:
        namespace, rest = parse(args, namespace)
        for text in rest:
            if text.startswith("--") and "." in text.partition("=")[0]:
                setting = text.lstrip("-")
                shown = setting if "=" in setting else f"{setting}=VALUE"
                parser.error(f"settings must be given as KEY=VALUE without dashes, as {shown}, got {text}")
        late = [text for text in rest if "=" in text and not text.startswith("-")]
        namespace.overrides = [*namespace.overrides, *late]
        return namespace, [text for text in rest if text not in late]

    parser.parse_known_args = parse_known_args  # type: ignore[method-assign]


def report_error(command: str, error: Exception, *, debug: bool, extra: str = "train") -> int:
    """Prints an error of a command to stderr and returns the exit status 1.

    Args:
        command: The command, without ``mpo-ext``.
        error: The error. An ImportError that names no remedy is followed by the command that installs ``extra``.
        debug: Whether to raise the error instead.
        extra: The extra of mpo-ext with the packages that the command needs.
    """
    if debug:
        raise error
    if isinstance(error, BrokenPipeError):
        return leave_broken_pipe()
    text = str(error) if isinstance(error, LinesError) else " ".join(str(error).split()) or type(error).__name__
    hint = f": {install_hint(extra)}" if isinstance(error, ImportError) and "pip install" not in text else ""
    print(f"mpo-ext {command}: {text}{hint}", file=sys.stderr)
    return 1


def leave_broken_pipe() -> int:
    """Redirects stdout to the null device after its reader has closed the pipe. Returns the exit status 1."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1
