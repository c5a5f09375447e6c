"""Tests that the sentences of the study's page follow from its tables by the documented rule."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from benchmarks.study import figures, helps, sentences
from benchmarks.study.declare import SFT, START
from benchmarks.study.language_prior import TASK

PAGES = Path(__file__).parents[2] / "docs"
Accuracies = Mapping[str, Mapping[int, float] | float]  # by row: by seed, or the same in all seeds


def make_document(cot: Accuracies, seeds: tuple[int, ...] = (1, 2, 3, 4, 5), **more: Accuracies) -> dict[str, Any]:
    """Returns the contents of a study result file in which only the runs in ``cot`` were measured.

    ``cot`` maps the name of a run to its accuracy in percent, for all seeds or by seed. ``more`` has other percentages
    in the same form: "direct", "hallucinated" and "unparsable".
    """

    def of(values: Accuracies, row: str, seed: int, default: float) -> float:
        value = values.get(row, default)
        return (value if isinstance(value, (int, float)) else value[seed]) / 100

    results = []
    for seed in seeds:
        for row in (*TASK.starts, *TASK.rows):
            value = cot.get(row)
            if value is None or (isinstance(value, Mapping) and seed not in value):
                results.append({"seed": seed, "row": row, "status": "failed", "reason": figures.NOT_RUN})
                continue
            steps = {
                "accuracy": of(cot, row, seed, 0),
                "unparsable": of(more.get("unparsable", {}), row, seed, 0),
                "hallucinated": of(more.get("hallucinated", {}), row, seed, 0),
            }
            direct = {"accuracy": of(more.get("direct", {}), row, seed, 50)}
            evaluation = {"cot": steps, "direct": direct, "text": {"accuracy": 0.5}}
            results.append({"seed": seed, "row": row, "status": "measured", "evaluation": evaluation})
    return {"task": "language-prior", "seeds": list(seeds), "results": results}


def line_of(block: str, title: str) -> str:
    (line,) = [line for line in block.splitlines() if line.startswith(f"- **{title}")]
    return line


@pytest.mark.parametrize(
    ("verdict", "paper", "word"),
    [
        ("higher", "higher", "appears"),
        ("lower", "lower", "appears"),
        ("lower", "higher", "does not appear"),
        ("higher", "lower", "does not appear"),
        ("cannot be told", "higher", "cannot be told"),
    ],
)
def test_a_direction_of_the_paper_has_its_word(verdict: str, paper: str, word: str) -> None:
    assert sentences.finding(verdict, paper) == word


CLEAR = {1: 3.0, 2: 3.2, 3: 2.9, 4: 3.1, 5: 3.0}
NOISY = {1: 3.0, 2: -9.0, 3: 8.0, 4: -2.0, 5: 4.0}


@pytest.mark.parametrize(
    ("gains", "word", "shown"),
    [
        (CLEAR, "appears", "+3.0 ± 0.1, 5 seeds"),
        ({seed: -gain for seed, gain in CLEAR.items()}, "does not appear", "-3.0 ± 0.1, 5 seeds"),
        (NOISY, "cannot be told", "+0.8 ± 2.9, 5 seeds"),
        ({1: 3.0}, "one seed, no verdict", "+3.0, 1 seed"),
        ({1: 3.0, 2: 3.2}, "cannot be told", "+3.1 ± 0.1, 2 seeds"),  # p is 0.02, three differences are tested
    ],
)
def test_findings_of_made_up_tables(gains: dict[int, float], word: str, shown: str) -> None:
    document = make_document({START: 40.0, SFT: 50.0, "MPO": {seed: 50 + gain for seed, gain in gains.items()}})
    assert f"MPO higher than SFT, step by step ({shown})" in line_of(sentences.findings(document), word)
    assert "MPO higher than DPO, step by step;" in line_of(sentences.findings(document), "not run")


def test_a_direction_that_is_lower_in_the_paper_appears_if_it_is_lower() -> None:
    worse = {seed: 50 - gain for seed, gain in CLEAR.items()}
    findings = sentences.findings(make_document({SFT: 50.0, "SPPO": worse, "IPO": worse}))
    assert "SPPO lower than SFT" in line_of(findings, "appears")
    assert "IPO higher than SFT" in line_of(findings, "does not appear")


def test_the_correction_counts_the_rows_of_the_table() -> None:
    seeds = (1, 2, 3)
    gains = {1: 3.0, 2: 3.6, 3: 2.2}  # p is 0.02
    weights = [row for row, _, _ in TASK.differences["weights"]]
    alone = make_document({"MPO": 50.0, weights[0]: {seed: 50 - gains[seed] for seed in seeds}}, seeds)
    assert f"*lower*: {weights[0]} (-2.9 ± 0.4, 3 seeds)" in line_of(sentences.reading(alone), "Weights")
    noise = {1: 49.0, 2: 51.5, 3: 50.0}
    many = make_document({"MPO": 50.0, **dict.fromkeys(weights, noise),
                          weights[0]: {seed: 50 - gains[seed] for seed in seeds}}, seeds)  # fmt: skip
    assert f"*cannot be told*: {weights[0]} (-2.9 ± 0.4, 3 seeds)" in line_of(sentences.reading(many), "Weights")


def test_sentences_name_what_is_compared() -> None:
    better = {seed: 50 + gain for seed, gain in CLEAR.items()}
    reading = sentences.reading(make_document({
        SFT: 50.0, "MPO": better, "SFT, width 64": 50.0, "MPO, width 64": better, "BCO": 50.0, "BCO + SFT": better,
        "SFT, rate x 2": 50.0,
    }))  # fmt: skip
    assert "MPO, step by step: *higher* than SFT (+3.0 ± 0.1, 5 seeds); *not run* against DPO," in reading
    robust = line_of(reading, "Other priors")
    assert "MPO compared with SFT, step by step: *higher*: width 64 (+3.0 ± 0.1, 5 seeds); *not run*: desc" in robust
    repair = line_of(reading, "What the next-token term adds")
    assert "with the same loss alone, step by step: *higher*: BCO (+3.0 ± 0.1, 5 seeds); *not run*: DPO, IPO" in repair
    rates = line_of(reading, "Learning rate")
    assert "MPO, step by step: *higher* than SFT, rate x 2 (+3.0 ± 0.1, 5 seeds); *not run* against" in rates


def test_the_best_rates_are_those_of_seeds_with_all_rates() -> None:
    cot: dict[str, Any] = {row: {1: 50.0, 2: 50.0, 3: 50.0} for _, row in TASK.tables["rate"].rows}
    cot["SFT, rate x 4"] = {1: 52.0, 2: 53.0, 3: 51.0}
    cot["MPO, rate x 0.5"] = {1: 55.0, 2: 56.1, 3: 54.2}
    cot["MPO"] = {1: 50.0, 2: 50.0, 3: 50.0, 4: 99.0}  # a seed without the other rates
    reading = sentences.reading(make_document(cot, (1, 2, 3, 4), direct={"SFT, rate x 4": 44.0}))
    assert line_of(reading, "Best rates") == (
        "- **Best rates.** Over 3 seeds, SFT is best at x 4 (52.0 step by step, 44.0 directly); MPO is best at x 0.5 "
        "(55.1 step by step, 50.0 directly). Each at its best rate, MPO minus SFT is +3.1 ± 0.1 points: *higher*."
    )


def test_strengths_and_form() -> None:
    cot = {START: 70.0, SFT: 71.0, "MPO": 75.0, "SFT start, prior 0": 80.0, "SFT, prior 0": 80.0, "MPO, prior 0": 79.5}
    document = make_document(cot, (1, 2), direct={START: 78.0, "SFT start, prior 0": 79.0}, unparsable={SFT: 1.5})
    reading = sentences.reading(document)
    assert "prior 0: gap -1.0, gain -0.5 (2 seeds); prior 0.9: gap +8.0, gain +4.0 (2 seeds)." in reading
    assert "more than 1 % of step-by-step answers unreadable: SFT (1.5 %, 2 seeds), of 6 rows." in reading


def test_the_table_of_starts_is_sorted_by_the_gap() -> None:
    gains = {seed: 80.0 + gain for seed, gain in CLEAR.items()}
    cot = {START: 70.0, SFT: 80.0, "MPO": gains, "SFT start, prior 0": 80.0, "SFT, prior 0": {1: 80.0},
           "MPO, prior 0": {1: 79.5}}  # fmt: skip
    prior = make_document(cot, direct={START: 78.0, "SFT start, prior 0": 79.0}, hallucinated={START: 12.0})
    lines = helps.table({"study_prior": prior, "study": {"results": []}}).splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells == [
        ["prior 0.9", "+8.0", "12.0", "+3.0 ± 0.1", "higher", "+0.0", "5"],
        ["prior 0", "-1.0", "0.0", "-0.5", "one seed, no verdict", "+0.0", "1"],
    ]


@pytest.mark.parametrize(
    ("page", "block"),
    [
        ("study.md", "prior_findings"),
        ("study.md", "prior_reading"),
        ("when-mpo-helps.md", "when_mpo_helps"),
        ("when-mpo-helps.md", "when_form"),
    ],
)
def test_the_pages_have_the_blocks(page: str, block: str) -> None:
    """Checks that each page has the marker of its generated section; other tests check the section's text."""
    text = (PAGES / page).read_text(encoding="utf-8")
    assert len(re.findall(rf"^<!-- results: {block} -->$", text, re.MULTILINE)) == 1
