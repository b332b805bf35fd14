"""Augmentation in float and on the device, against Pillow and torchvision."""

import random

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from timm.data.auto_augment import rand_augment_transform
from torch.nn import functional as F
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as V

from tasn_timm.data.transforms import (
    ERASED,
    Normalize,
    RandomColors,
    RotatedCrop,
    eval_transform,
    train_transform,
)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def photograph(width: int = 130, height: int = 100, low: int = 0, high: int = 256) -> PILImage.Image:
    """Smooth and random."""
    coarse = np.random.default_rng(0).integers(low, high, (height // 10, width // 10, 3), dtype=np.uint8)
    return PILImage.fromarray(coarse).resize((width, height), PILImage.Resampling.BILINEAR)


def test_evaluation_resizes_the_short_side_and_crops_the_centre():
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, 30:50] = 200
    image = PILImage.fromarray(pixels)
    (cropped,) = eval_transform(20)(image)  # 40 x 80 -> 20 x 40 -> columns 10 to 30 of 40, that is 20 to 60 of 80
    assert cropped.shape == (3, 20, 20) and cropped.dtype == torch.uint8
    assert cropped[0, 10, [0, 10, 19]].tolist() == [0, 200, 0]
    assert eval_transform(20, resize=40)(image)[0][0, 0, [0, 10, 19]].tolist() == [200, 200, 200]


def test_padding_mirrors_and_moves_by_at_most_its_width():
    image = PILImage.fromarray(np.arange(16, dtype=np.uint8)[None, :, None].repeat(16, 0).repeat(3, 2))
    transform = train_transform(16, crop_padding=3, hflip=0)
    firsts = set()
    for seed in range(60):
        torch.manual_seed(seed)
        row = transform(image)[0][0, 0].tolist()
        firsts.add(row[0] if row[1] > row[0] else -row[0])
    assert firsts == {-3, -2, -1, 0, 1, 2, 3}


def test_rotation_turns_the_whole_picture_and_fills_with_white():
    pixels = np.zeros((60, 60, 3), np.uint8)
    pixels[28:32, 28:32] = 100
    torch.manual_seed(1)
    (rotated,) = train_transform(60, degrees=30)(PILImage.fromarray(pixels))
    assert rotated[:, 0, 0].tolist() == [255, 255, 255]
    assert rotated[0, 30, 30] == 100 and v2.CenterCrop(40)(rotated).max() == 100, "about the centre"
    crops = [train_transform(20, resize=60, degrees=30)(PILImage.fromarray(pixels))[0] for _ in range(40)]
    crops = torch.stack(crops)
    without_white = (crops < 255).flatten(1).all(1).sum()
    assert 10 < without_white < 40, "a crop out of the rotated picture often has nothing to fill"


@pytest.mark.parametrize("size", [(130, 100), (64, 90), (700, 300)])
def test_training_resizes_as_pillow_does(size):
    image = photograph(*size)
    torch.manual_seed(0)
    (pixels,) = train_transform(60, hflip=0)(image)
    torch.manual_seed(0)
    expected = v2.RandomCrop(60)(v2.Resize(60, v2.InterpolationMode.BICUBIC)(image))
    assert (pixels.int() - V.pil_to_tensor(expected).int()).abs().max() <= 2  # rounding; both have fixed-point weights


def test_an_array_is_as_good_as_a_pil_image():
    transform, image = train_transform(40, hflip=0), photograph(40, 40)
    assert torch.equal(transform(image)[0], transform(np.array(image))[0])


@pytest.mark.parametrize("size", [(130, 100), (100, 130)])
def test_rotation_is_pillows_rotation_and_then_the_crop(size):
    image = photograph(*size)
    for seed in range(5):
        torch.manual_seed(seed)
        turned = RotatedCrop(80, 30)(V.pil_to_tensor(image))
        torch.manual_seed(seed)
        angle = 30 * (2 * torch.rand(()).item() - 1)
        top, left = (torch.randint(side - 80 + 1, ()).item() for side in size[::-1])
        whole = image.rotate(angle, PILImage.Resampling.BILINEAR, fillcolor=(255, 255, 255))
        expected = V.pil_to_tensor(whole.crop((left, top, left + 80, top + 80))).int()
        # Where the picture ends Pillow switches to white at once, and we fade over one pixel.
        inside = image.convert("L").point(lambda _: 255).rotate(angle, PILImage.Resampling.BILINEAR)
        outside = (V.pil_to_tensor(inside) < 255).float()
        near, within = (
            dilated[0, top : top + 80, left : left + 80]
            for dilated in (F.max_pool2d(outside, 3, 1, 1) > 0, F.max_pool2d(1 - outside, 5, 1, 2) > 0)
        )
        difference = (turned.int() - expected).abs().amax(0)
        assert difference[~near].max() <= 1
        assert (turned[:, ~within] == 255).all()


def test_all_angles_and_places_are_drawn():
    image = torch.zeros(3, 40, 60, dtype=torch.uint8)
    image[:, 20, 30] = 255  # the centre
    places = set()
    for seed in range(300):
        torch.manual_seed(seed)
        crop = RotatedCrop(36, 0.001)(image)[0]
        places.add(tuple((crop == crop.max()).nonzero()[0].tolist()))
    assert {top for top, _ in places} == set(range(16, 21)) and {left for _, left in places} == set(range(6, 31))


ADJUST = (V.adjust_brightness, V.adjust_contrast, V.adjust_saturation)


def recoloured(image: torch.Tensor, jitter: float = 0.0, pca_noise: float = 0.0) -> torch.Tensor:
    """Pixels (3, H, W), 0 to 255, as `Normalize` makes them."""
    pixels, colours = RandomColors(jitter, pca_noise)(image)
    assert torch.equal(pixels, image)
    normalized = Normalize(MEAN, STD)([pixels[None], colours[None]])[0]
    return 255 * (normalized * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1))


def test_jitter_is_torchvisions_on_float_pixels():
    image = V.pil_to_tensor(photograph(low=110, high=146))  # nothing is clipped
    orders = set()
    for seed in range(12):
        torch.manual_seed(seed)
        got = recoloured(image, 0.4)
        torch.manual_seed(seed)
        order, factors = torch.randperm(3).tolist(), 1 + 0.4 * (2 * torch.rand(3) - 1)
        expected = image / 255
        for change in order:
            expected = ADJUST[change](expected, factors[change].item())
        torch.testing.assert_close(got, 255 * expected, atol=0.1, rtol=0)  # torchvision's grey has 4 digits: .2989
        orders.add(tuple(order))
    assert len(orders) == 6


def test_recoloured_pixels_end_at_black_and_white():
    torch.manual_seed(0)
    image = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8)
    for _ in range(20):
        got = recoloured(image, 0.9)
        assert got.min() > -1e-3 and got.max() < 255.001
    torch.testing.assert_close(recoloured(image, pca_noise=1e-9), image.float(), atol=1e-3, rtol=0)


def test_pca_noise_is_one_shift_with_the_colours_covariance():
    image = torch.full((3, 2, 2), 128, dtype=torch.uint8)
    torch.manual_seed(0)
    got = recoloured(image, pca_noise=0.1)
    torch.manual_seed(0)
    alpha = 0.1 * torch.randn(3)
    red = -0.5675 * 55.46 * alpha[0] + 0.7192 * 4.794 * alpha[1] + 0.4009 * 1.148 * alpha[2]
    blue = -0.5836 * 55.46 * alpha[0] - 0.6948 * 4.794 * alpha[1] + 0.4203 * 1.148 * alpha[2]
    expected = torch.tensor([128 + red, 128 + blue]).view(2, 1, 1).expand(2, 2, 2)
    torch.testing.assert_close(got[[0, 2]], expected, atol=1e-3, rtol=0)
    shifts = torch.stack([recoloured(image, pca_noise=0.1)[:, 0, 0] for _ in range(2000)])
    torch.testing.assert_close(shifts.mean(0), torch.full((3,), 128.0), atol=0.3, rtol=0)
    torch.testing.assert_close(shifts.std(0), torch.tensor([3.17, 3.22, 3.25]), atol=0.2, rtol=0)  # 0.1 x 55.46 x axis


def test_randaugment_is_timms():
    image = photograph(40, 40)
    for seed in range(5):
        random.seed(seed), np.random.seed(seed)
        (pixels,) = train_transform(40, hflip=0, aa="rand-m9-mstd0.5-inc1")(image)
        random.seed(seed), np.random.seed(seed)
        settings = dict(translate_const=18, img_mean=ERASED)
        expected = rand_augment_transform("rand-m9-mstd0.5-inc1", settings)(image)
        assert torch.equal(pixels, V.pil_to_tensor(expected))


@pytest.mark.parametrize(
    "aa", ["augmix-m3", "rand-q9", "m9", "rand", "rand-mx", "rand-m9-mstdx", "rand-m99-inc1", "rand-m9-n0", "rand-n2"]
)
def test_what_is_not_randaugment_is_refused(aa):
    with pytest.raises(ValueError, match="aa"):
        train_transform(40, aa=aa)


def test_erasing_leaves_a_rectangle_of_the_mean_colour():
    image = photograph(40, 40)
    shares = []
    for seed in range(200):
        torch.manual_seed(seed)
        (pixels,) = train_transform(40, hflip=0, reprob=0.5)(image)
        erased = (pixels == torch.tensor(ERASED).view(3, 1, 1)).all(0)
        rows, columns = erased.any(1).sum(), erased.any(0).sum()
        assert rows * columns == erased.sum()
        shares.append(float(erased.float().mean()))
    hit = [share for share in shares if share > 0.01]
    assert 70 < len(hit) < 130 and min(hit) > 0.015 and 0.25 < max(hit) < 0.36


def test_normalize_is_timms():
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    expected = v2.Normalize(MEAN, STD)(images / 255)
    torch.testing.assert_close(Normalize(MEAN, STD)([images]), expected)
    unchanged = torch.eye(3, 4).expand(2, 3, 4)
    torch.testing.assert_close(Normalize(MEAN, STD)([images, unchanged]), expected)
