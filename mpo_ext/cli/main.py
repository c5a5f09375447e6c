"""The command line: ``mpo-ext SUBCOMMAND`` or ``python -m mpo_ext SUBCOMMAND``."""

import argparse

import mpo_ext


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    from mpo_ext.cli import convert_model, data, demo, doctor, evaluate, iterate, plan, sample, train

    parser = argparse.ArgumentParser(
        prog="mpo-ext", description="Mixed Preference Optimization of multimodal and text language models."
    )
    parser.add_argument("--version", action="version", version=f"mpo-ext {mpo_ext.__version__}")
    subcommands = parser.add_subparsers(required=True, metavar="SUBCOMMAND")
    for module in (doctor, data, convert_model, sample, train, plan, evaluate, iterate, demo):
        module.add_parser(subcommands)
    args = parser.parse_args(argv)
    return args.run(args)
