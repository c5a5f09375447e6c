"""Defines the commands ``mpo-ext data check``, ``stats``, ``convert`` and ``view``.

Their dependencies are imported only when they run. The exit status is 1 if ``check`` finds a defect, or if ``convert``
stops at a bad line. It is 2 if a command cannot run, and otherwise 0.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mpo_ext.cli.shared import (
    Command,
    add_chat,
    add_debug,
    add_image_limit,
    add_root_map,
    at_least,
    command,
    file_path,
    root_map,
)

# The names in ``mpo_ext.data.formats``, which is imported when a command runs.
_FORMATS = ("mmpr", "pairs", "trl", "sharegpt", "alpaca", "swift", "openai", "rlaif-v", "hf")
_WRITABLE = ("mmpr", "pairs", "trl", "hf")
_KINDS = ("standard", "conversational")
_LINES_PER_UPDATE = 256  # of the progress display, which takes longer than the check of a line


def add_parser(subcommands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subcommands.add_parser("data", help="check, measure, convert and view preference pairs")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_check(commands)
    _add_stats(commands)
    _add_convert(commands)
    _add_view(commands)


def _add_command(commands: Any, name: str, text: str, run: Command) -> argparse.ArgumentParser:
    """Adds a command with the options that all ``data`` commands share, and returns its parser.

    Args:
        commands: The object that ``add_subparsers`` returned.
        name: Name of the command.
        text: Help text of the command.
        run: Function that runs the command.
    """
    parser = commands.add_parser(name, help=text)
    text = "meta file, file of rows (.jsonl, .json, .csv, .parquet, also .gz), folder of a dataset, or hf://owner/name"
    parser.add_argument("path", help=text)
    parser.add_argument("--from", dest="format", choices=_FORMATS, help="format of the rows (default: detected)")
    parser.add_argument("--root", type=file_path, help="folder that relative images start at (default: that of PATH)")
    add_root_map(parser)
    text = "folder for images that rows hold as bytes (default: mpo_ext/images beside the cache of datasets)"
    parser.add_argument("--image-dir", type=file_path, help=text)
    parser.add_argument("--split", help="split of a dataset that has several")
    parser.add_argument("--revision", help="branch, tag or commit of a dataset of the Hugging Face hub")
    parser.add_argument("--config", help="configuration of a dataset of the Hugging Face hub that has several")
    text = "use only the pairs that were picked on a page of 'data view'; FILE is its file of picks"
    picks = parser.add_mutually_exclusive_group()
    picks.add_argument("--picked", type=file_path, metavar="FILE", help=text)
    picks.add_argument("--not-picked", type=file_path, metavar="FILE", help="use all lines except the picked pairs")
    text = "field that is removed from each row before it is read; may be repeated"
    parser.add_argument("--ignore", action="append", default=[], metavar="FIELD", help=text)
    parser.add_argument(
        "--max-line-bytes", type=at_least(1), default=16 << 20, help="a longer line is a bad line (default: 16 MiB)"
    )
    add_image_limit(parser)
    add_debug(parser)
    parser.set_defaults(run=run)
    return parser


def _add_check(commands: Any) -> None:
    text = "find bad lines, missing images, duplicates and more; exit status 1 if it finds any"
    parser = _add_command(commands, "check", text, _check)
    _add_tokenizer(parser)
    text = "check of each image and video: verified (default; first frame of a video), decoded, exists, or no check"
    parser.add_argument("--images", choices=("verify", "decode", "exists", "skip"), default="verify", help=text)
    parser.add_argument(
        "--examples", type=at_least(0), default=5, help="number of findings shown of each kind (default: 5)"
    )
    parser.add_argument("--json", type=file_path, help="also write the report to this file")
    text = "also encode the first pairs with the processor of this model (folder or name), as training does"
    parser.add_argument("--model", help=text)
    add_chat(parser)


def _add_stats(commands: Any) -> None:
    parser = _add_command(commands, "stats", "count pairs and measure their lengths, subset by subset", _stats)
    _add_tokenizer(parser)
    parser.add_argument("--json", type=file_path, help="also write the statistics to this file")


def _add_tokenizer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokenizer", help="tokenizer to measure lengths in tokens (default: in words)")


def _add_convert(commands: Any) -> None:
    parser = _add_command(commands, "convert", "write pairs in another format", _convert)
    parser.add_argument(
        "out", type=file_path, help="folder for mmpr and hf, file for pairs and trl; for hf also a file .parquet"
    )
    parser.add_argument("--to", choices=_WRITABLE, required=True, help="format to write")
    text = "for trl and hf: messages, to which TRL applies the chat template, or texts (default: conversational)"
    parser.add_argument("--kind", choices=_KINDS, help=text)
    parser.add_argument(
        "--out-root", type=file_path, help="for mmpr: image folder of pairs that were not read from MMPR"
    )
    parser.add_argument("--name", help="for mmpr: name of the subset of these pairs (default: pairs)")
    parser.add_argument("--skip-bad", action="store_true", help="skip and count bad lines instead of stopping")
    text = "leave out and count all lines with a finding of 'data check', such as missing images and duplicates"
    parser.add_argument("--skip-findings", action="store_true", help=text)
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")


def _add_view(commands: Any) -> None:
    parser = _add_command(commands, "view", "write an HTML page of the pairs, or serve it", _view)
    parser.add_argument("--out", type=file_path, help="path of the page (default: pairs.html)")
    parser.add_argument("--title", help="title of the page (default: PATH)")
    text = "maximum number of pairs; if there are more, they are drawn at random (default: 2000)"
    parser.add_argument("--limit", type=at_least(1), help=text)
    parser.add_argument("--seed", type=at_least(0), help="seed of the draw (default: 0)")
    parser.add_argument(
        "--thumbnail", type=at_least(0), default=320, help="largest side of an image, 0 for none (default: 320)"
    )
    text = "serve a page of all pairs on 127.0.0.1 until Ctrl-C, for files of any size"
    parser.add_argument("--serve", action="store_true", help=text)
    parser.add_argument("--port", type=at_least(0), help="with --serve: number of the port (default: a free port)")
    text = "with --serve: file for the pairs that are picked on the page (default: picked.json)"
    parser.add_argument("--pick-into", type=file_path, metavar="FILE", help=text)


def _open(args: argparse.Namespace) -> Any:
    from mpo_ext.data.sources import open_pairs

    names = ("format", "root", "image_dir", "max_line_bytes", "split", "revision", "config", "ignore")
    settings = {name: getattr(args, name) for name in names}
    source = open_pairs(args.path, root_map=root_map(args), **settings)
    if args.root is not None and source.subsets:
        raise ValueError(
            f"--root must be left out for a meta file, which names the image folders, got {args.root}: use --root-map"
        )
    if args.picked is None and args.not_picked is None:
        return source
    from mpo_ext.data.picks import read_picks, restrict

    return restrict(source, read_picks(args.picked or args.not_picked), keep=args.picked is not None)


def _open_with_warning(args: argparse.Namespace) -> tuple[Any, Any, Callable[[Any], None]]:
    """Opens the pairs. Returns the ``PairSource``, a ``StoredMedia``, and a function ``warn(skipped)``.

    Call ``warn`` after all pairs have been read, with the ``Skipped`` that holds the skipped lines. ``warn`` prints
    these lines, and a warning about missing images and videos.
    """
    from mpo_ext.data.sources import MissingImages

    missing = MissingImages()
    source, stored = _open_with_stored(args, missing.add)

    def warn(skipped: Any) -> None:
        for line in (*skipped.lines(), missing.warning(source)):
            if line is not None:
                print(_printable(line), file=sys.stderr)

    return source, stored, warn


def _open_with_stored(
    args: argparse.Namespace, on_pair: Callable[[Any], object] = lambda pair: None
) -> tuple[Any, Any]:
    """Opens the pairs, and returns a ``PairSource`` and a ``StoredMedia``.

    For each pair that is read, the ``StoredMedia`` is updated, and ``on_pair`` is called.
    """
    import dataclasses

    from mpo_ext.data.sources import StoredMedia

    source = _open(args)
    stored = StoredMedia(source)

    def record(pair: Any) -> None:
        stored.add(pair)
        on_pair(pair)

    return dataclasses.replace(source, on_pair=record), stored


def _say_stored(stored: Any) -> None:
    """Prints the folder of the images that were extracted from the data. Prints nothing if there are none.

    ``stored`` is a ``StoredMedia``.
    """
    from mpo_ext.data.sources import stored_note

    if stored.folder:
        print(_printable(stored_note(stored.folder)), file=sys.stderr)


@command("data check", extra="data", failure=2)
def _check(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import Progress

    from mpo_ext.data.check import check_pairs
    from mpo_ext.data.sources import root_hint
    from mpo_ext.data.stats import token_counter
    from mpo_ext.files import write_json

    source, stored = _open_with_stored(args)
    _check_json_report(args, source)
    length, unit = token_counter(args.tokenizer)
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("check", total=len(source.indices))
        lines = itertools.count(1)

        def on_line() -> None:
            if (line := next(lines)) % _LINES_PER_UPDATE == 0:
                progress.update(task, completed=line)

        report = check_pairs(source, images=args.images, keep=args.examples, length=length, on_line=on_line)
    console = _console()
    console.print(_format_line(args, source, report.stats), markup=False, highlight=False)
    _say_stored(stored)
    console.print(_stats_table(report.stats, unit))
    if report.is_clean:
        console.print("No findings.", style="green")
    else:
        rows = [(kind, f"{count:,}") for kind, count in report.totals().most_common()]
        console.print(_table("Findings", ("kind", "count"), rows))
        for kind, findings in report.examples.items():
            for finding in findings:
                console.print(f"{finding.where}: {kind}: {_printable(finding.message)}", markup=False, highlight=False)
            if (rest := report.totals()[kind] - len(findings)) > 0:
                console.print(f"and {rest:,} more of {kind!r} (--examples shows more)", markup=False, highlight=False)
        missing = [f"{media}s" for media in ("image", "video") if f"missing {media}" in report.examples]
        if missing:
            console.print(root_hint(source, " and ".join(missing)), markup=False, highlight=False)
        if not report.is_sound.all():  # a wrong length in a meta file belongs to no line
            console.print("mpo-ext data convert --skip-findings leaves these lines out", markup=False, highlight=False)
    values = report.to_dict()
    is_valid = report.is_clean
    if args.model is not None:
        from mpo_ext.cli.processor import check_processor, good_pairs

        encoded = check_processor(args, args.model, good_pairs(source))
        values["model"] = encoded.to_dict()
        for line in encoded.text_lines():
            console.print(_printable(line), markup=False, highlight=False)
        if encoded.problems:
            console.print(f"NOT VALID: {_printable('; '.join(encoded.problems))}", markup=False, highlight=False)
        is_valid = is_valid and not encoded.problems
    if args.json is not None:
        write_json(args.json, values)
    return 0 if is_valid else 1


@command("data stats", extra="data", failure=2)
def _stats(args: argparse.Namespace) -> int:
    from mpo_ext.data.reader import Skipped
    from mpo_ext.data.stats import collect_stats, token_counter
    from mpo_ext.files import write_json

    source, stored, warn = _open_with_warning(args)
    _check_json_report(args, source)
    length, unit = token_counter(args.tokenizer)
    skipped = Skipped()
    stats = collect_stats(source, length, skipped)
    console = _console()
    console.print(_format_line(args, source, stats), markup=False, highlight=False)
    console.print(_stats_table(stats, unit))
    _say_stored(stored)
    warn(skipped)
    if args.json is not None:
        subsets = {name: subset.to_dict() for name, subset in stats.items()}
        write_json(args.json, {"format": source.format, "unit": unit, "subsets": subsets})
    return 0


@command("data convert", extra="data", failure=2)
def _convert(args: argparse.Namespace) -> int:
    from mpo_ext.data.convert import convert, written_paths
    from mpo_ext.data.reader import BadLine
    from mpo_ext.files import check_outputs

    for name, formats in (("kind", ("trl", "hf")), ("out_root", ("mmpr",)), ("name", ("mmpr",))):
        if args.to not in formats and (value := getattr(args, name)) is not None:
            raise ValueError(f"--{name.replace('_', '-')} must be left out with --to {args.to}, got {value}")
    if (written := written_paths(args.out, args.to)) and not args.force:
        raise FileExistsError(f"out must not exist without --force, got {written[0]}")
    check_outputs("out", written, inputs=[path for path in (args.picked, args.not_picked) if path is not None])
    source, stored, warn = _open_with_warning(args)
    for name in ("out_root", "name") if source.format == "mmpr" else ():
        if (value := getattr(args, name)) is not None:
            raise ValueError(
                f"--{name.replace('_', '-')} must be left out for pairs in the format mmpr, which keep their subset, "
                f"got {value}"
            )
    if args.skip_findings:
        source = _without_findings(source)
    try:
        count, skipped = convert(
            source,
            args.out,
            args.to,
            kind=args.kind or "conversational",
            skip_bad=args.skip_bad,
            root=args.out_root,
            name="pairs" if args.name is None else args.name,
        )
    except BadLine as bad:
        print(f"{bad}\n--skip-bad skips such lines and counts them", file=sys.stderr)
        _say_stored(stored)
        return 1
    place = args.out / "meta.json" if args.to == "mmpr" else args.out
    if stored.folder and args.to != "hf":  # a dataset contains its images
        folder = f"{stored.folder} (--image-dir sets another folder)"
        print(f"wrote {count:,} pairs to {place}, which need the images in {folder}")
    else:
        print(f"wrote {count:,} pairs to {place}")
        _say_stored(stored)
    warn(skipped)
    return 0


def _without_findings(source: Any) -> Any:
    """Returns a ``PairSource`` without its defective lines. Prints a summary of these lines.

    ``check_pairs`` finds the defective lines. Raises ValueError if no line remains.
    """
    import dataclasses

    import numpy as np

    from mpo_ext.data.check import check_pairs

    report = check_pairs(dataclasses.replace(source, on_pair=None), keep=1)
    indices = np.asarray(source.indices, np.int64)[report.is_sound]
    left_out = len(report.is_sound) - len(indices)
    print(f"left out {left_out:,} of {len(report.is_sound):,} lines", file=sys.stderr)
    for kind, count in report.totals().most_common():
        (finding,) = report.examples[kind]
        print(_printable(f"{kind}: {count:,}, for example {finding.where}: {finding.message}"), file=sys.stderr)
    if not len(indices):
        raise ValueError(f"--skip-findings must leave a line of {source.path}, got findings in all {left_out:,}")
    return dataclasses.replace(source, selected=indices)


@command("data view", extra="data", failure=2)
def _view(args: argparse.Namespace) -> int:
    _check_view_options(args)
    if args.serve:
        return _serve(args)
    from mpo_ext.data.view import write_view
    from mpo_ext.files import check_outputs
    from mpo_ext.report import is_page

    source, stored, warn = _open_with_warning(args)
    out = args.out or Path("pairs.html")
    check_outputs("--out", [out], inputs=source.files, is_ours=out.is_file() and is_page(out))
    count, skipped = write_view(
        out, source, title=args.title, limit=args.limit or 2000, seed=args.seed or 0, thumbnail=args.thumbnail
    )
    print(f"wrote {count:,} of {len(source.indices):,} pairs to {out}")
    _say_stored(stored)
    warn(skipped)
    return 0


def _check_view_options(args: argparse.Namespace) -> None:
    """Raises ValueError if ``data view`` has an option that is not allowed.

    With ``--serve``, the options ``--out``, ``--limit`` and ``--seed`` are not allowed. Without ``--serve``,
    the options ``--port`` and ``--pick-into`` are not allowed.
    """
    names, state = (("out", "limit", "seed"), "with") if args.serve else (("port", "pick_into"), "without")
    for name in names:
        if (value := getattr(args, name)) is not None:
            raise ValueError(f"--{name.replace('_', '-')} must be left out {state} --serve, got {value}")


def _serve(args: argparse.Namespace) -> int:
    from mpo_ext.data.view_server import PairServer

    source, stored = _open_with_stored(args)
    picks_path = args.pick_into or Path("picked.json")
    options = {"picks_path": picks_path, "title": args.title, "thumbnail": args.thumbnail}
    with PairServer(source, port=args.port or 0, **options) as server:
        print(f"{len(source.indices):,} lines at {server.url} (Ctrl-C ends; picks are in {picks_path})", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print(f"{len(server.picks.digests):,} pairs are picked", file=sys.stderr)
            _say_stored(stored)
    return 0


def _check_json_report(args: argparse.Namespace, source: Any) -> None:
    """Raises an error if the path of ``--json`` is an input, or an existing file that is not a report."""
    from mpo_ext.files import check_outputs

    if args.json is not None:
        try:  # a pipe or a terminal would wait for input
            report = json.loads(args.json.read_bytes()) if args.json.is_file() else None
        except (OSError, ValueError, RecursionError):
            report = None
        is_ours = isinstance(report, dict) and isinstance(report.get("subsets"), dict)
        check_outputs("--json", [args.json], inputs=source.files, is_ours=is_ours)


def _format_line(args: argparse.Namespace, source: Any, stats: Any) -> str:
    """Returns a line such as "Format trl (detected): 90 of 100 pairs with images or videos; 5 videos"."""
    origin = "detected" if args.format is None else "set by --from"
    pairs = sum(subset.pairs for subset in stats.values())
    text_only = sum(subset.text_only for subset in stats.values())
    place = f"{source.path}: " if source.path.startswith("hf://") else ""
    text = f"{place}Format {source.format} ({origin}): {pairs - text_only:,} of {pairs:,} pairs with images"
    videos, rejected = (sum(getattr(s, name) for s in stats.values()) for name in ("videos", "rejected_images"))
    text += f" or videos; {videos:,} videos" if videos else ""
    return text + (f"; {rejected:,} pairs with other images for the rejected response" if rejected else "")


def _stats_table(stats: Any, unit: str) -> Any:
    header = ("subset", "pairs", "skipped", "text only", "with answer", "chosen", "rejected", "rejected longer")

    def share(part: int, whole: int) -> str:
        return f"{100 * part / whole:.1f} %" if whole else "-"

    rows = [
        (
            name,
            f"{subset.pairs:,}",
            f"{subset.skipped:,}",
            f"{subset.text_only:,}",
            share(subset.with_answer, subset.pairs),
            f"{subset.chosen.least:,} / {subset.chosen.mean:,.1f} / {subset.chosen.most:,}",
            f"{subset.rejected.least:,} / {subset.rejected.mean:,.1f} / {subset.rejected.most:,}",
            share(subset.rejected_longer, subset.pairs),
        )
        for name, subset in stats.items()
    ]
    return _table(f"Lengths (min / mean / max) in {unit}", header, rows)


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left")
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(_printable(cell)) for cell in row))
    return table


def _console() -> Any:
    """Returns a console that wraps lines only if stdout is a terminal."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=160, soft_wrap=True)


def _printable(text: str) -> str:
    """Returns a text with escaped control characters, so that a malicious file cannot control the terminal."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)
