"""Everything that the rest of a run depends on, saved in checkpoints and put back."""

import json
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn

from ..errors import UserError
from ..recipe import FREE_OPTIONS, Recipe
from ..tables import table
from .bad_images import BadImages
from .build import Parts
from .checkpoints import Checkpoint, Checkpoints
from .gradients import FiniteGuard
from .loaders import Plan
from .progress import Progress
from .run import Run, find_folder

# Which of them computes something that the weights depend on.
PACKAGES = ("tasn_timm", "torch", "torchvision", "timm", "accelerate", "pillow", "numpy")


@dataclass
class Position:
    """A place in a run."""

    epoch: int = 0  # epochs that are finished, evaluation included
    images: int = 0  # of the epoch that has begun, over all processes


class TrainingState:
    """What a checkpoint holds: weights, their average, optimizer, place in the data, averages of the epoch, best model.

    No random generator is part of it: all randomness is drawn by (seed, epoch, image or step).

    Args:
        recipe: Of the run.
        accelerator: Of the run.
        plan: Of an epoch.
        parts: Prepared.
        run: Its folder has the checkpoints.
        bad_images: Of the run.
        data: What identifies the images, see `loaders.fingerprint`.
    """

    def __init__(
        self,
        recipe: Recipe,
        accelerator: Accelerator,
        plan: Plan,
        parts: Parts,
        run: Run,
        bad_images: BadImages,
        data: str,
    ) -> None:
        self.accelerator = accelerator
        self.epochs = recipe.epochs
        self.plan = plan
        self.parts = parts
        self.run = run
        self.bad_images = bad_images
        self.identity = _identity(recipe, accelerator, data)
        self.checkpoints = Checkpoints(run.folder / "checkpoints", recipe.checkpoint_hist)
        self.position = Position()
        self.progress: Progress | None = None  # of the epoch that has begun
        self.begun: dict | None = None  # averages of an epoch that was resumed
        self.inexact: list[dict[str, list]] = []  # option -> then and now, of each time that it went on with others
        self.saved = ""
        self.guard = FiniteGuard(accelerator, parts.optimizer)

    @property
    def planned_steps(self) -> int:
        """Optimizer steps of all epochs."""
        return self.epochs * self.plan.steps

    @property
    def step(self) -> int:
        """Optimizer steps that are done."""
        return self.position.epoch * self.plan.steps + self.plan.steps_of(self.position.images)

    def ends_at(self, steps: int | None) -> bool:
        """Whether so many steps are done."""
        return steps is not None and self.step >= steps

    def goes_on(self, steps: int | None) -> bool:
        """Whether there is an epoch to train, or to finish, before all of them or so many steps are done."""
        return self.position.epoch < self.epochs and (self.position.images > 0 or not self.ends_at(steps))

    def begin_epoch(self, progress: Progress) -> Progress:
        """Take the averages of an epoch that begins, or those before it was interrupted."""
        if self.begun:
            progress.restore(self.begun)
            self.begun = None
        self.progress = progress
        return progress

    def end_epoch(self) -> None:
        """Go to the beginning of the next epoch, and save that."""
        self.position = Position(self.position.epoch + 1)
        self.progress = None
        self.save()

    def save(self) -> None:
        """Save a checkpoint; all processes have to call it, between two optimizer steps.

        Raises:
            UserError: It cannot be written; on all processes.
            NumericalError: The last step was not finite; nothing is written.
        """
        self.guard.flush()
        # In the order of their names also where other settings have other steps.
        name = f"epoch-{self.position.epoch:04}-image-{self.position.images:08}-step-{self.step:08}"
        if name == self.saved:
            return
        mine = dict(progress=self.progress and self.progress.state(), bad_images=self.bad_images.state())
        about = dict(
            position=asdict(self.position),
            best_top1=self.run.best_top1,
            processes=gather_object([mine]),
            identity=self.identity,
            inexact=self.inexact,
            label_names=self.run.saved_with["label_names"],
        )
        failure = None
        if self.accelerator.is_main_process:
            try:
                self.checkpoints.save(name, self._write, about)
            except (OSError, RuntimeError) as error:  # torch.save has RuntimeErrors for a full disk
                failure = f"checkpoint {str(self.checkpoints.folder / name)!r} cannot be written: {error}"
        (failure,) = broadcast_object_list([failure])
        if failure:
            raise UserError(f"{failure}. Older ones are untouched: make room, then go on with --resume auto.")
        self.saved = name

    def resume(self, resume: str, inexact: bool = False) -> bool:
        """Take over the newest whole checkpoint of the run's folder; all processes have to call it.

        Args:
            resume: As in `find_folder`; only "auto" may find none.
            inexact: Also where the run would not end as the interrupted one would have.

        Returns:
            Whether there is one.

        Raises:
            UserError: It was saved by a run of other settings, or does not fit.
        """
        newest = _newest(self.checkpoints, self.accelerator) if self.accelerator.is_main_process else None
        (newest,) = broadcast_object_list([newest])
        if newest is None:
            if resume != "auto":
                raise UserError(f"--resume {resume!r}: it has no whole checkpoint. With auto a run begins anew in it.")
            if self.accelerator.is_main_process:
                self.checkpoints.set_aside("")
            return False
        differences = _differences(newest.about["identity"], self.identity)
        if differences and not inexact:
            raise UserError(
                f"{str(newest.folder)!r} belongs to a run of other settings:\n\n{_table(differences)}\n\n"
                f"Start it as before, leave out --resume for a run of its own, or add --resume-inexact to go on with "
                f"these."
            )
        if "opt" in differences:
            then, now = differences["opt"]
            raise UserError(f"opt cannot change on the way, not even inexactly: {now} has no use for {then}'s state.")
        if differences:
            self.accelerator.print(f"resuming inexactly:\n\n{_table(differences)}\n")
        self._restore(newest, inexact=bool(differences))
        self.inexact = [*newest.about["inexact"], *([differences] if differences else [])]
        if self.accelerator.is_main_process:
            self.checkpoints.set_aside(newest.folder.name)
        self.run.restore(newest)
        self.saved = newest.folder.name
        self.accelerator.print(f"resumed from {newest.folder}")
        return True

    def _write(self, folder: Path) -> None:
        parts, scaler = self.parts, self.accelerator.scaler
        state = dict(
            model=self.accelerator.unwrap_model(parts.model, keep_torch_compile=False).state_dict(),
            average=parts.average and parts.average.module.state_dict(),
            optimizer=parts.optimizer.state_dict(),
            scaler=scaler and scaler.state_dict(),
        )
        torch.save(state, folder / "state.pt")
        self.run.keep_in(folder)

    def _restore(self, checkpoint: Checkpoint, inexact: bool) -> None:
        state = torch.load(checkpoint.folder / "state.pt", map_location="cpu", weights_only=True)
        parts, scaler = self.parts, self.accelerator.scaler
        try:
            self.accelerator.unwrap_model(parts.model, keep_torch_compile=False).load_state_dict(state["model"])
            if parts.average:
                parts.average.module.load_state_dict(state["average"] or state["model"])
            groups = parts.optimizer.param_groups
            settings = [{key: value for key, value in group.items() if key != "params"} for group in groups]
            parts.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            reason = _short(error)
            raise UserError(f"{str(checkpoint.folder)!r} does not fit this model and optimizer: {reason}") from error
        if scaler is not None and state["scaler"]:
            scaler.load_state_dict(state["scaler"])
        self.position = Position(**checkpoint.about["position"])
        if self.position.images < self.plan.images:  # of other settings: to the beginning of a step of these
            self.position.images -= self.position.images % self.plan.group
        else:
            self.position.images = self.plan.images
        if inexact:  # a checkpoint has the settings of then: weight_decay, momentum, lr ...
            for group, own in zip(parts.optimizer.param_groups, settings):
                group.update(own)
            parts.scheduler.step_update(self.step)
        processes = checkpoint.about["processes"]
        bad_images = [bad for each in processes for bad in each["bad_images"]]
        mine = dict(bad_images=bad_images if self.accelerator.is_main_process else [], progress=None)
        if len(processes) == self.accelerator.num_processes:
            mine = processes[self.accelerator.process_index]
        self.bad_images.restore(mine["bad_images"], bad_images)
        self.begun = mine["progress"]


def load_weights(
    resume: str, output: Path, name: str, model: nn.Module, label_names: list[str], accelerator: Accelerator
) -> None:
    """Put the weights of a run's newest whole checkpoint into a model, those of the average where it has one.

    Args:
        resume: As in `find_folder`, and the next two.
        output: Folder of the runs.
        name: Of the run.
        model: Not wrapped.
        label_names: Of its classes, in order.
        accelerator: Of the run.

    Raises:
        UserError: There is none, or it does not fit.
    """
    folder = find_folder(resume, output, name)
    newest = _newest(Checkpoints(folder / "checkpoints", keep=1), accelerator) if folder else None
    if newest is None:
        raise UserError(f"--resume {resume}: there is no checkpoint of {name!r} in {str(folder or output)!r}.")
    if newest.about["label_names"] != label_names:
        raise UserError(f"{str(newest.folder)!r} was trained on other classes than those of this data.")
    state = torch.load(newest.folder / "state.pt", map_location="cpu", weights_only=True)
    try:
        model.load_state_dict(state["average"] or state["model"])
    except RuntimeError as error:
        raise UserError(f"{str(newest.folder)!r} does not fit this model: {_short(error)}") from error


def _newest(checkpoints: Checkpoints, accelerator: Accelerator) -> Checkpoint | None:
    """The newest whole one; what is wrong with newer ones is told, once."""
    newest, broken = checkpoints.newest()
    for message in broken if accelerator.is_main_process else ():
        print(f"not a whole checkpoint: {message}", file=sys.stderr, flush=True)
    return newest


def _short(error: Exception) -> str:
    """The beginning of a message that may list every tensor of a model."""
    return textwrap.shorten(str(error), 300, placeholder=" ...")


def _identity(recipe: Recipe, accelerator: Accelerator, data: str) -> dict[str, Any]:
    free = set(FREE_OPTIONS) - ({"workers"} if recipe.streaming else set())
    options = {name: value for name, value in asdict(recipe).items() if name not in free}
    identity = options | {
        "processes": accelerator.num_processes,
        "device": accelerator.device.type,
        "images and labels": data,
    }
    identity |= {f"version of {package}": version(package) for package in PACKAGES}
    return json.loads(json.dumps(identity))


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, list]:
    """What differs, by name: then and now; "-" for what was or is not known."""
    names = {**then, **now}
    return {name: [then.get(name, "-"), now.get(name, "-")] for name in names if then.get(name) != now.get(name)}


def _table(differences: Mapping[str, list]) -> str:
    """Differences as text."""
    rows = [("", "checkpoint", "now"), *((name, *map(str, values)) for name, values in differences.items())]
    return table(rows, "<<<")
