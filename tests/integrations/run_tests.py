"""Runs tests of other trainers with this Python. If they pass, saves versions and counts for the documentation.

    PYTHON tests/integrations/run_tests.py NAME PACKAGE[,PACKAGE] [arguments of pytest]

``NAME`` names the entry in results/integrations.json. The entry also has the version of each ``PACKAGE``.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import results

HERE = Path(__file__).resolve().parent
TESTS = HERE.parent


def main(name: str, packages: str, *arguments: str) -> int:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "junit.xml")
        # Another environment may lack triton, and the folder tests/ has a folder of that name.
        paths = f"pythonpath={TESTS.parent} {HERE} {TESTS / 'train'}"
        command = [
            sys.executable, "-m", "pytest", "-o", paths, "--confcutdir", str(HERE), "-p", "no:cacheprovider",
            "-W", "ignore", "--show-capture", "stderr", "--junitxml", str(report), *arguments,
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1"}
        code = subprocess.run(command, env=environment, check=False).returncode
        if code:
            return code
        suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
    counts = {key: int(suite.attrib[key]) for key in ("tests", "skipped")}
    results.save(
        "tests",
        name,
        {
            "versions": {package: importlib.metadata.version(package) for package in packages.split(",")},
            "passed": counts["tests"] - counts["skipped"],
            "skipped": counts["skipped"],
            "date": datetime.date.today().isoformat(),
        },
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
