"""Pictures of what a TASN looks at."""

import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor
from torch.nn import functional as F

from .attention_sampler import shape_map
from .errors import UserError
from .tasn import TASN

GAP = 8  # pixels between panels


@torch.inference_mode()
def attention_panels(model: TASN, picture: Image.Image, side: int = 256) -> Image.Image:
    """Draw a picture, the structure map over it, and the structure-preserved image that the backbone sees (Fig. 2).

    Args:
        model: In evaluation mode, on the CPU.
        picture: RGB; cropped and resized as for a prediction.
        side: Height of the panels in pixels.

    Raises:
        UserError: The model has other channels than a picture's three.
    """
    if model.in_chans != 3:
        raise UserError(f"a model of {model.in_chans} channels has no picture to be drawn: it must have 3.")
    config = resolve_model_data_config(model)
    image = create_transform(**config)(picture)[None]  # (1, 3, H, W)
    structure_map, _ = model.trilinear_attention(model.attention_features(image))  # (1, h, w)
    shaped = shape_map(structure_map, model.structure_sampler.shape)[:, None]
    attention = F.interpolate(shaped / shaped.amax().clamp(min=1e-12), image.shape[-2:], mode="bilinear").clamp(0, 1)
    mean, std = (torch.tensor(config[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    pixels = (image * std + mean).clamp(0, 1)
    sampled = (model.structure_sampler(image, structure_map) * std + mean).clamp(0, 1)
    orange = torch.tensor([1.0, 0.45, 0.0]).view(1, 3, 1, 1)
    overlaid = pixels.mean(1, keepdim=True) * (1 - 0.7 * attention) + orange * 0.7 * attention
    panels = [_resized(panel, side) for panel in (pixels, overlaid, sampled)]
    sheet = Image.new("RGB", (sum(panel.width for panel in panels) + 2 * GAP, side), "white")
    left = 0
    for panel in panels:
        sheet.paste(panel, (left, 0))
        left += panel.width + GAP
    return sheet


def _resized(image: Tensor, side: int) -> Image.Image:
    """(1, 3, H, W) with values 0 to 1 -> a picture of that height, pixels of a small one left visible."""
    picture = Image.fromarray((255 * image[0]).round().byte().movedim(0, 2).numpy())
    size = (round(picture.width * side / picture.height), side)
    return picture.resize(size, Image.Resampling.NEAREST if picture.height < side else Image.Resampling.LANCZOS)
