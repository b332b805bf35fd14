"""What a TASN sees of a photograph is what it computes, and lies where it is said to lie."""

import copy

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from tasn_timm.attention_sampler import attention_grid, attention_sample, uniform_grid
from tasn_timm.back_projection import image_to_sampled
from tasn_timm.data.synthbirds import draw
from tasn_timm.errors import UserError
from tasn_timm.gaze import View, _model_input, _most_different, look
from tasn_timm.predict import predict
from tasn_timm.trilinear_attention import trilinear_attention

SMALL = dict(backbone="test_resnet", sample_size=24, attention_net="tiny", relation_scale=10.0, num_classes=5)


def create(**arguments) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("tasn", **SMALL | arguments).eval()


@pytest.fixture
def bird() -> Image.Image:
    return Image.fromarray(draw("test", 4))


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


@torch.inference_mode()
def test_it_is_what_the_model_computes(model, bird):
    config = resolve_model_data_config(model)
    image = create_transform(**config, use_prefetcher=True)(bird)[None]
    mean, std = (torch.tensor(config[name]).view(3, 1, 1) for name in ("mean", "std"))
    gaze = look(model, bird)
    (prediction,) = predict(model, [bird], topk=24)
    assert sorted(gaze.probabilities.tolist()) == pytest.approx(sorted(prediction.probabilities), abs=1e-6)
    torch.testing.assert_close(gaze.probabilities, model(image).softmax(1)[0])
    torch.testing.assert_close(gaze.pixels, torch.from_numpy(np.array(bird)).movedim(2, 0) / 255, atol=1e-5, rtol=0)
    torch.testing.assert_close(gaze.structure.pixels, model.sample(image)[0] * std + mean, atol=1e-5, rtol=0)
    assert torch.equal(gaze.structure.grid, model.sampling_grid(image)[0])
    torch.testing.assert_close(gaze.features, model.attention_features(image)[0])
    assert (gaze.structure.attention.amax(), gaze.structure.attention.amin()) == (1, 0)


@torch.inference_mode()
def test_another_cap_is_that_of_another_model_and_leaves_this_one_alone(model, bird):
    before = look(model, bird)
    for max_zoom in (1.5, 0.0):
        twin = timm.create_model("tasn_tiny", pretrained=True, max_zoom=max_zoom).eval()
        expected, actual = look(twin, bird), look(model, bird, max_zoom=max_zoom)
        assert torch.equal(actual.probabilities, expected.probabilities)
        assert torch.equal(actual.structure.grid, expected.structure.grid)
        assert all(torch.equal(a.grid, e.grid) for a, e in zip(actual.details, expected.details))
    assert not torch.equal(look(model, bird, max_zoom=1.5).structure.grid, before.structure.grid)
    assert torch.equal(look(model, bird).structure.grid, before.structure.grid)
    assert model.structure_sampler.max_zoom == model.detail_sampler.max_zoom == 4


def test_caps_that_are_none_are_refused(model, bird):
    with pytest.raises(UserError, match="max_zoom must be at least 1, or None for no cap; got 0.5"):
        look(model, bird, max_zoom=0.5)
    for kwargs, setting in ((dict(sampler="saliency"), "sampler='saliency'"), (dict(iterations=0), "iterations=0")):
        for cap in (0, 2.0, 4.0):
            with pytest.raises(UserError, match=f"max_zoom={cap} has no effect on a model with {setting}"):
                look(create(**kwargs), bird, max_zoom=cap)


@torch.inference_mode()
def test_details_are_sampled_by_strong_maps_that_differ(model, bird):
    gaze = look(model, bird, details=5)
    maps = trilinear_attention(gaze.features[None], relation_scale=10.0)[0]
    chosen = []  # by loops, in float64
    for _ in range(5):
        scores = []
        for one in maps.double():
            share = one / one.sum()
            distances = [(share - maps[i].double() / maps[i].double().sum()).abs().sum().item() for i in chosen]
            scores.append(one.sum().item() * min(distances, default=1.0))
        chosen.append(int(np.argmax(scores)))
    assert len(set(chosen)) == len(gaze.details) == 5
    for view, index in zip(gaze.details, chosen):
        torch.testing.assert_close(view.attention, maps[index] / maps[index].amax())
        grid = attention_grid(maps[index][None], 48, size=(192, 192))
        torch.testing.assert_close(view.grid, grid[0], atol=1e-5, rtol=0)


def test_as_many_details_as_differ_and_none_without_mass():
    same = torch.rand(1, 4, 4).expand(3, -1, -1)
    assert _most_different(same * torch.tensor([1.0, 3.0, 2.0])[:, None, None], 3) == [1]
    blank = torch.cat([torch.zeros(2, 4, 4), torch.eye(4)[None], torch.ones(1, 4, 4)])
    assert _most_different(blank, 4) == [3, 2]
    assert _most_different(torch.zeros(3, 4, 4), 2) == [0]


@pytest.mark.parametrize("kwargs", [dict(part_net=False), dict(detail_control="box")], ids=str)
def test_a_model_that_was_not_trained_on_details_has_none(bird, kwargs):
    assert look(create(**kwargs), bird).details == []
    assert look(create(), bird, details=0).details == []


@pytest.mark.parametrize(
    "arguments",
    [
        dict(sampler="saliency"),
        dict(sampler="uniform"),
        dict(normalization="self_attention", relation_scale=1.0),
        dict(sample_size=(24, 40)),
        dict(max_zoom=0),
        dict(master_net=False),
    ],
    ids=str,
)
def test_any_model_and_size_of_picture(arguments):
    model = create(**arguments)
    height, width = model.sample_size
    for size in ((90, 200), (200, 90), (7, 5)):
        gaze = look(model, noise(*size), details=3)
        assert gaze.pixels.shape[1:] == model.pretrained_cfg["input_size"][1:]
        assert len(gaze.details) == 3
        left, top, right, bottom = gaze.crop
        step = torch.tensor([(right - left) / width, (bottom - top) / height])  # of a pixel: the outermost goes on
        for view in (gaze.structure, *gaze.details):
            assert view.pixels.shape == (3, height, width) and view.grid.shape == (height, width, 2)
            line = gaze.outline(view)
            assert torch.equal(line[0], line[-1])
            assert (line >= torch.tensor([left, top]) - step).all()
            assert (line <= torch.tensor([right, bottom]) + step).all()


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(300, 200), (200, 301), (97, 41)])
@pytest.mark.parametrize("input_size", [(3, 64, 64), (3, 48, 80)])
def test_the_crop_is_where_the_transform_has_it_from(crop_mode, size, input_size):
    """Positions themselves as the picture: what the model's input shows is where it is from."""
    width, height = size
    ramps = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    config = dict(input_size=input_size, crop_mode=crop_mode, crop_pct=0.9, interpolation="bilinear", mean=(0.0,) * 3)
    steps = create_transform(**config, std=(1.0,) * 3).transforms[:2]
    _, (left, top, right, bottom) = _model_input(noise(width, height), config | dict(std=(1.0,) * 3))
    for ramp, start, end, axis in ((ramps[0], left, right, 1), (ramps[1], top, bottom, 0)):
        picture = Image.fromarray(ramp.astype(np.float32))
        for step in steps:
            if crop_mode == "border" and step is steps[1]:
                step.fill = -1  # for one channel
            picture = step(picture)
        seen = np.array(picture)
        count = seen.shape[axis]
        expected = start + (np.arange(count) + 0.5) * (end - start) / count
        middle = seen.take(seen.shape[1 - axis] // 2, 1 - axis)
        inside = (expected > 0.05 * ramp.max()) & (expected < 0.95 * ramp.max())  # antialiasing ends at the border
        assert inside.sum() > count / 3
        # Pillow's kernels have few taps, so single pixels are a little off, to either side.
        np.testing.assert_allclose(middle[inside], expected[inside], atol=0.15)
        assert abs((middle[inside] - expected[inside]).mean()) < 0.02


@torch.inference_mode()
def test_a_dot_in_the_photo_is_found_in_the_sampled_image_and_back():
    model = create(sample_size=32)
    height, width = model.pretrained_cfg["input_size"][1:]
    x, y = 130.0, 60.0
    rows, columns = np.mgrid[:120, :260] + 0.5
    dot = 255 * np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * 6**2))
    photo = Image.fromarray(np.repeat(dot[..., None], 3, 2).astype(np.uint8))
    gaze = look(model, photo)
    left, top, right, bottom = gaze.crop
    in_image = torch.tensor([[[(x - left) / (right - left) * width, (y - top) / (bottom - top) * height]]])
    for view in (gaze.structure, *gaze.details):
        found = image_to_sampled(in_image, view.grid[None], (height, width))[0]
        torch.testing.assert_close(gaze.in_photo(found, view), torch.tensor([[x, y]]), atol=0.01, rtol=0)
        seen = view.pixels.mean(0)
        column, row = seen.amax(0).argmax() + 0.5, seen.amax(1).argmax() + 0.5
        assert abs(column - found[0, 0]) <= 1 and abs(row - found[0, 1]) <= 1


def test_the_enlarged_part_of_an_image():
    attention = torch.full((1, 8, 8), 0.3)
    attention[:, 2:4, 4:8] = 1  # the right half, and the second quarter from above
    image = torch.zeros(1, 3, 64, 64)
    image[:, :, 16:32, 32:] = 1
    grid = attention_grid(attention, 32, max_zoom=None)
    view = View(attention[0], grid[0], attention_sample(image, attention, 32, max_zoom=None)[0])
    left, top, right, bottom = view.enlarged()
    assert view.pixels[0, top + 1 : bottom - 1, left + 1 : right - 1].min() == 1
    assert view.pixels[0, :top].max() < 1 and view.pixels[0, :, :left].max() < 1 and right == 32
    flat = uniform_grid(torch.ones(1, 8, 8), 32)[0]
    assert View(torch.ones(8, 8), flat, image[0]).enlarged() == (0, 0, 32, 32)


def test_what_cannot_be_shown_is_refused(bird):
    with pytest.raises(UserError, match="test_resnet has no attention to show: give a TASN"):
        look(timm.create_model("test_resnet"), bird)
    with pytest.raises(UserError, match="a model of 1 channels has no picture to be drawn"):
        look(create(in_chans=1), bird)


def test_the_model_is_not_changed(model, bird):
    state, settings = copy.deepcopy(model.state_dict()), repr(model)
    look(model, bird, max_zoom=1.5)
    assert repr(model) == settings
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
