"""Trilinear attention: features X become attention maps M (Sec. 3.1, Eqs. 1-2, Table 2).

Every formula of Table 2 has the form M = R(X) X: row i of R(X) says how much each channel contributes to map i.
The sampler needs only the average of the maps and a few single ones, and both are rows of R(X) (or their average)
times X. So `structure_and_detail_maps` picks rows first and never builds the C maps.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn

from .errors import UserError, no_effect, unknown
from .precision import no_autocast

Norm = Callable[[Tensor], Tensor]


class _Formula(NamedTuple):
    relation: Callable[[Tensor, Norm, Norm], Tensor]  # R(X)
    scales: tuple[str, ...] = ()  # of its softmaxes


# The rows of Table 2, in its order, with the paper's accuracy on CUB-200-2011.  x is X as (B, C, hw); spatial and
# relation are the two softmaxes N, over the second dimension of a matrix, each with its scale.  Not x.mT, which
# torch.onnx's older exporter does not know.
_FORMULAS = {
    "features": _Formula(  # X: 83.5
        lambda x, spatial, relation: torch.eye(x.shape[1], device=x.device, dtype=x.dtype).expand(len(x), -1, -1)
    ),
    "none": _Formula(lambda x, spatial, relation: x @ x.transpose(1, 2)),  # X X^T X, Eq. 1: 84.9
    "spatial": _Formula(  # N(X) X^T X: 85.2
        lambda x, spatial, relation: spatial(x) @ x.transpose(1, 2), ("spatial_scale",)
    ),
    "spatial_both": _Formula(  # N(X) N(X)^T X: 84.3
        lambda x, spatial, relation: spatial(x) @ spatial(x).transpose(1, 2), ("spatial_scale",)
    ),
    "output": _Formula(  # N(X X^T X), N taken of the finished maps: 84.5
        lambda x, spatial, relation: x @ x.transpose(1, 2), ("relation_scale",)
    ),
    "relation": _Formula(  # N(X X^T) X: 85.0
        lambda x, spatial, relation: relation(x @ x.transpose(1, 2)), ("relation_scale",)
    ),
    "spatial_relation": _Formula(  # N(N(X) X^T) X, Eq. 2: 85.3
        lambda x, spatial, relation: relation(spatial(x) @ x.transpose(1, 2)), ("spatial_scale", "relation_scale")
    ),
    "self_attention": _Formula(  # X^T X: hw maps, one per position (Sec. 4.2): 0.7 below Eq. 2
        lambda x, spatial, relation: x.transpose(1, 2)
    ),
}
NORMALIZATIONS = tuple(_FORMULAS)

# How likely a map is to be chosen as the detail map (Sec. 4.2), from its mean response (B, M).
_SELECTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "random": torch.ones_like,
    "ranked": lambda response: response.clamp(min=0),
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
    maps = _relation(x, normalization, spatial_scale, relation_scale) @ x
    if normalization == "output":
        maps = _softmax(relation_scale)(maps)
    return maps.unflatten(-1, features.shape[-2:])


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
    relation = _relation(x, normalization, spatial_scale, relation_scale)  # (B, M, C)
    if not 0 <= parts <= relation.shape[1]:
        raise UserError(f"parts is {parts}, but there are {relation.shape[1]} maps: use at most as many.")
    distinct = _distinct_maps(x, normalization)  # (B, M)

    rows = _REDUCTIONS[reduction](distinct).unsqueeze(1)  # (B, 1, M)
    if parts > 0:
        response = (relation @ x.mean(-1, keepdim=True)).squeeze(-1)  # (B, M)
        chosen = _draw(_SELECTIONS[selection](response) * distinct, parts, generator)  # (B, parts)
        rows = torch.cat([rows, nn.functional.one_hot(chosen, relation.shape[1]).to(rows)], dim=1)

    if normalization == "output":  # its softmax stands between the maps and their average
        maps = rows @ _softmax(relation_scale)(relation @ x)
    else:
        maps = rows @ relation @ x  # (B, 1 + parts, hw)
    maps = maps.unflatten(-1, features.shape[-2:])
    return maps[:, 0], maps[:, 1:]


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
    return lambda matrix: (scale * matrix).softmax(-1)


def _relation(x: Tensor, normalization: str, spatial_scale: float, relation_scale: float) -> Tensor:
    if normalization not in _FORMULAS:
        raise unknown("normalization", normalization, NORMALIZATIONS)
    return _FORMULAS[normalization].relation(x, _softmax(spatial_scale), _softmax(relation_scale))


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
        level = torch.zeros_like(level)
    same = flat[:, :, None] & flat[:, None, :] & (level[:, :, None] == level[:, None, :])
    return (~same.tril(-1).any(-1)).to(x)


def _draw(weights: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """Draw `count` indices a row without repetition, in proportion to the weights: (B, count).

    Exponential races: the largest weight / Exp(1) wins with the wanted probability. Unlike torch.multinomial this needs
    no check of the weights on the host, so the device is never waited for.
    """
    # Not torch.rand(..., generator=generator), of which torch.compile takes no dynamic shapes.
    race = -torch.empty_like(weights).uniform_(generator=generator).log()
    return (weights / race).topk(count, dim=1).indices
