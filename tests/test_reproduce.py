"""`python -m tasn_timm reproduce`: what is run and in what order, what a failure leaves, and real runs."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import timm
import torch
import yaml
from filelock import FileLock
from test_evidence import ENVIRONMENT, result
from training_runs import SCRIPT, SMALL

from tasn_timm import cli, evidence, reproduce
from tasn_timm.errors import UserError, run_command
from tasn_timm.heads import HEADS
from tasn_timm.recipe import save_recipe

PLAN = dict(
    common=dict(workers=0),
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
)


class Trainings:
    """In the place of `train` and `read_off`: what was asked for, and what comes of it."""

    def __init__(self) -> None:
        self.failing: set[tuple[str, int]] = set()
        self.asked: list[tuple[str, int]] = []
        self.machine = "ours"  # on which the weights depend

    def train(self, contender, seed, folder, script, start) -> None:
        assert (start is None) == (contender.start is None) and (start is None or (start / "best").is_dir())
        self.asked.append((contender.name, seed))
        if (contender.name, seed) in self.failing:
            raise UserError("training ended with exit code 3: it burst.")
        time.sleep(0.2 * (contender.name == "other"))
        if reproduce.weights_of(folder) is None:
            (folder / "best").mkdir(parents=True, exist_ok=True)
            (folder / "best/model.safetensors").write_text(f"{contender.name} {seed} {self.machine}")

    def read_off(self, contender, seed, folder, start) -> evidence.Result:
        assert threading.current_thread() is threading.main_thread()
        top1 = dict(low=80.0, high=90.0, base=50.0, other=60.0)[contender.name] + seed
        return result(
            contender.name,
            seed,
            top1,
            recipe=contender.recipe,
            options=evidence.what_counts(contender.recipe_of(seed)),
            start=contender.start,
            start_weights=start and reproduce.weights_of(start),
            weights=reproduce.weights_of(folder),
        )


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
    monkeypatch.setattr(reproduce, "train", trainings.train)
    monkeypatch.setattr(reproduce, "read_off", trainings.read_off)
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
    assert "| high (`high`) | 2.0 | 90.5 ± 0.7 | 90.0, 91.0 | +10.0 (+10.0 to +10.0, 2 seeds)" in text
    assert "RESULTS.md written" in capsys.readouterr().out


def test_a_table_has_seeds_of_its_own(here, trainings, capsys):
    tables = dict(PLAN["tables"], one=dict(PLAN["tables"]["one"], seeds=[1, 3]))
    (here / "plan.yaml").write_text(yaml.safe_dump(dict(PLAN, tables=tables)))
    assert command("one", "--seeds", "0") == 2
    assert "--seeds 0: these tables have 1 3. For others, " in capsys.readouterr().err
    assert command("--seeds", "0", "1") == 0  # of which this one has just the second
    assert trainings.asked == [("base", 0), ("high", 0), ("other", 0)] + [
        (name, 1) for name in ("base", "low", "high", "other")
    ]
    assert command("one", "--list") == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines()[-4:-2]] == [
        ["one", "low", "1", "3"],
        ["one", "high", "1", "3"],
    ]
    assert command("one") == 0
    assert trainings.asked[7:] == [(name, 3) for name in ("base", "low", "high")]
    one, two = (here / "results" / "RESULTS.md").read_text().split("## Two")
    assert "| 92.0 ± 1.4 | 91.0, 93.0 |" in one and "| 90.5 ± 0.7 | 90.0, 91.0 |" in two


def test_what_has_a_result_is_not_run_again(here, trainings):
    assert command("one", "--seeds", "0") == 0
    assert command("--seeds", "0", "1", "--jobs", "3") == 0
    assert len(trainings.asked) == len(set(trainings.asked)) == 8
    assert trainings.asked[:3] == [("base", 0), ("low", 0), ("high", 0)]


def test_nothing_is_begun_after_a_failure_and_what_was_done_is_kept(here, trainings, capsys):
    trainings.failing = {("high", 0)}
    assert command("--seeds", "0") == 2
    assert trainings.asked == [("base", 0), ("low", 0), ("high", 0)]
    assert kept(here) == {"base.seed0.json", "low.seed0.json", "RESULTS.md", "RESULTS.png"}
    assert capsys.readouterr().err.splitlines()[-1].endswith("high seed 0: training ended with exit code 3: it burst.")
    trainings.failing.clear()
    assert command("--seeds", "0") == 0
    assert trainings.asked[3:] == [("high", 0), ("other", 0)]


def test_a_training_beside_one_that_fails_is_kept(here, trainings, capsys):
    trainings.failing = {("high", 0)}
    assert command("two", "--seeds", "0", "--jobs", "2") == 2
    assert sorted(trainings.asked) == [("base", 0), ("high", 0), ("other", 0)]
    assert kept(here) >= {"base.seed0.json", "other.seed0.json"} and "high.seed0.json" not in kept(here)
    assert "waiting for the end of 1 training" in capsys.readouterr().err


def test_of_two_trainings_that_fail_both_are_told(here, trainings, capsys):
    trainings.failing = {("low", 0), ("high", 0)}
    assert command("one", "--seeds", "0", "--jobs", "2") == 2
    told = capsys.readouterr().err
    assert "low seed 0: training ended with" in told and "high seed 0: training ended with" in told


def test_a_start_whose_model_is_gone_is_trained_again(here, trainings):
    assert command("--seeds", "0") == 0
    shutil.rmtree(here / "runs")
    (here / "results" / "high.seed0.json").unlink()
    trainings.asked.clear()
    assert command("--seeds", "0") == 0
    assert trainings.asked == [("base", 0), ("high", 0)]


def test_the_list_says_what_is_to_do_and_does_nothing(here, trainings, capsys):
    assert command("one", "--seeds", "0") == 0
    capsys.readouterr()
    assert command("--list", "--seeds", "0", "2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[1:4]] == [
        ["one", "low", "0", "2"], ["one", "high", "0", "2"], ["two", "high", "0", "2"],
    ]  # fmt: skip
    assert lines[-1] == "5 runs to do, 1 of them for others to start from" and len(trainings.asked) == 3


def test_a_start_that_turns_out_otherwise_does_not_take_the_place_of_the_known_one(here, trainings, capsys):
    """Its folder is gone, and another machine trains other weights: results made from the old ones stay as they are."""
    assert command("one", "--seeds", "0") == 0
    shutil.rmtree(here / "runs")
    before, asked = kept(here), len(trainings.asked)
    (here / "results/high.seed0.json").unlink()
    assert command("one", "--seeds", "0", "--list") == 0
    assert capsys.readouterr().out.endswith("2 runs to do, 1 of them for others to start from\n")
    trainings.machine = "another"
    for attempt in (1, 2):  # whose folder is there by then
        assert command("one", "--seeds", "0") == 2
        assert "base seed 0: trained again here, it is another model than 1 result" in capsys.readouterr().err
        assert len(trainings.asked) == asked + attempt and kept(here) == before - {"high.seed0.json"}
    shutil.rmtree(here / "runs")
    trainings.machine = "ours"
    assert command("one", "--seeds", "0") == 0 and kept(here) == before


def test_a_start_that_nothing_was_made_from_may_be_another_one(here, trainings):
    assert command("one", "--seeds", "0") == 0
    shutil.rmtree(here / "runs")
    for name in ("low", "high"):
        (here / f"results/{name}.seed0.json").unlink()
    trainings.machine = "another"
    assert command("one", "--seeds", "0") == 0
    assert evidence.read_results(here / "results")["base"][0].weights == reproduce.weights_of(
        reproduce.run_folder(here / "runs/reproduce", evidence.read_plan(here / "plan.yaml").contenders["base"], 0)
    )


def test_a_start_without_its_result_is_read_off_again(here, trainings, capsys):
    assert command("one", "--seeds", "0") == 0
    (here / "results/base.seed0.json").write_text("{")
    assert command("one", "--seeds", "0") == 2
    assert "remove it, and it is run again" in capsys.readouterr().err
    (here / "results/base.seed0.json").unlink()
    before, asked = kept(here), len(trainings.asked)
    assert command("one", "--seeds", "0") == 0
    assert kept(here) == before | {"base.seed0.json"} and trainings.asked[asked:] == [("base", 0)]


def test_results_of_one_seed_have_one_start_also_where_that_has_no_result(here, trainings, capsys):
    assert command("one", "--seeds", "0", "1") == 0
    shutil.copytree(here / "results", here / "another")
    for folder in ("results", "another"):
        (here / folder / "base.seed0.json").unlink()
    low = here / "another/low.seed0.json"
    low.write_text(low.read_text().replace('"start_weights": "', '"start_weights": "other '))
    assert command("--list") == 0 and command("--list", "--results", "another") == 2
    assert "from another start" in capsys.readouterr().err


def test_a_result_of_another_plan_is_refused(here, trainings, capsys):
    assert command("one", "--seeds", "0") == 0
    changed = PLAN | dict(contenders=PLAN["contenders"] | dict(high=dict(recipe="synthbirds", start="base", epochs=6)))
    (here / "plan.yaml").write_text(yaml.safe_dump(changed))
    assert command("--list") == 2
    told = capsys.readouterr().err
    assert "made with other options" in told and "high.seed0.json" in told and "low.seed0.json" not in told


def test_a_recipe_that_makes_no_sense_is_told_before_anything_is_run(here, trainings, capsys):
    broken = PLAN | dict(contenders=PLAN["contenders"] | dict(other=dict(recipe="synthbirds", epochs=0)))
    (here / "plan.yaml").write_text(yaml.safe_dump(broken))
    assert command() == 2
    assert "epochs must be at least 1" in capsys.readouterr().err and not trainings.asked


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["thre"], "unknown table 'thre'"),
        (["--jobs", "0"], "--jobs: must be a whole number, 1 or more, got '0'"),
        (["--seeds", "1", "7"], "--seeds 7: these tables have 0 1 2. For others, name them in a file of your own"),
        (["--script", "nowhere.py"], "there is no training script 'nowhere.py'"),
        (["--results", "plan.yaml"], "folder 'plan.yaml' cannot be made"),
        (["--runs", "plan.yaml/x"], "folder 'plan.yaml/x' cannot be made"),
        (["--plan", "none.yaml"], "'none.yaml' is no plan"),
    ],
)
def test_mistakes_are_told_before_anything_is_run(here, trainings, capsys, arguments, message):
    assert command(*arguments) == 2
    assert message in capsys.readouterr().err and not trainings.asked and not kept(here)


def real_plan(folder: Path, image_folder: Path, epochs: int = 2) -> None:
    small = yaml.safe_load(SMALL) | dict(data=str(image_folder), epochs=epochs)
    (folder / "small.yaml").write_text(yaml.safe_dump(small))
    recipe = str(folder / "small.yaml")
    plain = dict(recipe=recipe, model="test_resnet", start="tasn", epochs=1)
    plan = dict(
        common={},
        contenders=dict(tasn=dict(recipe=recipe), plain=plain, broken=dict(recipe=recipe, lr=1e30)),
        tables=dict(
            good=dict(title="Good", views=True, rows=[dict(contender=name, row=name) for name in ("plain", "tasn")]),
            bad=dict(title="Bad", rows=[dict(contender="broken", row="broken")]),
        ),
    )
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan))


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
    assert set(tasn["environment"]) == {*ENVIRONMENT, "python", "system"} and plain["start_weights"] == tasn["weights"]
    # The views are those of the model that was tested: the prediction is that of its own evaluation.
    best = max(line["validation"]["top1"] for line in logged if "epoch" in line)
    assert tasn["views"]["prediction"] == pytest.approx(best, abs=0.01)
    assert plain["views"] is None and plain["parameters"] < tasn["parameters"]
    recipe = yaml.safe_load((tmp_path / "runs/reproduce/plain/seed0/small/recipe.yaml").read_text())
    assert recipe["initial_checkpoint"] == str(run.absolute())
    assert "| plain (`plain`) |" in (tmp_path / "results/RESULTS.md").read_text()
    # A result that is gone is read off again, without training; a run of other options is not taken for it.
    before = (tmp_path / "results/plain.seed0.json").read_text()
    (tmp_path / "results/plain.seed0.json").unlink()
    weights = run.parents[2] / "plain/seed0/small/best/model.safetensors"
    trained = weights.stat().st_mtime_ns
    assert in_process(tmp_path, "good").returncode == 0
    assert (tmp_path / "results/plain.seed0.json").read_text() == before and weights.stat().st_mtime_ns == trained
    (tmp_path / "results/plain.seed0.json").unlink()
    (tmp_path / "plan.yaml").write_text((tmp_path / "plan.yaml").read_text().replace("epochs: 1", "epochs: 2"))
    refused = in_process(tmp_path, "good")
    assert refused.returncode == 2 and "has a run of other options: remove it" in refused.stderr


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT to a group of processes")
def test_ctrl_c_saves_and_the_next_command_goes_on(tmp_path, image_folder):
    real_plan(tmp_path, image_folder, epochs=200)
    words = [sys.executable, "-m", "tasn_timm", "reproduce", "good", "--script", str(SCRIPT), "--seeds", "0"]
    options = dict(cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=os.environ | dict(OMP_NUM_THREADS="1"))
    command = subprocess.Popen([*words, "--plan", "plan.yaml"], start_new_session=True, **options)
    log = tmp_path / "runs/reproduce/tasn/seed0/small/metrics.jsonl"
    begin = time.monotonic()
    while not (log.is_file() and "epoch" in log.read_text()):
        assert time.monotonic() < begin + 120 and command.poll() is None
        time.sleep(0.1)
    os.killpg(command.pid, signal.SIGINT)  # as a terminal does
    assert command.wait(timeout=60) == 130
    assert "waiting for 1 training to save" in command.stderr.read()
    with FileLock(tmp_path / "runs/reproduce/tasn/seed0/.lock", timeout=0):  # nobody is left
        said = (tmp_path / "runs/reproduce/tasn/seed0/log.txt").read_text()
    assert "--resume auto goes on" in said and not (tmp_path / "results/tasn.seed0.json").exists()


@pytest.mark.slow
def test_a_training_that_fails_is_told_in_its_own_words(tmp_path, image_folder):
    real_plan(tmp_path, image_folder)
    done = in_process(tmp_path, "bad")
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert "broken seed 0: training ended with exit code" in last and "not finite" in last and "log.txt" in last


def test_a_run_from_another_start_is_not_taken_for_this_one_s(tmp_path):
    contender, folder, start = evidence.Contender("a", "synthbirds", {}, "b"), tmp_path / "a/run", tmp_path / "b/run"
    for path in (folder, start / "best"):
        path.mkdir(parents=True)
    for file in (folder / "recipe.yaml", folder.with_suffix(".yaml")):
        save_recipe(contender.recipe_of(0), file)
    (folder / "metrics.jsonl").write_text(json.dumps(dict(test={})) + "\n")
    (start / "best/model.safetensors").write_bytes(b"weights")
    (folder.parent / "start.sha256").write_text(hashlib.sha256(b"weights").hexdigest())
    reproduce.train(contender, 0, folder, Path("none"), start)
    (start / "best/model.safetensors").write_bytes(b"trained again")
    with pytest.raises(UserError, match="has not this start, or none known: remove it"):
        reproduce.train(contender, 0, folder, Path("none"), start)


@pytest.mark.parametrize("heads", HEADS)
def test_with_one_pair_of_classifiers_the_predicting_ones_are_master_and_part(heads):
    tiny = dict(backbone="test_resnet", num_classes=5, sample_size=32, attention_net="tiny", heads=heads)
    model = timm.create_model("tasn", **tiny).eval()
    model.trilinear_attention.train()
    torch.manual_seed(0)
    views = reproduce._logits_of_views(model, torch.randn(2, 3, 64, 64))
    assert all(logits.shape == (2, 5) for logits in views.values())
    assert torch.equal(views["master_on_structure"], views["prediction"]) == (heads != "both")
