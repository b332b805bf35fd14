"""Checkpoints: folders that are there complete or not at all, and can tell whether they still are."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ..files import digest

MANIFEST = "manifest.json"


class Checkpoint(NamedTuple):
    """A whole checkpoint."""

    folder: Path
    about: dict[str, Any]  # what it was saved with


class Checkpoints:
    """The checkpoints of a run, FOLDER/epoch-..., the newest of which has the last name in the order of the alphabet.

    Args:
        folder: Of all of them.
        keep: How many; older ones are removed once a new one is complete.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def save(self, name: str, write: Callable[[Path], None], about: dict[str, Any]) -> Path:
        """Write a checkpoint aside, bring it to the disk, give it a manifest, and only then its name.

        Args:
            name: Of its folder; one of the same name is replaced.
            write: Puts files into a folder.
            about: JSON values, returned by `newest`; infinities and NaN (the norm of a gradient in fp16) are allowed.

        Raises:
            OSError: It could not be written, say on a full disk; the others are untouched and nothing is left of it.
        """
        self.folder.mkdir(exist_ok=True)
        self.clear()
        aside = self.folder / f".{name}"
        aside.mkdir()
        try:
            write(aside)
            files = {path.name: _describe(path) for path in sorted(aside.iterdir())}
            (aside / MANIFEST).write_text(json.dumps(dict(about=about, files=files), indent=1) + "\n")
            _sync(aside / MANIFEST)
            _sync(aside)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        target = self.folder / name
        if target.exists():
            self._remove(target)
        aside.rename(target)
        _sync(self.folder)
        for old in self.names()[: -self.keep]:
            self._remove(self.folder / old)
        return target

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """Find the newest whole one.

        Returns:
            It, or None, and what is wrong with each newer one.
        """
        broken = []
        for name in reversed(self.names()):
            folder = self.folder / name
            try:
                return Checkpoint(folder, _checked(folder)), broken
            except (OSError, ValueError, KeyError, TypeError) as error:
                broken.append(f"{folder}: {error}")
        return None, broken

    def names(self) -> list[str]:
        """Names of all, whole or not, the oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(path.name for path in self.folder.glob("epoch-*"))

    def set_aside(self, newest: str) -> None:
        """Give those that follow `newest`, which are broken, names under which they are no longer looked for."""
        for name in self.names():
            if name > newest:
                aside = self.folder / f"broken-{name}"
                shutil.rmtree(aside, ignore_errors=True)
                (self.folder / name).rename(aside)

    def clear(self) -> None:
        """Remove what interrupted savings and removals have left."""
        for path in self.folder.glob(".*"):
            shutil.rmtree(path, ignore_errors=True)

    def _remove(self, folder: Path) -> None:
        # Under another name first: what is left of an interrupted removal is no broken checkpoint.
        aside = folder.with_name(f".removed-{folder.name}")
        folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


def link_or_copy(source: Path, target: Path) -> None:
    """Put a file that is only ever replaced, never changed, into a second folder at no cost where possible."""
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def _describe(path: Path) -> dict[str, Any]:
    _sync(path)
    return dict(bytes=path.stat().st_size, sha256=digest(path))


def _checked(folder: Path) -> dict[str, Any]:
    """What a whole checkpoint was saved with."""
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"it has no {MANIFEST}")
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except ValueError as error:
        raise ValueError(f"{MANIFEST} is damaged ({error})") from error
    for name, description in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{name} is missing")
        if path.stat().st_size != description["bytes"]:
            raise ValueError(f"{name} has {path.stat().st_size} bytes instead of {description['bytes']}")
        if digest(path) != description["sha256"]:
            raise ValueError(f"{name} is damaged (its SHA-256 is not the recorded one)")
    return manifest["about"]


def _sync(path: Path) -> None:
    """Bring a file or folder to the disk."""
    with contextlib.suppress(PermissionError):  # Windows cannot open folders
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
