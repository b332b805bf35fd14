"""The tables of evidence as a picture: a dot for each run, with matplotlib (extra "reproduce")."""

from collections.abc import Sequence
from statistics import mean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .evidence import Plan, Results, Row, Table

INK, MUTED, GRID, DOT, MEAN = "#343a40", "#868e96", "#e9ecef", "#1c7ed6", "#e8590c"
COLUMNS = 2
ROW, TITLE = 0.24, 0.75  # inches

Drawn = tuple[Table, list[tuple[Row, list[float]]]]  # its rows that were run, each with the accuracy of each run


def evidence_figure(plan: Plan, results: Results) -> Figure:
    """Draw every table, but of tuning, of which there are two rows or more: accuracy from left to right."""
    columns: list[list[Drawn]] = [[] for _ in range(COLUMNS)]
    for table in (table for table in plan.tables.values() if not table.tuning):
        taken = table.take(results)
        rows = [(row, [run.top1 for run in taken[row.contender]]) for row in table.rows if row.contender in taken]
        if len(rows) > 1:
            min(columns, key=_height).append((table, rows))
    heights = [_height(column) for column in columns]
    figure = Figure(figsize=(6.2 * COLUMNS, max(heights) + 0.3), layout="constrained")
    for part, column in zip(figure.subfigures(1, COLUMNS, squeeze=False)[0], columns):
        if not column:
            continue
        ratios = [_height([drawn]) for drawn in column]
        grid = part.subplots(len(column), 1, squeeze=False, gridspec_kw=dict(height_ratios=ratios))
        for axes, (table, rows) in zip(grid[:, 0], column):
            _draw(axes, table, rows)
    return figure


def _height(column: Sequence[Drawn]) -> float:
    return sum(TITLE + ROW * len(rows) for _, rows in column)


def _draw(axes: Axes, table: Table, rows: Sequence[tuple[Row, list[float]]]) -> None:
    for height, (_, accuracies) in enumerate(rows):
        axes.plot(accuracies, [height] * len(accuracies), "o", color=DOT, alpha=0.6, markersize=5, zorder=2)
        axes.plot([mean(accuracies)] * 2, [height - 0.32, height + 0.32], color=MEAN, linewidth=2, zorder=3)
    axes.set_yticks(range(len(rows)), [row.row for row, _ in rows], fontsize=8, color=INK, parse_math=False)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_title(table.title, fontsize=9, color=INK, loc="left", parse_math=False)
    axes.set_xlabel("test top-1, %", fontsize=7, color=MUTED)
    axes.tick_params(axis="x", labelsize=7, colors=MUTED)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=GRID, zorder=1)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
