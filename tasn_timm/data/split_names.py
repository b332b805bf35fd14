"""Splits by the names that people have for them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING

from ..errors import UserError

if TYPE_CHECKING:
    import datasets

# Ways to call a split, the first one that of `datasets`.
SYNONYMS = (("train", "training"), ("validation", "val", "valid", "dev"), ("test", "testing"))
USUAL = sum(SYNONYMS, ())


def find_split(names: Collection[str], split: str) -> str | None:
    """Find a split by its name or, where just one is there, by another usual name for it (`SYNONYMS`)."""
    if split in names:
        return split
    usual = next((group for group in SYNONYMS if split in group), ())
    found = [name for name in names if name in usual]
    return found[0] if len(found) == 1 else None


def wanted_splits(names: Collection[str], only: Collection[str], data: str) -> list[str]:
    """Names of the splits asked for, in the order of the dataset.

    Args:
        names: Of all splits.
        only: The ones asked for, under any usual name; as a mapping, with what to do where one is not there.
        data: The dataset's name, for the message.

    Raises:
        UserError: There is no such split.
    """
    missing = [split for split in only if find_split(names, split) is None]
    if missing:
        advice = only[missing[0]] if isinstance(only, Mapping) else "choose one of these"
        raise UserError(f"dataset {data!r} has no split {missing[0]!r}, only {', '.join(names)}: {advice}.")
    wanted = {find_split(names, split) for split in only}
    return [split for split in names if split in wanted]


def load_each(
    builder: datasets.DatasetBuilder, only: Collection[str], load: Callable[[dict], datasets.DatasetDict], data: str
) -> datasets.DatasetDict:
    """Load splits one by one, since `datasets` fetches and converts all of them, whatever `split` it is asked for.

    Args:
        builder: Knows the files of each split.
        only: See `wanted_splits`.
        load: {split: files} -> {split: rows}.
        data: The dataset's name, for the message.
    """
    from datasets import DatasetDict

    files = {str(split): list(paths) for split, paths in builder.config.data_files.items()}
    wanted = wanted_splits(files, only, data)
    return DatasetDict({split: load({split: files[split]})[split] for split in wanted})
