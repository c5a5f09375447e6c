"""The command line: ``mpo-ext SUBCOMMAND`` or ``python -m mpo_ext SUBCOMMAND``."""

import argparse

import mpo_ext


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    from mpo_ext.cli.data import add_parser as add_data
    from mpo_ext.cli.demo import add_parser as add_demo
    from mpo_ext.cli.doctor import add_parser as add_doctor
    from mpo_ext.cli.evaluate import add_parser as add_evaluate
    from mpo_ext.cli.plan import add_parser as add_plan
    from mpo_ext.cli.sample import add_parser as add_sample
    from mpo_ext.cli.train import add_parser as add_train

    parser = argparse.ArgumentParser(
        prog="mpo-ext", description="Mixed Preference Optimization of multimodal and text language models."
    )
    parser.add_argument("--version", action="version", version=f"mpo-ext {mpo_ext.__version__}")
    subcommands = parser.add_subparsers(required=True, metavar="SUBCOMMAND")
    add_doctor(subcommands)
    add_data(subcommands)
    add_sample(subcommands)
    add_train(subcommands)
    add_plan(subcommands)
    add_evaluate(subcommands)
    add_demo(subcommands)
    args = parser.parse_args(argv)
    return args.run(args)
