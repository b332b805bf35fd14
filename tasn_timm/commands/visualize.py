"""Draw what a TASN sees of your pictures, as in the paper's figures, or the curves of a training.

attention  Fig. 2: a row for each picture with attention, structure-preserved image, plain resize and detail images
sampling   Fig. 4: how the map becomes the sampled image: marginals, their integrals, sampling points
channels   Fig. 5: nine channels of the features beside their trilinear maps
curves     loss, accuracy, learning rate and zoom of a run
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from ..files import check_writable, completing
from . import at_least

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image

    from ..gaze import Gaze
    from ..tasn import TASN

SUMMARY = "draw what a model sees of your pictures, or the curves of a training"
USAGE = """python -m tasn_timm visualize MODEL PICTURE [PICTURE ...] [options]
       python -m tasn_timm visualize RUN --figure curves [options]"""
EXAMPLES = """examples:
  python -m tasn_timm visualize tasn_tiny bird.jpg
  python -m tasn_timm visualize runs/cub bird.jpg --figure sampling --output fig4.pdf
  python -m tasn_timm visualize runs/cub --figure curves --output curves.svg"""

FIGURES = ("attention", "sampling", "channels", "curves")
ENDINGS = (".png", ".svg", ".pdf")
ROWS, PARTS = 20, 8  # at most, in a figure that can still be looked at
DPI = 150


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="as of evaluate; or RUN, the folder of a run, for curves")
    add("pictures", metavar="PICTURE", nargs="*", type=Path, help=f"file; up to {ROWS} for attention, else one")
    add("--figure", choices=FIGURES, default="attention", help="what to draw (default: %(default)s)")
    add("--output", "-o", type=Path, metavar="FILE", help="ends in .png, .svg or .pdf (default: FIGURE.png)")
    add("--parts", type=int, metavar="N", help=f"detail images a picture, 0 to {PARTS}, for attention (default: 4)")
    add("--seed", type=at_least(0), metavar="N", help="of the choice of nine channels, for channels (default: 0)")


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    output = options.output or Path(f"{options.figure}.png")
    _check_options(options, output)
    try:
        from matplotlib import rc_context
    except ImportError as error:
        raise UserError(f"visualize needs {error.name}: pip install 'tasn_timm[plot]'.") from error
    check_writable(output, "--output")
    with rc_context({"svg.fonttype": "none"}):
        figure = _draw_curves(Path(options.model)) if options.figure == "curves" else _draw_pictures(options)
        with completing(output, "--output") as file:
            figure.savefig(file, format=output.suffix.lower()[1:], dpi=DPI)
    print(output)


def _check_options(options: argparse.Namespace, output: Path) -> None:
    figure, count = options.figure, len(options.pictures)
    if output.suffix.lower() not in ENDINGS:
        raise UserError(
            f"--output {str(output)!r} does not end in {', '.join(ENDINGS)}: the ending says what to write."
        )
    most = dict(attention=ROWS, curves=0).get(figure, 1)
    if count > most or (count == 0 and most):
        takes = {0: "no picture, only the folder of a run", 1: "one picture"}.get(most, f"1 to {most} pictures")
        raise UserError(f"--figure {figure} takes {takes}, got {count}.")
    for name, value, where in (("parts", options.parts, "attention"), ("seed", options.seed, "channels")):
        if value is not None and figure != where:
            raise UserError(f"--{name} has no effect with --figure {figure}: leave it out, or use --figure {where}.")
    if not 0 <= (options.parts or 0) <= PARTS:
        raise UserError(f"--parts must be 0 to {PARTS}, got {options.parts}.")


def _draw_curves(run: Path) -> Figure:
    from ..curves import curves_figure
    from ..finished_run import read_metrics

    return curves_figure(read_metrics(run), run.name)


def _draw_pictures(options: argparse.Namespace) -> Figure:
    from ..figures import attention_figure, channels_figure, sampling_figure
    from ..gaze import DETAILS, check, look, no_details
    from ..hub import load_model

    photos = [_read(path) for path in options.pictures]
    model = load_model(options.model)
    check(model)
    why_not = no_details(model)
    if options.parts and why_not:
        raise UserError(f"--parts {options.parts}: {options.model!r} has no detail images: {why_not}. Leave it out.")
    parts = DETAILS if options.parts is None else options.parts
    gazes = [look(model, photo, details=parts if options.figure == "attention" else 0) for photo in photos]
    captions = [_caption(model, gaze, path) for gaze, path in zip(gazes, options.pictures)]
    print("\n".join(captions))
    if options.figure == "attention":
        if why_not:
            print(f"without detail images of the model: {why_not}")
        return attention_figure(gazes, captions)
    if options.figure == "channels":
        return channels_figure(model, gazes[0], options.seed or 0)
    if model.structure_sampler.sampler != "attention":
        print(f"without (b) and (c): the {model.structure_sampler.sampler} sampler has no marginals")
    return sampling_figure(model, gazes[0])


def _read(path: Path) -> Image.Image:
    from ..data.decoding import UnreadableImage
    from ..predict import load_picture

    try:
        return load_picture(path)
    except UnreadableImage as error:
        raise UserError(f"picture {str(path)!r} cannot be read ({error}): give another one.") from error


def _caption(model: TASN, gaze: Gaze, path: Path) -> str:
    """The most likely class."""
    from ..predict import label_names

    probability, number = gaze.probabilities.max(0)
    return f"{path.name}: {label_names(model)[number]}, {100 * probability:.1f} %"
