"""What a TASN sees of a photograph: its maps, the sampled images, and where in the photograph they look (Fig. 2)."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

from .attention_sampler import AttentionSampler, shape_map
from .back_projection import magnification, sampled_to_image
from .errors import UserError
from .tasn import TASN
from .trilinear_attention import TrilinearAttention, trilinear_attention

DETAILS = 4  # in pictures of what a model sees


@dataclass
class View:
    """One sampled image, on the CPU.

    Args:
        attention: The map that guides the sampler, shaped as it takes it: (h, w), 0 to 1, its highest value.
        grid: Where each pixel looks, (H', W', 2), see `attention_grid`.
        pixels: (3, H', W'), 0 to 1.
    """

    attention: Tensor
    grid: Tensor
    pixels: Tensor

    def enlarged(self) -> tuple[int, int, int, int]:
        """The smallest box around all that appears larger than in a plain resize: left, top, right, bottom, in pixels.

        All of the sampled image where nothing does.
        """
        zoom = magnification(self.grid[None])[0]  # (H', W', 2)
        left, right = _ends(zoom[..., 0].mean(0) > 1.001)  # rounding apart
        top, bottom = _ends(zoom[..., 1].mean(1) > 1.001)
        return left, top, right, bottom


@dataclass
class Gaze:
    """What a model sees of one photograph, on the CPU.

    Args:
        photo: RGB, as given.
        crop: What of the photo the model's input shows: left, top, right, bottom, in pixels of the photo. Outside of it
            where the input has borders (crop_mode "border").
        pixels: The model's input, (3, H, W), 0 to 1.
        features: X, (C, h, w).
        structure: What the backbone sees.
        details: What its part net was trained on. The paper takes maps at random, of which many are alike; here come
            the image sampled by the strongest map, then those of strong maps that are unlike all before: the highest
            product of mean response and distance (L1, of the maps' shares of their sums). As many as were asked for, or
            as differ; none for a model that was not trained on details, see `no_details`.
        probabilities: Of the classes, (K,).
    """

    photo: Image.Image
    crop: tuple[float, float, float, float]
    pixels: Tensor
    features: Tensor
    structure: View
    details: list[View]
    probabilities: Tensor

    def in_photo(self, positions: Tensor, view: View) -> Tensor:
        """Where in the photo something is that was seen in a sampled image.

        Args:
            positions: (N, 2) in pixels of the sampled image, see `sampled_to_image`.
            view: The sampled image.

        Returns:
            (N, 2) in pixels of the photo.
        """
        height, width = self.pixels.shape[1:]
        positions = sampled_to_image(positions[None], view.grid[None], (height, width))[0]
        left, top, right, bottom = self.crop
        scale = torch.tensor([(right - left) / width, (bottom - top) / height])
        return positions * scale + torch.tensor([left, top])

    def outline(self, view: View) -> Tensor:
        """Where in the photo the enlarged part of a sampled image is: (N, 2), a closed line, which may be bent."""
        left, top, right, bottom = view.enlarged()
        corners = torch.tensor([(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]).float()
        t = torch.linspace(0, 1, 33)[:, None]
        line = torch.cat([torch.lerp(start, end, t) for start, end in pairwise(corners)])
        return self.in_photo(line, view)


@torch.inference_mode()
def look(model: nn.Module, photo: Image.Image, *, details: int = DETAILS, max_zoom: float | None = None) -> Gaze:
    """Let a model look at a photograph.

    The model is not changed, so several threads may share it.

    Args:
        model: TASN in evaluation mode.
        photo: RGB; cropped and resized as for a prediction.
        details: Number of detail images, at most; 0 for none.
        max_zoom: Another cap of the magnification than the model's own, see `attention_grid`; 0 for no cap.

    Raises:
        UserError: Not a TASN, or one of other channels than a picture's three; or a cap that its sampler does not have.
    """
    check(model)
    config = resolve_model_data_config(model)
    image, crop = _model_input(photo, config)
    image = image.to(next(model.parameters()).device)
    structure_sampler, detail_sampler = (
        sampler if max_zoom is None else _with_cap(sampler, max_zoom)
        for sampler in (model.structure_sampler, model.detail_sampler)
    )
    features = model.attention_features(image)  # X: (1, C, h, w)
    structure_map, _ = model.trilinear_attention(features)
    logits = model.heads(model.embed(model.normalized(structure_sampler(image, structure_map), image)))
    pixels = image[0] / 255  # (3, H, W)
    chosen = []
    if details and not no_details(model):
        maps = channel_maps(model.trilinear_attention, features)[0].nan_to_num().clamp(min=0)
        chosen = maps[_most_different(maps, details)]
    return Gaze(
        photo=photo,
        crop=crop,
        pixels=pixels.cpu(),
        features=features[0].float().cpu(),
        structure=_view(structure_sampler, structure_map, pixels),
        details=[_view(detail_sampler, one[None], pixels) for one in chosen],
        probabilities=logits[0].float().softmax(0).cpu(),
    )


def check(model: nn.Module) -> None:
    """Check that a model looks at pictures in a way that can be shown.

    Raises:
        UserError: It is no TASN, or has other channels than a picture's three.
    """
    if not isinstance(model, TASN):
        name = getattr(model, "pretrained_cfg", {}).get("architecture", type(model).__name__)
        raise UserError(f"{name} has no attention to show: give a TASN, such as tasn_tiny or a folder of training.")
    if model.in_chans != 3:
        raise UserError(f"a model of {model.in_chans} channels has no picture to be drawn: it must have 3.")


def no_details(model: TASN) -> str | None:
    """Why there are no detail images to show of a model; None where there are."""
    if not model.part_net:
        return "it was trained without a part net"
    if model.detail_control is not None:
        return f"its part net was trained on something else in their place (detail_control={model.detail_control!r})"
    return None


def channel_maps(settings: TrilinearAttention, features: Tensor) -> Tensor:
    """All maps M (B, M, h, w) of features X with a model's settings, see `trilinear_attention`."""
    return trilinear_attention(
        features,
        normalization=settings.normalization,
        spatial_scale=settings.spatial_scale,
        relation_scale=settings.relation_scale,
    )


def to_unit(attention: Tensor) -> Tensor:
    """A map (h, w) from 0 to its highest value, as 0 to 1; without any mass 0."""
    attention = attention.nan_to_num().clamp(min=0)
    return attention / attention.amax().clamp(min=torch.finfo(attention.dtype).tiny)


def _model_input(photo: Image.Image, config: dict) -> tuple[Tensor, tuple[float, float, float, float]]:
    """The model's input (1, 3, H, W), uint8, and what of the photo it shows."""
    resize, *others = create_transform(**config, use_prefetcher=True).transforms
    resized = resize(photo)
    image = resized
    for transform in others:
        image = transform(image)
    height, width = image.shape[1:]
    left, top = _margin(resized.width - width), _margin(resized.height - height)
    across, down = photo.width / resized.width, photo.height / resized.height
    return image[None], (left * across, top * down, (left + width) * across, (top + height) * down)


def _margin(excess: int) -> int:
    """What timm's centre crop cuts off before the crop, of that many pixels in all; less than 0 where it adds some."""
    return round(excess / 2) if excess >= 0 else -(-excess // 2)


def _with_cap(sampler: AttentionSampler, max_zoom: float) -> AttentionSampler:
    """The same sampler with another cap; 0 for none."""
    if not sampler.has_cap:
        how = f"sampler={sampler.sampler!r}" if sampler.sampler != "attention" else "iterations=0"
        raise UserError(f"max_zoom={max_zoom} has no effect on a model with {how}: leave it out.")
    names = ("shape", "iterations", "marginal", "sampler", "sigma", "threshold")
    settings = {name: getattr(sampler, name) for name in names}
    return AttentionSampler(sampler.output_size, max_zoom=max_zoom or None, **settings)


def _view(sampler: AttentionSampler, attention: Tensor, pixels: Tensor) -> View:
    """What a sampler makes of pixels (3, H, W) with a map (1, h, w)."""
    return View(
        attention=to_unit(shape_map(attention, sampler.shape)[0]).cpu(),
        grid=sampler.grid(attention, tuple(pixels.shape[1:]))[0].cpu(),
        pixels=sampler(pixels[None], attention)[0].cpu(),
    )


def _most_different(maps: Tensor, count: int) -> list[int]:
    """Numbers of maps (M, h, w): the strongest, then strong ones that are unlike all before, as long as any differs."""
    strength = maps.sum((1, 2))
    shares = maps.flatten(1) / strength.clamp(min=torch.finfo(maps.dtype).tiny)[:, None]  # (M, hw)
    chosen = [int(strength.argmax())]
    distance = torch.where(strength > 0, torch.inf, 0.0)  # of each map to the nearest one chosen
    while len(chosen) < count:
        distance = distance.minimum((shares - shares[chosen[-1]]).abs().sum(1))
        if distance.max() < 1e-4:
            break
        chosen.append(int((distance * strength).argmax()))
    return chosen


def _ends(inside: Tensor) -> tuple[int, int]:
    """Where the pixels (n,) that are inside begin and end; all of them where none is."""
    numbers = inside.nonzero()
    return (int(numbers[0]), int(numbers[-1]) + 1) if len(numbers) else (0, len(inside))
