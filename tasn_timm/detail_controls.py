"""Controls: what detail images can show in place of an attention map's detail, to tell where a gain comes from.

None of them is in the paper. If detail images help because attention finds details, these help less; if they help as
any second, enlarged or differently cut view would, these do as well.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .errors import unknown

SIDES = (0.25, 0.6)  # of the boxes, as a share of the image's


def control_maps(control: str, structure_map: Tensor, parts: int) -> Tensor:
    """Maps for the detail sampler that no detail guides; random, from torch's global generator.

    Args:
        control: "structure": the structure map once more, shifted by up to one of its cells along each axis.
            "box": a square anywhere in the image, its side 0.25 to 0.6 of the image's, both uniform.
            "centred_box": the same, around a position drawn in proportion to the structure map, or as near to it as
            the square is inside the image.
        structure_map: What the structure sampler uses, (B, h, w), non-negative.
        parts: Detail images per image.

    Returns:
        (B, parts, h, w). Cells that a box covers in part have that share of its height.

    Raises:
        ValueError: Unknown control.
    """
    if control not in _CONTROLS:
        raise unknown("detail_control", control, CONTROLS)
    views = structure_map.repeat_interleave(parts, 0)  # (B * parts, h, w)
    return _CONTROLS[control](views).unflatten(0, (-1, parts))


def _shifted(structure: Tensor) -> Tensor:
    height, width = structure.shape[1:]
    rows = _shifted_cells(structure[:, 0, 0], height)[:, :, None].expand(-1, -1, width)
    columns = _shifted_cells(structure[:, 0, 0], width)[:, None, :].expand(-1, height, -1)
    return structure.gather(1, rows).gather(2, columns)


def _shifted_cells(like: Tensor, cells: int) -> Tensor:
    """Which cell each one is taken from, the last one again beyond the end: (B, cells)."""
    shift = torch.randint(-1, 2, (len(like), 1), device=like.device)
    return (torch.arange(cells, device=like.device) + shift).clamp(0, cells - 1)


def _box(structure: Tensor) -> Tensor:
    side, x, y = _side_and_place(structure)
    return _square(x * (1 - side), y * (1 - side), side, structure)


def _centred_box(structure: Tensor) -> Tensor:
    height, width = structure.shape[1:]
    side, x, y = _side_and_place(structure)
    race = structure.flatten(1) / torch.empty_like(structure.flatten(1)).exponential_()  # as in trilinear attention
    cell = race.argmax(1)
    column, row = cell % width, cell.div(width, rounding_mode="floor")
    left = ((column + x) / width - side / 2).clamp(min=0).minimum(1 - side)
    top = ((row + y) / height - side / 2).clamp(min=0).minimum(1 - side)
    return _square(left, top, side, structure)


def _side_and_place(structure: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sides of squares, and two uniform numbers in [0, 1) each: three of (B,)."""
    side, x, y = torch.rand(3, len(structure), device=structure.device, dtype=structure.dtype)
    return SIDES[0] + (SIDES[1] - SIDES[0]) * side, x, y


def _square(left: Tensor, top: Tensor, side: Tensor, like: Tensor) -> Tensor:
    """Squares (B,), all between 0 and 1, as maps of the shape (B, h, w) of another."""
    height, width = like.shape[1:]
    return _covered(left, side, width)[:, None, :] * _covered(top, side, height)[:, :, None]


def _covered(start: Tensor, length: Tensor, cells: int) -> Tensor:
    """Share of each cell of an axis that the intervals [start, start + length] (B,) of [0, 1] cover: (B, cells)."""
    edge = torch.arange(cells + 1, device=start.device, dtype=start.dtype) / cells
    inside = (edge - start[:, None]).clamp(min=0).minimum(length[:, None])  # length of the interval up to each edge
    return cells * inside.diff(dim=1)


_CONTROLS: dict[str, Callable[[Tensor], Tensor]] = {
    "structure": _shifted,
    "box": _box,
    "centred_box": _centred_box,
}
CONTROLS = tuple(_CONTROLS)
