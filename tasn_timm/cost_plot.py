"""How the cost of a TASN grows with the batch and with the sampled pixels, measured and drawn (extra "plot")."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from .benchmark import Machine, Work, measure
from .contenders import Contender, create_contenders, fixed_cost
from .errors import UserError
from .files import completing
from .tasn import TASN

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # pictures at the model's own size
SIDES = (112, 160, 224, 320, 448)  # sampled pixels along a side: each time about twice as many in all
SIDES_BATCH = 8  # pictures at these sizes

INK, FAINT, GRID = "#222222", "#8a8a8a", "#e6e6e6"
TASN_STYLE = dict(color="#ff7300", marker="o", zorder=3)
PLAIN_STYLE = dict(color="#4d7a94", marker="s", zorder=2)


def check_plot(path: Path) -> None:
    """Check that a plot can be drawn, before the work.

    Raises:
        UserError: Its file does not end in .png, or matplotlib is missing.
    """
    if path.suffix.lower() != ".png":
        raise UserError(f"--plot {str(path)!r} does not end in .png: give a file that does.")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError("--plot needs matplotlib: pip install 'tasn_timm[plot]'.") from error


def sweep(
    name: str,
    mode: str,
    precision: str,
    machine: Machine,
    progress: Callable[[Iterable[list[int]]], Iterable[list[int]]] = iter,
) -> tuple[list[dict], list[str]]:
    """Measure a TASN beside its plain backbone: over batches at its own size, and over sampled sizes.

    All take turns, so that what disturbs the machine for a while bends no curve; compiled, only those of a setting do,
    as PyTorch does not keep so many compilations.

    Args:
        name: timm name of a TASN.
        mode: "inference" or "training".
        precision: "fp32", "bf16" or "fp16".
        machine: Where and how.
        progress: Wraps the rounds.

    Returns:
        A dict for each model and setting, and a sentence for each size that a backbone does not take. The dicts are
        those of `measure` with "over" ("batch" or "size"), "series" (the model), "sample_size" (a side in pixels; of
        sizes that are not square the first) and "flops" (of the batch).

    Raises:
        UserError: The model is no TASN.
    """
    own = _pair(name)
    settings = [("batch", own, Work(mode, precision, batch_size)) for batch_size in BATCHES]
    left_out = []
    for side in SIDES:
        try:
            settings.append(("size", _pair(name, side), Work(mode, precision, SIDES_BATCH)))
        except UserError as error:
            left_out.append(f"{side} pixels are left out: {error}")
    pairs = [[(each, work) for each in pair] for _, pair, work in settings]
    groups = pairs if machine.compile else [[each for pair in pairs for each in pair]]
    measured = [cell for group in groups for cell in measure(group, machine, details=False, progress=progress)]
    labels = [_label(over, pair, each, work) for over, pair, work in settings for each in pair]
    return [label | cell for label, cell in zip(labels, measured)], left_out


def _pair(name: str, sample_size: int | None = None) -> list[Contender]:
    """A TASN and its plain backbone."""
    contenders, _ = create_contenders(name, sample_size)
    if not isinstance(contenders[0].model, TASN):
        raise UserError(f"--plot draws a TASN beside its plain backbone, and {name} samples nothing: give a TASN.")
    return contenders[:2]


def _label(over: str, pair: list[Contender], contender: Contender, work: Work) -> dict:
    return dict(
        over=over,
        series=contender.name.split(" @ ")[0],
        sample_size=pair[0].model.sample_size[0],
        flops=fixed_cost(contender)["flops"] * work.batch_size,
    )


def draw(points: list[dict], title: str, subtitle: str, path: Path) -> None:
    """Draw what `sweep` found: time and FLOPs over batch and sampled pixels, all logarithmic.

    Beside each curve of the plain backbone is a line of slope 1: what grows in proportion runs along with it.

    Args:
        points: Of one mode and precision.
        title: Of the figure.
        subtitle: Where and how it was measured.
        path: Of the PNG file, which is written whole.

    Raises:
        UserError: It cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7.6), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    grid = figure.subplots(2, 2, sharex="col", sharey="row")
    for row, (key, unit, factor) in zip(grid, (("median_seconds", "ms", 1e3), ("flops", "GFLOPs", 1e-9))):
        for axes, over in zip(row, ("batch", "size")):
            _draw_panel(axes, [point for point in points if point["over"] == over], key, factor)
        row[0].set_ylabel(f"{unit} for the batch", color=INK)
    own = next(point["sample_size"] for point in points if point["over"] == "batch")
    grid[0, 0].set_title(f"batches, sampled to {own} x {own} pixels", color=INK, fontsize=11)
    grid[0, 1].set_title(f"sampled sizes, {SIDES_BATCH} pictures", color=INK, fontsize=11)
    grid[1, 0].set_xlabel("pictures in the batch", color=INK)
    grid[1, 1].set_xlabel("sampled pixels of a picture", color=INK)
    grid[0, 0].legend(loc="upper left", frameon=False, labelcolor=INK)
    figure.suptitle(title, fontsize=14, fontweight="bold", color=INK, parse_math=False)  # may have a $
    figure.supxlabel(subtitle, fontsize=8.5, color=FAINT, parse_math=False)
    with completing(path, "--plot") as aside:
        figure.savefig(aside, format="png", dpi=200)


def _draw_panel(axes: Axes, points: list[dict], key: str, factor: float) -> None:
    """Draw one value of each series, what could not be measured left out."""
    curves: dict[str, dict[int, float]] = {point["series"]: {} for point in points}
    for point in points:
        if not point["failure"]:
            curves[point["series"]][_position(point)] = point[key] * factor
    for (series, curve), style in zip(curves.items(), (TASN_STYLE, PLAIN_STYLE)):
        axes.plot(curve.keys(), curve.values(), label=series, linewidth=2, markersize=5, **style)
    for curve in filter(None, curves.values()):
        last = max(curve)
        label = "" if axes.get_lines()[2:] else "slope 1: in proportion"  # once in the legend
        line = [curve[last] * x / last for x in curve]
        axes.plot(curve.keys(), line, "--", color=FAINT, linewidth=1, zorder=1, label=label)
    tasn, plain = curves.values()
    if both := tasn.keys() & plain.keys():
        last = max(both)
        text = f"{tasn[last] / plain[last]:.2f} x plain"
        place = dict(xytext=(-8, 4), textcoords="offset points", ha="right", va="bottom")
        axes.annotate(text, (last, tasn[last]), color=TASN_STYLE["color"], fontsize=9, **place)
    _dress(axes, {_position(point): _tick(point) for point in points})


def _dress(axes: Axes, ticks: dict[int, str]) -> None:
    from matplotlib.ticker import FuncFormatter, NullLocator

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.margins(y=0.1)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=INK, length=0)
    axes.spines[:].set_visible(False)


def _position(point: dict) -> int:
    return point["batch_size"] if point["over"] == "batch" else point["sample_size"] ** 2


def _tick(point: dict) -> str:
    return str(point["batch_size"]) if point["over"] == "batch" else f"{point['sample_size']}²"
