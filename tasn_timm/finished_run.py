"""A run that has ended with its test: what may be told of it, and in what it is not the package's recipe."""

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from .data.sources import BUILT_IN
from .errors import UserError
from .recipe import FREE_OPTIONS, RECIPES, PaperRow, Recipe, load_recipe
from .recipe_cards import recipe_cards
from .weights import CONFIG, weights_in

PINNED = re.compile(r"([\w.-]+/[\w.-]+)@([0-9a-f]{40})")  # as `data.splits.pinned` names data of the Hub
PERSONAL = (*FREE_OPTIONS, "data", "seed", "cpu")  # options that two runs of one recipe may have otherwise
UNTOLD = ("data", "model", "initial_checkpoint", "images and labels")  # whose values are paths, or a digest
UNCONFIGURED = dict(mixed_precision="no", torchcompile="no")  # what null is where nobody has configured accelerate


class FinishedRun(NamedTuple):
    """What training has left, to be published."""

    name: str  # of the recipe
    folder: Path
    recipe: Recipe
    config: dict[str, Any]  # of best/
    test: dict[str, float]  # what was measured at the end
    steps: int  # of the optimizer
    planned_steps: int  # of all epochs
    inexact: list[dict[str, list]]  # option -> then and now, of each time that it was resumed with others

    @property
    def dataset(self) -> tuple[str | None, str | None, str]:
        """Id on the Hub or built-in name, commit, and a name to show.

        A run names data of the Hub with its commit, so "user/name" alone is a folder, and its path nobody's business.
        """
        if on_hub := PINNED.fullmatch(self.recipe.data):
            return on_hub[1], on_hub[2], on_hub[1]
        if self.recipe.data in BUILT_IN:
            return self.recipe.data, None, self.recipe.data
        return None, None, Path(self.recipe.data).name or "a folder"

    @property
    def license(self) -> str | None:
        """Of the weights that it started from; None without any, or where it is not known."""
        return self.config["pretrained_cfg"].get("license")

    @property
    def public_recipe(self) -> Recipe:
        """The recipe with names in the place of this machine's paths."""
        dataset, _, shown = self.dataset
        model, compare, start = self.recipe.model, self.recipe.compare, self.recipe.initial_checkpoint
        if model.startswith("local-dir:"):
            model = f"local-dir:{Path(model.removeprefix('local-dir:')).name}"
        return replace(
            self.recipe,
            data=self.recipe.data if dataset else shown,
            model=model,
            compare=compare and Path(compare).name,
            initial_checkpoint=start and Path(start).name,
            output="runs",
        )

    @property
    def differences(self) -> list[str]:
        """In what this is not the package's recipe of that name, or any other recipe as it stands; as text."""
        cut = [f"ended after {self.steps} of {self.planned_steps} steps"] if self.steps < self.planned_steps else []
        resumed = [f"resumed with other settings ({', '.join(map(_change, each.items()))})" for each in self.inexact]
        return [*self._other_options(), *cut, *resumed]

    def _other_options(self) -> Iterator[str]:
        ours = self.package_recipe
        if ours is None:
            return
        personal = set(PERSONAL)
        if not self._is_data_of(ours):
            personal.add("num_classes")
            yield f"other data ({self.dataset[2]})"
        for option, value in asdict(self.public_recipe).items():
            there = getattr(ours, option)
            same = (there,) if there is not None else (None, UNCONFIGURED.get(option))
            if option not in personal and value not in same:
                yield f"{option} {value} (there {there})"

    @property
    def package_recipe(self) -> Recipe | None:
        """The package's recipe of that name, if there is one."""
        return load_recipe(self.name) if (RECIPES / f"{self.name}.yaml").is_file() else None

    @property
    def paper(self) -> list[PaperRow]:
        """Figures of the paper for one model and one crop, where the test was on the paper's pictures."""
        ours = self.package_recipe
        if ours is None or not self._is_data_of(ours) or self.recipe.test_split != ours.test_split:
            return []
        rows = (row for card in recipe_cards() if card.name == self.name for row in card.paper)
        return [row for row in rows if row.top1 is not None and row.ensemble == 1 and not row.flip]

    def _is_data_of(self, other: Recipe) -> bool:
        return self.dataset[0] == other.data


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Read what a run has logged, see `training.run.Run`; a last line that a crash has torn is left out.

    Raises:
        UserError: There is nothing, it cannot be read, or a line before the last is damaged.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{str(folder)!r} has no metrics.jsonl: give the folder of a run, such as runs/synthbirds.")
    try:
        texts = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be read ({error.strerror}): give another run.") from error
    lines = []
    for number, text in enumerate(texts, start=1):
        try:
            lines.append(json.loads(text))
        except ValueError as error:
            if number < len(texts):
                raise UserError(f"line {number} of {str(path)!r} is damaged: {error}. Remove it.") from error
    return lines


def read_run(folder: Path) -> FinishedRun:
    """Read the folder of a run that has ended with its test.

    Raises:
        UserError: It is none, its training has not ended, nothing was tested, or its weights are damaged.
    """
    recipe_file, metrics = folder / "recipe.yaml", folder / "metrics.jsonl"
    if not (folder / "best" / CONFIG).is_file() or not recipe_file.is_file() or not metrics.is_file():
        raise UserError(f"{str(folder)!r} is no folder of a run with best/, recipe.yaml and metrics.jsonl: give one.")
    last = (read_metrics(folder) or [{}])[-1]
    if not {"test", "planned_steps", "inexact"} <= last.keys():
        raise UserError(
            f"run {str(folder)!r} has no final evaluation, and a model is published with one: let it end (--resume "
            f"auto), on data with a test split."
        )
    weights_in(folder / "best")
    config = json.loads((folder / "best" / CONFIG).read_text())
    if "tasn" not in config:
        raise UserError(f"{str(folder / 'best')!r} was not saved by training: its config.json says nothing of it.")
    history = {key: last[key] for key in ("test", "planned_steps", "inexact")}
    name, recipe = config["tasn"]["recipe"], load_recipe(str(recipe_file))
    return FinishedRun(name, folder, recipe, config, steps=last["step"], **history)


def _change(option: tuple[str, list]) -> str:
    name, (then, now) = option
    return f"other {name}" if name in UNTOLD else f"{name} {then}, then {now}"
