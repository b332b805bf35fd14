"""From a photograph to the model's input: uint8 tensors here, normalised on the device by `Normalize`."""

from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2

Transform = Callable[[Image.Image], Tensor]

# How the colours of ImageNet's pixels, 0 to 255, vary: principal axes (columns) and standard deviations along them, as
# MXNet has them, which the published code is trained with.
PCA_AXES = torch.tensor([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
PCA_SCALES = torch.tensor([55.46, 4.794, 1.148])


def train_transform(
    img_size: int,
    resize: int | None = None,
    crop_padding: int = 0,
    hflip: float = 0.5,
    degrees: float = 0.0,
    color_jitter: float = 0.0,
    pca_noise: float = 0.0,
) -> Transform:
    """Resize the short side, rotate, crop at random, flip, change colours; all randomness is torch's.

    Args:
        img_size: Side of the result in pixels.
        resize: Short side before the crop; None for img_size.
        crop_padding: Pixels of mirrored border around the image before the crop.
        hflip: Probability of a flip.
        degrees: Largest rotation, of the whole resized picture; its corners become white, as in the published code.
        color_jitter: Largest relative change of brightness, contrast and saturation.
        pca_noise: Standard deviation of `PCANoise`.

    Returns:
        RGB image -> (3, img_size, img_size), uint8.
    """
    steps = [
        _resize(resize or img_size),
        v2.RandomRotation(degrees, InterpolationMode.BILINEAR, fill=255) if degrees else None,
        v2.Pad(crop_padding, padding_mode="reflect") if crop_padding else None,
        v2.RandomCrop(img_size),
        v2.RandomHorizontalFlip(hflip) if hflip else None,
        v2.ColorJitter(color_jitter, color_jitter, color_jitter) if color_jitter else None,
        v2.PILToTensor(),
        PCANoise(pca_noise) if pca_noise else None,
    ]
    return v2.Compose([step for step in steps if step is not None])


def eval_transform(img_size: int, resize: int | None = None) -> Transform:
    """Resize the short side and crop the centre: RGB image -> (3, img_size, img_size), uint8."""
    return v2.Compose([_resize(resize or img_size), v2.CenterCrop(img_size), v2.PILToTensor()])


class PCANoise(nn.Module):
    """Shift all pixels of a picture by one colour, along the axes in which colours vary (AlexNet, Sec. 4.1).

    Args:
        std: Standard deviation of the shift along each axis, relative to the colours' own.
    """

    def __init__(self, std: float) -> None:
        super().__init__()
        self.std = std

    def forward(self, image: Tensor) -> Tensor:
        shift = PCA_AXES @ (self.std * torch.randn(3) * PCA_SCALES)  # one number a channel
        return (image + shift.view(3, 1, 1)).round().clamp(0, 255).to(torch.uint8)  # (3, H, W)


class Normalize(nn.Module):
    """uint8 images (B, 3, H, W) -> float images as the model wants them, on their device.

    Args:
        mean, std: Of the model's pretrained_cfg, for pixels in [0, 1].
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", 255 * torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


def _resize(short_side: int) -> v2.Transform:
    return v2.Resize(short_side, InterpolationMode.BICUBIC, antialias=True)
