"""What of a training step is not the model: waiting for data, logging, checkpoints, looking for signals.

Trains the default recipe for some epochs as the script does, with a clock around the forward pass and loss, the
backward pass and the optimizer, and shows how the rest of the time of an epoch, its checkpoint included, divides.

    python tests/benchmarks/overhead.py
"""

import argparse
import functools
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer

sys.path.insert(0, str(Path(__file__).parents[2]))
import train_accelerate
from tasn_timm.data.transforms import Normalize
from tasn_timm.distillation import TASNLoss
from tasn_timm.tasn import TASN
from tasn_timm.training.gradients import FiniteGuard
from tasn_timm.training.progress import Progress
from tasn_timm.training.run import Run
from tasn_timm.training.state import TrainingState
from tasn_timm.training.stopping import StopRequest

seconds: dict[str, float] = defaultdict(float)
training = False


def clocked(owner: type, method: str, part: str, always: bool = False) -> None:
    """Count the time in a method, while training; not that of the methods which it calls, where these are clocked."""
    function: Callable = getattr(owner, method)

    @functools.wraps(function)
    def call(*arguments, **options):
        if not (training or always):
            return function(*arguments, **options)
        inside = sum(seconds.values())
        start = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            passed = time.perf_counter() - start - (sum(seconds.values()) - inside)
            seconds[part] += passed
            if not training:  # between epochs
                totals["epochs"] += passed

    setattr(owner, method, call)


def epoch_clocked(function: Callable) -> Callable:
    def call(*arguments, **options):
        global training
        training = True
        start = time.perf_counter()
        progress = function(*arguments, **options)
        training = False
        totals["epochs"] += time.perf_counter() - start
        totals["waited"] += progress.epoch.waited
        return progress

    return call


totals: dict[str, float] = defaultdict(float)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--recovery-interval", type=int, default=None, help="optimizer steps between checkpoints")
    options = parser.parse_args()
    for owner, method, part in (
        (TASN, "forward", "model: forward"),
        (TASNLoss, "forward", "model: loss"),
        (Accelerator, "backward", "model: backward"),
        (AcceleratedOptimizer, "step", "model: optimizer"),
        (AcceleratedOptimizer, "zero_grad", "model: optimizer"),
        (Normalize, "forward", "colours and normalisation"),
        (Run, "log", "log lines"),
        (Progress, "end_line", "log lines"),
        (Progress, "add", "averages"),
        (FiniteGuard, "check", "is it finite"),
        (FiniteGuard, "marked", "is it finite"),
        (StopRequest, "check", "signals"),
    ):
        clocked(owner, method, part)
    train_accelerate.clip_gradient = _clocked_function(train_accelerate.clip_gradient, "gradient norm")
    clocked(TrainingState, "save", "checkpoints", always=True)
    train_accelerate.train_one_epoch = epoch_clocked(train_accelerate.train_one_epoch)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as output:
        extra = ["--recovery-interval", str(options.recovery_interval)] if options.recovery_interval else []
        sys.argv = ["train_accelerate.py", "--epochs", str(options.epochs), "--warmup-epochs", "0", "--compare", "null"]
        sys.argv += ["--output", output, *extra]
        train_accelerate.main()
    seconds["waiting for data"] = totals["waited"]
    model = sum(value for part, value in seconds.items() if part.startswith("model"))
    print(f"\n{'part':40}{'seconds':>10}{'share':>9}")
    for part, value in sorted(seconds.items(), key=lambda item: -item[1]):
        if value:
            print(f"{part:40}{value:10.2f}{value / totals['epochs']:9.2%}")
    rest = totals["epochs"] - sum(seconds.values())
    print(f"{'all else':40}{rest:10.2f}{rest / totals['epochs']:9.2%}")
    print(f"{'epochs, evaluation left out':40}{totals['epochs']:10.2f}")
    computed = model + seconds["colours and normalisation"]
    print(f"\nnot model, loss or optimizer: {1 - model / totals['epochs']:.2%}; ", end="")
    print(f"colours and normalisation of the pixels left out, too: {1 - computed / totals['epochs']:.2%}")


def _clocked_function(function: Callable, part: str) -> Callable:
    holder = type("Holder", (), dict(call=staticmethod(function)))
    clocked(holder, "call", part)
    return holder.__dict__["call"]


if __name__ == "__main__":
    main()
