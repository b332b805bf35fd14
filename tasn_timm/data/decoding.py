"""From a picture's bytes to upright RGB pixels: one rule for training, evaluation, prediction and checks."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from ..errors import UserError, unknown

if TYPE_CHECKING:
    import datasets

MAX_ASPECT = 50  # long side over short side; resized by its short side, a longer strip would not fit into memory
# Pillow knows more, of which EPS would be handed to another program to run.
FORMATS = (
    *("JPEG", "MPO", "PNG", "GIF", "BMP", "DIB", "TIFF", "WEBP", "AVIF", "JPEG2000"),
    *("PPM", "TGA", "PCX", "ICO", "SGI", "XBM"),
)
ORIENTATION = 0x0112  # EXIF tag


class UnreadableImage(ValueError):
    """A picture that cannot be decoded, or that no decoding does justice; the message is the reason."""


def undecoded(split: datasets.Dataset) -> datasets.Dataset:
    """Let a split give its column "image" as `decode` takes it, instead of decoding it in its own way."""
    from datasets import Image as ImageFeature

    return split.cast_column("image", ImageFeature(decode=False))


def decode(image: dict | None, decoder: str = "pillow", min_side: int | None = None) -> Image.Image | np.ndarray:
    """Decode a picture: EXIF orientation applied, RGB, 8 bits.

    Transparent pictures are laid on white, as pages show them; 16-bit values are scaled to 8 bits; palettes, CMYK and
    black-and-white are converted; of animations and multi-page files the first picture counts. Colour profiles are
    not applied.

    Args:
        image: As `datasets` has it undecoded: "bytes", or where these are None "path"; None where a row has no picture.
        decoder: Key of `DECODERS`.
        min_side: Pixels that each side needs to keep; a decoder that can may shrink larger pictures to that.

    Returns:
        PIL image, or with some decoders an array (h, w, 3), uint8.

    Raises:
        UnreadableImage: No picture, damaged, more pixels than Pillow's limit (`PIL.Image.MAX_IMAGE_PIXELS`, twice), a
            long side of more than `MAX_ASPECT` short ones, or values of unknown range.
    """
    try:
        data = read(image)
        with open_picture(data) as opened:
            _check_shape(opened)
            return DECODERS[decoder](opened, data, min_side)
    except (UnreadableImage, MemoryError):
        raise
    except Exception as error:  # decoders raise anything on damaged bytes: OSError, SyntaxError, struct.error, ...
        raise UnreadableImage(_reason(error)) from error


def convert(image: Image.Image) -> Image.Image:
    """Bring a picture that Pillow has opened to what `decode` makes of its file: upright, RGB, 8 bits.

    Raises:
        UnreadableImage: As of `decode`.
    """
    try:
        _check_shape(image)
        return _upright(image)  # loads the pixels
    except (UnreadableImage, MemoryError):
        raise
    except Exception as error:  # as in `decode`
        raise UnreadableImage(_reason(error)) from error


def open_picture(data: bytes) -> Image.Image:
    """Read what a picture's file says of it, not yet the pixels; only of the formats in `FORMATS`."""
    Image.init()  # or OPEN has the usual ones only
    return Image.open(io.BytesIO(data), formats=[name for name in FORMATS if name in Image.OPEN])


def claimed_size(data: bytes) -> tuple[int, int]:
    """Read the width and height that a picture's file says it has, in pixels, before anything is decoded.

    Raises:
        UnreadableImage: No picture, or more pixels than Pillow's limit.
    """
    try:
        with open_picture(data) as opened:
            return opened.size
    except Exception as error:  # as in `decode`
        raise UnreadableImage(_reason(error)) from error


def read(image: dict | None) -> bytes:
    """Read a picture's file, which need not be a picture.

    Args:
        image: As of `decode`; None where a row has none.

    Returns:
        The bytes as they are stored.

    Raises:
        UnreadableImage: There is no file, it is empty or cannot be read.
    """
    if image is None or (image["bytes"] is None and image["path"] is None):
        raise UnreadableImage("the row has no picture")
    try:
        data = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
    except FileNotFoundError as error:
        raise UnreadableImage("the file does not exist") from error
    except OSError as error:
        raise UnreadableImage(error.strerror or str(error)) from error
    if not data:
        raise UnreadableImage("the file is empty")
    return data


def check_decoder(decoder: str) -> None:
    """Check that a decoder is known and installed.

    Raises:
        UserError: It is not.
    """
    if decoder not in DECODERS:
        raise unknown("decoder", decoder, DECODERS)
    if decoder == "simplejpeg":
        try:
            import simplejpeg  # noqa: F401
        except ImportError as error:
            raise UserError("decoder 'simplejpeg' is not installed: pip install 'tasn_timm[fast]'.") from error


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()).replace(f" {io.BytesIO.__name__}", "")
    if "cannot identify image file" in text:
        return "not an image, or of a format that Pillow does not know"
    return text or type(error).__name__


def _check_shape(image: Image.Image) -> None:
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise UnreadableImage(f"{image.width} x {image.height} pixels: no side may be {MAX_ASPECT} times the other")


def _with_pillow(image: Image.Image, data: bytes, min_side: int | None) -> Image.Image:
    image.load()
    return _upright(image)


def _with_simplejpeg(image: Image.Image, data: bytes, min_side: int | None) -> Image.Image | np.ndarray:
    """libjpeg-turbo without Pillow around it; of large pictures only as many pixels as needed are ever computed."""
    import simplejpeg

    if image.format != "JPEG" or image.mode != "RGB":
        return _with_pillow(image, data, min_side)
    try:
        factor = 2 if min_side and min(image.size) >= 2 * min_side else 1  # factors in between are slow
        side = min_side or 0  # 0: all of them
        array = simplejpeg.decode_jpeg(data, min_height=side, min_width=side, min_factor=factor)
    except ValueError:  # also for what can be put right; whether a picture is readable is for Pillow to say
        return _with_pillow(image, data, min_side)
    turn = _turn(image)
    return array if turn is None else Image.fromarray(array).transpose(turn)


def _upright(image: Image.Image) -> Image.Image:
    turn = _turn(image)
    return _rgb(image) if turn is None else _rgb(image).transpose(turn)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What the EXIF asks for; `ImageOps.exif_transpose` would also rewrite the EXIF, and fail where that is odd."""
    return _TURNS.get(image.getexif().get(ORIENTATION))


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise UnreadableImage("floating point pixels, of unknown range: convert it to 8 bits a channel")
    if image.mode.startswith("I"):  # before anything else: Pillow's own conversion would cut off all above 255
        return _from_16_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise UnreadableImage("32-bit pixels, of unknown range: convert it to 8 bits a channel")
    values[values == image.info.get("transparency")] = 65535  # of a transparent picture this value is its ground
    return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")


# By EXIF orientation.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

DECODERS: dict[str, Callable[..., Image.Image | np.ndarray]] = {
    "pillow": _with_pillow,
    "simplejpeg": _with_simplejpeg,
}
