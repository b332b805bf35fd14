"""Where in the image something is that was seen in the sampled image, and the other way round."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tasn_timm.attention_sampler import attention_grid, saliency_grid, sample, uniform_grid
from tasn_timm.back_projection import image_to_sampled, sampled_to_image
from tasn_timm.errors import UserError

SIZE = (60, 90)  # H, W
OUT = (24, 32)


def a_map(seed: int = 0) -> Tensor:
    """(2, 10, 15): a bright spot on a dim ground, another one for each."""
    spots = torch.tensor([[3.0, 9.0], [7.0, 4.0]])
    y, x = torch.arange(10)[:, None], torch.arange(15)
    distance = (y - spots[:, 0, None, None]) ** 2 + (x - spots[:, 1, None, None]) ** 2
    noise = torch.rand(2, 10, 15, generator=torch.Generator().manual_seed(seed))
    return torch.exp(-distance / 6) + 0.1 * noise


GRIDS = {
    "attention": attention_grid(a_map(), OUT, size=SIZE),
    "own resolution": attention_grid(a_map(), OUT),
    "no cap": attention_grid(a_map() ** 4, OUT, max_zoom=None),
    "uniform": uniform_grid(a_map(), OUT),
}
SALIENCY = saliency_grid(a_map(), OUT)


def some_positions(size: tuple[int, int], margin: float = 0.0) -> Tensor:
    """(2, 50, 2) in pixels, that far from the edges at least."""
    height, width = size
    spread = torch.tensor([width - 2 * margin, height - 2 * margin])
    return torch.rand(2, 50, 2, generator=torch.Generator().manual_seed(1)) * spread + margin


def test_a_flat_map_is_a_plain_resize_up_to_the_edges():
    grid = attention_grid(torch.ones(2, 10, 15), OUT)
    positions = some_positions(OUT)
    scale = torch.tensor([SIZE[1] / OUT[1], SIZE[0] / OUT[0]])
    torch.testing.assert_close(sampled_to_image(positions, grid, SIZE), positions * scale, atol=1e-4, rtol=0)
    torch.testing.assert_close(image_to_sampled(positions * scale, grid, SIZE), positions, atol=1e-4, rtol=0)
    whole = torch.tensor([[0.0, 0, OUT[1], OUT[0]]]).expand(2, 1, 4)
    expected = torch.tensor([[0.0, 0, SIZE[1], SIZE[0]]]).expand(2, 1, 4)
    torch.testing.assert_close(sampled_to_image(whole, grid, SIZE), expected, atol=1e-4, rtol=0)


def test_a_crop_enlarged_by_two_by_hand():
    attention = torch.zeros(1, 6, 9)
    attention[:, 2:5, 3:6] = 1  # a third of the width and half of the height: pixels 30 to 60 and 20 to 50
    grid = uniform_grid(attention, (30, 30), max_zoom=None)
    box = torch.tensor([[[0.0, 0, 30, 30], [10, 0, 20, 15]]])
    expected = torch.tensor([[[30.0, 20, 60, 50], [40, 20, 50, 35]]])
    torch.testing.assert_close(sampled_to_image(box, grid, SIZE), expected, atol=1e-4, rtol=0)
    corner = torch.tensor([[[0.0, 0.0]]])  # of the image: cut off, so outside
    torch.testing.assert_close(image_to_sampled(corner, grid, SIZE), torch.tensor([[[-30.0, -20.0]]]))


@pytest.mark.parametrize("name", [*GRIDS, "saliency"])
def test_the_centres_of_the_sampled_pixels_are_the_grid_itself(name):
    grid = GRIDS.get(name, SALIENCY)
    y, x = torch.meshgrid(torch.arange(OUT[0]) + 0.5, torch.arange(OUT[1]) + 0.5, indexing="ij")
    centres = torch.stack([x, y], -1).flatten(0, 1).expand(2, -1, 2)
    expected = (grid.flatten(1, 2) + 1) / 2 * torch.tensor([SIZE[1], SIZE[0]])
    torch.testing.assert_close(sampled_to_image(centres, grid, SIZE), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", [*GRIDS, "saliency"])
def test_between_the_centres_it_is_what_grid_sample_interpolates(name):
    grid = GRIDS.get(name, SALIENCY)
    positions = some_positions(OUT, margin=0.5)
    query = positions / torch.tensor([OUT[1], OUT[0]]) * 2 - 1
    seen = F.grid_sample(grid.movedim(-1, 1), query[:, :, None], align_corners=False)[..., 0].mT  # (2, 50, 2)
    expected = (seen + 1) / 2 * torch.tensor([SIZE[1], SIZE[0]])
    torch.testing.assert_close(sampled_to_image(positions, grid, SIZE), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", GRIDS)
def test_the_inverse_is_numpys_interpolation_along_each_axis(name):
    grid = GRIDS[name].double()
    positions = some_positions(SIZE).double()
    actual = image_to_sampled(positions, grid, SIZE)
    for i in range(2):
        x, y = (grid[i, 0, :, 0] + 1) / 2 * SIZE[1], (grid[i, :, 0, 1] + 1) / 2 * SIZE[0]
        for axis, looks_at in ((0, x.numpy()), (1, y.numpy())):
            asked = positions[i, :, axis].numpy()
            within = (asked >= looks_at[0]) & (asked <= looks_at[-1])  # np.interp does not go on beyond
            expected = np.interp(asked, looks_at, np.arange(len(looks_at)) + 0.5)
            np.testing.assert_allclose(actual[i, :, axis].numpy()[within], expected[within], atol=1e-9)
            assert within.sum() > 5


@pytest.mark.parametrize("name", GRIDS)
def test_there_and_back_again(name):
    grid = GRIDS[name].double()
    for columns in (2, 4):  # positions, boxes
        sampled = some_positions(OUT).double().view(2, -1, columns)
        image = some_positions(SIZE).double().view(2, -1, columns)
        there = sampled_to_image(sampled, grid, SIZE)
        torch.testing.assert_close(image_to_sampled(there, grid, SIZE), sampled)
        there = image_to_sampled(image, grid, SIZE)
        assert there.shape == image.shape
        torch.testing.assert_close(sampled_to_image(there, grid, SIZE), image)


@pytest.mark.parametrize("name", GRIDS)
def test_a_bright_dot_is_found_where_it_is_said_to_be(name):
    """The centre of mass of a smooth dot in the sampled image, with what each sampled pixel covers, is the dot's."""
    grid = GRIDS[name]
    size = (480, 720)  # finely, so that a sampled pixel's value is the dot's at one position
    dot = torch.stack([(grid[..., 0].mean((1, 2)) + 1) / 2 * size[1], (grid[..., 1].mean((1, 2)) + 1) / 2 * size[0]], 1)
    y, x = torch.arange(size[0])[:, None] + 0.5, torch.arange(size[1]) + 0.5
    image = torch.exp(-((x - dot[:, :1, None]) ** 2 + (y - dot[:, 1:, None]) ** 2) / (2 * 20**2))[:, None]
    seen = sample(image, grid)[:, 0]  # (2, H', W')
    where = image_to_sampled(dot[:, None], grid, size)[:, 0]
    brightest = torch.stack([seen.amax(1).argmax(1), seen.amax(2).argmax(1)], 1) + 0.5
    assert ((where - brightest).abs() <= 1).all(), (where, brightest)
    back = sampled_to_image(brightest[:, None], grid, size)[:, 0]
    step = sampled_to_image(brightest[:, None] + 1, grid, size)[:, 0] - back
    assert ((back - dot).abs() <= step).all()


def test_the_saliency_samplers_positions_are_mapped_back_and_all_else_is_refused():
    positions, boxes = torch.ones(2, 3, 2), torch.ones(2, 3, 4)
    assert sampled_to_image(positions, SALIENCY, SIZE).shape == (2, 3, 2)
    with pytest.raises(UserError, match="bends rows and columns, so boxes do not stay boxes: give their corners"):
        sampled_to_image(boxes, SALIENCY, SIZE)
    with pytest.raises(UserError, match="bends rows and columns, so there is no inverse in closed form"):
        image_to_sampled(positions, SALIENCY, SIZE)


@pytest.mark.parametrize("function", [sampled_to_image, image_to_sampled])
@pytest.mark.parametrize("shape", [(3, 2), (1, 3, 2), (2, 3, 3)])
def test_other_shapes_are_refused(function, shape):
    with pytest.raises(UserError, match=r"positions must be \(2, N, 2\), or \(2, N, 4\) for boxes"):
        function(torch.ones(shape), GRIDS["attention"], SIZE)
    with pytest.raises(UserError, match="grid must be .* at least 2 x 2, got"):
        function(torch.ones(2, 3, 2), GRIDS["attention"][:, :1], SIZE)


def test_whole_numbers_and_other_precisions_are_taken():
    positions = torch.tensor([[[3, 4]], [[5, 6]]])
    expected = sampled_to_image(positions.float(), GRIDS["attention"], SIZE)
    torch.testing.assert_close(sampled_to_image(positions, GRIDS["attention"], SIZE), expected)
    torch.testing.assert_close(sampled_to_image(positions.half(), GRIDS["attention"], SIZE), expected)
