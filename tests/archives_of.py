"""Small archives in the official layouts of CUB-200-2011, Stanford Cars and iNaturalist 2017."""

import hashlib
import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image

from tasn_timm.data.archives import Archive
from tasn_timm.data.cars196 import CARS196
from tasn_timm.data.cub200 import CUB200
from tasn_timm.data.inat2017 import INAT2017
from tasn_timm.data.official import Official


def jpeg(seed: int) -> bytes:
    """A small picture, another one for every seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (8 + seed % 5, 10, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def tar(path: Path, files: Mapping[str, bytes], *extra: tarfile.TarInfo) -> Path:
    """Write a tar file, compressed as its name says; `extra` are members without content, the last ones."""
    with tarfile.open(path, "w" if path.suffix == ".tar" else "w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
        for entry in extra:
            archive.addfile(entry)
    return path


def zipped(path: Path, files: Mapping[str, bytes]) -> Path:
    """Write a zip file."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def unpacked(folder: Path, files: Mapping[str, bytes]) -> Path:
    """Write files as if an archive had been unpacked to a folder."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@dataclass
class Release:
    """A small dataset as its authors would publish it.

    Args:
        official: Its facts, but for the checksums.
        files: Archive's name -> its files, to be changed before `write`.
        rows: Split -> rows that should come out, with the image's bytes, in order.
    """

    official: Official
    files: dict[str, dict[str, bytes]]
    rows: dict[str, list[dict]] = field(default_factory=dict)

    def write(self, folder: Path) -> tuple[Official, list[Path]]:
        """Write the archives: facts with their checksums, and paths."""
        folder.mkdir(exist_ok=True)
        paths = [_write(folder / name, files) for name, files in self.files.items()]
        return self.facts(paths), paths

    def facts(self, paths: list[Path]) -> Official:
        """The facts with the checksums of these archives."""
        sums = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in paths}
        archives = self.official.archives
        known = tuple(Archive(a.name, sums.get(a.name, a.md5), a.contents) for a in archives)
        return replace(self.official, archives=known)

    def unpack(self, folder: Path) -> Path:
        """Write what the archives unpack to."""
        for files in self.files.values():
            unpacked(folder, files)
        return folder


def _write(path: Path, files: dict[str, bytes]) -> Path:
    if path.suffix == ".mat":
        path.write_bytes(files[path.name])
        return path
    return (zipped if path.suffix == ".zip" else tar)(path, files)


def cub() -> Release:
    """3 birds; 7 images to train on and 5 to test; some lists come before the images, some after."""
    names = ["001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross"]
    labels = [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
    train = [1, 0, 1, 0, 1, 0, 1, 1, 0, 1, 0, 1]
    paths = [f"{names[label]}/{names[label][4:]}_{number:04d}.jpg" for number, label in enumerate(labels)]
    boxes = [[60.0 + number, 27.5, 325.0, 304.0] for number in range(len(labels))]
    images = {f"CUB_200_2011/images/{path}": jpeg(number) for number, path in enumerate(paths)}
    text = {
        "images.txt": paths,
        "image_class_labels.txt": [label + 1 for label in labels],
        "train_test_split.txt": train,
        "bounding_boxes.txt": [" ".join(map(str, box)) for box in boxes],
        "classes.txt": names,
    }
    lists = {
        f"CUB_200_2011/{name}": "".join(f"{i} {value}\n" for i, value in enumerate(values, 1)).encode()
        for name, values in text.items()
    }
    first = "CUB_200_2011/train_test_split.txt"
    others = {"attributes.txt": b"1 has_bill_shape\n", "CUB_200_2011/images/readme": b"not listed"}
    shuffled = dict(sorted(images.items(), key=lambda item: hashlib.md5(item[1]).digest()))
    rows = {"train": [], "test": []}
    for number, (name, content) in enumerate(images.items()):
        row = dict(bytes=content, path=name.rpartition("/")[2], label=labels[number], image_id=str(number + 1))
        rows["train" if train[number] else "test"].append(row | dict(bbox=boxes[number]))
    official = replace(CUB200, classes=3, images=dict(train=7, test=5))
    return Release(official, {"CUB_200_2011.tgz": {first: lists.pop(first)} | shuffled | others | lists}, rows)


def cars() -> Release:
    """2 cars; 4 images to train on and 3 to test."""
    names = ["AM General Hummer SUV 2000", "Acura RL Sedan 2012"]
    labels = dict(train=[0, 1, 1, 0], test=[1, 0, 1])
    files, rows, mats = {}, {}, {}
    for split in ("train", "test"):
        images = {f"{number:05d}.jpg": jpeg(100 * len(split) + number) for number in range(1, len(labels[split]) + 1)}
        files[f"cars_{split}.tgz"] = {f"cars_{split}/{name}": content for name, content in images.items()}
        mats[split] = cars_mat(labels[split], list(images))
        rows[split] = [
            dict(bytes=content, path=name, label=label, image_id=f"{split}/{name}", bbox=[39, 116 + i, 530, 259 - i])
            for i, (label, (name, content)) in enumerate(zip(labels[split], images.items()))
        ]
    files["car_devkit.tgz"] = {
        "devkit/README.txt": b"",
        "devkit/cars_meta.mat": mat(class_names=np.array(names, object)[None]),
        "devkit/cars_train_annos.mat": mats["train"],
        "devkit/cars_test_annos.mat": cars_mat(None, list(images)),
    }
    files["cars_test_annos_withlabels.mat"] = {"cars_test_annos_withlabels.mat": mats["test"]}
    return Release(replace(CARS196, classes=2, images=dict(train=4, test=3)), files, rows)


def mat(**variables: np.ndarray) -> bytes:
    """A .mat file."""
    from scipy.io import savemat

    file = io.BytesIO()
    savemat(file, variables)
    return file.getvalue()


def cars_mat(labels: list[int] | None, names: list[str]) -> bytes:
    """The annotations of Stanford Cars; without labels as in its devkit."""
    keys = ["bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname"]
    rows = [[39, 116 + i, 569, 375, labels[i] + 1 if labels else None, name] for i, name in enumerate(names)]
    kept = [key for key in keys if labels or key != "class"]
    values = [tuple(value for key, value in zip(keys, row) if key in kept) for row in rows]
    return mat(annotations=np.array(values, dtype=[(key, object) for key in kept])[None])


def inat(image: Callable[[int], bytes] = jpeg, each: tuple[int, int] = (2, 1)) -> Release:
    """13 super-classes of one species each, one of two; two species of one name; `each` train and test images."""
    supers = list(INAT2017.super_classes)
    categories = [dict(id=i, name=f"Species {i}", supercategory=name) for i, name in enumerate(supers)]
    categories.append(dict(id=13, name="Species 0", supercategory="Aves"))
    content = {split: dict(categories=categories, images=[], annotations=[]) for split in ("train", "test")}
    images, rows, number = {}, {"train": [], "test": []}, 0
    for category in categories:
        for split, count in zip(content, each):
            for _ in range(count):
                above, name = category["supercategory"], category["name"]
                path = f"train_val_images/{above}/{name}/{number:032x}.jpg"
                content[split]["images"].append(dict(id=number, file_name=path, license=3))
                content[split]["annotations"].append(dict(id=number, image_id=number, category_id=category["id"]))
                images[path] = image(number)
                row = dict(bytes=images[path], path=path.rpartition("/")[2], label=category["id"])
                rows[split].append(row | dict(image_id=str(number), super=supers.index(above)))
                number += 1
    counts = {name: tuple(n * (2 if name == "Aves" else 1) for n in each) for name in supers}
    totals = {split: 14 * n for split, n in zip(content, each)}
    official = replace(INAT2017, classes=14, images=totals, super_classes=counts)
    names = dict(train="train2017.json", test="val2017.json")
    lists = {names[split]: json.dumps(value).encode() for split, value in content.items()}
    return Release(official, {"train_val_images.tar.gz": images, "train_val2017.zip": lists}, rows)


RELEASES = dict(cub200=cub, cars196=cars, inat2017=inat)
