"""A recipe's data: splits, and the loaders that read them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow.compute as pc
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader

from ..data.decoding import check_decoder
from ..data.loading import Batch, KeyedBatches, create_loader, create_train_loader
from ..data.split_names import find_split
from ..data.splits import load_splits, pick_split, pinned
from ..data.streaming import StreamedImages, create_stream_loader
from ..data.transforms import eval_transform, train_transform
from ..errors import UserError
from ..recipe import Recipe

if TYPE_CHECKING:
    import datasets

Splits = dict[str, "datasets.Dataset | datasets.IterableDataset"]

# What to do where one of a recipe's splits is not there.
ADVICE = dict(
    train="set train_split to one of these",
    val="set val_split to one of these, or to null for none",
    test="set test_split to one of these, or to null for none",
)


def load_data(recipe: Recipe) -> tuple[Splits, str]:
    """Load the splits that a recipe uses.

    Returns:
        "train" and, where the recipe has them, "val" and "test"; and the name of the data that loads the same again.

    Raises:
        UserError: See `load_splits` and `pick_split`.
    """
    check_decoder(recipe.decoder)
    chosen = dict(train=recipe.train_split, val=recipe.val_split, test=recipe.test_split)
    keys = dict(input_key=recipe.input_key, target_key=recipe.target_key)
    names = {role: split for role, split in chosen.items() if split is not None}
    picked = {}
    if recipe.streaming:
        stream = load_splits(recipe.data, only={recipe.train_split: ADVICE["train"]}, streaming=True, **keys)
        picked["train"] = pick_split(stream, names.pop("train"), "train_split", recipe.data)
    if names:
        splits = load_splits(recipe.data, only={split: ADVICE[role] for role, split in names.items()}, **keys)
        picked |= {role: pick_split(splits, split, f"{role}_split", recipe.data) for role, split in names.items()}
    classes = {role: split.features["label"].names for role, split in picked.items()}
    for role, labels in classes.items():
        if labels != classes["train"]:
            raise UserError(
                f"splits {chosen['train']!r} and {chosen[role]!r} of {recipe.data!r} have different classes."
            )
    if recipe.overfit_batches:
        picked = _few(recipe, picked["train"])
    return picked, pinned(recipe.data, stream if recipe.streaming else splits)


def _few(recipe: Recipe, split: datasets.Dataset) -> Splits:
    """The images of a recipe's overfit_batches, to train and to validate on."""
    images = min(len(split), recipe.overfit_batches * recipe.batch_size)
    few = split.shuffle(seed=recipe.seed).select(range(images))
    return dict(train=few, val=few)


class Plan(NamedTuple):
    """How an epoch's images become optimizer steps."""

    images: int  # of an epoch
    group: int  # of an optimizer step
    passes: int  # forward passes of each process for a whole group

    @property
    def steps(self) -> int:
        """Optimizer steps of an epoch; the last one may be short."""
        return math.ceil(self.images / self.group)

    def steps_of(self, images: int) -> int:
        """Optimizer steps that the first images of an epoch take."""
        return math.ceil(images / self.group)

    def passes_of(self, images: int) -> int:
        """Forward passes of each process that they take."""
        return math.ceil(images * self.passes / self.group)


def plan_epoch(recipe: Recipe, split: datasets.Dataset | datasets.IterableDataset) -> Plan:
    """Divide a training split into optimizer steps.

    Raises:
        UserError: It is smaller than one, or its size is unknown.
    """
    images = _count(recipe, split)
    if images < recipe.batch_size:
        raise UserError(
            f"split {recipe.train_split!r} has {images} images, fewer than batch_size {recipe.batch_size}: use a "
            f"smaller batch_size."
        )
    if recipe.drop_last:
        images -= images % recipe.batch_size
    return Plan(images, recipe.batch_size, recipe.grad_accum_steps)


def build_loaders(
    recipe: Recipe, splits: Splits, plan: Plan, batch_size: int, accelerator: Accelerator
) -> dict[str, DataLoader]:
    """Build the loaders of a recipe's splits, and prepare those to evaluate; `batches_from` is for the other one.

    Args:
        recipe: Of the run.
        splits: From `load_data`.
        plan: Of the training split.
        batch_size: Images of a forward pass of each process.
        accelerator: Of the run.

    Raises:
        UserError: A transform cannot be made, or a short last step has too few images.
    """
    transform = eval_transform(recipe.img_size, recipe.resize)
    loaders = dict(train=_train_loader(recipe, splits["train"], plan, batch_size, accelerator))
    for role in ("val", "test"):
        if role in splits:
            loader = create_loader(splits[role], transform, batch_size, workers=recipe.workers)
            loaders[role] = accelerator.prepare(loader)
    return loaders


def batches_from(loader: DataLoader, epoch: int, images: int, epochs: int, accelerator: Accelerator) -> Iterator[Batch]:
    """Iterate over a training loader's batches, on the device, from an epoch to the last.

    Args:
        loader: Of `build_loaders`.
        epoch: The first one.
        images: Of that epoch, of all processes, to leave out.
        epochs: Of the run.
        accelerator: Of the run.
    """
    # The loader is not prepared: accelerate would look one batch ahead, and so fail a step too early.
    for batch in _on_the_host(loader, epoch, images, epochs, accelerator.num_processes):
        yield send_to_device(batch, accelerator.device, non_blocking=True)


def _on_the_host(loader: DataLoader, epoch: int, images: int, epochs: int, processes: int) -> Iterator[Batch]:
    if not isinstance(loader.dataset, StreamedImages):
        loader.batch_sampler.begin(epoch, images)
        yield from loader
        return
    for each in range(epoch, epochs):
        loader.dataset.begin(each, images // processes if each == epoch else 0)
        yield from loader


def fingerprint(splits: Splits) -> str:
    """What identifies the images of a run: classes, labels, file names and sizes in bytes, in order.

    Files that are changed in place and keep their size are not noticed, nor is any change of a stream's.
    """
    known = blake2b(digest_size=8)
    for role, split in splits.items():
        known.update(repr((role, split.features["label"].names)).encode())
        if not hasattr(split, "data"):  # a stream
            continue
        labels = split.with_format("numpy")["label"][:]
        known.update(np.ascontiguousarray(labels, dtype=np.int64).tobytes())
        for chunk in split.data.column("image").chunks:
            paths, lengths = chunk.field("path").to_pylist(), pc.binary_length(chunk.field("bytes")).to_pylist()
            for path, length in zip(paths, lengths):
                if length is None and path and os.path.exists(path):  # a file beside the table
                    length = os.path.getsize(path)
                known.update(repr((path, length)).encode())
    return known.hexdigest()


def _train_loader(
    recipe: Recipe, split: datasets.Dataset, plan: Plan, batch_size: int, accelerator: Accelerator
) -> DataLoader:
    transform = eval_transform(recipe.img_size, recipe.resize)
    if not recipe.overfit_batches:
        transform = train_transform(
            recipe.img_size,
            recipe.resize,
            recipe.crop_padding,
            recipe.hflip,
            recipe.degrees,
            recipe.color_jitter,
            recipe.pca_noise,
            recipe.aa,
            recipe.reprob,
        )
    reading = dict(
        decoder=recipe.decoder,
        min_side=2 * (recipe.resize or recipe.img_size),  # the rest is for the resize, which is antialiased
        max_bad_images=recipe.max_bad_images,
    )
    processes = dict(process=accelerator.process_index, processes=accelerator.num_processes)
    if recipe.streaming:
        share = plan.images // accelerator.num_processes
        stream = StreamedImages(split, transform, share, batch_size, seed=recipe.seed, **processes, **reading)
        return create_stream_loader(stream, recipe.workers)
    divided = dict(epochs=recipe.epochs, steps=recipe.grad_accum_steps, drop_last=recipe.drop_last)
    batches = KeyedBatches(len(split), recipe.seed, recipe.batch_size, **processes, **divided)
    return create_train_loader(split, transform, batches, workers=recipe.workers, **reading)


def _count(recipe: Recipe, split: datasets.Dataset | datasets.IterableDataset) -> int:
    if not recipe.streaming:
        return len(split)
    known: Mapping = split.info.splits or {}
    name = find_split(known, recipe.train_split)
    if name is None or not known[name].num_examples:
        raise UserError(
            f"dataset {recipe.data!r} does not say how many images split {recipe.train_split!r} has, which the "
            f"schedule needs: add dataset_info to its README.md, as python -m tasn_timm prepare and datasets' "
            f"push_to_hub do, or leave out --streaming."
        )
    return known[name].num_examples
