"""Archives, and the folders they were unpacked to, as streams of files: read once, and never unpacked to the disk.

Their content is not trusted: names that lead out of them, links and devices are refused, and sizes are bounded.
"""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import os
import shutil
import stat
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO

from tqdm import tqdm

from ..errors import UserError

CHUNK = 1 << 20  # bytes read at once
EXTENDED_HEADER = 1 << 20  # bytes: a tar file's long name, say, which tarfile reads into memory


@dataclass(frozen=True)
class Archive:
    """An official archive: .tar, .tar.gz, .tgz, .zip, or a file that stands for itself.

    Args:
        name: File name, by which it is recognised.
        md5: Of the official file.
        contents: Files and folders that it unpacks to; of a file that stands for itself, its own name.
    """

    name: str
    md5: str
    contents: tuple[str, ...]


@dataclass(frozen=True)
class Member:
    """A file inside an archive or folder, to be read before the next one is asked for.

    Args:
        name: Relative, parts separated by "/", without "..".
        where: The archive's or folder's path, for messages.
        size: In bytes, as the archive says.
        open: Gives the file.
    """

    name: str
    where: str
    size: int
    open: Callable[[], AbstractContextManager[IO[bytes]]]

    def read(self, limit: int) -> bytes:
        """Read the whole file.

        Args:
            limit: Largest size in bytes that makes sense.

        Raises:
            UserError: It is larger, not of the size that the archive says, or cannot be read.
        """
        if self.size > limit:
            raise UserError(
                f"{self.name!r} in {self.where} is larger than the {limit >> 20} MiB that such a file may have: "
                f"use the official archive."
            )
        with _readable(self.where), self.open() as file:
            content = file.read(self.size + 1)
            if len(content) != self.size:
                raise EOFError(f"{self.name!r} is not of {self.size} bytes")
        return content


@dataclass(frozen=True)
class Source:
    """An archive as the user has it.

    Args:
        archive: Which one.
        path: The file, or a folder with what it unpacks to.
        base: Of a folder, what names are relative to: the folder itself or, where it is the archive's top folder, the
            one above.
    """

    archive: Archive
    path: Path
    base: Path

    @property
    def checked(self) -> str:
        """How the content is known to be the official one: the checksum, or only what the files themselves say."""
        return "from an unpacked folder" if self.path.is_dir() else f"md5 {self.archive.md5}"

    def members(self, scratch: Path) -> Iterator[Member]:
        """Go once through the files, in the archive's own order or sorted by folder.

        Args:
            scratch: Folder for a copy of a zip file, whose table of contents is at its end.

        Raises:
            UserError: Damaged, of another checksum (known at the end), or a file that is refused.
        """
        return _folder_members(self) if self.path.is_dir() else _archive_members(self, scratch)


def find_sources(archives: Sequence[Archive], given: Sequence[Path]) -> dict[str, Source]:
    """Tell by their names which archives files and folders are.

    Args:
        archives: All that are needed.
        given: Archives; folders with what they unpack to; or such a top folder itself.

    Returns:
        Archive's name -> where it is.

    Raises:
        UserError: One is missing, given twice, or none of these.
    """
    sources: dict[str, Source] = {}
    for path in given:
        found = _recognise(archives, path)
        for source in found:
            if source.archive.name in sources:
                both = f"{str(sources[source.archive.name].path)!r} and {str(path)!r}"
                raise UserError(f"{source.archive.name} is given twice, by {both}: leave out one of them.")
            sources[source.archive.name] = source
    missing = [archive for archive in archives if archive.name not in sources]
    if missing:
        raise UserError(
            f"--archive lacks {_listing(missing)}: give the official archive, or a folder that it was unpacked to."
        )
    return sources


def _recognise(archives: Sequence[Archive], path: Path) -> list[Source]:
    path = Path(os.path.abspath(path.expanduser()))  # "." has a name, too
    if not path.exists():
        raise UserError(f"archive {str(path)!r} does not exist: give {_listing(archives)}.")
    if path.is_file():
        found = [Source(archive, path, path) for archive in archives if archive.name == path.name]
    else:
        inside = [archive for archive in archives if all((path / top).exists() for top in archive.contents)]
        found = [Source(archive, path, path) for archive in inside]
        found = found or [Source(archive, path, path.parent) for archive in archives if path.name in archive.contents]
    if not found:
        raise UserError(
            f"{str(path)!r} is none of the archives needed, which are told by their names: {_listing(archives)}. "
            f"Give one of them, or a folder with what it unpacks to."
        )
    return found


def _listing(archives: Sequence[Archive]) -> str:
    unpacked = [" and ".join(top for top in archive.contents if top != archive.name) for archive in archives]
    return ", ".join(
        f"{archive.name} (unpacked: {tops})" if tops else archive.name for archive, tops in zip(archives, unpacked)
    )


def _folder_members(source: Source) -> Iterator[Member]:
    boundary = source.path.resolve()
    tops = [source.base / top for top in source.archive.contents]
    for path in _progress(source, _walk(tops), unit=" files"):
        if path.is_symlink() and path != source.path and not path.resolve().is_relative_to(boundary):
            raise UserError(
                f"{str(path)!r} is a link that leads out of {str(source.path)!r}: put the file itself there, or give "
                f"the folder that it leads to."
            )
        if path.is_file():  # neither a folder nor something that never ends
            name = path.relative_to(source.base).as_posix()
            yield Member(name, str(source.path), path.stat().st_size, partial(path.open, "rb"))


def _walk(tops: Sequence[Path]) -> Iterator[Path]:
    """Files, folders and links, sorted; links to folders are not followed."""
    for top in tops:
        yield top
        for folder, folders, files in os.walk(top):
            folders.sort()
            yield from (Path(folder, name) for name in sorted([*files, *folders]))


def _archive_members(source: Source, scratch: Path) -> Iterator[Member]:
    where, archive = str(source.path), source.archive
    size = source.path.stat().st_size
    bar = _progress(source, total=size, unit="B", unit_scale=True)
    with _readable(where), bar, source.path.open("rb", buffering=0) as raw:
        tap = _Tap(raw, bar)
        file = io.BufferedReader(tap, CHUNK)
        if archive.name in archive.contents:
            yield Member(archive.name, where, size, partial(nullcontext, file))
        elif file.peek(4)[:4] == b"PK\x03\x04":
            yield from _zip_members(file, where, scratch)
        else:
            yield from _tar_members(file, where)
        while file.read(CHUNK):  # what follows the last file belongs to the checksum
            pass
    if tap.md5.hexdigest() != archive.md5:
        raise UserError(
            f"{where} has the md5 {tap.md5.hexdigest()}, but the official {archive.name} has {archive.md5}: download "
            f"it again; of a repacked archive, unpack it and give the folder, whose content is checked instead."
        )


def _progress(source: Source, files: Iterator[Path] | None = None, **settings) -> tqdm:
    hidden = not sys.stderr.isatty()
    return tqdm(files, desc=source.archive.name, disable=hidden, leave=False, dynamic_ncols=True, **settings)


class _Tap(io.RawIOBase):
    """The bytes of a file on their way: counted by a progress bar, and hashed."""

    def __init__(self, file: io.RawIOBase, bar: tqdm) -> None:
        self.file = file
        self.bar = bar
        self.md5 = hashlib.md5(usedforsecurity=False)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        count = self.file.readinto(buffer)
        self.md5.update(buffer[:count])
        self.bar.update(count)
        return count


def _tar_members(file: io.BufferedReader, where: str) -> Iterator[Member]:
    plain = gzip.GzipFile(fileobj=file) if file.peek(2)[:2] == b"\x1f\x8b" else file
    with tarfile.open(fileobj=plain, mode="r|", bufsize=CHUNK, tarinfo=_TarEntry) as tar:
        while (entry := tar.next()) is not None:
            tar.members.clear()  # which would grow with every file
            name = _relative(entry.name, where)
            if entry.isreg():
                yield Member(name, where, entry.size, partial(tar.extractfile, entry))


class _TarEntry(tarfile.TarInfo):
    """Refuses what is neither file nor folder as soon as its header is read."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> _TarEntry:
        entry = super().frombuf(buf, encoding, errors)
        extends_the_next = entry.type in (b"x", b"g", b"L", b"K") and entry.size <= EXTENDED_HEADER
        if entry.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE) and not extends_the_next:
            raise _UnsafeEntryError(_strange(entry.name))
        return entry


class _UnsafeEntryError(Exception):
    """Of an entry whose archive is not known where it is met."""


def _zip_members(file: io.BufferedReader, where: str, scratch: Path) -> Iterator[Member]:
    with tempfile.TemporaryFile(dir=scratch) as copy:
        shutil.copyfileobj(file, copy, CHUNK)
        with zipfile.ZipFile(copy) as opened:
            for entry in opened.infolist():
                if stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
                    raise _UnsafeEntryError(_strange(entry.filename))
                name = _relative(entry.filename, where)
                if not entry.is_dir():
                    yield Member(name, where, entry.file_size, partial(opened.open, entry))


def _strange(name: str) -> str:
    return f"{name!r} is a link, a device or the like"


def _relative(name: str, where: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise _UnsafeEntryError(f"{name!r} leads out of the archive")
    return str(path)


@contextmanager
def _readable(where: str) -> Iterator[None]:
    """Tell in one line what is wrong with an archive."""
    try:
        yield
    except _UnsafeEntryError as error:
        raise UserError(
            f"{where} is refused, because {error}, which no official archive has: download it again."
        ) from None
    # Encrypted zip files are a RuntimeError, unknown compressions a NotImplementedError.
    except (EOFError, OSError, RuntimeError, zlib.error, tarfile.TarError, zipfile.BadZipFile) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise  # not the archive's fault
        raise UserError(
            f"{where} cannot be read ({' '.join(str(error).split()) or type(error).__name__}): it is incomplete or "
            f"damaged, or no archive at all; download it again."
        ) from error
