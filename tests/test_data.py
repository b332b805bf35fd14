"""Splits, decoding, transforms, and an order and augmentation that depend on (seed, epoch, index) alone."""

import io

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage
from torchvision.transforms import v2

from tasn_timm.data.loading import KeyedImages, KeyedSampler, create_loader, decode, keyed_seed
from tasn_timm.data.splits import class_names, load_splits, pick_split
from tasn_timm.data.transforms import Normalize, PCANoise, eval_transform, train_transform


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
    with pytest.raises(ValueError, match="no split 'validation', only train, bad, empty: set val_split .* or to null"):
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
        KeyedImages(split, v2.PILToTensor())[0, 0]


def test_the_order_is_another_permutation_each_epoch_and_the_same_for_a_seed():
    def epoch(sampler: KeyedSampler, number: int) -> list[int]:
        sampler.set_epoch(number)
        keys = list(sampler)
        assert {e for e, _ in keys} == {number}
        return [index for _, index in keys]

    sampler = KeyedSampler(20, seed=0)
    first, second = epoch(sampler, 0), epoch(sampler, 1)
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second
    assert epoch(KeyedSampler(20, seed=0), 1) == second
    assert epoch(KeyedSampler(20, seed=1), 0) != first
    assert epoch(KeyedSampler(20), 3) == list(range(20)), "evaluation keeps the order"
    truncated = KeyedSampler(20, seed=0, multiple=8)
    assert len(truncated) == len(epoch(truncated, 0)) == 16


def test_augmentation_depends_on_seed_epoch_and_index_only():
    split, transform = numbered_split(), train_transform(24, crop_padding=4, color_jitter=0.4, degrees=10)
    images = KeyedImages(split, transform, seed=0)
    expected = images[2, 7][0]
    images[2, 8], torch.rand(3)
    before = torch.get_rng_state()
    assert torch.equal(images[2, 7][0], expected)
    assert torch.equal(before, torch.get_rng_state()), "the global generator is left alone"
    assert not torch.equal(images[3, 7][0], expected)
    assert not torch.equal(KeyedImages(split, transform, seed=1)[2, 7][0], expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_do_not_depend_on_the_number_of_workers(workers):
    loader = create_loader(
        numbered_split(), train_transform(16, color_jitter=0.4), 6, seed=0, multiple=12, workers=workers
    )
    loader.sampler.set_epoch(5)
    labels = torch.cat([labels for _, labels in loader])
    images = torch.cat([images for images, _ in loader])
    assert images.dtype == torch.uint8 and images.shape == (12, 3, 16, 16)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(keyed_seed(0, "order", 5)))[:12]
    assert labels.tolist() == [i % 3 for i in order.tolist()]
    one = KeyedImages(numbered_split(), train_transform(16, color_jitter=0.4), 0)
    assert torch.equal(images, torch.stack([one[5, i][0] for i in order.tolist()]))


def test_accelerate_keeps_the_sampler():
    loader = create_loader(numbered_split(), eval_transform(24), 5, seed=3)
    sampler = loader.sampler
    prepared = Accelerator(cpu=True).prepare(loader)
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        expected = [index for _, index in sampler]
        assert [int(image[0, 0, 0]) for images, _ in prepared for image in images] == expected


def test_keyed_seeds_are_pinned():
    assert keyed_seed(0, 1, 2) == keyed_seed(0, 1, 2) != keyed_seed(0, 2, 1)
    assert keyed_seed(0, "order", 0) == 4819849257279361181  # blake2b of "(0, 'order', 0)": alike in every process
    assert all(0 <= keyed_seed(0, i) < 2**63 for i in range(100))


def test_evaluation_resizes_the_short_side_and_crops_the_centre():
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, 30:50] = 200
    image = PILImage.fromarray(pixels)
    cropped = eval_transform(20)(image)  # 40 x 80 -> 20 x 40 -> columns 10 to 30 of 40, that is 20 to 60 of 80
    assert cropped.shape == (3, 20, 20) and cropped.dtype == torch.uint8
    assert cropped[0, 10, [0, 10, 19]].tolist() == [0, 200, 0]
    assert eval_transform(20, resize=40)(image)[0, 0, [0, 10, 19]].tolist() == [200, 200, 200]


def test_padding_mirrors_and_moves_by_at_most_its_width():
    image = PILImage.fromarray(np.arange(16, dtype=np.uint8)[None, :, None].repeat(16, 0).repeat(3, 2))
    transform = train_transform(16, crop_padding=3, hflip=0)
    firsts = set()
    for seed in range(60):
        torch.manual_seed(seed)
        row = transform(image)[0, 0].tolist()
        firsts.add(row[0] if row[1] > row[0] else -row[0])
    assert firsts == {-3, -2, -1, 0, 1, 2, 3}


def test_rotation_turns_the_whole_picture_and_fills_with_white():
    pixels = np.zeros((60, 60, 3), np.uint8)
    pixels[28:32, 28:32] = 100
    torch.manual_seed(1)
    rotated = train_transform(60, degrees=30)(PILImage.fromarray(pixels))
    assert rotated[:, 0, 0].tolist() == [255, 255, 255]
    assert rotated[0, 30, 30] == 100 and v2.CenterCrop(40)(rotated).max() == 100, "about the centre"
    crops = torch.stack([train_transform(20, resize=60, degrees=30)(PILImage.fromarray(pixels)) for _ in range(40)])
    without_white = (crops < 255).flatten(1).all(1).sum()
    assert 10 < without_white < 40, "a crop out of the rotated picture often has nothing to fill"


def test_pca_noise_is_one_shift_with_the_colours_covariance():
    image = torch.full((3, 8, 8), 128, dtype=torch.uint8)
    torch.manual_seed(0)
    shifted = PCANoise(0.1)(image)
    torch.manual_seed(0)
    alpha = 0.1 * torch.randn(3)
    red = -0.5675 * 55.46 * alpha[0] + 0.7192 * 4.794 * alpha[1] + 0.4009 * 1.148 * alpha[2]
    blue = -0.5836 * 55.46 * alpha[0] - 0.6948 * 4.794 * alpha[1] + 0.4203 * 1.148 * alpha[2]
    assert shifted.dtype == torch.uint8 and (shifted == shifted[:, :1, :1]).all()
    assert shifted[[0, 2], 0, 0].tolist() == [round(128 + red.item()), round(128 + blue.item())]
    shifts = torch.stack([PCANoise(0.1)(image)[:, 0, 0].float() for _ in range(2000)])
    torch.testing.assert_close(shifts.mean(0), torch.full((3,), 128.0), atol=0.3, rtol=0)
    torch.testing.assert_close(shifts.std(0), torch.tensor([3.17, 3.22, 3.25]), atol=0.2, rtol=0)  # 0.1 x 55.46 x axis


def test_pca_noise_stays_within_black_and_white():
    for value in (0, 255):
        torch.manual_seed(0)
        shifted = torch.stack([PCANoise(1.0)(torch.full((3, 1, 1), value, dtype=torch.uint8)) for _ in range(50)])
        assert (shifted == value).any() and (shifted.int() - value).abs().max() < 250, "no wrapping around"


def test_normalize_is_timms():
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    expected = v2.Normalize(mean, std)(images / 255)
    torch.testing.assert_close(Normalize(mean, std)(images), expected)
