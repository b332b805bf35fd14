"""What the options of a training do: gradients, memory, freezing, mixing, precision, logs, dry runs and so on."""

import hashlib
import json
import math
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import test_train
import timm
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from PIL import Image
from test_train import SCRIPT, lines, stream_folder, top1_of_folder, train_accelerate, weights
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.nn import functional as F

from tasn_timm.attention_sampler import attention_grid, magnification
from tasn_timm.data.loading import keyed_seed
from tasn_timm.data.splits import load_splits
from tasn_timm.errors import NumericalError, UserError
from tasn_timm.recipe import Recipe
from tasn_timm.tasn import TASN
from tasn_timm.training import accelerator as accelerator_module
from tasn_timm.training import build, dry_run, memory, progress
from tasn_timm.training.accelerator import create_accelerator
from tasn_timm.training.evaluation import Scores
from tasn_timm.training.freezing import FreezeSchedule
from tasn_timm.training.gradients import FiniteGuard, Step, clip_gradient
from tasn_timm.training.loaders import Plan
from tasn_timm.training.memory import out_of_memory
from tasn_timm.training.objective import micro_batch_size
from tasn_timm.training.zoom import ZoomProbe

recipe, train = test_train.recipe, test_train.train  # fixtures

QUICK = ("--model", "test_resnet")  # where the model does not matter

# Nothing random, no BatchNorm, and a learning rate that stays: a step depends on the mean gradient alone.
PLAIN = "--model test_convnext --no-channels-last --hflip 0 --crop-padding 0 --opt sgd --lr 0.02 --min-lr 0.02".split()


@pytest.fixture
def accelerator() -> Accelerator:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return Accelerator(cpu=True, mixed_precision="no")


def tree(folder: Path) -> dict[str, str]:
    """Every file below a folder, hidden ones too, and what is in it; folders as well."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in folder.rglob("*")
    }


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def checkpoint(run: Path, name: str) -> dict:
    return torch.load(run / "checkpoints" / name / "state.pt", weights_only=True)


def epochs_of(run: Path) -> list[dict]:
    """Weights and statistics in every checkpoint: at the beginning and after each epoch."""
    return [checkpoint(run, folder.name)["model"] for folder in sorted((run / "checkpoints").iterdir())]


def the_error(err: str) -> str:
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in err
    return line


def on_every_loss(monkeypatch, change: Callable[..., dict]) -> None:
    """Pass what the objective returns through `change`(model, number of the call from 1, losses, targets, output)."""
    create, calls = build.create_objective, []

    def create_changed(model, recipe):
        objective = create(model, recipe)

        def changed(output, target):
            calls.append(None)
            return change(model, len(calls), objective(output, target), target, output)

        return changed

    monkeypatch.setattr(build, "create_objective", create_changed)


# gradients


@pytest.mark.parametrize("largest", [None, 0.1, 1e6])
def test_clipping_and_the_norm_are_torchs(accelerator, largest):
    def model() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2), nn.Linear(5, 5))  # the last one gets no gradient
        model[1](model[0](torch.arange(8.0).view(2, 4))).square().sum().backward()
        return model

    ours, theirs = model(), model()
    expected = math.sqrt(sum(float((p.grad.double() ** 2).sum()) for p in theirs.parameters() if p.grad is not None))
    torch.nn.utils.clip_grad_norm_(theirs.parameters(), math.inf if largest is None else largest)
    assert clip_gradient(accelerator, ours, largest).item() == pytest.approx(expected)
    for got, wanted in zip(ours[:2].parameters(), theirs[:2].parameters()):
        torch.testing.assert_close(got.grad, wanted.grad, rtol=1e-6, atol=0)
    assert expected > 0.1 and ours[2].weight.grad is None


def guard_of(accelerator: Accelerator, weight: Tensor | None = None, **options) -> FiniteGuard:
    weight = torch.ones(1, requires_grad=True) if weight is None else weight
    optimizer = AcceleratedOptimizer(torch.optim.SGD([weight], lr=1.0), scaler=accelerator.scaler)
    return FiniteGuard(accelerator, optimizer, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_finite_loss_is_marked_by_nothing(accelerator, dtype):
    weight = torch.randn(50, dtype=dtype, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = weight.square().sum() / 3
    marked = guard_of(accelerator).marked(loss)
    assert marked.item() == loss.item()
    (plain,) = torch.autograd.grad(loss, weight, retain_graph=True)
    (through,) = torch.autograd.grad(marked, weight)
    assert torch.equal(plain, through)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_loss_that_is_not_finite_makes_every_gradient_nan(accelerator, value):
    first, second = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    # The value comes with a gradient of 0, which would hide it from the gradient's norm.
    loss = first.sum() + 0 * second.sum() + torch.tensor(value)
    guard_of(accelerator).marked(loss).backward()
    assert first.grad.isnan().all() and second.grad.isnan().all()


def step_of(number: int, norm: float, *losses: dict[str, float]) -> Step:
    losses = [{name: torch.tensor(value) for name, value in each.items()} for each in losses or [dict(loss=1.0)]]
    return Step(number, 4, 0.0125, losses, [f"bird-{number}", "other"], torch.tensor(norm))


def test_a_spoiled_step_is_told_before_the_optimizer_with_all_that_is_known(accelerator):
    guard = guard_of(accelerator)
    guard.check(step_of(6, 2.0))
    with pytest.raises(NumericalError) as error:
        guard.check(step_of(7, math.nan, dict(loss=0.5, soft=0.25), dict(loss=math.nan, soft=math.inf)))
    message = str(error.value)
    assert message.startswith("the loss is not finite in step 7 (epoch 4): loss nan, soft inf, gradient norm nan,")
    assert "learning rate 0.0125, images bird-7, other." in message
    with pytest.raises(NumericalError, match="^the gradient is not finite in step 8 .epoch 4.: loss 0.5, gradient nor"):
        guard.check(step_of(8, math.inf, dict(loss=0.5), dict(loss=0.75)))
    guard.check(step_of(9, 1.0))
    guard.flush()


def test_a_device_that_computes_ahead_is_asked_one_step_later(accelerator):
    guard = guard_of(accelerator, lagging=True)
    guard.check(step_of(1, 1.0))
    guard.check(step_of(2, math.inf))
    with pytest.raises(NumericalError, match="in step 2 "):
        guard.check(step_of(3, 1.0))
    guard = guard_of(accelerator, lagging=True)
    guard.check(step_of(2, math.inf))
    with pytest.raises(NumericalError, match="in step 2 "):
        guard.flush()
    guard.flush()


def test_fp16_skips_a_gradient_that_overflows_until_the_scale_is_below_1(accelerator):
    accelerator.scaler = scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    weight = torch.ones(1, requires_grad=True)
    guard = guard_of(accelerator, weight)

    def step(number: int, factor: float) -> None:
        scaler.scale(weight.sum() * factor).backward()
        guard.check(step_of(number, weight.grad.norm().item()))
        guard.optimizer.step()
        guard.optimizer.zero_grad()

    step(1, math.inf)
    assert weight.item() == 1.0 and scaler.get_scale() == 1.0, "skipped"
    step(2, 0.25)
    assert weight.item() == 0.75, "trained: lr 1"
    step(3, math.inf)
    assert weight.item() == 0.75 and scaler.get_scale() == 0.5
    with pytest.raises(NumericalError, match="in step 3 "):
        step(4, 0.25)


def test_a_nan_ends_the_run_before_it_reaches_weights_or_files(train, tmp_path, monkeypatch, image_folder):
    run, before = tmp_path / "runs/small", {}

    def spoil(model, call, losses, target, output):
        if call == 5:
            before.update(model=model, files=tree(run), weights={n: t.clone() for n, t in model.state_dict().items()})
            return losses | dict(loss=losses["loss"] + math.nan)  # whose gradient is finite
        return losses

    on_every_loss(monkeypatch, spoil)
    code, _, err = train("--recovery-interval", "1", "--model", "test_convnext", "--no-channels-last")
    assert code == 3
    assert tree(run) == before["files"] and (run / "best/model.safetensors").exists()
    saved = checkpoint(run, "epoch-0001-step-00000004")["model"]
    for name, value in before["model"].state_dict().items():
        assert torch.equal(value, before["weights"][name]) and torch.equal(value, saved[name]), name

    message = the_error(err)
    assert "the loss is not finite in step 5 (epoch 2): loss nan, gradient norm nan, learning rate " in message
    order = torch.randperm(48, generator=torch.Generator().manual_seed(keyed_seed(0, "order", 1)))
    names = re.search(r"images (.*)\. Nothing of it was saved", message)[1].split(", ")
    assert names == [str(index) for index in order[16:32].tolist()]
    assert len(load_splits(str(image_folder))["train"]) == 48, "so these rows exist"


def test_a_rate_that_is_much_too_high_leaves_only_finite_checkpoints(train, tmp_path):
    code, _, err = train("--opt", "sgd", "--lr", "1e30", "--recovery-interval", "1", "--checkpoint-hist", "9")
    assert code == 3 and "lower lr or set clip_grad" in the_error(err)
    states = epochs_of(tmp_path / "runs/small")
    assert len(states) >= 2
    assert all(tensor.isfinite().all() for state in states for tensor in state.values())


# memory


def run_out(monkeypatch, images: int, error: Exception) -> None:
    """Training on more images at a time than this fails."""
    forward = TASN.forward

    def limited(model, image):
        if model.training and len(image) > images:
            raise error
        return forward(model, image)

    monkeypatch.setattr(TASN, "forward", limited)


def test_running_out_of_memory_names_a_setting_that_works(train, monkeypatch):
    run_out(monkeypatch, 8, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."))
    code, _, err = train("--epochs", "1")
    assert code == 2
    message = the_error(err)
    assert "out of memory with 16 images of 32 x 32 pixels at a time (batch_size 16 / 1 processes / 1 grad" in message
    advice = re.search(r"--grad-accum-steps (\d+) has the same batch_size 16 with 8 images at a time", message)
    assert advice and int(advice[1]) == 2
    code, _, err = train("--max-steps", "1", "--grad-accum-steps", advice[1])
    assert code == 0, err


def test_what_cannot_be_halved_needs_a_smaller_batch(train, monkeypatch):
    run_out(monkeypatch, 1, torch.OutOfMemoryError("CUDA out of memory."))
    code, _, err = train("--batch-size", "6", "--grad-accum-steps", "2")
    assert code == 2
    message = the_error(err)
    assert "with 3 images" in message and "cpu: use a smaller --batch-size; --mixed-precision" in message


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("steps", [1, 2])
def test_the_advice_divides_and_is_the_nearest(processes, steps):
    for size in range(2, 40):
        recipe = Recipe(batch_size=size * processes * steps, grad_accum_steps=steps)
        accelerator = SimpleNamespace(num_processes=processes, device="cpu")
        with pytest.raises(UserError) as error, out_of_memory(recipe, accelerator, size):
            raise torch.OutOfMemoryError
        possible = [n for n in range(1, recipe.batch_size + 1) if recipe.batch_size % (processes * n) == 0]
        enough = [n for n in possible if 2 <= recipe.batch_size / (processes * n) <= size / 2]
        advised = re.findall(r"--grad-accum-steps (\d+)", str(error.value))
        assert advised == [str(n) for n in enough[:1]], size


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at alloc_cpu.cpp:114] err == 0. DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
    ids=["CPU", "Python"],
)
def test_a_cpu_runs_out_of_memory_too(train, monkeypatch, error):
    run_out(monkeypatch, 8, error)
    code, _, err = train()
    assert code == 2 and "out of memory with 16 images" in the_error(err)


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), KeyError("x")])
def test_other_errors_stay_what_they_are(train, monkeypatch, error):
    run_out(monkeypatch, 8, error)
    with pytest.raises(type(error)) as raised:
        train()
    assert raised.value is error


@pytest.mark.parametrize("kind", [NotImplementedError, RecursionError, torch.AcceleratorError])
def test_errors_that_happen_to_be_runtime_errors_stay_what_they_are(train, monkeypatch, kind):
    run_out(monkeypatch, 8, kind("device-side assert triggered"))
    with pytest.raises(kind):
        train()


@pytest.mark.parametrize(
    "arguments",
    [
        "--batch-size 6 --mixup 0.2 --model-kwargs part_net=False",  # not 3 images at a time: mixup needs pairs
        "--batch-size 4 --no-drop-last --train-split validation",  # 15 images: the last 3 would be 2 and 1
    ],
    ids=["mixup", "short last step"],
)
def test_the_advice_is_one_that_the_recipe_takes(train, monkeypatch, arguments):
    with monkeypatch.context() as patch:
        run_out(patch, 3, torch.OutOfMemoryError("CUDA out of memory."))
        _, _, err = train(*arguments.split())
    for steps in re.findall(r"--grad-accum-steps (\d+)", the_error(err)):
        code, _, err = train("--grad-accum-steps", steps, *arguments.split())
        assert code == 0, err


def test_the_memory_of_a_cpu_is_the_process_at_its_peak():
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("tells how much it was on Linux only")
    peak = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]
    assert memory.peak_memory(torch.device("cpu")) == pytest.approx(1024 * int(peak), rel=0.02)


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
    plain, names = (list(checkpoint(run, "epoch-0002-step-00000006")["model"]) for run in runs)
    assert names == plain


@pytest.mark.slow
def test_inductor_trains_like_the_plain_model(train, tmp_path, monkeypatch):
    for arguments in ([], ["--torchcompile", "inductor"]):
        code, _, err = train("--epochs", "1", "--model", "test_convnext", "--no-channels-last", *arguments)
        assert code == 0, err
    plain, compiled = (lines(tmp_path / "runs" / name)[0]["train"] for name in ("small", "small-1"))
    assert plain == pytest.approx(compiled, rel=1e-3)
    torch._dynamo.reset()


# trackers


class Recorder(GeneralTracker):
    """What accelerate's trackers are asked to do."""

    name = "recorder"
    requires_logging_directory = True
    made: list["Recorder"] = []  # noqa: RUF012, read by the tests

    def __init__(self, run_name: str, logging_dir: str) -> None:
        super().__init__()
        self.run_name, self.logging_dir = run_name, logging_dir
        self.logged: list[tuple[int, dict]] = []
        self.finished = 0
        self.made.append(self)

    @property
    def tracker(self) -> "Recorder":
        return self

    def store_init_configuration(self, values: dict) -> None:
        self.config = values

    def log(self, values: dict, step: int | None = None) -> None:
        assert not self.finished
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def recorders(monkeypatch) -> list[Recorder]:
    monkeypatch.setattr(Recorder, "made", [])
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "recorder", Recorder)
    monkeypatch.setitem(sys.modules, "recorder", module := ModuleType("recorder"))
    module.__spec__ = SimpleNamespace(name="recorder")  # installed
    return Recorder.made


def flat(values: dict, prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}/")
        elif value is not None:
            yield prefix + name, value


def test_a_tracker_gets_every_line_of_the_metrics_at_its_step(train, tmp_path, recorders):
    code, _, err = train("--trackers", "[recorder]", "--log-interval", "2", "--seed", "7")
    assert code == 0, err
    (recorder,) = recorders
    every = metrics(tmp_path / "runs/small")
    assert [step for step, _ in recorder.logged] == [2, 3, 5, 6, 6], "a line, an epoch, a line, an epoch, the test"
    assert [dict(flat(line)) for line in every] == [values for _, values in recorder.logged]
    assert recorder.logged[0][1].keys() > {"train/loss", "train/grad_norm", "lr", "speed/data_wait"}
    assert recorder.logged[1][1].keys() > {"validation/top1", "zoom/x", "epoch"}
    assert recorder.logged[4][1].keys() == {"step", "test/top1", "test/images"}
    assert recorder.config["seed"] == 7 and recorder.config["freeze"] == "{}" and recorder.config["tf32"] == "None"
    assert recorder.logging_dir == str(tmp_path / "runs/small")
    assert recorder.finished


def test_a_tracker_is_finished_once(train, recorders):
    assert train(*QUICK, "--max-steps", "1", "--trackers", "[recorder]")[0] == 0
    assert [recorder.finished for recorder in recorders] == [1]


def test_a_tracker_is_finished_when_the_run_fails(train, recorders):
    assert train(*QUICK, "--opt", "sgd", "--lr", "1e30", "--trackers", "[recorder]")[0] == 3
    assert [recorder.finished for recorder in recorders] == [1]


def test_a_comparison_has_a_tracker_of_its_own(train, tmp_path, recorders):
    plain = tmp_path / "plain.yaml"
    plain.write_text("model: test_resnet\nimg_size: 24\nlr: 2.0e-3\n")
    code, _, err = train(*QUICK, "--epochs", "1", "--trackers", "[recorder]", "--compare", str(plain))
    assert code == 0, err
    first, second = recorders
    runs = tmp_path / "runs/small", tmp_path / "runs/small/plain"
    for recorder, run in zip((first, second), runs):
        assert recorder.logging_dir == str(run) and recorder.finished
        assert [dict(flat(line)) for line in metrics(run)] == [values for _, values in recorder.logged]


def test_a_dry_run_tracks_nothing(train, recorders):
    code, _, err = train(*QUICK, "--dry-run", "--trackers", "[recorder]")
    assert code == 0, err
    assert not recorders


def test_unknown_and_missing_trackers_are_told(train, monkeypatch, tmp_path):
    code, _, err = train("--trackers", "[tensorbord]")
    assert code == 2 and "unknown tracker 'tensorbord': did you mean 'tensorboard'?" in the_error(err)
    monkeypatch.setattr(accelerator_module, "find_spec", lambda name: None)
    code, _, err = train("--trackers", "[wandb]")
    assert code == 2 and the_error(err) == "error: tracker wandb is not installed: pip install wandb."
    assert not (tmp_path / "runs").exists()


def test_tensorboard_shows_the_numbers_of_the_metrics(train, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    code, _, err = train("--trackers", "[tensorboard]")
    assert code == 0, err
    shown = {}
    for file in (tmp_path / "runs/small").rglob("events.out.tfevents.*"):
        events = EventAccumulator(str(file)).Reload()
        for tag in events.Tags()["scalars"]:
            for event in events.Scalars(tag):
                shown.setdefault((tag, event.step), []).append(event.value)
    expected = {}
    for line in metrics(tmp_path / "runs/small"):
        for tag, value in flat(line):
            expected.setdefault((tag, line["step"]), []).append(value)
    assert shown.keys() == expected.keys()
    for key, values in expected.items():
        assert shown[key] == pytest.approx(values, rel=1e-6), key


# metrics


def record(monkeypatch) -> tuple[list[tuple[dict, int]], list[float]]:
    """Fills with what the objective returned, and for how many images; and with the gradient's norms."""
    losses, norms = [], []

    def note(model, call, values, target, output):
        losses.append(({name: value.item() for name, value in values.items()}, len(target)))
        return values

    def clip(*arguments):
        norm = clip_gradient(*arguments)
        norms.append(norm.item())
        return norm

    on_every_loss(monkeypatch, note)
    monkeypatch.setattr(train_accelerate, "clip_gradient", clip)
    return losses, norms


def mean(losses: list[tuple[dict, int]]) -> dict[str, float]:
    images = sum(count for _, count in losses)
    return {name: sum(values[name] * count for values, count in losses) / images for name in losses[0][0]}


def test_lines_and_epochs_are_means_of_what_the_objective_returned(train, tmp_path, monkeypatch):
    losses, norms = record(monkeypatch)
    code, _, err = train(*"--batch-size 16 --grad-accum-steps 2 --log-interval 3 --lr 1e-3 --min-lr 1e-4".split())
    assert code == 0, err
    every = metrics(tmp_path / "runs/small")
    # 6 passes in 3 steps an epoch: the third pass is in the second step, the sixth in the third.
    told = [(2, None), (3, None), (3, 1), (5, None), (6, None), (6, 2)]
    assert [(line["step"], line.get("epoch")) for line in every[:-1]] == told
    expected = [(0, 4), (4, 6), (0, 6), (6, 10), (10, 12), (6, 12)]
    for line, (start, end) in zip(every, expected):
        wanted = mean(losses[start:end]) | dict(grad_norm=float(np.mean(norms[start // 2 : end // 2])))
        assert set(wanted) == {"loss", "structure", "detail", "soft", "attention", "grad_norm"}
        assert line["train"] == pytest.approx(wanted, rel=1e-5)
        cosine = (1 + math.cos(math.pi * line["step"] / 6)) / 2
        assert line["lr"] == pytest.approx(1e-4 + 9e-4 * cosine), "that of the next step"
        assert set(line["speed"]) == {"images_per_second", "data_wait", "memory_mb"}
        assert 0 <= line["speed"]["data_wait"] <= 1 and line["speed"]["images_per_second"] > 0
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000 * 1.024
        assert peak / 2 < line["speed"]["memory_mb"] <= peak + 1 or sys.platform == "darwin"
    assert every[0].keys() == {"step", "lr", "train", "speed"}
    assert every[2].keys() == {"step", "epoch", "lr", "train", "validation", "zoom", "speed"}
    assert [line["validation"]["images"] for line in every if "epoch" in line] == [15, 15]


def test_an_epoch_weighs_its_steps_by_their_images(train, tmp_path, monkeypatch):
    losses, norms = record(monkeypatch)
    code, _, err = train(*PLAIN, "--batch-size", "20", "--no-drop-last", "--epochs", "1")
    assert code == 0, err
    assert [count for _, count in losses] == [20, 20, 8]
    epoch = lines(tmp_path / "runs/small")[0]["train"]
    assert epoch["loss"] == pytest.approx(mean(losses)["loss"], rel=1e-6)
    assert epoch["loss"] != pytest.approx(np.mean([values["loss"] for values, _ in losses]), rel=1e-6)
    assert epoch["grad_norm"] == pytest.approx(np.mean(norms), rel=1e-6)


def test_speed_is_measured_between_the_lines(accelerator, monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def loader() -> Iterator[int]:
        for wait in (1.0, 1.0, 4.0):
            now[0] += wait
            yield 0

    tracked = progress.Progress(accelerator, "title", done=2, total=5)
    speeds = []
    for number in tracked.over(loader()):
        now[0] += 3.0
        tracked.add(dict(loss=torch.tensor(2.5)), 10)
        tracked.end_step(10)
        if now[0] in (108.0, 115.0):
            speeds.append(tracked.end_line()[1])
        assert number == 0
    device = torch.device("cpu")
    speeds.append(tracked.epoch.speed(device))
    assert [speed["images_per_second"] for speed in speeds] == [20 / 8, pytest.approx(10 / 7, abs=0.05), 30 / 15]
    assert [speed["data_wait"] for speed in speeds] == pytest.approx([2 / 8, 4 / 7, 6 / 15], abs=1e-4)
    assert tracked.step_ends == [104.0, 108.0, 115.0]
    assert "title  batch 4/5  loss 2.500" in capsys.readouterr().err


def test_layer_decay_logs_the_lowest_rate_as_well(train, tmp_path):
    code, _, err = train("--model", "test_resnet", "--layer-decay", "0.5", "--epochs", "1", "--log-interval", "1")
    assert code == 0, err
    groups = param_groups_layer_decay(timm.create_model("test_resnet"), layer_decay=0.5)
    scales = [group["lr_scale"] for group in groups]
    line = metrics(tmp_path / "runs/small")[0]
    assert max(scales) == 1 > min(scales)
    assert line["lr_lowest"] / line["lr"] == pytest.approx(min(scales))


# zoom


def test_magnification_is_how_far_apart_neighbours_look():
    """By loops: central differences, one-sided at the border, in steps of a plain resize."""
    torch.manual_seed(0)
    grid = attention_grid(torch.rand(2, 5, 6, dtype=torch.float64), (7, 9), size=(70, 90))
    got = magnification(grid)
    for image in range(2):
        for row in range(7):
            for column in range(9):
                left, right = max(column - 1, 0), min(column + 1, 8)
                up, down = max(row - 1, 0), min(row + 1, 6)
                x = (grid[image, row, right, 0] - grid[image, row, left, 0]) / (right - left) / (2 / 9)
                y = (grid[image, down, column, 1] - grid[image, up, column, 1]) / (down - up) / (2 / 7)
                assert got[image, row, column].tolist() == pytest.approx([1 / float(x), 1 / float(y)])
    assert got.std() > 0.1


def test_a_plain_resize_magnifies_nothing_and_a_crop_evenly():
    plain = attention_grid(torch.ones(1, 3, 3), (8, 5), size=(64, 40))
    torch.testing.assert_close(magnification(plain), torch.ones(1, 8, 5, 2), rtol=1e-4, atol=0)
    crop = plain * torch.tensor([0.5, 0.25]) + torch.tensor([0.1, -0.2])
    torch.testing.assert_close(magnification(crop), torch.tensor([2.0, 4.0]).expand(1, 8, 5, 2), rtol=1e-4, atol=0)


def zoom_of(grid: np.ndarray) -> dict[str, float]:
    """ZoomProbe's numbers of positions (B, H, W, 2), in NumPy."""
    height, width = grid.shape[1:3]
    steps_x = np.gradient(grid[..., 0], axis=2) * width / 2
    steps_y = np.gradient(grid[..., 1], axis=1) * height / 2
    halves = []
    for area in (steps_x * steps_y).reshape(len(grid), -1):
        smallest = sorted(area)[: area.size // 2]
        halves.append(sum(smallest) / sum(area))
    return dict(
        x=np.mean(1 / steps_x.min((1, 2))),
        y=np.mean(1 / steps_y.min((1, 2))),
        largest=1 / min(steps_x.min(), steps_y.min()),
        area_of_half=np.mean(halves),
    )


def probe_of(accelerator: Accelerator, model: nn.Module, pictures: int) -> ZoomProbe:
    """Of pictures, each of which shows its number."""
    dataset = [((torch.full((3, 32, 32), number),), 0) for number in range(pictures)]
    loader = SimpleNamespace(dataset=dataset)
    return ZoomProbe(model, loader, lambda images: images[0].float(), accelerator)


def small_tasn(**options) -> TASN:
    torch.manual_seed(0)
    kwargs = dict(backbone="test_resnet", sample_size=24, attention_net="tiny", num_classes=3)
    return timm.create_model("tasn", **kwargs | options)


def test_the_probe_measures_the_grids_of_pictures_from_all_over_the_split(accelerator, monkeypatch):
    model, seen = small_tasn(), []
    torch.manual_seed(1)
    grids = attention_grid(torch.rand(16, 4, 6) ** 3, 24, size=(32, 32), max_zoom=None, iterations=0)

    def sampling_grid(images):
        assert not model.training
        seen.extend(images[:, 0, 0, 0].tolist())
        return grids

    monkeypatch.setattr(model, "sampling_grid", sampling_grid)
    measured = probe_of(accelerator, model, 160).measure()
    assert seen == list(range(0, 160, 10))
    assert measured == pytest.approx(zoom_of(grids.double().numpy()), rel=1e-3)
    assert measured["largest"] > 1.2 * measured["x"] > 1.25 * measured["y"] > 1.8 and measured["area_of_half"] < 0.45


def test_flat_attention_zooms_nowhere(accelerator, monkeypatch):
    model = small_tasn()
    monkeypatch.setattr(model.trilinear_attention, "forward", lambda features: (torch.ones(len(features), 4, 4), None))
    measured = probe_of(accelerator, model, 5).measure()
    assert measured == pytest.approx(dict(x=1, y=1, largest=1, area_of_half=0.5), rel=1e-3)
    assert probe_of(accelerator, timm.create_model("test_resnet"), 5).measure() is None


def test_the_zoom_of_an_epoch_is_that_of_its_model_on_the_validation_images(train, tmp_path, image_folder):
    code, _, err = train("--epochs", "1")
    assert code == 0, err
    logged = lines(tmp_path / "runs/small")[0]["zoom"]
    model = timm.create_model(f"local-dir:{tmp_path / 'runs/small/last'}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    paths = sorted((image_folder / "validation").glob("*/*.png"))
    with torch.inference_mode():
        grid = model.sampling_grid(torch.stack([transform(Image.open(path)) for path in paths]))
    assert len(grid) == 15 and logged == pytest.approx(zoom_of(grid.double().numpy()), rel=1e-2)


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
    start = checkpoint(runs[0], "epoch-0000-step-00000000")["model"]
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
    (tmp_path / "checkpoints/epoch-0000-step-00000002").mkdir(parents=True)
    (tmp_path / "checkpoints/epoch-0000-step-00000002/state.pt").write_bytes(bytes(3_000_000))
    (tmp_path / "checkpoints/epoch-0000-step-00000000").mkdir()
    measured = SimpleNamespace(step_ends=[17.0, 20.0], accelerator=SimpleNamespace(device=torch.device("cpu")))
    scores = Scores(torch.tensor([1]), torch.tensor([2]), None, seconds=1.0)
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
    assert sorted(path.name for path in (short / "checkpoints").iterdir())[-1] == "epoch-0001-step-00000004"
    code, out, err = train(*QUICK, "--output", str(runs / "other"), "--resume", "auto")
    assert code == 0 and "resumed from" in out, err
    assert (short / "last/model.safetensors").read_bytes() == (whole / "last/model.safetensors").read_bytes()
    plain = [{name: value for name, value in line.items() if name != "speed"} for line in metrics(whole)]
    assert [{name: value for name, value in line.items() if name != "speed"} for line in metrics(short)] == plain


def test_max_steps_at_the_end_of_an_epoch_ends_there(train, tmp_path):
    assert train(*QUICK, "--max-steps", "3")[0] == 0
    run = tmp_path / "runs/small"
    assert [(line["step"], line.get("epoch")) for line in lines(run)] == [(3, 1), (3, None)]
    assert sorted(path.name for path in (run / "checkpoints").iterdir())[-1] == "epoch-0001-step-00000003"


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
        ("--max-steps 1.5", "max_steps must be int, got 1.5"),
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
        ("--clip-grad -1", "clip_grad must be 0 or more"),
        ("--overfit-batches -1", "overfit_batches must be 0 or more"),
        ("--recovery-interval 0", "recovery_interval must be at least 1"),
        ("--checkpoint-hist 0", "checkpoint_hist must be at least 1"),
        ("--log-interval 0", "log_interval must be at least 1"),
        ("--streaming --no-drop-last", "drop_last=False has no effect with streaming"),
        ("--trackers tensorboard", "trackers must be list, got 'tensorboard'"),
        ("--overfit-batches 3 --batch-size 64", "fewer than batch_size 64"),
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
