"""Where data comes from: built-in names, folders and tables on this machine, all opened through `datasets`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from glob import escape
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..errors import UserError, unknown
from . import synthbirds
from .hub_source import HUB_ID, check_streams, load_from_hub
from .prepare import PREPARED
from .split_names import USUAL, load_each

if TYPE_CHECKING:
    import datasets
    import pyarrow


class Source(NamedTuple):
    """Data as it was found, with the columns that it has.

    Args:
        splits: Name -> rows; `datasets.DatasetDict`, or `datasets.IterableDatasetDict` of data that is streamed.
        folder: Where paths in columns of text start; None where there can be none.
        table: Whether it is a table of text, whose images are paths.
    """

    splits: dict
    folder: Path | None = None
    table: bool = False


def _load_prepared(name: str, **options) -> Source:
    folder, official = Path("data", name), PREPARED[name]
    if folder.is_dir():
        return _load_folder(folder, **options)
    archives = " ".join(archive.name for archive in official.archives)
    images = "/".join(f"{count:,}" for count in official.images.values())
    raise UserError(
        f"dataset {name!r} ({official.title}: {official.classes:,} classes, {images} images) is not in "
        f"{str(folder)!r}: make it with python -m tasn_timm prepare {name} --archive {archives}, or give the folder "
        f"that has it."
    )


def _load_synthbirds(name: str, only: Collection[str] | None, streaming: bool) -> Source:
    return Source(synthbirds.load(variant=name, only=only))  # drawn whole also where a stream is asked for


# Each takes its name and the options of `open_data`.
BUILT_IN: dict[str, Callable[..., Source]] = {
    **dict.fromkeys(synthbirds.VARIANTS, _load_synthbirds),
    **dict.fromkeys(PREPARED, _load_prepared),
}


def open_data(name: str, *, only: Collection[str] | None = None, streaming: bool = False) -> Source:
    """Open a dataset, whatever its columns are.

    Args:
        name: See `load_splits`.
        only: See `load_splits`; other splits may be there, too.
        streaming: See `load_splits`; data that is small or cannot be streamed comes as a `datasets.DatasetDict`.

    Raises:
        UserError: There is no such data, or it cannot be read.
    """
    options = dict(only=only, streaming=streaming)
    path = Path(name).expanduser()
    if name in BUILT_IN:
        return BUILT_IN[name](name, **options)
    if path.is_dir():
        return _load_folder(path, **options)
    if path.suffix.lower() == ".csv":
        return _load_tables([path])
    if path.is_file():
        raise UserError(f"{name!r} is neither a folder nor a .csv file: give the folder that it is in, or a table.")
    if HUB_ID.fullmatch(name):
        return Source(load_from_hub(name, **options))
    if "/" not in name:
        raise unknown("dataset", name, BUILT_IN)
    raise UserError(
        f"data folder {name!r} does not exist: give a folder, a CSV file, an id on the Hub, or one of "
        f"{', '.join(BUILT_IN)}."
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Show no progress bars of `datasets` and the Hub's client where nobody watches."""
    import datasets
    from huggingface_hub import utils

    shown = [] if sys.stderr.isatty() else [m for m in (datasets, utils) if not m.are_progress_bars_disabled()]
    for module in shown:
        module.disable_progress_bars()
    try:
        yield
    finally:
        for module in shown:
            module.enable_progress_bars()


def _load_folder(folder: Path, only: Collection[str] | None, streaming: bool) -> Source:
    """A folder of tables, of `save_to_disk`, of sub-folders of images, or of whatever else `datasets` reads."""
    from datasets import DatasetDict, load_from_disk
    from datasets.exceptions import DatasetsError

    tables = [folder / f"{split}.csv" for split in USUAL if (folder / f"{split}.csv").is_file()]
    if tables:
        return _load_tables(tables)
    folder = folder.resolve()  # a relative path could be the name of a format, such as "csv"
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            saved = load_from_disk(str(folder))
            return Source(saved if isinstance(saved, DatasetDict) else DatasetDict({_split(saved): saved}), folder)
        photos = _image_folders(folder)
        splits = _load_images(photos) if photos else _load_files(folder, only, streaming)
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, NotImplementedError, DatasetsError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise UserError(
            f"data folder {str(folder)!r} cannot be read ({reason}): give parquet files, sub-folders of images such as "
            f"train/CLASS/x.jpg, or tables such as train.csv."
        ) from error
    return Source(splits, folder)


def _split(dataset: datasets.Dataset) -> str:
    return str(dataset.split or "train")


def _load_files(folder: Path, only: Collection[str] | None, streaming: bool) -> dict:
    from datasets import load_dataset, load_dataset_builder

    builder = load_dataset_builder(str(folder))
    if streaming:
        check_streams(builder, str(folder))
        return builder.as_streaming_dataset()
    if only is None or builder.name != "parquet":
        return load_dataset(str(folder))
    # Features of README.md; the files may not know the classes.
    given = dict(features=builder.info.features)
    return load_each(builder, only, lambda files: load_dataset(str(folder), data_files=files, **given), str(folder))


def _image_folders(folder: Path) -> dict[str, Path]:
    """Folders of one sub-folder of images per class: split -> folder; empty where there are none.

    By names of splits anywhere in a path, `datasets` alone would take a class "test tube" for a part of the test split.
    """
    named = {path.name.lower(): path for path in _folders(folder)}
    splits = {split: named[split] for split in USUAL if split in named and _classes(named[split])}
    if not splits and _classes(folder):
        splits = {"train": folder}
    described = any(list(path.glob("metadata.*")) for path in [folder, *splits.values()])  # `datasets` reads these
    return {} if described else splits


def _folders(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:  # knows what is a folder without asking for each of thousands of images
        return sorted(Path(entry) for entry in entries if entry.is_dir() and not entry.name.startswith((".", "__")))


def _classes(folder: Path) -> list[str]:
    """Names of the sub-folders that have images."""
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    def is_image(path: Path) -> bool:
        return path.suffix.lower() in ImageFolder.EXTENSIONS

    return [path.name for path in _folders(folder) if any(map(is_image, path.iterdir()))]


def _load_images(folders: dict[str, Path]) -> datasets.DatasetDict:
    from datasets import ClassLabel, Features, Image, load_dataset

    names = sorted(set().union(*map(_classes, folders.values())))
    for path in chain.from_iterable(map(_folders, folders.values())):
        if path.name not in names:
            raise UserError(f"class folder {str(path)!r} has no images: remove it, or put some into it.")
        if _classes(path):
            raise UserError(f"class folder {str(path)!r} has images in folders of its own: put them into it directly.")
    features = Features(image=Image(), label=ClassLabel(names=names))
    files = {split: f"{escape(str(folder))}/*/**" for split, folder in folders.items()}
    with _uncounted():
        return load_dataset("imagefolder", data_files=files, features=features, drop_labels=False)


@contextmanager
def _uncounted() -> Iterator[None]:
    """Keep `datasets` from counting a load of local files at its makers' server, which is nobody's business."""
    from datasets import config

    counted, config.HF_UPDATE_DOWNLOAD_COUNTS = config.HF_UPDATE_DOWNLOAD_COUNTS, False
    try:
        yield
    finally:
        config.HF_UPDATE_DOWNLOAD_COUNTS = counted


def _load_tables(paths: list[Path]) -> Source:
    """CSV files: one of a column "split" or of one split, or several that are named for their splits."""
    from datasets import DatasetDict

    tables = {path.stem if path.stem in USUAL else "train": _read_table(path) for path in paths}
    (path, table), *more = zip(paths, tables.values())
    if not more and "split" in table.column_names:
        tables = _by_split(table, path)
    return Source(DatasetDict({split: _dataset(table, split) for split, table in tables.items()}), path.parent, True)


def _read_table(path: Path) -> pyarrow.Table:
    """Read a CSV file as text; an empty cell is missing."""
    import pyarrow as pa
    from pyarrow import csv

    reading = csv.ReadOptions(use_threads=False)  # with threads an error may not say in which row
    try:
        names = csv.open_csv(path, read_options=reading).schema.names
        convert = csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=True, null_values=[""]
        )
        table = csv.read_csv(
            path,
            read_options=reading,
            parse_options=csv.ParseOptions(newlines_in_values=True),
            convert_options=convert,
        )
    except (OSError, ValueError) as error:  # pyarrow's own are ValueErrors
        reason = " ".join(str(error).split())
        raise UserError(f"table {str(path)!r} cannot be read ({reason}): give a CSV file with a header.") from error
    if len(set(names)) < len(names) or not len(table):
        problem = "has two columns of one name" if len(table) else "has no rows"
        raise UserError(f"table {str(path)!r} {problem}: give one with a header like image,label.")
    return table


def _by_split(table: pyarrow.Table, path: Path) -> dict[str, pyarrow.Table]:
    import pyarrow.compute as pc

    if table["split"].null_count:
        raise UserError(f"column 'split' of {str(path)!r} has empty cells: fill them in, or leave out the column.")
    return {split: table.filter(pc.equal(table["split"], split)) for split in table["split"].unique().to_pylist()}


def _dataset(table: pyarrow.Table, split: str) -> datasets.Dataset:
    from datasets import Dataset, NamedSplit

    return Dataset(table, split=NamedSplit(split))
