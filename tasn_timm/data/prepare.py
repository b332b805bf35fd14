"""Official archives to parquet splits: a folder that `datasets` and the Hub know, there complete or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from .. import __version__
from ..errors import UserError
from .archives import Source, find_sources
from .cars196 import CARS196
from .cub200 import CUB200
from .inat2017 import INAT2017
from .official import Contents, Official

if TYPE_CHECKING:
    import datasets

PREPARED = {official.name: official for official in (CUB200, CARS196, INAT2017)}

ROW_GROUP = 100  # images; what a reader has to load for one of them
ROW_GROUP_BYTES = 32 << 20  # of images: what is kept in memory at most
SHARD_BYTES = 500 * 10**6
MARKER = "prepared.json"  # says that a folder was written by this file, and of which dataset

CARD = """---
{metadata}
---

# {title}

{about}

{terms} The images are unchanged, byte for byte.

| split | images |
|---|---|
{images}

{classes} classes, as in Table 1 of *Looking for the Devil in the Details* (Zheng et al., CVPR 2019).

Written by tasn_timm {version} with `python -m tasn_timm prepare {name} --archive {files}` from

{archives}

```python
from datasets import load_dataset

splits = load_dataset("FOLDER or USER/NAME")
```
"""


def prepare(official: Official, given: Sequence[Path], out: Path) -> None:
    """Check the archives of a dataset and write its splits as parquet files.

    Args:
        official: The dataset.
        given: Its archives, or folders with what they unpack to.
        out: Folder to write; must not exist, or be empty.

    Raises:
        UserError: The folder is taken or cannot be written, or an archive is missing, damaged or not the official one.
    """
    out = out.expanduser().resolve()  # a link could not be replaced at the end
    _refuse_taken(official, out)
    sources = find_sources(official.archives, given)
    with _aside(out) as scratch:
        contents = official.read(official, sources, scratch)
        folder = scratch / "dataset"
        info = _write_splits(contents, folder / "data", list(official.images))
        (folder / "README.md").write_text(_card(official, sources, info), encoding="utf-8")
        marker = dict(
            dataset=official.name,
            archives={name: source.checked for name, source in sources.items()},
            classes=official.classes,
            images={name: split.num_examples for name, split in info.splits.items()},
            tasn_timm=__version__,
        )
        (folder / MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")
        folder.replace(out)


def is_prepared(official: Official, folder: Path) -> bool:
    """Whether a folder holds this dataset, as `prepare` wrote it."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(marker, dict) and marker.get("dataset") == official.name


def _refuse_taken(official: Official, out: Path) -> None:
    if out.is_dir() and any(out.iterdir()):
        finished = f"holds {official.title} already" if is_prepared(official, out) else "is not empty"
        raise UserError(f"folder {str(out)!r} {finished}: remove it, or give another one with --out.")
    if out.is_mount() or out.is_file():
        raise UserError(f"{str(out)!r} cannot become a folder of its own: give a new one with --out.")


@contextmanager
def _aside(out: Path) -> Iterator[Path]:
    """A hidden folder beside another one, which no other process uses; removed at the end, or by the next run."""
    from filelock import FileLock, Timeout

    folder = out.with_name(f".{out.name}.preparing")
    lock = FileLock(folder / "lock")  # which the system gives back when a process dies
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with lock.acquire(blocking=False):
            try:
                shutil.rmtree(folder / "dataset", ignore_errors=True)  # of a run that was killed
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    except Timeout as error:
        raise UserError(f"another process is writing {str(out)!r}: wait for it, or give another --out.") from error
    except OSError as error:
        raise UserError(f"{str(out)!r} cannot be written ({error}): give a folder with space in --out.") from error


def _write_splits(contents: Contents, folder: Path, splits: list[str]) -> datasets.DatasetInfo:
    """Write all rows, and describe them."""
    from datasets import DatasetInfo
    from datasets.splits import SplitDict, SplitInfo

    folder.mkdir(parents=True)
    shards = {split: _Shards(folder, split, contents.features) for split in splits}
    for split, row in contents.rows:
        shards[split].add(row)
    for written in shards.values():
        written.close()
    infos = (SplitInfo(split, shards[split].bytes, shards[split].images) for split in splits)
    return DatasetInfo(
        features=contents.features,
        splits=SplitDict({info.name: info for info in infos}),
        dataset_size=sum(written.bytes for written in shards.values()),
        download_size=sum(path.stat().st_size for path in folder.iterdir()),
    )


class _Shards:
    """The parquet files of a split.

    Attributes:
        images: Number of rows written.
        bytes: Their size as `datasets` counts it, in Arrow's memory.
    """

    def __init__(self, folder: Path, split: str, features: datasets.Features) -> None:
        self.folder, self.split, self.schema = folder, split, features.arrow_schema
        self.images = self.bytes = 0
        self.rows, self.waiting = [], 0  # of the next row group, and the bytes of its images
        self.paths, self.writer, self.shard_bytes = [], None, 0

    def add(self, row: dict) -> None:
        """Write a row, soon."""
        self.rows.append(row)
        self.waiting += len(row["image"]["bytes"])
        if len(self.rows) == ROW_GROUP or self.waiting >= ROW_GROUP_BYTES:
            self._write_group()

    def close(self) -> None:
        """Write the rows that wait, and give the files the names that `datasets` gives its own."""
        if self.rows:
            self._write_group()
        if self.writer is not None:
            self.writer.close()
        for number, path in enumerate(self.paths):
            path.rename(self.folder / f"{self.split}-{number:05d}-of-{len(self.paths):05d}.parquet")

    def _write_group(self) -> None:
        import pyarrow as pa
        from pyarrow.parquet import ParquetWriter

        group = pa.Table.from_pylist(self.rows, self.schema)
        if self.writer is None:
            self.paths.append(self.folder / f"{self.split}-{len(self.paths):05d}.parquet")
            # Images are compressed, and no two of them the same.
            self.writer = ParquetWriter(self.paths[-1], self.schema, compression="none", use_dictionary=False)
        self.writer.write_table(group)
        self.images += len(self.rows)
        self.bytes += group.nbytes
        self.shard_bytes += group.nbytes
        self.rows, self.waiting = [], 0
        if self.shard_bytes >= SHARD_BYTES:
            self.writer.close()
            self.writer, self.shard_bytes = None, 0


def _card(official: Official, sources: Mapping[str, Source], info: datasets.DatasetInfo) -> str:
    """A dataset card, from whose metadata `datasets` knows splits, columns and numbers."""
    from datasets.info import DatasetInfosDict
    from huggingface_hub import DatasetCardData

    data_files = [dict(split=split, path=f"data/{split}-*.parquet") for split in info.splits]
    metadata = DatasetCardData(
        pretty_name=official.title,
        license="other",
        task_categories=["image-classification"],
        configs=[dict(config_name="default", data_files=data_files)],
    )
    DatasetInfosDict(default=info).to_dataset_card_data(metadata)
    return CARD.format(
        metadata=metadata.to_yaml(),
        title=official.title,
        about=official.about,
        terms=official.terms,
        images="\n".join(f"| {name} | {split.num_examples} |" for name, split in info.splits.items()),
        classes=official.classes,
        version=__version__,
        name=official.name,
        files=" ".join(dict.fromkeys(source.path.name for source in sources.values())),
        archives="\n".join(f"- {name}, {source.checked}" for name, source in sources.items()),
    )
