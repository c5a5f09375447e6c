"""Defines the command ``mpo-ext convert-model``. Its dependencies are imported only when it runs."""

import argparse
import sys
from pathlib import Path

from mpo_ext.cli.shared import add_debug, command, file_path

_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]


def add_parser(subcommands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subcommands.add_parser(
        "convert-model",
        help="convert an InternVL checkpoint of its authors to transformers' format",
        description="Converts a checkpoint of InternVL's authors (OpenGVLab/InternVL2_5-*, InternVL3-*, InternVL3_5-* "
        "with Qwen, InternLM2 or Llama as language model) to transformers' format, in which all commands read it. No "
        "code of the checkpoint is run.",
    )
    parser.add_argument("source", metavar="IN", help="folder of the checkpoint, or its name on the hub")
    parser.add_argument("out", metavar="OUT", type=file_path, help="folder to write, new or empty")
    parser.add_argument("--revision", help="revision of the checkpoint on the hub")
    add_debug(parser)
    parser.set_defaults(run=run_convert_model)


@command("convert-model", extra="train")
def run_convert_model(args: argparse.Namespace) -> int:
    """Runs ``mpo-ext convert-model`` and returns the exit status."""
    from mpo_ext.checks import check_model_path
    from mpo_ext.convert.internvl import convert_internvl
    from mpo_ext.processors import check_on_hub

    source = Path(args.source)
    if source.exists() and args.revision is not None:
        raise ValueError(f"--revision must be left out for a folder, got {args.revision} for {source}")
    if not source.exists():
        import huggingface_hub as hub

        check_model_path("IN", args.source)
        check_on_hub("IN", args.source, revision=args.revision)
        source = Path(hub.snapshot_download(args.source, revision=args.revision, allow_patterns=_FILES))
    convert_internvl(source, args.out, say=lambda line: print(line, file=sys.stderr))
    print(f"written to {args.out}: model.path={args.out}")
    return 0
