"""Intervals, calibration and confusions against independent formulations."""

import math
from collections import Counter

import pytest
import torch
from scipy.stats import binomtest

from tasn_timm.measures import calibration_error, confused_pairs, wilson_interval


@pytest.mark.parametrize(("right", "total"), [(0, 1), (1, 1), (0, 40), (40, 40), (27, 40), (912, 960), (5000, 95986)])
def test_intervals_are_scipys_and_solve_wilsons_equation(right, total):
    bounds = wilson_interval(right, total)
    expected = binomtest(right, total).proportion_ci(0.95, method="wilson")
    assert bounds == pytest.approx((100 * expected.low, 100 * expected.high), abs=1e-4)
    share = right / total
    for bound in bounds:  # at a bound, the share is 1.96 standard deviations away
        p = bound / 100
        assert (share - p) ** 2 == pytest.approx(1.959964**2 * p * (1 - p) / total, abs=1e-12)


def test_of_nothing_nothing_is_known():
    assert wilson_interval(0, 0) == (0.0, 100.0)


def plain_error(confidence: list[float], right: list[bool]) -> float:
    """The definition, bin by bin and image by image."""
    error = 0.0
    for number in range(15):
        inside = [i for i, c in enumerate(confidence) if number / 15 < c <= (number + 1) / 15 or (c == 0 == number)]
        if inside:
            accuracy = sum(right[i] for i in inside) / len(inside)
            mean = math.fsum(confidence[i] for i in inside) / len(inside)
            error += len(inside) / len(confidence) * abs(accuracy - mean)
    return 100 * error


@pytest.mark.parametrize("seed", range(3))
def test_calibration_is_that_of_a_plain_loop(seed):
    generator = torch.Generator().manual_seed(seed)
    confidence = torch.rand(500, generator=generator, dtype=torch.double) ** 0.5
    right = torch.rand(500, generator=generator) < 0.7
    assert calibration_error(confidence, right) == pytest.approx(plain_error(confidence.tolist(), right.tolist()))


def test_calibration_in_limits():
    sure = torch.tensor([1.0, 1.0, 1.0, 1.0])
    assert calibration_error(sure, torch.tensor([True] * 4)) == 0
    assert calibration_error(sure, torch.tensor([False] * 4)) == 100
    assert calibration_error(torch.full((4,), 0.75), torch.tensor([True, True, True, False])) == 0
    half = torch.tensor([0.25, 0.75])  # two bins, whose errors do not cancel
    assert calibration_error(half, torch.tensor([True, False])) == pytest.approx(75)


def test_confusions_are_counted_most_first():
    generator = torch.Generator().manual_seed(0)
    labels, predicted = torch.randint(4, (2, 200), generator=generator)
    pairs = confused_pairs(labels, predicted)
    expected = Counter((a, b) for a, b in zip(labels.tolist(), predicted.tolist()) if a != b)
    assert {(a, b): images for a, b, images in pairs} == expected
    assert pairs == sorted(pairs, key=lambda pair: (-pair[2], pair[0], pair[1]))
    assert confused_pairs(labels, labels) == []
