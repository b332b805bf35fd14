"""Controls of the detail images, and BatchNorms of their own: what they show, and what a model makes of them."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tasn_timm import TASN, TASNLoss
from tasn_timm.attention_sampler import attention_grid
from tasn_timm.detail_controls import CONTROLS, SIDES, control_maps

TINY = dict(backbone="test_resnet", num_classes=5, sample_size=32, attention_net="tiny")


def images(batch: int = 3) -> torch.Tensor:
    coarse = torch.randn(batch, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    return F.interpolate(coarse, size=(64, 64), mode="bicubic")


def tiny(**kwargs) -> TASN:
    torch.manual_seed(0)
    return TASN(**TINY | kwargs)


def extents(maps: torch.Tensor, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Where boxes (N, h, w) begin and end along an axis, as shares of it, from their profile."""
    profile = maps.amax(axis).numpy()  # 1 inside, the covered share in the cells at the two ends
    cells = profile.shape[1]
    first = np.array([np.flatnonzero(row)[0] + 1 - row[np.flatnonzero(row)[0]] for row in profile])
    return first / cells, (first + profile.sum(1)) / cells


@pytest.mark.parametrize("control", ["box", "centred_box"])
def test_boxes_are_squares_inside_the_image(control):
    torch.manual_seed(0)
    maps = control_maps(control, torch.rand(200, 12, 16), parts=2)
    assert maps.shape == (200, 2, 12, 16) and maps.min() >= 0 and maps.max() < 1 + 1e-5
    maps = maps.flatten(0, 1)
    (left, right), (top, bottom) = extents(maps, 1), extents(maps, 2)
    assert min(left.min(), top.min()) > -1e-5 and max(right.max(), bottom.max()) < 1 + 1e-5
    np.testing.assert_allclose(right - left, bottom - top, atol=1e-4)  # a square as a share of the frame
    assert abs((right - left).min() - SIDES[0]) < 0.02 and abs((right - left).max() - SIDES[1]) < 0.02
    np.testing.assert_allclose(maps.sum((1, 2)), 12 * 16 * (right - left) ** 2, rtol=1e-3)


def test_random_boxes_are_anywhere_and_centred_ones_where_the_object_is():
    torch.manual_seed(0)
    structure = torch.zeros(400, 12, 12)
    structure[:, 3, 8] = 1.0
    anywhere, centred = (control_maps(name, structure, parts=1)[:, 0] for name in ("box", "centred_box"))
    assert (centred[:, 3, 8] > 0.99).all()
    assert 0.1 < (anywhere[:, 3, 8] > 0.99).float().mean() < 0.4
    (left, right), (top, bottom) = extents(centred, 1), extents(centred, 2)
    inside = (left > 1e-4) & (right < 1 - 1e-4) & (top > 1e-4) & (bottom < 1 - 1e-4)
    x, y = (left + right)[inside] / 2, (top + bottom)[inside] / 2
    assert ((x > 8 / 12) & (x < 9 / 12)).all() and ((y > 3 / 12) & (y < 4 / 12)).all()


def test_the_second_structure_view_is_the_first_one_shifted():
    torch.manual_seed(0)
    structure = torch.rand(50, 5, 7)
    maps = control_maps("structure", structure, parts=3)
    seen = set()
    for image, shifted in zip(structure, maps):
        padded = F.pad(image[None], (1, 1, 1, 1), mode="replicate")[0]
        for one in shifted:
            offsets = [(y, x) for y in range(3) for x in range(3) if torch.equal(padded[y : y + 5, x : x + 7], one)]
            assert len(offsets) == 1
            seen |= set(offsets)
    assert len(seen) == 9


def test_a_box_is_sampled_as_a_crop():
    """Its positions are evenly spaced over the square, up to the cell at each end that the map's resize smooths."""
    torch.manual_seed(0)
    maps = control_maps("box", torch.rand(20, 16, 16), parts=1)[:, 0]
    (left, right), _ = extents(maps, 1), extents(maps, 2)
    grid = attention_grid(maps, 32, max_zoom=4.0, size=(64, 64))
    x = (grid[:, 0, :, 0].numpy() + 1) / 2
    even = left[:, None] + (right - left)[:, None] * (np.arange(32) + 0.5) / 32
    assert np.abs(x - even)[:, 8:24].max() < 1.5 / 16


@pytest.mark.parametrize("control", CONTROLS)
def test_a_model_trains_on_a_control_and_predicts_without_it(control):
    plain, controlled = tiny(parts=2), tiny(parts=2, detail_control=control)
    controlled.load_state_dict(plain.state_dict())
    assert torch.equal(plain.eval()(images()), controlled.eval()(images()))
    controlled.train().set_distilled_training()
    torch.manual_seed(1)
    output = controlled(images())
    assert output.part.shape == (6, 5) and output.master.shape == (3, 5)
    TASNLoss()(output, torch.tensor([0, 1, 2]))["loss"].backward()
    assert all(parameter.grad is not None for parameter in controlled.parameters())


@pytest.mark.parametrize("control", ["box", "structure"])
def test_the_detail_images_are_sampled_from_the_control(control):
    model = tiny(detail_control=control, structure_shape="square").train()
    features = model.attention_features(images())
    torch.manual_seed(3)
    views = model.views(images(), features)
    torch.manual_seed(3)
    structure_map, _ = model.trilinear_attention(features)
    shaped = (structure_map / structure_map.amax((1, 2), keepdim=True)).square()
    maps = control_maps(control, shaped, 1)[:, 0]
    torch.testing.assert_close(views[3:], model.detail_sampler(images(), maps), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(views[:3], model.structure_sampler(images(), structure_map))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(detail_control="zoom"), "unknown detail_control 'zoom'. Choose from box, centred_box, structure"),
        (dict(detail_control="box", part_net=False), "detail_control='box' has no effect with part_net=False"),
        (dict(detail_control="box", selection="ranked"), "selection='ranked' has no effect with detail_control='box'"),
        (dict(split_bn=True, part_net=False), "split_bn=True has no effect with one net"),
        (dict(split_bn=True, backbone="test_vit"), "split_bn=True needs a backbone whose norms are BatchNorm2d"),
        (dict(split_bn=True, backbone="test_byobnet"), "got BatchNormAct2d"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny(**arguments)


def test_split_bn_keeps_statistics_of_each_view():
    model = tiny(split_bn=True, parts=2).train()
    norm = next(module for module in model.backbone.modules() if hasattr(module, "aux_bn"))
    assert len(norm.aux_bn) == 2
    seen = []
    norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    model(images())
    for view, statistics in zip(seen[0].chunk(3), [norm, *norm.aux_bn]):
        expected = 0.9 * 0 + 0.1 * view.mean((0, 2, 3))
        torch.testing.assert_close(statistics.running_mean, expected)


def test_split_bn_takes_no_structure_images_alone_in_training():
    model = tiny(split_bn=True)
    for alone in (model.forward_features, model.forward_intermediates, model.sample):
        with pytest.raises(ValueError, match="split_bn=True trains on structure and detail images together"):
            alone(images())
    assert model.eval().forward_features(images()).ndim == 4


def test_split_bn_predicts_with_the_structure_image_s_statistics():
    plain, split = tiny().eval(), tiny(split_bn=True).eval()
    state = split.state_dict()
    assert {name for name in state if "aux_bn" not in name} == set(plain.state_dict())
    torch.manual_seed(2)
    own = {name: torch.rand_like(value.float()) for name, value in state.items() if "aux_bn" in name}
    split.load_state_dict(plain.state_dict() | own)
    assert torch.equal(split(images()), plain(images()))
