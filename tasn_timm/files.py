"""Files that are there complete or not at all, and what is in them."""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from .errors import UserError


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_whole(path: Path, text: str | None) -> None:
    """Write the file of a command's --json so that it is there complete or not at all.

    Args:
        path: Of the file; replaced where there is one.
        text: What to write; None to only check that it can be written, before the work.

    Raises:
        UserError: It cannot be written.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if path.is_dir():
            raise IsADirectoryError(f"{str(path)!r} is a folder")
        aside.write_text(text or "", encoding="utf-8")
        if text is not None:
            aside.replace(path)
    except OSError as error:
        raise UserError(
            f"--json {str(path)!r} cannot be written ({error}): give a file in an existing folder."
        ) from error
    finally:
        with contextlib.suppress(OSError):  # it was moved, or never there
            aside.unlink()


@contextlib.contextmanager
def completing(path: Path) -> Iterator[Path]:
    """Give a file beside `path` to write to, which takes its name at the end of the block if nothing went wrong.

    Raises:
        UserError: It cannot be written; before the block where that shows already.
    """
    aside = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        if path.is_dir():
            raise IsADirectoryError(f"{str(path)!r} is a folder")
        aside.touch()
        yield aside
        aside.replace(path)
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be written ({error}): give a file in an existing folder.") from error
    finally:
        with contextlib.suppress(OSError):  # it was moved, or never there
            aside.unlink()
