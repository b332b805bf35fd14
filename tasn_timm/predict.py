"""What a model takes pictures for: label names and probabilities, for files and for pictures in memory."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from glob import glob, has_magic
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate

from .data.decoding import FORMATS, UnreadableImage, convert, decode
from .data.loading import loading
from .data.transforms import Transform
from .ensemble import Ensemble
from .errors import UserError

Picture = str | Path | Image.Image  # a file's path, or a picture in memory

ON_IMAGENET = re.compile(r"in\d+k(_\d+)?$")  # timm's tags of classifiers of 1,000, 12,000 or 22,000 classes


class Prediction(NamedTuple):
    """What a picture was taken for."""

    picture: Picture  # as it was given
    labels: list[str]  # names of the classes, the most probable first
    probabilities: list[float]  # of these, 0 to 1; those of all classes sum to 1


def predict(
    model: nn.Module,
    pictures: Iterable[Picture],
    *,
    topk: int = 5,
    batch_size: int = 32,
    workers: int = 0,
    on_unreadable: Callable[[Picture, UnreadableImage], None] | None = None,
) -> Iterator[Prediction]:
    """Classify pictures, a batch at a time, on the device on which the model is.

    Files and pictures in memory are decoded by the package's one rule (`data.decoding`) and go through the model's own
    transform for evaluation: the probabilities are those that `evaluate` measures.

    Args:
        model: timm model of 3-channel images, put into evaluation mode; from `hub.load_model`, say.
        pictures: Paths of files, and PIL images of any mode.
        topk: Classes to name of each picture, at most.
        batch_size: Pictures at once.
        workers: Processes that decode; 0 to decode in this one.
        on_unreadable: Called with a picture that cannot be decoded, and why; it is left out then. None: it is an error.

    Yields:
        One prediction for each picture, in their order.

    Raises:
        UserError: A model without a classifier, or of other channels.
        UnreadableImage: A picture cannot be decoded, and there is no `on_unreadable`.
        NumericalError: The model's output is not finite.
    """
    pictures, names = list(pictures), label_names(model)
    device = next(model.parameters()).device
    ensemble = Ensemble([model]).to(device).eval()
    samples = _Pictures(pictures, ensemble.transform())
    for batch in DataLoader(samples, batch_size, **loading(workers) | dict(collate_fn=_collate)):
        best = iter(_classify(ensemble, batch.images, min(topk, len(names)), device) if batch.images else [])
        for index, error in batch.pictures:
            if error is None:
                probabilities, classes = next(best)
                yield Prediction(pictures[index], [names[each] for each in classes], probabilities)
            elif on_unreadable is None:
                raise error
            else:
                on_unreadable(pictures[index], error)


@torch.inference_mode()
def _classify(
    ensemble: Ensemble, images: list[Tensor], topk: int, device: torch.device
) -> list[tuple[list[float], list[int]]]:
    """Of each image the highest probabilities and their classes."""
    best = ensemble([view.to(device) for view in images]).topk(topk)
    return list(zip(best.values.tolist(), best.indices.tolist()))


def label_names(model: nn.Module) -> list[str]:
    """Names of a model's classes, in the order of its outputs.

    Those in its config.json; of timm's models of ImageNet timm's; where nobody says, "class 0" and so on.

    Args:
        model: timm model.

    Raises:
        UserError: It has no classifier, not a name of its own for each class, or takes images of other channels than 3.
    """
    cfg, classes = model.pretrained_cfg, model.num_classes
    if not classes:
        raise UserError(f"model {cfg.get('architecture')!r} has no classifier, so it predicts nothing: train it first.")
    if getattr(model, "in_chans", 3) != 3:
        raise UserError(f"the model takes {model.in_chans} channels, but pictures have 3 here: give another model.")
    names = cfg.get("label_names")
    if names and not classes == len(names) == len(set(names)):
        raise UserError(
            f"the model has {classes} classes, but {len(set(names))} different label_names: correct its config.json."
        )
    if names:
        return list(names)
    subset = infer_imagenet_subset(model) if ON_IMAGENET.search(cfg.get("tag") or "") else None
    if subset is None:
        return [f"class {number}" for number in range(classes)]
    info = ImageNetInfo(subset)
    return [info.index_to_description(number) for number in range(classes)]


def find_pictures(places: Sequence[str]) -> list[Path]:
    """List the files that are meant by paths, folders and patterns, each once.

    Args:
        places: Files; folders, of which every picture is taken, those of sub-folders included; and patterns such as
            "photos/**/*.jpg", for shells that do not expand them. What exists under a name is meant by it, also where
            the name looks like a pattern.

    Returns:
        Files in the order of `places`; within a folder or pattern in the order of their names.

    Raises:
        UserError: Something is not there, or a folder has no pictures or cannot be read.
    """
    found: dict[Path, None] = {}  # keeps the order
    for place in places:
        if os.path.exists(place):
            matches = [place]
        else:
            matches = sorted(glob(place, recursive=True)) if has_magic(place) else []
        if not matches:
            raise UserError(f"there is no file or folder {place!r}: give pictures, folders or patterns like 'x/*.jpg'.")
        for match in map(Path, matches):
            # A pattern may match folders that have no pictures of their own; of a folder that was named, none is odd.
            found |= dict.fromkeys(
                _pictures_in(match, may_be_empty=match != Path(place)) if match.is_dir() else [match]
            )
    return list(found)


def _pictures_in(folder: Path, may_be_empty: bool) -> list[Path]:
    def refuse(error: OSError) -> None:
        raise UserError(f"folder {error.filename!r} cannot be read ({error.strerror}): give yourself access.")

    Image.init()  # else only the usual formats' endings are known
    endings = {ending for ending, name in Image.EXTENSION.items() if name in FORMATS}
    files = sorted(
        Path(parent, name)
        for parent, _, names in os.walk(folder, onerror=refuse)
        for name in names
        if os.path.splitext(name)[1].lower() in endings and not name.startswith(".")
    )
    if not files and not may_be_empty:
        raise UserError(f"folder {str(folder)!r} has no pictures (.jpg, .png and the like), nor have its sub-folders.")
    return files


class _Batch(NamedTuple):
    pictures: list[tuple[int, UnreadableImage | None]]  # which, and what is wrong with it
    images: list[Tensor] | None  # of those that can be read, as `Ensemble` takes them


class _Pictures(Dataset):
    def __init__(self, pictures: list[Picture], transform: Transform) -> None:
        self.pictures = pictures
        self.transform = transform

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[int, tuple[Tensor, ...] | UnreadableImage]:
        try:
            return index, self.transform(load_picture(self.pictures[index]))
        except UnreadableImage as error:
            return index, error


def load_picture(picture: Picture) -> Image.Image:
    """Load a picture as models see it before their own transform: upright, RGB, 8 bits.

    Args:
        picture: Path of a file, or a PIL image of any mode.

    Raises:
        UnreadableImage: It cannot be decoded.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about oddities that it can cope with
        if isinstance(picture, Image.Image):
            return convert(picture)
        return decode(dict(bytes=None, path=str(picture)))


def _collate(samples: list[tuple[int, Any]]) -> _Batch:
    wrong = [sample if isinstance(sample, UnreadableImage) else None for _, sample in samples]
    readable = [sample for (_, sample), error in zip(samples, wrong) if error is None]
    return _Batch(
        [(index, error) for (index, _), error in zip(samples, wrong)], default_collate(readable) if readable else None
    )
