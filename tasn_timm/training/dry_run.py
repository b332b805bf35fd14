"""What a training would cost, from two steps of it."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch.utils.data import DataLoader

from ..errors import UserError
from ..recipe import DRY_STEPS, Recipe
from .evaluation import Scores
from .loaders import Plan
from .memory import peak_memory
from .progress import Progress


@contextmanager
def temporary_output(output: str, accelerator: Accelerator) -> Iterator[str]:
    """A folder that is gone afterwards, on the disk on which a run would be."""
    disk = next(folder for folder in (Path(output), *Path(output).resolve().parents) if folder.exists())
    folder = failure = None
    if accelerator.is_main_process:
        try:
            folder = tempfile.TemporaryDirectory(prefix=".dry-run-", dir=disk)
        except OSError as error:
            failure = f"output folder {output!r} cannot be used: {error}. Choose another one."
    name, failure = broadcast_object_list([folder and folder.name, failure])
    if failure:
        raise UserError(failure)
    try:
        yield name
        accelerator.wait_for_everyone()
    finally:
        if folder:
            folder.cleanup()


def estimate(
    recipe: Recipe,
    plan: Plan,
    progress: Progress,
    loaders: Mapping[str, DataLoader],
    scores: Scores | None,
    folder: Path,
) -> str:
    """Time, memory and disk that a run would take, as text.

    Args:
        recipe: Of the run.
        plan: Of its epochs.
        progress: Of its first steps.
        loaders: Of its splits.
        scores: Of the first batches of the test split, or else of the validation split.
        folder: Of the run.
    """
    ends = progress.step_ends
    step = ends[-1] - (ends[-2] if len(ends) > 1 else progress.epoch.start)
    steps = recipe.epochs * plan.steps
    tested = loaders.get("test", loaders.get("val"))
    batch = scores.seconds / min(DRY_STEPS, len(tested)) if scores else 0.0
    times = dict(val=recipe.epochs, test=1)
    batches = sum(len(loaders[role]) * times[role] for role in times if role in loaders)
    checkpoint = sum(path.stat().st_size for path in sorted((folder / "checkpoints").iterdir())[-1].iterdir())
    device = progress.accelerator.device
    lines = (
        ("optimizer steps", f"{steps} ({recipe.epochs} epochs x {plan.steps}), {step:.3g} s each"),
        ("evaluation batches", f"{batches}, {batch:.3g} s each"),
        ("time", f"about {_duration(step * steps + batch * batches)}, from so few steps"),
        ("memory", f"{peak_memory(device) / 1e9:.2f} GB ({device.type}, at most, a process)"),
        ("disk", f"{(recipe.checkpoint_hist + 1) * checkpoint / 1e6:.0f} MB of checkpoints"),
    )
    return "\n".join(
        ["", *(f"{name:20}{value}" for name, value in lines), "", "dry run: all is well, nothing was kept"]
    )


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"
