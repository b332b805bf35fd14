"""A recipe's data: splits, and the loaders that read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader

from ..data.decoding import check_decoder
from ..data.loading import create_loader
from ..data.split_names import find_split
from ..data.splits import load_splits, pick_split, pinned
from ..data.streaming import StreamedImages, create_stream_loader
from ..data.transforms import eval_transform, train_transform
from ..errors import UserError
from ..recipe import Recipe

if TYPE_CHECKING:
    import datasets

Splits = dict[str, "datasets.Dataset | datasets.IterableDataset"]


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
        stream = load_splits(recipe.data, only=[recipe.train_split], streaming=True, **keys)
        picked["train"] = pick_split(stream, names.pop("train"), "train_split", recipe.data)
    if names:
        splits = load_splits(recipe.data, only=list(names.values()), **keys)
        picked |= {role: pick_split(splits, split, f"{role}_split", recipe.data) for role, split in names.items()}
    classes = {role: split.features["label"].names for role, split in picked.items()}
    for role, labels in classes.items():
        if labels != classes["train"]:
            raise UserError(
                f"splits {chosen['train']!r} and {chosen[role]!r} of {recipe.data!r} have different classes."
            )
    return picked, pinned(recipe.data, stream if recipe.streaming else splits)


def build_loaders(recipe: Recipe, splits: Splits, batch_size: int, accelerator: Accelerator) -> dict[str, DataLoader]:
    """Build and prepare the loaders of a recipe's splits.

    Args:
        recipe: Of the run.
        splits: From `load_data`.
        batch_size: Images of a forward pass of each process.
        accelerator: Of the run.

    Raises:
        UserError: Too few images for a batch, or a transform that cannot be made.
    """
    images = _count(recipe, splits["train"])
    if images < recipe.batch_size:
        raise UserError(
            f"split {recipe.train_split!r} has {images} images, fewer than batch_size {recipe.batch_size}: use a "
            f"smaller batch_size."
        )
    loaders = dict(train=_train_loader(recipe, splits["train"], images, batch_size, accelerator))
    for role in ("val", "test"):
        if role in splits:
            transform = eval_transform(recipe.img_size, recipe.resize)
            loader = create_loader(splits[role], transform, batch_size, workers=recipe.workers)
            loaders[role] = accelerator.prepare(loader)
    return loaders


def _train_loader(
    recipe: Recipe, split: datasets.Dataset, images: int, batch_size: int, accelerator: Accelerator
) -> DataLoader:
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
    if not recipe.streaming:
        options = dict(seed=recipe.seed, multiple=recipe.batch_size, workers=recipe.workers)
        return accelerator.prepare(create_loader(split, transform, batch_size, **options, **reading))
    share = (images - images % recipe.batch_size) // accelerator.num_processes
    dataset = StreamedImages(
        split,
        transform,
        share,
        batch_size,
        seed=recipe.seed,
        process=accelerator.process_index,
        processes=accelerator.num_processes,
        **reading,
    )
    # Already divided among the processes: accelerate would let each read everything and drop most of it.
    loader = create_stream_loader(dataset, recipe.workers)
    return prepare_data_loader(loader, accelerator.device, num_processes=1, process_index=0, put_on_device=True)


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
