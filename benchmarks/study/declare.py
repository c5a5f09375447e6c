"""Types that declare the study's training runs and tables, and the preference losses that the study compares."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mpo_ext.demo.digits import FORMS

START = "SFT start"  # the model that most runs begin from
SFT = "SFT"  # every row is compared with its starting model and with this row
TEXT = "text"  # step-by-step questions that name the digits and have no image
COLUMNS = (*FORMS, TEXT)
EMA_SHIFT = {"mode": "ema", "update": "after", "per": "optimizer_step"}  # as in NeMo-RL


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StudyRow:
    """Settings of a training run of the study. Its results are a row of a table.

    The defaults are the settings of the MPO run.

    Attributes:
        loss: Fields of ``LossRecipe``.
        pairs: Name of the pair file, one of ``StudyTask.pair_files``.
        rate: Factor by which the learning rate is multiplied.
        reward_shift: Fields of ``RewardShiftRecipe``.
        is_synced: Whether the reference is updated at intervals during training (TR-DPO). Each update moves it 0.6 of
            the way to the policy.
        start: Name of the model that the run begins from, a key of ``StudyTask.starts``.
    """

    loss: Mapping[str, Any]
    pairs: str = "mixed"
    rate: float = 1.0
    reward_shift: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    is_synced: bool = False
    start: str = START


@dataclasses.dataclass(frozen=True, slots=True)
class StudyTable:
    """A table of the study. Each row shows a training run or a starting model.

    Attributes:
        title: Title of the table.
        rows: (label, name) of each row. A name is a key of ``StudyTask.starts`` or of ``StudyTask.rows``.
        paper: Dict from the name of a row to its numbers in the paper (arXiv 2411.10442v2), such as "77.2 / 79.2".
        is_on_page: Whether docs/ shows the table. False if another table has the same rows.
    """

    title: str
    rows: tuple[tuple[str, str], ...]
    paper: Mapping[str, str] = dataclasses.field(default_factory=dict)
    is_on_page: bool = True


def weights(dpo: float, bco: float, ntp: float, **more: Any) -> dict[str, Any]:
    return {"dpo_weight": dpo, "bco_weight": bco, "ntp_weight": ntp, **more}


MPO_LOSS = weights(0.8, 0.2, 1)
DPO_LOSS = weights(1, 0, 0)
NTP_LOSS = weights(0, 0, 1)

#: Each preference loss alone, with weight 1; "+ SFT" adds the next-token term with weight 1.
LOSSES: dict[str, StudyRow] = {
    "DPO": StudyRow(loss=DPO_LOSS),
    "BCO": StudyRow(loss=weights(0, 1, 0)),
    "IPO": StudyRow(loss={**DPO_LOSS, "preference": "ipo"}),
    "cDPO": StudyRow(loss={**DPO_LOSS, "label_smoothing": 0.1}),
    "robust DPO": StudyRow(loss={**DPO_LOSS, "preference": "robust", "label_smoothing": 0.1}),
    "SPPO": StudyRow(loss={**DPO_LOSS, "preference": "sppo_hard"}),
    "AOT": StudyRow(loss={**DPO_LOSS, "preference": "aot"}),
    "RSO (hinge)": StudyRow(loss={**DPO_LOSS, "preference": "hinge"}),
    "TR-DPO": StudyRow(loss=DPO_LOSS, is_synced=True),
    "ORPO": StudyRow(loss={**DPO_LOSS, "preference": "orpo"}),
    "DPO + BCO": StudyRow(loss=weights(0.8, 0.2, 0)),
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StudyTask:
    """A task of the study: its starting models, its training runs, and its tables.

    Attributes:
        starts: Dict from the name of a starting model to its settings. The default starting model has the name
            ``START``. For the other models, only the settings that differ from the default are given.
        rows: Settings of each training run by name. All runs are repeated for each seed.
        tables: Tables by name.
        differences: Dict from the name of a table to its accuracy differences. A difference is (row, row to compare
            with, column). The significance tests of a table are corrected for the number of its differences. The task
            "perception" has the single key "all" instead of table names.
        pair_files: Names of the pair files that are made for the default starting model. For other starting models,
            only "mixed" is made.
        main: Names of the tables whose runs are executed first.
        columns: Additional columns of the tables: (header, kind of questions, quantity in percent).
        paper: Dict from a difference in the paper to its direction: "higher" or "lower".
    """

    starts: Mapping[str, Mapping[str, Any]]
    rows: Mapping[str, StudyRow]
    tables: Mapping[str, StudyTable]
    differences: Mapping[str, tuple[tuple[str, str, str], ...]]
    pair_files: tuple[str, ...]
    main: tuple[str, ...] = ("main",)
    columns: tuple[tuple[str, str, str], ...] = ()
    paper: Mapping[tuple[str, str, str], str] = dataclasses.field(default_factory=dict)

    def choose(self, names: tuple[str, ...]) -> dict[str, StudyRow]:
        """Returns the training runs with these names. The name of a table stands for all runs in the table.

        Without names, returns the runs in all tables.
        """
        shown = {name for name in names if name not in self.tables}
        shown |= {row for name in names or self.tables if name in self.tables for _, row in self.tables[name].rows}
        return {name: row for name, row in self.rows.items() if name in shown}


def with_sft(losses: Mapping[str, StudyRow]) -> dict[str, StudyRow]:
    """Returns copies of the runs with a next-token loss of weight 1 added. The copy of "DPO" is named "DPO + SFT".

    "DPO + BCO" is left out, because its copy would be the MPO run.
    """
    return {
        f"{name} + SFT": dataclasses.replace(row, loss={**row.loss, "ntp_weight": 1})
        for name, row in losses.items()
        if name != "DPO + BCO"
    }
