"""Exact evaluation over any number of processes, and the cost of an image."""

import torch
from accelerate import Accelerator
from timm.utils import AverageMeter, accuracy
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode


@torch.inference_mode()
def evaluate(accelerator: Accelerator, model: nn.Module, loader: DataLoader, normalize: nn.Module) -> dict[str, float]:
    """Accuracy over a split, every image counted once.

    Args:
        accelerator: Gathers predictions of all processes and drops the images that only filled up the last batch.
        model: Prepared or not; put into evaluation mode.
        loader: Prepared loader of (images, labels).
        normalize: uint8 images -> model input.

    Returns:
        "top1" and "top5" in percent ("top5" only with more than 5 classes), and "images", their number.
    """
    model.eval()
    meters: dict[int, AverageMeter] = {}
    for images, labels in loader:
        logits = model(normalize(images)).float()
        logits, labels = accelerator.gather_for_metrics((logits, labels))
        topk = (1, 5) if logits.shape[1] > 5 else (1,)
        for k, percent in zip(topk, accuracy(logits, labels, topk)):
            meters.setdefault(k, AverageMeter()).update(percent.item(), len(labels))
    return {f"top{k}": meter.avg for k, meter in meters.items()} | {"images": meters[1].count}


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
