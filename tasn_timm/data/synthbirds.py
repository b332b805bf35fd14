"""Synthbirds: small fine-grained datasets that are drawn, not downloaded.

The first of them, "synthbirds": 24 species of birds on branches, 192 x 192 pixels. Three plumages can be told apart at
any resolution; the eight species of a plumage differ only in four small parts (beak, eye, wing, tail), each of which
comes in two forms of about the same area and colour, so that shrinking the image to 48 x 48 pixels averages the
difference away. A classifier has to look closely, and only where the bird is. `VARIANTS` has harder birds, and other
ones to start from.

Image `index` of a split depends on (variant, seed, split, index) and nothing else, and is the same on every machine.

    load()["train"][0]  # {"image": <PIL.Image 192 x 192>, "label": 0}
    draw("train", 0)  # the same pixels as an array, without the `datasets` library
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from ..errors import UserError, unknown
from .birds import ALL_WORDS, HEAD, Variant, Word, draw_bird
from .split_names import wanted_splits

if TYPE_CHECKING:
    import datasets

VERSION = 4  # raise it whenever a pixel changes: cached datasets are then generated again
SPLITS = {"train": 3600, "validation": 600, "test": 960}
SPLIT_NUMBERS = {"train": 1, "test": 2, "validation": 3} | {f"train_{number}": 4 + number for number in range(5)}

SYNTHBIRDS = Variant(SPLITS)
SPECIES, CLASS_NAMES = SYNTHBIRDS.species, SYNTHBIRDS.class_names
VARIANTS = {
    "synthbirds": SYNTHBIRDS,
    # 40 images of each of 48 classes, of which two may differ in a single mark, all on the head. Finer pixels, smaller
    # birds with smaller marks, twice the foliage, half of it in the marks' colours, and marks on wing and tail that
    # mean nothing. Five training splits, to vary the images.
    "synthbirds_hard": Variant(
        {f"train_{number}": 1920 for number in range(5)} | {"validation": 480, "test": 1440},
        parts=HEAD,
        words=ALL_WORDS,
        idle_parts=("wing", "tail"),
        size=240,
        bird=(0.5, 0.68),
        marks=0.85,
        foliage=(12, 30),
        decoys=0.5,
        key=(1,),
    ),
    # Close-ups of other plumages with the same marks, large and plentiful: a stand-in for ImageNet, and more than that.
    "synthbirds_other": Variant(
        {"train": 3600, "validation": 600, "test": 960},
        families={
            "rose": ((0.94, 0.45, 0.62), (0.98, 0.12, 0.95)),
            "golden": ((0.13, 0.70, 0.72), (0.14, 0.20, 0.96)),
            "slate": ((0.72, 0.30, 0.42), (0.75, 0.08, 0.90)),
        },
        parts=HEAD,
        idle_parts=("wing", "tail"),
        size=240,
        bird=(0.8, 1.3),
        marks=1.15,
        key=(2,),
    ),
}


def draw(split: str, index: int, seed: int = 0, variant: str = "synthbirds") -> np.ndarray:
    """Draw one image; its label is `index % K`, of K = 24 classes in "synthbirds".

    Args:
        split: A key of the variant's splits: "train", "validation" or "test" in "synthbirds".
        index: Position in the split, from 0.
        seed: Another seed gives another dataset of the same kind.
        variant: A key of `VARIANTS`.

    Returns:
        RGB image (192, 192, 3), or of the variant's size, uint8.

    Raises:
        ValueError: There is no such variant, split or image.
    """
    return draw_bird(*specimen(split, index, seed, variant))


def specimen(
    split: str, index: int, seed: int = 0, variant: str = "synthbirds"
) -> tuple[np.random.Generator, str, Word, Variant]:
    """What `draw_bird` makes a picture of, see `draw`: random numbers, plumage, form of each part, and variant."""
    chosen = _variant(variant)
    if split not in chosen.splits:
        raise unknown("split", split, chosen.splits)
    if not 0 <= index < chosen.splits[split]:
        raise UserError(f"index {index} is out of range: split {split!r} has images 0 to {chosen.splits[split] - 1}")
    rng = np.random.default_rng([seed, SPLIT_NUMBERS[split], index, *chosen.key])
    return rng, *chosen.species[index % len(chosen.species)], chosen


def load(
    cache_dir: str | Path | None = None,
    num_proc: int | None = None,
    seed: int = 0,
    variant: str = "synthbirds",
    only: Collection[str] | None = None,
) -> datasets.DatasetDict:
    """Load a dataset; the first call draws it (about a minute on two cores) and caches it.

    Args:
        cache_dir: Folder for the images (570 MB). None: the cache of the `datasets` library.
        num_proc: Processes that draw. None: one per CPU that this process may use. Does not change the images.
        seed: Another seed gives another dataset of the same kind.
        variant: A key of `VARIANTS`.
        only: Splits that are needed, see `load_splits`; no others are drawn. None: all.

    Returns:
        The variant's splits ("train", "validation" and "test") with columns "image" (RGB), "label" (its `class_names`)
        and "super", the plumage (its `families`).

    Raises:
        ValueError: There is no such variant, or `num_proc` is less than 1.
    """
    from datasets import ClassLabel, Dataset, DatasetDict, DatasetInfo, Features
    from datasets import Image as ImageFeature

    if num_proc is not None and num_proc < 1:
        raise UserError(f"num_proc is {num_proc}: give at least 1, or None for one process per CPU")
    chosen = _variant(variant)
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=chosen.class_names)})

    def generate(split: str, count: int) -> Dataset:
        # Lists in gen_kwargs are divided among the processes. Everything in gen_kwargs is part of the cache key.
        starts = list(range(0, count, len(chosen.species)))
        key = dict(starts=starts, split=split, count=count, seed=seed, version=VERSION, variant=variant)
        key |= dict(drawn_as=repr(chosen._replace(splits={})))
        return Dataset.from_generator(
            _examples,
            features=features,
            cache_dir=cache_dir and str(cache_dir),
            gen_kwargs=key,
            num_proc=min(num_proc or _available_cpus(), len(starts)),
            split=split,
            dataset_name=variant,
            info=DatasetInfo(splits=[{"name": split, "num_examples": count}]),  # total of the progress bar
        )

    def with_families(split: Dataset) -> Dataset:
        # Not part of the cache: the pixels, which take the time, do not depend on it.
        families = [label // len(chosen.words) for label in split["label"]]
        return split.add_column("super", families, feature=ClassLabel(names=list(chosen.families)))

    wanted = chosen.splits if only is None else wanted_splits(chosen.splits, only, variant)
    with _progress_on_terminals_only():
        return DatasetDict({split: with_families(generate(split, chosen.splits[split])) for split in wanted})


def _variant(name: str) -> Variant:
    if name not in VARIANTS:
        raise unknown("variant of synthbirds", name, VARIANTS)
    return VARIANTS[name]


def _examples(
    starts: list[int], split: str, count: int, seed: int, version: int, variant: str, drawn_as: str
) -> Iterator[dict]:
    """Draw one image of every species from each start on; `version` and `drawn_as` are here for the cache key only."""
    classes = len(VARIANTS[variant].species)
    for start in starts:
        for index in range(start, min(start + classes, count)):
            file = io.BytesIO()
            # Not PNG, which makes noise little smaller and takes fifteen times as long to read, in every epoch.
            Image.fromarray(draw(split, index, seed, variant)).save(file, "BMP")
            yield {"image": {"bytes": file.getvalue(), "path": None}, "label": index % classes}


def _available_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def _progress_on_terminals_only() -> Iterator[None]:
    """Hide the bars of `datasets` in log files; HF_DATASETS_DISABLE_PROGRESS_BARS, where set, has the last word."""
    from datasets import are_progress_bars_disabled, config, disable_progress_bars, enable_progress_bars

    chosen = config.HF_DATASETS_DISABLE_PROGRESS_BARS is not None or are_progress_bars_disabled()
    if chosen or sys.stderr.isatty():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
