"""The paper's Figures 2, 4 and 5 for one's own pictures, with matplotlib (extra "plot")."""

import math
import textwrap
from collections.abc import Sequence
from itertools import cycle

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor
from torch.nn import functional as F

from .attention_sampler import axis_densities, balance_axes
from .errors import UserError
from .gaze import Gaze, channel_maps, to_unit
from .tasn import TASN
from .visualize import overlaid

INK, MUTED, ORANGE, BLUE = "#343a40", "#868e96", "#e8590c", "#1c7ed6"
PART_COLOURS = ("#f59f00", "#ae3ec9", "#0ca678", "#1c7ed6", "#e64980", "#5c940d", "#4263eb", "#d9480f")
PANEL = 2.1  # inches, height
WRAPPED = 34  # characters of a caption's line
SHOWN = 1000  # pixels of a photograph's long side
CHANNELS = 9  # of Fig. 5
ARROWS = 10  # along an axis in Fig. 4
POINTS = 32  # along an axis in Fig. 4, at most


def attention_figure(gazes: Sequence[Gaze], captions: Sequence[str]) -> Figure:
    """Figure 2: a row for each photograph with attention, structure- and detail-preserved images, and a plain resize.

    The photograph is shown whole, and what the model's input cuts off is dimmed. Frames say where in it each detail
    image looks, in the colour of that image: around all that appears larger there than in a plain resize. The plain
    resize, which the paper's figure does not have, is what the backbone would see without attention.

    Args:
        gazes: What a model sees of each photograph.
        captions: A line for each, below the photograph.
    """
    columns = 4 + max(len(gaze.details) for gaze in gazes)
    figure, grid = _panels(len(gazes), columns, gazes[0].pixels, PANEL, below=0.3)
    for gaze, caption, row in zip(gazes, captions, grid):
        _draw_photo(row[0], gaze)
        _draw_image(row[1], overlaid(gaze.pixels, gaze.structure.attention))
        _draw_image(row[2], gaze.structure.pixels)
        _draw_image(row[3], _plain_resize(gaze))
        for axes, view, colour in zip(row[4:], gaze.details, cycle(PART_COLOURS)):
            _draw_image(axes, view.pixels)
            axes.add_patch(Rectangle((0, 0), 1, 1, transform=axes.transAxes, fill=False, edgecolor=colour, linewidth=3))
        for axes in row[4 + len(gaze.details) :]:
            axes.remove()
        row[0].set_xlabel(textwrap.fill(caption, WRAPPED), fontsize=8, color=INK, parse_math=False)  # may have a $
    titles = ["photograph", "attention", "structure-preserved", "plain resize"]
    for axes, title in zip(grid[0], titles + ["detail-preserved"] * (columns - len(titles))):
        axes.set_title(title, fontsize=9, color=INK)
    return figure


def sampling_figure(model: TASN, gaze: Gaze) -> Figure:
    """Figure 4: the structure map, its marginals, their integrals, the sampling points and the sampled image.

    The saliency and the uniform sampler do not decompose the map into marginals: of them the rest is drawn.
    """
    height, width = gaze.pixels.shape[1:]
    aspect = width / height
    separable = model.structure_sampler.sampler == "attention"
    if separable:
        mosaic, ratios = [["map", "b1", "c1", "points"], ["input", "b2", "c2", "sampled"]], [aspect, 1.15, 1.15, aspect]
    else:
        mosaic, ratios = [["map", "input", "points", "sampled"]], [aspect] * 4
    figure = Figure(figsize=(3 * sum(ratios), 2.8 * len(mosaic) + 0.2), layout="constrained")
    axes = figure.subplot_mosaic(mosaic, width_ratios=ratios)
    axes["map"].imshow(gaze.structure.attention.numpy(), cmap="inferno", vmin=0, vmax=1, extent=(0, width, height, 0))
    _without_ticks(axes["map"])
    _draw_image(axes["input"], gaze.pixels)
    _draw_image(axes["points"], gaze.pixels)
    _draw_points(axes["points"], gaze)
    _draw_image(axes["sampled"], gaze.structure.pixels)
    titles = dict(map="(a) attention map", input="image", points="(d) sampling points", sampled="(e) sampled image")
    if separable:
        _draw_marginals(axes, model, gaze)
        titles |= dict(b1="(b1) marginal over x", b2="(b2) marginal over y", c1="(c1) its integral")
        titles |= dict(c2="(c2) its integral")
    for name, title in titles.items():
        axes[name].set_title(title, fontsize=9, color=INK)
    return figure


def channels_figure(model: TASN, gaze: Gaze, seed: int = 0) -> Figure:
    """Figure 5: channels of the features beside the trilinear maps of the same channels, over the image.

    Args:
        model: The one that looked.
        gaze: What it sees.
        seed: Of the random choice of nine channels, or all, among those that respond to the picture.

    Raises:
        UserError: The maps are of positions, not of channels (self-attention); or no channel responds.
    """
    settings = model.trilinear_attention
    if settings.normalization == "self_attention":
        raise UserError(
            "self-attention has a map for each position, not for each channel, so Figure 5 cannot compare them: choose "
            "another figure."
        )
    maps = channel_maps(settings, gaze.features[None])[0]  # (C, h, w)
    channels = _choose_channels(gaze.features, seed)
    figure, grid = _panels(2, len(channels), gaze.pixels, 1.35)
    for (above, below), channel in zip(grid.T, channels):
        _draw_image(above, overlaid(gaze.pixels, to_unit(gaze.features[channel])))
        _draw_image(below, overlaid(gaze.pixels, to_unit(maps[channel])))
        above.set_title(f"channel {channel}", fontsize=8, color=MUTED)
    for axes, label in zip(grid[:, 0], ("(a) features", "(b) trilinear maps")):
        axes.set_ylabel(label, fontsize=9, color=INK)
    return figure


def _choose_channels(features: Tensor, seed: int) -> list[int]:
    """Numbers of some channels (C, h, w) that respond, in order."""
    responding = (features.amax((1, 2)) > 0).nonzero()[:, 0]
    if not len(responding):
        raise UserError("no channel of the attention net's features responds to this picture: choose another one.")
    order = torch.randperm(len(responding), generator=torch.Generator().manual_seed(seed))[:CHANNELS]
    return responding[order].sort().values.tolist()


def _plain_resize(gaze: Gaze) -> Tensor:
    """The model's input at the size of the sampled image."""
    size = gaze.structure.pixels.shape[1:]
    return F.interpolate(gaze.pixels[None], size, mode="bilinear", antialias=True)[0]


def _panels(rows: int, columns: int, pixels: Tensor, panel: float, below: float = 0.05) -> tuple[Figure, np.ndarray]:
    """A figure and its axes (rows, columns), each of the shape of an image (3, H, W).

    Args:
        rows, columns: Of panels.
        pixels: The image.
        panel: Height of a panel, inches.
        below: Room below each, inches.
    """
    aspect = pixels.shape[2] / pixels.shape[1]
    size = (columns * panel * aspect + 0.3, rows * (panel + below) + 0.3)
    figure = Figure(figsize=size, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.08, wspace=0.01, hspace=0.01)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _draw_image(axes: Axes, pixels: Tensor) -> None:
    """Pixels (3, H, W), those of a small image left visible."""
    height, width = pixels.shape[1:]
    axes.imshow(pixels.movedim(0, 2).numpy(), interpolation="nearest", extent=(0, width, height, 0))
    _without_ticks(axes)


def _without_ticks(axes: Axes) -> None:
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def _draw_photo(axes: Axes, gaze: Gaze) -> None:
    width, height = gaze.photo.size
    small = gaze.photo.copy()
    small.thumbnail((SHOWN, SHOWN))
    axes.imshow(small, extent=(0, width, height, 0))
    _without_ticks(axes)
    axes.set(xlim=(0, width), ylim=(height, 0))
    left, top, right, bottom = gaze.crop
    for corner, size in (  # what is cut off
        ((0, 0), (left, height)),
        ((right, 0), (width - right, height)),
        ((left, 0), (right - left, top)),
        ((left, bottom), (right - left, height - bottom)),
    ):
        axes.add_patch(Rectangle(corner, *np.maximum(size, 0), color="white", alpha=0.6, linewidth=0))
    for view, colour in zip(gaze.details, cycle(PART_COLOURS)):
        axes.plot(*gaze.outline(view).T, color=colour, linewidth=1.5)


def _draw_points(axes: Axes, gaze: Gaze) -> None:
    height, width = gaze.pixels.shape[1:]
    rows, columns = (_evenly(count, POINTS) for count in gaze.structure.grid.shape[:2])
    x, y = (gaze.structure.grid[rows][:, columns].numpy().reshape(-1, 2).T + 1) / 2
    axes.scatter(x * width, y * height, s=3, color=BLUE, linewidths=0)


def _evenly(count: int, most: int) -> Tensor:
    """Numbers of every n-th of `count` pixels, at most `most` of them."""
    step = math.ceil(count / most)
    return torch.arange(step // 2, count, step)


def _draw_marginals(axes: dict[str, Axes], model: TASN, gaze: Gaze) -> None:
    sampler, view = model.structure_sampler, gaze.structure
    raw = axis_densities(view.attention[None], tuple(gaze.pixels.shape[1:]), marginal=sampler.marginal)
    balanced = balance_axes(*raw, sampler.max_zoom, sampler.iterations)
    looked_at = (view.grid[0, :, 0], view.grid[:, 0, 1])
    cap = sampler.max_zoom if sampler.has_cap else None
    for name, number, of_map, (density,), seen in zip("xy", "12", raw, balanced, looked_at):
        _draw_density(axes[f"b{number}"], of_map[0], density, cap, name)
        _draw_integral(axes[f"c{number}"], density, (seen + 1) / 2 * len(density), name)


def _draw_density(axes: Axes, raw: Tensor, density: Tensor, max_zoom: float | None, name: str) -> None:
    edges = torch.arange(len(density) + 1)
    axes.stairs(density, edges, fill=True, color=ORANGE, alpha=0.75, label="as sampled")
    axes.stairs(raw, edges, color=INK, linewidth=1, label="of the map", baseline=None)
    if max_zoom is not None:
        axes.axhline(max_zoom, color=MUTED, linewidth=0.8, linestyle="--")
        axes.annotate(
            f"max_zoom {max_zoom:g}",
            (1, max_zoom),
            (-2, 2),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            fontsize=7,
            color=MUTED,
        )
    axes.set(xlim=(0, len(density)), ylim=(0, None))
    axes.legend(fontsize=7, frameon=False, labelcolor=INK)
    label_axes(axes, f"{name} in pixels", "magnification")


def _draw_integral(axes: Axes, density: Tensor, positions: Tensor, name: str) -> None:
    """F of a density (n,), and its inverse at some of the sampled pixels: `positions` (count,), in pixels."""
    total = torch.cat([torch.zeros(1), density.cumsum(0)]) / density.sum()
    axes.plot(torch.arange(len(total)), total, color=INK, linewidth=1.5)
    for pixel in _evenly(len(positions), ARROWS).tolist():
        x, y = positions[pixel].item(), (pixel + 0.5) / len(positions)
        arrow = dict(arrowstyle="->", linewidth=0.8, shrinkA=0, shrinkB=0)
        axes.annotate("", (x, y), (0, y), arrowprops=arrow | dict(color=ORANGE))
        axes.annotate("", (x, 0), (x, y), arrowprops=arrow | dict(color=BLUE))
    axes.set(xlim=(0, len(density)), ylim=(0, 1))
    label_axes(axes, f"{name} in pixels", "share of sampled pixels")


def label_axes(axes: Axes, x: str, y: str) -> None:
    """Name the axes of a diagram, with as little ink as needed."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(x, fontsize=8, color=MUTED)
    axes.set_ylabel(y, fontsize=8, color=MUTED)
    axes.tick_params(which="both", labelsize=7, colors=MUTED)
