"""Writes plots and self-contained HTML pages, and formats tables in Markdown and plain text."""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mpo_ext.files import atomic_path, atomic_write

_COLUMNS = 3
_GENERATOR, _HEAD_BYTES = b'<meta name="generator" content="mpo_ext">', 1000  # a mark near the beginning of each page
_PANEL_INCHES = (4.6, 3.4)
_BAR_INCHES = 0.35


@dataclasses.dataclass(frozen=True, slots=True)
class Line:
    """A line in a panel.

    Attributes:
        label: Text in the legend.
        x: Positions on the x axis.
        y: Values, one per position.
        color: Any matplotlib colour.
        style: A matplotlib line style, such as "-" or "--".
        smooth: Window length of a running mean, which is drawn over the raw values; 1 draws only the raw values.
        errors: Lengths of the error bars to either side, one per position; None: no error bars.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    color: str = "C0"
    style: str = "-"
    smooth: int = 1
    errors: Sequence[float] | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Bars:
    """Bars of one colour in a panel.

    Attributes:
        label: Text in the legend.
        names: Labels of the bars on the axis.
        values: Lengths of the bars.
        errors: Lengths of the error bars to either side; None: no error bars.
        color: Any matplotlib colour.
    """

    label: str
    names: Sequence[str]
    values: Sequence[float]
    errors: Sequence[float] | None = None
    color: str = "C0"


@dataclasses.dataclass(frozen=True, slots=True)
class Panel:
    """A plot of lines or of bars.

    Attributes:
        title: Title of the plot.
        x_label: Label of the x axis.
        y_label: Label of the y axis.
        content: The lines, or the groups of bars.
        is_horizontal: Whether bars are horizontal, with their names on the y axis from top to bottom.
    """

    title: str
    x_label: str
    y_label: str
    content: Sequence[Line] | Sequence[Bars]
    is_horizontal: bool = False


def save_panels(path: str | os.PathLike[str], title: str, panels: Sequence[Panel]) -> None:
    """Writes a figure of the panels with matplotlib, three panels per row. The path's suffix selects the format."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    columns = min(_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    heights = [max(map(_height, panels[row * columns : (row + 1) * columns])) for row in range(rows)]
    size = (_PANEL_INCHES[0] * columns, sum(heights) + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    grid = figure.add_gridspec(rows, columns, height_ratios=heights)
    for index, panel in enumerate(panels):
        axes = figure.add_subplot(grid[divmod(index, columns)])
        axes.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
        axes.grid(alpha=0.3)
        bars = [content for content in panel.content if isinstance(content, Bars)]
        for position, group in enumerate(bars):
            width = 0.8 / len(bars)
            ticks = np.arange(len(group.names))
            places = ticks + (position - (len(bars) - 1) / 2) * width
            style: dict[str, Any] = {"label": group.label, "color": group.color}
            if panel.is_horizontal:
                drawn = axes.barh(places, group.values, width, xerr=group.errors, **style)
                axes.set_yticks(ticks, group.names, fontsize=8)
            else:
                drawn = axes.bar(places, group.values, width, yerr=group.errors, **style)
                axes.set_xticks(ticks, group.names)
            axes.bar_label(drawn, fmt="%.1f", fontsize=5 if panel.is_horizontal else 8)
        if panel.is_horizontal:
            axes.invert_yaxis()
        lines = [line for line in panel.content if isinstance(line, Line)]
        for line in lines:
            _draw_line(axes, line)
        for axis, values in ((axes.xaxis, [line.x for line in lines]), (axes.yaxis, [line.y for line in lines])):
            if lines and all(isinstance(value, int) for part in values for value in part):
                axis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
        if len(panel.content) > 1:
            axes.legend(fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)


def _height(panel: Panel) -> float:
    """Returns the height of a panel in inches. It grows with the number of horizontal bars."""
    names = [name for content in panel.content if isinstance(content, Bars) for name in content.names]
    return max(_PANEL_INCHES[1], 0.8 + _BAR_INCHES * len(set(names)) * panel.is_horizontal)


def _draw_line(axes: Any, line: Line) -> None:
    if line.smooth > 1 and len(line.y) >= line.smooth:
        axes.plot(line.x, line.y, color=line.color, linewidth=0.6, alpha=0.25)
        mean = np.convolve(line.y, np.full(line.smooth, 1 / line.smooth), mode="valid")
        start = line.smooth // 2
        axes.plot(line.x[start : start + len(mean)], mean, line.style, color=line.color, label=line.label)
    elif line.errors is None:
        axes.plot(line.x, line.y, line.style, color=line.color, label=line.label, marker=".")
    else:
        style = {"color": line.color, "label": line.label, "marker": ".", "capsize": 3}
        axes.errorbar(line.x, line.y, line.errors, linestyle=line.style, **style)


def save_page(path: str | os.PathLike[str], template: str, values: Mapping[str, Any]) -> None:
    """Renders a page with ``render_page``, and writes it to ``path``."""
    page = render_page(template, values)
    with atomic_write(path) as file:
        file.write(page.encode(errors="replace"))  # a lone surrogate cannot be encoded


def render_page(template: str, values: Mapping[str, Any]) -> str:
    """Returns a page from a template in ``mpo_ext/templates``, with jinja2.

    Args:
        template: File name of the template.
        values: Variables of the template; all values except Markup are escaped.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mpo_ext", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)


def is_page(path: str | os.PathLike[str]) -> bool:
    """Returns whether a file is a page that ``save_page`` wrote; False if the file cannot be read."""
    try:
        with open(path, "rb") as file:
            return _GENERATOR in file.read(_HEAD_BYTES)
    except OSError:
        return False


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table. The first column is left-aligned, and all others are right-aligned."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    widths = [max(width, 1 if column == 0 else 2) for column, width in enumerate(widths)]  # room for "-" and "-:"
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [_cells(row, widths, [False, *[True] * (len(widths) - 1)]) for row in (header, rule, *rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table for a terminal, indented by two spaces. A header whose cells are all empty is not shown."""
    lines = [header, *rows] if any(header) else rows
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    is_right = [is_numeric_column(rows, column) for column in range(len(header))]
    return "\n".join(f"  {'  '.join(_cells(line, widths, is_right))}".rstrip() for line in lines)


def is_numeric_column(rows: Sequence[Sequence[str]], column: int) -> bool:
    """Returns whether a terminal table right-aligns a column.

    In a table with at least three columns, a column is right-aligned if each cell is empty or begins with a digit. The
    first column is never right-aligned.
    """
    if column == 0 or not rows or len(rows[0]) <= 2:
        return False
    return all(not row[column] or row[column][0].isdigit() for row in rows)


def _cells(row: Sequence[str], widths: Sequence[int], is_right: Sequence[bool]) -> list[str]:
    return [
        cell.rjust(width) if right else cell.ljust(width)
        for cell, width, right in zip(row, widths, is_right, strict=True)
    ]
