"""Tests the comparison of the pipelines that make pairs: counts of pairs and tokens, times, and the table in docs/."""

# ruff: noqa: E402 - these packages come with an extra, and without them there is nothing to test here
import json
from pathlib import Path

import pytest

for package in ("transformers", "sklearn", "PIL"):
    pytest.importorskip(package)

from benchmarks import pipelines
from benchmarks.study import labels


def test_a_run_of_each_pipeline_makes_pairs_and_counts_its_tokens(tmp_path: Path) -> None:
    file = tmp_path / "results" / "pipelines.json"
    options = ["--questions", "40", "--samples", "4", "--repeat", "2", "--out", str(tmp_path), "--results", str(file)]
    assert pipelines.main(options) == 0
    results = pipelines.load(file)["results"]
    for name, figures in results.items():
        assert len(figures["runs"]) == 2
        first, second = ((tmp_path / f"{name}-{run}" / "pairs.jsonl").read_text() for run in range(2))
        assert first != second, "each run must have its own seed"
        for run in figures["runs"]:
            assert run["pairs"] > 0
            assert run["seconds"] > 0
            assert (run["claim_tokens"] > 0) == (name == pipelines.RLAIF_V)
        assert figures["right"] + figures["equal"] + figures["wrong"] == pytest.approx(1)
    tokens = {name: sum(run["tokens"] for run in figures["runs"]) for name, figures in results.items()}
    # A response has about 15 tokens: one and a half per question, or four.
    assert 2 * 40 * 15 < tokens[pipelines.DROPOUT_NTP] < 2 * 40 * 30
    assert 2 * 40 * 4 * 14 < tokens[pipelines.CORRECTNESS] < 2 * 40 * 4 * 17
    assert tokens[pipelines.RLAIF_V] > 2 * 40 * 4 * 14


def test_the_table_divides_by_the_pairs_and_compares_with_the_paper(tmp_path: Path) -> None:
    run = {"pairs": 10, "seconds": 2.0, "cpu_seconds": 2.0, "tokens": 300, "claim_tokens": 0}
    shares = dict.fromkeys(labels.SHARES, 0.25)
    results = {
        pipelines.CORRECTNESS: {"runs": [run, {**run, "pairs": 30, "cpu_seconds": 1.0}], **shares},
        pipelines.DROPOUT_NTP: {"runs": [run], **shares},
        pipelines.RLAIF_V: {"runs": [{**run, "tokens": 600, "claim_tokens": 450}], **shares},
    }
    environment = {"threads": 1, "cpu": "CPU", "cores": 2, "load_before": [0.5], "load_after": [1.5], "commit": "abc",
                   "started": "2026-11-30T10:00:00", "command": "python -m benchmarks.pipelines"}  # fmt: skip
    settings = {"questions": 5, "samples": 8, "repeat": 1}
    document = {"environment": environment, "settings": settings, "results": results}
    text = pipelines.table({"pipelines": document})
    rows = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in text.splitlines()
            if line.startswith("|")}  # fmt: skip
    assert rows["`correctness`"][:4] == ["40", "15.0", "15.0", "17.5"]
    assert rows["`rlaif-v`"][:4] == ["10", "60.0", "150.0", "5.0"]
    assert "50 % of the tokens per pair of RLAIF-V (20 % with claims)" in text
    assert "57.5 %" in text

    file = tmp_path / "pipelines.json"
    file.write_text(json.dumps({**document, "results": {}}))
    with pytest.raises(ValueError, match=r"must be written by python -m benchmarks\.pipelines"):
        pipelines.load(file)
