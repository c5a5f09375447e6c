"""The command line: ``mpo-ext SUBCOMMAND`` or ``python -m mpo_ext SUBCOMMAND``."""

import argparse
import re
import sys
from typing import NoReturn

import mpo_ext
from mpo_ext.checks import did_you_mean


class _Parser(argparse.ArgumentParser):
    command = ""  # the subcommand that was given

    def error(self, message: str) -> NoReturn:
        """Prints the usage and the message, and exits. For an unknown option, also suggests a similar option."""
        if unknown := re.match(r"unrecognized arguments:.*?--([\w-]+)", message):
            message += did_you_mean(unknown[1], _options(self), self._setting_hint(unknown[1]))
        super().error(message)

    def _setting_hint(self, option: str) -> str:
        """Returns a hint if an unknown option of ``train`` or ``plan`` names a setting; otherwise ""."""
        if self.command not in ("train", "plan"):
            return ""
        from mpo_ext.train.recipe import Recipe
        from mpo_ext.train.settings import setting_names

        name = option.replace("-", "_")
        found = next((setting for setting in setting_names(Recipe) if setting.rpartition(".")[2] == name), None)
        return "" if found is None else f"; settings of a recipe have no dashes: {found}=VALUE"


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    from mpo_ext.cli import convert_model, data, demo, doctor, evaluate, iterate, plan, sample, train

    parser = _Parser(
        prog="mpo-ext", description="Mixed Preference Optimization of multimodal and text language models."
    )
    parser.add_argument("--version", action="version", version=f"mpo-ext {mpo_ext.__version__}")
    subcommands = parser.add_subparsers(required=True, metavar="SUBCOMMAND")
    for module in (doctor, data, convert_model, sample, train, plan, evaluate, iterate, demo):
        module.add_parser(subcommands)
    words = sys.argv[1:] if argv is None else argv
    parser.command = next(iter(words), "")
    args = parser.parse_args(words)
    return args.run(args)


def _options(parser: argparse.ArgumentParser) -> set[str]:
    """Returns the names of the long options of a parser and of its subcommands, without dashes."""
    options: set[str] = set()
    for action in parser._actions:  # noqa: SLF001  # argparse has no public list
        options |= {option[2:] for option in action.option_strings if option.startswith("--")}
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
            options |= {option for child in action.choices.values() for option in _options(child)}
    return options
