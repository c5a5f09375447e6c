"""Measures the commands that read large pair files: ``make bench-pairs``, or ``python -m benchmarks.pair_files``.

Each command is a fresh process, and its time includes the start of Python. The baseline is a program that only calls
``json.loads`` on each line. The commands read two files. In the first file, the pairs have random words. In the second
file, the pairs also have a small image, the same for all pairs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from mpo_ext.report import markdown_table

_BASELINE = (
    "import json, sys\nwith open(sys.argv[1], 'rb') as file:\n    for line in file:\n        json.loads(line)\n"
)
_WORDS = 800
_MIB = 1 << 10  # a MiB in the unit of ru_maxrss, which is KiB on Linux


@dataclasses.dataclass(frozen=True)
class CommandCost:
    """The cost of a command: elapsed seconds, CPU seconds (None if not measured), and peak resident memory in MiB."""

    name: str
    seconds: float
    cpu_seconds: float | None
    peak_mib: float


def main() -> None:
    """Writes two pair files, runs the measured commands on each, and prints a table in Markdown."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="folder for the files (default: a temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        columns = {}
        for kind in ("text", "images"):
            path = write_pairs(folder / f"{kind}-{args.pairs}.jsonl", args.pairs, image=kind == "images")
            size = f"{path.stat().st_size / 1e6:,.0f} MB"
            columns[f"{kind} ({size})"] = list(measure(path, write_model(folder / "model")))
    header = ["", *(f"{kind}: {column}" for kind in columns for column in ("time", "CPU", "peak memory"))]
    rows = []
    for costs in zip(*columns.values(), strict=True):
        rows.append([costs[0].name, *(text for cost in costs for text in _cells(cost))])
    print(f"\n{args.pairs:,} pairs, {_cpu()}\n\n{markdown_table(header, rows)}")


def _cpu() -> str:
    names = [line.partition(":")[2] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return f"{names[0].strip()} ({len(names)} cores)"


def _cells(cost: CommandCost) -> tuple[str, str, str]:
    cpu = "" if cost.cpu_seconds is None else f"{cost.cpu_seconds:.1f} s"
    return f"{cost.seconds:.1f} s", cpu, f"{cost.peak_mib:,.0f} MiB"


def write_pairs(path: Path, count: int, *, image: bool) -> Path:
    """Writes a file of ``count`` random pairs, if it does not exist, and returns ``path``.

    If ``image`` is True, all pairs have the same small image, which is written to the same folder.
    """
    from PIL import Image

    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(_WORDS)]
    Image.new("RGB", (64, 64), (200, 30, 40)).save(path.with_name("shared.png"))
    if path.exists():
        return path

    def text(length: int) -> str:
        return " ".join(rng.choices(words, k=length))

    temporary = path.with_suffix(".partial")
    with open(temporary, "w") as file:
        for number in range(count):
            shared = text(25)
            line = {
                "question": f"Question {number}: {text(18)}?",
                "chosen": f"{shared} {text(35)} Final answer: {number % 97}",
                "rejected": f"{shared} {text(35)} Final answer: {number % 89}",
                "images": ["shared.png"] if image else [],
                "answer_gt": str(number % 97),
                "provenance": {"pipeline": "correctness", "model": "m", "seed": number},
            }
            file.write(json.dumps(line) + "\n")
    temporary.rename(path)
    return path


def write_model(folder: Path) -> Path:
    """Writes the untrained model of the digits demo, if it does not exist, and returns ``folder``.

    ``train --dry-run`` requires a model, but does not read its weights.
    """
    if not (folder / "config.json").exists():
        # The peak memory of a command includes that of the process that starts it, so this process must stay small.
        process = multiprocessing.get_context("spawn").Process(target=_save_model, args=(folder,))
        process.start()
        process.join()
        assert process.exitcode == 0
    return folder


def _save_model(folder: Path) -> None:
    from mpo_ext.demo.model import build_model, build_processor

    processor = build_processor()
    build_model(processor.tokenizer).save_pretrained(folder)
    processor.save_pretrained(folder)


def measure(path: Path, model: Path) -> Iterator[CommandCost]:
    """Runs each command on the pair file ``path``, and yields its time and memory."""
    command = [sys.executable, "-m", "mpo_ext"]
    recipe = path.with_suffix(".yaml")
    settings = {
        "model": {"path": str(model), "trust_remote_code": True},
        "data": {"train": str(path)},
        "output": {"dir": str(path.with_suffix(".run"))},
    }
    recipe.write_text(json.dumps(settings))
    page = path.with_suffix(".html")
    page.unlink(missing_ok=True)
    yield run("baseline: json.loads of each line", [sys.executable, "-c", _BASELINE, str(path)])
    yield run("data check", [*command, "data", "check", str(path)])
    yield run("data stats", [*command, "data", "stats", str(path)])
    yield run("data view", [*command, "data", "view", str(path), "--out", str(page)])
    yield from serve([*command, "data", "view", str(path), "--serve"], path.parent)
    # The tokenizer of the demo does not know the words of the pairs, so the dry run ends with the status 1.
    yield run("train --dry-run", [*command, "train", str(recipe), "--dry-run"], status=1)


def run(name: str, command: Sequence[str], *, status: int = 0) -> CommandCost:
    """Runs a command until it ends, and returns its time and memory.

    Raises:
        CalledProcessError: If the exit status is not ``status``.
    """
    begin_s = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, ended, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begin_s
    process.returncode = os.waitstatus_to_exitcode(ended)
    if process.returncode != status:
        raise subprocess.CalledProcessError(process.returncode, command)
    cost = CommandCost(name, seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / _MIB)
    print(cost, file=sys.stderr)
    return cost


def serve(command: Sequence[str], folder: Path) -> Iterator[CommandCost]:
    """Measures ``data view --serve``: the time until the first pairs are served, and the time to search all pairs."""
    begin_s = time.perf_counter()
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    url = process.stdout.readline().split()[3]
    assert len(_get(url, 0, "")["pairs"]) == 20
    first_s = time.perf_counter() - begin_s
    start, total = 0, 1
    begin_s = time.perf_counter()
    while start < total:
        part = _get(url, start, "no pair has this text")
        assert not part["pairs"]
        start, total = part["next"], part["total"]
    search_s = time.perf_counter() - begin_s
    process.send_signal(signal.SIGINT)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, process.returncode
    peak_mib = usage.ru_maxrss / _MIB
    yield CommandCost("data view --serve, until the first pairs", first_s, None, peak_mib)
    yield CommandCost("data view --serve, a search through all pairs", search_s, None, peak_mib)


def _get(url: str, start: int, query: str) -> dict[str, int | list[object]]:
    address = f"{url}pairs?start={start}&query={query.replace(' ', '%20')}"
    with urllib.request.urlopen(address, timeout=60) as answer:
        return json.loads(answer.read())


if __name__ == "__main__":
    main()
