"""Exact evaluation over any number of processes, averages of several models, and the cost of an image."""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from accelerate import Accelerator
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from ..data.transforms import Normalize, Transform
from ..errors import UserError
from ..tasn import TASN


@dataclass
class Scores:
    """Accuracy over a split.

    Args:
        correct: Images of each class that were recognised, (K,), on the CPU.
        counts: Images of each class, (K,), on the CPU.
        top5: Percent of images whose class is among the five best; None with 5 classes or less.
        seconds: That it took.
    """

    correct: Tensor
    counts: Tensor
    top5: float | None
    seconds: float = 0.0

    @property
    def images(self) -> int:
        """Their number."""
        return int(self.counts.sum())

    @property
    def top1(self) -> float:
        """Percent."""
        return 100 * int(self.correct.sum()) / self.images

    @property
    def metrics(self) -> dict[str, float]:
        """ "top1", "top5" (not with 5 classes or less) and "images", as metrics.jsonl has them."""
        top5 = {} if self.top5 is None else dict(top5=self.top5)
        return dict(top1=self.top1) | top5 | dict(images=self.images)


@torch.inference_mode()
def evaluate(
    accelerator: Accelerator,
    predict: Callable[..., Tensor],
    loader: DataLoader,
    check: Callable[[], None] | None = None,
    batches: int | None = None,
) -> Scores:
    """Accuracy over a split, every image counted once.

    Args:
        accelerator: Gathers predictions of all processes and drops the images that only filled up the last batch.
        predict: A batch of the loader's images -> scores (B, K), the highest for the class. A model must be in
            evaluation mode.
        loader: Prepared loader of (images, labels).
        check: Called after every batch; may raise to end it.
        batches: Stop after so many; None: all.
    """
    hidden = not (accelerator.is_main_process and sys.stderr.isatty())
    correct = counts = in_top5 = 0
    start = time.perf_counter()
    options = dict(desc="evaluation", unit="batch", disable=hidden, leave=False, dynamic_ncols=True)
    for batch in tqdm(islice(loader, batches), total=batches or len(loader), **options):
        scores = predict(batch.images)  # (B, K)
        classes = scores.shape[1]
        best = scores.topk(min(5, classes)).indices
        best, labels = (tensor.cpu() for tensor in accelerator.gather_for_metrics((best, batch.labels)))
        hits = best == labels[:, None]  # (B, 5)
        correct += labels[hits[:, 0]].bincount(minlength=classes)
        counts += labels.bincount(minlength=classes)
        in_top5 += int(hits.sum())
        if check:
            check()
    top5 = 100 * in_top5 / int(counts.sum()) if classes > 5 else None
    return Scores(correct, counts, top5, time.perf_counter() - start)


class Ensemble(nn.Module):
    """Averages the probabilities of classifiers; one is fine.

    Each has its own input size, crop and normalisation, those of its pretrained_cfg.

    Args:
        models: timm models of 3-channel images and the same classes.
        flip: Average over each image and its mirror image, too (Table 7).
    """

    def __init__(self, models: Sequence[nn.Module], flip: bool = False) -> None:
        super().__init__()
        configs = [resolve_model_data_config(model) for model in models]
        self.models = nn.ModuleList(models)
        self.normalize = nn.ModuleList(
            Normalize(config.pop("mean"), config.pop("std"), keep_pixels=isinstance(model, TASN))
            for model, config in zip(models, configs)
        )
        self.views = [config for i, config in enumerate(configs) if config not in configs[:i]]
        self.view_of = [self.views.index(config) for config in configs]
        self.flip = flip

    def transform(self) -> Callable[[Image.Image], tuple[Tensor, ...]]:
        """RGB image -> one (3, H, W), uint8, for each distinct geometry: what `forward` takes, as batches."""
        # timm's own (pixels as `eval_transform`'s), since models from elsewhere may be bilinear, or not square.
        return partial(_each, [create_transform(**view, use_prefetcher=True) for view in self.views])

    def forward(self, images: Sequence[Tensor]) -> Tensor:
        """Probabilities (B, K) from `transform`'s images, (B, 3, H, W) for each geometry.

        Raises:
            UserError: A model's output is not finite.
        """
        members = zip(self.models, self.normalize, self.view_of)
        each = torch.stack([self._member(model, normalize([images[view]])) for model, normalize, view in members])
        if not each.isfinite().all():
            number = int((~each.isfinite()).any(-1).any(-1).nonzero()[0])
            raise UserError(f"the output of model {number + 1} of {len(each)} is not finite: its weights are spoiled.")
        return each.mean(0)

    def _member(self, model: nn.Module, images: Tensor) -> Tensor:
        views = [images, images.flip(-1)] if self.flip else [images]
        return torch.stack([model(view).float().softmax(-1) for view in views]).mean(0)


def _each(transforms: list[Transform], image: Image.Image) -> tuple[Tensor, ...]:
    return tuple(transform(image) for transform in transforms)


def count_flops(model: nn.Module, input_size: tuple[int, int, int]) -> int:
    """Floating point operations of one image in evaluation: convolutions and matrix products, 2 per multiply-add.

    Args:
        model: Put into evaluation mode.
        input_size: (C, H, W).
    """
    device = next(model.parameters()).device
    model.eval()
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, *input_size, device=device))
    return counter.get_total_flops()
