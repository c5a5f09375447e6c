"""Tables of the demo: measures by method, and paired differences of the methods."""

import statistics
from collections.abc import Callable, Sequence

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from mpo_ext import report
from mpo_ext.demo.digits import FORMS
from mpo_ext.demo.measures import paired_difference, standard_error
from mpo_ext.demo.results import DemoResult

START = "start"
LABELS = {START: "SFT start", "SFT": "SFT continued", "DPO": "DPO only", "MPO": "MPO"}
FORM_NAMES = {"direct": "direct", "cot": "step by step"}
#: Differences in the table: method, method to compare with.
DIFFERENCES = (("MPO", "SFT"), ("MPO", "DPO"), ("MPO", START), ("SFT", START))
_COLUMNS = (
        ("direct", "direct", "accuracy"), ("direct, unparsable", "direct", "unparsable"),
    ("step by step", "cot", "accuracy"), ("step by step, unparsable", "cot", "unparsable"),
    ("made up", "cot", "hallucinated"), ("follow the prior", "cot", "follow_prior"),
    ("digits right", "cot", "digits_right"),
)  # fmt: skip
_CAPTION = (
    "Percent. Made up (hallucinated): step-by-step responses that misread a digit as the digit before + {step}, as "
    "the training texts do. Follow the prior: all digits that are the digit before + {step}; chance is 10."
)


def measures_table(results: Sequence[DemoResult]) -> tuple[list[str], list[list[str]]]:
    """Returns the header and the rows of a table of measures in percent, with a row for each method.

    With several seeds, a cell has the mean and the standard deviation.
    """
    rows = []
    for method, label in LABELS.items():
        columns = ([100 * each.accuracy[method][form][key] for each in results] for _, form, key in _COLUMNS)
        rows.append([label, *(_mean(values) for values in columns)])
    return ["method", *(name for name, _, _ in _COLUMNS)], rows


def differences_table(results: Sequence[DemoResult]) -> tuple[list[str], list[list[str]]]:
    """Returns the header and the rows of a table of accuracy differences between two methods.

    With one seed, a cell has the difference in percentage points and its paired standard error, such as "+3.1 ± 0.9".
    (Both methods answered the same questions.) With several seeds, a cell has the mean and the standard deviation over
    the seeds.
    """
    rows = []
    for method, other in DIFFERENCES:
        cells = [f"{LABELS[method]} - {LABELS[other]}"]
        for form in FORMS:
            pairs = [paired_difference(each.accuracy[method][form], each.accuracy[other][form]) for each in results]
            if len(pairs) == 1:
                cells.append(f"{pairs[0][0]:+.1f} ± {pairs[0][1]:.1f}")
            else:
                cells.append(_mean([difference for difference, _ in pairs], signed=True))
        rows.append(cells)
    return ["difference", *FORM_NAMES.values()], rows


def _mean(values: Sequence[float], *, signed: bool = False) -> str:
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{'+' if signed else ''}.1f}{spread}"


def markdown(results: Sequence[DemoResult]) -> str:
    """Returns the tables of measures and differences as Markdown.

    With several seeds, the first tables have means over the seeds. The tables of each seed follow.
    """
    text = _section(results)
    if len(results) > 1:
        for each in results:
            text += f"\nSeed {each.settings.seed}:\n\n{_section([each])}"
    return text


def _section(results: Sequence[DemoResult]) -> str:
    first, second = report.markdown_table(*measures_table(results)), report.markdown_table(*differences_table(results))
    return f"{first}\n{_measures_note(results)}\n\n{second}\n{_differences_note(results)}\n"


def _measures_note(results: Sequence[DemoResult]) -> str:
    settings, accuracy = results[0].settings, results[0].accuracy
    counts = f"{settings.direct_evaluation_tasks} direct and {settings.evaluation_tasks} step-by-step questions"
    errors = {form: max(standard_error(**accuracy[method][form]) for method in LABELS) for form in FORMS}
    note = f"{_CAPTION.format(step=settings.prior_step)} {counts} about held-out digits; one standard error of an "
    note += f"accuracy is at most {errors['direct']:.1f} and {errors['cot']:.1f}."
    return note + (f" Mean ± standard deviation over {len(results)} seeds." if len(results) > 1 else "")


def _differences_note(results: Sequence[DemoResult]) -> str:
    if len(results) > 1:
        return f"Points on the same questions, mean ± standard deviation over {len(results)} seeds."
    return "Points on the same questions, ± the paired standard error over the questions of this one run."


def print_tables(console: Console, results: Sequence[DemoResult]) -> None:
    """Prints a table of measures, a table of differences, and the time of each stage for the first seed."""

    def show(title: str, make: Callable[[Sequence[DemoResult]], tuple[list[str], list[list[str]]]], note: str) -> None:
        header, rows = make(results)
        shown = Table(title=title, caption=note, box=SIMPLE, padding=0, pad_edge=False, collapse_padding=True)
        for index, name in enumerate(header):
            shown.add_column(name, justify="right" if index else "left", overflow="fold")
        for row in rows:
            shown.add_row(*row)
        console.print(shown)

    show("Held-out grids", measures_table, _measures_note(results))
    show("Differences", differences_table, _differences_note(results))
    stages = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in results[0].seconds.items())
    console.print(f"Stages: {stages}", markup=False, highlight=False)
