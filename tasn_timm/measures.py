"""What an evaluation tells beyond accuracy: how sure the accuracy is, how sure the model is, and what it mixes up."""

import math
from collections import Counter

import torch
from torch import Tensor

Z = 1.959964  # of the normal distribution, for an interval of 95 %
BINS = 15


def wilson_interval(right: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share: within [0, 1] and sensible for few images and for shares of 0 and 1.

    It is about chance in which images were drawn, not about other cameras or places.

    Args:
        right: Successes.
        total: Trials; 0 tells nothing.

    Returns:
        Lower and upper bound, in percent.
    """
    if not total:
        return 0.0, 100.0
    share, spread = right / total, Z * Z / total
    centre = share + spread / 2
    margin = math.sqrt(spread * (share * (1 - share) + spread / 4))
    low, high = ((centre - margin) / (1 + spread), (centre + margin) / (1 + spread))
    return 100 * max(low, 0.0), 100 * min(high, 1.0)


def calibration_error(confidence: Tensor, right: Tensor) -> float:
    """Expected calibration error (Guo et al. 2017): how far the probability of the best class is from its accuracy.

    Over 15 bins of equal width, the mean of |accuracy - confidence|, weighted by the images in a bin.

    Args:
        confidence: Probability of the predicted class, (N,), 0 to 1.
        right: Whether the prediction is right, (N,).

    Returns:
        Percent.
    """
    bins = (confidence.double() * BINS).ceil().long().sub(1).clamp(0, BINS - 1)  # (0, 1/15], (1/15, 2/15], ...
    excess = right.double() - confidence.double()
    return 100 * torch.zeros(BINS, dtype=torch.double).index_add(0, bins, excess).abs().sum().item() / len(right)


def confused_pairs(labels: Tensor, predicted: Tensor) -> list[tuple[int, int, int]]:
    """Count how many images of a class were taken for which other one.

    Args:
        labels: Classes, (N,).
        predicted: Classes, (N,).

    Returns:
        (class, taken for, images), the most images first; of as many, in the order of the classes.
    """
    wrong = labels != predicted
    counts = Counter(zip(labels[wrong].tolist(), predicted[wrong].tolist()))
    return sorted(((*pair, images) for pair, images in counts.items()), key=lambda pair: (-pair[2], *pair[:2]))
