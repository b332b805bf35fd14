"""Synthbirds: small fine-grained datasets that are drawn, not downloaded.

The first of them, "synthbirds": 24 species of birds on branches, 192 x 192 pixels. Three plumages can be told apart at
any resolution; the eight species of a plumage differ only in four small parts (beak, eye, wing, tail), each of which
comes in two forms of about the same area and colour, so that shrinking the image to 48 x 48 pixels averages the
difference away. A classifier has to look closely, and only where the bird is. `VARIANTS` has harder birds, and other
ones to start from.

Image `index` of a split depends on (variant, seed, split, index) and nothing else, and is the same on every machine:
shapes are filled by our own few lines, pixels are only added and multiplied, and from Pillow come resizing, blurring
and pasting, which have not changed between versions 10 and 13.

    load()["train"][0]  # {"image": <PIL.Image 192 x 192>, "label": 0}
    draw("train", 0)  # the same pixels as an array, without the `datasets` library
"""

from __future__ import annotations

import colorsys
import contextlib
import io
import itertools
import math
import os
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from ..errors import UserError, unknown
from .split_names import wanted_splits

if TYPE_CHECKING:
    import datasets

VERSION = 4  # raise it whenever a pixel changes: cached datasets are then generated again
SIZE = 192  # height and width of the drawing; pixels, unless a variant has finer ones
SPLITS = {"train": 3600, "validation": 600, "test": 960}
SPLIT_NUMBERS = {"train": 1, "test": 2, "validation": 3} | {f"train_{number}": 4 + number for number in range(5)}

# Plumage: hue, saturation and value (0-1) of back and wings, then of the belly.
FAMILIES = {
    "russet": ((0.04, 0.55, 0.55), (0.11, 0.25, 0.93)),
    "blue": ((0.58, 0.50, 0.60), (0.12, 0.08, 0.95)),
    "olive": ((0.26, 0.45, 0.50), (0.16, 0.45, 0.93)),
}
PARTS = {
    "beak": ("cone-beak", "hook-beak"),
    "eye": ("eye-ring", "eye-stripe"),
    "wing": ("one-bar", "two-bar"),
    "tail": ("band-tail", "edge-tail"),
}
# Two more parts, which birds of "synthbirds" do not have.
FORMS = PARTS | {"crown": ("full-cap", "lined-cap"), "throat": ("one-spot", "two-spot")}
HEAD = ("beak", "eye", "crown", "throat")
ALL_WORDS = list(itertools.product((0, 1), repeat=4))
# Words of even parity: two species of a family differ in at least two parts, and every form occurs in half of them.
WORDS = [word for word in ALL_WORDS if sum(word) % 2 == 0]

Plumage = tuple[tuple[float, float, float], tuple[float, float, float]]
Word = tuple[int, ...]  # the form of each part


class Variant(NamedTuple):
    """What a dataset of this kind is like; the defaults are those of "synthbirds"."""

    splits: dict[str, int]  # images
    families: dict[str, Plumage] = FAMILIES
    parts: tuple[str, ...] = tuple(PARTS)  # that tell species apart
    words: list[Word] = WORDS  # that occur, in each family: the form of each of these parts
    idle_parts: tuple[str, ...] = ()  # that come in either form, whatever the species
    size: int = SIZE  # pixels, height and width
    bird: tuple[float, float] = (0.55, 0.75)  # size, in 1/192 of the picture per unit of its outline
    marks: float = 1.0  # size of the parts' marks, beside the bird
    foliage: tuple[int, int] = (6, 18)  # leaves, stalks and berries: at least, and less than
    decoys: float = 0.25  # share of them in the colours of the bird's own marks
    key: tuple[int, ...] = ()  # of its random numbers, so that no two variants share a picture

    @property
    def species(self) -> list[tuple[str, Word]]:
        """Family and word of each class."""
        return [(family, word) for family in self.families for word in self.words]

    @property
    def class_names(self) -> list[str]:
        """Of the classes, in order."""
        return [
            " ".join([family, *(FORMS[part][level] for part, level in zip(self.parts, word, strict=True))])
            for family, word in self.species
        ]


SYNTHBIRDS = Variant(SPLITS)
SPECIES, CLASS_NAMES = SYNTHBIRDS.species, SYNTHBIRDS.class_names
VARIANTS = {
    "synthbirds": SYNTHBIRDS,
    # 40 images of each of 48 classes, of which two may differ in a single mark, all on the head. Finer pixels, smaller
    # birds with smaller marks, twice the foliage, half of it in the marks' colours, and marks on wing and tail that
    # mean nothing. Five training splits, to vary the images.
    "synthbirds_hard": Variant(
        {f"train_{number}": 1920 for number in range(5)} | {"validation": 480, "test": 1440},
        parts=HEAD,
        words=ALL_WORDS,
        idle_parts=("wing", "tail"),
        size=240,
        bird=(0.5, 0.68),
        marks=0.85,
        foliage=(12, 30),
        decoys=0.5,
        key=(1,),
    ),
    # Close-ups of other plumages with the same marks, large and plentiful: a stand-in for ImageNet, and more than that.
    "synthbirds_other": Variant(
        {"train": 3600, "validation": 600, "test": 960},
        families={
            "rose": ((0.94, 0.45, 0.62), (0.98, 0.12, 0.95)),
            "golden": ((0.13, 0.70, 0.72), (0.14, 0.20, 0.96)),
            "slate": ((0.72, 0.30, 0.42), (0.75, 0.08, 0.90)),
        },
        parts=HEAD,
        idle_parts=("wing", "tail"),
        size=240,
        bird=(0.8, 1.3),
        marks=1.15,
        key=(2,),
    ),
}

Colour = tuple[int, int, int]
Shape = tuple[np.ndarray, Colour]  # corners (n, 2) of a closed polygon, x then y, and what fills it


def _smooth(*corners: tuple[float, float]) -> np.ndarray:
    """Closed Catmull-Rom curve through the corners, six points (6n, 2) per span."""
    p = np.array(corners)
    t = np.arange(6)[:, None, None] / 6
    before, after, beyond = np.roll(p, 1, 0), np.roll(p, -1, 0), np.roll(p, -2, 0)
    curve = p + t / 2 * (
        after - before + t * (2 * before - 5 * p + 4 * after - beyond + t * (3 * (p - after) + beyond - before))
    )
    return curve.swapaxes(0, 1).reshape(-1, 2)


# The bird faces right in a box of about 100 x 95 units, x to the right, y down.
# fmt: off
BODY = _smooth(
    (65, 20), (73, 22), (79, 28), (81, 34), (79, 41), (79, 52), (72, 66),
    (56, 76), (40, 77), (31, 72), (33, 60), (44, 46), (54, 30), (59, 23),
)
# fmt: on
BELLY = _smooth((80, 38), (79, 52), (72, 66), (56, 76), (44, 76), (54, 66), (64, 54), (70, 42))
WING = _smooth((62, 44), (66, 54), (58, 66), (42, 73), (24, 80), (17, 82), (28, 68), (42, 52), (52, 44))
TAIL = np.array([(38, 64), (40, 75), (24, 84), (6, 95), (1, 88), (18, 76)])
FEATHERS = [((50, 57), (25, 78)), ((56, 61), (33, 75)), ((45, 53), (24, 74))]
LEGS = [(52, 72), (60, 72)]
BOX = np.array([(0, 19), (95, 19), (95, 96), (0, 96)])
CENTRES = {
    "beak": (79, 34),
    "wing": (53.5, 55),
    "tail": (4, 91),
    "crown": (66, 25),
    "throat": (74.5, 49),
}  # towards which smaller marks shrink
CIRCLE = np.array([(math.cos(a), math.sin(a)) for a in np.arange(24) * (math.pi / 12)])

# Beak and eye are as large as they must be for a plain network to learn them from 96 x 96 pixels in 20 epochs, chosen
# by its accuracy on the validation split.
BEAKS = [
    np.array([(78, 26), (95, 34.5), (79, 41.5)]),
    _smooth((78, 27), (87, 26.5), (93.5, 32), (93, 43.5), (89, 37), (80, 40)),
]
GAPES = [((79.5, 34), (91, 34.4)), ((79.5, 34), (89, 34.5))]
EYE = np.array((71.5, 30.5))
EYE_RING = 5.5  # radius
EYE_STRIPE = ((-10.5, 3.0), (8, -1.4), 3.9)  # from and to, relative to the eye, and width
WING_BARS = [[((49, 48), (59, 63), 4.2)], [((52.5, 46.5), (62, 60), 2.1), ((45, 50), (55, 65), 2.1)]]
WING_AXIS = np.array((-0.78, 0.62))
TAIL_STREAKS = [((5, 87), (14, 81)), ((8.4, 91.8), (17.4, 85.8))]
CROWN = np.array([(58.5, 27.5), (62, 22.5), (66, 20), (72, 21.3), (74.5, 24.5), (67, 25.5)])
CROWN_LINES = [(58.5, 25.8), (65, 21.5), (73.5, 23.6)], [(57.3, 30.6), (65, 26.4), (72.5, 27.6)]
THROAT = [[((74.5, 49), 2.9)], [((76, 46), 2.05), ((72.6, 52), 2.05)]]  # centre and radius of spots


def draw(split: str, index: int, seed: int = 0, variant: str = "synthbirds") -> np.ndarray:
    """Draw one image; its label is `index % K`, of K = 24 classes in "synthbirds".

    Args:
        split: A key of the variant's splits: "train", "validation" or "test" in "synthbirds".
        index: Position in the split, from 0.
        seed: Another seed gives another dataset of the same kind.
        variant: A key of `VARIANTS`.

    Returns:
        RGB image (192, 192, 3), or of the variant's size, uint8.

    Raises:
        ValueError: There is no such variant, split or image.
    """
    chosen = _variant(variant)
    if split not in chosen.splits:
        raise unknown("split", split, chosen.splits)
    if not 0 <= index < chosen.splits[split]:
        raise UserError(f"index {index} is out of range: split {split!r} has images 0 to {chosen.splits[split] - 1}")
    species = chosen.species
    rng = np.random.default_rng([seed, SPLIT_NUMBERS[split], index, *chosen.key])
    return _draw(rng, *species[index % len(species)], chosen)


def load(
    cache_dir: str | Path | None = None,
    num_proc: int | None = None,
    seed: int = 0,
    variant: str = "synthbirds",
    only: Collection[str] | None = None,
) -> datasets.DatasetDict:
    """Load a dataset; the first call draws it (about a minute on two cores) and caches it.

    Args:
        cache_dir: Folder for the images (570 MB). None: the cache of the `datasets` library.
        num_proc: Processes that draw. None: one per CPU that this process may use. Does not change the images.
        seed: Another seed gives another dataset of the same kind.
        variant: A key of `VARIANTS`.
        only: Splits that are needed, see `load_splits`; no others are drawn. None: all.

    Returns:
        The variant's splits ("train", "validation" and "test") with columns "image" (RGB), "label" (its `class_names`)
        and "super", the plumage (its `families`).

    Raises:
        ValueError: There is no such variant, or `num_proc` is less than 1.
    """
    from datasets import ClassLabel, Dataset, DatasetDict, DatasetInfo, Features
    from datasets import Image as ImageFeature

    if num_proc is not None and num_proc < 1:
        raise UserError(f"num_proc is {num_proc}: give at least 1, or None for one process per CPU")
    chosen = _variant(variant)
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=chosen.class_names)})

    def generate(split: str, count: int) -> Dataset:
        # Lists in gen_kwargs are divided among the processes. Everything in gen_kwargs is part of the cache key.
        starts = list(range(0, count, len(chosen.species)))
        key = dict(starts=starts, split=split, count=count, seed=seed, version=VERSION, variant=variant)
        key |= dict(drawn_as=repr(chosen._replace(splits={})))
        return Dataset.from_generator(
            _examples,
            features=features,
            cache_dir=cache_dir and str(cache_dir),
            gen_kwargs=key,
            num_proc=min(num_proc or _available_cpus(), len(starts)),
            split=split,
            dataset_name=variant,
            info=DatasetInfo(splits=[{"name": split, "num_examples": count}]),  # total of the progress bar
        )

    def with_families(split: Dataset) -> Dataset:
        # Not part of the cache: the pixels, which take the time, do not depend on it.
        families = [label // len(chosen.words) for label in split["label"]]
        return split.add_column("super", families, feature=ClassLabel(names=list(chosen.families)))

    wanted = chosen.splits if only is None else wanted_splits(chosen.splits, only, variant)
    with _progress_on_terminals_only():
        return DatasetDict({split: with_families(generate(split, chosen.splits[split])) for split in wanted})


def _variant(name: str) -> Variant:
    if name not in VARIANTS:
        raise unknown("variant of synthbirds", name, VARIANTS)
    return VARIANTS[name]


def _examples(
    starts: list[int], split: str, count: int, seed: int, version: int, variant: str, drawn_as: str
) -> Iterator[dict]:
    """Draw one image of every species from each start on; `version` and `drawn_as` are here for the cache key only."""
    classes = len(VARIANTS[variant].species)
    for start in starts:
        for index in range(start, min(start + classes, count)):
            file = io.BytesIO()
            # Not PNG, which makes noise little smaller and takes fifteen times as long to read, in every epoch.
            Image.fromarray(draw(split, index, seed, variant)).save(file, "BMP")
            yield {"image": {"bytes": file.getvalue(), "path": None}, "label": index % classes}


def _available_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def _progress_on_terminals_only() -> Iterator[None]:
    """Hide the bars of `datasets` in log files; HF_DATASETS_DISABLE_PROGRESS_BARS, where set, has the last word."""
    from datasets import are_progress_bars_disabled, config, disable_progress_bars, enable_progress_bars

    chosen = config.HF_DATASETS_DISABLE_PROGRESS_BARS is not None or are_progress_bars_disabled()
    if chosen or sys.stderr.isatty():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


class _Colours(NamedTuple):
    """Colours of one bird."""

    mantle: Colour
    belly: Colour
    wing: Colour
    mark: Colour  # of all four parts that tell the species
    beak: Colour
    dark: Colour


class _Pose(NamedTuple):
    """Where the bird sits: pixels = origin + units * scale, stretched, mirrored and turned."""

    x_axis: np.ndarray  # (2,) pixels per unit
    y_axis: np.ndarray
    origin: np.ndarray

    def place(self, points: np.ndarray) -> np.ndarray:
        """Points (..., 2) in units -> pixels."""
        points = np.asarray(points, float)
        return self.origin + points[..., :1] * self.x_axis + points[..., 1:] * self.y_axis


def _draw(rng: np.random.Generator, family: str, word: Word, variant: Variant = SYNTHBIRDS) -> np.ndarray:
    """Image (size, size, 3) of a species. The random numbers used do not depend on the species.

    Everything is placed on `SIZE` x `SIZE`, and `_paint` enlarges it to the image.
    """
    forms = dict(zip(variant.parts, word, strict=True)) | {part: rng.integers(2) for part in variant.idle_parts}
    plumage = _plumage(rng, variant.families[family])
    pose = _pose(rng, variant.bird)
    image = _background(rng, variant.size)
    branch, slope = _branch(rng, pose.place((56, 91)))
    _paint(image, _foliage(rng, plumage, variant) + branch, scale=2)
    size = variant.marks
    bird = [
        *_tail(rng, forms["tail"], plumage, size),
        *_body(plumage),
        *(_crown(forms["crown"], plumage, size) if "crown" in forms else []),
        *(_throat(forms["throat"], plumage, size) if "throat" in forms else []),
        *_wing(rng, forms["wing"], plumage, size),
        *_beak(forms["beak"], plumage, size),
        *_eye(rng, forms["eye"], plumage, size),
    ]
    placed = [(pose.place(points), colour) for points, colour in bird]
    _paint(image, _legs(pose, slope, plumage) + placed, scale=3)
    return _photograph(rng, image)


def _plumage(rng: np.random.Generator, family: Plumage) -> _Colours:
    shift, stretch, gain = rng.normal(0, 0.035), rng.uniform(0.6, 1.3), rng.uniform(0.75, 1.1)
    mantle, belly = ((h + shift, s * stretch, v * gain) for h, s, v in family)
    return _Colours(
        mantle=_rgb(*mantle),
        belly=_rgb(*belly),
        wing=_rgb(*mantle[:2], mantle[2] * rng.uniform(0.55, 0.75)),
        mark=_rgb(rng.uniform(0.08, 0.16), rng.uniform(0, 0.25), rng.uniform(0.9, 1)),
        beak=_rgb(rng.uniform(0.05, 0.13), rng.uniform(0.3, 0.8), rng.uniform(0.45, 0.9)),
        dark=_tone((32, 28, 30), rng.uniform(0.7, 1.3)),
    )


def _pose(rng: np.random.Generator, sizes: tuple[float, float]) -> _Pose:
    """Random size, tilt, mirroring and position, with the whole bird inside the frame."""
    size, angle = rng.uniform(*sizes), math.radians(rng.uniform(-16, 16))
    x_size = size * rng.uniform(0.94, 1.06) * (1 if rng.random() < 0.5 else -1)
    cos, sin = math.cos(angle), math.sin(angle)
    pose = _Pose(x_size * np.array((cos, sin)), size * np.array((-sin, cos)), np.zeros(2))
    box = pose.place(BOX)
    return pose._replace(origin=rng.uniform(1 - box.min(0), SIZE - 1 - box.max(0)))


def _background(rng: np.random.Generator, size: int) -> Image.Image:
    """Out-of-focus colours and discs of light, drawn small because nothing in them is sharp."""
    hue, other = rng.uniform(0.08, 0.65), rng.normal(0, 0.1)
    cells = [_rgb(hue + other * rng.random(), rng.uniform(0.15, 0.55), rng.uniform(0.3, 0.85)) for _ in range(25)]
    grid = Image.fromarray(np.array(cells, np.uint8).reshape(5, 5, 3))
    image = grid.resize((SIZE // 2, SIZE // 2), Image.Resampling.BICUBIC).filter(ImageFilter.BoxBlur(7))
    column = np.arange(SIZE // 2)
    for _ in range(rng.integers(4, 14)):
        (x, y), radius = rng.uniform(0, SIZE / 2, 2), rng.uniform(3, 13)
        colour = _rgb(hue + rng.normal(0, 0.08), rng.uniform(0.05, 0.5), rng.uniform(0.7, 1))
        disc = (column - x) ** 2 + (column[:, None] - y) ** 2 < radius**2
        image.paste(colour, None, Image.fromarray(disc * np.uint8(rng.integers(25, 100))))
    return image.filter(ImageFilter.BoxBlur(1)).resize((size, size), Image.Resampling.BICUBIC)


def _foliage(rng: np.random.Generator, plumage: _Colours, variant: Variant) -> list[Shape]:
    """Leaves, stalks and berries; some have the colours of the bird's own parts."""
    season = rng.uniform(0.12, 0.4)
    shapes = []
    for _ in range(rng.integers(*variant.foliage)):
        colour = _rgb(season + rng.normal(0, 0.05), rng.uniform(0.25, 0.7), rng.uniform(0.3, 0.8))
        if rng.random() < variant.decoys:
            colour = plumage.mark if rng.random() < 0.6 else plumage.beak
        kind = (_leaf, _leaf, _stalk, _berry)[rng.integers(4)]
        shapes += kind(rng, rng.uniform(0, SIZE, 2), rng.uniform(0, 2 * math.pi), colour)
    return shapes


def _leaf(rng: np.random.Generator, base: np.ndarray, angle: float, colour: Colour) -> list[Shape]:
    """A pointed leaf, one half in the shade."""
    length, width = rng.uniform(9, 24), rng.uniform(0.16, 0.26)
    along = length * np.array((math.cos(angle), math.sin(angle)))
    across = width * np.array((-along[1], along[0]))
    t = np.arange(9)[:, None] / 8
    rib, bulge = base + t * along, 4 * t * (1 - t) * (1.2 - 0.4 * t) * across
    return [
        (np.concatenate([rib, (rib + bulge)[::-1]]), colour),
        (np.concatenate([rib, (rib - bulge)[::-1]]), _tone(colour, 0.8)),
    ]


def _stalk(rng: np.random.Generator, base: np.ndarray, angle: float, colour: Colour) -> list[Shape]:
    """A long bent stalk with up to three leaves."""
    length, bend = rng.uniform(30, 110), rng.normal(0, 0.25)
    along = length * np.array((math.cos(angle), math.sin(angle)))
    across = np.array((-along[1], along[0]))
    t = np.arange(17)[:, None] / 16
    spine = base + t * along + bend * t * t * across
    half = rng.uniform(0.6, 1.2) / length * (1 - 0.5 * t) * across
    shapes = [(np.concatenate([spine + half, (spine - half)[::-1]]), colour)]
    for node, turn in ((16, 0.3), (13, -0.9), (10, 0.9))[: rng.integers(4)]:
        shapes += _leaf(rng, spine[node], angle + 2 * bend + turn, _tone(colour, rng.uniform(0.8, 1.1)))
    return shapes


def _berry(rng: np.random.Generator, base: np.ndarray, angle: float, colour: Colour) -> list[Shape]:
    """One to three round berries with a glint."""
    radius = rng.uniform(1.5, 3.5)
    side = 2 * radius * np.array((math.cos(angle), math.sin(angle)))
    shapes = []
    for step in ((0, 0), side, (side[1], -side[0]))[: rng.integers(1, 4)]:
        centre = base + step
        shapes += [(_disc(centre, radius), colour), (_disc(centre - radius * 0.3, radius * 0.3), _tone(colour, 1.35))]
    return shapes


def _branch(rng: np.random.Generator, foot: np.ndarray) -> tuple[list[Shape], np.ndarray]:
    """A branch across the image that touches `foot` (pixels) from below, and its direction (2,) there."""
    slope, bend, thick = math.tan(rng.normal(0, 0.25)), rng.normal(0, 0.0006), rng.uniform(4, 9)
    colour = _rgb(rng.uniform(0.04, 0.11), rng.uniform(0.2, 0.5), rng.uniform(0.25, 0.55))
    x = np.linspace(-4, SIZE + 4, 41)
    top = foot[1] + slope * (x - foot[0]) + bend * (x - foot[0]) ** 2
    lower = thick * (1 + rng.normal(0, 0.002) * (x - foot[0])) + rng.normal(0, 0.15, len(x))

    def strip(start: float, stop: float, tone: float) -> Shape:
        upper_edge, lower_edge = np.stack([x, top + start * lower], 1), np.stack([x, top + stop * lower], 1)
        return np.concatenate([upper_edge, lower_edge[::-1]]), _tone(colour, tone)

    return [strip(0, 1, 1), strip(0, 0.25, 1.25), strip(0.7, 1, 0.75)], np.array((1, slope)) / math.sqrt(1 + slope**2)


def _legs(pose: _Pose, direction: np.ndarray, plumage: _Colours) -> list[Shape]:
    """Legs down to the branch and toes along it, in pixels."""
    foot, down = pose.place((56, 91)), pose.y_axis
    unit = math.sqrt(down[0] ** 2 + down[1] ** 2)
    shapes = []
    for leg in LEGS:
        hip = pose.place(leg)
        gap = foot - hip
        reach = (gap[0] * direction[1] - gap[1] * direction[0]) / (down[0] * direction[1] - down[1] * direction[0])
        sole = hip + (reach + 1) * down
        toes = 3.2 * unit * direction
        shapes += [
            (_stroke(hip, sole, 1.7 * unit), plumage.dark),
            (_stroke(sole - toes, sole + toes, 1.7 * unit), plumage.dark),
        ]
    return shapes


def _body(plumage: _Colours) -> list[Shape]:
    """Back, head and belly, each with a darker rim below and behind."""
    return [
        (BODY, _tone(plumage.mantle, 0.82)),
        (_inner(BODY), plumage.mantle),
        (BELLY, _tone(plumage.belly, 0.88)),
        (_inner(BELLY), plumage.belly),
    ]


def _wing(rng: np.random.Generator, level: int, plumage: _Colours, size: float = 1.0) -> list[Shape]:
    """One broad pale bar across the wing (level 0) or two narrow ones (1)."""
    shift = rng.normal(0, 1.2) * WING_AXIS
    lines = [(_stroke(start, end, 0.9), _tone(plumage.wing, 0.75)) for start, end in FEATHERS]
    bars = [_scaled(_stroke(start, end, width), CENTRES["wing"], size) for start, end, width in WING_BARS[level]]
    marks = [(bar + shift, plumage.mark) for bar in bars]
    return [(WING, _tone(plumage.wing, 0.75)), (_inner(WING), plumage.wing), *lines, *marks]


def _tail(rng: np.random.Generator, level: int, plumage: _Colours, size: float = 1.0) -> list[Shape]:
    """A pale band over the tip of the tail (level 0) or two pale streaks along its edges (1)."""
    shift = rng.normal(0, 1)
    upper, lower = TAIL[4] + (TAIL[5] - TAIL[4]) * (5 + shift) / 17, TAIL[3] + (TAIL[2] - TAIL[3]) * (5 + shift) / 18
    marks = [np.array((lower, TAIL[3], TAIL[4], upper))]
    if level == 1:
        marks = [_stroke(start, np.add(end, (shift, -shift * 0.65)), 2.6) for start, end in TAIL_STREAKS]
    return [(TAIL, plumage.wing), *((_scaled(mark, CENTRES["tail"], size), plumage.mark) for mark in marks)]


def _beak(level: int, plumage: _Colours, size: float = 1.0) -> list[Shape]:
    """A straight cone (level 0) or a hook (1), with a dark gape."""
    beak, gape = BEAKS[level], _stroke(*GAPES[level], 1.0)
    return [
        (_scaled(beak, CENTRES["beak"], size), plumage.beak),
        (_scaled(gape, CENTRES["beak"], size), plumage.dark),
    ]


def _eye(rng: np.random.Generator, level: int, plumage: _Colours, size: float = 1.0) -> list[Shape]:
    """A dark eye in a pale ring (level 0) or on a pale stripe (1)."""
    centre = EYE + rng.normal(0, 0.4, 2)
    start, end, width = EYE_STRIPE
    mark = _stroke(centre + start, centre + end, width) if level == 1 else _disc(centre, EYE_RING)
    shapes = [
        (mark, plumage.mark),
        (_disc(centre, 3.1), plumage.dark),
        (_disc(centre + np.array((1, -1)), 0.9), (255, 255, 255)),
    ]
    return [(_scaled(points, centre, size), colour) for points, colour in shapes]


def _crown(level: int, plumage: _Colours, size: float) -> list[Shape]:
    """A pale cap (level 0) or two pale lines along it (1)."""
    lines = [_stroke(*ends, 1.9) for line in CROWN_LINES for ends in itertools.pairwise(line)]
    return [(_scaled(mark, CENTRES["crown"], size), plumage.mark) for mark in ([CROWN], lines)[level]]


def _throat(level: int, plumage: _Colours, size: float) -> list[Shape]:
    """One dark spot (level 0) or two smaller ones (1)."""
    spots = [_disc(np.array(centre), radius) for centre, radius in THROAT[level]]
    return [(_scaled(spot, CENTRES["throat"], size), plumage.dark) for spot in spots]


def _scaled(points: np.ndarray, centre: tuple[float, float] | np.ndarray, size: float) -> np.ndarray:
    """Corners moved towards a centre; to the last bit where they are with size 1."""
    return points if size == 1 else np.asarray(centre) + size * (points - centre)


def _photograph(rng: np.random.Generator, image: Image.Image) -> np.ndarray:
    """Uneven light, exposure, white balance, contrast and sensor noise; uint8 (size, size, 3)."""
    size = image.width
    ramp = np.linspace(-1, 1, size, dtype=np.float32)
    across, down = rng.normal(0, 0.12, 2).astype(np.float32)
    light = 1 + across * ramp.repeat(3) + down * ramp[:, None]  # (192, 576): colours side by side are quicker
    contrast = rng.uniform(0.8, 1.15)
    gain = rng.uniform(0.75, 1.15) * contrast * rng.normal(1, 0.04, 3).astype(np.float32)
    pixels = rng.standard_normal(light.shape, np.float32) * np.float32(rng.uniform(1, 5))
    pixels += np.asarray(image).reshape(light.shape) * (light * np.tile(gain, size))
    pixels += np.float32(128 * (1 - contrast))
    return np.rint(pixels).clip(0, 255).astype(np.uint8).reshape(size, size, 3)


def _paint(image: Image.Image, shapes: list[Shape], scale: int) -> None:
    """Fill the shapes one over the other, with edges smoothed by averaging scale x scale subpixels.

    Args:
        image: Of `SIZE` x `SIZE` pixels, or of more, for which the shapes are enlarged.
        shapes: In pixels of `SIZE` x `SIZE`.
        scale: Subpixels along a side.
    """
    zoom = image.width / SIZE
    shapes = [(points * zoom, colour) for points, colour in shapes]
    corners = np.concatenate([points for points, _ in shapes])
    left, top = np.maximum(np.floor(corners.min(0)), 0).astype(int)
    right, bottom = np.minimum(np.ceil(corners.max(0)), image.width).astype(int)
    patch = image.crop((left, top, right, bottom))
    patch = np.array(patch.resize((patch.width * scale, patch.height * scale), Image.Resampling.NEAREST))
    pixel, shape = _inside([(points - (left, top)) * scale for points, _ in shapes], *patch.shape[:2])
    patch.reshape(-1, 3)[pixel] = np.array([colour for _, colour in shapes], np.uint8).take(shape, 0)
    image.paste(Image.fromarray(patch).reduce(scale), (left, top))


def _inside(polygons: list[np.ndarray], height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Find the pixels whose centres lie inside polygons (even-odd rule), polygon by polygon.

    ImageDraw would do, but fills sharp corners differently from one version of Pillow to the next, and draws too wide.

    Args:
        polygons: Corners (n, 2) of each, x then y, in pixels.
        height: Rows; what lies outside the image is left out.
        width: Columns.

    Returns:
        Indices of pixels in the flattened image, and for each the index of its polygon.
    """
    sizes = np.array([len(polygon) for polygon in polygons])
    following = np.arange(1, sizes.sum() + 1)
    following[sizes.cumsum() - 1] -= sizes  # the last corner is joined to the first
    x, y = np.concatenate(polygons).T
    run, rise = x[following] - x, y[following] - y
    # Rows of pixel centres that each edge crosses, and the first column right of the crossing.
    y_range = np.ceil(np.sort([y, y[following]], axis=0) - 0.5).astype(int).clip(0, height)
    edge, row = _ranges(*y_range)
    crossing = x[edge] + (row + 0.5 - y[edge]) * run[edge] / rise[edge]
    column = np.ceil(crossing - 0.5).astype(int).clip(0, width)
    # In the order of polygon, row and column, crossings pair up to the two ends of a span.
    polygon = np.arange(len(polygons)).repeat(sizes)[edge]
    line, column = np.divmod(np.sort((polygon * height + row) * (width + 1) + column), width + 1)
    span, column = _ranges(column[::2], column[1::2])
    polygon, row = np.divmod(line[::2][span], height)
    return row * width + column, polygon


def _ranges(start: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All whole numbers from start[i] to stop[i] - 1, for one i after the other: (i, number)."""
    lengths = stop - start
    which = np.arange(len(lengths)).repeat(lengths)
    return which, np.arange(len(which)) + (start - lengths.cumsum() + lengths)[which]


def _stroke(start: np.ndarray, end: np.ndarray, width: float) -> np.ndarray:
    """Corners (4, 2) of a straight line of the given width."""
    start, end = np.asarray(start, float), np.asarray(end, float)
    along = end - start
    half = np.array((-along[1], along[0])) * (width / 2 / math.sqrt(along[0] ** 2 + along[1] ** 2))
    return np.stack([start + half, end + half, end - half, start - half])


def _inner(outline: np.ndarray) -> np.ndarray:
    """The part of a shape that catches the light, which comes from the front and above."""
    front, top = outline[:, 0].max(), outline[:, 1].min()
    return outline + 0.035 * (np.array((front, top)) - outline)


def _disc(centre: np.ndarray, radius: float) -> np.ndarray:
    return centre + radius * CIRCLE


def _rgb(hue: float, saturation: float, value: float) -> Colour:
    """Colour 0-255 from hue (a fraction of the circle), saturation and value, which are clipped to 0-1."""
    return tuple(
        round(255 * c) for c in colorsys.hsv_to_rgb(hue % 1, min(max(saturation, 0), 1), min(max(value, 0), 1))
    )


def _tone(colour: Colour, factor: float) -> Colour:
    """Lighter (factor above 1) or darker."""
    return tuple(min(255, round(c * factor)) for c in colour)
