"""Trilinear attention: features X become attention maps M (Sec. 3.1, Eqs. 1-2, Table 2).

Every formula of Table 2 has the form M = R(X) X: row i of R(X) says how much each channel contributes to map i, and it
depends on channel i and on X alone. The sampler needs only the average of the maps and a few single ones. So
`structure_and_detail_maps` weighs the rows before the last product, and takes them block by block: neither the C maps
nor the C x C relation are ever built (but for the search for repeated maps with formulas without N(X)).
"""

import math
from collections.abc import Callable, Iterable
from functools import reduce
from typing import NamedTuple

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn

from .errors import UserError, no_effect, unknown
from .precision import no_autocast

BLOCK = 128  # maps at once: larger blocks take more memory, and on a CPU no less time

Norm = Callable[[Tensor], Tensor]


class _Formula(NamedTuple):
    """Maps M_i from the rows X_i, as a product of matrices from left to right."""

    factors: Callable[[Tensor, Tensor, Norm, Norm], tuple[Tensor, ...]]
    scales: tuple[str, ...] = ()  # of its softmaxes
    normalizes_maps: bool = False  # a softmax of the product


# The rows of Table 2, in its order, with the paper's accuracy on CUB-200-2011.  x is X as (B, C, hw) and rows are some
# of its channels (B, r, hw); spatial and relation are the two softmaxes N, over the last dimension of a matrix, each
# with its scale.  Not x.mT, which torch.onnx's older exporter does not know.
_FORMULAS = {
    "features": _Formula(lambda rows, x, spatial, relation: (rows,)),  # X: 83.5
    "none": _Formula(lambda rows, x, spatial, relation: (rows @ x.transpose(1, 2), x)),  # X X^T X, Eq. 1: 84.9
    "spatial": _Formula(  # N(X) X^T X: 85.2
        lambda rows, x, spatial, relation: (spatial(rows) @ x.transpose(1, 2), x), ("spatial_scale",)
    ),
    "spatial_both": _Formula(  # N(X) N(X)^T X: 84.3
        lambda rows, x, spatial, relation: (spatial(rows) @ spatial(x).transpose(1, 2), x), ("spatial_scale",)
    ),
    "output": _Formula(  # N(X X^T X): 84.5
        lambda rows, x, spatial, relation: (rows @ x.transpose(1, 2), x), ("relation_scale",), normalizes_maps=True
    ),
    "relation": _Formula(  # N(X X^T) X: 85.0
        lambda rows, x, spatial, relation: (relation(rows @ x.transpose(1, 2)), x), ("relation_scale",)
    ),
    "spatial_relation": _Formula(  # N(N(X) X^T) X, Eq. 2: 85.3
        lambda rows, x, spatial, relation: (relation(spatial(rows) @ x.transpose(1, 2)), x),
        ("spatial_scale", "relation_scale"),
    ),
    # X^T X: hw maps, one per position (Sec. 4.2): 0.7 below Eq. 2. Its rows are positions, (B, r, C).
    "self_attention": _Formula(lambda rows, x, spatial, relation: (rows, x)),
}
NORMALIZATIONS = tuple(_FORMULAS)

# How likely each map is to be chosen as the detail map (Sec. 4.2): (B, M), or 1 for all alike.
_SELECTIONS: dict[str, Callable[["_Maps"], Tensor | float]] = {
    "random": lambda maps: 1.0,
    "ranked": lambda maps: maps.responses().clamp(min=0),
}
SELECTIONS = tuple(_SELECTIONS)

# Weights (B, M) of the maps in the structure map, from the distinct ones (B, M).
_REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda distinct: distinct / distinct.sum(1, keepdim=True),
    "sum": lambda distinct: distinct,  # the published code; the sampler sees no difference
    "mean_all": lambda distinct: torch.full_like(distinct, 1 / distinct.shape[1]),  # the paper's text
}
REDUCTIONS = tuple(_REDUCTIONS)


def trilinear_attention(
    features: Tensor,
    *,
    normalization: str = "spatial_relation",
    spatial_scale: float = 7.0,
    relation_scale: float = 1.0,
) -> Tensor:
    """Turn every channel of the features into an attention map, Eq. 2 and the other rows of Table 2.

    Args:
        features: X, (B, C, h, w).
        normalization: Row of Table 2: "features", "none", "spatial", "spatial_both", "output", "relation",
            "spatial_relation" (Eq. 2) or "self_attention".
        spatial_scale: Factor on the input of N(X). The paper has none; 7 is the published code's.
        relation_scale: Factor on the input of the outer N. 1 in paper and code; features trained from scratch on
            little data need about 10, else the rows of the relation are near uniform and all maps look alike.

    Returns:
        M, (B, C, h, w), or (B, hw, h, w) for "self_attention"; float32, or float64 for float64 features.

    Raises:
        ValueError: Unknown normalization, or features that are not 4-dimensional.
    """
    x = _as_matrix(features)
    maps = _Maps(x, normalization, spatial_scale, relation_scale)
    return maps.of(maps.rows).unflatten(-1, features.shape[-2:])


def structure_and_detail_maps(
    features: Tensor,
    *,
    normalization: str = "spatial_relation",
    spatial_scale: float = 7.0,
    relation_scale: float = 1.0,
    selection: str = "random",
    parts: int = 1,
    reduction: str = "mean",
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """The maps that guide the sampler: A(M), the average, and R(M), chosen single ones (Eq. 3), without building M.

    Both are taken over the distinct maps. Channels that do not respond anywhere in the image all give one and the same
    map; the published code means to count it once, but applies its mask in the wrong channel order (its author agrees,
    researchmm/tasn#3). Here it is counted once. The paper's text averages all maps: reduction="mean_all".

    Args:
        features: X, (B, C, h, w).
        normalization, spatial_scale, relation_scale: As in `trilinear_attention`.
        selection: How the detail maps are chosen among an image's distinct maps: "random", all alike (the paper), or
            "ranked", in proportion to their mean response (Sec. 4.2).
        parts: Number of detail maps per image, 0 to M: C, or hw for "self_attention". None comes twice as long as there
            are as many distinct maps. 0 draws no random numbers.
        reduction: Structure map as the "mean" or "sum" of the distinct maps, or as the mean of all ("mean_all").
        generator: Source of the random choice, on the device of the features. None: torch's global one.

    Returns:
        Structure map (B, h, w) and detail maps (B, parts, h, w), in the precision of `trilinear_attention`.
    """
    if selection not in _SELECTIONS:
        raise unknown("selection", selection, SELECTIONS)
    if reduction not in _REDUCTIONS:
        raise unknown("reduction", reduction, REDUCTIONS)
    x = _as_matrix(features)
    maps = _Maps(x, normalization, spatial_scale, relation_scale)
    count = maps.rows.shape[1]
    if not 0 <= parts <= count:
        raise UserError(f"parts is {parts}, but there are {count} maps: use at most as many.")
    distinct = _distinct_maps(x, normalization)  # (B, M)

    weights = _REDUCTIONS[reduction](distinct).unsqueeze(1)  # (B, 1, M)
    structure = sum(maps.weighted(maps.rows[:, block], weights[:, :, block]) for block in maps.blocks())  # (B, 1, hw)
    details = x[:, :0]
    if parts > 0:
        chance = _SELECTIONS[selection](maps) * distinct
        chosen = _draw(chance, parts, generator)[..., None]  # (B, parts, 1)
        details = maps.of(maps.rows.gather(1, chosen.expand(-1, -1, maps.rows.shape[2])))  # (B, parts, hw)
    structure, details = (each.unflatten(-1, features.shape[-2:]) for each in (structure, details))
    return structure[:, 0], details


class _Maps:
    """The attention maps of x (B, C, hw), for some of the `rows` (B, M, ·) that they are made of."""

    def __init__(self, x: Tensor, normalization: str, spatial_scale: float, relation_scale: float) -> None:
        if normalization not in _FORMULAS:
            raise unknown("normalization", normalization, NORMALIZATIONS)
        self.x = x
        self.rows = x.transpose(1, 2) if normalization == "self_attention" else x
        self.formula = _FORMULAS[normalization]
        self.spatial, self.relation = _softmax(spatial_scale), _softmax(relation_scale)

    def blocks(self) -> list[slice]:
        """The rows, `BLOCK` at a time. Not by torch.split, whose sizes ONNX's older exporter gets wrong."""
        return [slice(start, start + BLOCK) for start in range(0, self.rows.shape[1], BLOCK)]

    def of(self, rows: Tensor) -> Tensor:
        """Maps (B, r, hw) of rows (B, r, ·)."""
        maps = _product(self._factors(rows))
        return self.relation(maps) if self.formula.normalizes_maps else maps

    def weighted(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Sums (B, k, hw) of the maps of rows (B, r, ·) with weights (B, k, r)."""
        if self.formula.normalizes_maps:  # which stands between the maps and their sum
            return weights @ self.of(rows)
        return _product([weights, *self._factors(rows)])  # from the left: the maps are not built

    def responses(self) -> Tensor:
        """Mean of each map over its positions, before a softmax of it: (B, M)."""
        responses = []
        for block in self.blocks():
            *first, last = self._factors(self.rows[:, block])
            responses.append(_product([*first, last.mean(-1, keepdim=True)]))
        return torch.cat(responses, 1).squeeze(-1)

    def _factors(self, rows: Tensor) -> tuple[Tensor, ...]:
        return self.formula.factors(rows, self.x, self.spatial, self.relation)


@register_notrace_module
class TrilinearAttention(nn.Module):
    """`structure_and_detail_maps` with its settings, in full precision whatever autocast says, without gradient.

    The attention net learns from its own classifier alone, so the features are detached (the published code blocks the
    gradient at the same place).

    Args:
        normalization, spatial_scale, relation_scale: As in `trilinear_attention`.
        selection, reduction: As in `structure_and_detail_maps`. reduction="sum" is not taken: the sampler divides by
            the total, so it would give the images of "mean".
        parts: Number of detail maps in training mode; in evaluation mode there are none.

    Raises:
        ValueError: An unknown name, a scale that is not positive, or one that the formula does not have.
    """

    def __init__(
        self,
        normalization: str = "spatial_relation",
        spatial_scale: float = 7.0,
        relation_scale: float = 1.0,
        selection: str = "random",
        parts: int = 1,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        if normalization not in _FORMULAS:
            raise unknown("normalization", normalization, NORMALIZATIONS)
        if selection not in _SELECTIONS:
            raise unknown("selection", selection, SELECTIONS)
        if reduction not in _REDUCTIONS:
            raise unknown("reduction", reduction, REDUCTIONS)
        if reduction == "sum":
            raise UserError("reduction='sum' has no effect: the sampler divides by the total. Use 'mean'.")
        for name, scale in (("spatial_scale", spatial_scale), ("relation_scale", relation_scale)):
            if not 0 < scale < math.inf:
                raise UserError(f"{name} must be more than 0, got {scale}.")
        if normalization == "self_attention":  # all its maps count as distinct
            no_effect(structure_and_detail_maps, dict(reduction=reduction), f"{normalization=}")
        no_effect(
            trilinear_attention,
            dict(spatial_scale=spatial_scale, relation_scale=relation_scale),
            f"normalization={normalization!r}",
            except_for=_FORMULAS[normalization].scales,
        )
        self.normalization = normalization
        self.spatial_scale = spatial_scale
        self.relation_scale = relation_scale
        self.selection = selection
        self.parts = parts
        self.reduction = reduction

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        with no_autocast(features.device):
            return structure_and_detail_maps(
                features.detach(),
                normalization=self.normalization,
                spatial_scale=self.spatial_scale,
                relation_scale=self.relation_scale,
                selection=self.selection,
                parts=self.parts if self.training else 0,
                reduction=self.reduction,
            )

    def extra_repr(self) -> str:
        return (
            f"{self.normalization}, spatial_scale={self.spatial_scale}, relation_scale={self.relation_scale}, "
            f"selection={self.selection}, parts={self.parts}, reduction={self.reduction}"
        )


def _as_matrix(features: Tensor) -> Tensor:
    if features.ndim != 4:
        raise UserError(f"features must be (B, C, h, w), got {features.ndim} dimensions {tuple(features.shape)}.")
    return features.flatten(2).to(torch.promote_types(features.dtype, torch.float32))  # (B, C, hw)


def _softmax(scale: float) -> Norm:
    if scale == 1:  # one pass over the matrix less
        return lambda matrix: matrix.softmax(-1)
    return lambda matrix: (scale * matrix).softmax(-1)


def _product(matrices: Iterable[Tensor]) -> Tensor:
    return reduce(torch.matmul, matrices)


def _distinct_maps(x: Tensor, normalization: str) -> Tensor:
    """1 for maps that are counted, 0 for those that an earlier channel has already given: (B, M).

    Only channels without variation over the image repeat a map: those at the same level (after a ReLU: zero), and with
    N(X) all of them, as it makes them alike.
    """
    if normalization == "self_attention":
        return torch.ones_like(x[:, 0])  # one map per position, all counted
    level = x.amax(-1)  # (B, C)
    flat = level == x.amin(-1)
    if normalization.startswith("spatial"):
        repeats = flat.to(x).cumsum(1) > 1  # of booleans, ONNX has no sum
    else:
        same_level = level[:, :, None] == level[:, None, :]  # (B, C, C)
        repeats = (same_level & flat[:, None, :]).tril(-1).any(-1)
    return (~(flat & repeats)).to(x)


def _draw(weights: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """Draw `count` indices a row without repetition, in proportion to the weights: (B, count).

    Exponential races: the largest weight / Exp(1) wins with the wanted probability. Unlike torch.multinomial this needs
    no check of the weights on the host, so the device is never waited for.
    """
    # Not torch.rand(..., generator=generator), of which torch.compile takes no dynamic shapes.
    race = -torch.empty_like(weights).uniform_(generator=generator).log()
    return (weights / race).topk(count, dim=1).indices
