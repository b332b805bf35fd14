"""Pictures of filled polygons, the same to the last bit on every machine: what synthbirds are painted with.

Shapes are filled by our own few lines, pixels are only added and multiplied, and from Pillow come resizing and pasting,
which have not changed between versions 10 and 13.
"""

import colorsys
import math

import numpy as np
from PIL import Image

SIZE = 192  # height and width of a drawing, in units; pixels, unless a picture has finer ones
CIRCLE = np.array([(math.cos(a), math.sin(a)) for a in np.arange(24) * (math.pi / 12)])

Colour = tuple[int, int, int]
Shape = tuple[np.ndarray, Colour]  # corners (n, 2) of a closed polygon, x then y, and what fills it


def paint(image: Image.Image, shapes: list[Shape], scale: int) -> None:
    """Fill the shapes one over the other, with edges smoothed by averaging scale x scale subpixels.

    Args:
        image: Of `SIZE` x `SIZE` pixels, or of more, for which the shapes are enlarged.
        shapes: In pixels of `SIZE` x `SIZE`.
        scale: Subpixels along a side.
    """
    zoom = image.width / SIZE
    shapes = [(points * zoom, colour) for points, colour in shapes]
    corners = np.concatenate([points for points, _ in shapes])
    left, top = np.maximum(np.floor(corners.min(0)), 0).astype(int)
    right, bottom = np.minimum(np.ceil(corners.max(0)), image.width).astype(int)
    patch = image.crop((left, top, right, bottom))
    patch = np.array(patch.resize((patch.width * scale, patch.height * scale), Image.Resampling.NEAREST))
    pixel, shape = _inside([(points - (left, top)) * scale for points, _ in shapes], *patch.shape[:2])
    patch.reshape(-1, 3)[pixel] = np.array([colour for _, colour in shapes], np.uint8).take(shape, 0)
    image.paste(Image.fromarray(patch).reduce(scale), (left, top))


def _inside(polygons: list[np.ndarray], height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Find the pixels whose centres lie inside polygons (even-odd rule), polygon by polygon.

    ImageDraw would do, but fills sharp corners differently from one version of Pillow to the next, and draws too wide.

    Args:
        polygons: Corners (n, 2) of each, x then y, in pixels.
        height: Rows; what lies outside the image is left out.
        width: Columns.

    Returns:
        Indices of pixels in the flattened image, and for each the index of its polygon.
    """
    sizes = np.array([len(polygon) for polygon in polygons])
    following = np.arange(1, sizes.sum() + 1)
    following[sizes.cumsum() - 1] -= sizes  # the last corner is joined to the first
    x, y = np.concatenate(polygons).T
    run, rise = x[following] - x, y[following] - y
    # Rows of pixel centres that each edge crosses, and the first column right of the crossing.
    y_range = np.ceil(np.sort([y, y[following]], axis=0) - 0.5).astype(int).clip(0, height)
    edge, row = _ranges(*y_range)
    crossing = x[edge] + (row + 0.5 - y[edge]) * run[edge] / rise[edge]
    column = np.ceil(crossing - 0.5).astype(int).clip(0, width)
    # In the order of polygon, row and column, crossings pair up to the two ends of a span.
    polygon = np.arange(len(polygons)).repeat(sizes)[edge]
    line, column = np.divmod(np.sort((polygon * height + row) * (width + 1) + column), width + 1)
    span, column = _ranges(column[::2], column[1::2])
    polygon, row = np.divmod(line[::2][span], height)
    return row * width + column, polygon


def _ranges(start: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All whole numbers from start[i] to stop[i] - 1, for one i after the other: (i, number)."""
    lengths = stop - start
    which = np.arange(len(lengths)).repeat(lengths)
    return which, np.arange(len(which)) + (start - lengths.cumsum() + lengths)[which]


def photograph(rng: np.random.Generator, image: Image.Image) -> np.ndarray:
    """Uneven light, exposure, white balance, contrast and sensor noise; uint8 (size, size, 3)."""
    size = image.width
    ramp = np.linspace(-1, 1, size, dtype=np.float32)
    across, down = rng.normal(0, 0.12, 2).astype(np.float32)
    light = 1 + across * ramp.repeat(3) + down * ramp[:, None]  # (size, 3 size): colours side by side are quicker
    contrast = rng.uniform(0.8, 1.15)
    gain = rng.uniform(0.75, 1.15) * contrast * rng.normal(1, 0.04, 3).astype(np.float32)
    pixels = rng.standard_normal(light.shape, np.float32) * np.float32(rng.uniform(1, 5))
    pixels += np.asarray(image).reshape(light.shape) * (light * np.tile(gain, size))
    pixels += np.float32(128 * (1 - contrast))
    return np.rint(pixels).clip(0, 255).astype(np.uint8).reshape(size, size, 3)


def smooth(*corners: tuple[float, float]) -> np.ndarray:
    """Closed Catmull-Rom curve through the corners, six points (6n, 2) per span."""
    p = np.array(corners)
    t = np.arange(6)[:, None, None] / 6
    before, after, beyond = np.roll(p, 1, 0), np.roll(p, -1, 0), np.roll(p, -2, 0)
    curve = p + t / 2 * (
        after - before + t * (2 * before - 5 * p + 4 * after - beyond + t * (3 * (p - after) + beyond - before))
    )
    return curve.swapaxes(0, 1).reshape(-1, 2)


def stroke(start: np.ndarray, end: np.ndarray, width: float) -> np.ndarray:
    """Corners (4, 2) of a straight line of the given width."""
    start, end = np.asarray(start, float), np.asarray(end, float)
    along = end - start
    half = np.array((-along[1], along[0])) * (width / 2 / math.sqrt(along[0] ** 2 + along[1] ** 2))
    return np.stack([start + half, end + half, end - half, start - half])


def inner(outline: np.ndarray) -> np.ndarray:
    """The part of a shape that catches the light, which comes from the front and above."""
    front, top = outline[:, 0].max(), outline[:, 1].min()
    return outline + 0.035 * (np.array((front, top)) - outline)


def disc(centre: np.ndarray, radius: float) -> np.ndarray:
    """Corners (24, 2) of a disc."""
    return centre + radius * CIRCLE


def scaled(points: np.ndarray, centre: tuple[float, float] | np.ndarray, size: float) -> np.ndarray:
    """Corners moved towards a centre; to the last bit where they are with size 1."""
    return points if size == 1 else np.asarray(centre) + size * (points - centre)


def rgb(hue: float, saturation: float, value: float) -> Colour:
    """Colour 0-255 from hue (a fraction of the circle), saturation and value, which are clipped to 0-1."""
    return tuple(
        round(255 * c) for c in colorsys.hsv_to_rgb(hue % 1, min(max(saturation, 0), 1), min(max(value, 0), 1))
    )


def tone(colour: Colour, factor: float) -> Colour:
    """Lighter (factor above 1) or darker."""
    return tuple(min(255, round(c * factor)) for c in colour)
