"""The folder of a run: what was asked for, what happened, and the models."""

import json
import math
import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file
from torch import nn

from ..errors import UserError
from ..hub import Measured, save_folder
from ..recipe import Recipe, save_recipe
from .evaluation import Scores, count_flops
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
)


class Run:
    """A new folder OUTPUT/NAME, or NAME-1, NAME-2, ... where that exists.

        recipe.yaml       every option as used
        environment.json  versions, machine, number of processes, command
        metrics.jsonl     one line an epoch, then one for the test split
        last/  best/      models in timm's Hub format; best by the validation split, the last one where there is none

    The main process writes; the folder must be visible to all of them.

    Args:
        name: Usually the recipe's.
        recipe: Saved, and says where to write.
        accelerator: Of the run.
        model: Not yet prepared; its parameters are read at every save.
        label_names: Of the classes, in order.
        data_config: timm's description of the input.
    """

    def __init__(
        self,
        name: str,
        recipe: Recipe,
        accelerator: Accelerator,
        model: nn.Module,
        label_names: list[str],
        data_config: dict,
    ) -> None:
        self.name = name
        self.recipe = recipe
        self.accelerator = accelerator
        self.model = model
        self.saved_with = dict(label_names=label_names, data_config=data_config, recipe=name, dataset=recipe.data)
        self.flops = count_flops(model, data_config["input_size"])
        self.command = shlex.join(["accelerate", "launch", *sys.argv])
        self.best_top1 = -1.0
        self.test_scores: Scores | None = None
        folder = _new_folder(Path(recipe.output), name) if accelerator.is_main_process else None
        self.folder = broadcast_object_list([folder])[0]
        if accelerator.is_main_process:
            save_recipe(recipe, self.folder / "recipe.yaml")
            self._save_environment()

    def end_epoch(self, epoch: int, progress: Progress, lr: float, scores: Scores | None) -> None:
        """Log an epoch and save its model as last/, and as best/ when its validation accuracy is the highest so far."""
        losses = progress.reduced_means()
        if not all(map(math.isfinite, losses.values())):
            raise UserError(
                f"the loss is not finite in epoch {epoch + 1} ({losses}): lower lr ({self.recipe.lr}) or set clip_grad."
                f" The models in {str(self.folder)!r} are those of the epochs before."
            )
        images = progress.batches * self.recipe.batch_size // self.recipe.grad_accum_steps  # on all processes
        improved = scores is None or scores.top1 > self.best_top1
        if scores is not None and improved:
            self.best_top1 = scores.top1
        if not self.accelerator.is_main_process:
            return
        speed = images / progress.seconds
        logged = scores.metrics if scores else None
        self._log(epoch=epoch + 1, lr=lr, images_per_second=round(speed, 1), train=losses, validation=logged)
        validation = f"  validation top-1 {scores.top1:.1f} %" if scores else ""
        print(f"{progress.title}  loss {losses['loss']:.3f}{validation}  {speed:.0f} images/s", flush=True)
        save_folder(self.model, self.folder / "last", **self.saved_with)
        if improved:
            save_folder(self.model, self.folder / "best", **self.saved_with)

    def load_best(self) -> None:
        """Put the weights of best/ into the model, on every process."""
        self.accelerator.wait_for_everyone()
        self.model.load_state_dict(load_file(self.folder / "best" / "model.safetensors"))

    def finish(self, scores: Scores) -> None:
        """Log the test scores and write them into the card of best/."""
        self.test_scores = scores
        if not self.accelerator.is_main_process:
            return
        self._log(test=scores.metrics)
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
        save_folder(self.model, self.folder / "best", **self.saved_with, measured=measured)

    def how_to_load(self) -> str:
        """The Python that loads best/."""
        return (
            f"load it:  import timm, tasn_timm; "
            f'model = timm.create_model("local-dir:{self.folder / "best"}", pretrained=True).eval()'
        )

    def _log(self, **values: object) -> None:
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(values, allow_nan=False) + "\n")

    def _save_environment(self) -> None:
        environment = dict(
            versions={package: version(package) for package in PACKAGES},
            python=platform.python_version(),
            machine=platform.machine(),
            system=platform.system(),
            device=str(self.accelerator.device),
            processes=self.accelerator.num_processes,
            mixed_precision=self.accelerator.mixed_precision,
            command=self.command,
        )
        (self.folder / "environment.json").write_text(json.dumps(environment, indent=2) + "\n")


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


def comparison_table(runs: list[Run]) -> str:
    """Input, cost and test accuracy of runs, as text."""
    rows = [("run", "model", "input", "MFLOPs an image", "test top-1")]
    for run in runs:
        samples = getattr(run.model, "sample_size", None)
        size = f"{run.recipe.img_size}" + (f", samples {samples[0]}" if samples else "")
        top1 = f"{run.test_scores.top1:.1f} %" if run.test_scores else "not tested"
        rows.append((run.folder.name, run.recipe.model, size, f"{run.flops / 1e6:.1f}", top1))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join(["", lines[0], "-" * len(lines[0]), *lines[1:], ""])
