"""Splits, decoding, transforms, and an order and augmentation that depend on (seed, epoch, index) alone."""

import io
import random
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value, config, load_dataset
from PIL import Image as PILImage

from tasn_timm.data.decoding import decode
from tasn_timm.data.loading import Batch, KeyedBatches, KeyedImages, create_loader, create_train_loader, keyed_seed
from tasn_timm.data.splits import class_names, load_splits, pick_split
from tasn_timm.data.transforms import eval_transform, train_transform


def png(pixels: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    PILImage.fromarray(pixels).save(file, "PNG", **options)
    return file.getvalue()


def numbered_split(count: int = 20, size: int = 24) -> Dataset:
    """Image i is all of value i."""
    rows = [
        dict(image=dict(bytes=png(np.full((size, size, 3), i, np.uint8)), path=None), label=i % 3) for i in range(count)
    ]
    return Dataset.from_list(rows, features=Features(image=Image(), label=ClassLabel(names=["a", "b", "c"])))


def test_an_image_folder_loads_with_its_class_names(image_folder):
    splits = load_splits(str(image_folder))
    assert {name: len(split) for name, split in splits.items()} == dict(train=48, validation=15, test=21)
    assert class_names(splits) == ["blue", "green", "red"]


def test_nobody_is_told_that_a_folder_of_images_was_loaded(image_folder, monkeypatch, tmp_path):
    """`datasets` counts it at a server, where nobody has forbidden that; for tests conftest.py has."""
    monkeypatch.setattr("datasets.config.HF_UPDATE_DOWNLOAD_COUNTS", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    told = []
    monkeypatch.setattr("datasets.load.get_session", lambda: told.append(None))
    load_dataset("imagefolder", data_dir=str(image_folder))
    assert told, "the counter is seen"
    told.clear()
    assert len(load_splits(str(image_folder))["train"]) == 48
    assert not told and config.HF_UPDATE_DOWNLOAD_COUNTS


def test_parquet_loads_under_other_column_names(tmp_path):
    features = Features(picture=Image(), species=ClassLabel(names=["x", "y"]), note=Value("string"))
    rows = [dict(picture=dict(bytes=png(np.zeros((4, 4, 3), np.uint8)), path=None), species=1, note="")] * 3
    (tmp_path / "data").mkdir()
    for name in ("train", "test"):
        Dataset.from_list(rows, features=features).to_parquet(tmp_path / "data" / f"{name}-00000.parquet")
    splits = load_splits(str(tmp_path / "data"))
    assert splits["train"].column_names == ["image", "label"]
    assert class_names(splits) == ["x", "y"]
    assert splits["test"]["label"][:] == [1, 1, 1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("synthbird", "unknown dataset 'synthbird': did you mean 'synthbirds'"),
        ("/no/such/folder", "data folder '/no/such/folder' does not exist"),
        ("./no/such", "data folder './no/such' does not exist"),
    ],
)
def test_missing_data_is_named(name, message):
    with pytest.raises(ValueError, match=message):
        load_splits(name)


def test_data_without_labels_lists_its_columns(tmp_path):
    Dataset.from_dict(dict(a=[1], b=["x"])).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"exactly one Image column, but has a \(Value\), b \(Value\)"):
        load_splits(str(tmp_path))


def test_missing_empty_and_mislabelled_splits_are_named():
    split = numbered_split(3)
    bad = split.cast_column("label", Value("int64")).map(lambda row: dict(label=row["label"] + 1))
    bad = Dataset(bad.data, info=split.info)  # ClassLabel's own cast would not look either
    splits = DatasetDict(train=split, bad=bad, empty=split.select([]))
    assert len(pick_split(splits, "train", "train_split", "mine")) == 3
    with pytest.raises(ValueError, match="no split 'validation', only train, bad, empty: choose one of these"):
        pick_split(splits, "validation", "val_split", "mine")
    with pytest.raises(ValueError, match="labels from 1 to 3, but names for 3 classes"):
        pick_split(splits, "bad", "test_split", "mine")
    with pytest.raises(ValueError, match="'empty' of dataset 'mine' is empty"):
        pick_split(splits, "empty", "test_split", "mine")


def test_decoding_turns_the_picture_upright_and_makes_it_rgb():
    pixels = np.zeros((2, 3, 3), np.uint8)
    pixels[0, 0] = 255
    exif = PILImage.Exif()
    exif[274] = 6  # the camera was turned by 90 degrees
    upright = np.asarray(decode(dict(bytes=png(pixels, exif=exif), path=None)))
    assert upright.shape == (3, 2, 3)
    assert upright[0, 1].tolist() == [255, 255, 255] and upright.sum() == 3 * 255
    grey = decode(dict(bytes=png(np.full((2, 2), 7, np.uint8)), path=None))
    assert np.asarray(grey).tolist() == [[[7, 7, 7]] * 2] * 2


def test_an_unreadable_image_is_named():
    rows = [dict(image=dict(bytes=b"no image", path=None), label=0)]
    split = Dataset.from_list(rows, features=Features(image=Image(), label=ClassLabel(names=["a"])))
    with pytest.raises(ValueError, match="image 0 .* cannot be read"):
        KeyedImages(split, eval_transform(4))[0, 0]


def epoch_of(batches: KeyedBatches, number: int) -> list[list[int]]:
    batches.epochs = number + 1
    batches.begin(number)
    keys = list(batches)
    assert len(keys) == len(batches) and {epoch for batch in keys for epoch, _ in batch} == {number}
    return [[index for _, index in batch] for batch in keys]


def images_of(batches: KeyedBatches, number: int) -> list[int]:
    return [index for batch in epoch_of(batches, number) for index in batch]


def test_the_order_is_another_permutation_each_epoch_and_the_same_for_a_seed():
    batches = KeyedBatches(20, 0, group=4)
    first, second = images_of(batches, 0), images_of(batches, 1)
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second
    assert images_of(KeyedBatches(20, 0, group=4), 1) == second
    assert images_of(KeyedBatches(20, 1, group=4), 0) != first
    truncated = epoch_of(KeyedBatches(20, 0, group=8), 0)
    assert [len(batch) for batch in truncated] == [8, 8] and [*truncated[0], *truncated[1]] == first[:16]


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize(("processes", "steps"), [(1, 1), (1, 3), (2, 1), (2, 3), (3, 2)])
def test_every_step_takes_the_same_images_on_any_number_of_processes(processes, steps, drop_last):
    """41 images, 12 a step: whole steps, and a short one of 5."""
    order = images_of(KeyedBatches(41, 0, group=12, drop_last=False), 2)
    shares = [
        epoch_of(KeyedBatches(41, 0, 12, process=p, processes=processes, steps=steps, drop_last=drop_last), 2)
        for p in range(processes)
    ]
    assert len({len(share) for share in shares}) == 1, "as many forward passes on each, or they wait for each other"
    passes = [steps, steps, steps] + ([] if drop_last else [-(-5 * steps // 12)])
    assert len(shares[0]) == sum(passes)
    done = 0
    for step, count in enumerate(passes):
        mine = [share[done : done + count] for share in shares]
        images = [index for batches in mine for batch in batches for index in batch]
        assert sorted(images) == sorted(order[12 * step : 12 * step + 12])
        sizes = {len(batch) for batches in mine for batch in batches}
        assert max(sizes) - min(sizes) <= 1 and max(sizes) <= 12 // (steps * processes)
        done += count


def test_augmentation_depends_on_seed_epoch_and_index_only():
    split = numbered_split()
    transform = train_transform(24, crop_padding=4, color_jitter=0.4, degrees=10, aa="rand-m9-mstd0.5", reprob=0.5)
    images = KeyedImages(split, transform, seed=0)

    def flat(images: KeyedImages, *key: int) -> torch.Tensor:
        return torch.cat([tensor.flatten() for tensor in images[key][0]])

    expected = flat(images, 2, 7)
    images[2, 8], torch.rand(3), random.random(), np.random.rand()
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    assert torch.equal(flat(images, 2, 7), expected)
    assert torch.equal(before[0], torch.get_rng_state()), "the global generators are left alone"
    assert before[1] == random.getstate() and np.array_equal(before[2], np.random.get_state()[1])
    assert not torch.equal(flat(images, 3, 7), expected)
    assert not torch.equal(flat(KeyedImages(split, transform, seed=1), 2, 7), expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_do_not_depend_on_the_number_of_workers(workers):
    transform = train_transform(16, color_jitter=0.4)
    loader = create_train_loader(
        numbered_split(), transform, KeyedBatches(20, 0, 12, epochs=6, steps=2), workers=workers
    )
    loader.batch_sampler.begin(5)
    labels = torch.cat([batch.labels for batch in loader])
    images, colours = (torch.cat(tensors) for tensors in zip(*[batch.images for batch in loader]))
    assert images.dtype == torch.uint8 and images.shape == (12, 3, 16, 16) and colours.shape == (12, 3, 4)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(keyed_seed(0, "order", 5)))[:12]
    assert labels.tolist() == [i % 3 for i in order.tolist()]
    one = KeyedImages(numbered_split(), train_transform(16, color_jitter=0.4), 0)
    assert torch.equal(images, torch.stack([one[5, i][0][0] for i in order.tolist()]))
    assert torch.equal(colours, torch.stack([one[5, i][0][1] for i in order.tolist()]))


def test_a_batch_travels_with_its_pixels_alone_in_shared_memory():
    pixels, colours = torch.randint(256, (4, 3, 64, 64), dtype=torch.uint8), torch.randn(4, 3, 4)
    batch = Batch([pixels, colours], torch.tensor([3, 1, 2, 0]), ["a", "b", "c", "d"], [])
    _, sent = batch.__reduce__()
    assert [each is pixels for each in sent if isinstance(each, torch.Tensor)] == [True]
    received = ForkingPickler.loads(ForkingPickler.dumps(batch))
    assert type(received) is Batch and received.ids == batch.ids and received.bad == []
    assert torch.equal(received.labels, batch.labels)
    for mine, theirs in zip(received.images, batch.images, strict=True):
        assert torch.equal(mine, theirs)


def test_an_evaluation_has_every_image_in_order():
    loader = Accelerator(cpu=True).prepare(create_loader(numbered_split(), eval_transform(24), 6))
    assert [int(image[0, 0, 0]) for batch in loader for image in batch.images[0]] == list(range(20))
    assert [image for batch in loader for image in batch.ids] == [str(row) for row in range(20)]


def test_keyed_seeds_are_pinned():
    assert keyed_seed(0, 1, 2) == keyed_seed(0, 1, 2) != keyed_seed(0, 2, 1)
    assert keyed_seed(0, "order", 0) == 4819849257279361181  # blake2b of "(0, 'order', 0)": alike in every process
    assert all(0 <= keyed_seed(0, i) < 2**63 for i in range(100))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("drop_last", [True, False])
def test_epochs_follow_each_other_from_where_one_was_left(workers, drop_last):
    def batches(epoch: int, images: int = 0) -> list[torch.Tensor]:
        keys = KeyedBatches(20, 1, 6, epochs=6, steps=2, drop_last=drop_last)
        keys.begin(epoch, images)
        loader = create_train_loader(numbered_split(), train_transform(16), keys, workers=workers)
        loaded = [batch.images[0] for batch in loader]
        assert len(loader) == len(loaded)
        return loaded

    passes = 6 if drop_last else 7
    whole, rest, last = batches(4), batches(4, images=6), batches(5)
    assert len(whole) == 2 * passes
    assert all(map(torch.equal, whole[2:], rest)) and len(rest) == 2 * passes - 2
    assert all(map(torch.equal, whole[passes:], last)) and len(last) == passes, "the next epoch is whole again"


def spoiled_split(*rows: int) -> Dataset:
    """`numbered_split` with images that are none, and ids."""
    images = [dict(image, bytes=b"spoiled") if row in rows else image for row, image in enumerate(undecoded())]
    columns = dict(image=images, label=numbered_split()["label"][:], image_id=[f"id{row}" for row in range(20)])
    features = Features(image=Image(), label=ClassLabel(names=["a", "b", "c"]), image_id=Value("string"))
    return Dataset.from_dict(columns, features=features)


def undecoded() -> list[dict]:
    return numbered_split().cast_column("image", Image(decode=False))["image"][:]


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_replaced_by_the_same_others_and_reported(workers):
    def epoch(number: int) -> tuple[torch.Tensor, list[int], list]:
        keys = KeyedBatches(20, 0, 5, epochs=number + 1)
        keys.begin(number)
        loader = create_train_loader(
            spoiled_split(3, 11), train_transform(24, hflip=0), keys, workers=workers, max_bad_images=2
        )
        batches = list(loader)
        bad = [image for batch in batches for image in batch.bad]
        values = torch.cat([batch.images[0][:, 0, 0, 0] for batch in batches])
        return values, torch.cat([batch.labels for batch in batches]), bad

    values, labels, bad = epoch(0)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(keyed_seed(0, "order", 0))).tolist()
    for place, row in enumerate(order):
        value = int(values[place])
        assert value == row or (row in (3, 11) and value not in (3, 11))
        assert labels[place] == value % 3, "with the label of what was taken"
    assert {(image.row, image.image_id, image.file) for image in bad} == {
        (3, "id3", "in the dataset"),
        (11, "id11", "in the dataset"),
    }
    assert all("not an image" in image.reason for image in bad)
    again, other = epoch(0), epoch(1)
    assert torch.equal(again[0], values) and again[2] == bad
    assert other[0].tolist() != values.tolist()


def test_one_bad_image_is_one_however_often_the_draw_falls_on_it():
    images = KeyedImages(spoiled_split(3).select(range(2, 5)), eval_transform(24), max_bad_images=1)
    for epoch in range(40):
        (pixels,), label, _, (bad,) = images[epoch, 1]
        assert bad.row == 1 and int(pixels[0, 0, 0]) in (2, 4) and label == int(pixels[0, 0, 0]) % 3


def test_a_split_without_a_good_image_is_an_error():
    images = KeyedImages(spoiled_split(3).select([3]), eval_transform(24), max_bad_images=9)
    with pytest.raises(ValueError, match="cannot be read"):
        images[0, 0]


def test_a_row_without_a_picture_is_a_bad_image():
    rows = dict(image=[None, *undecoded()[1:3]], label=[0, 1, 2])
    split = Dataset.from_dict(rows, features=Features(image=Image(), label=ClassLabel(names=["a", "b", "c"])))
    (*_, (bad,)) = KeyedImages(split, eval_transform(24), max_bad_images=1)[0, 0]
    assert (bad.row, bad.file, bad.reason) == (0, "in the dataset", "the row has no picture")


@pytest.mark.parametrize("allowed", [0, 1])
def test_more_bad_images_than_allowed_are_an_error(allowed):
    images = KeyedImages(spoiled_split(*range(20)), eval_transform(24), max_bad_images=allowed)
    message = r"image \d+ \(id id\d+, in the dataset\) cannot be read: not an image.*check-data"
    with pytest.raises(ValueError, match=message):
        images[0, 7]
