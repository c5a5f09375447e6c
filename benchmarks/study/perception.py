"""Declares the task "perception" of the study: adding digits. The model misreads digits and adds wrongly."""

from benchmarks.study.declare import (
    COLUMNS,
    DPO_LOSS,
    EMA_SHIFT,
    LOSSES,
    MPO_LOSS,
    NTP_LOSS,
    SFT,
    START,
    TEXT,
    StudyRow,
    StudyTable,
    StudyTask,
    weights,
    with_sft,
)

#: Fractions of the mixed pairs; a larger file contains the pairs of each smaller file.
SHARES = {"mixed 10%": 0.1, "mixed 40%": 0.4, "mixed 70%": 0.7}
#: Fraction of the chosen response that DropoutNTP keeps.
KEEPS = {"DropoutNTP 0.25": 0.25, "DropoutNTP 0.5": 0.5, "DropoutNTP 0.75": 0.75}
#: All files of pairs. The files from "correctness" to "DropoutNTP 0.75" have equally many step-by-step pairs.
PAIR_FILES = ("mixed", *SHARES, "correctness", "correctness and DropoutNTP", *KEEPS, TEXT)

SHAPES = {"1:1": 0.5, "3:1": 0.75, "5:1": 5 / 6, "9:1": 0.9}  # w_p / (w_p + w_q) by the ratio w_p : w_q
NTP_WEIGHTS = (0.01, 0.5, 2.0, 5.0)
RATES = {"x 0.1": 0.1, "x 0.4": 0.4, "x 4": 4.0, "x 10": 10.0}

#: Every run of a seed by name.
ROWS: dict[str, StudyRow] = {
    "MPO": StudyRow(loss=MPO_LOSS),
    SFT: StudyRow(loss=NTP_LOSS),
    **LOSSES,
    **with_sft(LOSSES),
    **{f"MPO, {name}": StudyRow(loss=MPO_LOSS, pairs=name) for name in PAIR_FILES if name not in ("mixed", TEXT)},
    **{f"SFT, {name}": StudyRow(loss=NTP_LOSS, pairs=name) for name in ("correctness", "DropoutNTP 0.5")},
    **{f"MPO, rate {name}": StudyRow(loss=MPO_LOSS, rate=rate) for name, rate in RATES.items()},
    **{f"{SFT}, rate {name}": StudyRow(loss=NTP_LOSS, rate=RATES[name]) for name in ("x 0.4", "x 4")},
    "DPO, rate x 0.1": StudyRow(loss=DPO_LOSS, rate=RATES["x 0.1"]),
    **{f"MPO, w_p : w_q = {name}": StudyRow(loss=weights(share, 1 - share, 1)) for name, share in SHAPES.items()},
    **{f"MPO, w_g = {weight:g}": StudyRow(loss=weights(0.8, 0.2, weight)) for weight in NTP_WEIGHTS},
    "MPO, delta 0": StudyRow(loss=MPO_LOSS, reward_shift={"mode": "fixed"}),
    "MPO, delta ema": StudyRow(loss=MPO_LOSS, reward_shift=EMA_SHIFT),
    "text, SFT": StudyRow(loss=NTP_LOSS, pairs=TEXT),
    "text, DPO": StudyRow(loss=DPO_LOSS, pairs=TEXT),
    "text, MPO": StudyRow(loss=MPO_LOSS, pairs=TEXT),
}  # fmt: skip

TABLES: dict[str, StudyTable] = {
    "main": StudyTable(
        "SFT, DPO and MPO",
        ((START, START), (SFT, SFT), ("DPO", "DPO"), ("MPO", "MPO")),
        {START: "59.3 / 57.0", SFT: "63.9 / 67.8", "MPO": "77.2 / 79.2"},
    ),
    "losses": StudyTable(
        "Preference losses",
        ((START, START), (SFT, SFT),
         *((name, name) for loss in LOSSES for name in (loss, f"{loss} + SFT") if name in ROWS),
         ("MPO = DPO + BCO + SFT", "MPO")),
        {SFT: "65.7 / 68.5", "DPO": "75.8 / 72.7", "BCO": "78.1 / 78.4", "IPO": "72.8 / 73.1", "cDPO": "76.2 / 76.8",
         "robust DPO": "75.1 / 74.2", "SPPO": "66.2 / 67.4", "AOT": "76.7 / 76.0", "RSO (hinge)": "74.2 / 74.3",
         "TR-DPO": "75.9 / 66.8", "ORPO": "66.6 / 73.9", "DPO + BCO": "77.5 / 78.5", "DPO + SFT": "76.4 / 78.9",
         "BCO + SFT": "77.4 / 78.4", "cDPO + SFT": "71.6 / 74.2", "robust DPO + SFT": "76.5 / 78.0",
         "AOT + SFT": "76.3 / 78.0", "MPO": "77.7 / 79.1"},
    ),
    "keep": StudyTable("Kept fraction in DropoutNTP pairs", tuple((name, f"MPO, {name}") for name in KEEPS)),
    "kinds": StudyTable(
        "Correctness pairs and DropoutNTP pairs",
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
        "Text-only pairs",
        ((START, START), ("SFT on pairs with images", SFT), ("DPO on pairs with images", "DPO"),
         ("MPO on pairs with images", "MPO"), ("SFT on text-only pairs", "text, SFT"),
         ("DPO on text-only pairs", "text, DPO"), ("MPO on text-only pairs", "text, MPO")),
        {START: "62.1", SFT: "62.0", "MPO": "63.0"},
    ),
}  # fmt: skip

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

TASK = StudyTask(starts={START: {}}, rows=ROWS, tables=TABLES, differences={"all": DIFFERENCES}, pair_files=PAIR_FILES)
