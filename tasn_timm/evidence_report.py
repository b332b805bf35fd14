"""RESULTS.md: what the runs of `evidence.yaml` have shown, as tables with what we read out of them."""

import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, pairwise
from typing import Any

from .evidence import FIGURE, Difference, Plan, Result, Results, Row, Table, Target, difference


def report(plan: Plan, results: Results) -> str:
    """RESULTS.md: every table of which two rows have been run."""
    tables = [(table, table.take(results)) for table in plan.tables.values()]
    tables = [(table, taken) for table, taken in tables if sum(row.contender in taken for row in table.rows) > 1]
    sections = [_section(table, taken) for table, taken in tables]
    every = [result for name in plan.contenders for result in results.get(name, ())]
    measured = _measured(plan.targets, results)
    compared = {each for table, taken in tables for each in _compared(table, taken)}
    compared |= {(frozenset(chain(*target.pairs)), gap.seeds) for target, gap, _ in measured if gap.half is not None}
    picture = f"![A dot for each run, and the mean, in orange, for each row of the tables below]({FIGURE})"
    head = [_HEAD.format(runs=len(every), intervals=len(compared)), _machines(every), picture]
    return "\n\n".join([*head, *_targets(measured), *sections]) + "\n"


_HEAD = """\
# Results on generated birds

Written by `python -m tasn_timm reproduce` from the JSON files beside it, of {runs} runs. Everything is measured on
synthbirds (`tasn_timm/data/synthbirds.py`), which anybody can draw: it says whether the paper's orderings are seen
there, and nothing about birds in the world. Contenders, by the names in brackets, and what the tables compare are in
`tasn_timm/evidence.yaml`. Figures in the column "paper" are the paper's own, on CUB-200-2011, for what the row stands
for. Where the paper gives an order of the rows, a line says which of its steps we see.

Accuracy is top-1 of the test split, read once at the end of each run, of the epoch that was best on the validation
split: mean and standard deviation over the seeds, then each of them. "Difference" is paired by seed, to the row above
unless the heading says to what, with its 95 % interval (Student's), over the seeds that both rows have. Where that
leaves out 0, with three seeds at least, the order of the two rows is decided; "undecided" does not mean that they are
equal. The intervals are over seeds alone: the test pictures are the same for all. Three seeds mean 4.3 standard errors
to either side. Nothing is corrected for the number of comparisons: of the {intervals} different intervals below about
one in twenty leaves out the truth, and many share a contender, and err together. So a decided step that was planned and
is large is worth something, and the best of many small ones is not. "MFLOPs" are of a picture at inference,
convolutions and matrix products, 2 per multiply-add. "Rising" is how far the mean validation accuracy of the last
eighth of the epochs is above that of the eighth before; much above 0 means that the contender was not trained out. A
commit with a "+" had changes that are not in it."""


def _machines(results: Iterable[Result]) -> str:
    """Kinds of machines and versions, with the number of runs, and of each commit."""
    kinds: dict[str, Counter[str]] = {}
    for result in results:
        commits = (each[:10] + "+" * each.endswith("+") for each in result.environment["commits"])
        kinds.setdefault(_machine(result.environment), Counter())[" and ".join(commits) or "unknown"] += 1
    told = []
    for kind, commits in sorted(kinds.items()):
        shares = ", ".join(f"{name} ({count})" for name, count in sorted(commits.items()))
        told.append(f"{kind}: {commits.total()} runs, of commits {shares}")
    return f"Made by {'; '.join(told)}."


def _machine(environment: Mapping[str, Any]) -> str:
    versions = environment["versions"]
    shown = ", ".join(f"{name} {versions[name]}" for name in ("torch", "timm", "accelerate"))
    place = " ".join(str(environment[name]) for name in ("machine", "device", "gpu", "cpu") if environment.get(name))
    return f"{place}, {environment['mixed_precision']}, {shown}"


def _measured(targets: Iterable[Target], results: Results) -> list[tuple[Target, Difference, float]]:
    """Each target of which both contenders have been run, their difference and the highest share of FLOPs."""
    measured = []
    for target in targets:
        runs = [tuple(results.get(name, ()) for name in pair) for pair in target.pairs]
        if (gap := difference(*runs)) is not None:
            measured.append((target, gap, max(one[0].mflops / other[0].mflops for one, other in runs)))
    return measured


def _targets(measured: Sequence[tuple[Target, Difference, float]]) -> list[str]:
    """A section with a line for each target of `_measured`."""
    if not measured:
        return []
    rows = [("target", "contenders", "difference", "seeds", "FLOPs", "verdict")]
    for target, gap, share in measured:
        names = "; ".join(f"`{one}`, `{other}`" for one, other in target.pairs)
        cells = gap.told(gap.seeds), str(gap.seeds), f"{share:.2f}", _verdict(target, gap, share)
        rows.append((target.target, names, *cells))
    about = (
        "Met or not met where the whole interval is on that side; FLOPs are the first contender's by the second's.\nOf "
        "several pairs the difference is their mean, seed by seed, and the FLOPs are the highest share."
    )
    return ["## Targets", about, _markdown(rows)]


def _verdict(target: Target, gap: Difference, share: float) -> str:
    if target.flops is not None and share > target.flops:
        return "not met: too dear"
    ahead = gap._replace(mean=gap.mean - target.points)
    return ("" if ahead.sign else "undecided, by the mean ") + ("met" if ahead.mean >= 0 else "not met")


def _section(table: Table, results: Results) -> str:
    against = next((row.row for row in table.rows if row.contender == table.against), None)
    heading = "difference" if against is None else f"difference to {against}"
    top1 = "validation top-1, best epoch" if table.tuning else "top-1"
    rows = [("", "paper", top1, "seeds", heading, "MFLOPs", "rising")]
    for row, gap in zip(table.rows, _gaps(table, results)):
        rows.append(_cells(table, row, results.get(row.contender, ()), gap))
    parts = [f"## {table.title}", table.about.strip(), _markdown(rows)]
    parts += [_views(table, results), _agreement(table, results), table.finding.strip()]
    return "\n\n".join(part for part in parts if part)


def _others(table: Table) -> list[str | None]:
    """What each row is compared with: the one above it, or the contender that all are; nothing in tuning."""
    names = [row.contender for row in table.rows]
    others = [table.against] * len(names) if table.against or table.tuning else [None, *names[:-1]]
    return [None if row.first or other == row.contender else other for row, other in zip(table.rows, others)]


def _gaps(table: Table, results: Results) -> list[Difference | None]:
    """Of each row to what it is compared with."""
    return [
        None if other is None else difference((results.get(row.contender, ()), results.get(other, ())))
        for row, other in zip(table.rows, _others(table))
    ]


def _compared(table: Table, results: Results) -> Iterator[tuple[frozenset[str], int]]:
    """Contenders whose difference has an interval, shown or judged, and the number of its seeds."""
    gaps = zip(((row.contender, other) for row, other in zip(table.rows, _others(table))), _gaps(table, results))
    steps = (((better.contender, worse.contender), gap) for better, worse, gap in _steps(table, results))
    for pair, gap in (*gaps, *steps):
        if gap is not None and gap.half is not None:
            yield frozenset(pair), gap.seeds


def _cells(table: Table, row: Row, runs: Sequence[Result], gap: Difference | None) -> tuple[str, ...]:
    name, paper = f"{row.row} (`{row.contender}`)", "" if row.paper is None else f"{row.paper:.1f}"
    if not runs:
        return name, paper, "not run", "", "", "", ""
    accuracies = [table.accuracy(run) for run in runs]
    spread = f" ± {statistics.stdev(accuracies):.1f}" if len(runs) > 1 else ""
    return (
        name,
        paper,
        f"{statistics.mean(accuracies):.1f}{spread}",
        "" if len(table.seeds) == 1 else ", ".join(f"{accuracy:.1f}" for accuracy in accuracies),
        "" if gap is None else gap.told(len(table.seeds)),
        f"{runs[0].mflops:.1f}",
        f"{statistics.mean(run.slope for run in runs):+.1f}",
    )


def _markdown(rows: Sequence[tuple[str, ...]]) -> str:
    """A table under its first row; columns that are empty are left out."""
    columns = [column for column in zip(*rows) if any(column[1:])]
    head, *body = ["| " + " | ".join(cells) + " |" for cells in zip(*columns)]
    return "\n".join([head, "|" + "---|" * len(columns), *body])


def _views(table: Table, results: Results) -> str:
    """How well each classifier recognises each view of validation pictures, where there is a part net."""
    rows = []
    for row in table.rows if table.views else ():
        views = [run.views for run in results.get(row.contender, ()) if run.views]
        if views:
            means = {name: statistics.mean(view[name] for view in views) for name in views[0]}
            rows.append((row.row, *(f"{mean:.1f}" for mean in means.values())))
    if not rows:
        return ""
    return _markdown([("validation, mean over seeds", *(name.replace("_", " ") for name in means)), *rows])


def _steps(table: Table, results: Results) -> Iterator[tuple[Row, Row, Difference | None]]:
    """The paper's better and worse one of two rows that follow each other, and our difference."""
    for pair in pairwise(table.rows):
        if all(row.paper is not None for row in pair) and pair[0].paper != pair[1].paper:
            worse, better = sorted(pair, key=lambda row: row.paper)
            yield better, worse, difference((results.get(better.contender, ()), results.get(worse.contender, ())))


def _agreement(table: Table, results: Results) -> str:
    """Which of the paper's steps from one row to the next are seen, which are contradicted, which are undecided."""
    said: dict[int, list[str]] = {1: [], -1: [], 0: []}
    for better, worse, gap in _steps(table, results):
        if gap is not None:
            said[gap.sign].append(f"{better.row} over {worse.row}")
    words = {1: "Seen as in the paper", -1: "Contradicted", 0: "Undecided"}
    return " ".join(f"{words[sign]}: {'; '.join(steps)}." for sign, steps in said.items() if steps)
