"""CUB-200-2011: birds (Wah, Branson, Welinder, Perona and Belongie, 2011), CaltechDATA record 65de6-vp158.

CUB_200_2011.tgz unpacks to CUB_200_2011/ with images/CLASS/FILE.jpg and lists of "id value ...", ids from 1: images.txt
(file), image_class_labels.txt (class id), train_test_split.txt (1: train), bounding_boxes.txt (x y width height in
pixels) and classes.txt (class). The lists may come after the images, which therefore wait in a temporary file.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

from ..errors import UserError
from .archives import Archive, Member, Source
from .official import (
    IMAGE_BYTES,
    Contents,
    Listed,
    Official,
    box_column,
    check_listed,
    columns,
    image_rows,
    parsing,
    read_files,
)

ARCHIVE = "CUB_200_2011.tgz"
IMAGES = "CUB_200_2011/images/"
LISTS = ("images.txt", "image_class_labels.txt", "train_test_split.txt", "bounding_boxes.txt", "classes.txt")


def read(official: Official, sources: Mapping[str, Source], scratch: Path) -> Contents:
    """Read the lists, and the images in the order of their ids; see `Official`."""
    spool = _Spool(scratch)
    texts = read_files(spool.take(sources[ARCHIVE].members(scratch)), LISTS)
    names, listed = _read_lists({name: _parse_list(name, text) for name, text in texts.items()})
    check_listed(official, names, listed)
    return Contents(columns(names, bbox=box_column()), image_rows(spool.members(listed), listed))


class _Spool:
    """Images, one after the other in a temporary file that has no name and so goes away with the process."""

    def __init__(self, folder: Path) -> None:
        self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self.places: dict[str, tuple[int, int]] = {}  # name -> first byte, length
        self.where = ""

    def take(self, members: Iterable[Member]) -> Iterator[Member]:
        """Keep the images, pass on everything else."""
        for member in members:
            self.where = member.where
            if not member.name.startswith(IMAGES):
                yield member
                continue
            if member.name in self.places:
                raise UserError(f"{self.where} has image {member.name!r} twice: use the official archive.")
            start = self.file.tell()
            self.places[member.name] = (start, self.file.write(member.read(IMAGE_BYTES)))

    def members(self, names: Iterable[str]) -> Iterator[Member]:
        """Give back those of these names that are there, in this order."""
        with self.file:
            for name in names:
                if name in self.places:
                    start, length = self.places[name]
                    self.file.seek(start)
                    yield Member(name, self.where, length, partial(io.BytesIO, self.file.read(length)))


def _parse_list(name: str, text: bytes) -> dict[int, list[str]]:
    """Read lines of "id value ..."."""
    values: dict[int, list[str]] = {}
    with parsing(name):
        for line in filter(str.strip, text.decode().splitlines()):
            number, *rest = line.split()
            if int(number) in values or not rest:
                raise ValueError(f"line {line!r}")
            values[int(number)] = rest
    return values


def _read_lists(lists: dict[str, dict[int, list[str]]]) -> tuple[list[str], dict[str, Listed]]:
    """Join the lists: names of the classes, and the images in the order of their ids."""
    files, classes = lists["images.txt"], lists["classes.txt"]
    for name in LISTS[1:4]:
        if lists[name].keys() != files.keys():
            odd = min(lists[name].keys() ^ files.keys())
            raise UserError(f"image id {odd} is in only one of images.txt and {name}: use the official archive.")
    if sorted(classes) != list(range(1, len(classes) + 1)):
        raise UserError(f"the ids in classes.txt are not 1 to {len(classes)}: use the official archive.")
    names = [classes[number][0] for number in sorted(classes)]
    listed: dict[str, Listed] = {}
    for number in sorted(files):
        file = files[number][0]
        with parsing(f"line {number} of the lists of images"):
            label = int(lists["image_class_labels.txt"][number][0]) - 1
            split = {"1": "train", "0": "test"}[lists["train_test_split.txt"][number][0]]
            x, y, width, height = map(float, lists["bounding_boxes.txt"][number])
        name = names[label] if 0 <= label < len(names) else None
        if file.split("/")[0] != name:
            raise UserError(
                f"image {number} is {file!r} in images.txt, but of class {label + 1} in image_class_labels.txt, "
                f"which is {name!r}: use the official archive."
            )
        if IMAGES + file in listed:
            raise UserError(f"images.txt lists {file!r} twice: use the official archive.")
        row = dict(label=label, image_id=str(number), bbox=[x, y, width, height])
        listed[IMAGES + file] = Listed(split, row)
    return names, listed


CUB200 = Official(
    name="cub200",
    title="CUB-200-2011",
    classes=200,
    images=dict(train=5994, test=5794),
    archives=(Archive(ARCHIVE, "97eceeb196236b17998738112f37df78", ("CUB_200_2011",)),),
    read=read,
    recipe="cub200_resnet50_224",
    about="Photographs of birds, <https://www.vision.caltech.edu/datasets/cub_200_2011/>. `image_id` is the id in "
    "images.txt; `bbox` is x, y, width and height in pixels, as in bounding_boxes.txt. As in the paper, training does "
    "not use it.",
    terms="The images are for non-commercial research: see the dataset's own terms.",
)
