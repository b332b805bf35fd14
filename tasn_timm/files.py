"""Files that are there complete or not at all, and what is in them."""

import contextlib
import csv
import hashlib
import io
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from .errors import UserError

STDOUT = Path("-")  # as the file of --json or --csv


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_whole(path: Path, content: str | bytes, option: str) -> None:
    """Write a file that a command was asked for so that it is there complete or not at all.

    Args:
        path: Of the file; replaced where there is one.
        content: Text or bytes.
        option: That named it, for the message.

    Raises:
        UserError: It cannot be written.
    """
    with completing(path, option) as aside:
        # Names of files may have bytes that are no UTF-8; these become escapes, in JSON valid ones.
        aside.write_bytes(content.encode(errors="backslashreplace") if isinstance(content, str) else content)


@contextlib.contextmanager
def completing(path: Path, option: str) -> Iterator[Path]:
    """Give a file beside `path` to write to, which takes its name at the end of the block if nothing went wrong.

    Args:
        path: Of the file that a command was asked for; replaced where there is one.
        option: That named it, for the message.

    Raises:
        UserError: It cannot be written; before the block where that shows already.
    """
    aside = _aside(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(f"{str(path)!r} is a folder")
        aside.touch()
        yield aside
        aside.replace(path)
    except OSError as error:
        raise _unwritable(path, option, error) from error
    finally:
        with contextlib.suppress(OSError):  # it was moved, or never there
            aside.unlink()


def check_writable(path: Path | None, option: str) -> None:
    """Check, before the work, that `write_whole` or `write_text` can write to a path; None for no file.

    Raises:
        UserError: It cannot be written.
    """
    if path is None or path == STDOUT:
        return
    try:
        if path.is_dir():
            raise IsADirectoryError(f"{str(path)!r} is a folder")
        _aside(path).touch()
        _aside(path).unlink()
    except OSError as error:
        raise _unwritable(path, option, error) from error


def check_outputs(**paths: Path | None) -> None:
    """`check_writable` for several options by their names, of which one at most may be standard output."""
    given: dict[Path, list[str]] = {}
    for name, path in paths.items():
        option = f"--{name.replace('_', '-')}"
        check_writable(path, option)
        if path is not None:
            given.setdefault(path.absolute(), []).append(option)
    for options in given.values():
        if len(options) > 1:
            raise UserError(f"{' and '.join(options)} name the same file: give each a file of its own.")


def write_text(path: Path | None, text: str, option: str) -> None:
    """Write text to the file of an option, to standard output for "-", and nowhere for None."""
    if path == STDOUT:
        sys.stdout.write(text)
    elif path is not None:
        write_whole(path, text, option)


def csv_text(rows: Iterable[Iterable[object]]) -> str:
    """Rows as a CSV file; None is an empty cell."""
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(rows)
    return file.getvalue()


def _aside(path: Path) -> Path:
    return path.with_name(f".{os.getpid()}.{path.name}")  # with its ending, which says what it is


def _unwritable(path: Path, option: str, error: OSError) -> UserError:
    reason = error.strerror or str(error)
    return UserError(f"{option} {str(path)!r} cannot be written ({reason}): give a file in an existing folder.")
