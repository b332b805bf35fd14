"""Decode every picture of a dataset once: what cannot be read, what is there twice, and what the pictures are like."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable
from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..errors import UserError
from ..memory import lost_worker
from .decoding import ORIENTATION, UnreadableImage, decode, open_picture, read, undecoded
from .split_names import find_split
from .splits import class_names

if TYPE_CHECKING:
    import datasets

SHORT_SIDE = 224  # pixels; pictures with a shorter side have to be enlarged for most recipes
BATCH = 16  # pictures that a process hands over at once

# What decoding had to convert, told from an opened file. One bit each of "traits".
TRAITS: dict[str, Callable[[Image.Image], bool]] = {
    "turned by EXIF": lambda image: image.getexif().get(ORIENTATION) in range(2, 9),
    "grey": lambda image: image.mode in ("1", "L", "LA"),
    "palette": lambda image: image.mode in ("P", "PA"),
    "transparency": lambda image: image.has_transparency_data,
    "CMYK": lambda image: image.mode == "CMYK",
    "16-bit grey": lambda image: image.mode.startswith("I"),
    "several frames": lambda image: _is_animated(image),
}

# All that is kept of a picture, so that hundreds of thousands fit into memory. Width 0: it cannot be read.
RECORD = np.dtype(
    [("digest", np.uint64, 2), ("width", np.uint32), ("height", np.uint32), ("traits", np.uint16), ("format", "S8")]
)


def check_splits(splits: datasets.DatasetDict, workers: int = 0) -> dict:
    """Decode every picture of every split, with a progress bar where somebody watches.

    Args:
        splits: As of `load_splits`.
        workers: Processes that decode; 0 to decode in this one.

    Returns:
        "images", their number; "classes", likewise; "splits", see `summarize`, where there is a training split together
        with `compare_classes`; "unreadable", one dict of split, row, file, image_id (where the data has it) and reason
        per picture; "duplicates", see `find_duplicates`.

    Raises:
        UserError: A process was killed, or lacks memory.
    """
    names = class_names(splits)
    examined = {name: examine_split(split, name, workers) for name, split in splits.items()}
    records = {name: found for name, (found, _) in examined.items()}
    labels = {name: _labels(split, len(names)) for name, split in splits.items()}
    summaries = {name: summarize(records[name], labels[name], names) for name in splits}
    train = find_split(summaries, "train")
    for name, summary in summaries.items():
        if train and name != train:
            summary |= compare_classes(summaries[train]["classes"], summary["classes"])
    unreadable = [
        place | dict(reason=reason)
        for name, (_, reasons) in examined.items()
        for place, reason in zip(_places(splits, name, list(reasons)), reasons.values())
    ]
    return dict(
        images=sum(map(len, records.values())),
        classes=len(names),
        splits=summaries,
        unreadable=unreadable,
        duplicates=find_duplicates(splits, records, labels),
    )


def examine(image: dict | None) -> tuple:
    """Decode a picture and take down what is kept of it.

    Args:
        image: As of `decode`.

    Returns:
        The fields of `RECORD`.

    Raises:
        UnreadableImage: It cannot be decoded.
    """
    data = read(image)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about oddities that it can cope with
        width, height = decode(dict(bytes=data, path=None)).size
        with open_picture(data) as opened:
            traits = sum(holds(opened) << bit for bit, holds in enumerate(TRAITS.values()))
            digest = np.frombuffer(blake2b(data, digest_size=16).digest(), np.uint64)
            return digest, width, height, traits, opened.format.encode()


class _Examined(Dataset):
    """Records of a split's pictures, a batch at a time, and by row the reasons of those that cannot be read."""

    def __init__(self, split: datasets.Dataset) -> None:
        self.split = undecoded(split)

    def __len__(self) -> int:
        return len(self.split)

    def __getitems__(self, rows: list[int]) -> tuple[np.ndarray, dict[int, str]]:
        records, reasons = np.zeros(len(rows), RECORD), {}
        for position, row in enumerate(rows):
            try:
                records[position] = examine(self.split[row]["image"])
            except UnreadableImage as error:
                reasons[row] = str(error)
        return records, reasons


def examine_split(split: datasets.Dataset, name: str, workers: int = 0) -> tuple[np.ndarray, dict[int, str]]:
    """Examine all pictures of a split.

    Args:
        split: Column "image".
        name: Of the split, for messages.
        workers: Processes that decode; 0 to decode in this one.

    Returns:
        Records (N,) of type `RECORD`; reasons by row of those that cannot be read.

    Raises:
        UserError: A process was killed, or lacks memory.
    """
    records, reasons, done = np.zeros(len(split), RECORD), {}, 0
    loader = DataLoader(_Examined(split), batch_size=BATCH, num_workers=workers, collate_fn=_as_is)
    with tqdm(total=len(split), desc=name, unit="image", disable=not sys.stderr.isatty(), leave=False) as bar:
        try:
            for batch, damaged in loader:
                records[done : done + len(batch)] = batch
                reasons |= damaged
                done += len(batch)
                bar.update(len(batch))
        except (RuntimeError, MemoryError) as error:
            reason = "out of memory" if isinstance(error, MemoryError) else lost_worker(error)
            if reason is None:
                raise
            raise UserError(
                f"decoding stopped soon after image {done} of split {name!r} ({reason}): free some memory, or give "
                f"fewer --workers."
            ) from error
    return records, reasons


def summarize(records: np.ndarray, labels: np.ndarray, names: list[str]) -> dict:
    """Sum up a split.

    Args:
        records: (N,) of type `RECORD`.
        labels: (N,), -1 for none.
        names: Of the classes.

    Returns:
        Numbers of "images", "unreadable", "unlabelled" and, with the short side below `SHORT_SIDE`, "small"; "classes",
        images of each; "width" and "height", pixels (None where no picture can be read); "formats" and "converted",
        images of each format and trait that occur.
    """
    readable = records[records["width"] > 0]
    width, height = readable["width"], readable["height"]
    formats, counts = np.unique(readable["format"], return_counts=True)
    converted = {trait: int((readable["traits"] >> bit & 1).sum()) for bit, trait in enumerate(TRAITS)}
    return dict(
        images=len(records),
        unreadable=len(records) - len(readable),
        unlabelled=int((labels < 0).sum()),
        classes=dict(zip(names, np.bincount(labels[labels >= 0], minlength=len(names)).tolist())),
        width=_spread(width),
        height=_spread(height),
        small=int((np.minimum(width, height) < SHORT_SIDE).sum()),
        formats={format.decode(): count for format, count in zip(formats, counts.tolist())},
        converted={trait: count for trait, count in converted.items() if count},
    )


def compare_classes(train: dict[str, int], other: dict[str, int]) -> dict[str, list[str]]:
    """Compare the classes of two splits, given as class -> number of images.

    Returns:
        "missing": Classes that only the first split has images of; "untrained": classes that only the other has.
    """
    return dict(
        missing=[name for name, count in train.items() if count and not other[name]],
        untrained=[name for name, count in other.items() if count and not train[name]],
    )


def find_duplicates(
    splits: datasets.DatasetDict, records: dict[str, np.ndarray], labels: dict[str, np.ndarray]
) -> list[dict]:
    """Find files with the same bytes that are in several splits, or in one under several labels.

    Args:
        splits: As of `load_splits`.
        records: Split -> (N,) of type `RECORD`.
        labels: Split -> (N,), -1 for none.

    Returns:
        One dict per file: "places", dicts of split, row, file, label and image_id (where the data has it);
        "across_splits" and "labels_agree", bool.
    """
    starts = np.cumsum([0, *map(len, records.values())])
    all_records, all_labels = np.concatenate(list(records.values())), np.concatenate(list(labels.values()))
    split_of = np.searchsorted(starts, np.arange(len(all_records)), side="right") - 1
    readable = np.flatnonzero(all_records["width"] > 0)
    groups = [readable[group] for group in same_rows(all_records["digest"][readable])]
    groups = [group for group in groups if np.ptp(split_of[group]) or np.ptp(all_labels[group])]

    names, places = [*class_names(splits), None], {}  # None: label -1
    wanted = np.sort(np.concatenate([np.zeros(0, np.int64), *groups]))
    for number, name in enumerate(splits):  # a split at a time: one look-up instead of one for each file
        mine = wanted[split_of[wanted] == number]
        places |= zip(mine.tolist(), _places(splits, name, (mine - starts[number]).tolist()))
    return [
        dict(
            across_splits=bool(np.ptp(split_of[group])),
            labels_agree=not np.ptp(all_labels[group]),
            places=[places[index] | dict(label=names[all_labels[index]]) for index in group.tolist()],
        )
        for group in groups
    ]


def same_rows(rows: np.ndarray) -> Iterable[np.ndarray]:
    """Group the equal rows of (N, columns).

    Returns:
        Indices of each group of two or more, ascending, in the order of their first.
    """
    order = np.lexsort(rows.T)  # stable
    starts = np.flatnonzero(np.any(rows[order][1:] != rows[order][:-1], axis=1)) + 1
    groups = [group for group in np.split(order, starts) if len(group) > 1]
    return sorted(groups, key=lambda group: group[0])


def _is_animated(image: Image.Image) -> bool:
    try:
        return getattr(image, "is_animated", False)
    except Exception:  # frames after the first may be damaged; nobody looks at them
        return True


def _as_is(batch: tuple) -> tuple:
    return batch


def _spread(values: np.ndarray) -> dict[str, float] | None:
    if not len(values):
        return None
    return dict(min=int(values.min()), median=float(np.median(values)), max=int(values.max()))


def _labels(split: datasets.Dataset, classes: int) -> np.ndarray:
    """Labels (N,), -1 for those that are missing or not the number of a class."""
    labels = np.nan_to_num(np.asarray(split.with_format("numpy")["label"][:], dtype=np.float64), nan=-1).astype(int)
    return np.where((labels >= 0) & (labels < classes), labels, -1)


def _places(splits: datasets.DatasetDict, name: str, rows: list[int]) -> list[dict]:
    """Where to find rows of a split, without reading their pictures."""
    if not rows:
        return []
    columns = undecoded(splits[name].select(rows)).flatten()
    columns = columns.select_columns([key for key in ("image_id", "image.path") if key in columns.column_names])
    found = columns.rename_column("image.path", "file").to_list()
    return [dict(split=name, row=row) | place for row, place in zip(rows, found)]
