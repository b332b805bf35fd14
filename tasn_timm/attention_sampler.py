"""Attention sampler: an image is sampled densely where an attention map is high (Sec. 3.2, Eqs. 3-5, Fig. 4).

`attention_grid` is the paper's; `saliency_grid` (SSN) and `uniform_grid` are those that Table 3 compares it with.

Positions are (x, y) pairs in [-1, 1] over the image as `torch.nn.functional.grid_sample` takes them with
align_corners=False: -1 and 1 are the outer edges of the border pixels. Inside this file axis positions run from 0 to 1.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from timm.layers import register_notrace_module, to_2tuple
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import UserError, no_effect, unknown
from .precision import no_autocast

# How a map becomes a distribution over one axis: its maximum (Eq. 4) or sum over the other axis.
_MARGINALS: dict[str, Callable[[Tensor, int], Tensor]] = {"max": torch.amax, "sum": torch.sum}
MARGINALS = tuple(_MARGINALS)


def _flat_top(attention: Tensor, quantile: float = 0.7, clip: float = 0.5) -> Tensor:
    """Ours, not in the paper: the highest 30 % of the cells, with everything above half of the peak made equal.

    Squaring enlarges the middle of an object and starves its ends; a flat top enlarges all of it alike.
    """
    cells = attention.flatten(1)
    floor = _quantile(cells, quantile)
    height = (cells.amax(1, keepdim=True) - floor).clamp(min=torch.finfo(cells.dtype).tiny)
    return ((cells - floor) / height).clamp(0.0, clip).square().view_as(attention)


# What is done to a map before it guides the sampler.
_SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda attention: attention,
    "square": torch.square,  # the published code, "optional", after its resize to 512 pixels; here before ours
    "flat_top": _flat_top,
}
SHAPES = tuple(_SHAPES)


def shape_map(attention: Tensor, shape: str) -> Tensor:
    """Change the profile of attention maps (B, h, w) before sampling.

    Args:
        attention: Non-negative maps. NaN counts as 0; where anything is infinite, all the mass is there.
        shape: "none" (the paper), "square" (the published code's structure map) or "flat_top" (ours).

    Returns:
        Maps (B, h, w) between 0 and 1, as only their proportions matter to the sampler.
    """
    if shape not in _SHAPES:
        raise unknown("map shape", shape, SHAPES)
    return _SHAPES[shape](_finite(attention))


def attention_grid(
    attention: Tensor,
    output_size: int | tuple[int, int],
    *,
    max_zoom: float | None = 4.0,
    iterations: int = 5,
    marginal: str = "max",
    size: tuple[int, int] | None = None,
) -> Tensor:
    """Compute where each output pixel looks: the inverse of the map's distribution along x and along y, Eqs. 4-5.

    The two axes are treated apart, so rows and columns stay straight. A flat map gives the positions of an ordinary
    bilinear resize.

    Args:
        attention: Non-negative maps (B, h, w). NaN counts as 0; where anything is infinite, all the mass is there.
            Without any mass the grid is uniform.
        output_size: H' and W' of the sampled image, in pixels.
        max_zoom: Where the magnification along an axis, relative to a uniform resize, is capped; at least 1, None for
            no cap. What is cut off is given back evenly, so the result can lie above it by less than 1 (4.86 for 4 and
            a single bright cell of 28). Not in the paper; 4 is the published code's `dense`.
        iterations: Rounds of clipping both axes to a common maximum (`balance_axes`); 0 for none, and no cap. Not in
            the paper; 5 is the published code's `iters`.
        marginal: "max" (Eq. 4) or "sum", the paper's alternative.
        size: Resolution (H, W) at which the map is taken, see `axis_densities`; None for its own.

    Returns:
        (B, H', W', 2), x then y, in [-1, 1], for align_corners=False. float32, or float64 for float64 maps.
    """
    height, width = to_2tuple(output_size)
    densities = axis_densities(attention, size, marginal=marginal)
    x, y = _inverse_distributions(balance_axes(*densities, max_zoom, iterations), (width, height))
    return _grid(x[:, None, :], y[:, :, None])


def saliency_grid(attention: Tensor, output_size: int | tuple[int, int], *, sigma: float = 0.178) -> Tensor:
    """Compute where each output pixel looks with SSN's sampler (Recasens et al., ECCV 2018; Table 3).

    A pixel at p looks at the mean of all positions q, weighted by attention(q) * Gaussian(q - p): it is drawn towards
    what is salient nearby. Rows and columns bend. The map is continued by its border values, so that nothing is drawn
    away from the edges of the image, and positions outside are moved to the edge.

    SSN evaluates this on 31 x 31 positions and enlarges the result bilinearly; here it is exact at every pixel, as the
    Gaussian is separable: three products of matrices. A flat map is a plain resize as long as the window is as wide as
    a cell of the map.

    Args:
        attention: As in `attention_grid`, at its own resolution.
        output_size: H' and W' of the sampled image, in pixels.
        sigma: Of the Gaussian, as a fraction of the image's side. The default is SSN's published code, a full width at
            half maximum of 13 of 31 cells.

    Returns:
        As `attention_grid`.
    """
    _check_sigma(sigma)
    attention = _finite(attention) + 1e-20  # so that also a pixel far from any mass has somewhere to look
    height, width = to_2tuple(output_size)
    kernel_y, rows, margin_y = _gaussian(height, attention.shape[1], sigma, attention)
    kernel_x, columns, margin_x = _gaussian(width, attention.shape[2], sigma, attention)
    saliency = F.pad(attention, (margin_x, margin_x, margin_y, margin_y), mode="replicate")
    with no_autocast(attention.device):
        mass = kernel_y @ saliency @ kernel_x.T  # (B, H', W')
        x = kernel_y @ saliency @ (kernel_x * columns).T / mass
        y = (kernel_y * rows) @ saliency @ kernel_x.T / mass
    return _grid(x, y)


def uniform_grid(
    attention: Tensor, output_size: int | tuple[int, int], *, threshold: float = 1.0, max_zoom: float | None = 4.0
) -> Tensor:
    """Compute where each output pixel looks with the uniform sampler of Table 3: a crop, enlarged.

    The map is binarised, and the smallest box around what is left is sampled evenly. The paper gives no threshold.

    Args:
        attention: As in `attention_grid`, at its own resolution: the box ends between its cells.
        output_size: H' and W' of the sampled image, in pixels.
        threshold: Cells above so many times the map's mean are inside; 0 or more. Where none is, the box is the whole
            image.
        max_zoom: The box is at least the image's side over this along each axis; at least 1, None for no bound.

    Returns:
        As `attention_grid`.
    """
    _check_max_zoom(max_zoom)
    _check_threshold(threshold)
    attention = _finite(attention)
    inside = attention > threshold * attention.mean((1, 2), keepdim=True)
    least = 1 / max_zoom if max_zoom is not None else 0.0
    height, width = to_2tuple(output_size)
    x = _box_positions(inside.any(1).to(attention), width, least)
    y = _box_positions(inside.any(2).to(attention), height, least)
    return _grid(x[:, None, :], y[:, :, None])


def attention_sample(
    image: Tensor,
    attention: Tensor,
    output_size: int | tuple[int, int],
    *,
    max_zoom: float | None = 4.0,
    iterations: int = 5,
    marginal: str = "max",
) -> Tensor:
    """Sample an image where its attention map is high, S(I, A) of Eqs. 3 and 5.

    Args:
        image: (B, C, H, W), floating point.
        attention: (B, h, w), covering the same field of view as the image at any resolution.
        output_size, max_zoom, iterations, marginal: As in `attention_grid`.

    Returns:
        (B, C, H', W') in the image's dtype, bilinear, the border repeated outside (the published code: zeros).
    """
    grid = attention_grid(attention, output_size, max_zoom=max_zoom, iterations=iterations, marginal=marginal)
    return sample(image, grid)


def axis_densities(
    attention: Tensor, size: tuple[int, int] | None = None, *, marginal: str = "max"
) -> tuple[Tensor, Tensor]:
    """Decompose maps into one density per axis (Eq. 4), relative to uniform: their mean is 1.

    With `size` the map is taken as its bilinear resize to that many pixels, without building it: along y a bilinear
    surface is piecewise linear between the map's rows, so its maximum over y lies on one of these rows, and resizing
    the rows along x is enough. (A 512-pixel resize misses the rows themselves by up to half a pixel; on smooth maps
    the two agree within 0.1 pixels of 512 on average.)

    Args:
        attention: (B, h, w), non-negative.
        size: Resolution (H, W) of the densities; None for that of the map.
        marginal: "max" or "sum" over the other axis.

    Returns:
        Densities over x (B, W) and over y (B, H), non-negative, of mean 1.
    """
    if marginal not in _MARGINALS:
        raise unknown("marginal", marginal, MARGINALS)
    attention = _finite(attention)
    height, width = size or attention.shape[-2:]
    reduce = _MARGINALS[marginal]
    return (
        _relative(reduce(_resize(attention, (attention.shape[1], width)), 1)),  # over x
        _relative(reduce(_resize(attention, (height, attention.shape[2])), 2)),  # over y
    )


def balance_axes(
    density_x: Tensor, density_y: Tensor, max_zoom: float | None = 4.0, iterations: int = 5
) -> tuple[Tensor, Tensor]:
    """Limit the magnification and make the two axes' maxima alike, so that objects keep their proportions.

    In each round both densities are clipped at the smaller of their maxima, the first time also at `max_zoom`, and what
    was clipped is given back evenly.

    Args:
        density_x, density_y: (B, W) and (B, H), of mean 1.
        max_zoom: At least 1, or None.
        iterations: Number of rounds; 0 switches clipping off.

    Returns:
        The two densities, again of mean 1.
    """
    _check_max_zoom(max_zoom)
    _check_iterations(iterations, max_zoom)
    for round_ in range(iterations):
        limit = torch.minimum(density_x.amax(1, keepdim=True), density_y.amax(1, keepdim=True))
        if round_ == 0 and max_zoom is not None:
            limit = limit.clamp(max=max_zoom)
        density_x, density_y = (_fill_up(density.minimum(limit)) for density in (density_x, density_y))
    return density_x, density_y


def inverse_distribution(density: Tensor, count: int) -> Tensor:
    """Positions F^-1((k + 1/2) / count), k = 0 ... count - 1, of a piecewise constant density over [0, 1].

    F is piecewise linear with F = 0 at the left edge and 1 at the right, so a uniform density gives (k + 1/2) / count.
    (The published code fixes F at 1 in the first bin and uses corner-aligned positions: 3 pixels of 512 to one side.)

    Args:
        density: (B, n), non-negative, not all zero in a row, of any sum.
        count: Number of positions.

    Returns:
        (B, count), increasing, in [0, 1].
    """
    return _inverse_distributions([density], [count])[0]


def sample(image: Tensor, grid: Tensor) -> Tensor:
    """Bilinear `grid_sample` of (B, C, H, W) at (B, H', W', 2), in float32 at least and back in the image's dtype.

    Never in bfloat16: positions would be off by up to 19 pixels of 512, and PyTorch's CPU kernel returns NaN. Pixels of
    uint8 become float32, not rounded.
    """
    precise = image.to(torch.promote_types(image.dtype, torch.float32))
    sampled = F.grid_sample(precise, grid.to(precise), mode="bilinear", padding_mode="border", align_corners=False)
    return sampled.to(image.dtype) if image.is_floating_point() else sampled


def sample_pixels(image: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Sample uint8 pixels where columns at x and rows at y cross, without a float copy of the image.

    The same as `sample`, and as near to the exact result. Only the H' rows that are looked at become floating point;
    then columns are picked from them.

    Args:
        image: (B, C, H, W), uint8.
        x, y: Positions (B, W') and (B, H') in [-1, 1], as in a grid.

    Returns:
        (B, C, H', W') in the precision of the positions, 0 to 255, bilinear, the border repeated outside.
    """
    batch, channels, height, width = image.shape
    all_rows = image.flatten(0, 2)  # (BCH, W)
    first = torch.arange(batch * channels, device=image.device).view(batch, channels, 1) * height

    def pick(row: Tensor) -> Tensor:  # (B, H') -> (B, C, H', W)
        picked = all_rows.index_select(0, (first + row[:, None]).flatten())
        return picked.view(batch, channels, -1, width).to(y)

    above, below, part = _neighbours(y, height)
    rows = pick(above).lerp_(pick(below), part[:, None, :, None])
    left, right, part = _neighbours(x, width)
    left, right = (rows.gather(3, each[:, None, None].expand(-1, *rows.shape[1:3], -1)) for each in (left, right))
    return left.lerp_(right, part[:, None, None])


class _Sampler(NamedTuple):
    grid: Callable[..., Tensor]
    options: tuple[str, ...]  # what of AttentionSampler's settings it takes
    straight: bool = True  # rows and columns stay straight


# Rows of Table 3. The first one takes the map as resized to the image, as the published code does.
_SAMPLERS = {
    "attention": _Sampler(attention_grid, ("max_zoom", "iterations", "marginal", "size")),
    "saliency": _Sampler(saliency_grid, ("sigma",), straight=False),
    "uniform": _Sampler(uniform_grid, ("threshold", "max_zoom")),
}
SAMPLERS = tuple(_SAMPLERS)


@register_notrace_module
class AttentionSampler(nn.Module):
    """Samples images at a fixed output size.

    Args:
        output_size: Pixels of the sampled image, one number or (H', W').
        sampler: "attention" (the paper's, on the map resized to the image), "saliency" (SSN's) or "uniform" (a crop).
        shape: What is done to a map first, see `shape_map`.
        max_zoom: As in `attention_grid` and `uniform_grid`.
        iterations, marginal: As in `attention_grid`.
        sigma: As in `saliency_grid`.
        threshold: As in `uniform_grid`.

    Raises:
        ValueError: An unknown name, a value out of range, or a setting that the sampler does not take.
    """

    def __init__(
        self,
        output_size: int | tuple[int, int],
        shape: str = "none",
        max_zoom: float | None = 4.0,
        iterations: int = 5,
        marginal: str = "max",
        *,
        sampler: str = "attention",
        sigma: float = 0.178,
        threshold: float = 1.0,
    ) -> None:
        super().__init__()
        if sampler not in _SAMPLERS:
            raise unknown("sampler", sampler, SAMPLERS)
        if shape not in _SHAPES:
            raise unknown("map shape", shape, SHAPES)
        if marginal not in _MARGINALS:
            raise unknown("marginal", marginal, MARGINALS)
        _check_max_zoom(max_zoom)
        _check_sigma(sigma)
        _check_threshold(threshold)
        self.output_size = to_2tuple(output_size)
        if min(self.output_size) < 1:
            raise UserError(f"sample_size must be at least 1, got {output_size}.")
        self.shape = shape
        self.sampler = sampler
        self.max_zoom = max_zoom
        self.iterations = iterations
        self.marginal = marginal
        self.sigma = sigma
        self.threshold = threshold
        settings = dict(max_zoom=max_zoom, iterations=iterations, marginal=marginal, sigma=sigma, threshold=threshold)
        no_effect(AttentionSampler, settings, f"sampler={sampler!r}", except_for=_SAMPLERS[sampler].options)
        if sampler == "attention":
            _check_iterations(iterations, max_zoom)

    @property
    def has_cap(self) -> bool:
        """Whether `max_zoom` has an effect: not on the saliency sampler, nor without rounds of clipping."""
        options = _SAMPLERS[self.sampler].options
        return "max_zoom" in options and ("iterations" not in options or self.iterations > 0)

    def grid(self, attention: Tensor, image_size: tuple[int, int]) -> Tensor:
        """(B, H', W', 2) for maps (B, h, w) over an image of (H, W) pixels."""
        sampler = _SAMPLERS[self.sampler]
        settings = {name: image_size if name == "size" else getattr(self, name) for name in sampler.options}
        return sampler.grid(shape_map(attention, self.shape), self.output_size, **settings)

    def forward(self, image: Tensor, attention: Tensor) -> Tensor:
        """(B, C, H, W) and a map (B, h, w) -> (B, C, H', W'), in the image's dtype; of uint8 in float32, 0 to 255."""
        image_size = tuple(image.shape[-2:])
        if image_size[0] < self.output_size[0] or image_size[1] < self.output_size[1]:
            raise UserError(
                f"the image has {image_size[0]} x {image_size[1]} pixels, fewer than the {self.output_size[0]} x "
                f"{self.output_size[1]} to be sampled from it: resize it (the published ratio is 512 to 224), or "
                f"create the model with a smaller sample_size."
            )
        grid = self.grid(attention, image_size)
        if image.dtype == torch.uint8 and _SAMPLERS[self.sampler].straight:
            return sample_pixels(image, grid[:, 0, :, 0], grid[:, :, 0, 1])
        return sample(image, grid)

    def extra_repr(self) -> str:
        names = [name for name in _SAMPLERS[self.sampler].options if name != "size"]
        settings = "".join(f", {name}={getattr(self, name)}" for name in names)
        return f"{self.sampler}, output_size={self.output_size}, shape={self.shape}{settings}"


def _check_max_zoom(max_zoom: float | None) -> None:
    if max_zoom is not None and not max_zoom >= 1:
        raise UserError(f"max_zoom must be at least 1, or None for no cap; got {max_zoom}.")


def _check_sigma(sigma: float) -> None:
    if not 0 < sigma < math.inf:
        raise UserError(f"sigma must be greater than 0, as a fraction of the image's side; got {sigma}.")


def _check_threshold(threshold: float) -> None:
    if not 0 <= threshold < math.inf:
        raise UserError(f"threshold must be 0 or more, in means of the map; got {threshold}.")


def _grid(x: Tensor, y: Tensor) -> Tensor:
    """Positions in [0, 1], (B, H' or 1, W' or 1) each, as (B, H', W', 2) in [-1, 1]."""
    return 2 * torch.stack(torch.broadcast_tensors(x, y), dim=-1).clamp(0, 1) - 1


def _check_iterations(iterations: int, max_zoom: float | None) -> None:
    if iterations < 0:
        raise UserError(f"iterations must be 0 or more, got {iterations}.")
    if iterations == 0 and max_zoom is not None:
        no_effect(attention_grid, dict(max_zoom=max_zoom), "iterations=0, which leaves the map as it is")


def _gaussian(count: int, cells: int, sigma: float, like: Tensor) -> tuple[Tensor, Tensor, int]:
    """One axis of a Gaussian window between output pixels and the cells of a map with a margin around it.

    Returns:
        Weights (count, n) of sum 1, n = cells + 2 * margin; positions (n,) of the cells, 0 to 1 on the map; margin.
    """
    margin = math.ceil(5 * sigma * cells)  # beyond 5 sigma the window is below 4e-6
    factory = dict(device=like.device, dtype=like.dtype)
    positions = (torch.arange(-margin, cells + margin, **factory) + 0.5) / cells
    pixels = (torch.arange(count, **factory) + 0.5) / count
    # A softmax: divided by the sum, a window much narrower than a cell keeps the cells that are nearest.
    return (-0.5 * ((positions - pixels[:, None]) / sigma).square()).softmax(1), positions, margin


def _box_positions(inside: Tensor, count: int, least: float) -> Tensor:
    """Even positions (B, count) in [0, 1] over the cells (B, n) from the first to the last one inside.

    Args:
        inside: 1 where a cell belongs to the box, else 0; where none does, all do.
        count: Number of positions.
        least: Smallest length of the box, which is kept within [0, 1].
    """
    cells = inside.shape[1]  # without any inside, argmax is 0 from both ends: all of them
    start = inside.argmax(1, keepdim=True).to(inside) / cells
    end = 1 - inside.flip(1).argmax(1, keepdim=True).to(inside) / cells
    length = (end - start).clamp(min=least)
    start = torch.minimum(((start + end - length) / 2).clamp(min=0), 1 - length)
    return start + length * (torch.arange(count, device=inside.device, dtype=inside.dtype) + 0.5) / count


def _exporting() -> bool:
    """Whether this is traced by torch.export, or by torch.onnx's older exporter (timm's onnx_export.py has both)."""
    return torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export()


def _quantile(values: Tensor, fraction: float) -> Tensor:
    """`torch.quantile` along the second dimension of (B, n): (B, 1)."""
    if not _exporting():
        return values.quantile(fraction, dim=1, keepdim=True)
    # ONNX has neither quantiles nor stable sorting.
    position = fraction * (values.shape[1] - 1)
    below = math.floor(position)
    highest = values.topk(values.shape[1] - below, dim=1).values  # from the highest down to the one below
    return torch.lerp(highest[:, -1:], highest[:, -2:][:, :1], position - below)


def _count_up_to(values: Tensor, limits: Tensor) -> Tensor:
    """How many of the increasing values (B, n) do not exceed each limit (B, m): (B, m)."""
    if _exporting():  # ONNX has no search
        return (values[:, :, None] <= limits[:, None, :]).sum(1)
    return torch.searchsorted(values, limits, right=True)


def _inverse_distributions(densities: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
    """`inverse_distribution` of one density (B, n) per axis, all by one search.

    Shorter axes are filled up with cells without mass, in which no position falls.
    """
    cells, count, batch = max(density.shape[1] for density in densities), max(counts), densities[0].shape[0]
    stacked = torch.cat([F.pad(density, (0, cells - density.shape[1])) for density in densities])  # (axes * B, n)
    right = stacked.cumsum(1)
    right = right / right[:, -1:]  # F at the right edge of each cell, the last exactly 1
    left = F.pad(right[:, :-1], (1, 0))
    targets = [(torch.arange(count, device=right.device, dtype=right.dtype) + 0.5) / each for each in counts]
    target = torch.stack(targets).clamp(max=1)  # (axes, m); beyond an axis' own count: not used
    target = target[:, None].expand(-1, batch, -1).flatten(0, 1)  # ONNX's exporter fixes repeat_interleave's batch
    cell = _count_up_to(right, target).clamp(max=cells - 1)  # the first one that ends beyond
    start, end = left.gather(1, cell), right.gather(1, cell)
    inside = ((target - start) / (end - start).clamp(min=torch.finfo(right.dtype).tiny)).clamp(0, 1)
    axes = (cell + inside).unflatten(0, (len(counts), -1))
    return [axis[:, :each] / density.shape[1] for axis, each, density in zip(axes, counts, densities)]


def _neighbours(positions: Tensor, pixels: int) -> tuple[Tensor, Tensor, Tensor]:
    """The pixels before and behind positions (B, n) in [-1, 1], and the share of the one behind: three times (B, n)."""
    place = ((positions + 1) * (pixels / 2) - 0.5).clamp(0, pixels - 1)
    before = place.floor()
    behind = (before + 1).clamp(max=pixels - 1)
    return before.long(), behind.long(), place - before


def _finite(attention: Tensor) -> Tensor:
    """Non-negative maps with a maximum of 1 (or 0) each, so that no later sum overflows; in float32 at least."""
    if attention.ndim != 3:
        raise UserError(f"attention must be (B, h, w), got {attention.ndim} dimensions {tuple(attention.shape)}.")
    attention = attention.to(torch.promote_types(attention.dtype, torch.float32))
    attention = attention.nan_to_num(nan=0.0).clamp(min=0)  # infinity becomes the largest number
    peak = attention.amax((1, 2), keepdim=True)
    return attention / peak.clamp(min=torch.finfo(attention.dtype).tiny)


def _resize(attention: Tensor, size: tuple[int, int]) -> Tensor:
    if attention.shape[-2:] == size:
        return attention
    return F.interpolate(attention[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]


def _relative(marginal: Tensor) -> Tensor:
    """Divide a marginal (B, n) by its mean; uniform where there is no mass."""
    mean = marginal.mean(1, keepdim=True)
    return torch.where(mean > 0, marginal / mean, 1.0)


def _fill_up(density: Tensor) -> Tensor:
    return density + (1 - density.mean(1, keepdim=True))
