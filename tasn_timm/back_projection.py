"""What a sampler's grid says: how much it magnifies, and what is where in the image and in the sampled image."""

import torch
from torch import Tensor

from .errors import UserError


def magnification(grid: Tensor) -> Tensor:
    """How much larger things are in a sampled image than in a plain resize to its size, along x and along y.

    Args:
        grid: Positions (B, H', W', 2) as the samplers compute them; at least 2 x 2.

    Returns:
        (B, H', W', 2), more than 0; 1 everywhere for a plain resize.
    """
    height, width = grid.shape[1:3]
    x, y = torch.gradient(grid[..., 0], dim=2)[0], torch.gradient(grid[..., 1], dim=1)[0]
    steps = torch.stack([x * width / 2, y * height / 2], dim=-1)  # in steps of a plain resize
    return 1 / steps.clamp(min=torch.finfo(grid.dtype).eps)


def sampled_to_image(positions: Tensor, grid: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Back-projection: where in the image something is that was seen in the sampled image.

    Positions are (x, y) in pixels, and edges are whole numbers: (0, 0) is the corner of the first pixel, (1/2, 1/2) its
    centre, (W, H) the corner of the last (half-pixel, as align_corners=False). Between the centres of the sampled
    pixels the grid is interpolated bilinearly, beyond the outermost ones it goes on straight, so that the two outermost
    half-pixels may end a little inside or outside of the image.

    Args:
        positions: (B, N, 2) in the sampled image, or boxes (B, N, 4): x and y of one corner, then of the opposite one.
        grid: Where each sampled pixel looks, (B, H', W', 2), of any sampler; at least 2 x 2.
        image_size: H and W of the image.

    Returns:
        Positions or boxes in the image, of the shape given, in the grid's dtype.

    Raises:
        UserError: Another shape; or boxes and a grid of the saliency sampler, where a box would get bent sides.
    """
    _check_positions(positions, grid)
    if positions.shape[-1] == 4:
        _check_straight(grid, "boxes do not stay boxes: give their corners and sides as positions")
    height, width = grid.shape[1:3]
    x, y = positions.to(grid).unflatten(-1, (-1, 2)).flatten(1, 2).unbind(-1)  # (B, n)
    image = torch.arange(len(grid), device=grid.device)[:, None]
    (left, across), (top, down) = _between_centres(x, width), _between_centres(y, height)
    upper = torch.lerp(grid[image, top, left], grid[image, top, left + 1], across)
    lower = torch.lerp(grid[image, top + 1, left], grid[image, top + 1, left + 1], across)
    seen = torch.lerp(upper, lower, down)  # (B, n, 2) in [-1, 1]
    return ((seen + 1) / 2 * _extent(image_size, grid)).view(positions.shape)


def image_to_sampled(positions: Tensor, grid: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Where in the sampled image something of the image is found: the inverse of `sampled_to_image`.

    Args:
        positions: (B, N, 2) in the image, or boxes (B, N, 4), in pixels, see `sampled_to_image`.
        grid: Of the attention or the uniform sampler, (B, H', W', 2), at least 2 x 2.
        image_size: H and W of the image.

    Returns:
        Positions or boxes in the sampled image, of the shape given, in the grid's dtype. What the uniform sampler has
        cut off lies outside of it.

    Raises:
        UserError: Another shape; or a grid of the saliency sampler, which bends and has no inverse in closed form.
    """
    _check_positions(positions, grid)
    _check_straight(grid, "there is no inverse in closed form: `sampled_to_image` takes all grids")
    seen = positions.to(grid).unflatten(-1, (-1, 2)).flatten(1, 2) / _extent(image_size, grid) * 2 - 1  # (B, n, 2)
    x = _place_among(grid[:, 0, :, 0], seen[..., 0])
    y = _place_among(grid[:, :, 0, 1], seen[..., 1])
    return torch.stack([x, y], dim=-1).view(positions.shape)


def _check_positions(positions: Tensor, grid: Tensor) -> None:
    if grid.ndim != 4 or grid.shape[-1] != 2 or min(grid.shape[1:3]) < 2:
        raise UserError(f"grid must be (B, H', W', 2) and at least 2 x 2, got {tuple(grid.shape)}.")
    if positions.ndim != 3 or positions.shape[-1] not in (2, 4) or len(positions) != len(grid):
        raise UserError(
            f"positions must be ({len(grid)}, N, 2), or ({len(grid)}, N, 4) for boxes, as the grid is of {len(grid)} "
            f"images; got {tuple(positions.shape)}."
        )


def _check_straight(grid: Tensor, otherwise: str) -> None:
    straight = torch.equal(grid[..., 0], grid[:, :1, :, 0].expand(grid.shape[:3])) and torch.equal(
        grid[..., 1], grid[:, :, :1, 1].expand(grid.shape[:3])
    )
    if not straight:
        raise UserError(f"the saliency sampler bends rows and columns, so {otherwise}.")


def _extent(image_size: tuple[int, int], like: Tensor) -> Tensor:
    height, width = image_size
    return torch.tensor([width, height], device=like.device, dtype=like.dtype)


def _between_centres(positions: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Number of the pixel whose centre is before each position, and how far the position is from there to the next.

    At the edges, where a centre is on one side only, the nearest two; the distance is then below 0 or above 1.
    """
    before = (positions - 0.5).floor().clamp(0, count - 2)
    return before.long(), (positions - 0.5 - before)[..., None]


def _place_among(centres: Tensor, positions: Tensor) -> Tensor:
    """In pixels, where positions (B, n) are among the pixels that look at increasing `centres` (B, count)."""
    after = torch.searchsorted(centres.contiguous(), positions.contiguous()).clamp(1, centres.shape[1] - 1)
    start, end = centres.gather(1, after - 1), centres.gather(1, after)
    tiny = torch.finfo(centres.dtype).tiny  # where two pixels look at the same
    return after - 0.5 + (positions - start) / (end - start).clamp(min=tiny)
