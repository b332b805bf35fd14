"""Unreadable images of a training run: logged, counted, and too many of them stop it."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object

from ..data.loading import BadImage
from ..errors import UserError


class BadImages:
    """The distinct unreadable images that a run has met.

    Args:
        limit: How many are allowed.
        split: Name of the training split, for the log.
        file: Where each process adds a line for each that it meets for the first time.
        accelerator: Of the run.
    """

    def __init__(self, limit: int, split: str, file: Path, accelerator: Accelerator) -> None:
        self.limit = limit
        self.split = split
        self.file = file
        self.accelerator = accelerator
        self.found: dict[tuple[str, str], BadImage] = {}

    def add(self, images: Iterable[BadImage]) -> None:
        """Log those that are new.

        Raises:
            UserError: This process alone has met more than allowed.
        """
        for image in images:
            key = (image.image_id, image.file)
            if key in self.found:
                continue
            self.found[key] = image
            line = self._line(image)
            print(f"unreadable image, another one is taken: {line}", file=sys.stderr, flush=True)
            with self.file.open("a") as file:
                file.write(line + "\n")
        self._check()

    def state(self) -> list[list]:
        """JSON values that `restore` takes: what this process has met."""
        return [list(image) for image in self.found.values()]

    def restore(self, state: list[list], everywhere: list[list]) -> None:
        """Go on with what this process had met; the file is made anew from what all had."""
        self.found = {(image.image_id, image.file): image for image in (BadImage(*each) for each in state)}
        if self.accelerator.is_main_process:
            distinct = dict.fromkeys(BadImage(*each) for each in everywhere)
            self.file.unlink(missing_ok=True)
            if distinct:
                self.file.write_text("".join(self._line(image) + "\n" for image in distinct))

    def end_epoch(self) -> None:
        """Count what all processes have met.

        Raises:
            UserError: More than allowed; on all of them.
        """
        if self.limit and self.accelerator.num_processes > 1:
            self.found = dict(gather_object(list(self.found.items())))
        self._check()

    def _line(self, image: BadImage) -> str:
        return json.dumps(dict(split=self.split) | image._asdict())

    def _check(self) -> None:
        if len(self.found) > self.limit:
            raise UserError(
                f"{len(self.found)} images of split {self.split!r} cannot be read, more than --max-bad-images "
                f"{self.limit}; they are listed in {str(self.file)!r}. Replace or remove them."
            )
