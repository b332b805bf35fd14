"""Images per second and core: decoding and augmentation at 512, ours beside timm's `create_loader` on the same files.

    python tests/benchmarks/loading.py

Both load in this process on one thread, and hand over normalised float batches. Rounds are interleaved; medians and the
ratios' range over the rounds are printed as a Markdown table. The files are made: smooth noise of photographs' size and
weight (500 x 375 and about 110 KB, as in CUB-200-2011).
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset
from timm.data import create_loader as create_timm_loader
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import InterpolationMode, v2
from tqdm import tqdm

from tasn_timm.data.loading import KeyedBatches, create_train_loader
from tasn_timm.data.splits import load_splits
from tasn_timm.data.transforms import PCA_AXES, PCA_SCALES, Normalize, train_transform

SIZE, BATCH = 512, 16
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
JITTER = dict(color_jitter=0.4)
PUBLISHED = dict(color_jitter=0.4, degrees=30, pca_noise=0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        small, large = Path(name, "small"), Path(name, "large")
        write_photographs(small, options.images, (500, 375))
        write_photographs(large, BATCH, (4000, 3000))
        pixels = {
            "resize to 512, crop, flip": ({}, small),
            "+ colour jitter": (JITTER, small),
            "+ rotation, PCA noise: the published augmentation": (PUBLISHED, small),
            "the published augmentation of 12-megapixel photographs": (PUBLISHED, large),
        }
        print(f"{'| augmentation':58} | timm | ours | ratio | ours, simplejpeg | ratio |\n|---|---|---|---|---|---|")
        for title, (augmentation, folder) in pixels.items():
            loaders = {
                "timm": timm_loader(folder, **augmentation),
                "pillow": our_loader(folder, "pillow", **augmentation),
                "simplejpeg": our_loader(folder, "simplejpeg", **augmentation),
            }
            speeds = measure(loaders, options.rounds, title)
            print_row(title, speeds)


def write_photographs(folder: Path, count: int, size: tuple[int, int]) -> None:
    """JPEG files with some detail at every scale, in two classes."""
    rng = np.random.default_rng(0)
    for number in range(count):
        pixels = np.full((size[1], size[0], 3), 128.0, np.float32)
        for scale, strength in ((64, 40), (16, 20), (4, 9)):
            coarse = rng.normal(0, strength, (size[1] // scale + 1, size[0] // scale + 1, 3)).astype(np.float32)
            for channel in range(3):
                layer = Image.fromarray(coarse[..., channel]).resize(size, Image.Resampling.BICUBIC)
                pixels[..., channel] += np.asarray(layer)
        path = folder / "train" / str(number % 2) / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=95)


def our_loader(folder: Path, decoder: str, **augmentation: float) -> Callable[[], float]:
    """One epoch, in images."""
    transform = train_transform(SIZE, **augmentation)
    split = load_splits(str(folder))["train"]
    batches = KeyedBatches(len(split), 0, BATCH)
    loader = create_train_loader(split, transform, batches, decoder=decoder, min_side=2 * SIZE)
    normalize = Normalize(MEAN, STD)
    return lambda: sum(len(normalize(batch.images)) for batch in loader)


def timm_loader(
    folder: Path, color_jitter: float = 0.0, degrees: float = 0.0, pca_noise: float = 0.0
) -> Callable[[], float]:
    """One epoch, in images. timm has no rotation and no PCA noise of its own: torchvision's and a line of ours."""
    loader: DataLoader = create_timm_loader(
        create_dataset("", root=str(folder), split="train"),
        (3, SIZE, SIZE),
        BATCH,
        is_training=True,
        train_crop_mode="rkrr",
        scale=(1, 1),
        ratio=(1, 1),
        color_jitter=color_jitter or None,
        interpolation="bicubic",
        num_workers=0,
        persistent_workers=False,
        use_prefetcher=False,
    )
    steps = loader.dataset.transform.transforms
    if degrees:
        steps.insert(1, v2.RandomRotation(degrees, InterpolationMode.BILINEAR, fill=255))
    if pca_noise:
        steps.insert(-1, lambda image: add_pca_noise(image, pca_noise))
    return lambda: sum(len(images) for images, _ in loader)


def add_pca_noise(image: Tensor, std: float) -> Tensor:
    """(3, H, W) from 0 to 1."""
    return image + (PCA_AXES @ (std * torch.randn(3) * PCA_SCALES)).view(3, 1, 1) / 255


def measure(loaders: dict[str, Callable[[], float]], rounds: int, title: str) -> dict[str, list[float]]:
    """Images per second of CPU time, a value a round."""
    speeds = {name: [] for name in loaders}
    for number in tqdm(range(rounds + 1), desc=title, leave=False):
        for name, epoch in loaders.items():
            start = time.process_time()
            images = epoch()
            if number:  # the first one warms up
                speeds[name].append(images / (time.process_time() - start))
    return speeds


def print_row(title: str, speeds: dict[str, list[float]]) -> None:
    median = {name: statistics.median(values) for name, values in speeds.items()}
    cells = [f"{title:57}", f"{median['timm']:.0f}"]
    for name in ("pillow", "simplejpeg"):
        ratios = [ours / theirs for ours, theirs in zip(speeds[name], speeds["timm"])]
        cells += [f"{median[name]:.0f}", f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"]
    print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
