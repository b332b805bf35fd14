"""Attention sampler: positions against plain loops, an ordinary resize in the limit, and maps nobody would wish for."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from tasn_timm.attention_sampler import (
    SAMPLERS,
    SHAPES,
    AttentionSampler,
    _inverse_distributions,
    attention_grid,
    attention_sample,
    axis_densities,
    balance_axes,
    inverse_distribution,
    saliency_grid,
    sample,
    sample_pixels,
    shape_map,
    uniform_grid,
)

UNCAPPED = dict(max_zoom=None)


def loop_inverse(density, count):
    """F^-1((k + 1/2) / count) in [0, 1], F piecewise linear with F = 0 at the left edge and 1 at the right."""
    cells, total = len(density), math.fsum(density)
    positions = []
    for k in range(count):
        target, below = (k + 0.5) / count, 0.0
        for cell, value in enumerate(density):
            share = value / total
            if below + share > target:
                positions.append((cell + (target - below) / share) / cells)
                break
            below += share
    return positions


def loop_balance(x, y, max_zoom, iterations):
    for number in range(iterations):
        limit = min(max(x), max(y))
        if number == 0 and max_zoom is not None:
            limit = min(limit, max_zoom)
        clipped = [[min(value, limit) for value in axis] for axis in (x, y)]
        x, y = ([value + (len(axis) - math.fsum(axis)) / len(axis) for value in axis] for axis in clipped)
    return x, y


def loop_grid(attention, output_size, max_zoom=4.0, iterations=5, marginal="max"):
    """DESIGN, "Attention grid", for one map as a list of rows: (H', W', 2)."""
    reduce = {"max": max, "sum": math.fsum}[marginal]
    x = [reduce([row[j] for row in attention]) for j in range(len(attention[0]))]
    y = [reduce(row) for row in attention]
    x, y = ([value * len(axis) / math.fsum(axis) for value in axis] for axis in (x, y))
    x, y = loop_balance(x, y, max_zoom, iterations)
    columns, rows = loop_inverse(x, output_size[1]), loop_inverse(y, output_size[0])
    return torch.tensor([[(2 * c - 1, 2 * r - 1) for c in columns] for r in rows], dtype=torch.float64)


def loop_saliency(attention, output_size, sigma, margins):
    """SSN's weighted mean position over all cells, one by one: a 2-D Gaussian, the map's border cells repeated."""
    (height, width), (margin_y, margin_x) = (len(attention), len(attention[0])), margins
    cells = [
        ((r + 0.5) / height, (c + 0.5) / width, attention[min(max(r, 0), height - 1)][min(max(c, 0), width - 1)])
        for r in range(-margin_y, height + margin_y)
        for c in range(-margin_x, width + margin_x)
    ]
    grid = torch.empty(*output_size, 2, dtype=torch.float64)
    for i in range(output_size[0]):
        for j in range(output_size[1]):
            y, x = (i + 0.5) / output_size[0], (j + 0.5) / output_size[1]
            weights = [a * math.exp(-((v - y) ** 2 + (u - x) ** 2) / (2 * sigma**2)) for v, u, a in cells]
            for axis, place in ((0, 1), (1, 0)):  # x then y of the cells (y, x, value)
                mean = math.fsum(w * cell[place] for w, cell in zip(weights, cells)) / math.fsum(weights)
                grid[i, j, axis] = 2 * min(max(mean, 0.0), 1.0) - 1
    return grid


def loop_box(attention, threshold=1.0, max_zoom=4.0):
    """(x0, x1, y0, y1) in [0, 1] of the box around the cells above the threshold, for one map as a list of rows."""
    height, width = len(attention), len(attention[0])
    level = threshold * math.fsum(map(math.fsum, attention)) / (height * width)
    inside = [(i, j) for i in range(height) for j in range(width) if attention[i][j] > level]
    inside = inside or [(0, 0), (height - 1, width - 1)]
    box = []
    for places, cells in (([j for _, j in inside], width), ([i for i, _ in inside], height)):
        start, end = min(places) / cells, (max(places) + 1) / cells
        if max_zoom is not None and end - start < 1 / max_zoom:
            start = min(max((start + end - 1 / max_zoom) / 2, 0), 1 - 1 / max_zoom)
            end = start + 1 / max_zoom
        box += [start, end]
    return box


def box_grid(box, output_size):
    x0, x1, y0, y1 = box
    columns = [2 * (x0 + (x1 - x0) * (j + 0.5) / output_size[1]) - 1 for j in range(output_size[1])]
    rows = [2 * (y0 + (y1 - y0) * (i + 0.5) / output_size[0]) - 1 for i in range(output_size[0])]
    return torch.tensor([[(column, row) for column in columns] for row in rows], dtype=torch.float64)


def peaked_maps(batch, height, width, seed=0, dtype=torch.float64):
    """Random maps with few high cells, so that clipping has work to do."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, height, width, generator=generator, dtype=dtype) ** 6 + 0.01


def spot(height, width, at, sigma):
    """A Gaussian around (y, x) with deviations (y, x), all in cells: (1, h, w)."""
    y, x = torch.arange(height, dtype=torch.float64), torch.arange(width, dtype=torch.float64)
    rows, columns = (-(((v - c) / s) ** 2) / 2 for v, c, s in zip((y, x), at, sigma))
    return (rows[:, None] + columns[None]).exp()[None]


def axis_positions(grid):
    """x and y positions of a grid whose rows and columns are straight: (B, W') and (B, H')."""
    assert torch.equal(grid[..., 0], grid[:, :1, :, 0].expand_as(grid[..., 0]))
    assert torch.equal(grid[..., 1], grid[:, :, :1, 1].expand_as(grid[..., 1]))
    return grid[:, 0, :, 0], grid[:, :, 0, 1]


def local_zoom(positions):
    """Magnification between neighbouring outputs, relative to a uniform resize: (B, n - 1)."""
    return 2 / positions.shape[1] / positions.diff(dim=1)


def resize(image, size):
    return F.interpolate(image, size=size, mode="bilinear", align_corners=False)


@pytest.mark.parametrize("marginal", ["max", "sum"])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        dict(max_zoom=1.5),
        dict(max_zoom=1.0),
        UNCAPPED,
        dict(iterations=0),
        dict(iterations=1),
        dict(max_zoom=None, iterations=2),
        dict(max_zoom=2.0, iterations=20),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "size, output_size", [((5, 7), (4, 9)), ((8, 8), (8, 8)), ((12, 3), (5, 16)), ((1, 1), (3, 2))]
)
def test_grid_equals_the_loops(size, output_size, arguments, marginal):
    maps = peaked_maps(2, *size)
    grid = attention_grid(maps, output_size, marginal=marginal, **arguments)
    for attention, got in zip(maps, grid):
        expected = loop_grid(attention.tolist(), output_size, marginal=marginal, **arguments)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    assert grid.shape == (2, *output_size, 2)


def test_defaults_are_the_published_ones_and_one_number_is_a_square():
    maps = peaked_maps(2, 6, 6)
    assert torch.equal(
        attention_grid(maps, 5), attention_grid(maps, (5, 5), max_zoom=4.0, iterations=5, marginal="max")
    )


@pytest.mark.parametrize("output_size", [(24, 20), (5, 7), (20, 5), (12, 10), (36, 30), (11, 11)], ids=str)
@pytest.mark.parametrize("map_size", [(1, 1), (7, 7), (4, 9)], ids=str)
@pytest.mark.parametrize("arguments", [{}, UNCAPPED, dict(iterations=0), dict(marginal="sum")], ids=str)
def test_flat_map_is_an_ordinary_bilinear_resize(map_size, output_size, arguments):
    image = torch.rand(2, 3, 12, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    flat = torch.full((2, *map_size), 0.3, dtype=torch.float64)
    sampled = attention_sample(image, flat, output_size, **arguments)
    torch.testing.assert_close(sampled, resize(image, output_size), rtol=0, atol=1e-12)


def test_flat_map_through_the_sampler_is_an_ordinary_resize():
    image = torch.rand(2, 3, 40, 30, generator=torch.Generator().manual_seed(0))
    sampled = AttentionSampler((16, 20))(image, torch.full((2, 7, 5), 0.3))
    torch.testing.assert_close(sampled, resize(image, (16, 20)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("arguments", [{}, UNCAPPED, dict(marginal="sum")], ids=str)
def test_mirroring_a_map_mirrors_that_axis_alone(arguments):
    maps = peaked_maps(3, 6, 9)
    x, y = axis_positions(attention_grid(maps, (5, 8), **arguments))
    x_lr, y_lr = axis_positions(attention_grid(maps.flip(2), (5, 8), **arguments))
    x_ud, y_ud = axis_positions(attention_grid(maps.flip(1), (5, 8), **arguments))

    torch.testing.assert_close(x_lr, -x.flip(1), rtol=0, atol=1e-12)
    torch.testing.assert_close(y_lr, y, rtol=0, atol=1e-12)
    torch.testing.assert_close(x_ud, x, rtol=0, atol=1e-12)
    torch.testing.assert_close(y_ud, -y.flip(1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("arguments", [{}, UNCAPPED, dict(marginal="sum")], ids=str)
def test_transposing_a_map_swaps_x_and_y(arguments):
    maps = peaked_maps(3, 6, 9)
    grid = attention_grid(maps, (5, 8), **arguments)
    swapped = attention_grid(maps.mT, (8, 5), **arguments)
    torch.testing.assert_close(swapped.transpose(1, 2).flip(-1), grid, rtol=0, atol=1e-12)


def test_the_scale_of_a_map_does_not_matter():
    maps = peaked_maps(3, 6, 9)
    torch.testing.assert_close(attention_grid(maps * 1e4, 8), attention_grid(maps, 8), rtol=0, atol=1e-12)


def test_a_bright_spot_is_magnified_where_it_is():
    grid = attention_grid(spot(16, 16, at=(9, 5), sigma=(1.5, 1.5)), 128)
    for positions, center in zip(axis_positions(grid), (5, 9)):
        zoom = local_zoom(positions)[0]
        closest = zoom.argmax()
        assert zoom[closest] > 2
        assert zoom.min() < 1
        assert positions[0, closest] == pytest.approx(2 * (center + 0.5) / 16 - 1, abs=1 / 16)


@pytest.mark.parametrize("sigma", [(0.2, 0.2), (1.0, 1.0)], ids=str)
@pytest.mark.parametrize("max_zoom", [1.0, 2.0, 4.0])
def test_max_zoom_is_exceeded_by_less_than_one(max_zoom, sigma):
    """What is clipped is given back evenly, on top of the clipped cells too as in the published code."""
    grid = attention_grid(spot(28, 28, at=(9, 5), sigma=sigma), 224, max_zoom=max_zoom)
    for positions in axis_positions(grid):
        assert local_zoom(positions).max() < max_zoom + 1


def test_without_max_zoom_a_peak_is_magnified_beyond_it():
    single = torch.zeros(1, 28, 28, dtype=torch.float64)
    single[0, 9, 5] = 1
    for positions in axis_positions(attention_grid(single, 224, max_zoom=None)):
        assert local_zoom(positions).max() == pytest.approx(28)


@pytest.mark.parametrize("max_zoom", [4.0, None])
@pytest.mark.parametrize("sigma", [(1, 4), (6, 2), (1, 12)], ids=str)
def test_both_axes_end_with_about_the_same_maximum(sigma, max_zoom):
    long_object = spot(28, 28, at=(14, 12), sigma=sigma)
    before = [d.max().item() for d in axis_densities(long_object)]
    after = [d.max().item() for d in balance_axes(*axis_densities(long_object), max_zoom)]
    assert max(before) / min(before) > 1.5
    assert max(after) / min(after) < 1.05

    zooms = [local_zoom(p).max().item() for p in axis_positions(attention_grid(long_object, 224, max_zoom=max_zoom))]
    assert max(zooms) / min(zooms) < 1.05


@pytest.mark.parametrize("max_zoom", [4.0, None])
@pytest.mark.parametrize("size", [(8, 8), (5, 12)], ids=str)
def test_balanced_densities_keep_a_mean_of_one(size, max_zoom):
    for density in balance_axes(*axis_densities(peaked_maps(3, *size)), max_zoom):
        torch.testing.assert_close(density.mean(1), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-12)
        assert (density >= 0).all()


def with_cells(value, *cells, background=0.0):
    attention = torch.full((1, 6, 9), background)
    for row, column in cells:
        attention[0, row, column] = value
    return attention


AWKWARD = {
    "no_mass": torch.zeros(1, 6, 9),
    "negative": torch.full((1, 6, 9), -1.0),
    "all_nan": torch.full((1, 6, 9), math.nan),
    "one_nan": with_cells(math.nan, (2, 3), background=0.5),
    "nan_and_zero": with_cells(math.nan, (2, 3)),
    "one_inf": with_cells(math.inf, (2, 3), background=0.5),
    "two_inf": with_cells(math.inf, (0, 0), (5, 8)),
    "all_inf": torch.full((1, 6, 9), math.inf),
    "minus_inf": with_cells(-math.inf, (2, 3), background=0.5),
    "single_cell": with_cells(1.0, (2, 3)),
    "corner_cell": with_cells(1.0, (5, 8)),
    "two_far_cells": with_cells(1.0, (0, 0), (5, 8)),
    "huge": peaked_maps(1, 6, 9, dtype=torch.float32) * 3e38,
    "tiny": peaked_maps(1, 6, 9, dtype=torch.float32) * 1e-37,
    "denormal": with_cells(1e-45, (2, 3)),
    "denormal_random": peaked_maps(1, 6, 9, dtype=torch.float32) * 1e-41,
    "huge_and_denormal": with_cells(3e38, (2, 3), background=1e-45),
    "constant": torch.full((1, 6, 9), 0.3),
    "half": peaked_maps(1, 6, 9).half() * 6e4,
    "bfloat16": peaked_maps(1, 6, 9).bfloat16(),
    "huge_double": peaked_maps(1, 6, 9) * 1.7e308,
    "denormal_double": peaked_maps(1, 6, 9) * 1e-310,
}


@pytest.mark.parametrize("arguments", [{}, UNCAPPED, dict(iterations=0), dict(marginal="sum", max_zoom=None)], ids=str)
@pytest.mark.parametrize("name", AWKWARD)
def test_any_map_gives_increasing_positions_inside_the_image(name, arguments):
    attention = AWKWARD[name]
    image = torch.rand(1, 3, 54, 54, generator=torch.Generator().manual_seed(0))
    resized = AttentionSampler((27, 45), **arguments)
    for grid in (attention_grid(attention, (27, 45), **arguments), resized.grid(attention, (54, 54))):
        assert grid.dtype == torch.promote_types(attention.dtype, torch.float32)
        for positions in axis_positions(grid):
            assert positions.isfinite().all()
            assert (positions.diff(dim=1) > 0).all()
            assert positions.min() >= -1
            assert positions.max() <= 1
    assert resized(image, attention).isfinite().all()


@pytest.mark.parametrize("name", ["no_mass", "negative", "all_nan", "nan_and_zero", "all_inf", "constant"])
def test_where_nothing_better_is_known_the_grid_is_uniform(name):
    x, y = axis_positions(attention_grid(AWKWARD[name], (8, 10)))
    for positions in (x, y):
        n = positions.shape[1]
        expected = torch.tensor([[2 * (k + 0.5) / n - 1 for k in range(n)]])
        torch.testing.assert_close(positions, expected, rtol=0, atol=1e-6)


MEANINGS = [
    ("one_nan", with_cells(0.0, (2, 3), background=0.5)),
    ("minus_inf", with_cells(0.0, (2, 3), background=0.5)),
    ("one_inf", with_cells(1.0, (2, 3))),
    ("two_inf", with_cells(1.0, (0, 0), (5, 8))),
    ("denormal", with_cells(1.0, (2, 3))),
    ("huge_and_denormal", with_cells(1.0, (2, 3))),
    ("huge", peaked_maps(1, 6, 9, dtype=torch.float32)),
    ("huge_double", peaked_maps(1, 6, 9)),
    ("tiny", peaked_maps(1, 6, 9, dtype=torch.float32)),
]


@pytest.mark.parametrize("name, same_as", MEANINGS)
@pytest.mark.parametrize("marginal", ["max", "sum"])
def test_awkward_values_count_as_what_they_mean(name, same_as, marginal):
    got = attention_grid(AWKWARD[name], (8, 10), max_zoom=None, marginal=marginal)
    torch.testing.assert_close(
        got, attention_grid(same_as, (8, 10), max_zoom=None, marginal=marginal), atol=2e-6, rtol=0
    )


def test_a_broken_map_leaves_the_others_of_its_batch_alone():
    good = peaked_maps(1, 6, 9, dtype=torch.float32)
    broken = torch.cat([AWKWARD["all_nan"], good, AWKWARD["one_inf"]])
    torch.testing.assert_close(attention_grid(broken, 8)[1:2], attention_grid(good, 8), rtol=0, atol=1e-7)


@pytest.mark.parametrize("marginal", ["max", "sum"])
@pytest.mark.parametrize("factors", [(3, 3), (5, 1), (1, 3), (9, 5)], ids=str)
def test_axis_densities_equal_those_of_the_resized_map(factors, marginal):
    maps = peaked_maps(2, 5, 4)
    size = (5 * factors[0], 4 * factors[1])  # odd factors: the map's rows lie on rows of the resized map
    density_x, density_y = axis_densities(maps, size, marginal=marginal)

    fine = resize(maps[:, None], size)[:, 0]
    for density, axis in ((density_x, 1), (density_y, 2)):
        profile = fine.amax(axis) if marginal == "max" else fine.sum(axis)
        torch.testing.assert_close(density, profile / profile.mean(1, keepdim=True), rtol=0, atol=1e-12)


def test_axis_densities_at_the_resolution_of_the_map():
    maps = peaked_maps(2, 5, 4)
    for (x, y), marginal in ((axis_densities(maps), "max"), (axis_densities(maps, marginal="sum"), "sum")):
        for attention, got_x, got_y in zip(maps.tolist(), x, y):
            reduce = max if marginal == "max" else sum
            columns, rows = [reduce(c) for c in zip(*attention)], [reduce(r) for r in attention]
            assert got_x.tolist() == pytest.approx([v * len(columns) / sum(columns) for v in columns])
            assert got_y.tolist() == pytest.approx([v * len(rows) / sum(rows) for v in rows])


@pytest.mark.parametrize("count", [1, 2, 7, 32])
@pytest.mark.parametrize(
    "density",
    [
        [1.0, 1.0, 1.0],
        [0.2, 3.0, 0.7, 0.1],
        [0.0, 0.0, 1.0, 2.0],
        [3.0, 1.0, 0.0, 0.0],
        [1.0, 0.0, 0.0, 2.0, 0.0, 1.0],
        [0.0, 0.0, 5.0, 0.0],
        [0.0, 1.0, 0.0, 1.0, 0.0],
        [4.0],
        [1e-9, 1.0, 1e-9],
    ],
    ids=str,
)
def test_inverse_distribution_inverts_the_distribution(density, count):
    positions = inverse_distribution(torch.tensor([density, density[::-1]], dtype=torch.float64), count)
    for values, found in zip((density, density[::-1]), positions.tolist()):
        assert found == sorted(set(found))
        assert all(0 <= position <= 1 for position in found)
        for k, position in enumerate(found):
            inside = position * len(values)
            mass = sum(value * min(max(inside - cell, 0), 1) for cell, value in enumerate(values))
            assert mass / sum(values) == pytest.approx((k + 0.5) / count, abs=1e-12)


def test_a_uniform_density_puts_positions_on_pixel_centers():
    for cells, count in ((1, 5), (7, 4), (512, 224)):
        positions = inverse_distribution(torch.ones(1, cells), count)
        assert positions[0].tolist() == pytest.approx([(k + 0.5) / count for k in range(count)], abs=1e-6)


def test_both_axes_are_inverted_as_each_alone():
    densities = [torch.rand(3, 7, dtype=torch.float64).square(), torch.rand(3, 12, dtype=torch.float64).square()]
    together = _inverse_distributions(densities, (9, 4))
    for density, count, found in zip(densities, (9, 4), together):
        assert torch.equal(found, inverse_distribution(density, count))


@pytest.mark.parametrize(("height", "width"), [(37, 50), (1, 8), (6, 1)])
def test_pixels_of_uint8_are_sampled_as_floats(height, width):
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(256, (3, 4, height, width), generator=generator, dtype=torch.uint8)
    x, y = (2 * torch.rand(3, n, generator=generator, dtype=torch.float64) - 1 for n in (9, 11))
    x[:, 0], x[:, 1], y[:, 0], y[:, 1] = -1, 1, -1, 1
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), -1)
    torch.testing.assert_close(sample_pixels(image, x, y), sample(image.double(), grid))
    single = sample_pixels(image, x.float(), y.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), sample(image.double(), grid), atol=1e-3, rtol=0)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_sampler_takes_pixels_of_uint8(sampler):
    image = torch.randint(256, (2, 3, 40, 30), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    attention = peaked_maps(2, 7, 6, dtype=torch.float32)
    sampler = AttentionSampler((16, 20), sampler=sampler)
    sampled = sampler(image, attention)
    assert sampled.dtype == torch.float32
    torch.testing.assert_close(sampled, sampler(image.float(), attention), atol=2e-3, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_images_are_sampled_in_float32(dtype):
    image = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    grid = attention_grid(peaked_maps(2, 7, 7, dtype=torch.float32), 24)
    sampled = sample(image, grid)
    assert sampled.dtype == dtype
    assert sampled.isfinite().all()
    assert torch.equal(sampled, sample(image.float(), grid).to(dtype))
    attention = peaked_maps(2, 7, 7, dtype=torch.float32)
    assert torch.equal(attention_sample(image, attention, 24), sampled)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_autocast_changes_nothing(sampler):
    image = torch.rand(1, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    attention = peaked_maps(1, 7, 7, dtype=torch.float32)
    sampler = AttentionSampler(24, sampler=sampler)
    expected = sampler(image, attention)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = sampler(image, attention)
    assert got.dtype == torch.float32
    assert torch.equal(got, expected)


def test_sample_is_bilinear_and_repeats_the_border():
    image = torch.tensor([[[[1.0, 2.0], [3.0, 5.0]]]], dtype=torch.float64)
    points = torch.tensor([[[[-0.5, -0.5], [0.5, -0.5], [0.0, 0.0], [-1.0, -1.0], [1.0, 0.5]]]], dtype=torch.float64)
    assert sample(image, points).flatten().tolist() == pytest.approx([1, 2, 2.75, 1, 5])


@pytest.mark.parametrize("arguments", [{}, UNCAPPED, dict(max_zoom=2.0, iterations=1), dict(marginal="sum")], ids=str)
def test_the_sampler_treats_maps_as_resized_to_the_image(arguments):
    image = torch.rand(2, 3, 35, 27, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    maps = peaked_maps(2, 7, 9)  # 35 = 5 * 7 and 27 = 3 * 9: exact
    sampled = AttentionSampler((12, 15), **arguments)(image, maps)
    resized = resize(maps[:, None], (35, 27))[:, 0]
    torch.testing.assert_close(sampled, attention_sample(image, resized, (12, 15), **arguments), rtol=0, atol=1e-10)


def test_the_sampler_is_within_a_tenth_of_a_pixel_of_a_resized_map_at_any_size():
    generator = torch.Generator().manual_seed(0)
    blobs = []
    for _ in range(60):
        y, x, sigma_y, sigma_x = torch.rand(4, generator=generator).tolist()
        blobs.append(spot(12, 12, at=(12 * y - 0.5, 12 * x - 0.5), sigma=(1 + 2 * sigma_y, 1 + 2 * sigma_x)))
    maps = torch.cat(blobs).unflatten(0, (20, 3)).sum(1)  # three blobs each
    exact = attention_grid(resize(maps[:, None], (512, 512))[:, 0], 224)
    pixels = (AttentionSampler(224).grid(maps, (512, 512)) - exact).abs() / 2 * 512
    assert pixels.mean() < 0.1
    assert pixels.max() < 2.3  # neighbouring samples of a uniform grid are 2.3 pixels apart


@pytest.mark.parametrize("image_size", [(20, 40), (40, 20), (31, 31)], ids=str)
def test_an_image_smaller_than_the_sample_is_told_with_both_sizes(image_size):
    with pytest.raises(ValueError, match=rf"{image_size[0]} x {image_size[1]}.*32 x 32"):
        AttentionSampler(32)(torch.rand(1, 3, *image_size), torch.rand(1, 4, 4))


@pytest.mark.parametrize("max_zoom", [0.5, 0, -4.0, math.nan])
def test_a_max_zoom_below_one_is_refused(max_zoom):
    attention = torch.rand(1, 4, 4)
    for call in (
        lambda: attention_grid(attention, 8, max_zoom=max_zoom),
        lambda: attention_sample(torch.rand(1, 3, 9, 9), attention, 8, max_zoom=max_zoom),
        lambda: balance_axes(torch.ones(1, 4), torch.ones(1, 4), max_zoom),
        lambda: uniform_grid(attention, 8, max_zoom=max_zoom),
        lambda: AttentionSampler(8, max_zoom=max_zoom),
        lambda: AttentionSampler(8, max_zoom=max_zoom, sampler="uniform"),
    ):
        with pytest.raises(ValueError, match=f"max_zoom.*at least 1.*{max_zoom}"):
            call()


def test_unknown_names_are_told_with_what_is_allowed():
    attention = torch.rand(1, 4, 4)
    for call in (
        lambda: attention_grid(attention, 8, marginal="maximum"),
        lambda: axis_densities(attention, marginal="maximum"),
        lambda: AttentionSampler(8, marginal="maximum"),
    ):
        with pytest.raises(ValueError, match=r"marginal 'maximum'.*max, sum"):
            call()
    with pytest.raises(ValueError, match=r"map shape 'sqare'.*did you mean 'square'"):
        shape_map(attention, "sqare")
    with pytest.raises(ValueError, match=r"sampler 'salience'.*did you mean 'saliency'"):
        AttentionSampler(8, sampler="salience")


@pytest.mark.parametrize("function", [attention_grid, saliency_grid, uniform_grid])
def test_a_map_with_a_channel_axis_is_refused(function):
    with pytest.raises(ValueError, match=r"\(B, h, w\).*4 dimensions"):
        function(torch.rand(1, 1, 4, 4), 8)


def loop_flat_top(cells):
    """Rise from 0 at the 70 % quantile to half of the way to the peak, flat beyond, squared."""
    ordered = sorted(cells)
    place = 0.7 * (len(ordered) - 1)
    low = int(place)
    floor = ordered[low] + (place - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])
    return [min(max((value - floor) / (max(ordered) - floor), 0.0), 0.5) ** 2 for value in cells]


@pytest.mark.parametrize("shape", SHAPES)
def test_map_shapes_equal_loops(shape):
    loops = {"none": lambda cells: cells, "square": lambda cells: [v * v for v in cells], "flat_top": loop_flat_top}
    maps = peaked_maps(3, 5, 7)
    shaped = shape_map(maps, shape)
    assert shaped.shape == maps.shape
    assert (shaped >= 0).all()
    for before, after in zip(maps, shaped):
        relative = (before / before.max()).flatten().tolist()
        assert after.flatten().tolist() == pytest.approx(loops[shape](relative), rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_map_shapes_see_proportions_only(shape, scale):
    maps = peaked_maps(3, 5, 7).float()
    torch.testing.assert_close(shape_map(maps * scale, shape), shape_map(maps, shape), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_map_shapes_survive_broken_maps(shape):
    maps = peaked_maps(2, 5, 7).float()
    expected = shape_map(maps.clone().index_fill_(2, torch.tensor(3), 0.0), shape)
    maps[:, :, 3] = torch.nan
    torch.testing.assert_close(shape_map(maps, shape), expected)
    maps[:, 2, 4] = torch.inf
    shaped = shape_map(maps, shape)
    assert shaped.isfinite().all() and (shaped.flatten(1).argmax(1) == 2 * 7 + 4).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("value", [0.0, 0.3])
def test_a_flat_map_of_any_shape_samples_uniformly(shape, value):
    flat = shape_map(torch.full((1, 5, 7), value), shape)
    assert flat.isfinite().all()
    torch.testing.assert_close(attention_grid(flat, 8), attention_grid(torch.ones(1, 5, 7), 8), rtol=0, atol=1e-6)


def test_the_image_gets_the_gradient_of_a_bilinear_average():
    image = torch.rand(2, 3, 20, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    attention = peaked_maps(2, 5, 5)
    weight = torch.rand(2, 3, 8, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sampled = attention_sample(image, attention, (8, 6))
    (sampled * weight).sum().backward()

    # Linear in the image with weights that sum to 1 at each output pixel.
    torch.testing.assert_close((image.grad * image).sum(), (sampled * weight).sum())
    torch.testing.assert_close(image.grad.sum((2, 3)), weight.sum((2, 3)))
    assert (image.grad >= 0).all()


@pytest.mark.parametrize("marginal", ["max", "sum"])
@pytest.mark.parametrize("size", [(5, 7), (40, 31), (3, 20)], ids=str)
def test_attention_grid_at_a_size_takes_the_densities_of_that_size(size, marginal):
    maps = peaked_maps(2, 5, 7)
    density_x, density_y = balance_axes(*axis_densities(maps, size, marginal=marginal), 2.0, 3)
    x, y = inverse_distribution(density_x, 9), inverse_distribution(density_y, 6)
    grid = attention_grid(maps, (6, 9), max_zoom=2.0, iterations=3, marginal=marginal, size=size)
    got_x, got_y = axis_positions(grid)
    torch.testing.assert_close(got_x, 2 * x - 1, rtol=0, atol=1e-12)
    torch.testing.assert_close(got_y, 2 * y - 1, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sigma", [0.05, 0.178, 0.4])
@pytest.mark.parametrize("size, output_size", [((4, 6), (5, 3)), ((5, 5), (4, 4)), ((7, 2), (2, 6))], ids=str)
def test_saliency_grid_equals_the_loops(size, output_size, sigma):
    maps = peaked_maps(2, *size)
    grid = saliency_grid(maps, output_size, sigma=sigma)
    for reach, atol in ((5, 1e-12), (8, 1e-5)):  # what lies beyond 5 sigma does not matter
        margins = [math.ceil(reach * sigma * cells) for cells in size]
        expected = torch.stack([loop_saliency(m.tolist(), output_size, sigma, margins) for m in maps])
        torch.testing.assert_close(grid, expected, rtol=0, atol=atol)


def test_saliency_grid_equals_the_published_code_at_its_31_positions():
    """recasens/Saliency-Sampler, saliency_sampler.py: create_grid, which calls the first cell 0 and the last one 1."""
    cells, padding, full_width = 31, 30, 13
    maps = torch.cat([peaked_maps(2, cells, cells), spot(cells, cells, at=(9, 24), sigma=(2, 3))])
    offsets = torch.arange(2 * padding + 1, dtype=torch.float64) - padding
    kernel = (-4 * math.log(2) * (offsets[:, None] ** 2 + offsets**2) / full_width**2).exp()[None, None]
    padded = F.pad(maps[:, None], (padding,) * 4, mode="replicate")
    place = (torch.arange(cells + 2 * padding, dtype=torch.float64) - padding) / (cells - 1)
    mass, x, y = (F.conv2d(padded * factor, kernel)[:, 0] for factor in (1, place, place[:, None]))
    expected = torch.stack([x / mass, y / mass], dim=-1).clamp(0, 1) * (cells - 1)  # in cells

    sigma = full_width / (2 * math.sqrt(2 * math.log(2))) / cells
    got = ((saliency_grid(maps, cells, sigma=sigma) + 1) / 2 * cells - 0.5).clamp(0, cells - 1)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    assert sigma == pytest.approx(0.178, abs=5e-4)
    assert torch.equal(saliency_grid(maps, 20), saliency_grid(maps, (20, 20), sigma=0.178))


@pytest.mark.parametrize("output_size", [(24, 20), (5, 7), (11, 11)], ids=str)
@pytest.mark.parametrize("map_size", [(7, 7), (14, 9)], ids=str)
@pytest.mark.parametrize("value", [0.0, 0.3])
@pytest.mark.parametrize("function", [saliency_grid, uniform_grid])
def test_flat_map_is_an_ordinary_resize_with_the_other_samplers(function, value, map_size, output_size):
    image = torch.rand(2, 3, 12, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    flat = torch.full((2, *map_size), value, dtype=torch.float64)
    sampled = sample(image, function(flat, output_size))
    torch.testing.assert_close(sampled, resize(image, output_size), rtol=0, atol=1e-5)


@pytest.mark.parametrize("function", [saliency_grid, uniform_grid])
def test_mirroring_and_transposing_a_map_does_so_to_the_other_samplers(function):
    maps = peaked_maps(3, 6, 9)
    grid = function(maps, (5, 8))
    factors = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(function(maps.flip(2), (5, 8)), grid.flip(2) * factors, rtol=0, atol=1e-6)
    torch.testing.assert_close(function(maps.flip(1), (5, 8)), grid.flip(1) * -factors, rtol=0, atol=1e-6)
    swapped = function(maps.mT, (8, 5)).transpose(1, 2).flip(-1)
    torch.testing.assert_close(swapped, grid, rtol=0, atol=1e-6)
    torch.testing.assert_close(function(maps * 1e4, (5, 8)), grid, rtol=0, atol=1e-6)


@pytest.mark.parametrize("sigma", [0.01, 0.05, 0.178, 0.6])
def test_saliency_grid_does_not_fold(sigma):
    grid = saliency_grid(peaked_maps(5, 9, 6), (40, 30), sigma=sigma)
    assert (grid[..., 0].diff(dim=2) >= -1e-12).all()  # x along a row
    assert (grid[..., 1].diff(dim=1) >= -1e-12).all()  # y along a column


def test_saliency_grid_bends_rows_and_magnifies_a_bright_spot_where_it_is():
    grid = saliency_grid(spot(16, 16, at=(9, 5), sigma=(1.5, 1.5)) + 0.05, 128)
    x, y = (2 * (center + 0.5) / 16 - 1 for center in (5, 9))
    nearest = (grid[0] - torch.tensor([x, y], dtype=torch.float64)).norm(dim=-1).argmin().item()
    row, column = divmod(nearest, 128)
    for positions, center in ((grid[:, row, :, 0], x), (grid[:, :, column, 1], y)):
        zoom = local_zoom(positions)[0]
        assert zoom.max() > 2
        assert zoom.min() < 1
        assert positions[0, zoom.argmax()] == pytest.approx(center, abs=1 / 8)
    assert (grid[0, :, 0, 0] - grid[0, row, 0, 0]).abs().max() > 0.1  # the left border is drawn in beside the spot


@pytest.mark.parametrize("function", [saliency_grid, uniform_grid])
def test_the_other_samplers_work_in_the_precision_of_the_maps_and_float32_at_least(function):
    low = peaked_maps(2, 7, 7).bfloat16()
    grid = function(low, 24)
    assert grid.dtype == torch.float32
    assert torch.equal(grid, function(low.float(), 24))

    quantised = low.double()  # the same cells in both
    torch.testing.assert_close(function(quantised, 24), grid.double(), rtol=0, atol=1e-5)
    assert function(quantised, 24).dtype == torch.float64


@pytest.mark.parametrize("sigma", [0, 0.0, -0.1, math.nan, math.inf])
def test_a_sigma_that_is_not_a_width_is_refused(sigma):
    for call in (
        lambda: saliency_grid(torch.rand(1, 4, 4), 8, sigma=sigma),
        lambda: AttentionSampler(8, sampler="saliency", sigma=sigma),
    ):
        with pytest.raises(ValueError, match=f"sigma.*greater than 0.*{sigma}"):
            call()


@pytest.mark.parametrize(
    "sampler, arguments",
    [
        ("saliency", {}),
        ("saliency", dict(sigma=0.01)),
        ("saliency", dict(sigma=2.0)),
        ("uniform", {}),
        ("uniform", dict(max_zoom=None, threshold=3.0)),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", AWKWARD)
def test_any_map_gives_positions_inside_the_image_with_the_other_samplers(name, sampler, arguments):
    module = AttentionSampler((27, 45), sampler=sampler, **arguments)
    image = torch.rand(1, 3, 54, 54, generator=torch.Generator().manual_seed(0))
    grid = module.grid(AWKWARD[name], (54, 54))
    assert grid.dtype == torch.promote_types(AWKWARD[name].dtype, torch.float32)
    assert grid.isfinite().all()
    assert grid.abs().max() <= 1
    if sampler == "uniform":
        for positions in axis_positions(grid):
            assert (positions.diff(dim=1) > 0).all()
    assert module(image, AWKWARD[name]).isfinite().all()


@pytest.mark.parametrize("sigma", [1e-4, 0.001, 0.01])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 7)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_window_narrower_than_a_cell_leaves_no_pixel_without_a_position(dtype, size, sigma):
    one_hot = torch.zeros(1, *size, dtype=dtype)
    one_hot[0, size[0] // 2, 0] = 1
    for attention in (one_hot, torch.ones_like(one_hot)):
        grid = saliency_grid(attention, (27, 45), sigma=sigma)
        assert grid.isfinite().all()
        assert grid.abs().max() <= 1


@pytest.mark.parametrize("name", ["no_mass", "negative", "all_nan", "nan_and_zero", "all_inf", "constant"])
@pytest.mark.parametrize("function", [saliency_grid, uniform_grid])
def test_where_nothing_better_is_known_the_other_samplers_are_uniform(function, name):
    expected = box_grid([0, 1, 0, 1], (8, 10)).float()[None]
    torch.testing.assert_close(function(AWKWARD[name], (8, 10)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name, same_as", MEANINGS)
@pytest.mark.parametrize("function", [saliency_grid, uniform_grid])
def test_awkward_values_count_as_what_they_mean_for_the_other_samplers(function, name, same_as):
    torch.testing.assert_close(
        function(AWKWARD[name], (8, 10)), function(same_as, (8, 10)).to(AWKWARD[name].dtype), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("function", [saliency_grid, uniform_grid])
def test_a_broken_map_leaves_the_others_alone_for_the_other_samplers(function):
    good = peaked_maps(1, 6, 9, dtype=torch.float32)
    broken = torch.cat([AWKWARD["all_nan"], good, AWKWARD["one_inf"]])
    torch.testing.assert_close(function(broken, 8)[1:2], function(good, 8), rtol=0, atol=1e-6)


@pytest.mark.parametrize("output_size", [(16, 12), (8, 6), (7, 5), (3, 12)], ids=str)
@pytest.mark.parametrize("filled", [True, False], ids=["rectangle", "two_corners"])
def test_uniform_grid_is_a_crop_and_a_resize(filled, output_size):
    """Outputs no larger than the crop, so that no position needs a pixel beside it."""
    image = torch.rand(1, 3, 28, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    attention = torch.zeros(1, 7, 5, dtype=torch.float64)  # 4 x 4 pixels a cell
    if filled:
        attention[:, 2:6, 1:4] = 1
    else:
        attention[:, 2, 3] = attention[:, 5, 1] = 1
    for max_zoom in (4.0, None):
        sampled = sample(image, uniform_grid(attention, output_size, max_zoom=max_zoom))
        expected = resize(image[:, :, 8:24, 4:16], output_size)
        torch.testing.assert_close(sampled, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("max_zoom", [1.0, 1.5, 4.0, None])
@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0, 6.0, 1e3])
@pytest.mark.parametrize("size", [(5, 7), (8, 3), (1, 1), (12, 12)], ids=str)
def test_uniform_grid_equals_the_loops(size, threshold, max_zoom):
    maps = peaked_maps(4, *size)
    grid = uniform_grid(maps, (4, 9), threshold=threshold, max_zoom=max_zoom)
    for attention, got in zip(maps, grid):
        expected = box_grid(loop_box(attention.tolist(), threshold, max_zoom), (4, 9))
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_uniform_grid_of_float64_maps_has_float64_positions():
    expected = box_grid([1 / 7, 3 / 7, 2 / 7, 6 / 7], (5, 6))
    attention = torch.zeros(1, 7, 7, dtype=torch.float64)
    attention[:, 2:6, 1:3] = 1
    torch.testing.assert_close(uniform_grid(attention, (5, 6), max_zoom=None)[0], expected, rtol=0, atol=1e-12)


def test_the_threshold_is_in_means_of_the_map():
    attention = torch.tensor([[[0.0, 0, 0, 0], [1, 1, 1, 1], [1, 3, 5, 1], [0, 0, 0, 0]]])  # mean 14 / 16
    for threshold, box in (
        (0.0, [0, 1, 0.25, 0.75]),
        (1.0, [0, 1, 0.25, 0.75]),
        (1.2, [0.25, 0.75, 0.5, 0.75]),
        (4.0, [0.5, 0.75, 0.5, 0.75]),
        (6.0, [0, 1, 0, 1]),  # nothing left
    ):
        grid = uniform_grid(attention, (6, 8), threshold=threshold)[0]
        torch.testing.assert_close(grid, box_grid(box, (6, 8)).float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("max_zoom", [1.0, 1.6, 2.0, 5.0])
def test_a_box_at_max_zoom_lies_around_its_cell_and_inside_the_image(max_zoom):
    for cell in range(10):
        single = torch.zeros(1, 10, 10, dtype=torch.float64)
        single[0, 9 - cell, cell] = 1
        for positions, place in zip(axis_positions(uniform_grid(single, 50, max_zoom=max_zoom)), (cell, 9 - cell)):
            ends = (positions[0, [0, -1]] + positions.diff(dim=1)[0, [0, -1]] * torch.tensor([-0.5, 0.5])).tolist()
            assert ends[1] - ends[0] == pytest.approx(2 / max_zoom, abs=1e-5)
            assert min(ends) >= -1 - 1e-5 and max(ends) <= 1 + 1e-5
            farthest = 1 - 1 / max_zoom  # of a center, before the box leaves the image
            center = min(max(2 * (place + 0.5) / 10 - 1, -farthest), farthest)
            assert sum(ends) / 2 == pytest.approx(center, abs=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "sampler, settings",
    [
        ("attention", {}),
        ("attention", dict(max_zoom=2.0, iterations=2, marginal="sum")),
        ("saliency", {}),
        ("saliency", dict(sigma=0.1)),
        ("uniform", {}),
        ("uniform", dict(threshold=0.5, max_zoom=None)),
    ],
    ids=str,
)
def test_the_module_is_the_function_on_the_shaped_map(sampler, settings, shape):
    image = torch.rand(2, 3, 35, 27, generator=torch.Generator().manual_seed(0))
    maps = peaked_maps(2, 7, 9).float()
    function = dict(attention=attention_grid, saliency=saliency_grid, uniform=uniform_grid)[sampler]
    resolution = dict(size=(35, 27)) if sampler == "attention" else {}
    expected = function(shape_map(maps, shape), (12, 15), **settings, **resolution)

    module = AttentionSampler((12, 15), shape=shape, sampler=sampler, **settings)
    assert torch.equal(module.grid(maps, (35, 27)), expected)
    assert torch.equal(module(image, maps), sample(image, expected))
    if sampler == "attention":
        assert torch.equal(AttentionSampler((12, 15), shape=shape, **settings).grid(maps, (35, 27)), expected)


OPTIONS = dict(max_zoom=None, iterations=2, marginal="sum", sigma=0.1, threshold=2.0)
TAKEN = dict(attention=("max_zoom", "iterations", "marginal"), saliency=("sigma",), uniform=("threshold", "max_zoom"))


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_setting_that_the_sampler_does_not_take_is_refused(sampler, name):
    if name in TAKEN[sampler]:
        AttentionSampler(8, sampler=sampler, **{name: OPTIONS[name]})
        return
    with pytest.raises(ValueError, match=f"{name}={OPTIONS[name]!r} has no effect with sampler='{sampler}'"):
        AttentionSampler(8, sampler=sampler, **{name: OPTIONS[name]})


def test_iterations_that_leave_no_cap_are_refused_beside_one():
    for build in (partial(AttentionSampler, 8), partial(attention_grid, torch.rand(1, 4, 4), 8)):
        build(iterations=0)
        build(iterations=0, max_zoom=None)
        with pytest.raises(ValueError, match="max_zoom=2.0 has no effect with iterations=0"):
            build(iterations=0, max_zoom=2.0)
        with pytest.raises(ValueError, match="iterations must be 0 or more, got -1"):
            build(iterations=-1)


def test_a_sample_of_no_pixels_is_refused():
    with pytest.raises(ValueError, match="sample_size must be at least 1, got 0"):
        AttentionSampler(0)
