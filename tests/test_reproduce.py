"""`python -m tasn_timm reproduce`: what is run and in what order, what a failure leaves, and real runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from test_evidence import ENVIRONMENT, result
from training_runs import SCRIPT, SMALL

from tasn_timm import cli, evidence, reproduce
from tasn_timm.errors import UserError, run_command

PLAN = dict(
    common=dict(compare=None),
    contenders=dict(
        base=dict(recipe="synthbirds"),
        low=dict(recipe="synthbirds_plain", start="base", train_split="train_{seed}"),
        high=dict(recipe="synthbirds", start="base", epochs=5),
        other=dict(recipe="synthbirds", epochs=7),
    ),
    tables=dict(
        one=dict(
            title="One",
            rows=[dict(contender="low", row="low", paper=1), dict(contender="high", row="high", paper=2)],
        ),
        two=dict(title="Two", rows=[dict(contender="high", row="high"), dict(contender="other", row="other")]),
    ),
)  # fmt: skip


class Trainings:
    """In the place of `run_contender`: what was asked for, and what comes of it."""

    def __init__(self, failing: tuple[str, int] | None = None) -> None:
        self.failing = failing
        self.asked: list[tuple[str, int]] = []

    def __call__(self, contender, seed, plan, runs, script, results) -> evidence.Result:
        assert contender.start is None or (contender.start, seed) in results
        self.asked.append((contender.name, seed))
        if (contender.name, seed) == self.failing:
            raise UserError("training ended with exit code 3: it burst.")
        top1 = dict(low=80.0, high=90.0, base=50.0, other=60.0)[contender.name] + seed
        options = contender.options_of(seed)
        return result(contender.name, seed, top1, recipe=contender.recipe, options=options, start=contender.start)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder with a plan and a script."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(PLAN))
    (tmp_path / "train_accelerate.py").touch()
    return tmp_path


@pytest.fixture
def trainings(monkeypatch) -> Trainings:
    trainings = Trainings()
    monkeypatch.setattr(reproduce, "run_contender", trainings)
    return trainings


def command(*arguments: str) -> int:
    return run_command(lambda: cli.main(["reproduce", "--plan", "plan.yaml", *arguments]))


def kept(folder: Path) -> set[str]:
    return {path.name for path in (folder / "results").glob("*")}


def test_everything_is_run_once_and_what_others_start_from_first(here, trainings, capsys):
    assert command("--seeds", "0", "1") == 0
    assert trainings.asked == [(name, seed) for seed in (0, 1) for name in ("base", "low", "high", "other")]
    assert len(kept(here)) == 10 and {"RESULTS.md", "RESULTS.png"} < kept(here)
    text = (here / "results" / "RESULTS.md").read_text()
    assert "| high (`high`) | 2.0 | 90.5 ± 0.7 | 90.0, 91.0 | +10.0 (+10.0 to +10.0)" in text
    assert "RESULTS.md written" in capsys.readouterr().out


def test_what_has_a_result_is_not_run_again(here, trainings):
    assert command("one", "--seeds", "0") == 0
    assert command("--seeds", "0", "1", "--jobs", "3") == 0
    assert len(trainings.asked) == len(set(trainings.asked)) == 8
    assert trainings.asked[:3] == [("base", 0), ("low", 0), ("high", 0)]


def test_nothing_is_begun_after_a_failure_and_what_was_done_is_kept(here, trainings, capsys):
    trainings.failing = ("high", 0)
    assert command("--seeds", "0") == 2
    assert trainings.asked == [("base", 0), ("low", 0), ("high", 0)]
    assert kept(here) == {"base.seed0.json", "low.seed0.json", "RESULTS.md", "RESULTS.png"}
    assert capsys.readouterr().err.splitlines()[-1].endswith("high seed 0: training ended with exit code 3: it burst.")
    trainings.failing = None
    assert command("--seeds", "0") == 0
    assert trainings.asked[3:] == [("high", 0), ("other", 0)]


def test_the_list_says_what_is_to_do_and_does_nothing(here, trainings, capsys):
    assert command("one", "--seeds", "0") == 0
    capsys.readouterr()
    assert command("--list", "--seeds", "0", "2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[1:4]] == [
        ["one", "low", "0", "2"], ["one", "high", "0", "2"], ["two", "high", "0", "2"],
    ]  # fmt: skip
    assert lines[-1] == "5 runs to do" and len(trainings.asked) == 3


def test_a_result_of_another_plan_is_refused(here, trainings, capsys):
    assert command("one", "--seeds", "0") == 0
    changed = PLAN | dict(contenders=PLAN["contenders"] | dict(high=dict(recipe="synthbirds", start="base", epochs=6)))
    (here / "plan.yaml").write_text(yaml.safe_dump(changed))
    assert command("--list") == 2
    assert "result of high seed 0 was made with other options" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["thre"], "unknown table 'thre'"),
        (["--jobs", "0"], "--jobs must be 1 or more, got 0."),
        (["--seeds", "1", "1"], "--seeds must be different numbers from 0 on, got 1 1."),
        (["--script", "nowhere.py"], "there is no training script 'nowhere.py'"),
        (["--results", "plan.yaml"], "--results 'plan.yaml' is a file"),
        (["--plan", "none.yaml"], "'none.yaml' is no plan"),
    ],
)
def test_mistakes_are_told_before_anything_is_run(here, trainings, capsys, arguments, message):
    assert command(*arguments) == 2
    assert message in capsys.readouterr().err and not trainings.asked and not (here / "results").is_dir()


def real_plan(folder: Path, image_folder: Path) -> Path:
    small = yaml.safe_load(SMALL) | dict(data=str(image_folder))
    (folder / "small.yaml").write_text(yaml.safe_dump(small))
    recipe = str(folder / "small.yaml")
    plain = dict(recipe=recipe, model="test_resnet", start="tasn", epochs=1)
    plan = dict(
        common=dict(compare=None),
        contenders=dict(tasn=dict(recipe=recipe), plain=plain, broken=dict(recipe=recipe, lr=1e30)),
        tables=dict(
            good=dict(title="Good", views=True, rows=[dict(contender=name, row=name) for name in ("plain", "tasn")]),
            bad=dict(title="Bad", rows=[dict(contender="broken", row="broken")]),
        ),
    )
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan))
    return folder / "plan.yaml"


def in_process(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    words = [sys.executable, "-m", "tasn_timm", "reproduce", *arguments, "--script", str(SCRIPT), "--seeds", "0"]
    options = dict(cwd=folder, capture_output=True, text=True, timeout=300, env=os.environ | dict(OMP_NUM_THREADS="1"))
    return subprocess.run([*words, "--plan", "plan.yaml"], **options)


@pytest.mark.slow
def test_real_runs_leave_their_results(tmp_path, image_folder):
    real_plan(tmp_path, image_folder)
    done = in_process(tmp_path, "good")
    assert done.returncode == 0, done.stderr
    tasn, plain = (json.loads((tmp_path / f"results/{name}.seed0.json").read_text()) for name in ("tasn", "plain"))
    run = tmp_path / "runs/reproduce/tasn/seed0/small"
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert tasn["top1"] == logged[-1]["test"]["top1"] and len(tasn["validation"]) == 2
    assert set(tasn["environment"]) == {*ENVIRONMENT, "python", "system"}
    # The views are those of the model that was tested: the prediction is that of its own evaluation.
    best = max(line["validation"]["top1"] for line in logged if "epoch" in line)
    assert tasn["views"]["shared_on_structure"] == pytest.approx(best, abs=0.01)
    assert plain["views"] is None and plain["parameters"] < tasn["parameters"]
    recipe = yaml.safe_load((tmp_path / "runs/reproduce/plain/seed0/small/recipe.yaml").read_text())
    assert recipe["initial_checkpoint"] == str(run.absolute())
    assert "| plain (`plain`) |" in (tmp_path / "results/RESULTS.md").read_text()
    again = in_process(tmp_path, "good")
    assert again.returncode == 0 and (run / "metrics.jsonl").read_text().count("test") == 1


@pytest.mark.slow
def test_a_training_that_fails_is_told_in_its_own_words(tmp_path, image_folder):
    real_plan(tmp_path, image_folder)
    done = in_process(tmp_path, "bad")
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert "broken seed 0: training ended with exit code" in last and "not finite" in last and "log.txt" in last
