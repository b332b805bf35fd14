"""What the options of a training do: freezing, mixing, precision, dry runs and so on."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from training_runs import (
    PLAIN,
    QUICK,
    SCRIPT,
    STEP_3,
    STEP_4,
    STEP_6,
    checkpoint,
    epochs_of,
    lines,
    metrics,
    on_every_loss,
    run_out,
    stream_folder,
    the_error,
    top1_of_folder,
    train_accelerate,
    tree,
    weights,
)

from tasn_timm.data.loading import keyed_seed
from tasn_timm.data.splits import load_splits
from tasn_timm.errors import UserError
from tasn_timm.recipe import Recipe, load_recipe
from tasn_timm.training import accelerator as accelerator_module
from tasn_timm.training import dry_run, memory
from tasn_timm.training.accelerator import create_accelerator
from tasn_timm.training.evaluation import Scores
from tasn_timm.training.freezing import FreezeSchedule
from tasn_timm.training.loaders import Plan
from tasn_timm.training.objective import micro_batch_size
from tasn_timm.training.stopping import StopRequest

# freezing


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
        self.head = nn.Linear(4, 2)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.body(image).mean((2, 3)))


def states_of(freeze: dict, epochs: int, prepare: Callable[[Layers], object] = lambda model: None) -> list[dict]:
    """Parameters and statistics before, and after each epoch, with all that moves a weight without a gradient."""
    torch.manual_seed(0)
    model = Layers()
    prepare(model)
    schedule = FreezeSchedule(model, freeze, epochs)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    states = [{name: value.clone() for name, value in model.state_dict().items()}]
    for epoch in range(epochs):
        model.train()
        schedule.begin_epoch(epoch)
        for _ in range(2):
            F.cross_entropy(model(torch.randn(4, 3, 6, 6)), torch.tensor([0, 1, 1, 0])).backward()
            optimizer.step()
            optimizer.zero_grad()
        states.append({name: value.clone() for name, value in model.state_dict().items()})
    return states


def changed(states: list[dict], part: str) -> list[bool]:
    """Epoch by epoch, whether all of a part changed; that only some of it did is an error."""
    result = []
    for before, after in pairwise(states):
        same = {torch.equal(before[name], after[name]) for name in before if name.startswith(f"{part}.")}
        assert len(same) == 1
        result.append(not same.pop())
    return result


@pytest.mark.parametrize(
    ("freeze", "body", "head"),
    [
        ({}, "yyyy", "yyyy"),
        (dict(body=2), "nnyy", "yyyy"),
        (dict(body=[1, 3]), "ynny", "yyyy"),
        (dict(body=[2, 9], head=1), "yynn", "nyyy"),
    ],
)
def test_a_frozen_part_stays_to_the_last_bit_and_trains_later(freeze, body, head):
    states = states_of(freeze, 4)
    assert ["".join("ny"[yes] for yes in changed(states, part)) for part in ("body", "head")] == [body, head]


def test_a_frozen_part_has_no_dropout_and_its_statistics_are_used():
    model = Layers()
    schedule = FreezeSchedule(model, {"body": 1}, 2)
    for epoch, training in ((0, False), (1, True)):
        model.train()
        schedule.begin_epoch(epoch)
        assert [module.training for module in model.body] == [training] * 3 and model.head.training


def test_what_was_never_trained_is_not_trained_after_freezing():
    states = states_of(dict(head=1), 3, prepare=lambda model: model.body[0].requires_grad_(False))
    assert changed(states, "head") == [False, True, True]
    assert changed(states, "body.0") == [False, False, False]
    assert changed(states, "body.1") == [True, True, True]


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        (dict(bodi=1), "unknown part of the model in freeze: 'bodi': did you mean 'body' or"),
        (dict(head=1, bod=1), "unknown part of the model in freeze: 'bod': did you mean 'body' or"),
        (dict(body=0), "body must have a number of epochs, such as 5, or [from, before], such as [2, 10]; got 0."),
        (dict(body=-1), "got -1."),
        (dict(body=1.5), "got 1.5."),
        (dict(body=True), "got True."),
        (dict(body="all"), "got 'all'."),
        (dict(body=[3, 2]), "got [3, 2]."),
        (dict(body=[2, 2]), "got [2, 2]."),
        (dict(body=[0, 1, 2]), "got [0, 1, 2]."),
        (dict(body=1, head=2), "leaves nothing to train in epoch 0 (of 0 to 3): leave out a part."),
        (dict(body=[2, 4], head=[3, 4]), "leaves nothing to train in epoch 3 (of 0 to 3)"),
        (dict(body=[1, 3], head=[2, 4]), "leaves nothing to train in epoch 2 (of 0 to 3)"),
    ],
)
def test_what_cannot_be_frozen_is_refused(freeze, message):
    with pytest.raises(UserError, match=re.escape(message)):
        FreezeSchedule(Layers(), freeze, 4)


def test_epochs_that_never_come_are_refused():
    with pytest.raises(UserError):
        FreezeSchedule(Layers(), dict(body=[4, 6]), 4)


def test_the_attention_net_can_be_trained_first(train, tmp_path):
    sgd = "--opt sgd --lr 0.05 --checkpoint-hist 9 --mixed-precision no".split()
    code, _, err = train(*sgd, "--freeze", "backbone=1", "heads=1")
    assert code == 0, err
    states = epochs_of(tmp_path / "runs/small")
    assert changed(states, "backbone") == changed(states, "heads") == [False, True]
    assert changed(states, "attention_net") == [True, True]


def test_a_part_is_frozen_in_between_through_the_script(train, tmp_path):
    sgd = "--opt sgd --lr 0.05 --checkpoint-hist 9 --epochs 3 --model test_resnet".split()
    code, _, err = train(*sgd, "--freeze", "layer1=[1,2]")
    assert code == 0, err
    states = epochs_of(tmp_path / "runs/small")
    assert changed(states, "layer1") == [True, False, True]
    assert changed(states, "layer2") == [True, True, True]


@pytest.mark.slow
def test_two_processes_freeze_alike(recipe, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", str(SCRIPT)]
    command += ["--recipe", str(recipe), "--checkpoint-hist", "9", "--freeze", "backbone=[1,2]", "heads=1"]
    for _ in range(2):
        environment = os.environ | dict(OMP_NUM_THREADS="1")
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
        assert "processes: 2 (cpu)" in result.stdout
    states, again = epochs_of(tmp_path / "runs/small"), epochs_of(tmp_path / "runs/small-1")
    assert changed(states, "backbone") == [True, False] and changed(states, "heads") == [False, True]
    for name, value in states[-1].items():
        assert torch.equal(value, again[-1][name]), name


# mixup and cutmix


def test_mixing_is_refused_for_a_part_net_and_says_why(train, tmp_path):
    for option in ("--mixup", "--cutmix"):
        code, _, err = train(option, "0.5")
        assert code == 2 and not (tmp_path / "runs").exists()
        message = the_error(err)
        assert "the detail image shows a part of one of the two pictures" in message and "part_net=False" in message


@pytest.mark.parametrize(
    "arguments", [("--batch-size", "15"), ("--batch-size", "12", "--grad-accum-steps", "4")], ids=["batch", "pass"]
)
def test_mixing_needs_pairs(train, arguments):
    code, _, err = train("--model", "test_resnet", "--mixup", "0.2", *arguments)
    images = 15 if len(arguments) == 2 else 3
    assert code == 2 and f"need an even number of images in each forward pass, got {images}:" in the_error(err)


def test_mixing_needs_whole_steps(train):
    code, _, err = train("--model", "test_resnet", "--cutmix", "1", "--batch-size", "20", "--no-drop-last")
    assert code == 2 and "and drop_last" in the_error(err)


@pytest.mark.parametrize(
    "model",
    [("--model-kwargs", "part_net=False"), ("--model", "test_resnet", "--cutmix", "1")],
    ids=["TASN without part net, mixup", "timm, both"],
)
def test_mixing_trains_the_same_twice(train, tmp_path, model):
    for _ in range(2):
        code, _, err = train("--max-steps", "2", "--mixup", "0.4", "--smoothing", "0.1", *model)
        assert code == 0, err
    first, second = (weights(tmp_path / "runs" / name) for name in ("small", "small-1"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_targets_are_mixed_by_the_place_in_the_run_alone(train, monkeypatch):
    """timm's formula, its random numbers drawn by hand."""
    targets = []

    def note(model, call, losses, target, output):
        if target.ndim == 2:
            expected = -(target * output.log_softmax(1)).sum(1).mean()
            torch.testing.assert_close(losses["loss"], expected)  # the targets are smooth already
        targets.append(target)
        return losses

    on_every_loss(monkeypatch, note)
    arguments = ("--model", "test_resnet", "--epochs", "2", "--seed", "3", "--grad-accum-steps", "2")
    assert train(*arguments)[0] == 0
    labels, passes = targets[:], len(targets)
    targets.clear()
    code, _, err = train(*arguments, "--mixup", "0.4", "--smoothing", "0.1")
    assert code == 0, err
    assert len(targets) == passes == 12
    lams = []
    for index, (mixed, plain) in enumerate(zip(targets, labels)):
        numpy = np.random.RandomState(keyed_seed(3, "step", index // 6, index % 6, 0) % 2**32)
        numpy.rand()  # timm: mix at all? its probability is 1
        lams.append(numpy.beta(0.4, 0.4))
        smooth = F.one_hot(plain, 3) * 0.9 + 0.1 / 3
        torch.testing.assert_close(mixed, lams[-1] * smooth + (1 - lams[-1]) * smooth.flip(0))
    assert len(set(lams)) == 12


# precision, devices, compilation


def test_what_the_launcher_chose_is_written_down_as_used(train, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    code, _, err = train(*QUICK, "--epochs", "1")
    assert code == 0, err
    recipe = load_recipe(str(tmp_path / "runs/small/recipe.yaml"))
    assert (recipe.mixed_precision, recipe.torchcompile) == ("bf16", "eager")


CONFIG_FILE = """
compute_environment: LOCAL_MACHINE
distributed_type: 'NO'
num_processes: 1
use_cpu: true
mixed_precision: bf16
dynamo_config: {dynamo_backend: EAGER}
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "options", "used"),
    [
        (["--config_file", "{config}"], [], ("bf16", "eager")),
        (["--config_file", "{config}", "--mixed_precision", "no"], [], ("no", "eager")),
        (["--config_file", "{config}"], ["--mixed-precision", "no", "--torchcompile", "no"], ("no", "no")),
        (["--mixed_precision", "bf16", "--cpu"], [], ("bf16", "no")),
    ],
    ids=["file", "flag over file", "recipe over file", "flag"],
)
def test_accelerates_config_file_and_flags_are_honoured(train, recipe, tmp_path, flags, options, used):
    (tmp_path / "accelerate.yaml").write_text(CONFIG_FILE)
    flags = [flag.format(config=tmp_path / "accelerate.yaml") for flag in flags]
    command = [sys.executable, "-m", "accelerate.commands.launch", *flags, str(SCRIPT), "--recipe", str(recipe)]
    environment = os.environ | dict(OMP_NUM_THREADS="1", HF_HOME=str(tmp_path / "home"))  # without anybody's defaults
    result = subprocess.run(
        [*command, *QUICK, "--epochs", "1", *options], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    recipe = load_recipe(str(tmp_path / "runs/small/recipe.yaml"))
    assert (recipe.mixed_precision, recipe.torchcompile) == used
    loss = lines(tmp_path / "runs/small")[0]["train"]["loss"]
    assert train(*QUICK, "--epochs", "1", "--mixed-precision", "no")[0] == 0
    exact = lines(tmp_path / "runs/small-1")[0]["train"]["loss"]
    assert loss == pytest.approx(exact, rel=0.05) and (loss == pytest.approx(exact, rel=1e-6)) == (used[0] == "no")


def test_bf16_trains_and_saves_what_float32_scores_alike(train, tmp_path, image_folder):
    losses = []
    for precision in ("no", "bf16"):
        code, out, err = train("--mixed-precision", precision, "--model-ema-decay", "0.5")
        assert code == 0, err
        run = tmp_path / "runs" / ("small" if precision == "no" else "small-1")
        losses.append([line["train"]["loss"] for line in lines(run)[:-1]])
        assert json.loads((run / "environment.json").read_text())["mixed_precision"] == precision
    assert losses[0] == pytest.approx(losses[1], rel=0.1) and losses[0] != losses[1]
    assert all(tensor.dtype != torch.bfloat16 for tensor in weights(run, "best").values())
    scores = [line["validation"]["top1"] for line in lines(run)[:-1]]
    one_image = 100 / 15  # rounding may change the odd one
    assert scores[-1] == pytest.approx(top1_of_folder(run / "last", image_folder / "validation"), abs=one_image)
    arguments = ("--mixed-precision", "bf16", "--model-ema-decay", "0.5", "--resume", str(run), "--validate-only")
    code, out, err = train(*arguments)
    assert code == 0 and json.loads(out.splitlines()[-1])["top1"] == scores[-1], err


@pytest.mark.parametrize("value", ["true", "false"])
def test_tf32_is_for_gpus(train, value):
    code, _, err = train("--tf32", value)
    assert code == 2 and f"tf32 {value.title()} has no effect on cpu: leave it out" in the_error(err)


def test_batchnorm_over_one_process_is_batchnorm(train, tmp_path):
    for arguments in ([], ["--sync-bn"]):
        code, _, err = train("--max-steps", "2", *arguments)
        assert code == 0, err
    plain, synced = (weights(tmp_path / "runs" / name) for name in ("small", "small-1"))
    for name, value in plain.items():
        torch.testing.assert_close(synced[name], value, rtol=1e-4, atol=1e-5)


def test_batchnorm_over_several_processes_is_for_gpus(monkeypatch):
    several = SimpleNamespace(device=torch.device("cpu"), mixed_precision="no", num_processes=2)
    monkeypatch.setattr(accelerator_module, "Accelerator", lambda **options: several)
    with pytest.raises(UserError, match="sync_bn is for GPUs"):
        create_accelerator(Recipe(sync_bn=True))


def test_an_unknown_compiler_is_refused(train, tmp_path):
    code, _, err = train("--torchcompile", "inducter")
    assert code == 2 and "did you mean 'inductor'" in the_error(err) and not (tmp_path / "runs").exists()


@pytest.fixture
def compiled(train, tmp_path) -> Path:
    """Run of a compiled model after that of the plain one; "eager" traces it and compiles nothing."""
    for arguments in ([], ["--torchcompile", "eager"]):
        code, _, err = train("--epochs", "2", "--model-ema-decay", "0.5", *arguments)
        assert code == 0, err
    yield tmp_path / "runs/small-1"
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_compiled_model_trains_like_the_plain_one(compiled):
    runs = compiled.with_name("small"), compiled
    for before, after in zip(*([line["train"] for line in lines(run)[:-1]] for run in runs)):
        assert before == pytest.approx(after, rel=1e-3)
    same = weights(compiled.with_name("small"))
    for name, value in weights(compiled).items():
        torch.testing.assert_close(value, same[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_the_checkpoint_of_a_compiled_model_is_the_plain_ones(compiled):
    runs = compiled.with_name("small"), compiled
    plain, names = (list(checkpoint(run, STEP_6)["model"]) for run in runs)
    assert names == plain


@pytest.mark.slow
def test_inductor_trains_like_the_plain_model(train, tmp_path, monkeypatch):
    for arguments in ([], ["--torchcompile", "inductor"]):
        code, _, err = train("--epochs", "1", "--model", "test_convnext", "--no-channels-last", *arguments)
        assert code == 0, err
    plain, compiled = (lines(tmp_path / "runs" / name)[0]["train"] for name in ("small", "small-1"))
    assert plain == pytest.approx(compiled, rel=1e-3)
    torch._dynamo.reset()


# a short last step


def trained_by_hand(start: dict[str, Tensor], images: Path) -> tuple[dict[str, Tensor], float]:
    """Weights and mean loss after an epoch of groups of 20, 20 and 8 images, each with its mean gradient."""
    model = timm.create_model("test_convnext", num_classes=3)
    model.load_state_dict(start)
    split = load_splits(str(images))["train"]
    config = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**config | dict(input_size=(3, 32, 32), crop_pct=1.0))
    pixels = torch.stack([transform(example["image"].convert("RGB")) for example in split])
    labels = torch.tensor(split["label"])
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    rest = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [dict(params=decayed, weight_decay=0.05), dict(params=rest, weight_decay=0.0)]
    optimizer = torch.optim.SGD(groups, lr=0.02, momentum=0.9, nesterov=True)
    order = torch.randperm(48, generator=torch.Generator().manual_seed(keyed_seed(0, "order", 0)))
    total = 0.0
    for group in order.split(20):
        optimizer.zero_grad()
        for row in group:  # one by one
            loss = F.cross_entropy(model(pixels[row][None]), labels[row][None])
            (loss / len(group)).backward()
            total += loss.item()
        optimizer.step()
    return model.state_dict(), total / 48


def test_a_short_last_step_takes_the_mean_gradient_of_its_images(train, tmp_path, image_folder):
    runs = [tmp_path / "runs" / name for name in ("small", "small-1", "small-2")]
    for steps in ("1", "2", "4"):  # the last 8 images are 8; 8; and 4 and 4
        options = ("--batch-size", "20", "--no-drop-last", "--epochs", "1", "--checkpoint-hist", "9")
        code, _, err = train(*PLAIN, *options, "--grad-accum-steps", steps)
        assert code == 0, err
    start = checkpoint(runs[0], "epoch-0000-image-00000000-step-00000000")["model"]
    expected, loss = trained_by_hand(start, image_folder)
    for run in runs:
        epoch, test = lines(run)
        assert test["step"] == 3 and epoch["train"]["loss"] == pytest.approx(loss, rel=1e-4)
        for name, value in weights(run).items():
            assert torch.allclose(value, expected[name], rtol=1e-3, atol=2e-5), name
    assert max((expected[name] - start[name]).abs().max() for name in expected) > 1e-2, "it has learned something"


@pytest.mark.parametrize(
    ("options", "processes", "rest", "fits"),
    [
        (dict(batch_size=8), 1, 1, False),  # BatchNorm of 1 image
        (dict(batch_size=8), 1, 2, True),
        (dict(batch_size=8, grad_accum_steps=4), 1, 3, False),  # as 2 and 1
        (dict(batch_size=8, grad_accum_steps=4), 1, 4, True),
        (dict(batch_size=8), 2, 3, False),  # on two devices as 2 and 1
        (dict(batch_size=8), 2, 5, True),
        (dict(batch_size=8, model="test_convnext"), 4, 3, False),  # one device has none
        (dict(batch_size=8, model="test_convnext"), 4, 4, True),
        (dict(batch_size=8, model="test_convnext"), 1, 1, True),
    ],
)
def test_a_last_step_that_is_too_short_is_refused(options, processes, rest, fits):
    recipe = Recipe(**dict(model="test_resnet") | options)
    model = timm.create_model(recipe.model)
    if fits:
        shares = processes * recipe.grad_accum_steps
        assert micro_batch_size(recipe, processes, model, rest) == recipe.batch_size // shares
        return
    with pytest.raises(UserError, match=f"the last step of an epoch has {rest} images for {processes} processes"):
        micro_batch_size(recipe, processes, model, rest)


def test_a_single_last_image_is_refused_through_the_script(train, tmp_path):
    code, _, err = train("--batch-size", "47", "--no-drop-last")
    assert code == 2 and "the last step of an epoch has 1 images" in the_error(err) and "--drop-last" in err
    assert not (tmp_path / "runs").exists()


# dry runs


@pytest.mark.parametrize("existing", [False, True], ids=["no folder of runs", "one"])
def test_a_dry_run_leaves_nothing_behind(train, tmp_path, existing):
    if existing:
        (tmp_path / "runs/small/checkpoints").mkdir(parents=True)
        (tmp_path / "runs/small/metrics.jsonl").write_text("precious")
    before = tree(tmp_path)
    code, out, err = train("--dry-run", "--model-ema-decay", "0.9", "--max-bad-images", "2")
    assert code == 0, err
    assert tree(tmp_path) == before
    shown = dict(re.findall(r"^(optimizer steps|evaluation batches|time|memory|disk) +(.*)$", out, re.MULTILINE))
    assert shown["optimizer steps"].startswith("6 (2 epochs x 3), ")
    assert shown["evaluation batches"].startswith("4, "), "15 images twice, and 21 in two batches"
    assert re.match(r"about \d+ seconds, ", shown["time"])
    assert float(shown["memory"].split()[0]) == pytest.approx(memory.peak_memory(torch.device("cpu")) / 1e9, abs=0.01)
    assert "nothing was kept" in out and "load it" not in out and "epoch 1/2" in out


def test_a_dry_run_foresees_the_disk_that_checkpoints_take(train, tmp_path):
    code, out, err = train(*QUICK, "--dry-run", "--checkpoint-hist", "5")
    assert code == 0, err
    foreseen = int(re.search(r"^disk +(\d+) MB", out, re.MULTILINE)[1])
    assert train(*QUICK, "--max-steps", "1")[0] == 0
    files = [path for path in (tmp_path / "runs/small/checkpoints").rglob("*") if path.name != "best.safetensors"]
    newest = sorted(path for path in files if path.name.startswith("epoch-"))[-1]
    one = sum(path.stat().st_size for path in files if path.parent == newest)
    assert foreseen == pytest.approx(6 * one / 1e6, abs=1)


def test_a_dry_run_estimates_from_its_second_step_and_its_evaluation(tmp_path):
    (tmp_path / "checkpoints/epoch-0000-image-00000032-step-00000002").mkdir(parents=True)
    (tmp_path / "checkpoints/epoch-0000-image-00000032-step-00000002/state.pt").write_bytes(bytes(3_000_000))
    (tmp_path / "checkpoints/epoch-0000-image-00000000-step-00000000").mkdir()
    measured = SimpleNamespace(step_ends=[17.0, 20.0], accelerator=SimpleNamespace(device=torch.device("cpu")))
    scores = Scores(torch.zeros(2, 1), torch.zeros(2, 1), torch.arange(2), num_classes=2, seconds=1.0)
    loaders = dict(train=range(30), val=range(10), test=range(4))
    recipe = Recipe(epochs=100, checkpoint_hist=3)
    text = dry_run.estimate(recipe, Plan(300, 10, 1), measured, loaders, scores, tmp_path)
    assert "3000 (100 epochs x 30), 3 s each" in text
    assert "1004, 0.5 s each" in text
    assert f"about {(3 * 3000 + 0.5 * 1004) / 3600:.1f} hours" in text
    assert "12 MB of checkpoints" in text
    for seconds, told in ((100, "100 seconds"), (120, "2.0 minutes"), (7200, "2.0 hours"), (200_000, "2.3 days")):
        assert dry_run._duration(seconds) == told


def test_a_dry_run_includes_the_comparison(train, tmp_path):
    plain = tmp_path / "plain.yaml"
    plain.write_text("model: test_resnet\nimg_size: 24\nlr: 2.0e-3\n")
    before = tree(tmp_path)
    code, out, err = train(*QUICK, "--dry-run", "--compare", str(plain))
    assert code == 0, err
    assert tree(tmp_path) == before
    assert out.count("optimizer steps") == 2 and "small epoch 1/2" in out and "plain epoch 1/2" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model-kwargs backbone=resnt50", "unknown timm model 'resnt50'"),
        ("--data /no/such/folder", "data folder '/no/such/folder' does not exist"),
        ("--batch-size 1000", "48 images, fewer than batch_size 1000"),
    ],
)
def test_a_dry_run_finds_mistakes(train, tmp_path, arguments, message):
    before = tree(tmp_path)
    code, _, err = train("--dry-run", *arguments.split())
    assert code == 2 and message in the_error(err)
    assert tree(tmp_path) == before


def test_a_dry_run_that_fails_leaves_nothing_behind(train, tmp_path, monkeypatch):
    run_out(monkeypatch, 1, torch.OutOfMemoryError("CUDA out of memory."))
    before = tree(tmp_path)
    code, _, err = train("--dry-run")
    assert code == 2 and "--grad-accum-steps 2" in the_error(err)
    assert tree(tmp_path) == before


def test_an_interrupted_dry_run_does_not_promise_to_go_on(train, tmp_path, monkeypatch):
    monkeypatch.setattr(StopRequest, "agreed", lambda request: signal.SIGTERM)
    before = tree(tmp_path)
    code, _, err = train("--dry-run")
    assert code == 128 + signal.SIGTERM and err.splitlines()[-1] == "stopped by SIGTERM"
    assert tree(tmp_path) == before


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="another place where no folder can be made")
def test_a_dry_run_finds_an_output_that_cannot_be_written(train):
    code, _, err = train("--dry-run", "--output", "/proc/runs")
    assert code == 2 and "output folder '/proc/runs' cannot be used: " in the_error(err)


def test_a_dry_run_finds_an_output_that_is_a_file(train, tmp_path):
    (tmp_path / "file").touch()
    code, _, err = train("--dry-run", "--output", str(tmp_path / "file"))
    assert code == 2 and "cannot be used" in err


# evaluation alone


@pytest.fixture
def evaluated(monkeypatch) -> list[dict[str, Tensor]]:
    """Weights that evaluations begin with."""
    seen, evaluate = [], train_accelerate.evaluate

    def note(accelerator, predict, *rest):
        seen.append({name: value.clone() for name, value in predict[1].state_dict().items()})
        return evaluate(accelerator, predict, *rest)

    monkeypatch.setattr(train_accelerate, "evaluate", note)
    return seen


@pytest.mark.parametrize("average", [False, True])
def test_validate_only_scores_the_newest_checkpoint_and_writes_nothing(
    train, tmp_path, image_folder, evaluated, average
):
    arguments = (*QUICK, "--epochs", "2", *(["--model-ema-decay", "0.5"] if average else []))
    assert train(*arguments)[0] == 0
    run, before = tmp_path / "runs/small", tree(tmp_path)
    for where in ("auto", str(run)):
        evaluated.clear()
        code, out, err = train(*arguments, "--resume", where, "--validate-only")
        assert code == 0, err
        told = json.loads(out.splitlines()[-1])
        assert told["top1"] == pytest.approx(top1_of_folder(run / "last", image_folder / "validation"))
        assert (told["split"], told["images"]) == ("validation", 15)
        assert len(evaluated) == 1
        assert all(torch.equal(evaluated[0][name], value) for name, value in weights(run, "last").items())
    assert tree(tmp_path) == before


def test_validate_only_tells_of_a_damaged_checkpoint_that_it_passes_over(train, tmp_path):
    arguments = (*QUICK, "--epochs", "2")
    assert train(*arguments)[0] == 0
    newest = max((tmp_path / "runs/small/checkpoints").iterdir())
    (newest / "state.pt").write_bytes(b"")
    code, _, err = train(*arguments, "--resume", "auto", "--validate-only")
    assert code == 0 and "not a whole checkpoint: " in err and newest.name in err


def test_a_start_that_fails_leaves_nothing_to_go_on_from(train, tmp_path, image_folder):
    photos = shutil.copytree(image_folder, tmp_path / "mine")
    broken = next((photos / "validation").rglob("*.png"))  # where the sampler's magnification is measured
    whole = broken.read_bytes()
    broken.write_bytes(whole[:50])
    code, _, err = train("--data", str(photos))
    assert code == 2 and "cannot be read" in err and not (tmp_path / "runs").exists()
    broken.write_bytes(whole)
    assert train("--data", str(photos), "--resume", "auto")[0] == 0


def test_validate_only_refuses_the_images_of_other_classes(train, tmp_path, image_folder):
    assert train(*QUICK, "--epochs", "1")[0] == 0
    other = shutil.copytree(image_folder, tmp_path / "other")
    for split in other.iterdir():
        (split / "red").rename(split / "ruby")
    code, _, err = train(*QUICK, "--data", str(other), "--resume", "auto", "--validate-only")
    assert code == 2 and "was trained on other classes than those of this data" in the_error(err)


def test_running_out_of_memory_while_validating_is_told(train, monkeypatch):
    assert train(*QUICK, "--epochs", "1")[0] == 0

    def run_out(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(train_accelerate, "evaluate", run_out)
    code, _, err = train(*QUICK, "--resume", "auto", "--validate-only")
    assert code == 2 and "out of memory with 16 images" in the_error(err)


def test_validate_only_scores_pretrained_weights(train, tmp_path, image_folder):
    assert train(*QUICK, "--epochs", "2")[0] == 0
    best = tmp_path / "runs/small/best"
    before = tree(tmp_path)
    arguments = ("--model", f"local-dir:{best}", "--pretrained", "--validate-only")
    for split in ("validation", "train"):
        code, out, err = train(*arguments, "--val-split", split)
        assert code == 0, err
        assert json.loads(out.splitlines()[-1])["top1"] == pytest.approx(top1_of_folder(best, image_folder / split))
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--validate-only", "--validate-only of random weights: add --resume auto"),
        ("--validate-only --resume auto", "--resume auto: there is no checkpoint of 'small' in"),
        ("--validate-only --resume nowhere", "--resume 'nowhere' is no folder with checkpoints"),
        ("--validate-only --resume auto --val-split null", "--validate-only needs a validation split"),
    ],
)
def test_validate_only_needs_weights_and_images(train, tmp_path, arguments, message):
    code, _, err = train(*arguments.split())
    assert code == 2 and message in the_error(err)
    assert not (tmp_path / "runs").exists()


# how long, and on what


def test_max_steps_ends_a_run_that_can_be_gone_on_with(train, tmp_path):
    runs = tmp_path / "runs"
    assert train(*QUICK)[0] == 0  # 6 steps
    assert train(*QUICK, "--output", str(runs / "other"), "--max-steps", "4")[0] == 0
    short, whole = runs / "other/small", runs / "small"
    *epochs, test = lines(short)
    assert [(line["step"], line["epoch"]) for line in epochs] == [(3, 1), (4, 2)]
    assert epochs[1]["validation"]["images"] == 15 and (test["step"], test["test"]["images"]) == (4, 21)
    assert sorted(path.name for path in (short / "checkpoints").iterdir())[-1] == STEP_4
    code, out, err = train(*QUICK, "--output", str(runs / "other"), "--resume", "auto")
    assert code == 0 and "resumed from" in out, err
    assert (short / "last/model.safetensors").read_bytes() == (whole / "last/model.safetensors").read_bytes()
    plain = [{name: value for name, value in line.items() if name != "speed"} for line in metrics(whole)]
    assert [{name: value for name, value in line.items() if name != "speed"} for line in metrics(short)] == plain


def test_max_steps_at_the_end_of_an_epoch_ends_there(train, tmp_path):
    assert train(*QUICK, "--max-steps", "3")[0] == 0
    run = tmp_path / "runs/small"
    assert [(line["step"], line.get("epoch")) for line in lines(run)] == [(3, 1), (3, None)]
    assert sorted(path.name for path in (run / "checkpoints").iterdir())[-1] == STEP_3


def test_a_few_images_can_be_learned_by_heart(train, tmp_path, monkeypatch):
    loaders = []
    build_loaders = train_accelerate.build_loaders
    monkeypatch.setattr(
        train_accelerate, "build_loaders", lambda *args: loaders.append(build_loaders(*args)) or loaders[-1]
    )
    arguments = "--overfit-batches 2 --batch-size 6 --epochs 15 --model test_resnet --lr 1e-2 --aa rand-m9".split()
    code, _, err = train(*arguments, "--reprob", "1", "--log-interval", "99")
    assert code == 0, err
    *epochs, last = lines(tmp_path / "runs/small")
    assert "test" not in last and last["step"] == 30
    assert last["train"]["loss"] < 0.05 < 0.5 < epochs[0]["train"]["loss"]
    assert last["validation"] == dict(top1=100.0, images=12)
    ((few),) = loaders
    shown = [{image.images[0][row].numpy().tobytes() for image in few[role] for row in range(6)} for role in few]
    assert list(few) == ["train", "val"] and shown[0] == shown[1] and len(shown[0]) == 12, "pixel by pixel"


# mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--max-steps 0", "max_steps must be at least 1, got 0"),
        ("--max-steps 1.5", "max_steps must be a whole number, got 1.5"),
        ("--dry-run --max-steps 3", "max_steps=3 has no effect with dry_run"),
        ("--dry-run --resume auto", "resume='auto' has no effect with dry_run"),
        ("--dry-run --validate-only", "validate_only=True has no effect with dry_run"),
        ("--validate-only --max-steps 3 --resume auto", "max_steps=3 has no effect with validate_only"),
        ("--resume-inexact", "resume_inexact=True has no effect with resume=None"),
        ("--resume nowhere", "--resume 'nowhere' is no folder with checkpoints"),
        ("--freeze backbne=1", "unknown part of the model in freeze: 'backbne': did you mean 'backbone'"),
        ("--freeze backbone=0", "freeze: backbone must have a number of epochs"),
        ("--freeze backbone=9 heads=9 attention_net=1", "leaves nothing to train in epoch 0 (of 0 to 1)"),
        ("--mixup -1", "mixup must be 0 or more"),
        ("--layer-decay 1", "layer_decay must be more than 0 and less than 1"),
        ("--model-ema-decay 1", "model_ema_decay must be more than 0 and less than 1"),
        ("--clip-grad 0", "clip_grad must be more than 0"),
        ("--overfit-batches -1", "overfit_batches must be 0 or more"),
        ("--recovery-interval 0", "recovery_interval must be at least 1"),
        ("--checkpoint-hist 0", "checkpoint_hist must be at least 1"),
        ("--log-interval 0", "log_interval must be at least 1"),
        ("--streaming --no-drop-last", "drop_last=False has no effect with streaming"),
        ("--trackers tensorboard", "trackers must be a list [...], got 'tensorboard'"),
        ("--overfit-batches 3 --batch-size 64", "fewer than batch_size 64"),
        ("--model vit_tiny_patch16_224", "does not take pictures of img_size 32: Input height (32) doesn't"),
        ("--drop-lst", "did you mean '--drop-last'"),
    ],
)
def test_mistakes_get_one_line_before_anything_is_written(train, tmp_path, arguments, message):
    code, _, err = train(*arguments.split())
    assert code == 2 and message in the_error(err)
    assert not (tmp_path / "runs").exists()


def test_what_validate_only_does_not_look_at_is_refused(train):
    code, _, err = train("--validate-only", "--resume", "auto", "--resume-inexact")
    assert code == 2 and "has no effect" in the_error(err)


def test_images_of_a_stream_cannot_be_picked(train, tmp_path, image_folder, monkeypatch):
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    data = stream_folder(image_folder, tmp_path / "parquet", info=True)
    code, _, err = train("--streaming", "--data", str(data), "--overfit-batches", "1")
    assert code == 2 and "overfit_batches=1 has no effect with streaming" in the_error(err)
