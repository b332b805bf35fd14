"""Stanford Cars (Krause, Stark, Deng and Fei-Fei, 2013). Its authors no longer offer the files.

cars_train.tgz and cars_test.tgz unpack to cars_train/ and cars_test/ with 00001.jpg and so on; car_devkit.tgz unpacks
to devkit/ with cars_meta.mat (names of the classes) and cars_train_annos.mat (for each image fname, class from 1, and a
box). cars_test_annos_withlabels.mat has the same for the test images; the devkit's cars_test_annos.mat has no classes.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from .archives import Archive, Source
from .official import Contents, Listed, Official, box_column, check_listed, columns, image_rows, parsing, read_files

if TYPE_CHECKING:
    import numpy as np

TEST_LABELS = "cars_test_annos_withlabels.mat"


def read(official: Official, sources: Mapping[str, Source], scratch: Path) -> Contents:
    """Read the lists, and the images to train on before those to test on; see `Official`."""
    _need_scipy()
    files = read_files(sources["car_devkit.tgz"].members(scratch), ("cars_meta.mat", "cars_train_annos.mat"))
    files |= read_files(sources[TEST_LABELS].members(scratch), (TEST_LABELS,))
    with parsing("cars_meta.mat"):
        names = [str(name) for name in _load(files["cars_meta.mat"])["class_names"].ravel()]
    train = dict(_annotations("train", "cars_train_annos.mat", files["cars_train_annos.mat"]))
    test = dict(_annotations("test", TEST_LABELS, files[TEST_LABELS]))
    check_listed(official, names, train | test)
    rows = (
        image_rows(sources[f"cars_{split}.tgz"].members(scratch), listed)
        for split, listed in (("train", train), ("test", test))
    )
    return Contents(columns(names, bbox=box_column()), chain.from_iterable(rows))


def _need_scipy() -> None:
    try:
        import scipy.io  # noqa: F401
    except ImportError as error:
        raise UserError("Stanford Cars' lists are .mat files, which need scipy: pip install scipy.") from error


def _load(content: bytes) -> dict[str, np.ndarray]:
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        return loadmat(io.BytesIO(content), squeeze_me=True)
    except (MatReadError, NotImplementedError) as error:
        raise ValueError(str(error)) from error


def _annotations(split: str, file: str, content: bytes) -> Iterator[tuple[str, Listed]]:
    """Name of each image in its archive, and its columns; boxes become x, y, width, height."""
    with parsing(file):
        annotations = _load(content)["annotations"].ravel()
        if "class" not in annotations.dtype.names:
            raise UserError(f"the annotations of {split} images have no classes: those in {TEST_LABELS} have them.")
        seen: set[str] = set()
        for image in annotations:
            name = str(image["fname"])
            if name in seen:
                raise UserError(f"{file} lists {name!r} twice: use the official file.")
            seen.add(name)
            left, top, right, bottom = (float(image[f"bbox_{key}"]) for key in ("x1", "y1", "x2", "y2"))
            row = dict(label=int(image["class"]) - 1, image_id=f"{split}/{name}")
            yield f"cars_{split}/{name}", Listed(split, row | dict(bbox=[left, top, right - left, bottom - top]))


CARS196 = Official(
    name="cars196",
    title="Stanford Cars",
    classes=196,
    images=dict(train=8144, test=8041),
    archives=(
        Archive("cars_train.tgz", "065e5b463ae28d29e77c1b4b166cfe61", ("cars_train",)),
        Archive("cars_test.tgz", "4ce7ebf6a94d07f1952d94dd34c4d501", ("cars_test",)),
        Archive("car_devkit.tgz", "c3b158d763b6e2245038c8ad08e45376", ("devkit",)),
        Archive(TEST_LABELS, "b0a2b23655a3edd16d84508592a98d10", (TEST_LABELS,)),
    ),
    read=read,
    recipe="cars196_resnet50_336",
    about="Photographs of cars (Krause et al., *3D Object Representations for Fine-Grained Categorization*, 2013). "
    "`image_id` is the split and the file's name; `bbox` is x, y, width and height in pixels, where the lists have two "
    "corners. As in the paper, training does not use it.",
    terms="The images are for non-commercial research: see the dataset's own terms.",
)
