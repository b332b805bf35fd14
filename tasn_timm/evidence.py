"""What the paper claims, on data that everybody can draw: contenders, tables, results of runs, and their statistics.

`evidence.yaml` names contenders (a recipe and what is changed of it) and tables (which of them are compared). Every run
leaves a JSON file, `Result`; RESULTS.md is written from these alone (`evidence_report`).
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from math import sqrt
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from scipy.stats import t as student_t

from .errors import UserError, unknown
from .files import write_whole
from .finished_run import UNCONFIGURED
from .recipe import FREE_OPTIONS, Recipe, load_recipe

FILE = Path(__file__).with_name("evidence.yaml")
REPORT, FIGURE = "RESULTS.md", "RESULTS.png"
CONFIDENCE = 0.95
FEWEST = 3  # seeds from which an order of two rows is decided
RESERVED = ("seed", "output", "initial_checkpoint", "compare")  # options that a run has from elsewhere


class Contender(NamedTuple):
    """A recipe with some of its options changed."""

    name: str
    recipe: str
    options: dict[str, Any]  # of `Recipe`; "{seed}" in text is the run's
    start: str | None = None  # contender whose run of the same seed it starts from

    def recipe_of(self, seed: int) -> Recipe:
        """All options of the run of a seed, but where it writes and starts from.

        Raises:
            UserError: It is no recipe, or has no validation or test split.
        """
        options = {
            name: value.replace("{seed}", str(seed)) if isinstance(value, str) else value
            for name, value in self.options.items()
        }
        recipe = load_recipe(self.recipe, options | dict(seed=seed, compare=None))
        if recipe.val_split is None or recipe.test_split is None:
            raise UserError(f"contender {self.name!r} needs a validation and a test split: its recipe has null.")
        return recipe

    def made(self, result: "Result", start_weights: str | None) -> bool:
        """Whether a result is of this contender as it is now, and started from weights with this SHA-256, if any."""
        made_of = (result.contender, result.recipe, result.start, result.start_weights)
        if made_of != (self.name, self.recipe, self.start, start_weights):
            return False
        return same_options(result.options, self.recipe_of(result.seed))


def what_counts(recipe: Recipe) -> dict[str, Any]:
    """Options of a recipe that its weights at the end depend on, but the place of the weights that it starts from.

    What it leaves to accelerate's configuration is as where nobody has configured it.
    """
    left_out = (*FREE_OPTIONS, "initial_checkpoint")
    options = {
        name: UNCONFIGURED.get(name) if value is None else value
        for name, value in asdict(recipe).items()
        if name not in left_out
    }
    return json.loads(json.dumps(options))


def same_options(options: Mapping[str, Any], recipe: Recipe) -> bool:
    """Whether what counts of a recipe is as it was; options that there were not then are to have their defaults."""
    return what_counts(Recipe()) | dict(options) == what_counts(recipe)


class Row(NamedTuple):
    """A contender in a table."""

    contender: str
    row: str  # what it is called there
    paper: float | None = None  # the paper's accuracy of what it stands for, per cent
    first: bool = False  # of rows that are compared with each other, and not with those above


class Table(NamedTuple):
    """Contenders that are compared, in the paper's order."""

    name: str
    title: str
    rows: list[Row]
    about: str = ""  # what is to know before the table
    finding: str = ""  # what we read out of it
    against: str | None = None  # contender that all others are compared with; None: each with the row above
    views: bool = False  # whether to show the accuracy of each classifier on each view
    tuning: bool = False  # settings that are chosen between: on the validation split
    seeds: Sequence[int] = (0, 1, 2)  # of each row; a contender may have more of them elsewhere

    def take(self, results: "Results") -> "Results":
        """Those of its seeds."""
        taken = {name: [run for run in runs if run.seed in self.seeds] for name, runs in results.items()}
        return {name: runs for name, runs in taken.items() if runs}

    def accuracy(self, result: "Result") -> float:
        """What the table shows of a run, per cent: of the test split, or in tuning of the best epoch's validation."""
        return max(result.validation) if self.tuning else result.top1


class Target(NamedTuple):
    """What we want one contender to reach, seen from another; or one kind of them, by the mean over pairs."""

    target: str  # in words
    pairs: Sequence[tuple[str, str]]  # a contender, and the one that it is seen from
    points: float = 0.0  # of test accuracy that it is to be ahead of the other by, at least; negative: may be behind
    flops: float | None = None  # at most, as a share of the other's


class Plan(NamedTuple):
    """All of evidence.yaml."""

    contenders: dict[str, Contender]
    tables: dict[str, Table]
    targets: Sequence[Target] = ()


@dataclass
class Result:
    """What a run has shown, and what made it."""

    contender: str
    seed: int
    recipe: str
    options: dict[str, Any]  # `what_counts` of all of them
    start: str | None
    start_weights: str | None  # SHA-256 of what it started from
    weights: str  # SHA-256 of the model that was tested
    top1: float  # of the test split, read once, per cent
    images: int  # of it
    validation: list[float]  # top-1 after each epoch, per cent
    train_loss: list[float]  # mean of each epoch
    views: dict[str, float] | None  # validation top-1 of each classifier and view, see `reproduce.accuracy_of_views`
    mflops: float  # of an image at inference, 2 per multiply-add
    parameters: int
    steps: int  # of the optimizer
    images_per_second: float  # median over the epochs, of training
    environment: dict[str, Any]  # commit, versions, machine

    @property
    def slope(self) -> float:
        """How much the validation accuracy rose from one eighth of the epochs to the next at the end, in points."""
        eighth = max(1, len(self.validation) // 8)
        last, before = self.validation[-eighth:], self.validation[-2 * eighth : -eighth] or self.validation[:1]
        return statistics.mean(last) - statistics.mean(before)


def read_plan(path: Path = FILE) -> Plan:
    """Read contenders and tables.

    Raises:
        UserError: It is not such a file, or names a contender that it does not have.
    """
    try:
        content = yaml.safe_load(path.read_text())
        common = content.get("common", {})
        contenders = {name: _contender(name, common | given) for name, given in content["contenders"].items()}
        tables = {name: _table(name, given) for name, given in content["tables"].items()}
        targets = [Target(**given) for given in content.get("targets", ())]
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{str(path)!r} is no plan of contenders and tables ({reason}): see {FILE.name}.") from error
    starts = [contender.start for contender in contenders.values() if contender.start]
    wanted = [row.contender for table in tables.values() for row in table.rows]
    wanted += [table.against for table in tables.values() if table.against]
    wanted += [name for target in targets for pair in target.pairs for name in pair]
    for name in starts + wanted:
        if name not in contenders:
            raise unknown(f"contender in {path.name}:", name, contenders)
    for name in starts:
        if contenders[name].start:
            raise UserError(f"contender {name!r} in {path.name} is the start of another, so it cannot have one.")
    return Plan(contenders, tables, targets)


def _table(name: str, given: dict[str, Any]) -> Table:
    table = Table(name, **given | dict(rows=[Row(**row) for row in given["rows"]]))
    different = isinstance(table.seeds, Sequence) and len(set(table.seeds)) == len(table.seeds) > 0
    if not (different and all(type(seed) is int and seed >= 0 for seed in table.seeds)):
        raise UserError(
            f"seeds of table {name!r} must be different whole numbers, such as [0, 1, 2], got {table.seeds!r}."
        )
    return table


def _contender(name: str, given: dict[str, Any]) -> Contender:
    options = {key: value for key, value in given.items() if key not in ("recipe", "start")}
    for key in RESERVED:
        if key in options:
            raise UserError(f"contender {name!r} cannot set {key}: {', '.join(RESERVED)} are given to each run.")
    return Contender(name, given["recipe"], options, given.get("start"))


Results = Mapping[str, Sequence[Result]]  # of each contender, by seed


def result_file(folder: Path, contender: str, seed: int) -> Path:
    """Where the result of a run is kept."""
    return folder / f"{contender}.seed{seed}.json"


def write_result(folder: Path, result: Result) -> None:
    """Keep the result of a run."""
    text = json.dumps(asdict(result), indent=1) + "\n"
    write_whole(result_file(folder, result.contender, result.seed), text, "--results")


def read_results(folder: Path) -> Results:
    """Read what there is.

    Raises:
        UserError: A file is damaged.
    """
    results: dict[str, list[Result]] = {}
    names = {field.name for field in fields(Result)}
    for path in sorted(folder.glob("*.seed*.json")):
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UserError(
                f"result {str(path)!r} cannot be read ({error}): remove it, and it is run again."
            ) from error
        if not isinstance(content, dict) or set(content) != names:
            raise UserError(f"result {str(path)!r} is not one of a run: remove it, and it is run again.")
        result = Result(**content)
        if path != result_file(folder, result.contender, result.seed):
            raise UserError(f"result {str(path)!r} is a copy of another one's: remove it.")
        results.setdefault(result.contender, []).append(result)
    return {name: sorted(each, key=lambda result: result.seed) for name, each in results.items()}


class Difference(NamedTuple):
    """Of two contenders, paired by seed: mean and half the width of its confidence interval, in points."""

    mean: float
    half: float | None  # None for fewer than two seeds
    seeds: int

    @property
    def sign(self) -> int:
        """1 or -1 where the interval of at least three seeds leaves out 0, else 0: undecided."""
        if self.half is None or self.seeds < FEWEST or abs(self.mean) <= self.half:
            return 0
        return 1 if self.mean > 0 else -1

    def told(self, seeds: int) -> str:
        """As text, with the number of its seeds where these are fewer than `seeds`, or than decide anything."""
        if self.half is None:
            return f"{self.mean:+.1f} (1 seed)"
        fewer = f", {self.seeds} seeds" if self.seeds < max(seeds, FEWEST) else ""
        return f"{self.mean:+.1f} ({self.mean - self.half:+.1f} to {self.mean + self.half:+.1f}{fewer})"


def difference(*pairs: tuple[Sequence[Result], Sequence[Result]]) -> Difference | None:
    """Test accuracy of the first minus that of the second over the seeds that both have; None without any.

    Of several pairs it is the mean over them, seed by seed, of the seeds that all have: with a seed they share their
    pictures and their start, so they are no further samples. The interval is Student's, of 95 %, for the mean over
    seeds.
    """
    accuracies = [{result.seed: result.top1 for result in each} for pair in pairs for each in pair]
    seeds = set.intersection(*map(set, accuracies))
    ones, others = accuracies[::2], accuracies[1::2]
    gaps = [
        statistics.mean(one[seed] - other[seed] for one, other in zip(ones, others, strict=True))
        for seed in sorted(seeds)
    ]
    if not gaps:
        return None
    half = None
    if len(gaps) > 1:
        quantile = student_t.ppf((1 + CONFIDENCE) / 2, len(gaps) - 1)
        half = float(quantile * statistics.stdev(gaps) / sqrt(len(gaps)))
    return Difference(statistics.mean(gaps), half, len(gaps))
