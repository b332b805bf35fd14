"""Exact evaluation over any number of processes, and the cost of an image."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm


@dataclass
class Scores:
    """What the images of a split were taken for, in the order of the split.

    Args:
        best: The five best classes of each image, or all where there are fewer, the best first: (N, k), on the CPU.
        values: What they scored, (N, k), on the CPU: probabilities of an `Ensemble`, logits of a model.
        labels: The images' own classes, (N,), on the CPU.
        num_classes: K.
        seconds: That it took.
    """

    best: Tensor
    values: Tensor
    labels: Tensor
    num_classes: int
    seconds: float = 0.0

    @property
    def images(self) -> int:
        """Their number."""
        return len(self.labels)

    @property
    def right(self) -> Tensor:
        """Whether each image was recognised, (N,)."""
        return self.best[:, 0] == self.labels

    @property
    def in_top5(self) -> Tensor:
        """Whether each image's class is among its five best, (N,)."""
        return (self.best == self.labels[:, None]).any(1)

    @property
    def correct(self) -> Tensor:
        """Images of each class that were recognised, (K,)."""
        return self.labels[self.right].bincount(minlength=self.num_classes)

    @property
    def counts(self) -> Tensor:
        """Images of each class, (K,)."""
        return self.labels.bincount(minlength=self.num_classes)

    @property
    def top1(self) -> float:
        """Percent."""
        return 100 * int(self.right.sum()) / self.images

    @property
    def top5(self) -> float | None:
        """Percent of images whose class is among the five best; None with 5 classes or less."""
        return 100 * int(self.in_top5.sum()) / self.images if self.num_classes > 5 else None

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
    """Classify a split, every image once.

    Args:
        accelerator: Gathers predictions of all processes and drops the images that only filled up the last batch.
        predict: A batch of the loader's images -> scores (B, K), the highest for the class. A model must be in
            evaluation mode.
        loader: Prepared loader of (images, labels), in the order of the split.
        check: Called after every batch; may raise to end it.
        batches: Stop after so many; None: all.
    """
    hidden = not (accelerator.is_main_process and sys.stderr.isatty())
    found: list[tuple[Tensor, ...]] = []
    start = time.perf_counter()
    options = dict(desc="evaluation", unit="batch", disable=hidden, leave=False, dynamic_ncols=True)
    for batch in tqdm(islice(loader, batches), total=batches or len(loader), **options):
        scores = predict(batch.images)  # (B, K)
        classes = scores.shape[1]
        values, best = scores.topk(min(5, classes))
        gathered = accelerator.gather_for_metrics((best, values, batch.labels))
        found.append(tuple(tensor.cpu() for tensor in gathered))
        if check:
            check()
    best, values, labels = map(torch.cat, zip(*found))
    return Scores(best, values, labels, classes, time.perf_counter() - start)


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
