"""Train what the tables of evidence compare, on data that is drawn, and write RESULTS.md and RESULTS.png.

Each row of a table is a recipe with some options changed, trained with several seeds; see tasn_timm/evidence.yaml. What
has a result already is not run again, and what was interrupted goes on: the command can be ended and repeated at any
time. Runs are of one thread each.
"""

import argparse
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from ..errors import UserError, unknown

if TYPE_CHECKING:
    from ..evidence import Plan, Result

SUMMARY = "train the rows of our tables of evidence and write RESULTS.md"
EXAMPLES = """examples:
  python -m tasn_timm reproduce --list
  python -m tasn_timm reproduce resolution controls --jobs 2
  python -m tasn_timm reproduce --seeds 0 1 2 3 4"""

Job = tuple[str, int]  # contender and seed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add = parser.add_argument
    add("tables", metavar="TABLE", nargs="*", help="names of tables (default: all)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="S", help="of each row (default: 0 1 2)")
    add("--jobs", type=int, default=1, metavar="N", help="trainings at a time (default: %(default)s)")
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
    _check_options(options)
    plan = read_plan(options.plan or FILE)
    for name in options.tables:
        if name not in plan.tables:
            raise unknown("table", name, plan.tables)
    tables = options.tables or list(plan.tables)
    results = {(each.contender, each.seed): each for runs in read_results(options.results).values() for each in runs}
    _check_same(plan, results)
    if options.list:
        print(_listing(plan, tables, options.seeds, results))
        return
    jobs = [job for job in _jobs(plan, tables, options.seeds) if job not in results]
    if jobs and not options.script.is_file():
        raise UserError(
            f"there is no training script {str(options.script)!r}: run this in a checkout, or name it with --script."
        )
    options.results.mkdir(parents=True, exist_ok=True)
    _run_all(plan, jobs, results, options)
    _write_report(plan, options.results)
    print(f"{options.results / 'RESULTS.md'} written")


def _jobs(plan: "Plan", tables: list[str], seeds: list[int]) -> list[Job]:
    """Runs that tables need, each once, those that others start from first."""
    jobs: dict[Job, None] = {}
    for seed in seeds:
        for table in tables:
            for row in plan.tables[table].rows:
                start = plan.contenders[row.contender].start
                jobs |= dict.fromkeys([*([(start, seed)] if start else []), (row.contender, seed)])
    return list(jobs)


def _run_all(plan: "Plan", jobs: list[Job], results: dict[Job, "Result"], options: argparse.Namespace) -> None:
    """Run jobs, some at a time, and keep each result; after the first that fails no other one is begun."""
    from ..evidence import write_result
    from ..reproduce import run_contender

    def start(job: Job) -> "Result":
        return run_contender(plan.contenders[job[0]], job[1], plan, options.runs, options.script, results)

    waiting, running = list(jobs), {}
    with ThreadPoolExecutor(options.jobs) as pool, tqdm(total=len(jobs), unit="run", dynamic_ncols=True) as bar:
        try:
            while waiting or running:
                for job in _ready(plan, waiting, results)[: options.jobs - len(running)]:
                    waiting.remove(job)
                    running[pool.submit(start, job)] = job
                bar.set_postfix_str(", ".join(f"{name} seed {seed}" for name, seed in running.values()))
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    result = _outcome(done, running.pop(done))
                    write_result(options.results, result)
                    results[result.contender, result.seed] = result
                    _write_report(plan, options.results)
                    bar.update()
                    bar.write(f"{result.contender} seed {result.seed}: {result.top1:.1f} %")
        except BaseException:
            if running:
                bar.write(f"waiting for the end of {len(running)} trainings; a second Ctrl-C ends them")
            raise


def _ready(plan: "Plan", waiting: list[Job], results: dict[Job, "Result"]) -> list[Job]:
    return [
        (name, seed)
        for name, seed in waiting
        if (start := plan.contenders[name].start) is None or (start, seed) in results
    ]


def _outcome(done: "Future[Result]", job: Job) -> "Result":
    try:
        return done.result()
    except UserError as error:
        raise UserError(f"{job[0]} seed {job[1]}: {error}") from error


def _write_report(plan: "Plan", folder: Path) -> None:
    from ..evidence import FIGURE, REPORT, read_results, report
    from ..evidence_figure import evidence_figure
    from ..files import completing, write_whole

    results = read_results(folder)
    write_whole(folder / REPORT, report(plan, results), "--results")
    with completing(folder / FIGURE, "--results") as aside:
        evidence_figure(plan, results).savefig(aside, format="png", dpi=110)


def _listing(plan: "Plan", tables: list[str], seeds: list[int], results: dict[Job, "Result"]) -> str:
    from ..tables import table

    rows = [("table", "contender", "seeds done", "to do")]
    for name in tables:
        for row in plan.tables[name].rows:
            done = [seed for contender, seed in results if contender == row.contender]
            left = [seed for seed in seeds if seed not in done]
            rows.append((name, row.contender, *(" ".join(map(str, sorted(each))) for each in (done, left))))
    left = [job for job in _jobs(plan, tables, seeds) if job not in results]
    return f"{table(rows, '<<<<')}\n\n{len(left)} runs to do"


def _check_same(plan: "Plan", results: dict[Job, "Result"]) -> None:
    """A result of other options than the plan has now would be told as if it were the plan's."""
    for (name, seed), result in results.items():
        if name in plan.contenders and not plan.contenders[name].made(result):
            raise UserError(
                f"the result of {name} seed {seed} was made with other options than the plan has now: remove its file, "
                f"and it is run again."
            )


def _check_options(options: argparse.Namespace) -> None:
    if options.jobs < 1:
        raise UserError(f"--jobs must be 1 or more, got {options.jobs}.")
    if min(options.seeds) < 0 or len(set(options.seeds)) < len(options.seeds):
        raise UserError(f"--seeds must be different numbers from 0 on, got {' '.join(map(str, options.seeds))}.")
    if options.results.exists() and not options.results.is_dir():
        raise UserError(f"--results {str(options.results)!r} is a file: give a folder.")
