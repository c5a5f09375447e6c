"""Tests the generated summaries of the study's results, such as the comparison of verdicts with the paper."""

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
    """Returns the contents of a study result file. Only the runs in ``cot`` were measured.

    ``cot`` maps the name of a run to its accuracy in percent. An accuracy is a number for all seeds, or a dict from
    seed to number. ``more`` has "direct", "hallucinated" and "unparsable" percentages in the same form as ``cot``.
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


def cells_of(table: str) -> list[list[str]]:
    """Returns a list of cells for each line of the Markdown tables in a text."""
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize(
    ("verdict", "paper", "word"),
    [
        ("higher", "higher", "same"),
        ("lower", "lower", "same"),
        ("lower", "higher", "opposite"),
        ("higher", "lower", "opposite"),
        ("not significant", "higher", "not significant"),
    ],
)
def test_a_direction_of_the_paper_has_its_word(verdict: str, paper: str, word: str) -> None:
    assert sentences.finding(verdict, paper) == word


CLEAR = {1: 3.0, 2: 3.2, 3: 2.9, 4: 3.1, 5: 3.0}
NOISY = {1: 3.0, 2: -9.0, 3: 8.0, 4: -2.0, 5: 4.0}


@pytest.mark.parametrize(
    ("gains", "word", "shown"),
    [
        (CLEAR, "same", "+3.0 ± 0.1"),
        ({seed: -gain for seed, gain in CLEAR.items()}, "opposite", "-3.0 ± 0.1"),
    ],
)
def test_a_significant_direction_of_the_paper_is_shown(gains: dict[int, float], word: str, shown: str) -> None:
    document = make_document({SFT: 50.0, "MPO": {seed: 50 + gain for seed, gain in gains.items()}})
    (row,) = [cells for cells in cells_of(sentences.findings(document)) if cells[:2] == ["MPO", SFT]]
    assert row[2:4] == ["CoT", "higher"]
    assert row[5:] == [word, shown, "5"]


@pytest.mark.parametrize(
    ("gains", "group"),
    [
        (NOISY, "not significant"),
        ({1: 3.0, 2: 3.2}, "not significant"),  # p is 0.02, and two differences are tested
        ({1: 3.0}, "one seed, no verdict"),
    ],
)
def test_other_directions_of_the_paper_are_counted(gains: dict[int, float], group: str) -> None:
    document = make_document({START: 40.0, SFT: 50.0, "MPO": {seed: 50 + gain for seed, gain in gains.items()}})
    cells = cells_of(sentences.findings(document))
    assert not [row for row in cells if row[:3] == ["MPO", SFT, "CoT"]]
    assert [row for row in cells if row[0] == group]


def test_a_direction_that_is_lower_in_the_paper_is_the_same_if_it_is_lower() -> None:
    worse = {seed: 50 - gain for seed, gain in CLEAR.items()}
    cells = cells_of(sentences.findings(make_document({SFT: 50.0, "SPPO": worse, "IPO": worse})))
    assert [[row[0], row[5]] for row in cells if row[1] == SFT] == [["SPPO", "same"], ["IPO", "opposite"]]


def test_the_correction_counts_the_rows_of_the_table() -> None:
    seeds = (1, 2, 3)
    gains = {1: 3.0, 2: 3.6, 3: 2.2}  # p is 0.02
    weights = [row for row, _, _ in TASK.differences["weights"]]
    alone = make_document({"MPO": 50.0, weights[0]: {seed: 50 - gains[seed] for seed in seeds}}, seeds)
    assert [row[0] for row in cells_of(sentences.findings(alone)) if row[1] == "MPO"] == [weights[0]]
    noise = {1: 49.0, 2: 51.5, 3: 50.0}
    many = make_document({"MPO": 50.0, **dict.fromkeys(weights, noise),
                          weights[0]: {seed: 50 - gains[seed] for seed in seeds}}, seeds)  # fmt: skip
    assert ["not significant", "5"] in cells_of(sentences.findings(many))


def test_the_best_rates_are_those_of_seeds_with_all_rates() -> None:
    cot: dict[str, Any] = {row: {1: 50.0, 2: 50.0, 3: 50.0} for _, row in TASK.tables["rate"].rows}
    cot["SFT, rate x 4"] = {1: 52.0, 2: 53.0, 3: 51.0}
    cot["MPO, rate x 0.5"] = {1: 55.0, 2: 56.1, 3: 54.2}
    cot["MPO"] = {1: 50.0, 2: 50.0, 3: 50.0, 4: 99.0}  # a seed without the other rates
    text = sentences.best_rates(make_document(cot, (1, 2, 3, 4), direct={"SFT, rate x 4": 44.0}))
    assert cells_of(text)[2:] == [["SFT", "x 4", "52.0", "44.0"], ["MPO", "x 0.5", "55.1", "50.0"]]
    assert "minus the CoT accuracy of SFT is +3.1 ± 0.1 points (3 seeds). The verdict is *higher*." in text


def test_rows_with_unparsable_answers_are_listed() -> None:
    cot = {START: 70.0, SFT: 71.0, "MPO": 75.0, "SFT start, prior 0": 80.0, "SFT, prior 0": 80.0, "MPO, prior 0": 79.5}
    text = sentences.unparsable(make_document(cot, (1, 2), unparsable={SFT: 1.5}))
    assert text.startswith("1 of 6 rows have more than 1 % unparsable step-by-step answers:")
    assert cells_of(text)[2:] == [["SFT", "1.5", "2"]]


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
        ("study.md", "prior_best_rates"),
        ("when-mpo-helps.md", "when_mpo_helps"),
        ("when-mpo-helps.md", "when_form"),
    ],
)
def test_the_pages_have_the_blocks(page: str, block: str) -> None:
    """Checks that the page has the HTML comment that marks a generated section, exactly once."""
    text = (PAGES / page).read_text(encoding="utf-8")
    assert len(re.findall(rf"^<!-- results: {block} -->$", text, re.MULTILINE)) == 1
