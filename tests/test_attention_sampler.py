"""Attention sampler: positions against plain loops, an ordinary resize in the limit, and maps nobody would wish for."""

import math

import pytest
import torch
import torch.nn.functional as F

from tasn_timm.attention_sampler import (
    SHAPES,
    AttentionSampler,
    attention_grid,
    attention_sample,
    axis_densities,
    balance_axes,
    inverse_distribution,
    sample,
    shape_map,
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


@pytest.mark.parametrize(
    "name, same_as",
    [
        ("one_nan", with_cells(0.0, (2, 3), background=0.5)),
        ("minus_inf", with_cells(0.0, (2, 3), background=0.5)),
        ("one_inf", with_cells(1.0, (2, 3))),
        ("two_inf", with_cells(1.0, (0, 0), (5, 8))),
        ("denormal", with_cells(1.0, (2, 3))),
        ("huge_and_denormal", with_cells(1.0, (2, 3))),
        ("huge", peaked_maps(1, 6, 9, dtype=torch.float32)),
        ("huge_double", peaked_maps(1, 6, 9)),
        ("tiny", peaked_maps(1, 6, 9, dtype=torch.float32)),
    ],
)
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


def test_autocast_changes_nothing():
    image = torch.rand(1, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    attention = peaked_maps(1, 7, 7, dtype=torch.float32)
    sampler = AttentionSampler(24)
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
        lambda: AttentionSampler(8, max_zoom=max_zoom),
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


def test_a_map_with_a_channel_axis_is_refused():
    with pytest.raises(ValueError, match=r"\(B, h, w\).*4 dimensions"):
        attention_grid(torch.rand(1, 1, 4, 4), 8)


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
