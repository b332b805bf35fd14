"""Trilinear attention: every row of Table 2 against plain loops, and the fused path against the maps it never makes."""

import math

import pytest
import torch

from tasn_timm.attention_sampler import AttentionSampler
from tasn_timm.trilinear_attention import (
    NORMALIZATIONS,
    REDUCTIONS,
    SELECTIONS,
    TrilinearAttention,
    structure_and_detail_maps,
    trilinear_attention,
)

SCALES = dict(spatial_scale=2.5, relation_scale=3.0)
H, W = 2, 3


def transpose(a):
    return [list(column) for column in zip(*a)]


def product(a, b):
    result = [[0.0] * len(b[0]) for _ in a]
    for i in range(len(a)):
        for j in range(len(b[0])):
            for k in range(len(b)):
                result[i][j] += a[i][k] * b[k][j]
    return result


def softmax_rows(a, scale):
    rows = []
    for row in a:
        powers = [math.exp(scale * (value - max(row))) for value in row]
        rows.append([power / sum(powers) for power in powers])
    return rows


def loop_maps(x, normalization, spatial_scale, relation_scale):
    """Table 2 as printed, for X as a list of C rows of hw numbers."""

    def spatial(a):
        return softmax_rows(a, spatial_scale)

    def outer(a):
        return softmax_rows(a, relation_scale)

    xt = transpose(x)
    table = {
        "features": lambda: x,
        "none": lambda: product(product(x, xt), x),
        "spatial": lambda: product(product(spatial(x), xt), x),
        "spatial_both": lambda: product(product(spatial(x), transpose(spatial(x))), x),
        "output": lambda: outer(product(product(x, xt), x)),
        "relation": lambda: product(outer(product(x, xt)), x),
        "spatial_relation": lambda: product(outer(product(spatial(x), xt)), x),
        "self_attention": lambda: product(xt, x),
    }
    return table[normalization]()


def random_features(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def partly_dead_features(level_of_flat=0.0):
    """Image 0 has no flat channel, image 1 four of six, image 2 one, image 3 nothing else."""
    features = random_features(4, 6, H, W, seed=1).abs()
    for image, channels in {1: (0, 2, 3, 5), 2: (4,), 3: range(6)}.items():
        for number, channel in enumerate(channels):
            features[image, channel] = level_of_flat * (number // 2)  # 0, 0, level, level, 2 level, ...
    return features


def distinct_indices(features, maps):
    """Indices of one image's maps without the repetitions among those of flat channels, by comparing the maps."""
    kept = list(range(len(maps)))
    if len(maps) != len(features):  # self-attention: a map for each position
        return kept
    flat = [c for c in kept if features[c].max() == features[c].min()]
    for position, channel in enumerate(flat):
        if any(torch.allclose(maps[channel], maps[other], rtol=1e-10, atol=0) for other in flat[:position]):
            kept.remove(channel)
    return kept


def match(detail, maps):
    """Index of the map (M, h, w) that each detail map (N, h, w) is; the first one of equal maps."""
    distance = (detail.flatten(1)[:, None] - maps.flatten(1)[None]).abs().amax(-1)  # (N, M)
    assert distance.amin(1).max() < 1e-12
    return (distance < 1e-12).int().argmax(1).tolist()


@pytest.mark.parametrize("scales", [{}, SCALES], ids=["default_scales", "other_scales"])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_maps_equal_table_2_written_as_loops(normalization, scales):
    features = random_features(2, 4, H, W)
    maps = trilinear_attention(features, normalization=normalization, **scales)

    spatial_scale, relation_scale = scales.get("spatial_scale", 7.0), scales.get("relation_scale", 1.0)
    for image, got in zip(features, maps):
        expected = loop_maps(image.flatten(1).tolist(), normalization, spatial_scale, relation_scale)
        expected = torch.tensor(expected, dtype=torch.float64).unflatten(1, (H, W))
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)
    assert maps.shape == (2, H * W if normalization == "self_attention" else 4, H, W)


def test_every_row_of_table_2_is_there_and_eq_2_is_the_default():
    rows = ("features", "none", "spatial", "spatial_both", "output", "relation", "spatial_relation", "self_attention")
    assert rows == NORMALIZATIONS
    features = random_features(1, 4, H, W)
    assert torch.equal(trilinear_attention(features), trilinear_attention(features, normalization="spatial_relation"))


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_each_scale_acts_on_its_own_softmax_only(normalization):
    features = random_features(1, 4, H, W)
    maps = trilinear_attention(features, normalization=normalization)
    other_spatial = trilinear_attention(features, normalization=normalization, spatial_scale=2.5)
    other_relation = trilinear_attention(features, normalization=normalization, relation_scale=3.0)

    assert torch.equal(maps, other_spatial) == (normalization not in ("spatial", "spatial_both", "spatial_relation"))
    assert torch.equal(maps, other_relation) == (normalization not in ("output", "relation", "spatial_relation"))


@pytest.mark.parametrize("level_of_flat", [0.0, 0.5], ids=["dead", "flat"])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_structure_map_is_the_average_of_the_distinct_maps(normalization, level_of_flat):
    features = partly_dead_features(level_of_flat)
    maps = trilinear_attention(features, normalization=normalization, **SCALES)
    structure, detail = structure_and_detail_maps(features, normalization=normalization, parts=0, **SCALES)

    for image in range(len(features)):
        kept = distinct_indices(features[image], maps[image])
        expected = sum(maps[image, index] for index in kept) / len(kept)
        torch.testing.assert_close(structure[image], expected, rtol=1e-11, atol=1e-13)
    assert detail.shape == (len(features), 0, H, W)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_reductions_equal_loops_over_the_maps(normalization, reduction):
    features = partly_dead_features(level_of_flat=0.5)
    features[3] = 0  # else its maps, all flat, could be alike without being counted as one
    features[0, 3] = features[0, 1]  # two channels that do respond, and alike: both count
    settings = dict(normalization=normalization, **SCALES)
    maps = trilinear_attention(features, **settings)
    structure, _ = structure_and_detail_maps(features, reduction=reduction, parts=0, **settings)

    for image in range(len(features)):
        counted = range(len(maps[image])) if reduction == "mean_all" else distinct_indices(features[image], maps[image])
        expected = torch.zeros(H, W, dtype=torch.float64)
        for index in counted:
            expected += maps[image, index]
        if reduction != "sum":
            expected /= len(counted)
        torch.testing.assert_close(structure[image], expected, rtol=1e-11, atol=1e-13)


def test_the_average_of_all_maps_counts_the_dead_ones():
    features = partly_dead_features()
    averages = {
        reduction: structure_and_detail_maps(features, normalization="features", reduction=reduction, parts=0)[0]
        for reduction in ("mean", "mean_all")
    }
    torch.testing.assert_close(averages["mean_all"], features.mean(1), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(averages["mean"][0], features[0].mean(0), rtol=1e-12, atol=1e-14)  # none is dead
    torch.testing.assert_close(averages["mean"][1], features[1].sum(0) / 3, rtol=1e-12, atol=1e-14)  # 2 of 6 live


def test_the_sampler_sees_no_difference_between_sum_and_mean():
    features = partly_dead_features(level_of_flat=0.5)
    image = torch.rand(4, 3, 16, 18, generator=seeded(), dtype=torch.float64)
    sampled = {
        reduction: AttentionSampler(8)(image, structure_and_detail_maps(features, reduction=reduction, parts=0)[0])
        for reduction in REDUCTIONS
    }
    torch.testing.assert_close(sampled["sum"], sampled["mean"], rtol=0, atol=1e-11)
    assert not torch.allclose(sampled["mean_all"], sampled["mean"], atol=1e-4)


def test_the_reduction_leaves_the_detail_maps_alone():
    features = partly_dead_features()
    first, *others = (
        structure_and_detail_maps(features, reduction=reduction, parts=2, generator=seeded())[1]
        for reduction in REDUCTIONS
    )
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("channels, counted", [((0, 2, 3, 5), 3), ((4,), 6), (range(6), 1), ((), 6)])
def test_dead_channels_count_once(channels, counted):
    features = random_features(1, 6, H, W, seed=2).abs()
    features[:, list(channels)] = 0
    maps = trilinear_attention(features)[0]
    alive = [c for c in range(6) if c not in channels]
    once = alive + list(channels)[:1]
    assert len(once) == counted

    structure, _ = structure_and_detail_maps(features, parts=0)
    torch.testing.assert_close(structure[0], maps[once].mean(0), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_detail_maps_are_distinct_maps(normalization, selection):
    features = partly_dead_features()
    maps = trilinear_attention(features, normalization=normalization, **SCALES)
    arguments = dict(normalization=normalization, selection=selection, generator=seeded(), **SCALES)
    for _ in range(20):
        _, detail = structure_and_detail_maps(features, **arguments)
        assert detail.shape == (len(features), 1, H, W)
        for image in range(len(features)):
            assert set(match(detail[image], maps[image])) <= set(distinct_indices(features[image], maps[image]))


@pytest.mark.parametrize("normalization", ["features", "spatial_relation"])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_detail_map_is_chosen_as_often_as_the_selection_says(normalization, selection):
    draws = 8000
    features = random_features(1, 5, H, W, seed=3).abs()
    features[:, [1, 3]] = 0  # 1 and 3 are one candidate together
    settings = dict(normalization=normalization, spatial_scale=7.0, relation_scale=3.0)
    maps = trilinear_attention(features, **settings)[0]
    many = features.expand(draws, -1, -1, -1)
    _, detail = structure_and_detail_maps(many, selection=selection, generator=seeded(), **settings)

    candidates = [0, 1, 2, 4]
    weights = [1.0] * 4 if selection == "random" else [maps[c].mean().item() for c in candidates]
    chosen = match(detail[:, 0], maps)
    for candidate, weight in zip(candidates, weights):
        share = weight / sum(weights)
        four_sigma = 4 * math.sqrt(share * (1 - share) / draws)
        assert chosen.count(candidate) / draws == pytest.approx(share, abs=four_sigma + 1e-9)
    assert chosen.count(3) == 0


@pytest.mark.parametrize("selection", SELECTIONS)
def test_an_image_of_dead_channels_gives_its_only_map(selection):
    features = torch.zeros(2, 5, H, W)
    structure, detail = structure_and_detail_maps(features, selection=selection, parts=2, generator=seeded())
    assert torch.equal(structure, torch.zeros(2, H, W))
    assert torch.equal(detail, torch.zeros(2, 2, H, W))


def test_the_same_seed_gives_the_same_choice_and_another_seed_another():
    features = random_features(30, 6, H, W)
    first, again, other = (structure_and_detail_maps(features, generator=seeded(s))[1] for s in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)

    torch.manual_seed(5)
    by_global_seed = structure_and_detail_maps(features)[1]
    assert torch.equal(first, by_global_seed)


def test_a_given_generator_leaves_the_global_one_alone():
    before = torch.get_rng_state()
    structure_and_detail_maps(random_features(2, 6, H, W), generator=seeded())
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("selection", SELECTIONS)
def test_no_parts_draw_no_random_numbers(selection):
    generator = seeded()
    features = random_features(2, 6, H, W)
    before, before_global = generator.get_state(), torch.get_rng_state()
    structure_and_detail_maps(features, selection=selection, parts=0, generator=generator)
    structure_and_detail_maps(features, selection=selection, parts=0)
    assert torch.equal(before, generator.get_state())
    assert torch.equal(before_global, torch.get_rng_state())


@pytest.mark.parametrize("selection", SELECTIONS)
def test_two_parts_are_never_the_same_map(selection):
    features = random_features(1, 4, H, W, seed=4).abs()
    features[:, [0, 2]] = 0
    maps = trilinear_attention(features)[0]
    many = features.expand(500, -1, -1, -1)
    _, detail = structure_and_detail_maps(many, selection=selection, parts=2, generator=seeded())

    pairs = {tuple(match(pair, maps)) for pair in detail}
    assert pairs == {(a, b) for a in (0, 1, 3) for b in (0, 1, 3) if a != b}


@pytest.mark.parametrize(
    "given, returned",
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_maps_have_full_precision(normalization, given, returned):
    features = random_features(2, 4, H, W).to(given)
    structure, detail = structure_and_detail_maps(features, normalization=normalization, generator=seeded())
    maps = trilinear_attention(features, normalization=normalization)
    assert {structure.dtype, detail.dtype, maps.dtype} == {returned}
    assert torch.equal(maps, trilinear_attention(features.to(returned), normalization=normalization))


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_the_module_ignores_autocast(normalization):
    module = TrilinearAttention(normalization, selection="ranked")
    features = random_features(2, 4, H, W, dtype=torch.float32)
    torch.manual_seed(0)
    expected = module(features)
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = module(features)
    for ours, full in zip(got, expected):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, full)


def test_the_module_passes_its_settings_on():
    settings = dict(normalization="spatial_relation", selection="ranked", parts=3, reduction="mean_all", **SCALES)
    features = random_features(8, 6, H, W)
    features[:, [1, 4]] = 0
    torch.manual_seed(3)
    got = TrilinearAttention(**settings)(features)
    expected = structure_and_detail_maps(features, generator=seeded(3), **settings)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


def test_no_gradient_leaves_the_module():
    features = random_features(2, 4, H, W).requires_grad_()
    structure, detail = TrilinearAttention()(features * 2)
    assert not structure.requires_grad
    assert not detail.requires_grad


def test_evaluation_gives_the_structure_map_only_and_draws_nothing():
    module = TrilinearAttention()
    features = random_features(2, 4, H, W)
    in_training = module(features)[0]
    before = torch.get_rng_state()
    structure, detail = module.eval()(features)
    assert torch.equal(structure, in_training)
    assert detail.shape == (2, 0, H, W)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "call",
    [
        lambda x: trilinear_attention(x, normalization="spatial_relatoin"),
        lambda x: structure_and_detail_maps(x, normalization="spatial_relatoin"),
        lambda x: TrilinearAttention("spatial_relatoin"),
    ],
)
def test_an_unknown_normalization_is_told_with_a_suggestion(call):
    with pytest.raises(ValueError, match=r"normalization 'spatial_relatoin'.*did you mean 'spatial_relation'"):
        call(random_features(1, 4, H, W))


@pytest.mark.parametrize("parts", [0, 1])
def test_an_unknown_selection_is_told_with_a_suggestion(parts):
    with pytest.raises(ValueError, match=r"selection 'rankd'.*did you mean 'ranked'"):
        structure_and_detail_maps(random_features(1, 4, H, W), selection="rankd", parts=parts)
    with pytest.raises(ValueError, match=r"selection 'rankd'.*did you mean 'ranked'"):
        TrilinearAttention(selection="rankd")


def test_an_unknown_reduction_is_told_with_a_suggestion():
    for call in (
        lambda: structure_and_detail_maps(random_features(1, 4, H, W), reduction="meanall"),
        lambda: TrilinearAttention(reduction="meanall"),
    ):
        with pytest.raises(ValueError, match=r"reduction 'meanall'.*did you mean 'mean_all'"):
            call()


def test_the_module_refuses_the_sum_that_its_sampler_would_not_see():
    with pytest.raises(ValueError, match="reduction='sum' has no effect.*'mean'"):
        TrilinearAttention(reduction="sum")


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_a_scale_that_the_formula_does_not_have_is_refused(normalization, scale):
    formula = dict(  # as printed in Table 2: which softmaxes are there
        spatial=["spatial_scale"],
        spatial_both=["spatial_scale"],
        output=["relation_scale"],
        relation=["relation_scale"],
        spatial_relation=["spatial_scale", "relation_scale"],
    )
    if scale in formula.get(normalization, []):
        assert getattr(TrilinearAttention(normalization, **{scale: SCALES[scale]}), scale) == SCALES[scale]
        return
    with pytest.raises(ValueError, match=f"{scale}={SCALES[scale]} has no effect with normalization='{normalization}'"):
        TrilinearAttention(normalization, **{scale: SCALES[scale]})


@pytest.mark.parametrize("function", [trilinear_attention, structure_and_detail_maps])
def test_features_without_a_batch_are_told(function):
    with pytest.raises(ValueError, match=r"\(B, C, h, w\).*3 dimensions.*\(4, 2, 3\)"):
        function(random_features(4, H, W))


def test_two_parts_of_the_module_are_two_maps_in_training_and_none_in_evaluation():
    module = TrilinearAttention(parts=2)
    features = random_features(50, 4, H, W)
    structure, detail = module(features)
    assert detail.shape == (50, 2, H, W)
    pairs = [match(pair, maps) for pair, maps in zip(detail, trilinear_attention(features))]
    assert all(first != second for first, second in pairs)

    in_evaluation, none = module.eval()(features)
    assert torch.equal(in_evaluation, structure)
    assert none.shape == (50, 0, H, W)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("channels", [4, 9])
def test_there_are_as_many_parts_as_maps_and_no_more(channels, normalization):
    features = random_features(1, channels, H, W)
    count = H * W if normalization == "self_attention" else channels
    maps = trilinear_attention(features, normalization=normalization)[0]
    _, detail = structure_and_detail_maps(features, normalization=normalization, parts=count)
    assert sorted(match(detail[0], maps)) == list(range(count))

    with pytest.raises(ValueError, match=f"parts is {count + 1}, but there are {count} maps"):
        structure_and_detail_maps(features, normalization=normalization, parts=count + 1)


@pytest.mark.parametrize("name", ["spatial_scale", "relation_scale"])
@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_a_scale_that_is_not_positive_is_refused(name, scale):
    with pytest.raises(ValueError, match=f"{name} must be more than 0, got {scale}"):
        TrilinearAttention(**{name: scale})
