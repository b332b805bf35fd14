"""Which columns of a dataset are images and labels, and how they become such; images are not read for it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import UserError
from .sources import Source

if TYPE_CHECKING:
    import datasets
    import pyarrow

    Splits = datasets.DatasetDict | datasets.IterableDatasetDict

# Usual names, in small letters, of columns of images, of paths of images in tables, and of labels.
IMAGES = {"image", "img", "photo", "picture"}
PATHS = IMAGES | {"path", "file", "filename", "filepath", "file_name", "file_path", "image_path", "img_path"}
LABELS = {"label", "labels", "class", "category", "species", "target", "class_name", "label_name", "fine_label"}


def standard_columns(source: Source, name: str, input_key: str | None, target_key: str | None) -> Splits:
    """Give splits the columns "image", "label" and, where they have them, "super" and "image_id".

    Args:
        source: The data.
        name: Of it, for messages.
        input_key: See `load_splits`.
        target_key: See `load_splits`.

    Raises:
        UserError: See `load_splits`.
    """
    splits = source.splits
    features = _features(splits, name)
    image = _image_column(features, name, input_key, source.table)
    label = _label_column(features, name, target_key)
    if image == label:
        raise UserError(
            f"column {image!r} of dataset {name!r} cannot be both --input-key and --target-key: name another for one."
        )
    columns = {image: "image", label: "label"}
    columns |= {key: key for key in ("super", "image_id") if key in features and key not in columns}
    splits = _rename(splits.select_columns(list(columns)), {k: v for k, v in columns.items() if k != v})
    splits = _images(splits, image, source, name)
    for column, original in (("label", label), ("super", "super")):
        if column in columns.values():
            splits = _labels(splits, column, original, name)
    return splits


def is_stream(splits: Splits) -> bool:
    """Whether splits are read as they are needed, rather than mapped into memory."""
    return not hasattr(splits, "num_rows")


def _rename(splits: Splits, names: dict[str, str]) -> Splits:
    if not names:
        return splits
    if not is_stream(splits):
        return splits.rename_columns(names)
    # A stream that renames would decode all images for it.
    raw = type(splits)({split: rows.decode(False) for split, rows in splits.items()}).rename_columns(names)
    return type(splits)({split: rows.decode() for split, rows in raw.items()})


def with_labels(
    split: datasets.Dataset, labels: np.ndarray, names: Sequence[str], column: str = "label"
) -> datasets.Dataset:
    """Replace the labels of a split; images are neither read nor copied.

    Args:
        split: Has the column.
        labels: One for each row; -1 where it is unknown.
        names: Of the classes.
        column: To replace.
    """
    from datasets import ClassLabel

    # cast_column would write everything anew, images too. The label's own check is not ours: pick_split's says more.
    return split.remove_columns(column).add_column(column, labels, feature=ClassLabel(names=list(names)))


def _features(splits: Splits, name: str) -> datasets.Features:
    """Columns, which all splits must have alike."""
    first, *others = splits.items()
    for split, rows in (first, *others):
        if rows.features is None:
            raise UserError(f"dataset {name!r} does not say what its columns are: leave out --streaming.")
        missing = set(first[1].features).symmetric_difference(rows.features)
        if missing:
            raise UserError(
                f"column {sorted(missing)[0]!r} of dataset {name!r} is in one of the splits {first[0]!r} and {split!r} "
                f"only: give all of them the same columns."
            )
    return first[1].features


def _image_column(features: datasets.Features, name: str, key: str | None, table: bool) -> str:
    from datasets import Image

    if key is not None:
        return _asked_for(features, name, "--input-key", key)
    found = [column for column, feature in features.items() if isinstance(feature, Image)]
    if table:
        found = [column for column in features if column.lower() in PATHS]
    if len(found) != 1:
        usable = [column for column, feature in features.items() if _is_text(feature) or _is_bytes(feature)]
        usable = f" (text or bytes here: {', '.join(usable)})" if usable else ""
        kind = "column of paths with a usual name" if table else "Image column"
        raise UserError(
            f"dataset {name!r} needs exactly one {kind}, but has {_listing(features)}: name the one with the "
            f"images, or their paths, with --input-key{usable}."
        )
    return found[0]


def _label_column(features: datasets.Features, name: str, key: str | None) -> str:
    from datasets import ClassLabel

    if key is not None:
        return _asked_for(features, name, "--target-key", key)
    usual = [column for column in features if column.lower() in LABELS]
    named = [column for column, feature in features.items() if isinstance(feature, ClassLabel) and column != "super"]
    text = [column for column in usual if _is_text(features[column])]
    found = named or text or usual
    if len(found) > 1:
        found = [column for column in found if column in usual]
    if len(found) != 1:
        beside = ", besides 'super'" if "super" in features else ""
        usable = [column for column, feature in features.items() if _is_text(feature)]
        usable = f" (text here: {', '.join(usable)})" if usable else ""
        raise UserError(
            f"dataset {name!r} needs exactly one ClassLabel column{beside}, or one of text with a usual name, but has "
            f"{_listing(features)}: name the one with the classes with --target-key{usable}."
        )
    return found[0]


def _asked_for(features: datasets.Features, name: str, option: str, key: str) -> str:
    if key not in features:
        raise UserError(
            f"{option} {key!r} is not a column of dataset {name!r}, which has {_listing(features)}: give one of these."
        )
    return key


def _listing(features: datasets.Features) -> str:
    return ", ".join(f"{column} ({type(feature).__name__})" for column, feature in features.items())


def _is_text(feature: object) -> bool:
    return getattr(feature, "dtype", None) in ("string", "large_string") and not hasattr(feature, "decode_example")


def _is_bytes(feature: object) -> bool:
    return getattr(feature, "dtype", None) in ("binary", "large_binary")


def _images(splits: Splits, original: str, source: Source, name: str) -> Splits:
    """Make images of the column "image", which was called `original`, where it is something else."""
    from datasets import Image

    feature = next(iter(splits.values())).features["image"]
    if isinstance(feature, Image):
        return splits
    if _is_bytes(feature):
        return splits.cast_column("image", Image())
    if not _is_text(feature):
        raise UserError(
            f"column {original!r} of dataset {name!r} must be images, or paths or bytes of images, but is {feature}: "
            f"name another one with --input-key."
        )
    if source.folder is None:
        raise UserError(
            f"column {original!r} of dataset {name!r} has paths, which are read from folders on this machine only: use "
            f"a dataset with the images themselves."
        )
    if is_stream(splits):
        raise UserError(
            f"column {original!r} of dataset {name!r} has paths, which are not read when streaming: leave out "
            f"--streaming."
        )
    return type(splits)({split: _from_paths(rows, source.folder, name) for split, rows in splits.items()})


def _from_paths(rows: datasets.Dataset, folder: Path, name: str) -> datasets.Dataset:
    import pyarrow as pa
    from datasets import Image, Value

    written = _column(rows, "image").to_pylist()
    if None in written:
        raise UserError(f"dataset {name!r} has no path for image {written.index(None)}: fill it in, or remove the row.")
    start = str(folder.absolute())
    paths = [os.path.join(start, path) for path in written]
    if paths and not Path(paths[0]).is_file():
        raise UserError(
            f"dataset {name!r} names an image {written[0]!r}, but there is no file {paths[0]!r}: paths start at the "
            f"folder {str(folder)!r}."
        )
    if "image_id" not in rows.column_names:
        rows = rows.add_column("image_id", written, feature=Value("string"))
    images = pa.StructArray.from_arrays(
        [pa.nulls(len(paths), pa.binary()), pa.array(paths, pa.string())], ["bytes", "path"]
    )
    return rows.remove_columns("image").add_column("image", images, feature=Image())


def _labels(splits: Splits, column: str, original: str, name: str) -> Splits:
    """Make labels of a column of text, the same in all splits."""
    from datasets import ClassLabel

    feature = next(iter(splits.values())).features[column]
    if isinstance(feature, ClassLabel):
        return _check_same_names(splits, column, original, name)
    if not _is_text(feature):
        hint = ": name a column of text with --target-key, or save" if column == "label" else ": save"
        raise UserError(
            f"column {original!r} of dataset {name!r} must be text or a ClassLabel, but is {feature}, which says no "
            f"names{hint} it as datasets.ClassLabel(names=[...])."
        )
    if is_stream(splits):
        raise UserError(
            f"column {original!r} of dataset {name!r} is text, and to stream data its labels must be known before: "
            f"save it as datasets.ClassLabel(names=[...]), or leave out --streaming."
        )
    names = _in_order({text for rows in splits.values() for text in _column(rows, column).unique().to_pylist()})
    return type(splits)({split: _encode(rows, column, names) for split, rows in splits.items()})


def _check_same_names(splits: Splits, column: str, original: str, name: str) -> Splits:
    first, *others = [(split, rows.features[column].names) for split, rows in splits.items()]
    for split, names in others:
        if names != first[1]:
            raise UserError(
                f"splits {first[0]!r} and {split!r} of dataset {name!r} have different names in column {original!r}: "
                f"save them with the same datasets.ClassLabel."
            )
    return splits


def _in_order(texts: set[str | None]) -> list[str]:
    texts = texts - {None}
    numbers = all(text.isascii() and text.isdigit() for text in texts)
    return sorted(texts, key=lambda text: (int(text) if numbers else 0, text))


def _encode(rows: datasets.Dataset, column: str, names: list[str]) -> datasets.Dataset:
    import pyarrow as pa
    import pyarrow.compute as pc

    texts = _column(rows, column)
    labels = pc.fill_null(pc.index_in(texts, value_set=pa.array(names, texts.type)), -1)
    return with_labels(rows, labels.to_numpy().astype(np.int64), names, column)


def _column(rows: datasets.Dataset, column: str) -> pyarrow.ChunkedArray:
    return rows.select_columns([column]).with_format("arrow")[:][column]
