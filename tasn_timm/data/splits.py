"""Splits of a dataset by name: built in, a folder, or a dataset of the Hugging Face Hub, all through `datasets`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError, unknown
from . import synthbirds

if TYPE_CHECKING:
    import datasets

BUILT_IN: dict[str, Callable[[], datasets.DatasetDict]] = {
    "synthbirds": synthbirds.load,
}


def load_splits(name: str) -> datasets.DatasetDict:
    """Load all splits of a dataset, as columns "image" and "label".

    Args:
        name: Key of `BUILT_IN`; a folder of parquet files or of one sub-folder of images per class; or "user/name" on
            the Hub.

    Returns:
        Splits with the columns "image" (`datasets.Image`) and "label" (`datasets.ClassLabel`).

    Raises:
        UserError: Nothing of that name, or data without one image and one label column.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]()
    return _standard_columns(_load_folder_or_hub(name), name)


def class_names(splits: datasets.DatasetDict) -> list[str]:
    """Names of the classes, in the order of their labels."""
    return next(iter(splits.values())).features["label"].names


def pick_split(splits: datasets.DatasetDict, split: str, option: str, data: str) -> datasets.Dataset:
    """Take one split; `option` is the recipe's name for it, for the error message.

    Raises:
        UserError: There is no such split, it is empty, or a label is outside the range of the class names.
    """
    if split not in splits:
        raise UserError(
            f"dataset {data!r} has no split {split!r}, only {', '.join(splits)}: set {option} to one of these"
            f"{', or to null' if option != 'train_split' else ''}."
        )
    labels = splits[split].with_format("numpy")["label"][:]
    classes = len(class_names(splits))
    if len(labels) == 0:
        raise UserError(f"split {split!r} of dataset {data!r} is empty: set {option} to another split.")
    if not (labels.min() >= 0 and labels.max() < classes):  # also where a label is missing: NaN
        raise UserError(
            f"split {split!r} of dataset {data!r} has labels from {labels.min()} to {labels.max()}, but names for "
            f"{classes} classes: labels must lie between 0 and {classes - 1}."
        )
    return splits[split]


def _load_folder_or_hub(name: str) -> datasets.DatasetDict:
    from datasets import DatasetDict, load_dataset
    from datasets.exceptions import DatasetNotFoundError

    looks_like_hub_id = name.count("/") == 1 and not name.startswith((".", "~", "/"))
    path = Path(name).expanduser()
    if not path.is_dir() and not looks_like_hub_id:
        if "/" not in name:
            raise unknown("dataset", name, BUILT_IN)
        raise UserError(f"data folder {name!r} does not exist: give the folder with the splits, or {_choices()}.")
    try:
        splits = load_dataset(str(path) if path.is_dir() else name)
    except (DatasetNotFoundError, ConnectionError, FileNotFoundError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"no dataset {name!r}, neither as a folder nor on the Hub ({reason}): give {_choices()}."
        ) from error
    assert isinstance(splits, DatasetDict)
    return splits


def _choices() -> str:
    return f"a folder, an id on the Hub, or one of {', '.join(BUILT_IN)}"


def _standard_columns(splits: datasets.DatasetDict, name: str) -> datasets.DatasetDict:
    from datasets import ClassLabel, Image

    features = next(iter(splits.values())).features
    columns = {}
    for column, kind in (("image", Image), ("label", ClassLabel)):
        found = [key for key, feature in features.items() if isinstance(feature, kind)]
        if len(found) != 1:
            listing = ", ".join(f"{key} ({type(feature).__name__})" for key, feature in features.items())
            raise UserError(f"dataset {name!r} needs exactly one {kind.__name__} column, but has {listing}.")
        columns[found[0]] = column
    return splits.select_columns(list(columns)).rename_columns({k: v for k, v in columns.items() if k != v})
