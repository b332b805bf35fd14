"""From a photograph to the model's input: uint8 pixels here, coloured and normalised on the device by `Normalize`.

Turning a picture is one sampling in float of no more than the crop, and all changes of its colours, as they are linear,
one matrix per picture, which the device applies together with the normalisation.
"""

import math
import re
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import InterpolationMode, v2

from ..errors import UserError

# Picture, as `decode` returns it -> (pixels (3, H, W) uint8,) or (pixels, colours (3, 4)): what `Normalize` takes, in
# batches.
Transform = Callable[[Image.Image | np.ndarray], tuple[Tensor, ...]]

LUMA = torch.tensor([0.299, 0.587, 0.114])  # grey value of a colour, as Pillow's and MXNet's

# How the colours of ImageNet's pixels, 0 to 255, vary: principal axes (columns) and standard deviations along them, as
# MXNet has them, which the published code is trained with.
PCA_AXES = torch.tensor([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
PCA_SCALES = torch.tensor([55.46, 4.794, 1.148])

RAND_AUGMENT = re.compile(r"rand(-(m(\d(\.\d+)?|10)|n[1-9]|mstd\d+(\.\d+)?|mmax([1-9]|10)|inc[01]|w0))+")
ERASED = (124, 116, 104)  # mean colour of ImageNet
ERASED_SHARE = (0.02, 1 / 3)  # of the picture, as timm's


def train_transform(
    img_size: int,
    resize: int | None = None,
    crop_padding: int = 0,
    hflip: float = 0.5,
    degrees: float = 0.0,
    color_jitter: float = 0.0,
    pca_noise: float = 0.0,
    aa: str | None = None,
    reprob: float = 0.0,
) -> Transform:
    """Resize the short side, rotate, crop at random, flip, change colours, erase.

    All randomness is torch's but that of `aa`, which is Python's and NumPy's.

    Args:
        img_size: Side of the result in pixels.
        resize: Short side before the crop; None for img_size.
        crop_padding: Pixels of mirrored border around the image before rotation and crop.
        hflip: Probability of a flip.
        degrees: Largest rotation, of the whole resized picture; its corners become white, as in the published code.
        color_jitter: Largest relative change of brightness, contrast and saturation.
        pca_noise: Standard deviation of AlexNet's colour shift along each axis, relative to the colours' own.
        aa: RandAugment as timm writes it, e.g. "rand-m9-mstd0.5-inc1".
        reprob: Probability that a rectangle of 2 to 33 % of the picture is erased: filled with ImageNet's mean colour.

    Returns:
        Picture -> (pixels (3, img_size, img_size) uint8,), with color_jitter or pca_noise also colours (3, 4).

    Raises:
        UserError: aa is not one of timm's RandAugment.
    """
    steps = [
        v2.ToImage(),
        v2.ToPureTensor(),
        _resize(resize or img_size),
        v2.Pad(crop_padding, padding_mode="reflect") if crop_padding else None,
        RotatedCrop(img_size, degrees) if degrees else v2.RandomCrop(img_size),
        v2.RandomHorizontalFlip(hflip) if hflip else None,
        _rand_augment(aa, img_size) if aa else None,
        v2.RandomErasing(reprob, scale=ERASED_SHARE, value=list(ERASED)) if reprob else None,
        RandomColors(color_jitter, pca_noise) if color_jitter or pca_noise else _alone,
    ]
    return v2.Compose([step for step in steps if step is not None])


def eval_transform(img_size: int, resize: int | None = None) -> Transform:
    """Resize the short side and crop the centre: PIL image -> (pixels (3, img_size, img_size) uint8,).

    Pillow resizes, as in timm's own transforms, so that both evaluate the same pixels.
    """
    return v2.Compose([_resize(resize or img_size), v2.CenterCrop(img_size), v2.PILToTensor(), _alone])


class RotatedCrop(nn.Module):
    """Rotate a picture about its centre by a random angle and take a random crop of its own frame, in one step.

    Only the crop is computed, bilinearly in float. Outside of the picture is white.

    Args:
        size: Side of the crop in pixels.
        degrees: Largest angle.
    """

    def __init__(self, size: int, degrees: float) -> None:
        super().__init__()
        self.size = size
        self.degrees = degrees

    def forward(self, image: Tensor) -> Tensor:
        """(3, h, w) uint8, at least as large as the crop -> (3, size, size) uint8."""
        height, width = image.shape[1:]
        angle = math.radians(self.degrees) * (2 * torch.rand(()).item() - 1)
        top = torch.randint(height - self.size + 1, ()).item()
        left = torch.randint(width - self.size + 1, ()).item()
        # Pixel centres of the crop, from the picture's centre; then where they were before the rotation.
        x = torch.arange(self.size) + (left + 0.5 - width / 2)
        y = torch.arange(self.size)[:, None] + (top + 0.5 - height / 2)
        cos, sin = math.cos(angle), math.sin(angle)
        grid = torch.empty(1, self.size, self.size, 2)
        torch.sub(cos * 2 / width * x, sin * 2 / width * y, out=grid[0, ..., 0])
        torch.add(sin * 2 / height * x, cos * 2 / height * y, out=grid[0, ..., 1])
        # Zeros outside of the picture become 255.
        turned = F.grid_sample(image[None].float().sub_(255), grid, padding_mode="zeros", align_corners=False)
        return turned[0].add_(255.5).to(torch.uint8)


class RandomColors(nn.Module):
    """Draw changes of a picture's colours; `Normalize` makes them, in float.

    Brightness, contrast and saturation in random order, then PCA noise (AlexNet, Sec. 4.1). Each is a linear map of the
    colours, with the mean of the picture's grey values in contrast's, so all together are one matrix. Nothing is
    rounded or clipped in between, as in the published code (MXNet); torchvision clips after each.

    Args:
        jitter: Largest relative change of brightness, contrast and saturation.
        pca_noise: Standard deviation of the shift along each axis, relative to the colours' own.
    """

    def __init__(self, jitter: float, pca_noise: float) -> None:
        super().__init__()
        self.jitter = jitter
        self.pca_noise = pca_noise

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(3, H, W) uint8 -> the same and the colours' map (3, 4): matrix and, in the last column, shift (0 to 255)."""
        matrix, shift = torch.eye(3), torch.zeros(3)
        if self.jitter:
            mean = image.flatten(1).float().mean(1)
            order = torch.randperm(3).tolist()
            factors = (1 + self.jitter * (2 * torch.rand(3) - 1)).clamp(min=0).tolist()
            for change in order:
                matrix, shift = _JITTERS[change](factors[change], matrix, shift, mean)
        if self.pca_noise:
            shift = shift + PCA_AXES @ (self.pca_noise * torch.randn(3) * PCA_SCALES)
        return image, torch.cat([matrix, shift[:, None]], 1)


def _brighten(factor: float, matrix: Tensor, shift: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    return factor * matrix, factor * shift


def _change_contrast(factor: float, matrix: Tensor, shift: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    grey = LUMA @ (matrix @ mean + shift)  # of the picture as it is by now
    return factor * matrix, factor * shift + (1 - factor) * grey


def _saturate(factor: float, matrix: Tensor, shift: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    saturation = factor * torch.eye(3) + (1 - factor) * LUMA.expand(3, 3)
    return saturation @ matrix, saturation @ shift


_JITTERS = (_brighten, _change_contrast, _saturate)


class Normalize(nn.Module):
    """uint8 images (B, 3, H, W), recoloured where that was drawn, -> float images as the model wants them.

    On the images' device.

    Args:
        mean, std: Of the model's pretrained_cfg, for pixels in [0, 1].
        keep_pixels: Leave images without colours as they are, for a model that normalises them itself, where they are
            fewer (`TASN`).
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], keep_pixels: bool = False) -> None:
        super().__init__()
        self.keep_pixels = keep_pixels
        self.register_buffer("mean", 255 * torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Sequence[Tensor]) -> Tensor:
        """(pixels (B, 3, H, W),) or (pixels, colours (B, 3, 4)) -> (B, 3, H, W)."""
        pixels, *colours = images
        if not colours and self.keep_pixels:
            return pixels
        if not colours:
            return pixels.float().sub_(self.mean).div_(self.std)
        scale, mean = 1 / self.std.flatten(2), self.mean.flatten(2)  # (1, 3, 1)
        matrix, shift = colours[0].split([3, 1], 2)
        flat = torch.baddbmm((shift - mean) * scale, matrix * scale, pixels.flatten(2).float())  # (B, 3, HW)
        black, white = -mean * scale, (255 - mean) * scale
        # clamp_, which says the same, takes three times as long with bounds that are tensors.
        torch.minimum(torch.maximum(flat, black, out=flat), white, out=flat)
        return flat.view(pixels.shape)


def _alone(pixels: Tensor) -> tuple[Tensor]:
    return (pixels,)


def _resize(short_side: int) -> v2.Transform:
    return v2.Resize(short_side, InterpolationMode.BICUBIC, antialias=True)


def _rand_augment(aa: str, img_size: int) -> Callable[[Tensor], Tensor]:
    """timm's RandAugment, which takes PIL images, with what timm's transforms give it."""
    if not RAND_AUGMENT.fullmatch(aa) or "-m" not in aa:  # timm would pass over most of what it cannot read
        raise UserError(
            f"aa must be timm's RandAugment with a magnitude of 0 to 10, such as rand-m9-mstd0.5-inc1, got {aa!r}."
        )
    augment = rand_augment_transform(aa, dict(translate_const=int(img_size * 0.45), img_mean=ERASED))
    return v2.Compose([v2.ToPILImage(), augment, v2.PILToTensor()])
