"""Streamed training images: what a share of a stream holds, whatever the number of processes and workers."""

import io
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, DatasetInfo, Features, Image, Value
from datasets.splits import SplitDict, SplitInfo
from huggingface_hub import DatasetCard, DatasetCardData
from PIL import Image as PILImage

from tasn_timm.data.splits import load_splits
from tasn_timm.data.streaming import StreamedImages, create_stream_loader
from tasn_timm.data.transforms import train_transform

SHARDS, IN_SHARD = 4, 12
FEATURES = Features(image=Image(), label=ClassLabel(names=["a", "b", "c"]), image_id=Value("string"))


def png(value: int) -> bytes:
    file = io.BytesIO()
    PILImage.fromarray(np.full((8, 8, 3), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch):
    """`datasets` sleeps for 5 seconds after every pass, so that Arrow's threads can end."""
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


@pytest.fixture
def shards(tmp_path) -> Path:
    return write_shards(tmp_path / "shards")


def write_shards(folder: Path, spoiled: tuple[int, ...] = (), label_of=lambda value: value % 3) -> Path:
    """Image i is all of value i; parquet files of 12 images, and one of three as the test split."""
    (folder / "data").mkdir(parents=True)
    for shard in range(SHARDS + 1):
        values = range(shard * IN_SHARD, (shard + 1) * IN_SHARD)
        rows = dict(
            image=[dict(bytes=b"spoiled" if value in spoiled else png(value), path=None) for value in values],
            label=[label_of(value) for value in values],
            image_id=[f"id{value}" for value in values],
        )
        split = f"train-{shard:05}-of-{SHARDS:05}" if shard < SHARDS else "test-00000-of-00001"
        table = Dataset.from_dict(
            rows, features=Features(image=Image(), label=Value("int64"), image_id=Value("string"))
        )
        Dataset(table.data, info=DatasetInfo(features=FEATURES)).to_parquet(folder / "data" / f"{split}.parquet")
    counts = dict(train=SHARDS * IN_SHARD, test=IN_SHARD)
    splits = SplitDict({name: SplitInfo(name, num_examples=count) for name, count in counts.items()})
    files = [dict(split=name, path=f"data/{name}-*") for name in counts]
    info = DatasetInfo(features=FEATURES, splits=splits)
    data = DatasetCardData(configs=[dict(config_name="default", data_files=files)])
    data.dataset_info = info._to_yaml_dict()
    DatasetCard(f"---\n{data}\n---\n").save(folder / "README.md")
    return folder


def share(folder: Path, images: int = 48, batch_size: int = 6, **options) -> StreamedImages:
    split = load_splits(str(folder), only=["train"], streaming=True)["train"]
    return StreamedImages(split, train_transform(8, color_jitter=0.4), images, batch_size, **options)


def values(dataset: StreamedImages, workers: int = 0, epoch: int = 0) -> list[int]:
    dataset.begin(epoch)
    return [int(pixel) for batch in create_stream_loader(dataset, workers) for pixel in batch.images[0][:, 0, 0, 0]]


@pytest.mark.parametrize("workers", [0, 2, 4])
def test_an_epoch_of_equal_shards_has_every_image_once(shards, workers):
    dataset = share(shards)
    first, second = values(dataset, workers), values(dataset, workers, epoch=1)
    assert sorted(first) == sorted(second) == list(range(48))
    assert first != second and first != list(range(48))
    assert values(share(shards), workers) == first, "the same for the same seed"
    assert values(share(shards, seed=1), workers) != first


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("workers", [0, 1])
def test_processes_have_shards_of_their_own(shards, processes, workers):
    shares = [
        values(share(shards, 48 // processes, process=process, processes=processes), workers)
        for process in range(processes)
    ]
    assert sorted(chain.from_iterable(shares)) == list(range(48))


@pytest.mark.parametrize("workers", [0, 2])
def test_every_process_has_as_many_images_as_it_was_told(shards, workers):
    # 3 processes and 4 shards: each reads all and keeps its third of the rows.
    shares = [values(share(shards, 12, process=process, processes=3), workers) for process in range(3)]
    assert [len(one) for one in shares] == [12, 12, 12]
    assert max(Counter(chain.from_iterable(shares)).values()) == 1
    more = values(share(shards, 60), workers)
    assert len(more) == 60 and set(more) == set(range(48)), "from the beginning again"


def test_the_last_batches_are_dealt_to_workers_in_turn(shards):
    batches = list(create_stream_loader(share(shards, 18), workers=4))
    assert [len(batch.labels) for batch in batches] == [6, 6, 6]


def test_augmentation_is_the_images_own(shards):
    def colours(workers: int, epoch: int) -> dict[int, torch.Tensor]:
        dataset = share(shards)
        dataset.begin(epoch)
        batches = list(create_stream_loader(dataset, workers))
        pairs = [pair for batch in batches for pair in zip(*batch.images)]
        return {int(pixels[0, 0, 0]): colour for pixels, colour in pairs}

    one, two, other = colours(0, 3), colours(2, 3), colours(0, 4)
    assert all(torch.equal(one[value], two[value]) for value in range(48))
    assert not any(torch.equal(one[value], other[value]) for value in range(48))


def test_bad_images_give_way_to_the_next(tmp_path):
    folder = write_shards(tmp_path / "shards", spoiled=(3, 20))
    batches = list(create_stream_loader(share(folder, 42, max_bad_images=1)))
    assert {image.image_id for batch in batches for image in batch.bad} <= {"id3", "id20"}
    assert not {3, 20} & {int(v) for batch in batches for v in batch.images[0][:, 0, 0, 0]}
    with pytest.raises(ValueError, match=r"id id(3|20), in the dataset\) cannot be read: not an image"):
        list(create_stream_loader(share(folder)))


def test_a_bad_image_of_a_stream_is_the_same_one_in_every_epoch(tmp_path):
    folder = write_shards(tmp_path / "shards", spoiled=(3,))
    found = set()
    for epoch in range(3):
        dataset = share(folder, max_bad_images=1)
        dataset.begin(epoch)
        found |= {image for batch in create_stream_loader(dataset, workers=2) for image in batch.bad}
    assert [(image.row, image.image_id) for image in found] == [(None, "id3")]


def test_labels_out_of_range_are_an_error(tmp_path):
    folder = write_shards(tmp_path / "shards", label_of=lambda value: 3 if value == 7 else 0)
    with pytest.raises(ValueError, match="a label is 3, but there are names for 3 classes"):
        list(create_stream_loader(share(folder)))


def test_more_workers_than_shards_are_refused(shards):
    with pytest.raises(
        ValueError, match="workers 5 is more than the 4 shards that each process streams: use --workers 4"
    ):
        create_stream_loader(share(shards), workers=5)
    with pytest.raises(ValueError, match="the 2 shards"):
        create_stream_loader(share(shards, 24, process=1, processes=2), workers=3)


def test_streams_know_their_number_of_images(shards):
    splits = load_splits(str(shards), only=["train"], streaming=True)
    assert splits["train"].info.splits["train"].num_examples == 48
    assert not isinstance(splits, DatasetDict)
