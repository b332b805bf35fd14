"""iNaturalist 2017, the competition's training and validation images (Van Horn et al., CVPR 2018).

train_val_images.tar.gz (about 186 GB) unpacks to train_val_images/SUPER/NAME/FILE.jpg; train_val2017.zip has
train2017.json and val2017.json, each with categories (id from 0, name, supercategory), images (id, file_name) and
annotations (image_id, category_id). The paper tests on the validation images, which are the split "test" here.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from ..errors import UserError
from .archives import Archive, Source
from .official import Contents, Listed, Official, check_listed, columns, image_rows, parsing, read_files

IMAGES, LISTS = "train_val_images.tar.gz", "train_val2017.zip"
FILES = dict(train="train2017.json", test="val2017.json")
JSON_BYTES = 1 << 30


def read(official: Official, sources: Mapping[str, Source], scratch: Path) -> Contents:
    """Read the lists, and the images in the archive's order; see `Official`."""
    from datasets import ClassLabel

    texts = read_files(sources[LISTS].members(scratch), tuple(FILES.values()), JSON_BYTES)
    supers = list(official.super_classes)
    categories, listed = None, {}
    for split, file in FILES.items():
        with parsing(file):
            content = json.loads(texts.pop(file))
            listed |= _list_images(split, file, content, supers)
        if categories not in (None, content["categories"]):
            raise UserError(f"{' and '.join(FILES.values())} have different categories: use the official archive.")
        categories = content["categories"]
    names = _class_names(categories)
    check_listed(official, names, listed)
    _check_super_classes(official, supers, listed)
    rows = image_rows(sources[IMAGES].members(scratch), listed)
    return Contents(columns(names, super=ClassLabel(names=supers)), rows)


def _list_images(split: str, file: str, content: dict, supers: list[str]) -> dict[str, Listed]:
    """Name of each image in its archive, and its columns."""
    categories = {category["id"]: category for category in content["categories"]}
    if sorted(categories) != list(range(len(content["categories"]))):
        raise UserError(f"the ids of the categories in {file} are not 0 to N - 1: use the official archive.")
    labels = {annotation["image_id"]: annotation["category_id"] for annotation in content["annotations"]}
    images = {image["id"]: image["file_name"] for image in content["images"]}
    if labels.keys() != images.keys() or not len(labels) == len(content["annotations"]) == len(content["images"]):
        raise UserError(
            f"{file} has not exactly one annotation for each image ({len(content['images'])} images, "
            f"{len(content['annotations'])} annotations): use the official archive."
        )
    listed = {}
    for number, name in images.items():
        category = categories[labels[number]]
        *_, above, folder, image = ("", "", *name.split("/"))
        if (above, folder) != (category["supercategory"], category["name"]):
            raise UserError(
                f"image {number} of {file} is {name!r}, but its category is {category['supercategory']}/"
                f"{category['name']}: use the official archive."
            )
        row = dict(label=category["id"], image_id=str(number), super=supers.index(above))
        listed[f"train_val_images/{above}/{folder}/{image}"] = Listed(split, row)
    return listed


def _class_names(categories: list[dict]) -> list[str]:
    """The categories' names; with the super-class where two have the same."""
    categories = sorted(categories, key=lambda category: category["id"])
    counts = Counter(category["name"] for category in categories)
    return [
        category["name"] if counts[category["name"]] == 1 else f"{category['name']} ({category['supercategory']})"
        for category in categories
    ]


def _check_super_classes(official: Official, supers: list[str], listed: Mapping[str, Listed]) -> None:
    """The competition's own table of super-classes is a second check beside Table 1."""
    counts = Counter((supers[image.columns["super"]], image.split) for image in listed.values())
    for name, expected in official.super_classes.items():
        got = counts[name, "train"], counts[name, "test"]
        if got != expected:
            raise UserError(
                f"super-class {name} has {got[0]} train and {got[1]} test images, but officially it has {expected[0]} "
                f"and {expected[1]}: use the official archives."
            )


INAT2017 = Official(
    name="inat2017",
    title="iNaturalist 2017",
    classes=5089,
    images=dict(train=579184, test=95986),
    archives=(
        Archive(IMAGES, "7c784ea5e424efaec655bd392f87301f", ("train_val_images",)),
        Archive(LISTS, "444c835f6459867ad69fcb36478786e7", tuple(FILES.values())),
    ),
    read=read,
    recipe="inat2017_resnet101_224",
    about="Photographs of plants, animals and others, <https://github.com/visipedia/inat_comp/tree/master/2017>. The "
    "competition's validation images are the split `test`, as in the paper. `super` is one of 13 super-classes, in "
    "the order of the paper's Table 10; `image_id` is the id in the JSON file of the image's split.",
    terms="Every image has a licence of its own, some of them CC BY-NC: see the dataset's own terms.",
    super_classes=dict(
        Plantae=(158407, 38206),
        Insecta=(100479, 18076),
        Aves=(214295, 21226),
        Reptilia=(35201, 5680),
        Mammalia=(29333, 3490),
        Fungi=(5826, 1780),
        Amphibia=(15318, 2385),
        Mollusca=(7536, 1841),
        Animalia=(5228, 1362),
        Arachnida=(4873, 1086),
        Actinopterygii=(1982, 637),
        Chromista=(398, 144),
        Protozoa=(308, 73),
    ),
)
