"""Images of a split as batches; training order and augmentation depend on (seed, epoch, index) and nothing else."""

from __future__ import annotations

import io
from collections.abc import Iterator
from hashlib import blake2b
from typing import TYPE_CHECKING

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..errors import UserError
from .transforms import Transform

if TYPE_CHECKING:
    import datasets


def keyed_seed(*key: int | str) -> int:
    """A 63-bit seed that is the same on every machine and in every process for the same key."""
    return int.from_bytes(blake2b(repr(key).encode(), digest_size=8).digest(), "big") >> 1


def seed_torch(seed: int) -> None:
    """Seed torch's generators, those of GPUs only where they are in use.

    torch.manual_seed would keep a stack trace of each call for a GPU that may be initialised one day: a slow leak.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)


def decode(image: dict) -> Image.Image:
    """Decode a `datasets` image given as bytes or path: EXIF orientation applied, RGB. The one rule for every use."""
    with Image.open(io.BytesIO(image["bytes"]) if image["bytes"] is not None else image["path"]) as opened:
        return ImageOps.exif_transpose(opened).convert("RGB")


class KeyedImages(Dataset):
    """Images of a split for a `KeyedSampler`.

    The randomness of an image's augmentation comes from (seed, epoch, index), so it depends neither on the number of
    workers or processes nor on what was loaded before.

    Args:
        split: Columns "image" and "label".
        transform: RGB image -> tensor, with torch's randomness only.
        seed: Of the run.
    """

    def __init__(self, split: datasets.Dataset, transform: Transform, seed: int = 0) -> None:
        from datasets import Image as ImageFeature

        self.split = split.cast_column("image", ImageFeature(decode=False))
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = key
        row = self.split[index]
        try:
            image = decode(row["image"])
        except OSError as error:
            where = row["image"]["path"] or "stored in the dataset"
            raise UserError(f"image {index} ({where}) cannot be read: {error}. Replace or remove it.") from error
        with torch.random.fork_rng(devices=[]):
            seed_torch(keyed_seed(self.seed, epoch, index))
            return self.transform(image), row["label"]


class KeyedSampler(Sampler):
    """(epoch, index) for the images of a split, in an order that depends on (seed, epoch).

    Args:
        length: Number of images.
        seed: Of the run; None for the split's own order, as in evaluation.
        multiple: Leave out as many images of each epoch (other ones every time) as do not fill up a group of this size.
    """

    def __init__(self, length: int, seed: int | None = None, multiple: int = 1) -> None:
        self.total = length
        self.kept = length - length % multiple
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Take the order of this epoch; accelerate calls it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.kept

    def __iter__(self) -> Iterator[tuple[int, int]]:
        if self.seed is None:
            order = range(self.total)
        else:
            generator = torch.Generator().manual_seed(keyed_seed(self.seed, "order", self.epoch))
            order = torch.randperm(self.total, generator=generator).tolist()
        return ((self.epoch, index) for index in order[: self.kept])


def create_loader(
    split: datasets.Dataset,
    transform: Transform,
    batch_size: int,
    *,
    seed: int | None = None,
    multiple: int = 1,
    workers: int = 0,
) -> DataLoader:
    """Batches of (images (B, 3, H, W) uint8, labels (B,)).

    Args:
        split: Columns "image" and "label".
        transform: RGB image -> (3, H, W).
        batch_size: B.
        seed: For training: shuffled, and augmented by it. None for evaluation.
        multiple: See `KeyedSampler`.
        workers: Processes that load; 0 to load in this one.
    """
    return DataLoader(
        KeyedImages(split, transform, seed or 0),
        batch_size=batch_size,
        sampler=KeyedSampler(len(split), seed, multiple),
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
    )
