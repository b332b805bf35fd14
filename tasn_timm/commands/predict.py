"""Name what is in pictures, with the probabilities that a trained model gives.

A folder means every picture in it and in its sub-folders. Files that cannot be read are reported and passed over; the
exit code is then 2 in the end. Pictures are cropped and resized as the model was evaluated. Models of timm itself work,
too.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from ..files import STDOUT, check_outputs, csv_text, write_text, write_whole
from ..tables import counted
from . import at_least

if TYPE_CHECKING:
    from ..predict import Prediction

SUMMARY = "name what is in pictures, with probabilities"
EXAMPLES = """examples:
  python -m tasn_timm predict tasn_tiny bird.png                  # works without a network
  python -m tasn_timm predict runs/cub photos/ --topk 3 --csv predictions.csv
  python -m tasn_timm predict hf-hub:me/my-birds 'photos/**/*.jpg' --panel predictions.png
  python -m tasn_timm predict resnet50.a1_in1k dog.jpg --json -   # a model of timm's"""

PANEL_PICTURES = 50  # of a sheet, which would be too long to look at


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="as of evaluate: a folder of training, hf-hub:user/name or a timm name")
    add("pictures", nargs="+", metavar="PICTURE", help="files, folders, or patterns in quotes")
    add(
        "--topk",
        type=at_least(1),
        default=5,
        metavar="K",
        help="classes to name of each picture (default: %(default)s)",
    )
    add("--json", type=Path, metavar="FILE", help="write the predictions to this file; -: to standard output, alone")
    add("--csv", type=Path, metavar="FILE", help="the same as a table with a row for each file")
    add(
        "--panel",
        type=Path,
        metavar="FILE",
        help=f"draw up to {PANEL_PICTURES} pictures, where the model looks, "
        "what its backbone sees, and the probabilities, on one sheet (.png, .jpg, .pdf or .svg)",
    )
    add("--batch-size", type=at_least(1), metavar="N", default=32, help="pictures at once (default: %(default)s)")
    add(
        "--workers",
        type=at_least(0),
        metavar="N",
        default=2,
        help="processes that load pictures; 0: none (default: %(default)s)",
    )
    add("--cpu", action="store_true", help="do not use an accelerator")


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    from accelerate import PartialState
    from tqdm import tqdm

    from ..hub import load_model
    from ..memory import smaller_batches
    from ..predict import find_pictures, predict

    files = find_pictures(options.pictures)
    _check_options(options, len(files))
    state = PartialState(cpu=options.cpu)
    if state.num_processes > 1:
        raise UserError("predict runs in one process: start it without accelerate launch.")
    model = load_model(options.model).to(state.device)
    workers = min(options.workers, len(files) // options.batch_size)  # not worth their start for a batch

    found: list[Prediction] = []
    unreadable: dict[str, str] = {}
    bar = tqdm(total=len(files), desc="predicting", unit="picture", disable=not sys.stderr.isatty(), leave=False)

    def pass_over(file: Path, error: Exception) -> None:
        unreadable[str(file)] = str(error)
        bar.write(f"{file} cannot be read: {error}", file=sys.stderr)
        bar.update()

    how = dict(topk=options.topk, batch_size=options.batch_size, workers=workers, on_unreadable=pass_over)
    with bar, smaller_batches(options.batch_size, state.device):
        for prediction in predict(model, files, **how):
            found.append(prediction)
            if STDOUT not in (options.json, options.csv):
                bar.write(_text(prediction), file=sys.stdout)
            bar.update()
    _write(options, found, unreadable)
    if options.panel and found:
        from ..sheets import prediction_sheet

        write_whole(options.panel, prediction_sheet(model.cpu(), found, options.model, options.panel), "--panel")
    if unreadable:
        raise UserError(
            f"{len(unreadable):,} of {counted(len(files), 'file')} cannot be read: see above which, and why."
        )


def _check_options(options: argparse.Namespace, files: int) -> None:
    check_outputs(json=options.json, csv=options.csv, panel=options.panel)
    if options.panel:
        from ..sheets import check_format

        check_format(options.panel, "--panel")
        if files > PANEL_PICTURES:
            raise UserError(f"--panel draws at most {PANEL_PICTURES} pictures, got {files:,}: give fewer.")


def _text(prediction: Prediction) -> str:
    lines = [f"{100 * share:7.2f} %  {label}" for label, share in zip(prediction.labels, prediction.probabilities)]
    return "\n".join([str(prediction.picture), *lines])


def _write(options: argparse.Namespace, found: list[Prediction], unreadable: dict[str, str]) -> None:
    pictures = [dict(file=str(each.picture), labels=each.labels, probabilities=each.probabilities) for each in found]
    problems = [dict(file=file, reason=reason) for file, reason in unreadable.items()]
    content = dict(model=options.model, pictures=pictures, unreadable=problems)
    write_text(options.json, json.dumps(content, indent=2, ensure_ascii=False) + "\n", "--json")
    write_text(options.csv, csv_text(_rows(found, unreadable)), "--csv")


def _rows(found: list[Prediction], unreadable: dict[str, str]) -> list[list]:
    """A header and a row for each file, those that cannot be read last, with the reason."""
    ranks = len(found[0].labels) if found else 0
    header = ["file", *(f"{name}_{rank}" for rank in range(1, ranks + 1) for name in ("label", "probability")), "error"]
    rows = [
        [each.picture, *(cell for pair in zip(each.labels, each.probabilities) for cell in pair), None]
        for each in found
    ]
    return [header, *rows, *([file, *[None] * (2 * ranks), reason] for file, reason in unreadable.items())]
