"""Train what the tables of evidence compare, on data that is drawn, and write RESULTS.md and RESULTS.png.

Each row of a table is a recipe with some options changed, trained with several seeds; see tasn_timm/evidence.yaml. What
has a result already is not run again, and what was interrupted goes on: the command can be ended and repeated at any
time. Runs are of one thread each.
"""

import argparse
import sys
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from ..errors import UserError, unknown
from ..tables import counted, table
from . import at_least

if TYPE_CHECKING:
    from ..evidence import Plan, Result, Table

SUMMARY = "train the rows of our tables of evidence and write RESULTS.md"
EXAMPLES = """examples:
  python -m tasn_timm reproduce --list
  python -m tasn_timm reproduce resolution hard --jobs 2
  python -m tasn_timm reproduce --seeds 0"""

BAR = dict(dynamic_ncols=True, smoothing=0, disable=None)  # no bars without a terminal

Job = tuple[str, int]  # contender and seed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add = parser.add_argument
    add("tables", metavar="TABLE", nargs="*", help="names of tables (default: all)")
    add("--seeds", type=at_least(0), nargs="+", metavar="S", help="these alone (default: all that each table has)")
    add("--jobs", type=at_least(1), default=1, metavar="N", help="trainings at a time (default: %(default)s)")
    add("--list", action="store_true", help="say what there is to do, and do nothing")
    add("--plan", type=Path, metavar="FILE", help="another file of contenders and tables (default: the package's)")
    add("--results", type=Path, default=Path("results"), metavar="DIR", help="of RESULTS.md and its JSON files")
    add("--runs", type=Path, default=Path("runs/reproduce"), metavar="DIR", help="of the trainings")
    add("--script", type=Path, default=Path("train_accelerate.py"), metavar="FILE", help="the training script")


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    try:
        from .. import evidence_figure  # noqa: F401
        from ..evidence import FILE, read_plan, read_results
    except ModuleNotFoundError as error:
        raise UserError(f'reproduce needs {error.name}: pip install "tasn_timm[reproduce]".') from error
    plan = read_plan(options.plan or FILE)
    tables = _tables(plan, options.tables, options.seeds)
    results = {(each.contender, each.seed): each for runs in read_results(options.results).values() for each in runs}
    _check_same(plan, results, options.results)
    jobs = [job for job in _jobs(plan, tables) if job not in results]
    runner = _Runner(plan, results, options)
    jobs = [*runner.lost_starts(jobs), *jobs]
    if options.list:
        print(_listing(tables, results, jobs))
        return
    for name, seed in jobs:  # a mistake in the plan is told before the first training
        plan.contenders[name].recipe_of(seed)
    if jobs and not options.script.is_file():
        raise UserError(
            f"there is no training script {str(options.script)!r}: run this in a checkout, or name it with --script."
        )
    try:
        for folder in (options.results, options.runs):
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"folder {str(folder)!r} cannot be made ({error.strerror}): choose another.") from error
    runner.run_all(jobs)
    _write_report(plan, options.results)
    print(f"{options.results / 'RESULTS.md'} written")


def _tables(plan: "Plan", names: list[str], seeds: list[int] | None) -> list["Table"]:
    """Those that are asked for, or all, each with those of its seeds that are asked for, or all."""
    for name in names:
        if name not in plan.tables:
            raise unknown("table", name, plan.tables)
    tables = [plan.tables[name] for name in names or plan.tables]
    if seeds is None:
        return tables
    known = _seeds(tables)
    for seed in seeds:
        if seed not in known:
            raise UserError(
                f"--seeds {seed}: these tables have {' '.join(map(str, known))}. For others, name them in a file of "
                f"your own (`seeds` of a table, --plan)."
            )
    tables = [each._replace(seeds=[seed for seed in each.seeds if seed in seeds]) for each in tables]
    return [each for each in tables if each.seeds]


def _seeds(tables: list["Table"]) -> list[int]:
    return sorted({seed for each in tables for seed in each.seeds})


def _jobs(plan: "Plan", tables: list["Table"]) -> list[Job]:
    """Runs that tables need, each once, those of the first seed and those that others start from first."""
    jobs: dict[Job, None] = {}
    for seed in _seeds(tables):
        for row in (row for each in tables if seed in each.seeds for row in each.rows):
            start = plan.contenders[row.contender].start
            jobs |= dict.fromkeys([*([(start, seed)] if start else []), (row.contender, seed)])
    return list(jobs)


class _Runner:
    """Trains, some at a time, and keeps each result; after the first that fails no other one is begun."""

    def __init__(self, plan: "Plan", results: dict[Job, "Result"], options: argparse.Namespace) -> None:
        self.plan = plan
        self.results = results
        self.options = options

    def lost_starts(self, jobs: list[Job]) -> list[Job]:
        """Runs that jobs start from which have a result, but whose model is not there, or another one is."""
        from ..reproduce import weights_of

        starts = dict.fromkeys(self.start_of(job) for job in jobs)
        known = {job: self.results[job].weights for job in starts if job in self.results}
        return [job for job, weights in known.items() if weights_of(self.folder(job)) != weights]

    def run_all(self, jobs: list[Job]) -> None:
        """Run jobs; each after the one that it starts from."""
        waiting = list(jobs)
        for job in jobs:
            self.results.pop(job, None)  # of `lost_starts`
        running: dict[Future, Job] = {}
        with ThreadPoolExecutor(self.options.jobs) as pool, tqdm(total=len(waiting), unit="run", **BAR) as bar:
            try:
                while waiting or running:
                    ready = [job for job in waiting if (start := self.start_of(job)) is None or start in self.results]
                    for job in ready[: self.options.jobs - len(running)]:
                        waiting.remove(job)
                        running[pool.submit(self.train, job)] = job
                    bar.set_postfix_str(", ".join(f"{name} seed {seed}" for name, seed in running.values()))
                    for done in wait(running, return_when=FIRST_COMPLETED).done:
                        self.finish(done, running.pop(done), bar)
            except KeyboardInterrupt:
                bar.write(f"waiting for {counted(len(running), 'training')} to save", file=sys.stderr)
                raise
            except UserError:
                bar.write(f"waiting for the end of {counted(len(running), 'training')}", file=sys.stderr)
                self.finish_all(running, bar)
                raise

    def train(self, job: Job) -> None:
        """Train one of them; in a thread, so it only waits for a process."""
        from ..reproduce import train

        name, seed = job
        train(self.plan.contenders[name], seed, self.folder(job), self.options.script, self.start_folder(job))

    def finish_all(self, running: dict[Future, Job], bar: tqdm) -> None:
        """Keep the results of trainings that were under way when another one failed, and tell which failed, too."""
        for done, job in running.items():
            try:
                self.finish(done, job, bar)
            except UserError as error:
                bar.write(str(error), file=sys.stderr)

    def finish(self, done: Future, job: Job, bar: tqdm) -> None:
        """Keep the result of a training that has ended, once it has, and if it is the start of those that have one."""
        from ..evidence import write_result
        from ..reproduce import read_off

        name, seed = job
        try:
            done.result()
            result = read_off(self.plan.contenders[name], seed, self.folder(job), self.start_folder(job))
        except UserError as error:
            raise UserError(f"{name} seed {seed}: {error}") from error
        begun = [each for each in self.results.values() if (each.start, each.seed) == job]
        if any(each.start_weights != result.weights for each in begun):
            raise UserError(
                f"{name} seed {seed}: trained again here, it is another model than {counted(len(begun), 'result')} in "
                f"{str(self.options.results)!r} started from: use --results with a folder of your own."
            )
        write_result(self.options.results, result)
        self.results[job] = result
        _write_report(self.plan, self.options.results)
        bar.update()
        bar.write(f"{name} seed {seed}: {result.top1:.1f} %")

    def start_of(self, job: Job) -> Job | None:
        """The run that one starts from."""
        start = self.plan.contenders[job[0]].start
        return (start, job[1]) if start else None

    def folder(self, job: Job) -> Path:
        """Of a run."""
        from ..reproduce import run_folder

        return run_folder(self.options.runs, self.plan.contenders[job[0]], job[1])

    def start_folder(self, job: Job) -> Path | None:
        """Of the run that one starts from."""
        start = self.start_of(job)
        return self.folder(start) if start else None


def _write_report(plan: "Plan", folder: Path) -> None:
    from ..evidence import FIGURE, REPORT, read_results
    from ..evidence_figure import evidence_figure
    from ..evidence_report import report
    from ..files import completing, write_whole

    results = read_results(folder)
    write_whole(folder / REPORT, report(plan, results), "--results")
    with completing(folder / FIGURE, "--results") as aside:
        evidence_figure(plan, results).savefig(aside, format="png", dpi=110)


def _listing(tables: list["Table"], results: dict[Job, "Result"], jobs: list[Job]) -> str:
    rows, listed = [("table", "contender", "seeds done", "to do")], set()
    for each in tables:
        for row in each.rows:
            done = [seed for seed in each.seeds if (row.contender, seed) in results]
            to_do = [seed for seed in each.seeds if seed not in done]
            rows.append((each.name, row.contender, " ".join(map(str, done)), " ".join(map(str, to_do))))
            listed |= {(row.contender, seed) for seed in to_do}
    starts = len(set(jobs) - listed)
    others = f", {starts} of them for others to start from" if starts else ""
    return f"{table(rows, '<<<<')}\n\n{counted(len(jobs), 'run')} to do{others}"


def _check_same(plan: "Plan", results: dict[Job, "Result"], folder: Path) -> None:
    """A result of other options than the plan has now would be told as if it were the plan's."""
    from ..evidence import result_file

    stale, begun = [], {job: result.weights for job, result in results.items()}
    for (name, seed), result in results.items():
        if (contender := plan.contenders.get(name)) is None:
            continue
        # Where the start has no result, those that began from it are to agree with each other.
        weights = begun.setdefault((contender.start, seed), result.start_weights)
        if not contender.made(result, weights):
            stale.append(str(result_file(folder, name, seed)))
    if stale:
        raise UserError(
            f"made with other options, or from another start, than the plan has now: {', '.join(stale)}. Remove these, "
            f"and their folders in --runs, to run them again."
        )
