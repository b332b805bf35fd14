"""How a bird of synthbirds is drawn: its plumage, pose and parts, the branch it sits on, and what is around it."""

import itertools
import math
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from .painting import SIZE, Colour, Shape, disc, inner, paint, photograph, rgb, scaled, smooth, stroke, tone

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


# The bird faces right in a box of about 100 x 95 units, x to the right, y down.
# fmt: off
BODY = smooth(
    (65, 20), (73, 22), (79, 28), (81, 34), (79, 41), (79, 52), (72, 66),
    (56, 76), (40, 77), (31, 72), (33, 60), (44, 46), (54, 30), (59, 23),
)
# fmt: on
BELLY = smooth((80, 38), (79, 52), (72, 66), (56, 76), (44, 76), (54, 66), (64, 54), (70, 42))
WING = smooth((62, 44), (66, 54), (58, 66), (42, 73), (24, 80), (17, 82), (28, 68), (42, 52), (52, 44))
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

# Beak and eye are as large as they must be for a plain network to learn them from 96 x 96 pixels in 20 epochs, chosen
# by its accuracy on the validation split.
BEAKS = [
    np.array([(78, 26), (95, 34.5), (79, 41.5)]),
    smooth((78, 27), (87, 26.5), (93.5, 32), (93, 43.5), (89, 37), (80, 40)),
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


class Sketch(NamedTuple):
    """What is decided of a bird before anything is drawn."""

    idle: dict[str, int]  # form of each idle part
    plumage: _Colours
    pose: _Pose


def sketch(rng: np.random.Generator, family: str, variant: Variant) -> Sketch:
    """The first random numbers of `draw_bird`: what says where the parts of a bird are in its picture."""
    idle = {part: int(rng.integers(2)) for part in variant.idle_parts}
    return Sketch(idle, _plumage(rng, variant.families[family]), _pose(rng, variant.bird))


def draw_bird(rng: np.random.Generator, family: str, word: Word, variant: Variant) -> np.ndarray:
    """Image (size, size, 3) of a species. The random numbers used do not depend on the species.

    Everything is placed on `SIZE` x `SIZE`, and `paint` enlarges it to the image.
    """
    idle, plumage, pose = sketch(rng, family, variant)
    forms = dict(zip(variant.parts, word, strict=True)) | idle
    image = _background(rng, variant.size)
    branch, slope = _branch(rng, pose.place((56, 91)))
    paint(image, _foliage(rng, plumage, variant) + branch, scale=2)
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
    paint(image, _legs(pose, slope, plumage) + placed, scale=3)
    return photograph(rng, image)


def _plumage(rng: np.random.Generator, family: Plumage) -> _Colours:
    shift, stretch, gain = rng.normal(0, 0.035), rng.uniform(0.6, 1.3), rng.uniform(0.75, 1.1)
    mantle, belly = ((h + shift, s * stretch, v * gain) for h, s, v in family)
    return _Colours(
        mantle=rgb(*mantle),
        belly=rgb(*belly),
        wing=rgb(*mantle[:2], mantle[2] * rng.uniform(0.55, 0.75)),
        mark=rgb(rng.uniform(0.08, 0.16), rng.uniform(0, 0.25), rng.uniform(0.9, 1)),
        beak=rgb(rng.uniform(0.05, 0.13), rng.uniform(0.3, 0.8), rng.uniform(0.45, 0.9)),
        dark=tone((32, 28, 30), rng.uniform(0.7, 1.3)),
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
    cells = [rgb(hue + other * rng.random(), rng.uniform(0.15, 0.55), rng.uniform(0.3, 0.85)) for _ in range(25)]
    grid = Image.fromarray(np.array(cells, np.uint8).reshape(5, 5, 3))
    image = grid.resize((SIZE // 2, SIZE // 2), Image.Resampling.BICUBIC).filter(ImageFilter.BoxBlur(7))
    column = np.arange(SIZE // 2)
    for _ in range(rng.integers(4, 14)):
        (x, y), radius = rng.uniform(0, SIZE / 2, 2), rng.uniform(3, 13)
        colour = rgb(hue + rng.normal(0, 0.08), rng.uniform(0.05, 0.5), rng.uniform(0.7, 1))
        disc = (column - x) ** 2 + (column[:, None] - y) ** 2 < radius**2
        image.paste(colour, None, Image.fromarray(disc * np.uint8(rng.integers(25, 100))))
    return image.filter(ImageFilter.BoxBlur(1)).resize((size, size), Image.Resampling.BICUBIC)


def _foliage(rng: np.random.Generator, plumage: _Colours, variant: Variant) -> list[Shape]:
    """Leaves, stalks and berries; some have the colours of the bird's own parts."""
    season = rng.uniform(0.12, 0.4)
    shapes = []
    for _ in range(rng.integers(*variant.foliage)):
        colour = rgb(season + rng.normal(0, 0.05), rng.uniform(0.25, 0.7), rng.uniform(0.3, 0.8))
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
        (np.concatenate([rib, (rib - bulge)[::-1]]), tone(colour, 0.8)),
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
        shapes += _leaf(rng, spine[node], angle + 2 * bend + turn, tone(colour, rng.uniform(0.8, 1.1)))
    return shapes


def _berry(rng: np.random.Generator, base: np.ndarray, angle: float, colour: Colour) -> list[Shape]:
    """One to three round berries with a glint."""
    radius = rng.uniform(1.5, 3.5)
    side = 2 * radius * np.array((math.cos(angle), math.sin(angle)))
    shapes = []
    for step in ((0, 0), side, (side[1], -side[0]))[: rng.integers(1, 4)]:
        centre = base + step
        shapes += [(disc(centre, radius), colour), (disc(centre - radius * 0.3, radius * 0.3), tone(colour, 1.35))]
    return shapes


def _branch(rng: np.random.Generator, foot: np.ndarray) -> tuple[list[Shape], np.ndarray]:
    """A branch across the image that touches `foot` (pixels) from below, and its direction (2,) there."""
    slope, bend, thick = math.tan(rng.normal(0, 0.25)), rng.normal(0, 0.0006), rng.uniform(4, 9)
    colour = rgb(rng.uniform(0.04, 0.11), rng.uniform(0.2, 0.5), rng.uniform(0.25, 0.55))
    x = np.linspace(-4, SIZE + 4, 41)
    top = foot[1] + slope * (x - foot[0]) + bend * (x - foot[0]) ** 2
    lower = thick * (1 + rng.normal(0, 0.002) * (x - foot[0])) + rng.normal(0, 0.15, len(x))

    def strip(start: float, stop: float, light: float) -> Shape:
        upper_edge, lower_edge = np.stack([x, top + start * lower], 1), np.stack([x, top + stop * lower], 1)
        return np.concatenate([upper_edge, lower_edge[::-1]]), tone(colour, light)

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
            (stroke(hip, sole, 1.7 * unit), plumage.dark),
            (stroke(sole - toes, sole + toes, 1.7 * unit), plumage.dark),
        ]
    return shapes


def _body(plumage: _Colours) -> list[Shape]:
    """Back, head and belly, each with a darker rim below and behind."""
    return [
        (BODY, tone(plumage.mantle, 0.82)),
        (inner(BODY), plumage.mantle),
        (BELLY, tone(plumage.belly, 0.88)),
        (inner(BELLY), plumage.belly),
    ]


def _wing(rng: np.random.Generator, level: int, plumage: _Colours, size: float = 1.0) -> list[Shape]:
    """One broad pale bar across the wing (level 0) or two narrow ones (1)."""
    shift = rng.normal(0, 1.2) * WING_AXIS
    lines = [(stroke(start, end, 0.9), tone(plumage.wing, 0.75)) for start, end in FEATHERS]
    bars = [scaled(stroke(start, end, width), CENTRES["wing"], size) for start, end, width in WING_BARS[level]]
    marks = [(bar + shift, plumage.mark) for bar in bars]
    return [(WING, tone(plumage.wing, 0.75)), (inner(WING), plumage.wing), *lines, *marks]


def _tail(rng: np.random.Generator, level: int, plumage: _Colours, size: float = 1.0) -> list[Shape]:
    """A pale band over the tip of the tail (level 0) or two pale streaks along its edges (1)."""
    shift = rng.normal(0, 1)
    upper, lower = TAIL[4] + (TAIL[5] - TAIL[4]) * (5 + shift) / 17, TAIL[3] + (TAIL[2] - TAIL[3]) * (5 + shift) / 18
    marks = [np.array((lower, TAIL[3], TAIL[4], upper))]
    if level == 1:
        marks = [stroke(start, np.add(end, (shift, -shift * 0.65)), 2.6) for start, end in TAIL_STREAKS]
    return [(TAIL, plumage.wing), *((scaled(mark, CENTRES["tail"], size), plumage.mark) for mark in marks)]


def _beak(level: int, plumage: _Colours, size: float = 1.0) -> list[Shape]:
    """A straight cone (level 0) or a hook (1), with a dark gape."""
    beak, gape = BEAKS[level], stroke(*GAPES[level], 1.0)
    return [
        (scaled(beak, CENTRES["beak"], size), plumage.beak),
        (scaled(gape, CENTRES["beak"], size), plumage.dark),
    ]


def _eye(rng: np.random.Generator, level: int, plumage: _Colours, size: float = 1.0) -> list[Shape]:
    """A dark eye in a pale ring (level 0) or on a pale stripe (1)."""
    centre = EYE + rng.normal(0, 0.4, 2)
    start, end, width = EYE_STRIPE
    mark = stroke(centre + start, centre + end, width) if level == 1 else disc(centre, EYE_RING)
    shapes = [
        (mark, plumage.mark),
        (disc(centre, 3.1), plumage.dark),
        (disc(centre + np.array((1, -1)), 0.9), (255, 255, 255)),
    ]
    return [(scaled(points, centre, size), colour) for points, colour in shapes]


def _crown(level: int, plumage: _Colours, size: float) -> list[Shape]:
    """A pale cap (level 0) or two pale lines along it (1)."""
    lines = [stroke(*ends, 1.9) for line in CROWN_LINES for ends in itertools.pairwise(line)]
    return [(scaled(mark, CENTRES["crown"], size), plumage.mark) for mark in ([CROWN], lines)[level]]


def _throat(level: int, plumage: _Colours, size: float) -> list[Shape]:
    """One dark spot (level 0) or two smaller ones (1)."""
    spots = [disc(np.array(centre), radius) for centre, radius in THROAT[level]]
    return [(scaled(spot, CENTRES["throat"], size), plumage.dark) for spot in spots]
