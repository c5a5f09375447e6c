"""Runs the reliability checks, such as ``kill -9`` during training, and updates docs/reliability.md (``make audit``).

Usage: ``python -m benchmarks.audit [WORD ...] [--scale S] [--jobs N]``. A check runs if its name contains one of the
words. Without words, all checks run. The results are stored in results/audit.json, and copied into
docs/reliability.md.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

from benchmarks import measure
from benchmarks.tables import Documents
from mpo_ext.files import write_json
from mpo_ext.report import markdown_table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results" / "audit.json"
_LIMIT_S = 2400
_FIELDS = {
    "cases",
    "command",
    "commit",
    "cores",
    "cpu",
    "date",
    "failed",
    "load",
    "passed",
    "scale",
    "seconds",
    "skipped",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Check:
    """A check of the audit: a run of pytest, or of the native tests under a sanitizer.

    Attributes:
        name: Name of the check. The command line selects checks by their names.
        tests: Arguments of pytest. For a sanitizer check, the value of ``SANITIZERS``, such as "thread".
        counts: Environment variables that set a number of test cases, such as ``{"MPO_KILLS": 20}``.
        settings: Other environment variables.
        is_sanitizer: Whether ``make sanitize`` runs the check instead of pytest.
    """

    name: str
    tests: tuple[str, ...]
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    settings: dict[str, str] = dataclasses.field(default_factory=dict)
    is_sanitizer: bool = False

    def environment(self, scale: float) -> dict[str, str]:
        """Returns the environment variables of the check, with the numbers in ``counts`` multiplied by ``scale``."""
        return {name: str(max(1, round(scale * count))) for name, count in self.counts.items()} | self.settings

    def command(self, scale: float) -> str:
        """Returns the command line to show for the check, such as "MPO_KILLS=20 pytest tests/test_x.py".

        The numbers in ``counts`` are multiplied by ``scale``.
        """
        words = [f"{name}={value}" for name, value in self.environment(scale).items()]
        words += ["make", "sanitize", f"SANITIZERS={self.tests[0]}"] if self.is_sanitizer else ["pytest", *self.tests]
        return shlex.join(words)


_PATIENT = {"MPO_RUN_LIMIT_S": "900"}
#: The checks, the longest first, because two checks run at a time.
CHECKS = (
    Check(
        "random calls of the loss against plain torch", ("tests/loss/test_property.py",), {"MPO_PROPERTY_CASES": 7000}
    ),
    Check("kill -9: training", ("tests/train/test_resume.py", "-k", "killed_run"), {"MPO_KILLS": 4}, _PATIENT),
    Check(
        "kill -9: one of two ranks, DDP and FSDP2", ("tests/train/test_rank_kills.py",), {"MPO_KILLS": 10}, _PATIENT
    ),
    Check("kill -9: sampling", ("tests/generate/test_runner.py", "-k", "killed_run"), {"MPO_KILLS": 20}),
    Check("kill -9: evaluation", ("tests/evaluate/test_evaluation_run.py", "-k", "killed"), {"MPO_KILLS": 20}),
    Check(
        "kill -9: writing a checkpoint", ("tests/train/test_checkpoint.py", "-k", "after_a_kill"), {"MPO_KILLS": 20}
    ),
    Check("damage to the files of a checkpoint", ("tests/train/test_checkpoint_damage.py",)),
    Check("calls of CPU kernels between guard pages", ("tests/ops/test_guard_pages.py",), {"MPO_GUARD_CASES": 4000}),
    Check(
        "hostile answers, 50 ms of CPU time each",
        ("tests/answers/test_hostile_answers.py",),
        {"MPO_HOSTILE_ANSWERS": 10_000},
        {"MPO_HOSTILE_SECONDS": "0.05"},
    ),
    Check(
        "changed lines and rows for the readers of pairs",
        ("tests/data/test_fuzz.py", "tests/data/test_row_fuzz.py"),
        {"MPO_FUZZ_CASES": 5000},
    ),
    Check("wrong arguments of the raw operators", ("tests/ops/test_operators.py", "-k", "refuse")),
    Check("labels out of range that no term uses", ("tests/loss", "-k", "even_if_no_term")),
    Check(
        "files of a user, hostile input",
        ("tests/cli/test_outputs.py", "tests/test_hostile_input.py", "tests/test_images.py"),
    ),
    Check(
        "images of one pair file, checked and inspected",
        ("tests/data/test_check.py", "-k", "many_images"),
        {"MPO_SCALE_IMAGES": 100_000},
    ),
    Check(
        "records of one journal, written and read",
        ("tests/test_journal.py", "-k", "long_journal"),
        {"MPO_SCALE_RECORDS": 1_000_000},
    ),
    Check("address and undefined-behaviour sanitizers", ("address,undefined",), is_sanitizer=True),
    Check("thread sanitizer", ("thread",), is_sanitizer=True),
)


def run(check: Check, scale: float) -> tuple[dict[str, Any], str]:
    """Runs a check. The numbers of cases are multiplied by ``scale``.

    Returns:
        A tuple: the entry of the check in results/audit.json, and a text. If the check failed, the text is the end of
        the output. Otherwise, the text is "".
    """
    load, start = os.getloadavg()[0], time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **check.environment(scale)}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        if check.is_sanitizer:
            command = ["make", "sanitize", f"SANITIZERS={check.tests[0]}"]
        else:
            command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", "-p", "no:xdist"]
            command += [f"--timeout={_LIMIT_S}", "--hypothesis-show-statistics", f"--junitxml={report}", *check.tests]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        counts = count_native(done.stdout) if check.is_sanitizer else count_tests(report, done.stdout)
    figures = {
        **counts,
        "command": check.command(scale),
        "scale": scale,
        "seconds": round(time.monotonic() - start, 1),
        "load": round(load, 1),
        "date": measure.now()[0],
        "commit": measure.environment()["commit"],
        "cpu": measure.environment()["cpu"],
        "cores": os.cpu_count(),
    }
    if done.returncode != 0 and not figures["failed"]:
        figures["failed"] = 1
    return figures, "" if done.returncode == 0 else done.stdout[-4000:]


def count_tests(report: Path, output: str) -> dict[str, int]:
    """Returns the numbers of tested cases and of passed, failed and skipped tests of a pytest run.

    Some tests report numbers of cases: as properties in the JUnit file ``report``, or as Hypothesis statistics in
    ``output``. The number of cases is the sum of these numbers. If there are no such numbers, each test that ran is
    one case. Without the file ``report``, the result is one failed test.
    """
    if not report.exists():
        return {"cases": 0, "passed": 0, "failed": 1, "skipped": 0}
    tests = list(xml.etree.ElementTree.parse(report).iter("testcase"))
    failed = sum(test.find("failure") is not None or test.find("error") is not None for test in tests)
    skipped = sum(test.find("skipped") is not None for test in tests)
    reported = [int(entry.get("value", "0")) for test in tests for entry in test.iter("property")]
    reported += [int(number) for number in re.findall(r"generate phase.*?(\d+) passing", output, re.DOTALL)]
    cases = sum(reported) if reported else len(tests) - skipped
    return {"cases": cases, "passed": len(tests) - failed - skipped, "failed": failed, "skipped": skipped}


def count_native(output: str) -> dict[str, int]:
    """Counts the checks in output lines such as "120 checks, 0 failed". Returns the same keys as ``count_tests``."""
    counts = re.findall(r"^(\d+) checks, (\d+) failed$", output, re.MULTILINE)
    failed = sum(int(number) for _, number in counts)
    checks = sum(int(number) for number, _ in counts)
    return {"cases": checks, "passed": checks - failed, "failed": failed, "skipped": 0}


def load(path: Path) -> dict[str, Any]:
    """Reads results/audit.json, checks its format, and returns its content."""
    results = json.loads(path.read_text())
    known = {check.name for check in CHECKS}
    for name, figures in results.items():
        if name not in known or set(figures) != _FIELDS:
            raise ValueError(
                f"{path} must hold the figures of checks of the audit, got {name!r} with {sorted(figures)}"
            )
    return results


#: Text of a check on the page, where it differs from the name.
_TEXTS = {
    "random calls of the loss against plain torch": "the loss with random arguments, compared with plain torch",
    "kill -9: training": "training resumes after kill -9",
    "kill -9: one of two ranks, DDP and FSDP2": "training resumes after kill -9 of one of two ranks (DDP, FSDP2)",
    "kill -9: sampling": "sampling resumes after kill -9",
    "kill -9: evaluation": "evaluation resumes after kill -9",
    "kill -9: writing a checkpoint": "kill -9 while a checkpoint is written",
    "damage to the files of a checkpoint": "damaged checkpoint files are noticed",
    "calls of CPU kernels between guard pages": "CPU kernels access no memory outside their tensors (guard pages)",
    "hostile answers, 50 ms of CPU time each": "hostile answers take at most 50 ms of CPU time",
    "changed lines and rows for the readers of pairs": "pair files with random changes",
    "wrong arguments of the raw operators": "raw operators refuse wrong arguments",
    "labels out of range that no term uses": "a label out of range makes the loss NaN",
    "files of a user, hostile input": "user files are kept; hostile input is refused",
    "images of one pair file, checked and inspected": "a pair file with many images",
    "records of one journal, written and read": "a journal with many records",
    "address and undefined-behaviour sanitizers": "native tests under the address and undefined-behaviour sanitizers",
    "thread sanitizer": "native tests under the thread sanitizer",
}


def table(documents: Documents) -> str:
    """Returns the table of docs/reliability.md: a row for each check with its result."""
    results: dict[str, Any] = documents["audit"]
    rows = []
    for check in CHECKS:
        if (figures := results.get(check.name)) is None:
            rows.append([_TEXTS.get(check.name, check.name), "not run", "", "", "", f"`{check.command(1)}`"])
            continue
        result = f"{figures['failed']:,} failed"
        if figures["skipped"]:
            result += f", {figures['skipped']:,} skipped"
        rows.append(
            [
                _TEXTS.get(check.name, check.name),
                f"{figures['cases']:,}",
                result,
                f"{figures['seconds']:,.0f}",
                f"{figures['commit'][:8]}, {figures['date'][:10]}",
                f"`{figures['command']}`",
            ]
        )
    return (
        markdown_table(["check", "cases", "result", "seconds", "commit, date", "command"], rows)
        + f"\n{_machine(results)}"
    )


def _machine(results: dict[str, Any]) -> str:
    machines = sorted({f"{run['cores']} cores of {run['cpu'].rsplit(' x ', 1)[0]}" for run in results.values()})
    loads = [figures["load"] for figures in results.values()]
    scaled = [
        _TEXTS.get(check.name, check.name)
        for check in CHECKS
        if check.counts and results.get(check.name, {"scale": 1})["scale"] != 1
    ]
    text = f"Measured on {'; '.join(machines)}. "
    text += f"The load average before a check was {min(loads):g} to {max(loads):g}."
    if scaled:
        text += f" These checks ran with fewer cases than in `make audit`: {'; '.join(scaled)}."
    return text


def write_page() -> None:
    """Writes the audit's results into docs/reliability.md, and renders all other generated tables."""
    subprocess.run([sys.executable, "-m", "benchmarks", "--render", "--docs"], cwd=ROOT, check=True)


def main(argv: list[str] | None = None) -> int:
    """Runs the checks and returns 1 if one of them failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.audit", description=__doc__)
    parser.add_argument(
        "words", nargs="*", metavar="WORD", help="run the checks whose names contain one of these words"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="fraction of the number of cases (default: 1)")
    parser.add_argument("--jobs", type=int, default=2, help="number of checks that run at a time (default: 2)")
    args = parser.parse_args(argv)
    if not 0 < args.scale <= 100:
        parser.error(f"--scale must be in (0, 100], got {args.scale}")
    chosen = [check for check in CHECKS if not args.words or any(word in check.name for word in args.words)]
    if not chosen:
        parser.error(f"WORD must be in the name of a check, got {', '.join(args.words)}")
    start, failed = time.monotonic(), False
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        jobs = {pool.submit(run, check, args.scale): check for check in chosen}
        for job in concurrent.futures.as_completed(jobs):
            figures, output = job.result()
            results = load(RESULTS) if RESULTS.exists() else {}
            write_json(RESULTS, {**results, jobs[job].name: figures})
            print(f"{jobs[job].name}: {figures['cases']:,} cases, {figures['failed']} failed, {figures['seconds']} s")
            if figures["failed"]:
                failed = True
                print(output, file=sys.stderr)
    print(f"{len(chosen)} checks in {(time.monotonic() - start) / 60:.1f} min")
    write_page()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
