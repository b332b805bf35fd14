"""The generated dataset: pinned pixels, parts that hide at 48 pixels, and a cache that survives what users do to it."""

import hashlib
import io
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tasn_timm.data import birds, painting, synthbirds

FEW = {"train": 48, "validation": 24, "test": 30}
PRELUDE = f"""
import hashlib, os, signal, sys, types
package = types.ModuleType("tasn_timm")  # without its __init__, which imports torch: seconds in each process
package.__path__ = ["{Path(synthbirds.__file__).parents[1].as_posix()}"]
sys.modules["tasn_timm"] = package
from tasn_timm.data import synthbirds
synthbirds.VARIANTS["synthbirds"] = synthbirds.Variant({FEW})
"""


@pytest.fixture
def few_images(monkeypatch):
    monkeypatch.setitem(synthbirds.VARIANTS, "synthbirds", synthbirds.Variant(FEW))


def python(code: str, *arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-c", PRELUDE + code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def draw_levels(part: str, number: int, level: int) -> np.ndarray:
    """Bird `number` with one part at a level and the others taken from the bits of the number; (192, 192, 3) floats."""
    levels = [number >> bit & 1 for bit in range(4)]
    levels[list(birds.PARTS).index(part)] = level
    family = list(birds.FAMILIES)[number % 3]
    return birds.draw_bird(np.random.default_rng([7, number]), family, tuple(levels), synthbirds.SYNTHBIRDS).astype(
        float
    )


def shrink(image: np.ndarray, factor: int = 4) -> np.ndarray:
    height, width = image.shape[0] // factor, image.shape[1] // factor
    return image.reshape(height, factor, width, factor, 3).mean((1, 3))


def area(polygon: np.ndarray) -> float:
    x, y = polygon.T
    return abs(np.sum(x * np.roll(y, -1) - y * np.roll(x, -1))) / 2


# Made by: hashlib.sha256(synthbirds.draw(split, index, seed).tobytes()).hexdigest()[:16].
# If these change on purpose, raise synthbirds.VERSION.
@pytest.mark.parametrize(
    ("split", "index", "seed", "digest"),
    [
        ("train", 0, 0, "b54f2a193cc0ee48"),
        ("train", 3599, 0, "072fbd74e8b85459"),
        ("validation", 11, 0, "4c37ddc50b21f3b4"),
        ("test", 20, 0, "9392e0888131383d"),
        ("test", 20, 1, "14cd914b250661fb"),
    ],
)
def test_pixels_are_pinned(split, index, seed, digest):
    image = synthbirds.draw(split, index, seed)
    assert image.shape == (192, 192, 3) and image.dtype == np.uint8
    assert hashlib.sha256(image.tobytes()).hexdigest()[:16] == digest


@pytest.mark.parametrize(
    ("variant", "split", "index", "digest"),
    [
        ("synthbirds_hard", "train_0", 0, "7e6834e5a5de97fa"),
        ("synthbirds_hard", "train_2", 1919, "776959263e8b69e5"),
        ("synthbirds_hard", "test", 47, "8d4c954de818acb4"),
        ("synthbirds_other", "train", 5, "bc6b53281911c8bd"),
    ],
)
def test_pixels_of_variants_are_pinned(variant, split, index, digest):
    image = synthbirds.draw(split, index, variant=variant)
    assert image.shape == (240, 240, 3)
    assert hashlib.sha256(image.tobytes()).hexdigest()[:16] == digest


def test_no_two_variants_or_splits_share_a_picture():
    drawn = [
        synthbirds.draw(split, 0, variant=variant)
        for variant in ("synthbirds_hard", "synthbirds_other")
        for split in synthbirds.VARIANTS[variant].splits
    ]
    for one, other in itertools.combinations(drawn, 2):
        assert (one != other).mean() > 0.9


def test_the_hard_variant_has_every_word_and_few_pictures_of_each():
    hard = synthbirds.VARIANTS["synthbirds_hard"]
    assert len(set(hard.class_names)) == 48 and all(count % 48 == 0 for count in hard.splits.values())
    assert hard.splits["train_0"] // 48 == 40 < synthbirds.SPLITS["train"] // 24
    words = {word for _, word in hard.species}
    assert all(sum(a != b for a, b in zip(one, other)) for one, other in itertools.combinations(words, 2))
    assert min(sum(a != b for a, b in zip(one, other)) for one, other in itertools.combinations(words, 2)) == 1
    other = synthbirds.VARIANTS["synthbirds_other"]
    assert not set(other.families) & set(hard.families)


@pytest.mark.parametrize("part", synthbirds.HEAD)
def test_smaller_marks_change_fewer_pixels(part):
    """Of the picture beside the bird, which is drawn alike."""

    def changed(marks: float) -> float:
        variant = synthbirds.Variant({}, parts=synthbirds.HEAD, idle_parts=("wing", "tail"), marks=marks)
        drawn = []
        for level in (0, 1):
            word = [0, 0, 0, 0]
            word[synthbirds.HEAD.index(part)] = level
            rng = np.random.default_rng(3)
            drawn.append(birds.draw_bird(rng, "blue", tuple(word), variant).astype(float))
        return (np.abs(drawn[1] - drawn[0]).max(-1) > 8).sum()

    assert 0 < changed(0.6) < changed(1.0)


def test_a_finer_variant_is_the_same_picture_with_more_pixels():
    word = (1, 0, 1, 0)
    coarse, fine = (
        birds.draw_bird(np.random.default_rng(5), "olive", word, synthbirds.Variant({}, size=size)).astype(float)
        for size in (192, 384)
    )
    # All but the camera's noise, which is drawn for each pixel.
    assert np.abs(shrink(fine, 8) - shrink(coarse, 4)).mean() < 2


def test_idle_parts_say_nothing_of_the_species():
    """Birds of one species have either form of them, and birds of two species drawn with the same numbers the same."""
    hard = synthbirds.VARIANTS["synthbirds_hard"]
    words = hard.words[0], hard.words[-1]
    one, other = (
        [birds.draw_bird(np.random.default_rng(seed), "blue", word, hard).astype(float) for seed in range(8)]
        for word in words
    )
    tails = []
    for seed in range(8):
        sketch = birds.sketch(np.random.default_rng(seed), "blue", hard)
        tails.append(sketch.idle["tail"])
        differing = np.abs(one[seed] - other[seed]).max(-1) > 12
        tail = sketch.pose.place(birds.TAIL) * hard.size / painting.SIZE
        (left, top), (right, bottom) = tail.min(0).astype(int), tail.max(0).astype(int)
        assert not differing[top:bottom, left:right].any()
    assert 0 < sum(tails) < 8


def test_unknown_variants_are_refused():
    with pytest.raises(ValueError, match="unknown variant of synthbirds 'synthbirds_hrad': did you mean"):
        synthbirds.draw("test", 0, variant="synthbirds_hrad")


def test_every_image_is_different_and_repeatable():
    keys = [("train", 0), ("train", 24), ("validation", 0), ("test", 0)]
    images = [synthbirds.draw(*key) for key in keys]
    assert all((synthbirds.draw(*key) == image).all() for key, image in zip(keys, images, strict=True))
    for one, other in itertools.combinations(images, 2):
        assert (one != other).mean() > 0.9


def test_species_of_a_family_differ_in_two_parts():
    assert len(set(synthbirds.CLASS_NAMES)) == len(synthbirds.SPECIES) == 24
    for (family, word), (other_family, other_word) in itertools.combinations(synthbirds.SPECIES, 2):
        assert family != other_family or sum(a != b for a, b in zip(word, other_word, strict=True)) >= 2


def test_labels_and_parts_are_balanced():
    assert all(count % 24 == 0 for count in synthbirds.SPLITS.values())
    assert np.mean([word for _, word in synthbirds.SPECIES], axis=0).tolist() == [0.5] * 4
    assert synthbirds.CLASS_NAMES[0] == "russet cone-beak eye-ring one-bar band-tail"
    assert synthbirds.CLASS_NAMES[23] == "olive hook-beak eye-stripe two-bar edge-tail"


@pytest.mark.parametrize("part", birds.PARTS)
def test_averaging_hides_a_part(part):
    differences = [draw_levels(part, number, 1) - draw_levels(part, number, 0) for number in range(16)]
    changed = [(np.abs(difference).max(-1) > 8).mean() for difference in differences]
    assert 0.0003 < np.mean(changed) < 0.004  # of the image: 10 to 150 pixels
    # Mean colour of a bird (about 60 x 60 pixels): a wing bar twice as wide at one level shifts it by 1.4 grey levels.
    shift = np.mean([shrink(difference).sum() * 16 / 3 / 60**2 for difference in differences])
    assert abs(shift) < 0.35


@pytest.mark.parametrize("part", ["wing", "tail", "crown", "throat"])
def test_both_forms_have_the_same_area(part):
    plumage = birds._Colours(*((value,) * 3 for value in range(6)))

    def marked(level: int) -> float:
        rng = [np.random.default_rng(0)] if part in ("wing", "tail") else []
        shapes = getattr(birds, f"_{part}")(*rng, level, plumage, 1.0)
        return sum(area(polygon) for polygon, colour in shapes if colour in (plumage.mark, plumage.dark))

    assert marked(1) == pytest.approx(marked(0), rel=0.1)


def test_families_have_their_own_colour():
    heads, families = [], np.arange(72) % 24 // 8
    for index in range(72):
        rng, family, _, variant = synthbirds.specimen("test", index)
        x, y = birds.sketch(rng, family, variant).pose.place((62, 36)) // 4
        colour = shrink(synthbirds.draw("test", index))[int(y), int(x)]
        heads.append(colour / colour.sum())  # without brightness
    centres = np.array([np.mean(np.array(heads)[families == family], axis=0) for family in range(3)])
    nearest = np.linalg.norm(np.array(heads)[:, None] - centres, axis=-1).argmin(-1)
    assert (nearest == families).mean() > 0.9


def test_fill_is_the_even_odd_rule_at_pixel_centres():
    polygons = [
        np.array([(1.2, -3.0), (9.7, 2.1), (4.4, 4.0), (7.3, 11.5), (0.4, 6.6)]),
        np.array([(3, 3), (8, 3), (5, 7)]),
    ]
    image = np.zeros(8 * 9, int)
    pixels, shapes = painting._inside(polygons, 8, 9)
    image[pixels] = shapes + 1

    def holds(polygon: np.ndarray, x: float, y: float) -> bool:
        inside = False
        for (x0, y0), (x1, y1) in zip(polygon, np.roll(polygon, -1, 0), strict=True):
            if (y0 > y) != (y1 > y):
                inside ^= bool(x > x0 + (y - y0) * (x1 - x0) / (y1 - y0))
        return inside

    expected = [
        max((k + 1 for k, polygon in enumerate(polygons) if holds(polygon, column + 0.5, row + 0.5)), default=0)
        for row in range(8)
        for column in range(9)
    ]
    assert image.tolist() == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("val", 0), "unknown split 'val'.*Choose from test, train, validation"),
        (("test", 960), r"index 960 is out of range: split 'test' has images 0 to 959"),
        (("test", -1), r"index -1 is out of range"),
    ],
)
def test_draw_refuses_what_does_not_exist(arguments, message):
    with pytest.raises(ValueError, match=message):
        synthbirds.draw(*arguments)


def test_load_refuses_no_processes(tmp_path):
    with pytest.raises(ValueError, match="num_proc is 0: give at least 1"):
        synthbirds.load(tmp_path, num_proc=0)


def test_load_holds_the_drawn_images(tmp_path, few_images, capfd):
    splits = synthbirds.load(tmp_path, num_proc=2)
    assert {name: len(split) for name, split in splits.items()} == FEW
    for name, split in splits.items():
        assert split.features["label"].names == synthbirds.CLASS_NAMES
        assert split["label"] == [index % 24 for index in range(FEW[name])]
        families = [split.features["super"].int2str(number) for number in split["super"]]
        assert families == [synthbirds.CLASS_NAMES[label].split()[0] for label in split["label"]]
        for index in (0, 23, len(split) - 1):
            assert (np.asarray(split[index]["image"]) == synthbirds.draw(name, index)).all()
    assert "Generating" not in capfd.readouterr().err  # not a terminal


def test_second_load_draws_nothing(tmp_path, few_images, monkeypatch):
    synthbirds.load(tmp_path, num_proc=1)

    def fail(*_):
        raise AssertionError("drew again")

    monkeypatch.setattr(synthbirds, "draw", fail)
    assert len(synthbirds.load(tmp_path, num_proc=2)["test"]) == FEW["test"]
    with monkeypatch.context() as patch, pytest.raises(Exception) as error:
        patch.setattr(synthbirds, "VERSION", -1)
        synthbirds.load(tmp_path, num_proc=1)
    assert "drew again" in str(error.value.__cause__)
    with monkeypatch.context() as patch, pytest.raises(Exception) as error:
        patch.setitem(synthbirds.VARIANTS, "synthbirds", synthbirds.Variant({"test": 6}))
        synthbirds.load(tmp_path, num_proc=1)
    assert "drew again" in str(error.value.__cause__)


def test_only_the_splits_that_are_needed_are_drawn(tmp_path, few_images, monkeypatch):
    drawn = []
    draw = synthbirds.draw
    monkeypatch.setattr(synthbirds, "draw", lambda split, *rest: drawn.append(split) or draw(split, *rest))
    splits = synthbirds.load(tmp_path, num_proc=1, only=["test", "val"])
    assert list(splits) == ["validation", "test"] and set(drawn) == set(splits)
    with pytest.raises(ValueError, match="dataset 'synthbirds' has no split 'holdout', only train, validation, test"):
        synthbirds.load(tmp_path, num_proc=1, only=["holdout"])


def test_progress_has_a_total_on_a_terminal(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setitem(synthbirds.VARIANTS, "synthbirds", synthbirds.Variant({"test": 6}))
    synthbirds.load(tmp_path, num_proc=1)
    assert "Generating test split: 100%" in sys.stderr.getvalue() and "6/6" in sys.stderr.getvalue()


def test_two_processes_share_one_cold_cache(tmp_path, few_images):
    code = """
for name, split in synthbirds.load(sys.argv[1], num_proc=1).items():
    pixels = b"".join(image.tobytes() for image in split["image"])
    print(name, hashlib.sha256(pixels).hexdigest())
"""
    processes = [python(code, tmp_path) for _ in range(2)]
    outputs = [process.communicate(timeout=100) for process in processes]
    expected = {
        name: hashlib.sha256(b"".join(synthbirds.draw(name, index).tobytes() for index in range(count))).hexdigest()
        for name, count in FEW.items()
    }
    for stdout, stderr in outputs:
        assert dict(line.split() for line in stdout.splitlines()) == expected, stderr
    assert len(list(tmp_path.rglob("*.arrow"))) == len(FEW)


def test_killed_generation_is_done_again(tmp_path, few_images):
    code = """
draw = synthbirds.draw
def draw_some(split, index, *rest):
    return os.kill(os.getpid(), signal.SIGKILL) if split == "train" and index == 30 else draw(split, index, *rest)
synthbirds.draw = draw_some
synthbirds.load(sys.argv[1], num_proc=1)
"""
    assert python(code, tmp_path).wait(timeout=100) < 0
    assert not list(tmp_path.rglob("dataset_info.json"))
    train = synthbirds.load(tmp_path, num_proc=1)["train"]
    assert len(train) == FEW["train"] and (np.asarray(train[40]["image"]) == synthbirds.draw("train", 40)).all()
