"""What ends a training that goes wrong: numbers that are not finite, too little memory."""

import math
import re
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from training_runs import (
    QUICK,
    STEP_4,
    checkpoint,
    epochs_of,
    on_every_loss,
    run_out,
    the_error,
    train_accelerate,
    tree,
)

from tasn_timm.data.loading import keyed_seed
from tasn_timm.data.splits import load_splits
from tasn_timm.errors import NumericalError, UserError, run_command
from tasn_timm.recipe import Recipe
from tasn_timm.training import memory
from tasn_timm.training.gradients import FiniteGuard, Step, clip_gradient
from tasn_timm.training.memory import out_of_memory
from tasn_timm.training.progress import Progress

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


def test_of_a_device_that_computes_ahead_the_first_spoiled_step_is_told_when_all_are_looked_at(accelerator):
    guard = guard_of(accelerator, lagging=True)
    guard.check(step_of(1, 1.0))
    guard.flush()
    for number, norm in ((2, 1.0), (3, math.inf), (4, math.nan)):
        guard.check(step_of(number, norm, dict(loss=float(number))))
    with pytest.raises(NumericalError, match="in step 3 .epoch 4.: loss 3, gradient norm inf.* images bird-3, other"):
        guard.flush()
    guard.flush()


@pytest.mark.parametrize("look", [["--log-interval", "2"], ["--recovery-interval", "2", "--checkpoint-hist", "9"], []])
def test_on_a_gpu_a_nan_ends_the_run_where_a_line_is_logged_or_anything_saved(train, tmp_path, monkeypatch, look):
    monkeypatch.setattr(FiniteGuard, "__init__", partialmethod(FiniteGuard.__init__, lagging=True))
    on_every_loss(
        monkeypatch, lambda model, call, losses, *_: losses | dict(loss=losses["loss"] * (math.nan if call == 4 else 1))
    )
    code, _, err = train(*QUICK, "--batch-size", "8", "--epochs", "1", *(look or ["--log-interval", "99"]))
    assert code == 3 and "the loss is not finite in step 4 (epoch 1): loss nan" in the_error(err)
    states = epochs_of(tmp_path / "runs/small")
    assert all(tensor.isfinite().all() for state in states for tensor in state.values())
    assert len(states) == (2 if "--recovery-interval" in look else 1) and not (tmp_path / "runs/small/last").exists()


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
    saved = checkpoint(run, STEP_4)["model"]
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


@pytest.mark.parametrize(("error", "lines"), [(NumericalError("x"), 0), (UserError("x"), 1)])
def test_what_all_processes_know_is_told_once(monkeypatch, capsys, error, lines):
    def fail():
        raise error

    monkeypatch.setenv("RANK", "1")
    assert run_command(fail) in (2, 3)
    assert len(capsys.readouterr().err.splitlines()) == lines


# What the host waits for when a tensor is on a GPU: its values, as Python or as a shape, and copies.
READS = {getattr(Tensor, name) for name in "item tolist cpu cuda numpy nonzero __bool__ __int__ __float__".split()}
READS |= {Tensor.__index__, Tensor.__contains__, torch.nonzero, torch.masked_select, torch.unique, torch.equal}
READS |= {torch.tensor, torch.as_tensor, torch.from_numpy}
OPERATIONS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal"}
# What looks at the steps, and samplers ("over") and the optimizer's count of steps, which are on the CPU there, too.
WHO_MAY = ("flush", "end_line", "over", "_get_value")


class Waits:
    """Collects who would wait for a GPU, by the functions called and by the operations that they become."""

    def __init__(self) -> None:
        self.by: list[tuple[str, str]] = []  # what, and the function that asks

    def __enter__(self) -> "Waits":
        self.modes = ExitStack()
        self.modes.enter_context(_Calls(self))
        self.modes.enter_context(_Operations(self))
        return self

    def __exit__(self, *error) -> None:
        self.modes.close()

    def note(self, what: str) -> None:
        frames = [frame for frame in traceback.extract_stack() if frame.filename != __file__]
        if what in ("to", "tensor") and Path(frames[-1].filename).is_relative_to(Path(torch.__file__).parent):
            return  # torch's optimizers and clipping, which move nothing where all is on one device
        names = [frame.name for frame in frames]
        self.by.append((what, next((name for name in WHO_MAY if name in names), names[-1])))


class _Calls(TorchFunctionMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, function, types, args=(), kwargs=None):
        given = [*args[1:], *(kwargs or {}).values()]
        if function in READS or (function is Tensor.to and any(isinstance(each, str | torch.device) for each in given)):
            self.waits.note(function.__name__)
        return function(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        masks = [each for each in args[1] if each is not None] if name in ("index", "index_put", "index_put_") else []
        if name in OPERATIONS or any(mask.dtype in (torch.bool, torch.uint8) for mask in masks):
            self.waits.note(name)
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "ask",
    [
        lambda x: x[x > 0],
        lambda x: x.index_put((x > 0,), x[:2]),
        lambda x: x.to("cpu"),
        lambda x: x.to(device=torch.device("cpu")),
        lambda x: torch.tensor([1.0], device=x.device),
        lambda x: x.sum().item(),
        lambda x: torch.where(x > 0),
        lambda x: [each for each in x if each],
        lambda x: F.cross_entropy(x.view(1, 3), torch.full((1,), 2)).tolist(),
        lambda x: torch.randn(2, 3, requires_grad=True).sum().backward() or x.max().cpu(),
    ],
)
def test_what_a_gpu_would_be_waited_for_is_seen(ask):
    x = torch.tensor([1.0, -1.0, 2.0])
    with Waits() as waits:
        (x * 2 + 1).square().mean(), x.to(torch.float64), x[1:], x[torch.arange(2)]
        assert not waits.by
        ask(x)
    assert waits.by


def test_a_step_never_waits_for_its_device(train, monkeypatch):
    """As on a GPU, where the guard looks at the steps when a line is logged."""
    waits, train_one_epoch = Waits(), train_accelerate.train_one_epoch

    def watched(*arguments):
        with waits:
            return train_one_epoch(*arguments)

    monkeypatch.setattr(train_accelerate, "train_one_epoch", watched)
    monkeypatch.setattr(FiniteGuard, "__init__", partialmethod(FiniteGuard.__init__, lagging=True))
    options = "--workers 1 --opt adamw --clip-grad 1 --model-ema-decay 0.9 --grad-accum-steps 2 --log-interval 4"
    code, _, err = train(*options.split(), "--epochs", "1")
    assert code == 0, err
    assert [by for what, by in waits.by if what == "tolist"].count("flush") == 2, "at the line, at the epoch's end"
    assert not {(what, by) for what, by in waits.by if by not in WHO_MAY}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="asks a GPU itself")
def test_on_a_gpu_nothing_of_a_step_waits_for_it(train, monkeypatch):
    train_one_epoch = train_accelerate.train_one_epoch

    def with_mode(mode: str, function: Callable) -> Callable:
        def changed(*arguments):
            before = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode(mode)
            try:
                return function(*arguments)
            finally:
                torch.cuda.set_sync_debug_mode(before)

        return changed

    monkeypatch.setattr(train_accelerate, "train_one_epoch", with_mode("error", train_one_epoch))
    monkeypatch.setattr(FiniteGuard, "flush", with_mode("default", FiniteGuard.flush))
    monkeypatch.setattr(Progress, "end_line", with_mode("default", Progress.end_line))
    options = "--no-cpu --clip-grad 1 --model-ema-decay 0.9 --grad-accum-steps 2 --log-interval 4 --epochs 1"
    code, _, err = train(*options.split())
    assert code == 0, err


# memory


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
        with pytest.raises(UserError) as error, out_of_memory(recipe, accelerator, nn.BatchNorm2d(3)):
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
