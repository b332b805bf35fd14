"""The folder of a run: what was asked for, what happened, and the models."""

import copy
import json
import math
import platform
import re
import shlex
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ..card import Measured
from ..errors import UserError
from ..files import digest
from ..hub import save_folder
from ..recipe import Recipe, save_recipe
from ..tables import table
from .checkpoints import Checkpoint, link_or_copy
from .evaluation import Scores
from .progress import Progress

PACKAGES = (
    "tasn_timm",
    "torch",
    "torchvision",
    "timm",
    "accelerate",
    "datasets",
    "huggingface-hub",
    "safetensors",
    "pillow",
    "numpy",
)

LOCK_WAIT = 10  # seconds, in which the workers of a process that was killed have ended, too


class Run:
    """A new folder OUTPUT/NAME, or NAME-1, NAME-2, ... where that exists; or one of them, to go on.

        recipe.yaml       every option as used
        environment.json  versions, machine, number of processes, a command that repeats it; and where it was resumed
        metrics.jsonl     a line every log_interval batches ("step"), every epoch ("epoch"), and for the test ("test")
        last/  best/      models in timm's Hub format; best by the validation split, the last one where there is none
        checkpoints/      everything that it takes to go on
        bad_images.jsonl  pictures that could not be read, if any
        lock              held while somebody trains in it

    The main process writes; the folder must be visible to all of them.

    Args:
        name: Usually the recipe's.
        recipe: Saved, and says where to write.
        accelerator: Of the run.
        model: Not yet prepared; its parameters are read at every save.
        label_names: Of the classes, in order.
        data_config: timm's description of the input.
        flops: Of an image in evaluation, see `count_flops`.
        resume: Folder of a run to go on with; "auto": the newest one of this name, if any; None for a new one.

    Raises:
        UserError: There is no such folder, none can be made, or another process is training in it.
    """

    def __init__(
        self,
        name: str,
        recipe: Recipe,
        accelerator: Accelerator,
        model: nn.Module,
        label_names: list[str],
        data_config: dict,
        flops: int,
        resume: str | None = None,
    ) -> None:
        self.name = name
        self.recipe = recipe
        self.accelerator = accelerator
        self.model = model
        self.saved_with = dict(label_names=label_names, data_config=data_config, recipe=name, dataset=recipe.data)
        self.flops = flops
        self.command = shlex.join(["accelerate", "launch", *sys.argv])
        self.best_top1 = -1.0
        self.test_scores: Scores | None = None
        folder = None
        if accelerator.is_main_process:
            folder = find_folder(resume, Path(recipe.output), name) or _new_folder(Path(recipe.output), name)
            self.lock = _lock(folder)
        self.folder = broadcast_object_list([folder])[0]

    def begin(self) -> None:
        """Write down what begins, over whatever a run that was ended before its first checkpoint has left."""
        if self.accelerator.is_main_process:
            for name in ("metrics.jsonl", "bad_images.jsonl"):
                (self.folder / name).unlink(missing_ok=True)
            save_recipe(self.recipe, self.folder / "recipe.yaml")
            self._write_environment(self._environment())
        self._start_trackers()

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go back to a checkpoint: what was logged later is dropped, and a best model that came later, too."""
        self.best_top1 = checkpoint.about["best_top1"]
        if self.accelerator.is_main_process:
            for left in (path for name in ("best", "last") for path in self.folder.glob(f".{name}.*")):
                shutil.rmtree(left)
            self._restore_best(checkpoint.folder / "best.safetensors")
            aside = self.folder / ".metrics.jsonl"
            shutil.copyfile(checkpoint.folder / "metrics.jsonl", aside)
            aside.replace(self.folder / "metrics.jsonl")
            save_recipe(self.recipe, self.folder / "recipe.yaml")
            before = json.loads((self.folder / "environment.json").read_text())
            resumed = dict(checkpoint=checkpoint.folder.name) | self._environment()
            self._write_environment(before | dict(resumed=[*before.get("resumed", []), resumed]))
        self._start_trackers()

    def keep_in(self, folder: Path) -> None:
        """Put what `restore` needs into a checkpoint's folder."""
        if (self.folder / "best").exists():
            link_or_copy(self.folder / "best" / "model.safetensors", folder / "best.safetensors")
        metrics = self.folder / "metrics.jsonl"
        (folder / "metrics.jsonl").write_bytes(metrics.read_bytes() if metrics.exists() else b"")

    def log(self, step: int, **values: Any) -> None:
        """Add a line to metrics.jsonl and the trackers, on the main process."""
        if self.accelerator.is_main_process:
            with self.writing("metrics.jsonl"), (self.folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(_finite(dict(step=step) | values), allow_nan=False) + "\n")
        self.accelerator.log(dict(_flat(values)), step=step)

    def end_epoch(
        self,
        epoch: int,
        step: int,
        progress: Progress,
        rates: dict[str, float],
        scores: Scores | None,
        zoom: dict[str, float] | None,
    ) -> None:
        """Log an epoch and save its model as last/, and as best/ when its validation accuracy is the highest so far."""
        means, speed = progress.epoch.means.read(self.accelerator), progress.epoch.speed(self.accelerator.device)
        improved = scores is None or scores.top1 > self.best_top1
        if scores is not None and improved:
            self.best_top1 = scores.top1
        validation = scores.metrics if scores else None
        self.log(step, epoch=epoch + 1, **rates, train=means, validation=validation, zoom=zoom, speed=speed)
        if not self.accelerator.is_main_process:
            return
        validation = f"  validation top-1 {scores.top1:.1f} %" if scores else ""
        rate = f"{speed['images_per_second']:.0f} images/s"
        loss = f"  loss {means['loss']:.3f}" if means else ""  # none where nothing of it was left to train
        print(f"{progress.title}{loss}{validation}  {rate}", flush=True)
        self._save_model("last")
        if improved:
            self._save_model("best")

    def load_best(self) -> None:
        """Put the weights of best/ into the model, on every process."""
        self.accelerator.wait_for_everyone()
        self.model.load_state_dict(load_file(self.folder / "best" / "model.safetensors"))

    def finish(self, step: int, planned_steps: int, inexact: list[dict[str, list]], scores: Scores) -> None:
        """Log the test scores, with how training came to this end, and write them into the card of best/.

        Args:
            step: Of the optimizer, that training ended with.
            planned_steps: That it would have ended with, had nobody cut it short.
            inexact: See `TrainingState`.
            scores: Of the test split.
        """
        self.test_scores = scores
        self.log(step, planned_steps=planned_steps, inexact=inexact, test=scores.metrics)
        if not self.accelerator.is_main_process:
            return
        measured = Measured(
            dataset=self.recipe.data,
            split=self.recipe.test_split,
            images=scores.images,
            top1=scores.top1,
            top5=scores.top5,
            recipe=self.name,
            command=self.command,
            gflops=self.flops / 1e9,
        )
        self._save_model("best", measured=measured)

    def how_to_load(self) -> str:
        """The Python that loads best/."""
        return (
            f"load it:  import timm, tasn_timm; "
            f'model = timm.create_model("local-dir:{self.folder / "best"}", pretrained=True).eval()'
        )

    def close(self) -> None:
        """End the trackers of this run and unlock its folder; another one may follow in the same process."""
        if self.accelerator.is_main_process:
            self.lock.release()
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.accelerator.trackers.clear()

    @contextmanager
    def writing(self, name: str) -> Iterator[None]:
        """Tell in one line what could not be written."""
        try:
            yield
        except (OSError, SafetensorError, RuntimeError) as error:  # torch and safetensors have their own
            raise UserError(
                f"{str(self.folder / name)!r} cannot be written: {error}. The checkpoints are untouched: make room, "
                f"then go on with --resume auto."
            ) from error

    def _save_model(self, name: str, measured: Measured | None = None) -> None:
        with self.writing(name):
            save_folder(self.model, self.folder / name, **self.saved_with, measured=measured)

    def _restore_best(self, weights: Path) -> None:
        best = self.folder / "best" / "model.safetensors"
        if weights.exists() and not (best.exists() and digest(best) == digest(weights)):
            newest = copy.deepcopy(self.model.state_dict())
            self.model.load_state_dict(load_file(weights))
            shutil.rmtree(self.folder / "best", ignore_errors=True)
            self._save_model("best")
            self.model.load_state_dict(newest)

    def _start_trackers(self) -> None:
        if not self.recipe.trackers:
            return
        self.accelerator.project_configuration.logging_dir = str(self.folder)
        settings = dict(name=self.folder.name, resume="allow")
        options = dict(wandb=settings | dict(id=self._identifier(), dir=str(self.folder)), trackio=settings)
        config = {
            name: value if isinstance(value, (int, float)) else str(value) for name, value in vars(self.recipe).items()
        }
        self.accelerator.init_trackers(
            "tasn_timm", config, {name: options[name] for name in self.recipe.trackers if name in options}
        )

    def _identifier(self) -> str:
        """The same for a run that is resumed, and no other one's."""
        path = self.folder / "environment.json"
        return json.loads(path.read_text())["id"] if self.accelerator.is_main_process else ""

    def _environment(self) -> dict[str, Any]:
        return dict(
            id=uuid.uuid4().hex[:12],
            versions={package: version(package) for package in PACKAGES},
            python=platform.python_version(),
            machine=platform.machine(),
            system=platform.system(),
            device=str(self.accelerator.device),
            gpu=torch.cuda.get_device_name() if self.accelerator.device.type == "cuda" else None,
            cpu=torch.backends.cpu.get_cpu_capability(),
            commit=_commit(),
            processes=self.accelerator.num_processes,
            mixed_precision=self.accelerator.mixed_precision,
            command=self.command,
        )

    def _write_environment(self, environment: dict[str, Any]) -> None:
        aside = self.folder / ".environment.json"
        aside.write_text(json.dumps(environment, indent=2) + "\n")
        aside.replace(self.folder / "environment.json")


def _commit() -> str | None:
    """Commit of the checkout that this code is in, with "+" where it differs from that; None outside of one."""
    package = Path(__file__).parents[1]
    git = ["git", "-C", str(package), "--no-optional-locks"]  # several runs may ask at a time
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", __file__], check=True, capture_output=True)
        commit, changes = (
            subprocess.run([*git, *words], check=True, capture_output=True, text=True).stdout.strip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no", "."])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + "+" * bool(changes)


def _finite(values: Any) -> Any:
    """Values with None, which JSON has, for NaN and infinities: of steps that fp16 has skipped, say."""
    if isinstance(values, dict):
        return {name: _finite(value) for name, value in values.items()}
    return None if isinstance(values, float) and not math.isfinite(values) else values


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """("train/loss", 1.2) and so on."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        elif value is not None and not isinstance(value, list):
            yield prefix + name, value


def find_folder(resume: str | None, output: Path, name: str) -> Path | None:
    """Find the folder of a run to go on with.

    Args:
        resume: It; or "auto": the newest of OUTPUT/NAME, NAME-1, NAME-2, ...
        output: Folder of the runs.
        name: Of the run.

    Returns:
        None for a new run: with None, and with "auto" where there is none, or the newest has a model, but no
        checkpoints (any more).

    Raises:
        UserError: A folder that is no run.
    """
    if resume is None:
        return None
    if resume != "auto":
        if not (Path(resume) / "checkpoints").is_dir():
            raise UserError(f"--resume {resume!r} is no folder with checkpoints: give that of a run, or auto.")
        return Path(resume)
    pattern = re.compile(rf"{re.escape(name)}(?:-(\d+))?")
    folders = [(int(match[1] or 0), path) for path in output.glob("*") if (match := pattern.fullmatch(path.name))]
    folders = [folder for folder in folders if folder[1].is_dir()]
    if not folders:
        return None
    newest = max(folders)[1]
    done = any((newest / name).exists() for name in ("best", "last"))
    return None if done and not (newest / "checkpoints").exists() else newest


def _new_folder(output: Path, name: str) -> Path:
    """Create OUTPUT/NAME, or the first free one of NAME-1, NAME-2, ..., also when several runs start at once."""
    number = 0
    while True:
        folder = output / (f"{name}-{number}" if number else name)
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            if not folder.is_dir():
                raise UserError(f"output folder {str(output)!r} cannot be used: {str(folder)!r} is a file.") from None
            number += 1
        except OSError as error:
            raise UserError(f"output folder {str(output)!r} cannot be used: {error}. Choose another one.") from error


def _lock(folder: Path) -> FileLock:
    """Lock a run's folder for this process: the system gives it back when the process and its workers have ended."""
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(timeout=LOCK_WAIT)
    except Timeout:
        raise UserError(
            f"{str(folder)!r} is being trained by another process: wait for its end, or leave out --resume for a run "
            f"of its own."
        ) from None
    except OSError as error:
        raise UserError(f"{str(folder)!r} cannot be written: {error}. Give another run to --resume.") from error
    return lock


def comparison_table(runs: list[Run]) -> str:
    """Input, cost and test accuracy of runs, as text."""
    rows = [("run", "model", "input", "MFLOPs an image", "test top-1")]
    for run in runs:
        samples = getattr(run.model, "sample_size", None)
        size = f"{run.recipe.img_size}" + (f", samples {samples[0]}" if samples else "")
        top1 = f"{run.test_scores.top1:.1f} %" if run.test_scores else "not tested"
        rows.append((run.folder.name, run.recipe.model, size, f"{run.flops / 1e6:.1f}", top1))
    head, *lines = table(rows, "<<<<<").splitlines()
    return "\n".join(["", head, "-" * len(head), *lines, ""])
