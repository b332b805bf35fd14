"""What the preparation of every dataset has in common: facts, and checks of lists and images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NamedTuple

from ..errors import UserError
from .archives import Archive, Member, Source

if TYPE_CHECKING:
    import datasets

IMAGE_BYTES = 64 << 20
INDEX_BYTES = 64 << 20
# JPEG, PNG, GIF, BMP, TIFF (little- and big-endian); WebP has its size between the two parts of its mark.
SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"BM", b"II*\0", b"MM\0*")


class Contents(NamedTuple):
    """What was found in the archives of a dataset.

    Args:
        features: Columns.
        rows: (split, row), of each split in the order to be written; images are read on the way.
    """

    features: datasets.Features
    rows: Iterator[tuple[str, dict]]


class Listed(NamedTuple):
    """An image of a dataset's lists.

    Args:
        split: "train" or "test".
        columns: Its row, but for the image: "label", "image_id" and others.
    """

    split: str
    columns: dict


@dataclass(frozen=True)
class Official:
    """A dataset as its authors publish it.

    Args:
        name: As in `load_splits`.
        title: As people write it.
        classes: Number of classes, Table 1 of the paper.
        images: Split -> number of images, Table 1 of the paper.
        archives: Files that its authors offer.
        read: (this, archive's name -> where it is, folder for temporary files) -> `Contents`. Raises `UserError`.
        recipe: One to train with.
        about: For the card: homepage and columns, as Markdown.
        terms: For the card: a remark on the licence.
        super_classes: Name -> number of train and test images; empty for data without super-classes.
    """

    name: str
    title: str
    classes: int
    images: Mapping[str, int]
    archives: tuple[Archive, ...]
    read: Callable[[Official, Mapping[str, Source], Path], Contents]
    recipe: str
    about: str
    terms: str
    super_classes: Mapping[str, tuple[int, int]] = field(default_factory=dict)


def columns(names: list[str], **more: object) -> datasets.Features:
    """Make the features "image", "label" and "image_id".

    Args:
        names: Of the classes, in the order of their labels.
        **more: Other columns.
    """
    from datasets import ClassLabel, Features, Image, Value

    return Features(image=Image(), label=ClassLabel(names=names), image_id=Value("string"), **more)


def box_column() -> datasets.List:
    """Make the feature of a box: x and y of its corner at the upper left, width and height, in pixels."""
    from datasets import List, Value

    return List(Value("float32"), length=4)


def read_files(members: Iterable[Member], names: Collection[str], limit: int = INDEX_BYTES) -> dict[str, bytes]:
    """Read a few files and ignore the others.

    Args:
        members: Of one archive or folder; gone through to the end, which checks the checksum.
        names: Of files, without folders.
        limit: Largest size of each in bytes.

    Returns:
        Name without folders -> content.

    Raises:
        UserError: One is missing or there twice.
    """
    found: dict[str, bytes] = {}
    where = "an empty archive"
    for member in members:
        name, where = PurePosixPath(member.name).name, member.where
        if name in names:
            if name in found:
                raise UserError(f"{where} has {name} twice: use the official archive.")
            found[name] = member.read(limit)
    missing = [name for name in names if name not in found]
    if missing:
        raise UserError(f"{where} has no {', '.join(missing)}: use the official archive, with all that is in it.")
    return found


@contextmanager
def parsing(what: str) -> Iterator[None]:
    """Tell in one line, as a `UserError`, that a file is not laid out as its reader expects.

    Args:
        what: The file's name.
    """
    try:
        yield
    except UserError:
        raise
    except (ArithmeticError, AttributeError, LookupError, OSError, RecursionError, TypeError, ValueError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{what} is not laid out as the official file is ({reason}): download it again.") from error


def check_listed(official: Official, names: list[str], listed: Mapping[str, Listed]) -> None:
    """Compare a dataset's lists with Table 1 of the paper.

    Args:
        official: What should be there.
        names: Of the classes.
        listed: File name -> image.

    Raises:
        UserError: Other numbers of classes or images, two classes of one name, labels out of range, or a class
            without an image to train on.
    """
    counts = Counter(image.split for image in listed.values())
    got, expected = (
        ", ".join([f"{classes} classes", *(f"{images[split]} {split} images" for split in official.images)])
        for classes, images in ((len(names), counts), (official.classes, official.images))
    )
    if got != expected:
        raise UserError(
            f"{official.title} has {expected} (Table 1 of the paper), but the lists given have {got}: use the official "
            f"archives, complete and of the same release."
        )
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"two classes of {official.title} are called {twice[0]!r}: use the official archives.")
    labels = {image.columns["label"] for image in listed.values()}
    if not labels <= set(range(len(names))):
        raise UserError(
            f"labels of {official.title} go from {min(labels)} to {max(labels)}, counted from 0, but there are "
            f"{len(names)} classes: use the official archives."
        )
    untrained = set(range(len(names))) - {image.columns["label"] for image in listed.values() if image.split == "train"}
    if untrained:
        raise UserError(
            f"class {names[min(untrained)]!r} of {official.title} has no image to train on: use the official archives."
        )


def image_rows(members: Iterable[Member], listed: Mapping[str, Listed]) -> Iterator[tuple[str, dict]]:
    """Read the images that are listed, and ignore other files.

    Args:
        members: Of one archive or folder.
        listed: Name of each -> its split and columns.

    Returns:
        (split, row) of each, in the order of the members.

    Raises:
        UserError: One is missing, there twice, too large, or no image.
    """
    found: set[str] = set()
    where = "an empty archive"
    for member in members:
        where = member.where
        image = listed.get(member.name)
        if image is not None:
            if member.name in found:
                raise UserError(f"{where} has image {member.name!r} twice: use the official archive.")
            found.add(member.name)
            picture = dict(bytes=_read_image(member), path=PurePosixPath(member.name).name)
            yield image.split, dict(image=picture, **image.columns)
    missing = [name for name in listed if name not in found]
    if missing:
        raise UserError(
            f"{where} lacks {len(missing)} of the {len(listed)} images that are listed, the first {missing[0]!r}: use "
            f"the official archive, or unpack it again, completely."
        )


def _read_image(member: Member) -> bytes:
    content = member.read(IMAGE_BYTES)
    if not content.startswith(SIGNATURES) and not (content[:4] == b"RIFF" and content[8:12] == b"WEBP"):
        raise UserError(
            f"{member.name!r} in {member.where} is not an image (it starts with {content[:8]!r}): it is damaged; "
            f"download the archive again."
        )
    return content
