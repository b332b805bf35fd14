"""Sheets of pictures with text: what pictures were taken for, and which classes a model mixes up."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image, ImageOps
from torch import nn

from .ensemble import Ensemble
from .errors import UserError, unknown
from .predict import Picture, Prediction, load_picture
from .tables import short
from .tasn import TASN
from .visualize import attention_panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("png", "jpg", "jpeg", "pdf", "svg")
# All lengths are in hundredths of an inch, from the upper left corner.
MARGIN, GAP, SIDE, BARS = 24, 20, 220, 380  # around the sheet, between rows, of a picture, of the text beside it
SHARPNESS = 2  # pixels of a hundredth of an inch
INK, FAINT, TRACK, FIRST, OTHER = "#222222", "#777777", "#ececec", "#ff7300", "#9db2bf"
WRONG, RIGHT = 4, 3  # pictures of a pair of confused classes
BACKGROUND = (244, 244, 244)  # beside pictures that are not square


def check_format(path: Path, option: str) -> None:
    """Check that a sheet can be drawn and written to a path.

    Raises:
        UserError: Its ending is none of `FORMATS`, or matplotlib is missing.
    """
    if path.suffix[1:].lower() not in FORMATS:
        raise unknown(f"format of {option} {str(path)!r}, the ending", path.suffix, [f".{name}" for name in FORMATS])
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError(f"{option} needs matplotlib: pip install 'tasn_timm[plot]'.") from error


def prediction_sheet(model: nn.Module, predictions: Sequence[Prediction], title: str, path: Path) -> bytes:
    """Draw a row for each picture: the picture, where a TASN looks, what its backbone sees, and the probabilities.

    Of other models than TASN there is the picture as the model sees it.

    Args:
        model: That made the predictions, in evaluation mode, on the CPU.
        predictions: One or more, of as many classes each.
        title: Above them.
        path: Its ending says in which format.

    Returns:
        The sheet's file.
    """
    strips = [_seen(model, prediction.picture) for prediction in predictions]
    pictures = max(SIDE * strip.width // strip.height for strip in strips)
    row = max(SIDE, 26 + 34 * len(predictions[0].labels))
    names = ["picture", "attention", "what the backbone sees"] if isinstance(model, TASN) else ["picture"]
    head = 66
    width = 2 * MARGIN + pictures + GAP + BARS
    sheet = _Sheet(width, MARGIN + head + len(predictions) * (row + GAP))
    sheet.write(MARGIN, MARGIN, title, size=15, weight="bold")
    for number, name in enumerate(names):
        sheet.write(MARGIN + number * pictures / len(names), MARGIN + 36, name, color=FAINT)
    for number, (prediction, strip) in enumerate(zip(predictions, strips)):
        top = MARGIN + head + number * (row + GAP)
        sheet.show(strip, MARGIN, top, SIDE * strip.width / strip.height, SIDE)
        name = _name(prediction.picture, number)
        sheet.write(MARGIN + pictures + GAP, top - 2, _tail(name), weight="bold")
        _draw_bars(sheet.axes(MARGIN + pictures + GAP, top + 26, BARS, 34 * len(prediction.labels)), prediction)
    return sheet.file(path)


class Confusion(NamedTuple):
    """A class that was taken for another one."""

    label: str
    prediction: str
    images: int  # how many
    of: int  # images of the class
    wrong: Sequence[tuple[Image.Image, float]]  # up to `WRONG` of them, with the probability of the wrong class
    right: Sequence[Image.Image]  # up to `RIGHT` images of that class that were recognised


def confusion_sheet(confusions: Sequence[Confusion], title: str, path: Path) -> bytes:
    """Draw a row for each pair of classes: pictures that were taken for the other class, beside pictures of that one.

    Args:
        confusions: Those to draw; none for a model without mistakes.
        title: Above them.
        path: Its ending says in which format.

    Returns:
        The sheet's file.
    """
    side, step = 150, 158
    head, row = 56, 44 + side + 20
    middle = MARGIN + WRONG * step + GAP
    sheet = _Sheet(middle + RIGHT * step + MARGIN, MARGIN + head + max(1, len(confusions)) * (row + GAP))
    sheet.write(MARGIN, MARGIN, short(title, 90), size=15, weight="bold")
    if not confusions:
        sheet.write(MARGIN, MARGIN + head, "No picture was taken for another class.")
    for number, each in enumerate(confusions):
        top = MARGIN + head + number * (row + GAP)
        below = top + 44 + side + 4
        sheet.write(MARGIN, top, short(each.label, 60), weight="bold")
        sheet.write(
            MARGIN, top + 20, f"{each.images:,} of {each.of:,} were taken for the class on the right", color=FAINT
        )
        sheet.write(middle, top, short(each.prediction, 48), weight="bold")
        sheet.write(middle, top + 20, "recognised" if each.right else "none was recognised in this split", color=FAINT)
        for place, (picture, share) in enumerate(each.wrong):
            sheet.show(_square(picture), MARGIN + place * step, top + 44, side, side)
            sheet.write(MARGIN + place * step, below, f"{100 * share:.0f} % sure", color=FAINT)
        for place, picture in enumerate(each.right):
            sheet.show(_square(picture), middle + place * step, top + 44, side, side)
    return sheet.file(path)


class _Sheet:
    """A matplotlib figure with places in hundredths of an inch from its upper left corner."""

    def __init__(self, width: float, height: float) -> None:
        from matplotlib.figure import Figure

        self.width, self.height = width, height
        self.figure: Figure = Figure(figsize=(width / 100, height / 100), dpi=100 * SHARPNESS, facecolor="white")

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        place = (left / self.width, 1 - (top + height) / self.height, width / self.width, height / self.height)
        axes = self.figure.add_axes(place)
        axes.set_axis_off()
        return axes

    def show(self, picture: Image.Image, left: float, top: float, width: float, height: float) -> None:
        self.axes(left, top, width, height).imshow(picture, aspect="auto", interpolation="lanczos")

    def write(self, left: float, top: float, text: str, size: float = 10, **style: str) -> None:
        place = (left / self.width, 1 - top / self.height)
        style = dict(color=INK) | style
        self.figure.text(*place, text, va="top", size=size, parse_math=False, **style)  # a name may have a $

    def file(self, path: Path) -> bytes:
        file = io.BytesIO()
        self.figure.savefig(file, format=path.suffix[1:].lower())
        return file.getvalue()


def _seen(model: nn.Module, picture: Picture) -> Image.Image:
    loaded = load_picture(picture)
    if isinstance(model, TASN):
        return attention_panels(model, loaded, side=SHARPNESS * SIDE)
    pixels = Ensemble([model]).transform()(loaded)[0]  # (3, H, W)
    return Image.fromarray(pixels.movedim(0, 2).numpy())


def _draw_bars(axes: Axes, prediction: Prediction) -> None:
    """A line of text and a bar for each class."""
    ranks = len(prediction.labels)
    axes.set(xlim=(0, 1), ylim=(ranks, 0))
    for rank, (label, share) in enumerate(zip(prediction.labels, prediction.probabilities)):
        style = dict(va="center", size=9.5, color=INK if rank == 0 else FAINT, parse_math=False)
        axes.text(0, rank + 0.3, short(label, 44), **style)
        axes.text(1, rank + 0.3, f"{100 * share:.1f} %", ha="right", **style)
        axes.barh(rank + 0.68, 1, 0.18, color=TRACK)
        axes.barh(rank + 0.68, share, 0.18, color=OTHER if rank else FIRST)


def _square(picture: Image.Image) -> Image.Image:
    return ImageOps.pad(picture, (300, 300), color=BACKGROUND)


def _name(picture: Picture, number: int) -> str:
    return f"picture {number + 1}" if isinstance(picture, Image.Image) else str(picture)


def _tail(path: str, length: int = 44) -> str:
    """A path with its beginning left out where it is long."""
    return path if len(path) <= length else f"...{path[3 - length :]}"
