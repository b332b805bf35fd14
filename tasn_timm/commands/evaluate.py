"""Measure a trained model, or several whose probabilities are averaged.

Accuracy with its 95 % interval (Wilson's), for each class and super-class, which classes are taken for which, how far
probabilities are from accuracies (expected calibration error, 15 bins), and images a second.
"""

from __future__ import annotations

import argparse
import json
from itertools import combinations, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import timm
import torch
from torch import nn

from ..data.decoding import decode, undecoded
from ..errors import UserError, unknown
from ..files import STDOUT, check_outputs, csv_text, write_text, write_whole
from ..report import class_rows, picture_rows, report, summarize
from . import at_least

if TYPE_CHECKING:
    import datasets

    from ..sheets import Confusion
    from ..training.evaluation import Scores

SUMMARY = "measure the accuracy of trained models"
USAGE = """python -m tasn_timm evaluate MODEL [DATA] [options]
       python -m tasn_timm evaluate [DATA] --ensemble MODEL MODEL [MODEL ...] [options]"""
EXAMPLES = """examples:
  python -m tasn_timm evaluate tasn_tiny                              # the dataset that it was trained on
  python -m tasn_timm evaluate runs/cub photos/ --flip --csv predictions.csv --confusions pairs.png
  python -m tasn_timm evaluate runs/cub --resolution 640 --json - | jq .top1
  python -m tasn_timm evaluate photos/ --ensemble runs/cub runs/cub-1 runs/cub-2
  accelerate launch --multi_gpu --num_processes 8 -m tasn_timm evaluate runs/inat"""

FIGURE_PAIRS = 6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add = parser.add_argument
    add(
        "names",
        nargs="*",
        metavar="MODEL [DATA]",
        help="MODEL: a folder of training (runs/x or runs/x/best), local-dir:FOLDER, hf-hub:user/name or a timm name. "
        "DATA: a built-in dataset, a folder, a CSV file, or user/name[@revision] on the Hub (default: what the model "
        "was trained on)",
    )
    add("--ensemble", nargs="+", metavar="MODEL", help="average the probabilities of these models")
    add("--input-key", metavar="COLUMN", help="column of the images, or of their paths (default: found)")
    add("--target-key", metavar="COLUMN", help="column of the classes (default: found)")
    add("--split", default="test", help="split to measure on (default: %(default)s)")
    add("--flip", action="store_true", help="average the probabilities of each image and its mirror image")
    add(
        "--resolution",
        metavar="INPUT[:SAMPLED]",
        help="pixels of the models' square input, and of what a TASN samples from it, in place of their own; without "
        "SAMPLED the same share of the input as before (512 to 224: 640 gives 280)",
    )
    add(
        "--json",
        type=Path,
        metavar="FILE",
        help="write everything measured, each class and pair of confused classes included, to this file; -: to "
        "standard output, without the report (so for --csv and --class-csv)",
    )
    add("--csv", type=Path, metavar="FILE", help="write a table of predictions, a row for each picture")
    add("--class-csv", type=Path, metavar="FILE", help="write a table of classes, a row for each")
    add(
        "--confusions",
        type=Path,
        metavar="FILE",
        help=f"draw examples of the {FIGURE_PAIRS} pairs of classes confused most (.png, .jpg, .pdf or .svg)",
    )
    add(
        "--batch-size",
        type=at_least(1),
        metavar="N",
        default=64,
        help="images at once in each process (default: %(default)s)",
    )
    add(
        "--workers",
        type=at_least(0),
        metavar="N",
        default=2,
        help="processes that load images; 0: none (default: %(default)s)",
    )
    add("--cpu", action="store_true", help="do not use an accelerator")


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    from accelerate import Accelerator

    from ..data.loading import create_loader
    from ..data.splits import class_names, load_splits, pick_split, pinned, super_classes
    from ..ensemble import Ensemble
    from ..hub import load_model
    from ..memory import smaller_batches
    from ..resolution import Resolution, set_resolution
    from ..training.evaluation import evaluate

    # Build. Whatever is wrong shows here, before anything is computed.
    sources, data = _models_and_data(options)
    _check_options(options)
    resolution = Resolution.parse(options.resolution) if options.resolution else None
    accelerator = Accelerator(cpu=options.cpu)
    models = [load_model(source) for source in sources]
    keys = dict(input_key=options.input_key, target_key=options.target_key)
    with accelerator.local_main_process_first():  # on each machine the first process fills the cache
        splits = load_splits(data, only={options.split: "choose one of these with --split"}, **keys)
    split, names = pick_split(splits, options.split, "--split", data), class_names(splits)
    labels = common_classes(sources, models, data, names)
    _check_different(sources, models)
    if resolution:
        for source, model in zip(sources, models):
            set_resolution(model, resolution, source)
    if labels != names:
        split = _relabel(split, names, labels)
    families = super_classes(split)
    ensemble = Ensemble(models, options.flip).to(accelerator.device).eval()
    loader = create_loader(split, ensemble.transform(), options.batch_size, workers=options.workers)

    with smaller_batches(options.batch_size, accelerator.device):
        scores = evaluate(accelerator, ensemble, accelerator.prepare(loader))
    assert scores.labels.tolist() == split["label"][:], "every image once, in order"

    result = dict(models=sources, data=pinned(data, splits), split=options.split, flip=options.flip)
    result |= dict(resolution=resolution and str(resolution))
    result |= dict(device=accelerator.device.type, processes=accelerator.num_processes)
    result |= summarize(scores, names, labels, families)
    if accelerator.is_main_process:
        _write(options, result, scores, split, labels, families)
    accelerator.end_training()


def _write(
    options: argparse.Namespace,
    result: dict,
    scores: Scores,
    split: datasets.Dataset,
    labels: list[str],
    families: dict[str, str] | None,
) -> None:
    """Write the files asked for, and print the report unless one of them is meant for standard output."""
    text = report(result)
    write_text(options.json, json.dumps(result, indent=2) + "\n", "--json")
    write_text(options.csv, csv_text(picture_rows(scores, split, labels)), "--csv")
    write_text(options.class_csv, csv_text(class_rows(result, families)), "--class-csv")
    if options.confusions:
        from ..sheets import confusion_sheet

        shown = [_examples(pair, scores, split, labels) for pair in result["confusions"][:FIGURE_PAIRS]]
        title = f"Most confused: {' + '.join(result['models'])} on {result['data']}"
        write_whole(options.confusions, confusion_sheet(shown, title, options.confusions), "--confusions")
    if STDOUT not in (options.json, options.csv, options.class_csv):
        print(text)


def _examples(pair: dict, scores: Scores, split: datasets.Dataset, labels: list[str]) -> Confusion:
    """Pictures for a pair of confused classes, those of which the model is most sure first."""
    from ..sheets import RIGHT, WRONG, Confusion

    label, prediction = labels.index(pair["label"]), labels.index(pair["prediction"])
    taken, sure = scores.best[:, 0] == prediction, scores.values[:, 0]

    def surest(which: torch.Tensor) -> list[int]:
        rows = which.nonzero()[:, 0]
        return rows[sure[rows].argsort(descending=True, stable=True)].tolist()

    wrong, right = surest(taken & (scores.labels == label)), surest(taken & (scores.labels == prediction))
    pictures = undecoded(split)
    return Confusion(
        **pair,
        wrong=[(decode(pictures[row]["image"]), float(sure[row])) for row in wrong[:WRONG]],
        right=[decode(pictures[row]["image"]) for row in right[:RIGHT]],
    )


def _models_and_data(options: argparse.Namespace) -> tuple[list[str], str]:
    """Models and dataset of the command line; a dataset that is left out is the one they were trained on."""
    from ..hub import trained_on

    sources, data = (options.ensemble, options.names) if options.ensemble else (options.names[:1], options.names[1:])
    if not sources:
        raise UserError("evaluate needs a model: give a folder such as runs/x, or a name such as tasn_tiny.")
    if options.ensemble and len(sources) < 2:
        raise UserError(f"--ensemble takes two models or more, got {sources[0]!r} alone: leave out --ensemble for one.")
    if options.ensemble and not data and _is_data(sources[-1]):
        raise UserError(f"{sources[-1]!r} after --ensemble is a dataset, not a model: give it before --ensemble.")
    if len(data) > 1:
        allowed = (
            "[DATA] --ensemble MODEL MODEL ..." if options.ensemble else "MODEL [DATA], or --ensemble for more models"
        )
        raise UserError(f"too many arguments ({' '.join(options.names)}): evaluate takes {allowed}.")
    if data:
        return sources, data[0]
    trained = {source: trained_on(source) for source in sources}
    if len(set(trained.values())) > 1:
        listing = ", ".join(f"{source} on {dataset or 'unknown data'}" for source, dataset in trained.items())
        raise UserError(f"the models were not trained on the same data ({listing}): give DATA.")
    (dataset,) = set(trained.values())
    if dataset is None:
        raise UserError(f"{', '.join(sources)} does not say what it was trained on: give DATA after MODEL.")
    return sources, dataset


def _is_data(name: str) -> bool:
    from ..data.splits import BUILT_IN

    folder = Path(name)
    is_model = (folder / "config.json").is_file() or (folder / "best").is_dir()
    return name in BUILT_IN or folder.is_file() or (folder.is_dir() and not is_model and not timm.is_model(name))


def _check_options(options: argparse.Namespace) -> None:
    check_outputs(json=options.json, csv=options.csv, class_csv=options.class_csv, confusions=options.confusions)
    if options.confusions:
        from ..sheets import check_format

        check_format(options.confusions, "--confusions")


def _check_different(sources: list[str], models: list[nn.Module]) -> None:
    """An average of a model with itself would look like a measurement of an ensemble."""
    for (one, model), (other, twin) in combinations(zip(sources, models), 2):
        weights, others = model.state_dict(), twin.state_dict()
        if weights.keys() == others.keys() and all(torch.equal(weights[key], others[key]) for key in weights):
            raise UserError(
                f"models {one!r} and {other!r} have the same weights, so their average is either: train them with "
                f"different seeds."
            )


def common_classes(sources: list[str], models: list[nn.Module], data: str, names: list[str]) -> list[str]:
    """Find the classes that models tell apart, and check that those of a dataset are among them.

    Args:
        sources: The models' names, for messages.
        models: timm models.
        data: The dataset's name, for messages.
        names: Of the dataset's classes.

    Returns:
        Names in the order of the models' outputs: the dataset's own, or for models that know theirs, these, of which
        the dataset may have a part, and in another order.

    Raises:
        UserError: Models of other classes than each other's or than the dataset's, or of images that have not 3
            channels.
    """
    for source, model in zip(sources, models):
        check_classes(source, model, data, names)
    first, *others = [model.pretrained_cfg.get("label_names") or [] for model in models]
    for source, labels in zip(sources[1:], others):
        for number, (one, other) in enumerate(zip_longest(first, labels)):
            if one != other:
                raise UserError(
                    f"class {number} of model {source!r} is {_quoted(other)}, but of model {sources[0]!r} it is "
                    f"{_quoted(one)}: average models of the same classes in the same order."
                )
    return list(first) or names


def check_classes(source: str, model: nn.Module, data: str, names: list[str]) -> None:
    """Check that a model knows the classes of a dataset.

    Args:
        source: The model's name, for the message.
        model: timm model; where its pretrained_cfg has no label_names, only their number is compared.
        data: The dataset's name, for the message.
        names: Of the dataset's classes.

    Raises:
        UserError: Another number, or a class that the model does not know; or a model of images that have not 3
            channels.
    """
    labels = model.pretrained_cfg.get("label_names")
    if not labels and model.num_classes != len(names):
        raise UserError(
            f"model {source!r} has {model.num_classes} classes, but dataset {data!r} has {len(names)}: give a "
            f"model that was trained on it, or the data that it was trained on."
        )
    if labels and not model.num_classes == len(labels) == len(set(labels)):
        raise UserError(
            f"model {source!r} has {model.num_classes} classes, but {len(set(labels))} names of classes: correct "
            f"label_names in its config.json."
        )
    strange = sorted(set(names) - set(labels or names))
    if strange:
        raise UserError(
            f"model {source!r} does not know {len(strange)} of the {len(names)} classes of dataset {data!r}: "
            f"{unknown('class', strange[0], labels)}"
        )
    if getattr(model, "in_chans", 3) != 3:
        raise UserError(
            f"model {source!r} takes {model.in_chans} channels, but images have 3 here: give another model."
        )


def _relabel(split: datasets.Dataset, names: list[str], labels: list[str]) -> datasets.Dataset:
    """Give the images of classes `names` the numbers that these have among `labels`."""
    from ..data.splits import with_labels

    number = np.array([labels.index(name) for name in names])
    return with_labels(split, number[split.with_format("numpy")["label"][:]], labels)


def _quoted(name: str | None) -> str:
    return "missing" if name is None else repr(name)
