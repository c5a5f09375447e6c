"""Tests ``make audit``: its list of checks, its counts of test cases, and its table."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import audit

FIGURES = {
    "cases": 12, "passed": 3, "failed": 0, "skipped": 0, "command": "pytest x", "scale": 1.0, "seconds": 7.0,
    "load": 2.5, "date": "2026-01-02T00:00:00+00:00", "commit": "0123456789", "cpu": "a CPU", "cores": 2,
}  # fmt: skip


@pytest.mark.parametrize("check", audit.CHECKS, ids=lambda check: check.name)
def test_a_check_names_tests_and_settings_that_exist(check: audit.Check) -> None:
    makefile = (audit.ROOT / "Makefile").read_text()
    if check.is_sanitizer:
        assert check.tests[0] in re.search(r"^SANITIZERS \?= (.*)$", makefile, re.MULTILINE)[1].split()  # type: ignore[index]
        return
    paths = [audit.ROOT / test for test in check.tests if test.startswith("tests/")]
    assert paths
    assert all(path.exists() for path in paths)
    text = "".join(path.read_text() for path in paths if path.is_file())
    text += (audit.ROOT / "tests/train/run_recipe.py").read_text()
    assert all(name in text for name in {**check.counts, **check.settings})
    if check.counts and "hypothesis" not in text:
        assert 'record_property("cases"' in text


def test_cases_are_counted(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite><testcase><properties><property name="cases" value="40"/></properties></testcase>'
        "<testcase/><testcase><skipped/></testcase><testcase><failure/></testcase></testsuite></testsuites>"
    )
    output = (
        "a:\n  - during reuse phase (0.1 seconds):\n  - during generate phase (1.2 seconds):\n"
        "    - Typical runtimes: 1 ms\n    - 150 passing, 0 failing, and 3 invalid test cases\n"
    )
    assert audit.count_tests(report, output) == {"cases": 190, "passed": 2, "failed": 1, "skipped": 1}
    assert audit.count_tests(report, output * 2)["cases"] == 340
    report.write_text("<testsuites><testsuite><testcase/><testcase/></testsuite></testsuites>")
    assert audit.count_tests(report, "")["cases"] == 2
    assert audit.count_tests(tmp_path / "none.xml", "")["failed"] == 1
    assert audit.count_native("x\n12 checks, 0 failed\n5 checks, 2 failed\n") == {
        "cases": 17, "passed": 15, "failed": 2, "skipped": 0,
    }  # fmt: skip


def test_the_table_says_what_was_run() -> None:
    name, other = audit.CHECKS[0].name, audit.CHECKS[1].name
    results = {name: FIGURES, other: {**FIGURES, "scale": 0.1, "failed": 2, "skipped": 1}}
    text = audit.table({"audit": results})
    rows = {row.split(" |")[0].removeprefix("| ").strip(): row for row in text.splitlines() if row.startswith("| ")}
    assert "12 |" in rows["the loss with random arguments, compared with plain torch"]
    assert "0 failed |" in rows["the loss with random arguments, compared with plain torch"]
    assert "2 failed, 1 skipped" in rows["training resumes after kill -9"]
    assert "not run" in rows["training resumes after kill -9 of one of two ranks (DDP, FSDP2)"]
    assert "fewer cases than in `make audit`: training resumes after kill -9." in text


def test_scale_and_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ran: list[tuple[str, float]] = []

    def run(check: audit.Check, scale: float) -> tuple[dict[str, Any], str]:
        ran.append((check.name, scale))
        return {**FIGURES, "failed": int("evaluation" in check.name), "scale": scale}, "what failed"

    monkeypatch.setattr(audit, "run", run)
    monkeypatch.setattr(audit, "RESULTS", tmp_path / "audit.json")
    monkeypatch.setattr(audit, "write_page", lambda: None)
    assert audit.main(["kill -9: sampling", "--scale", "0.5"]) == 0
    assert audit.main(["kill -9: evaluation"]) == 1
    assert ran == [("kill -9: sampling", 0.5), ("kill -9: evaluation", 1.0)]
    assert set(json.loads((tmp_path / "audit.json").read_text())) == {name for name, _ in ran}
    assert "what failed" in capsys.readouterr().err
    for arguments in (["nothing of this name"], ["--scale", "0"]):
        with pytest.raises(SystemExit):
            audit.main(arguments)
    sampling = next(check for check in audit.CHECKS if "sampling" in check.name)
    assert sampling.environment(0.1) == {"MPO_KILLS": "2"}
    assert sampling.command(1) == "MPO_KILLS=20 pytest tests/generate/test_runner.py -k killed_run"
