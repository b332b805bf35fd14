"""The curves of a training, from the metrics.jsonl of its folder, with matplotlib (extra "plot")."""

import math
from collections.abc import Callable, Iterable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .errors import UserError
from .figures import INK, MUTED, PART_COLOURS, label_axes

Line = dict[str, Any]  # of metrics.jsonl
COLUMNS = 3


def curves_figure(lines: list[Line], title: str) -> Figure:
    """Draw loss, accuracy, learning rate, gradient and what the sampler does over the optimizer's steps.

    Each part of the loss is a thin line of what was logged within epochs, with a dot for each epoch's mean. Values that
    were not finite are gaps. What a run does not have, as the zoom of a plain model, is left out.

    Args:
        lines: From `finished_run.read_metrics`.
        title: Of the figure.

    Raises:
        UserError: Nothing is in it yet.
    """
    if not any("train" in line for line in lines):
        raise UserError(f"run {title!r} has no line of training yet: wait for the first epoch.")
    drawn = [(name, draw) for name, (has, draw) in _PANELS.items() if any(has(line) for line in lines)]
    columns = min(COLUMNS, len(drawn))
    rows = math.ceil(len(drawn) / columns)
    figure = Figure(figsize=(4 * columns, 2.8 * rows + 0.3), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True).flatten()
    for axes, (name, draw) in zip(grid, drawn):
        axes.set_title(name, fontsize=10, color=INK)
        draw(axes, lines)
    for axes in grid[len(drawn) :]:
        axes.remove()
    figure.suptitle(title, fontsize=11, color=INK, parse_math=False)  # may have a $
    return figure


def _draw_losses(axes: Axes, lines: list[Line]) -> None:
    names = dict.fromkeys(name for line in lines for name in line.get("train", ()) if name != "grad_norm")
    for name, colour in zip(names, (INK, *PART_COLOURS)):
        within, ends = _within(lines), _epochs(lines)
        axes.plot(*_points(within or ends, "train", name), color=colour, linewidth=1.8 if name == "loss" else 0.9)
        axes.plot(*_points(ends, "train", name), "o", color=colour, markersize=3, label=name.replace("_", " "))
    _finish(axes, "cross-entropy in nats")
    axes.set_ylim(bottom=0)


def _draw_accuracy(axes: Axes, lines: list[Line]) -> None:
    for name, colour in (("top1", PART_COLOURS[3]), ("top5", PART_COLOURS[2])):
        validated = [line for line in lines if name in (line.get("validation") or ())]
        if validated:
            label = f"validation top-{name[-1]}"
            axes.plot(*_points(validated, "validation", name), "o-", color=colour, markersize=3, label=label)
        tested = [line for line in lines if name in line.get("test", ())]
        if tested:
            value = tested[-1]["test"][name]
            label = f"test top-{name[-1]}: {value:.2f} %"
            axes.plot(tested[-1]["step"], value, "*", color=colour, markersize=11, label=label)
    _finish(axes, "%")


def _draw_rate(axes: Axes, lines: list[Line]) -> None:
    lines = [line for line in lines if "lr" in line]
    axes.plot(*_points(lines, "lr"), color=INK, label="highest" if "lr_lowest" in lines[0] else None)
    if "lr_lowest" in lines[0]:
        axes.plot(*_points(lines, "lr_lowest"), color=MUTED, label="lowest")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter("{x:g}")
    _finish(axes, "")


def _draw_zoom(axes: Axes, lines: list[Line]) -> None:
    zoomed = [line for line in lines if line.get("zoom")]
    styles = (
        ("x", "o-", "largest along x, mean of the pictures"),
        ("y", "o--", "largest along y, mean"),
        ("largest", "o-", "largest of all"),
    )
    for (name, style, label), colour in zip(styles, PART_COLOURS[2:]):
        axes.plot(*_points(zoomed, "zoom", name), style, color=colour, markersize=3, label=label)
    axes.set_ylim(bottom=1)
    _finish(axes, "magnification")


def _draw_area(axes: Axes, lines: list[Line]) -> None:
    zoomed = [line for line in lines if line.get("zoom")]
    steps, shares = _points(zoomed, "zoom", "area_of_half")
    axes.plot(steps, [100 * share for share in shares], "o-", color=INK, markersize=3)
    axes.axhline(50, color=MUTED, linewidth=0.8, linestyle="--", label="a plain resize")
    axes.set_ylim(0, 55)
    _finish(axes, "% of the picture")


def _draw_gradient(axes: Axes, lines: list[Line]) -> None:
    axes.plot(*_points(_within(lines) or _epochs(lines), "train", "grad_norm"), color=INK, linewidth=0.9)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    _finish(axes, "")


# Title -> whether a line of metrics.jsonl is drawn there, and how.
_PANELS: dict[str, tuple[Callable[[Line], bool], Callable[[Axes, list[Line]], None]]] = {
    "loss and its parts": (lambda line: "train" in line, _draw_losses),
    "accuracy": (lambda line: bool(line.get("validation") or line.get("test")), _draw_accuracy),
    "learning rate": (lambda line: "lr" in line, _draw_rate),
    "zoom": (lambda line: bool(line.get("zoom")), _draw_zoom),
    "area that half of the pixels see": (lambda line: bool(line.get("zoom")), _draw_area),
    "norm of the gradient": (lambda line: "grad_norm" in line.get("train", ()), _draw_gradient),
}


def _within(lines: Iterable[Line]) -> list[Line]:
    return [line for line in lines if "train" in line and "epoch" not in line]


def _epochs(lines: Iterable[Line]) -> list[Line]:
    return [line for line in lines if "train" in line and "epoch" in line]


def _points(lines: list[Line], *keys: str) -> tuple[list[int], list[float]]:
    """Steps and values; NaN, a gap, where there is none."""
    values = []
    for line in lines:
        value = line
        for key in keys:
            value = value.get(key) if value else None
        values.append(math.nan if value is None else value)
    return [line["step"] for line in lines], values


def _finish(axes: Axes, unit: str) -> None:
    label_axes(axes, "step", unit)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=7, frameon=False, labelcolor=INK)
