"""Resumed runs end as uninterrupted ones, bit for bit: whatever ended them, however often and in the middle of what."""

import functools
import hashlib
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState
from filelock import FileLock
from loopback_hub import LoopbackHub, connect, go_online
from training_runs import (
    SCRIPT,
    SMALL,
    STEP_3,
    STEP_4,
    STEP_6,
    checkpoint,
    lines,
    stream_folder,
    the_error,
    train_accelerate,
)

from tasn_timm.data.loading import keyed_seed
from tasn_timm.data.splits import load_splits
from tasn_timm.errors import run_command
from tasn_timm.training.checkpoints import Checkpoints
from tasn_timm.training.gradients import FiniteGuard

# Everything random is on: crops, colours, parts, dropout. A step of two forward passes has a line of its own in the
# log, and every second one a checkpoint, so that there are some inside of epochs and some at their ends.
EPOCH_STEPS, STEP_PASSES = 3, 2
RECIPE = SMALL.replace("relation_scale: 10.0", "relation_scale: 10.0, drop_rate: 0.2")
RECIPE += f"""
grad_accum_steps: {STEP_PASSES}
recovery_interval: 2
degrees: 10.0
color_jitter: 0.3
opt: adamw
clip_grad: 1.0
model_ema_decay: 0.9
"""
MIDDLE = 4  # a step inside of the second and last epoch, one after the checkpoint at the end of the first

Outcome = dict[str, str]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, image_folder) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    path.write_text(RECIPE + f"data: {image_folder}\n")
    return path


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Names and values of nested dicts and lists."""
    if isinstance(value, dict | list | tuple):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, f"{name}/{key!r}")
    else:
        yield name, value


def hash_of(value: Any) -> str:
    known = hashlib.sha256()
    for name, leaf in leaves(value):
        known.update(name.encode())
        if isinstance(leaf, torch.Tensor):
            known.update(repr((leaf.dtype, leaf.shape)).encode() + leaf.contiguous().numpy().tobytes())
        else:
            known.update(repr(leaf).encode())
    return known.hexdigest()


def metrics(run: Path) -> list[dict]:
    """Of metrics.jsonl: all but the speed, which no two runs have in common."""
    every = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "speed"} for line in every]


def outcome(run: Path) -> Outcome:
    """Hashes of all that a finished run must have in common with one of the same settings."""
    newest, broken = Checkpoints(run / "checkpoints", keep=2).newest()
    assert not broken
    state = torch.load(newest.folder / "state.pt", weights_only=True)
    assert state["optimizer"]["state"] and state["average"], "all of the state is there to be compared"
    models = {kind: (run / kind / "model.safetensors").read_bytes() for kind in ("best", "last")}
    about = {name: newest.about[name] for name in ("position", "best_top1", "processes")}
    return {name: hash_of(value) for name, value in (state | models | about | dict(metrics=metrics(run))).items()}


def tree(folder: Path) -> dict[str, bytes]:
    """All files and what is in them."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# In this process: a run that is ended by --max-steps leaves what one leaves that was stopped.


def run_script(recipe: Path, *arguments: str) -> int:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gc.collect", lambda: 0)  # a fifth of the time
        patch.setattr(sys, "argv", ["train_accelerate.py", "--recipe", str(recipe), *arguments])
        return run_command(train_accelerate.main)


@pytest.fixture
def train(capsys, recipe, tmp_path):
    """Run the script with these arguments: exit code, standard output and error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        code = run_script(recipe, "--output", str(tmp_path / "runs"), *arguments)
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def expected(recipe, tmp_path_factory) -> Outcome:
    """Of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    assert run_script(recipe, "--output", str(folder)) == 0
    return outcome(folder / "small")


@pytest.fixture(scope="module")
def middle(recipe, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("middle")
    assert run_script(recipe, "--output", str(folder), "--max-steps", str(MIDDLE)) == 0
    return folder / "small"


@pytest.fixture
def interrupted(middle, tmp_path) -> Path:
    """A run that was ended in the middle of its second epoch."""
    return shutil.copytree(middle, tmp_path / "runs" / "small")


def checkpoints(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").iterdir())


def finished(train: Callable, run: Path, *arguments: str) -> tuple[Outcome, str, str]:
    """Of a run that is resumed, and what it prints."""
    code, out, err = train("--resume", "auto", *arguments)
    assert code == 0, err
    assert [path.name for path in run.parent.iterdir()] == [run.name], "no other run was begun"
    return outcome(run), out, err


def test_a_resumed_run_ends_as_an_uninterrupted_one(train, interrupted, expected):
    assert [path.name for path in checkpoints(interrupted)] == [
        STEP_3,
        STEP_4,
    ]
    result, out, _ = finished(train, interrupted)
    assert result == expected
    assert f"resumed from {interrupted}/checkpoints/{STEP_4}" in out
    (resumed,) = json.loads((interrupted / "environment.json").read_text())["resumed"]
    assert resumed["checkpoint"] == STEP_4


def test_a_run_can_be_resumed_again_and_again(train, tmp_path, expected):
    for steps in (1, 4, 4):
        assert train("--resume", "auto", "--max-steps", str(steps))[0] == 0
    result, _, _ = finished(train, tmp_path / "runs" / "small")
    assert result == expected
    resumed = json.loads((tmp_path / "runs/small/environment.json").read_text())["resumed"]
    assert [int(each["checkpoint"][-8:]) for each in resumed] == [1, 4, 4]


def test_a_finished_run_stays_as_it_is(train, interrupted, expected):
    finished(train, interrupted)
    result, out, _ = finished(train, interrupted)
    assert result == expected
    assert re.search(r"^small +tasn .* %$", out, re.MULTILINE), "the table is shown again"
    assert "epoch 2/2" not in out


def test_a_run_is_resumed_by_its_folder(train, interrupted, tmp_path, expected):
    newer = shutil.copytree(interrupted, tmp_path / "runs" / "small-1")
    before = tree(newer)
    assert train("--resume", str(interrupted))[0] == 0
    assert outcome(interrupted) == expected
    assert tree(newer) == before


def test_a_run_that_is_being_trained_is_refused(train, interrupted, expected, monkeypatch):
    monkeypatch.setattr("tasn_timm.training.run.LOCK_WAIT", 0)
    before = checkpoints(interrupted)
    with FileLock(interrupted / "lock"):
        code, _, err = train("--resume", "auto")
    assert code == 2 and f"{str(interrupted)!r} is being trained by another process: wait for its end" in err
    assert checkpoints(interrupted) == before
    assert finished(train, interrupted)[0] == expected


def test_auto_takes_the_newest_run_of_the_recipe(train, interrupted, tmp_path, expected):
    newer = shutil.copytree(interrupted, tmp_path / "runs" / "small-1")
    other = shutil.copytree(interrupted, tmp_path / "runs" / "smaller-2")
    before = tree(interrupted), tree(other)
    assert train("--resume", "auto")[0] == 0
    assert outcome(newer) == expected
    assert (tree(interrupted), tree(other)) == before


def test_without_a_run_to_go_on_with_auto_begins_one(train, tmp_path, expected):
    result, out, _ = finished(train, tmp_path / "runs" / "small")
    assert result == expected and "resumed" not in out


@pytest.mark.parametrize("folder", ["nowhere", "runs"])
def test_a_folder_without_checkpoints_is_refused(train, interrupted, tmp_path, folder):
    before = tree(tmp_path)
    code, _, err = train("--resume", str(tmp_path / folder))
    assert code == 2
    (line,) = err.splitlines()
    assert f"{str(tmp_path / folder)!r} is no folder with checkpoints" in line
    assert tree(tmp_path) == before


def truncate(checkpoint: Path) -> None:
    os.truncate(checkpoint / "state.pt", (checkpoint / "state.pt").stat().st_size // 2)


def flip_a_bit(checkpoint: Path) -> None:
    data = bytearray((checkpoint / "state.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (checkpoint / "state.pt").write_bytes(data)


def halve_the_manifest(checkpoint: Path) -> None:
    text = (checkpoint / "manifest.json").read_text()
    (checkpoint / "manifest.json").write_text(text[: len(text) // 2])


BREAKAGES = [
    (truncate, r"state.pt has \d+ bytes instead of \d+"),
    (flip_a_bit, "state.pt is damaged"),
    (halve_the_manifest, "manifest.json is damaged"),
    (lambda checkpoint: (checkpoint / "manifest.json").unlink(), "it has no manifest.json"),
    (lambda checkpoint: (checkpoint / "best.safetensors").unlink(), "best.safetensors is missing"),
    (lambda checkpoint: [path.unlink() for path in checkpoint.iterdir()], "it has no manifest.json"),
]


@pytest.mark.parametrize(("spoil", "reason"), BREAKAGES)
def test_a_broken_checkpoint_is_passed_over_by_name(train, interrupted, expected, spoil, reason):
    older, newest = checkpoints(interrupted)
    spoil(newest)
    result, out, err = finished(train, interrupted)
    assert result == expected
    assert re.search(f"^not a whole checkpoint: {newest}: {reason}", err, re.MULTILINE)
    assert f"resumed from {older}\n" in out


def test_a_folder_of_broken_checkpoints_is_refused_and_stays(train, interrupted):
    for folder in checkpoints(interrupted):
        (folder / "state.pt").unlink()
    before = tree(interrupted)
    code, _, err = train("--resume", str(interrupted))
    assert code == 2 and f"--resume {str(interrupted)!r}: it has no whole checkpoint" in err
    assert tree(interrupted) == before


def test_with_broken_checkpoints_alone_a_run_begins_anew_and_says_so(train, interrupted, expected):
    for each in checkpoints(interrupted):
        truncate(each)
    names = [path.name for path in checkpoints(interrupted)]
    result, out, err = finished(train, interrupted)
    assert result == expected
    assert all(f"not a whole checkpoint: {interrupted}/checkpoints/{name}" in err for name in names)
    assert "resumed" not in out and "epoch 1/2" in out


def change_the_size_of_a_file(data: Path) -> None:
    (data / "train/red/0.png").write_bytes((data / "train/green/0.png").read_bytes() + b"more")


def change_a_label(data: Path) -> None:
    (data / "train/red/0.png").rename(data / "train/green/red.png")


def test_other_settings_are_refused_with_a_table_and_nothing_is_changed(train, interrupted, tmp_path, image_folder):
    before = tree(tmp_path)
    elsewhere = shutil.copytree(image_folder, tmp_path.with_name(f"{tmp_path.name}-photos"))
    kwargs = dict(backbone="test_resnet", sample_size=24, attention_net="tiny", relation_scale=10.0, drop_rate=0.2)
    for arguments, row in (
        (["--seed", "7"], ["seed", "0", "7"]),
        (["--lr", "0.003"], ["lr", "0.002", "0.003"]),
        (["--batch-size", "24"], ["batch_size", "16", "24"]),
        (["--grad-accum-steps", "1"], ["grad_accum_steps", "2", "1"]),
        (["--epochs", "4"], ["epochs", "2", "4"]),
        (["--data", str(elsewhere)], ["data", str(image_folder), str(elsewhere)]),
        (["--model-kwargs", "drop_rate=0.5"], ["model_kwargs", str(kwargs), str(kwargs | dict(drop_rate=0.5))]),
        (["--mixed-precision", "bf16"], ["mixed_precision", "no", "bf16"]),
    ):
        code, out, err = train("--resume", "auto", *arguments)
        assert code == 2
        assert f"error: '{interrupted}/checkpoints/{STEP_4}' belongs to a run of other settings" in err
        assert re.search("^" + "  +".join(map(re.escape, row)) + "$", err, re.MULTILINE), err
        assert "--resume-inexact" in err and "Traceback" not in err and "resumed" not in out
        assert tree(tmp_path) == before


@pytest.mark.parametrize("change", [change_the_size_of_a_file, change_a_label])
def test_other_images_of_the_same_folder_are_refused(train, tmp_path, image_folder, change):
    data = shutil.copytree(image_folder, tmp_path / "photos")
    assert train("--data", str(data), "--max-steps", "1")[0] == 0
    change(data)
    before = tree(tmp_path)
    code, _, err = train("--data", str(data), "--resume", "auto")
    assert code == 2 and re.search(r"^images and labels  [0-9a-f]{16}  [0-9a-f]{16}$", err, re.MULTILINE), err
    assert tree(tmp_path) == before


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = LoopbackHub()
    connect(monkeypatch, hub, tmp_path / "cache")
    yield hub
    go_online(monkeypatch)
    hub.stop()


def test_another_revision_of_the_data_is_refused(train, hub, tmp_path, image_folder):
    folder = stream_folder(image_folder, tmp_path / "parquet", info=False)
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.parquet")}
    before = hub.publish("me/colours", files)
    assert train("--data", "me/colours", "--max-steps", "1")[0] == 0
    now = hub.publish("me/colours", files | {"NEWS.md": b"nothing but this is new"})
    code, _, err = train("--data", "me/colours", "--resume", "auto")
    assert code == 2 and re.search(f"^data  me/colours@{before}  me/colours@{now}$", err, re.MULTILINE), err
    code, _, err = train("--data", f"me/colours@{before}", "--resume", "auto", "--max-steps", "2")
    assert code == 0, err


def test_other_settings_go_on_where_that_is_wanted(train, interrupted, expected):
    result, out, _ = finished(train, interrupted, "--resume-inexact", "--lr", "0.003")
    assert re.search("^lr  +0.002  +0.003$", out, re.MULTILINE) and "resuming inexactly" in out
    assert [line["epoch"] for line in lines(interrupted)[:-1]] == [1, 2]
    assert result["model"] != expected["model"]
    assert "resuming inexactly" in train("--resume", "auto", "--resume-inexact", "--lr", "0.004")[1], "lr is known now"
    (*_, test) = lines(interrupted)
    assert test["inexact"] == [dict(lr=[0.002, 0.003]), dict(lr=[0.003, 0.004])]
    assert test["step"] == test["planned_steps"] == 6


def test_new_settings_of_the_optimizer_are_in_force_from_the_next_step_on(train, interrupted, tmp_path):
    new = ("--weight-decay", "0.5", "--lr", "0.05", "--opt-kwargs", "betas=[0.5,0.6]")
    code, _, err = train("--resume", "auto", "--resume-inexact", *new)
    assert code == 0, err
    assert train("--output", str(tmp_path / "new"), *new)[0] == 0
    groups, expected = (
        checkpoint(run, STEP_6)["optimizer"]["param_groups"] for run in (interrupted, tmp_path / "new" / "small")
    )
    assert groups == expected and {group["weight_decay"] for group in groups} == {0.0, 0.5}
    resumed, whole = (
        [line["lr"] for line in metrics(run) if "epoch" not in line and "lr" in line and line["step"] > MIDDLE]
        for run in (interrupted, tmp_path / "new" / "small")
    )
    assert resumed == whole and resumed


def test_another_optimizer_has_no_use_for_a_checkpoint(train, interrupted):
    before = tree(interrupted)
    code, _, err = train("--resume", "auto", "--resume-inexact", "--opt", "sgd")
    assert code == 2 and "opt cannot change on the way, not even inexactly: sgd has no use for adamw's" in the_error(
        err
    )
    assert tree(interrupted) == before


def test_an_epoch_of_which_nothing_is_left_ends_without_averages(train, interrupted):
    """Those of two processes are lost where one goes on: here with a step too many already done."""
    manifest = interrupted / "checkpoints" / STEP_4 / "manifest.json"
    content = json.loads(manifest.read_text())
    content["about"]["processes"] *= 2
    manifest.write_text(json.dumps(content))
    code, out, err = train("--resume", "auto", "--resume-inexact", "--lr", "0.003", "--max-steps", "1")
    assert code == 0, err
    assert lines(interrupted)[-2]["train"] == {} and "epoch 2/2  validation top-1" in out


def test_the_test_tells_that_a_run_was_cut_short_until_it_was_not(train, tmp_path):
    for options, steps in ((("--max-steps", "2"), 2), ((), 6)):
        assert train("--resume", "auto", *options)[0] == 0
        (*_, test) = lines(tmp_path / "runs/small")
        assert (test["step"], test["planned_steps"], test["inexact"]) == (steps, 6, [])


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ("--batch-size 24 --grad-accum-steps 1", [2, 4]),  # the first step of the second epoch once more
        ("--batch-size 8 --no-drop-last", [6, 12]),
    ],
)
def test_with_other_steps_every_epoch_is_trained_and_saved(train, interrupted, tmp_path, options, steps):
    options += " --recovery-interval 1 --checkpoint-hist 1"
    finished(train, interrupted, "--resume-inexact", *options.split())
    *epochs, test = lines(interrupted)
    assert [line["epoch"] for line in epochs] == [1, 2] and test["step"] == epochs[-1]["step"] == steps[-1]
    assert [path.name[-8:] for path in checkpoints(interrupted)] == [f"{steps[-1]:08}"]
    recipe = yaml.safe_load((interrupted / "recipe.yaml").read_text())
    assert recipe["batch_size"] == int(options.split()[1]) and recipe["recovery_interval"] == 1


def test_a_checkpoint_that_does_not_fit_changes_nothing(train, interrupted):
    (interrupted / "best").rename(interrupted / "gone")
    before = tree(interrupted)
    code, _, err = train("--resume", "auto", "--resume-inexact", "--model", "test_resnet", "--model-kwargs")
    assert code == 2 and "does not fit this model and optimizer" in err
    assert tree(interrupted) == before


def test_an_average_that_is_not_finite_is_saved(train, tmp_path, expected, monkeypatch):
    """The norm of a gradient, in fp16, where the step was skipped."""
    clip = train_accelerate.clip_gradient
    norms = iter([math.inf])
    monkeypatch.setattr(
        train_accelerate, "clip_gradient", lambda *given: [clip(*given), torch.tensor(next(norms, 1.0))][1]
    )
    monkeypatch.setattr(FiniteGuard, "check", lambda guard, step: None)
    code, _, err = train("--max-steps", "2")
    assert code == 0, err
    code, out, err = train("--resume", "auto")
    assert code == 0 and "step-00000002" in out, err
    first = lines(tmp_path / "runs/small")[0]
    assert first["train"]["grad_norm"] is None


def test_what_the_weights_do_not_depend_on_is_free(train, interrupted, expected):
    free = "--workers 2 --log-interval 1 --recovery-interval 1 --checkpoint-hist 3 --max-bad-images 1"
    result, _, _ = finished(train, interrupted, *free.split())
    assert {name for name in expected if result[name] != expected[name]} <= {"metrics"}, "which have more lines"
    assert len(checkpoints(interrupted)) == 3


@pytest.mark.parametrize("keep", [1, 3])
def test_as_many_checkpoints_are_kept_as_wanted(train, tmp_path, keep):
    options = ["--checkpoint-hist", str(keep), "--recovery-interval", "1"]
    assert train(*options, "--max-steps", "5")[0] == 0
    assert [int(path.name[-8:]) for path in checkpoints(tmp_path / "runs" / "small")] == [3, 4, 5][-keep:]


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file can be larger, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("lacking", "written"),
    [
        ("state.pt", f"checkpoint '{{run}}/checkpoints/{STEP_6}'"),
        ("best.safetensors", "'{run}/last'"),
    ],
)
def test_a_full_disk_ends_a_run_which_goes_on_when_there_is_room(train, interrupted, expected, lacking, written):
    # What was best at the checkpoint is so still: else it would be written first.
    shutil.copy(checkpoints(interrupted)[-1] / "best.safetensors", interrupted / "best" / "model.safetensors")
    before = tree(interrupted / "checkpoints")
    with room_for((checkpoints(interrupted)[-1] / lacking).stat().st_size - 1):
        code, out, err = train("--resume", "auto", "--recovery-interval", "100")
    assert code == 2 and "resumed from" in out, err
    (line,) = [line for line in err.splitlines() if "batch" not in line]
    assert line.startswith(f"error: {written.format(run=interrupted)} cannot be written: ")
    assert line.endswith("make room, then go on with --resume auto.")
    assert tree(interrupted / "checkpoints") == before
    assert not [path for path in interrupted.rglob("*") if path.name.startswith(".")], "nothing half-written stays"
    assert finished(train, interrupted)[0] == expected


@pytest.mark.parametrize("what", ["deleted", "replaced"])
def test_the_best_model_is_restored_from_the_checkpoint(train, interrupted, expected, what):
    finished(train, interrupted)
    shutil.rmtree(interrupted / "best")
    if what == "replaced":
        shutil.copytree(interrupted / "last", interrupted / "best")
        spoiled = bytearray((interrupted / "last" / "model.safetensors").read_bytes())
        spoiled[-1] ^= 1
        (interrupted / "best" / "model.safetensors").write_bytes(spoiled)
    assert finished(train, interrupted)[0] == expected
    assert {path.name for path in (interrupted / "best").iterdir()} == {"config.json", "model.safetensors", "README.md"}


@pytest.mark.parametrize(
    "options",
    [
        ["--val-split", "null"],
        ["--batch-size", "20", "--no-drop-last"],  # the last step of an epoch is short
        pytest.param(
            "--opt sgd --freeze backbone=1 --sched tanh --warmup-epochs 1 --aa rand-m5-inc1".split(),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_other_recipes_are_resumed_as_exactly(train, tmp_path, options):
    for more in ([], ["--max-steps", str(MIDDLE)], ["--resume", "auto"]):
        code, _, err = train(*options, *more)
        assert code == 0, err
    assert outcome(tmp_path / "runs" / "small-1") == outcome(tmp_path / "runs" / "small")


def test_bad_images_are_counted_once(train, tmp_path, image_folder):
    data = shutil.copytree(image_folder, tmp_path / "spoiled")
    for name in ("red/3.png", "green/0.png", "blue/15.png"):
        (data / "train" / name).write_bytes(b"spoiled")
    options = ["--data", str(data), "--max-bad-images", "3", "--epochs", "1", "--output"]
    for steps in (["--max-steps", "2"], []):
        code, _, err = train(*options, str(tmp_path / "runs"), "--resume", "auto", *steps)
        assert code == 0, err
    assert train(*options, str(tmp_path / "whole"))[0] == 0
    run, whole = tmp_path / "runs" / "small", tmp_path / "whole" / "small"
    assert outcome(run) == outcome(whole)
    assert (run / "bad_images.jsonl").read_text() == (whole / "bad_images.jsonl").read_text() != ""


def test_a_comparison_is_resumed_with_the_run(train, tmp_path):
    plain = tmp_path / "plain.yaml"
    plain.write_text("model: test_resnet\nimg_size: 24\nmodel_ema_decay: 0.9\n")
    options = ["--compare", str(plain), "--epochs", "1"]
    for more in ([], ["--max-steps", "2"], ["--resume", "auto"]):
        code, out, err = train(*options, *more)
        assert code == 0, err
    whole, run = tmp_path / "runs" / "small", tmp_path / "runs" / "small-1"
    assert outcome(run) == outcome(whole) and outcome(run / "plain") == outcome(whole / "plain")
    # As after an interruption of the second run, when the first one was finished.
    shutil.rmtree(checkpoints(run / "plain")[-1])
    code, out, err = train(*options, "--resume", "auto")
    assert code == 0, err
    assert "plain epoch 1/1" in out and "small epoch" not in out
    assert outcome(run) == outcome(whole) and outcome(run / "plain") == outcome(whole / "plain")
    assert re.search(r"^small-1 .* %\nplain .* %$", out, re.MULTILINE), "the table has both"


def test_a_stream_is_resumed_at_an_epochs_end(train, tmp_path, image_folder, monkeypatch):
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    data = stream_folder(image_folder, tmp_path / "parquet", info=True)
    for more in ([], ["--max-steps", str(EPOCH_STEPS)], ["--resume", "auto"]):
        options = ["--streaming", "--workers", "2", "--grad-accum-steps", "1"]  # 3 batches an epoch
        code, _, err = train("--data", str(data), *options, *more)
        assert code == 0, err
    assert outcome(tmp_path / "runs" / "small-1") == outcome(tmp_path / "runs" / "small")


def test_what_the_next_epoch_cannot_read_does_not_cost_this_one(train, tmp_path, image_folder):
    """The picture is left out of the first epoch by chance (drop_last), and is in the second."""
    data = shutil.copytree(image_folder, tmp_path / "data")
    order = torch.Generator().manual_seed(keyed_seed(0, "order", 0))
    left_out = torch.randperm(48, generator=order)[45:]
    rows = load_splits(str(data))["train"].cast_column("image", datasets.Image(decode=False))
    spoiled = Path(rows[int(left_out[0])]["image"]["path"])
    spoiled.write_bytes(b"spoiled")
    code, _, err = train("--data", str(data), "--batch-size", "15", "--grad-accum-steps", "1", "--epochs", "9")
    assert code == 2 and f"{spoiled}) cannot be read" in err
    assert lines(tmp_path / "runs/small")[0]["epoch"] == 1


def test_data_are_loaded_with_the_usual_signals(train, monkeypatch):
    handlers = []
    load = train_accelerate.load_data
    monkeypatch.setattr(
        train_accelerate, "load_data", lambda recipe: handlers.append(signal.getsignal(signal.SIGTERM)) or load(recipe)
    )
    assert train("--max-steps", "1")[0] == 0
    assert handlers == [signal.getsignal(signal.SIGTERM)]


def test_a_signal_at_the_end_of_a_run_ends_the_comparison(train, tmp_path, monkeypatch):
    plain = tmp_path / "plain.yaml"
    plain.write_text("model: test_resnet\nimg_size: 24\n")
    finish = train_accelerate.Run.finish

    def finish_and_signal(run, *given):
        finish(run, *given)
        if run.name == "small":
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train_accelerate.Run, "finish", finish_and_signal)
    code, _, err = train("--epochs", "1", "--compare", str(plain))
    assert code == 128 + signal.SIGTERM and "stopped by SIGTERM; --resume auto goes on" in err
    monkeypatch.undo()
    code, out, err = train("--epochs", "1", "--compare", str(plain), "--resume", "auto")
    assert code == 0 and "\nplain " in out, err


# In processes of their own, which are killed.


def train_as(rank: int, processes: int, port: int, log: Path, arguments: list[str]) -> None:
    """Be one of the processes that `accelerate launch` starts, and leave a group to kill, with the workers."""
    os.setpgrp()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for output in (1, 2):
        os.dup2(file, output)
    sys.stdout.reconfigure(line_buffering=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's children ignore it
    torch.set_num_threads(1)
    multiprocessing.set_start_method(None, force=True)  # workers come from here, not from another fork server
    if processes > 1:
        os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), ACCELERATE_USE_CPU="true")
        os.environ |= dict(WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes))
        os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    sys.argv = ["train_accelerate.py", *arguments]
    sys.exit(run_command(train_accelerate.main))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{seconds} seconds are over: {what}"
        time.sleep(0.01)


def processes_where(condition: Callable[[Path], bool]) -> list[int]:
    """Numbers of the processes on this machine for whose folder in /proc it holds, without those that have ended."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if condition(folder) and state_and_group(folder)[0] != "Z":
                found.append(int(folder.name))
        except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            continue
    return found


def state_and_group(folder: Path) -> tuple[str, int]:
    state, _, group = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
    return state, int(group)


class Start:
    """A start of the script in so many processes.

    They are forked from one that has imported everything, which alone would take most of the time.
    """

    def __init__(self, folder: Path, processes: int, arguments: list[str]) -> None:
        fork, port, number = multiprocessing.get_context("forkserver").Process, free_port(), len(list(folder.glob("*")))
        self.logs = [folder / f"{number:03}-process-{rank}.log" for rank in range(processes)]
        settings = [(rank, processes, port, log, arguments) for rank, log in enumerate(self.logs)]
        self.ranks = [fork(target=train_as, args=each) for each in settings]
        for rank in self.ranks:
            rank.start()
        wait_for(lambda: all(rank.exitcode is not None or os.getpgid(rank.pid) == rank.pid for rank in self.ranks), "")
        self.time = time.monotonic()

    def kill(self, number: signal.Signals) -> None:
        """Send a signal to the processes and their workers."""
        for rank in self.ranks:
            with suppress(ProcessLookupError):  # it has ended
                os.killpg(rank.pid, number)

    def ended(self, seconds: float) -> bool:
        """Whether all have ended so many seconds after they began."""
        for rank in self.ranks:
            rank.join(max(0, self.time + seconds - time.monotonic()))
        return all(rank.exitcode is not None for rank in self.ranks)

    def codes(self) -> list[int]:
        """Wait for the end of the processes and their workers; their exit codes."""
        if not self.ended(time.monotonic() - self.time + 90):
            self.kill(signal.SIGKILL)
            pytest.fail(f"processes hang:\n{self.text}")
        for rank in self.ranks:
            wait_for(lambda group=rank.pid: not in_group(group), f"workers stay:\n{self.text}")
        return [rank.exitcode for rank in self.ranks]

    @property
    def text(self) -> str:
        return "\n".join(f"--- {log.name}\n{log.read_text()}" for log in self.logs if log.exists())


def in_group(group: int) -> list[int]:
    return processes_where(lambda folder: state_and_group(folder)[1] == group)


@pytest.fixture(scope="module")
def start(recipe, tmp_path_factory):
    """start(output, processes, *arguments): the script with this recipe."""
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
    with pytest.MonkeyPatch.context() as patch:
        # Without threads, which would not survive a fork.
        patch.setenv("OMP_NUM_THREADS", "1")
        # Python 3.11 does not tell its fork server where to look for modules.
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        ensure_running()
    logs = tmp_path_factory.mktemp("logs")

    def start(output: Path, processes: int, *arguments: str) -> Start:
        return Start(logs, processes, ["--recipe", str(recipe), "--output", str(output), *arguments])

    return start


@pytest.fixture(scope="module")
def uninterrupted(start, tmp_path_factory):
    """uninterrupted(processes, *arguments): outcome and seconds."""

    @functools.cache
    def run(processes: int, *arguments: str) -> tuple[Outcome, float]:
        output = tmp_path_factory.mktemp("whole")
        started = start(output, processes, *arguments)
        assert started.codes() == [0] * processes, started.text
        seconds = time.monotonic() - started.time
        assert f"processes: {processes} (cpu)" in started.text
        return outcome(output / "small"), seconds

    return run


def steps_in(log: str) -> int:
    """Optimizer steps that are done, by what the main process says."""
    steps = 0
    for resumed, epoch, passes in re.findall(r"resumed from .*-step-(\d+)|epoch (\d+)/\d+  batch (\d+)/", log):
        steps = int(resumed) if resumed else (int(epoch) - 1) * EPOCH_STEPS + int(passes) // STEP_PASSES
    return steps


def newest_step(run: Path) -> int:
    newest, broken = Checkpoints(run / "checkpoints", keep=2).newest()
    assert not broken
    return int(newest.folder.name[-8:])


def kill_one(started: Start) -> None:
    """One process dies at once; the others, which wait for it, a moment later, as a launcher does it."""
    os.kill(started.ranks[-1].pid, signal.SIGKILL)
    time.sleep(0.2)
    started.kill(signal.SIGKILL)


KILLS = [None, signal.SIGKILL, signal.SIGTERM, signal.SIGINT]  # None: `kill_one`


def kill(started: Start, kind: signal.Signals | None, run: Path) -> bool:
    """Kill in one of four ways, and return whether that ended a run which had not."""
    kill_one(started) if kind is None else started.kill(kind)
    codes = started.codes()
    if not any(codes):
        return False  # it was at its end
    asked = kind in (signal.SIGTERM, signal.SIGINT) and f"{kind.name}: saving after this step" in started.text
    # A process that a signal meets before or after the loop ends at once, and the others cannot do without it.
    at_once = -signal.SIGTERM in codes or "\ninterrupted\n" in started.text
    if asked and not at_once:
        assert codes == [128 + kind] * len(codes), started.text
        assert newest_step(run) == steps_in(started.logs[0].read_text()), f"not a step is lost\n{started.text}"
    return True


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "workers"), [(1, 0), (1, 2), (2, 0), (2, 2)])
def test_killed_5_times_at_random_moments_a_run_ends_as_an_uninterrupted_one(
    start, uninterrupted, tmp_path, processes, workers
):
    options = ["--epochs", "6", "--workers"]
    expected, seconds = uninterrupted(processes, *options, str(workers))
    assert expected == uninterrupted(processes, *options, "0")[0]
    draw = random.Random(f"{processes} {workers}")
    kinds = [*KILLS, draw.choice(KILLS)]
    draw.shuffle(kinds)
    moment = random.Random().uniform
    number = 0
    while True:
        output = tmp_path / str(number)
        started = start(output, processes, *options, str(workers), "--resume", "auto")
        if kinds and not started.ended(moment(0, seconds)) and kill(started, kinds[-1], output / "small"):
            kinds.pop()
            continue
        assert started.codes() == [0] * processes, started.text
        assert f"processes: {processes} (cpu)" in started.text
        assert outcome(output / "small") == expected
        assert [path.name for path in output.iterdir()] == ["small"]
        if not kinds:
            return
        number += 1  # it ended before its kill: another run


@pytest.mark.slow
def test_another_number_of_processes_is_refused(start, interrupted):
    started = start(interrupted.parent, 2, "--resume", "auto")
    assert started.codes() == [2, 2]
    assert re.search("^processes +1 +2$", started.logs[0].read_text(), re.MULTILINE), started.text


# With everything as it really is: launcher, terminal, interpreter.


@contextmanager
def really(command: list[str], log: Path) -> Iterator[subprocess.Popen]:
    """Run a command in a session of its own; whatever of it is left in the end is killed, and fails the test."""
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | dict(OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1"),
            start_new_session=True,
        )
    try:
        yield process
        process.wait(120)
        wait_for(lambda: not mentioning(log.parent), f"processes stay:\n{log.read_text()}", 20)
    finally:
        for left in mentioning(log.parent):
            os.kill(left, signal.SIGKILL)
        process.wait()


def mentioning(folder: Path) -> list[int]:
    """Numbers of processes whose command has this folder in it, such as the script's and its workers'."""
    return processes_where(lambda process: os.fsencode(folder) in (process / "cmdline").read_bytes())


def wait_for_step(log: Path) -> None:
    wait_for(lambda: " batch " in log.read_text(), f"it does not train:\n{log.read_text()}", 120)


LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", str(SCRIPT)]


@pytest.mark.slow
def test_sigterm_to_the_launcher_alone_saves_and_ends_all_processes(recipe, uninterrupted, tmp_path):
    options = ["--workers", "2", "--epochs", "8"]
    command = [*LAUNCH, "--recipe", str(recipe), "--output", str(tmp_path / "runs"), *options, "--resume", "auto"]
    log, run = tmp_path / "log", tmp_path / "runs" / "small"
    with really(command, log) as launcher:
        wait_for_step(log)
        launcher.terminate()
    assert launcher.returncode != 0 and "SIGTERM: saving after this step" in log.read_text()
    assert 0 < newest_step(run) == steps_in(log.read_text()) < 8 * EPOCH_STEPS
    with really(command, log) as launcher:
        pass
    assert launcher.returncode == 0 and "processes: 2 (cpu)" in log.read_text(), log.read_text()
    assert outcome(run) == uninterrupted(2, *options)[0]


@pytest.mark.slow
def test_a_launcher_of_one_process_leaves_it_training_and_the_run_is_refused_until_then(recipe, tmp_path):
    script = [str(SCRIPT), "--recipe", str(recipe), "--output", str(tmp_path / "runs"), "--epochs", "1000"]
    log = tmp_path / "log"
    with really([sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", *script], log) as launcher:
        wait_for_step(log)
        launcher.terminate()
        assert launcher.wait(20) == -signal.SIGTERM
        again = subprocess.run([sys.executable, *script, "--resume", "auto"], capture_output=True, text=True)
        assert again.returncode == 2 and "is being trained by another process" in the_error(again.stderr)
        (training,) = mentioning(tmp_path)
        assert "SIGTERM" not in log.read_text()
        os.kill(training, signal.SIGTERM)
    assert "stopped by SIGTERM; --resume auto goes on" in log.read_text()
    assert newest_step(tmp_path / "runs" / "small") == steps_in(log.read_text()) > 0


@pytest.mark.slow
def test_ctrl_c_saves_and_ends_a_plain_start(recipe, uninterrupted, tmp_path):
    options = ["--workers", "2", "--epochs", "8"]
    command = [sys.executable, str(SCRIPT), "--recipe", str(recipe), "--output", str(tmp_path / "runs"), *options]
    log, run = tmp_path / "log", tmp_path / "runs" / "small"
    with really(command, log) as process:
        wait_for_step(log)
        os.killpg(process.pid, signal.SIGINT)  # a terminal's goes to all, workers included
    assert process.returncode == 128 + signal.SIGINT and "stopped by SIGINT; --resume auto goes on" in log.read_text()
    assert 0 < newest_step(run) == steps_in(log.read_text()) < 8 * EPOCH_STEPS
    with really([*command, "--resume", "auto"], log) as process:
        pass
    assert process.returncode == 0, log.read_text()
    assert outcome(run) == uninterrupted(1, *options)[0]


@pytest.mark.slow
@pytest.mark.parametrize(("statement", "code"), [("raise UserError('no')", 2), ("sys.exit(5)", 5), ("1 / 0", 1)])
def test_no_end_of_the_script_waits_for_its_workers(recipe, tmp_path, statement, code):
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(SCRIPT.parent)!r})\nimport train_accelerate\n"
        f"from tasn_timm.errors import UserError, run_command\n"
        f"def log(*arguments, **values):\n    {statement}\n"
        f"train_accelerate.Run.log = log\nsys.exit(run_command(train_accelerate.main))\n"
    )
    options = ["--recipe", str(recipe), "--output", str(tmp_path / "runs"), "--workers", "2"]
    with really([sys.executable, str(script), *options], tmp_path / "log") as process:
        pass
    assert process.returncode == code, (tmp_path / "log").read_text()
