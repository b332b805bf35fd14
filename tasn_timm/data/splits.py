"""Splits of a dataset by name, always with the same columns; names of classes and super-classes."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np

from ..errors import UserError
from .columns import is_stream, standard_columns, with_labels
from .hub_source import commit_of
from .sources import BUILT_IN, open_data, quiet
from .split_names import wanted_splits

if TYPE_CHECKING:
    import datasets

    Splits = datasets.DatasetDict | datasets.IterableDatasetDict

__all__ = ["BUILT_IN", "class_names", "load_splits", "pick_split", "pinned", "super_classes", "with_labels"]


def load_splits(
    name: str,
    *,
    input_key: str | None = None,
    target_key: str | None = None,
    only: Collection[str] | None = None,
    streaming: bool = False,
) -> Splits:
    """Load the splits of a dataset, as columns "image", "label" and, where the data has them, "super" and "image_id".

    Text becomes labels by the sorted texts of all splits loaded, whole numbers in the order of numbers.

    Args:
        name: Key of `BUILT_IN`: for the datasets of the paper the folder data/NAME, which `prepare` writes. Or a folder
            of parquet files, of sub-folders of images such as train/CLASS/x.jpg (without splits, CLASS/x.jpg, all is
            "train"), of tables such as train.csv, or of whatever else `datasets` reads; a CSV file with columns of
            paths and labels and maybe a column "split"; or a dataset of the Hub as "user/name" or
            "user/name@revision", a branch, tag or commit.
        input_key: Column of images, which may be text, the paths of files, or their bytes. None: the one of
            `datasets.Image`; in tables the one with a usual name (`columns.PATHS`).
        target_key: Column of labels, `datasets.ClassLabel` or text. None: the one of `ClassLabel`, or with a usual
            name (`columns.LABELS`).
        only: Splits that are needed, under any usual name; as a mapping, with what to do where one is not there. Of
            parquet files, here and on the Hub, no others are downloaded or converted; `datasets` would do so with all
            of them. Of anything else they are left out.
        streaming: Read images when they are needed, and convert nothing before. Of text, labels cannot be made then,
            except in tables.

    Returns:
        Splits with the columns "image" (`datasets.Image`), "label" (`ClassLabel`) and, of data that has a column of
        that name, "super" (`ClassLabel`; may be text): the super-class of each image's class (Table 10), and
        "image_id" as it is; of paths in text it is the path as written. When streaming, `datasets.IterableDataset`s.

    Raises:
        UserError: Nothing of that name, no access to it, no such split, or columns that are missing, not to be told
            apart, or of a kind that images or labels cannot be made of.
    """
    with quiet():
        source = open_data(name, only=only, streaming=streaming)
        splits = _only(source.splits, only, name)
        splits = standard_columns(source._replace(splits=splits), name, input_key, target_key)
        return _as_streams(splits) if streaming else splits


def pinned(name: str, splits: Splits) -> str:
    """Name that loads the same data again.

    Args:
        name: As in `load_splits`.
        splits: What it returned.

    Returns:
        "user/name@commit", with all 40 digits, for data of the Hub; any other name as it is.
    """
    commit = commit_of(name, next(iter(splits.values())))
    return f"{name.partition('@')[0]}@{commit}" if commit else name


def class_names(splits: Splits) -> list[str]:
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
    columns = split.select_columns(["super", "label"]).with_format("numpy")[:]
    found: dict[str, str] = {}
    for above, label in np.unique(np.stack([columns["super"], columns["label"]], 1), axis=0).tolist():
        if not 0 <= above < len(supers):  # also where it is missing: NaN
            raise UserError(
                f"column 'super' has {above} for class {classes[int(label)]!r}: it must be 0 to {len(supers) - 1}."
            )
        name, family = classes[int(label)], supers[int(above)]
        if name in found:
            raise UserError(
                f"class {name!r} is in super-classes {found[name]!r} and {family!r}: a "
                f"class belongs to exactly one; correct the column 'super' or leave it out."
            )
        found[name] = family
    return found


def pick_split(splits: Splits, split: str, option: str, data: str) -> datasets.Dataset | datasets.IterableDataset:
    """Take one split; `option` is the recipe's or command's name for it, for the error message.

    Args:
        splits: From `load_splits`.
        split: Its name, or where just one of these is there, another usual one: train, training; validation, val,
            valid, dev; test, testing.
        option: For the message.
        data: The dataset's name, for the message.

    Raises:
        UserError: There is no such split; or of one that is not streamed, it is empty, or a label is outside the range
            of the class names.
    """
    [found] = wanted_splits(splits, [split], data)
    if not is_stream(splits):
        _check_labels(splits[found], split, option, data)
    return splits[found]


def _check_labels(rows: datasets.Dataset, split: str, option: str, data: str) -> None:
    labels = rows.with_format("numpy")["label"][:]
    classes = rows.features["label"].num_classes
    if len(labels) == 0:
        raise UserError(f"split {split!r} of dataset {data!r} is empty: set {option} to another split.")
    if not (labels.min() >= 0 and labels.max() < classes):  # also where a label is missing: NaN
        raise UserError(
            f"split {split!r} of dataset {data!r} has labels from {labels.min()} to {labels.max()}, but names for "
            f"{classes} classes: labels must lie between 0 and {classes - 1}."
        )


def _only(splits: Splits, only: Collection[str] | None, name: str) -> Splits:
    if only is None:
        return splits
    wanted = wanted_splits(splits, only, name)
    return type(splits)({split: splits[split] for split in wanted})


def _as_streams(splits: Splits) -> datasets.IterableDatasetDict:
    """What came whole, as streams that know their numbers of images."""
    from datasets import IterableDatasetDict
    from datasets.splits import SplitDict, SplitInfo

    if is_stream(splits):
        return splits
    counts = SplitDict({split: SplitInfo(split, num_examples=len(rows)) for split, rows in splits.items()})
    streams = {split: rows.to_iterable_dataset(max(1, min(64, len(rows)))) for split, rows in splits.items()}
    for stream in streams.values():
        stream.info.splits = counts
    return IterableDatasetDict(streams)
