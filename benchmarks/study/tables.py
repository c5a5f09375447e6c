"""Declares the runs of the study and makes the tables of their results.

``ROWS`` declares the runs that ``benchmarks.study.runs`` executes, and ``TABLES`` the tables that show the runs. A
result file has ``results`` (one per seed and row) and ``starts`` (one per seed).
"""

import dataclasses
import functools
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from mpo_ext.demo.digits import FORMS
from mpo_ext.report import markdown_table

SCHEMA = 1
START = "SFT start"  # the model that every run begins from
SFT = "SFT"  # every row is compared with the start model and with this row
TEXT = "text"  # step-by-step questions that name the digits and have no image
COLUMNS = (*FORMS, TEXT)
QUANTITIES = ("accuracy", "unparsable", "tokens")
NOT_RUN = "not run"  # reason for a run that an interrupted study has not reached
STEPS_BETWEEN_SYNCS = 4  # number of times that TR-DPO syncs its reference in a run


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StudyRow:
    """Settings of a training run that begins from the start model. The defaults are the settings of the MPO run.

    Attributes:
        loss: Fields of ``LossRecipe``.
        pairs: Name of the file of pairs, one of ``PAIR_FILES``.
        rate: Factor of the learning rate.
        reward_shift: Fields of ``RewardShiftRecipe``.
        is_synced: Whether the reference is synced with the policy (TR-DPO), with a mixing weight of 0.6.
    """

    loss: Mapping[str, Any]
    pairs: str = "mixed"
    rate: float = 1.0
    reward_shift: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    is_synced: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class StudyTable:
    """Rows that are shown in one table.

    Attributes:
        title: Title of the table.
        rows: Label and name of each row. The name ``START`` stands for the start model, other names for ``ROWS``.
        paper: The paper's numbers (arXiv 2411.10442v2), by name of the row.
    """

    title: str
    rows: tuple[tuple[str, str], ...]
    paper: Mapping[str, str] = dataclasses.field(default_factory=dict)


def _weights(dpo: float, bco: float, ntp: float, **more: Any) -> dict[str, Any]:
    return {"dpo_weight": dpo, "bco_weight": bco, "ntp_weight": ntp, **more}


#: Fractions of the mixed pairs; a larger file contains the pairs of each smaller file.
SHARES = {"mixed 10%": 0.1, "mixed 40%": 0.4, "mixed 70%": 0.7}
#: Fraction of the chosen response that DropoutNTP keeps.
KEEPS = {"DropoutNTP 0.25": 0.25, "DropoutNTP 0.5": 0.5, "DropoutNTP 0.75": 0.75}
#: All files of pairs. The files from "correctness" to "DropoutNTP 0.75" have equally many step-by-step pairs.
PAIR_FILES = ("mixed", *SHARES, "correctness", "correctness and DropoutNTP", *KEEPS, TEXT)

_MPO = _weights(0.8, 0.2, 1)
_DPO = _weights(1, 0, 0)
_NTP = _weights(0, 0, 1)

#: Each preference loss alone, with weight 1; "+ SFT" adds the next-token term with weight 1.
LOSSES: dict[str, StudyRow] = {
    "DPO": StudyRow(loss=_DPO),
    "BCO": StudyRow(loss=_weights(0, 1, 0)),
    "IPO": StudyRow(loss={**_DPO, "preference": "ipo"}),
    "cDPO": StudyRow(loss={**_DPO, "label_smoothing": 0.1}),
    "robust DPO": StudyRow(loss={**_DPO, "preference": "robust", "label_smoothing": 0.1}),
    "SPPO": StudyRow(loss={**_DPO, "preference": "sppo_hard"}),
    "AOT": StudyRow(loss={**_DPO, "preference": "aot"}),
    "RSO (hinge)": StudyRow(loss={**_DPO, "preference": "hinge"}),
    "TR-DPO": StudyRow(loss=_DPO, is_synced=True),
    "ORPO": StudyRow(loss={**_DPO, "preference": "orpo"}),
    "DPO + BCO": StudyRow(loss=_weights(0.8, 0.2, 0)),
}
SHAPES = {"1:1": 0.5, "3:1": 0.75, "5:1": 5 / 6, "9:1": 0.9}  # w_p / (w_p + w_q) by the ratio w_p : w_q
NTP_WEIGHTS = (0.01, 0.5, 2.0, 5.0)
RATES = {"x 0.1": 0.1, "x 0.4": 0.4, "x 4": 4.0, "x 10": 10.0}

#: Every run of a seed by name.
ROWS: dict[str, StudyRow] = {
    "MPO": StudyRow(loss=_MPO),
    SFT: StudyRow(loss=_NTP),
    **LOSSES,
    **{f"{name} + SFT": dataclasses.replace(row, loss={**row.loss, "ntp_weight": 1}) for name, row in LOSSES.items()
       if name != "DPO + BCO"},
    **{f"MPO, {name}": StudyRow(loss=_MPO, pairs=name) for name in PAIR_FILES if name not in ("mixed", TEXT)},
    **{f"SFT, {name}": StudyRow(loss=_NTP, pairs=name) for name in ("correctness", "DropoutNTP 0.5")},
    **{f"MPO, rate {name}": StudyRow(loss=_MPO, rate=rate) for name, rate in RATES.items()},
    **{f"{SFT}, rate {name}": StudyRow(loss=_NTP, rate=RATES[name]) for name in ("x 0.4", "x 4")},
    "DPO, rate x 0.1": StudyRow(loss=_DPO, rate=RATES["x 0.1"]),
    **{f"MPO, w_p : w_q = {name}": StudyRow(loss=_weights(share, 1 - share, 1)) for name, share in SHAPES.items()},
    **{f"MPO, w_g = {weight:g}": StudyRow(loss=_weights(0.8, 0.2, weight)) for weight in NTP_WEIGHTS},
    "MPO, delta 0": StudyRow(loss=_MPO, reward_shift={"mode": "fixed"}),
    "MPO, delta ema": StudyRow(loss=_MPO, reward_shift={"mode": "ema", "update": "after", "per": "optimizer_step"}),
    "text, SFT": StudyRow(loss=_NTP, pairs=TEXT),
    "text, DPO": StudyRow(loss=_DPO, pairs=TEXT),
    "text, MPO": StudyRow(loss=_MPO, pairs=TEXT),
}  # fmt: skip

TABLES: dict[str, StudyTable] = {
    "main": StudyTable(
        "SFT against MPO",
        ((START, START), ("SFT continued", SFT), ("DPO", "DPO"), ("MPO", "MPO")),
        {START: "59.3 / 57.0", SFT: "63.9 / 67.8", "MPO": "77.2 / 79.2"},
    ),
    "losses": StudyTable(
        "Preference losses",
        ((START, START), ("SFT continued", SFT),
         *((name, name) for loss in LOSSES for name in (loss, f"{loss} + SFT") if name in ROWS),
         ("MPO = DPO + BCO + SFT", "MPO")),
        {SFT: "65.7 / 68.5", "DPO": "75.8 / 72.7", "BCO": "78.1 / 78.4", "IPO": "72.8 / 73.1", "cDPO": "76.2 / 76.8",
         "robust DPO": "75.1 / 74.2", "SPPO": "66.2 / 67.4", "AOT": "76.7 / 76.0", "RSO (hinge)": "74.2 / 74.3",
         "TR-DPO": "75.9 / 66.8", "ORPO": "66.6 / 73.9", "DPO + BCO": "77.5 / 78.5", "DPO + SFT": "76.4 / 78.9",
         "BCO + SFT": "77.4 / 78.4", "cDPO + SFT": "71.6 / 74.2", "robust DPO + SFT": "76.5 / 78.0",
         "AOT + SFT": "76.3 / 78.0", "MPO": "77.7 / 79.1"},
    ),
    "keep": StudyTable("Keep ratio of DropoutNTP", tuple((name, f"MPO, {name}") for name in KEEPS)),
    "kinds": StudyTable(
        "Correctness against DropoutNTP",
        (("SFT, correctness", "SFT, correctness"), ("SFT, DropoutNTP", "SFT, DropoutNTP 0.5"),
         ("MPO, correctness", "MPO, correctness"), ("MPO, DropoutNTP", "MPO, DropoutNTP 0.5"),
         ("MPO, half of each", "MPO, correctness and DropoutNTP")),
    ),
    "scale": StudyTable(
        "Number of pairs",
        (*((f"MPO, {share:.0%} of the pairs", f"MPO, {name}") for name, share in SHARES.items()),
         ("MPO, all pairs", "MPO")),
    ),
    "rate": StudyTable(
        "Learning rate",
        (*((f"MPO, {name}", f"MPO, rate {name}") for name in ("x 0.1", "x 0.4")), ("MPO, x 1", "MPO"),
         *((f"MPO, {name}", f"MPO, rate {name}") for name in ("x 4", "x 10")),
         ("SFT, x 0.4", f"{SFT}, rate x 0.4"), ("SFT, x 1", SFT), ("SFT, x 4", f"{SFT}, rate x 4"),
         ("DPO, x 0.1", "DPO, rate x 0.1"), ("DPO, x 1", "DPO")),
    ),
    "weights": StudyTable(
        "Weights of the terms",
        (*((f"w_p : w_q = {name}", f"MPO, w_p : w_q = {name}") for name in ("1:1", "3:1")),
         ("w_p : w_q = 4:1 (MPO)", "MPO"),
         *((f"w_p : w_q = {name}", f"MPO, w_p : w_q = {name}") for name in ("5:1", "9:1")),
         *((f"w_g = {weight:g}", f"MPO, w_g = {weight:g}") for weight in (0.01, 0.5)), ("w_g = 1 (MPO)", "MPO"),
         *((f"w_g = {weight:g}", f"MPO, w_g = {weight:g}") for weight in (2.0, 5.0))),
    ),
    "delta": StudyTable(
        "Reward shift",
        (("cumulative, as the authors (MPO)", "MPO"), ("moving average, as NeMo-RL", "MPO, delta ema"),
         ("none, as TRL since 0.29", "MPO, delta 0")),
    ),
    "text": StudyTable(
        "Text only",
        ((START, START), ("SFT on pairs with images", SFT), ("DPO on pairs with images", "DPO"),
         ("MPO on pairs with images", "MPO"), ("SFT on text-only pairs", "text, SFT"),
         ("DPO on text-only pairs", "text, DPO"), ("MPO on text-only pairs", "text, MPO")),
        {START: "62.1", SFT: "62.0", "MPO": "63.0"},
    ),
}  # fmt: skip

#: Tables whose rows run first, for all seeds.
MAIN = ("main",)


# ---------------------------------------------------------------------------------------------------------- documents


def load(path: Path) -> dict[str, Any]:
    """Returns the content of a result file. A wrong format raises ValueError, whose message names the file."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        check(document)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from None
    return document


def check(document: Mapping[str, Any]) -> None:
    """Raises ValueError if the content of a result file has a wrong format.

    The message names the place of the wrong value, the rule and the value.
    """

    def must(holds: bool, where: str, rule: str, value: object) -> None:
        if not holds:
            raise ValueError(f"{where} must be {rule}, got {value!r}")

    must(isinstance(document, Mapping), "the file", "an object", document)
    keys = {"schema", "benchmark", "quick", "environment", "settings", "seconds", "seeds", "starts", "results"}
    must(set(document) == keys, "the file", f"an object of {', '.join(sorted(keys))}", sorted(document))
    must(document["schema"] == SCHEMA, "schema", str(SCHEMA), document["schema"])
    must(document["benchmark"] == "study", "benchmark", "'study'", document["benchmark"])
    seeds = document["seeds"]
    must(bool(seeds) and len(set(seeds)) == len(seeds), "seeds", "a list of seeds, each once", seeds)
    expected = {(seed, row) for seed in seeds for row in (START, *ROWS)}
    seen: set[tuple[int, str]] = set()
    for index, result in enumerate(document["results"]):
        where = f"results[{index}]"
        key = (result.get("seed"), result.get("row"))
        must(key in expected and key not in seen, where, "of a seed and a row, once", key)
        seen.add(key)
        must(result["status"] in ("measured", "failed"), f"{where}.status", "'measured' or 'failed'", result["status"])
        if result["status"] == "failed":
            must(bool(result.get("reason")), f"{where}.reason", "given", result.get("reason"))
            continue
        for column in COLUMNS:
            for quantity in QUANTITIES:
                value = result["evaluation"][column][quantity]
                is_number = isinstance(value, Real) and not isinstance(value, bool)
                is_share = quantity != "tokens"
                fits = is_number and 0 <= value < math.inf and (value <= 1 or not is_share)
                rule = "a share" if is_share else "finite and not negative"
                must(fits, f"{where}.evaluation.{column}.{quantity}", rule, value)
    must(seen == expected, "results", "complete", sorted(map(str, expected - seen))[:3])
    must([start["seed"] for start in document["starts"]] == list(seeds), "starts", "one per seed", document["starts"])


# ------------------------------------------------------------------------------------------------------------- tables


def tables(document: Mapping[str, Any]) -> dict[str, str]:
    """Returns the Markdown text of each block of the pages, by name.

    The blocks are "study_setup", one block for each table, and "study_differences".
    """
    blocks = {"study_setup": _setup(document)}
    for name, table in TABLES.items():
        blocks[f"study_{name}"] = _table(document, table)
    return {**blocks, "study_differences": _differences(document)}


def values(document: Mapping[str, Any], row: str, column: str, quantity: str = "accuracy") -> dict[int, float]:
    """Returns a quantity of a row, by seed, for the seeds with a measured result of the row.

    ``column`` is one of ``COLUMNS``, and ``quantity`` one of ``QUANTITIES``. Fractions are returned in percent.
    """
    factor = 1 if quantity == "tokens" else 100
    return {
        result["seed"]: factor * result["evaluation"][column][quantity]
        for result in document["results"]
        if result["row"] == row and result["status"] == "measured"
    }


def differences(document: Mapping[str, Any], row: str, other: str, column: str) -> list[float]:
    """Returns accuracy(``row``) - accuracy(``other``) in percentage points, for each seed with both results."""
    ours, theirs = values(document, row, column), values(document, other, column)
    return [ours[seed] - theirs[seed] for seed in ours if seed in theirs]


def spread(numbers: Sequence[float], *, signed: bool = False) -> str:
    """Returns the text "mean ± sample standard deviation" with one decimal. A single number has no deviation."""
    if not numbers:
        return ""
    mean = f"{statistics.fmean(numbers):{'+' if signed else ''}.1f}"
    return mean if len(numbers) == 1 else f"{mean} ± {statistics.stdev(numbers):.1f}"


_HEADER = (
    "", "direct", "CoT", TEXT, "CoT - start", "CoT - SFT", "direct - SFT", "unparsable", "CoT tokens", "seeds",
)  # fmt: skip


def _table(document: Mapping[str, Any], table: StudyTable) -> str:
    rows = [_cells(document, label, row) for label, row in table.rows]
    if not table.paper:
        return markdown_table(_HEADER, rows)
    theirs = [table.paper.get(row, "") for _, row in table.rows]
    return markdown_table((*_HEADER, "paper"), [[*ours, other] for ours, other in zip(rows, theirs, strict=True)])


def _cells(document: Mapping[str, Any], label: str, row: str) -> list[str]:
    def difference(other: str, column: str) -> str:
        return "" if row == other else spread(differences(document, row, other, column), signed=True)

    def mean(column: str, quantity: str) -> str:
        numbers = values(document, row, column, quantity).values()
        return f"{statistics.fmean(numbers):.1f}" if numbers else ""

    unparsable = [mean(column, "unparsable") for column in FORMS]
    return [
        label,
        *(spread(list(values(document, row, column).values())) for column in COLUMNS),
        difference(START, "cot"),
        difference(SFT, "cot"),
        difference(SFT, "direct"),
        " / ".join(unparsable) if all(unparsable) else "",
        mean("cot", "tokens"),
        str(len(values(document, row, "cot"))),
    ]


#: Differences that the pages quote: row, row to compare with, column.
DIFFERENCES: tuple[tuple[str, str, str], ...] = (
    *((name, START, "cot") for name in LOSSES if name not in ("SPPO", "ORPO")),
    *((f"{name} + SFT" if name != "DPO + BCO" else "MPO", name, "cot") for name in LOSSES),
    ("BCO", "DPO", "cot"),
    ("TR-DPO", "DPO", "cot"),
    ("AOT", "DPO", "cot"),
    ("RSO (hinge)", "DPO", "cot"),
    *((f"MPO, {name}", "MPO", "cot") for name in SHARES),
    *((name, START, TEXT) for name in (SFT, "MPO", "DPO")),
    *((name, START, column) for name in ("text, SFT", "text, MPO", "text, DPO") for column in COLUMNS),
    ("MPO, rate x 0.1", START, "direct"),
    ("MPO, rate x 4", START, "direct"),
    *(("MPO, rate x 10", START, column) for column in COLUMNS),
    ("MPO, DropoutNTP 0.25", "MPO, DropoutNTP 0.5", "cot"),
    ("MPO, DropoutNTP 0.75", "MPO, DropoutNTP 0.5", "cot"),
    ("MPO, DropoutNTP 0.5", "MPO, correctness", "cot"),
    ("MPO, correctness and DropoutNTP", "MPO, correctness", "cot"),
    ("MPO, w_g = 2", "MPO", "cot"),
    ("MPO, w_g = 5", "MPO", "cot"),
)
_NOISE = 2.5  # a mean of three seeds differs from zero at the 5 % level if it is this many standard deviations


def _differences(document: Mapping[str, Any]) -> str:
    """Returns a table of ``DIFFERENCES``: mean, deviation, and the smallest and the largest value over the seeds."""
    rows = []
    for row, other, column in DIFFERENCES:
        numbers = differences(document, row, other, column)
        if not numbers:
            continue
        is_noise = len(numbers) < 2 or abs(statistics.fmean(numbers)) < _NOISE * statistics.stdev(numbers)
        ends = [f"{number:+.1f}" for number in (min(numbers), max(numbers))]
        name = {"cot": "CoT"}.get(column, column)
        rows.append([row, other, name, spread(numbers, signed=True), *ends, "no" if is_noise else "yes"])
    header = ["row", "compared with", "column", "difference", "smallest", "largest", "beyond noise"]
    return markdown_table(header, rows)


def _block(name: str, documents: Mapping[str, Mapping[str, Any]]) -> str:
    return tables(documents["study"])[name]


#: Functions that return the text of a block, by name of the block.
BLOCKS: dict[str, Callable[[Mapping[str, Mapping[str, Any]]], str]] = {
    name: functools.partial(_block, name)
    for name in ("study_setup", "study_differences", *(f"study_{name}" for name in TABLES))
}


def _setup(document: Mapping[str, Any]) -> str:
    """Returns a text with settings and machine of the study, the number of pairs by seed, and the failed runs."""
    environment, settings = document["environment"], document["settings"]
    count = settings["evaluation_tasks"]
    runs = sum(result["row"] != START and result["status"] == "measured" for result in document["results"])
    seeds = len(document["seeds"])
    lines = [
        f"{seeds} seed{'s' * (seeds > 1)}, {runs} runs of {settings['branch_steps']} steps of "
        f"{settings['branch_batch']} pairs; {count:,} held-out questions per column, one standard error of a single "
        f"number is at most {50 / math.sqrt(count):.1f} points; {document['seconds'] / 60:.0f} minutes of one core "
        f"({environment['cores']} x {environment['cpu']}), torch {environment['versions']['torch']}, "
        f"commit {environment['commit']}{' with changes' if environment['modified'] else ''}, "
        f"{environment['started'][:10]}, `{environment['command']}`.",
        "",
    ]
    rows = []
    for start in document["starts"]:
        pairs = start.get("pairs", {})
        rows.append([str(start["seed"]), *(str(pairs.get(name, "")) for name in PAIR_FILES)])
    lines.append(markdown_table(["pairs, seed", *PAIR_FILES], rows))
    failed = [
        f"{result['row']} (seed {result['seed']}: {_plain(result['reason'])})"
        for result in document["results"]
        if result["status"] == "failed" and result["reason"] != NOT_RUN
    ]
    lines.append(f"Failed: {'; '.join(failed)}." if failed else "No run failed.")
    not_run = sum(result.get("reason") == NOT_RUN for result in document["results"])
    if not_run:
        lines.append(f'Runs left out: {not_run}; the column "seeds" says how many a row has.')
    return "\n".join(lines) + "\n"


def _plain(text: str) -> str:
    return text.replace("|", "/").replace("<", "").replace(">", "").replace("\n", " ").rstrip(".")


def markdown(document: Mapping[str, Any]) -> str:
    """Returns all tables as Markdown sections."""
    titles = {"study_setup": "The study", **{f"study_{name}": table.title for name, table in TABLES.items()}}
    titles["study_differences"] = "Differences"
    return "\n".join(f"## {titles[name]}\n\n{block}" for name, block in tables(document).items())
