"""Pictures of what a TASN looks at, without a plotting library: for cards and the demo."""

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

from .gaze import Gaze, look
from .tasn import TASN

GAP = 8  # pixels between panels
FRAME = "#ffd43b"
LOW, HIGH = torch.tensor([[0.85, 0.2, 0.05], [1.0, 0.8, 0.2]])  # colours of a little and of all attention


def attention_panels(model: TASN, picture: Image.Image, side: int = 256) -> Image.Image:
    """Draw a picture, the structure map over it, and the structure-preserved image that the backbone sees (Fig. 2).

    Args:
        model: In evaluation mode.
        picture: RGB; cropped and resized as for a prediction.
        side: Height of the panels in pixels.

    Raises:
        UserError: The model is no TASN, or has other channels than a picture's three.
    """
    gaze = look(model, picture, details=0)
    return side_by_side([to_picture(tensor, side) for tensor in panels(gaze)])


def panels(gaze: Gaze) -> tuple[Tensor, Tensor, Tensor]:
    """The model's input, the structure map over it, and the structure-preserved image: (3, H, W) each, 0 to 1."""
    return gaze.pixels, overlaid(gaze.pixels, gaze.structure.attention), gaze.structure.pixels


def overlaid(pixels: Tensor, attention: Tensor) -> Tensor:
    """Lay a map over a picture, which loses its colours.

    Args:
        pixels: (3, H, W), 0 to 1.
        attention: (h, w), 0 to 1.

    Returns:
        (3, H, W), 0 to 1.
    """
    strength = F.interpolate(attention[None, None], pixels.shape[1:], mode="bilinear")[0]  # (1, H, W)
    grey = pixels.mean(0, keepdim=True)
    colour = torch.lerp(LOW.view(3, 1, 1), HIGH.view(3, 1, 1), strength)
    return torch.lerp(0.8 * grey.expand(3, -1, -1), colour * (0.35 + 0.65 * grey), strength)


def framed(photo: Image.Image, line: Tensor) -> Image.Image:
    """Draw a closed line (N, 2), in pixels, on a copy of a photograph."""
    picture = photo.copy()
    last = torch.tensor(picture.size) - 1.0
    points = [tuple(point) for point in line.clamp(min=torch.zeros(2), max=last).tolist()]
    draw = ImageDraw.Draw(picture)
    for width, colour in ((5, "black"), (3, FRAME)):  # seen on any ground
        draw.line(points, fill=colour, width=width, joint="curve")
    return picture


def to_picture(pixels: Tensor, height: int) -> Image.Image:
    """(3, H, W) with values 0 to 1 -> a picture of that height, pixels of a small one left visible."""
    picture = Image.fromarray((255 * pixels).round().byte().movedim(0, 2).numpy())
    size = (round(picture.width * height / picture.height), height)
    return picture.resize(size, Image.Resampling.NEAREST if picture.height < height else Image.Resampling.LANCZOS)


def side_by_side(pictures: list[Image.Image]) -> Image.Image:
    """Pictures in a row, on white."""
    height = max(picture.height for picture in pictures)
    sheet = Image.new("RGB", (sum(picture.width for picture in pictures) + GAP * (len(pictures) - 1), height), "white")
    left = 0
    for picture in pictures:
        sheet.paste(picture, (left, (height - picture.height) // 2))
        left += picture.width + GAP
    return sheet
