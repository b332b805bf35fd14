"""Images of a split as batches; training order and augmentation depend on (seed, epoch, index) and nothing else."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from ..errors import UserError
from .decoding import UnreadableImage, decode, undecoded
from .transforms import Transform
from .workers import outlive_signals

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


class BadImage(NamedTuple):
    """An unreadable image, for which another one of its split was taken."""

    row: int | None  # None in a stream, whose rows have no numbers
    image_id: str
    file: str
    reason: str


class Batch(NamedTuple):
    """What a loader yields."""

    images: list[Tensor]  # as the transform gives them, each with a leading B
    labels: Tensor  # (B,)
    ids: list[str]  # the data's image_id, or the row
    bad: list[BadImage]

    def __reduce__(self) -> tuple:
        """What a loading process sends: the pixels in shared memory, all else in the message.

        Each tensor in shared memory costs the receiver a connection to the sender, half a millisecond or more.
        """
        pixels, *colours = self.images
        return _received, (pixels, [each.numpy() for each in colours], self.labels.numpy(), self.ids, self.bad)


def _received(
    pixels: Tensor, colours: list[np.ndarray], labels: np.ndarray, ids: list[str], bad: list[BadImage]
) -> Batch:
    """The `Batch` that was sent."""
    return Batch([pixels, *map(torch.from_numpy, colours)], torch.from_numpy(labels), ids, bad)


Sample = tuple[tuple[Tensor, ...], int, str, list[BadImage]]  # what becomes a batch


class KeyedImages(Dataset):
    """Images of a split by (epoch, index), or by index alone, as in evaluation.

    The randomness of an image's augmentation comes from (seed, epoch, index), so it depends neither on the number of
    workers or processes nor on what was loaded before.

    Args:
        split: Columns "image" and "label", and where the data has it "image_id".
        transform: Picture -> tensors.
        seed: Of the run.
        decoder: See `decode`.
        min_side: See `decode`.
        max_bad_images: Unreadable images for which others are taken, by (seed, epoch, index) too; 0: the first one is
            an error.
    """

    def __init__(
        self,
        split: datasets.Dataset,
        transform: Transform,
        seed: int = 0,
        decoder: str = "pillow",
        min_side: int | None = None,
        max_bad_images: int = 0,
    ) -> None:
        self.split = undecoded(split)
        self.transform = transform
        self.seed = seed
        self.decoder = decoder
        self.min_side = min_side
        self.max_bad_images = max_bad_images

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, key: tuple[int, int] | int) -> Sample:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        bad: list[BadImage] = []
        row = index
        while True:
            example = self.split[row]
            try:
                image = decode(example["image"], self.decoder, self.min_side)
                break
            except UnreadableImage as error:
                bad.append(bad_image(example, row, str(row), error))
            if len(bad) > self.max_bad_images or len(bad) == len(self):
                raise unreadable(bad[-1]) from None
            row = keyed_seed(self.seed, epoch, index, "instead", len(bad)) % len(self)
            while any(row == image.row for image in bad):
                row = (row + 1) % len(self)
        with keyed_randomness(self.seed, epoch, index):
            return self.transform(image), example["label"], str(example.get("image_id", row)), bad


@contextmanager
def keyed_randomness(*key: int | str) -> Iterator[None]:
    """Within, random numbers of torch, NumPy and Python (timm's RandAugment takes all) depend on the key alone."""
    before = random.getstate(), np.random.get_state()
    seed = keyed_seed(*key)
    with torch.random.fork_rng(devices=[]):
        seed_torch(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


def bad_image(example: dict, row: int | None, image_id: str, error: Exception) -> BadImage:
    """Describe a row whose image cannot be decoded; `image_id` is for data that has none of its own."""
    path = (example["image"] or {}).get("path")
    return BadImage(row, str(example.get("image_id", image_id)), path or "in the dataset", str(error))


def unreadable(bad: BadImage) -> UserError:
    """The error for an image that cannot be read, for the caller to raise."""
    return UserError(
        f"image {'of a stream' if bad.row is None else bad.row} (id {bad.image_id}, {bad.file}) cannot be read: "
        f"{bad.reason}. Replace or remove it, or allow more --max-bad-images in training; python -m tasn_timm "
        f"check-data lists all such images."
    )


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples of `KeyedImages`."""
    images, labels, ids, bad = zip(*samples)
    return Batch(default_collate(images), torch.tensor(labels), list(ids), [image for each in bad for image in each])


class KeyedBatches(Sampler):
    """One process's batches of (epoch, index) for all epochs, each in an order that depends on (seed, epoch).

    An optimizer step takes the next `group` images of the order, whatever the numbers of processes and of forward
    passes among which they are divided: a recipe means the same on one device and on eight. One iteration goes through
    all epochs, so that an epoch's first batches are loaded while the one before is evaluated.

    Args:
        images: Of the split.
        seed: Of the run.
        group: Images of an optimizer step.
        epochs: Of the run.
        process, processes: Index and number of the processes that share them.
        steps: Forward passes of a process and optimizer step.
        drop_last: Leave out the images (other ones every epoch) that do not fill up a group. Else the last group of an
            epoch is short: as many forward passes as it needs, of sizes that differ by 1 at most.
    """

    def __init__(
        self,
        images: int,
        seed: int,
        group: int,
        *,
        epochs: int = 1,
        process: int = 0,
        processes: int = 1,
        steps: int = 1,
        drop_last: bool = True,
    ) -> None:
        self.images = images - images % group if drop_last else images
        self.total = images
        self.seed = seed
        self.group = group
        self.epochs = epochs
        self.process = process
        self.processes = processes
        self.steps = steps
        self.begin(0)

    def begin(self, epoch: int, images: int = 0) -> None:
        """Iterate from this epoch on, without its first images (whole groups), which an interrupted run has seen."""
        self.begun = (epoch, images)

    def __len__(self) -> int:
        epoch, images = self.begun
        return (self.epochs - epoch) * self._passes(self.images) - self._passes(images)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        first, images = self.begun
        for epoch in range(first, self.epochs):
            generator = torch.Generator().manual_seed(keyed_seed(self.seed, "order", epoch))
            order = torch.randperm(self.total, generator=generator).numpy()[: self.images]
            for start in range(images, self.images, self.group):
                for batch in self._cut(order[start : start + self.group])[self.process :: self.processes]:
                    yield [(epoch, int(index)) for index in batch]
            images = 0

    def _cut(self, group: Sequence[int]) -> list[np.ndarray]:
        return np.array_split(group, self._passes(len(group)) * self.processes)

    def _passes(self, images: int) -> int:
        return math.ceil(images * self.steps / self.group)


def create_train_loader(
    split: datasets.Dataset, transform: Transform, batches: KeyedBatches, *, workers: int = 0, **reading: Any
) -> DataLoader:
    """Load a split to train on.

    Args:
        split: Columns "image" and "label".
        transform: Picture -> tensors.
        batches: Which images when.
        workers: Processes that load; 0 to load in this one.
        **reading: Of `KeyedImages`: decoder, min_side, max_bad_images.
    """
    images = KeyedImages(split, transform, batches.seed, **reading)
    return DataLoader(images, batch_sampler=batches, **loading(workers))


def create_loader(
    split: datasets.Dataset, transform: Transform, batch_size: int, *, workers: int = 0, **reading: Any
) -> DataLoader:
    """Load a split in its own order, to evaluate.

    Args:
        split: Columns "image" and "label".
        transform: Picture -> tensors.
        batch_size: B.
        workers: Processes that load; 0 to load in this one.
        **reading: Of `KeyedImages`: decoder, min_side.
    """
    return DataLoader(KeyedImages(split, transform, **reading), batch_size=batch_size, **loading(workers))


def loading(workers: int) -> dict[str, Any]:
    """Arguments that all our loaders have."""
    return dict(
        collate_fn=collate,
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=outlive_signals,
        pin_memory=torch.cuda.is_available(),
    )
