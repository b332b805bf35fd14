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
# The paper's datasets (Table 1): have to be asked for, or are too large. Numbers are images to train on and to test.
NOT_DOWNLOADED = {
    "cub200": "CUB-200-2011: 200 classes, 5,994/5,794 images",
    "cars196": "Stanford Cars: 196 classes, 8,144/8,041 images",
    "inat2017": "iNaturalist 2017: 5,089 classes, 579,184/95,986 images",
}


def load_splits(name: str) -> datasets.DatasetDict:
    """Load all splits of a dataset, as columns "image", "label" and, where the data has it, "super".

    Args:
        name: Key of `BUILT_IN`; a folder of parquet files or of one sub-folder of images per class; or "user/name" on
            the Hub.

    Returns:
        Splits with the columns "image" (`datasets.Image`), "label" (`datasets.ClassLabel`) and, of data that has a
        column of that name, "super" (`datasets.ClassLabel`; may be text): the super-class of each image's class
        (Table 10).

    Raises:
        UserError: Nothing of that name, data without one image and, beside "super", one label column, or a "super"
            that is neither text nor a label.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]()
    if name in NOT_DOWNLOADED and not Path(name).is_dir():
        raise UserError(
            f"dataset {name!r} ({NOT_DOWNLOADED[name]}) is not downloaded by this package: get it from its authors and "
            f"pass --data FOLDER (to evaluate: FOLDER) with parquet files, or with sub-folders train/ and test/ that "
            f"have one sub-folder per class."
        )
    return _standard_columns(_load_folder_or_hub(name), name)


def class_names(splits: datasets.DatasetDict) -> list[str]:
    """Names of the classes, in the order of their labels."""
    return next(iter(splits.values())).features["label"].names


def super_classes(split: datasets.Dataset) -> dict[str, str] | None:
    """Map the classes of a split's images to their super-classes, in the order of the super-classes.

    Args:
        split: Columns "label" and, for data with super-classes, "super".

    Returns:
        Name of a class -> name of its super-class; None without a column "super".

    Raises:
        UserError: A class is in two super-classes, or an image in none.
    """
    if "super" not in split.column_names:
        return None
    classes, supers = split.features["label"].names, split.features["super"].names
    columns = split.with_format("numpy")
    found: dict[str, str] = {}
    for above, label in sorted(set(zip(columns["super"][:].tolist(), columns["label"][:].tolist()))):
        if not 0 <= above < len(supers):  # also where it is missing: NaN
            raise UserError(
                f"column 'super' has {above} for class {classes[label]!r}: it must be 0 to {len(supers) - 1}."
            )
        if classes[label] in found:
            raise UserError(
                f"class {classes[label]!r} is in super-classes {found[classes[label]]!r} and {supers[above]!r}: a "
                f"class belongs to exactly one; correct the column 'super' or leave it out."
            )
        found[classes[label]] = supers[int(above)]
    return found


def pick_split(splits: datasets.DatasetDict, split: str, option: str, data: str) -> datasets.Dataset:
    """Take one split; `option` is the recipe's or command's name for it, for the error message.

    Raises:
        UserError: There is no such split, it is empty, or a label is outside the range of the class names.
    """
    if split not in splits:
        raise UserError(
            f"dataset {data!r} has no split {split!r}, only {', '.join(splits)}: set {option} to one of these"
            f"{', or to null' if option in ('val_split', 'test_split') else ''}."
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
        found = [key for key, feature in features.items() if isinstance(feature, kind) and key != "super"]
        if len(found) != 1:
            listing = ", ".join(f"{key} ({type(feature).__name__})" for key, feature in features.items())
            beside = ", besides 'super'" if "super" in features else ""
            raise UserError(f"dataset {name!r} needs exactly one {kind.__name__} column{beside}, but has {listing}.")
        columns[found[0]] = column
    if "super" in features:
        columns["super"] = "super"
        splits = _label_column(splits, "super", name)
    return splits.select_columns(list(columns)).rename_columns({k: v for k, v in columns.items() if k != v})


def _label_column(splits: datasets.DatasetDict, column: str, name: str) -> datasets.DatasetDict:
    """Make labels of a column of text, the same in all splits."""
    from datasets import ClassLabel, Value

    feature = next(iter(splits.values())).features[column]
    if isinstance(feature, ClassLabel):
        return splits
    if not (isinstance(feature, Value) and feature.dtype in ("string", "large_string")):
        raise UserError(f"column {column!r} of dataset {name!r} must be text or a ClassLabel, but is {feature}.")
    texts = sorted({text for split in splits.values() for text in split.unique(column) if text is not None})
    return splits.cast_column(column, ClassLabel(names=texts))
