"""Training images that arrive shard by shard and are never all on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b
from itertools import count
from typing import TYPE_CHECKING

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..errors import UserError
from .decoding import UnreadableImage, decode
from .loading import BadImage, Sample, bad_image, keyed_randomness, keyed_seed, loading, unreadable
from .transforms import Transform

if TYPE_CHECKING:
    import datasets

BUFFER = 1000  # encoded images of each worker among which the next one is drawn


class StreamedImages(IterableDataset):
    """One process's share of a streamed split, for training; an iteration is an epoch.

    What it cannot promise, unlike `KeyedImages`:

    - The order depends on the numbers of processes and workers, and is only mixed within a few shards and a buffer of
      `BUFFER` images.
    - Where the number of shards is not a multiple of that of the processes, each process reads all shards and leaves
      out the others' images.
    - In an epoch an image may come twice and another one not at all, since shards differ in size: each process takes
      its share of the split's number of images, over its own shards again where these have fewer.
    - An interrupted epoch cannot be resumed where it stopped: its rest is made of images from its beginning.

    An image's augmentation is still its own: drawn by (seed, epoch, the file's bytes).

    Args:
        split: Columns "image" and "label"; of all processes.
        transform: Picture -> tensors.
        images: Of this process in an epoch, a multiple of batch_size.
        batch_size: Of this process.
        seed: Of the run.
        decoder: See `decode`.
        min_side: See `decode`.
        max_bad_images: Unreadable images in a row for which the next one is taken.
        process, processes: Index and number of the processes that share the split.
    """

    def __init__(
        self,
        split: datasets.IterableDataset,
        transform: Transform,
        images: int,
        batch_size: int,
        *,
        seed: int = 0,
        decoder: str = "pillow",
        min_side: int | None = None,
        max_bad_images: int = 0,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        from datasets.distributed import split_dataset_by_node

        self.classes = split.features["label"].num_classes
        split = split.decode(False)
        self.split = split_dataset_by_node(split, rank=process, world_size=processes)
        self.transform = transform
        self.images = images
        self.batch_size = batch_size
        self.seed = seed
        self.decoder = decoder
        self.min_side = min_side
        self.max_bad_images = max_bad_images
        self.begin(0)

    def begin(self, epoch: int, images: int = 0) -> None:
        """Iterate over this epoch, without so many images (whole batches) at its end.

        An interrupted run has seen as many of this process's.
        """
        self.epoch = epoch
        self.seen = images

    def __len__(self) -> int:
        return self.images - self.seen

    def __iter__(self) -> Iterator[Sample]:
        bad: list[BadImage] = []
        left = self._share()
        if left == 0:
            return
        for example in self._examples():
            digest = _digest(example["image"])
            try:
                image = decode(example["image"], self.decoder, self.min_side)
            except UnreadableImage as error:
                bad.append(bad_image(example, None, digest, error))
                if len(bad) > self.max_bad_images:
                    raise unreadable(bad[-1]) from None
                continue
            label = example["label"]
            if label is None or not 0 <= label < self.classes:
                raise UserError(f"a label is {label}, but there are names for {self.classes} classes.")
            with keyed_randomness(self.seed, self.epoch, digest):
                yield self.transform(image), label, str(example.get("image_id", digest)), bad
            bad = []
            left -= 1
            if left == 0:  # before the buffer is filled again
                return

    def _share(self) -> int:
        """Images of this worker: batches are dealt to the workers in turn."""
        worker = get_worker_info()
        if worker is None:
            return len(self)
        batches = len(self) // self.batch_size
        return self.batch_size * (batches // worker.num_workers + (worker.id < batches % worker.num_workers))

    def _examples(self) -> Iterator[dict]:
        """Shuffled, over and over."""
        stream = self.split.shuffle(seed=keyed_seed(self.seed, "order", self.epoch) % 2**32, buffer_size=BUFFER)
        images = 0
        for turn in count():
            stream.set_epoch(turn)
            try:
                for example in stream:
                    yield example
                    images += 1
            except (ValueError, OSError) as error:  # a label out of range, a damaged file, no network
                reason = " ".join(str(error).split())
                raise UserError(f"the stream cannot be read on after {images} images: {reason}.") from error
            if images == 0:
                raise UserError("a worker got no image of the stream: use fewer --workers, or data in more shards.")


def _digest(image: dict | None) -> str:
    image = image or {}
    return blake2b(image.get("bytes") or str(image.get("path")).encode(), digest_size=8).hexdigest()


def create_stream_loader(dataset: StreamedImages, workers: int = 0) -> DataLoader:
    """Load a stream in batches.

    Args:
        dataset: A process's share of it.
        workers: Processes that load; 0 to load in this one. Each has shards of its own.

    Raises:
        UserError: There are fewer shards than workers.
    """
    shards = dataset.split.num_shards
    if workers > shards:
        raise UserError(
            f"workers {workers} is more than the {shards} shards that each process streams: use --workers {shards}."
        )
    # Workers are started anew for every epoch, and so get to know it.
    return DataLoader(dataset, batch_size=dataset.batch_size, **loading(workers) | dict(persistent_workers=False))
