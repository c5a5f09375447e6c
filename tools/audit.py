"""Repeats the checks of docs/reliability.md and prints their figures (``make audit``)."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
#: Name of a check, environment, tests and a selection of them.
CHECKS: tuple[tuple[str, dict[str, str], tuple[str, ...]], ...] = (
    ("20,000 random calls against plain torch", {"MPO_PROPERTY_CASES": "20000"}, ("tests/loss/test_property.py",)),
    ("4,000 calls between guard pages", {"MPO_GUARD_CASES": "4000"}, ("tests/ops/test_guard_pages.py",)),
    ("bad arguments of the raw operators", {}, ("tests/ops/test_operators.py", "-k", "refuse")),
    ("changed bytes in each file of a checkpoint", {}, ("tests/train/test_checkpoint.py", "-k", "changed or damaged")),
    ("kill -9, 20 times: sampling", {"MPO_KILLS": "20"}, ("tests/generate/test_runner.py", "-k", "killed")),
    ("kill -9, 20 times: evaluation", {"MPO_KILLS": "20"}, ("tests/evaluate/test_evaluation_run.py", "-k", "kill")),
    ("kill -9, 20 times: checkpoints", {"MPO_KILLS": "20"}, ("tests/train/test_checkpoint.py", "-k", "kill")),
    ("kill -9, 20 times: training and two ranks", {"MPO_KILLS": "20"}, ("tests/train/test_resume.py", "-k", "kill")),
    (
        "10,000 hostile answers, 50 ms each",
        {"MPO_HOSTILE_ANSWERS": "10000", "MPO_HOSTILE_SECONDS": "0.05"},
        ("tests/answers/test_hostile_answers.py",),
    ),
    (
        "5,000 changed files for each reader",
        {"MPO_FUZZ_CASES": "5000"},
        ("tests/data/test_fuzz.py", "tests/data/test_row_fuzz.py"),
    ),
    (
        "files of a user, hostile input",
        {},
        ("tests/cli/test_outputs.py", "tests/test_hostile_input.py", "tests/test_images.py"),
    ),
)  # fmt: skip


def main() -> int:
    """Runs all checks, or those whose names contain an argument, and returns 1 if one of them fails."""
    failed = False
    print("| check | result | seconds |\n| --- | --- | --- |", flush=True)
    for name, settings, tests in CHECKS:
        if sys.argv[1:] and not any(word in name for word in sys.argv[1:]):
            continue
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", "--timeout=3600", *tests],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **settings},
            capture_output=True,
            text=True,
            check=False,
        )
        summary = re.findall(r"\d+ (?:passed|failed|skipped|errors?)", done.stdout)
        print(f"| {name} | {', '.join(summary) or 'no test ran'} | {time.monotonic() - start:.0f} |", flush=True)
        if done.returncode != 0:
            failed = True
            print(done.stdout[-4000:], done.stderr[-1000:], file=sys.stderr)
    return failed


if __name__ == "__main__":
    sys.exit(main())
