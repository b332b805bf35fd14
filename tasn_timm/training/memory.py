"""How much memory a training takes, and what is said when there is not enough."""

import resource
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from accelerate import Accelerator
from torch import nn

from ..errors import UserError
from ..memory import lack_of_memory
from ..recipe import Recipe
from .objective import micro_batch_size


def peak_memory(device: torch.device) -> int:
    """Bytes: of a GPU, what tensors took at most; on a CPU, what the process took."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def out_of_memory(
    recipe: Recipe, accelerator: Accelerator, model: nn.Module, rest: int = 0
) -> AbstractContextManager[None]:
    """Make a context within which running out of memory is told with a setting of the same result that needs less.

    Args:
        recipe: Of the run.
        accelerator: Of the run.
        model: That is trained.
        rest: Images of a short last step of an epoch.

    Returns:
        The context, which raises a UserError when out of memory.
    """
    return lack_of_memory(lambda: _say(recipe, accelerator, model, rest))


def _say(recipe: Recipe, accelerator: Accelerator, model: nn.Module, rest: int) -> str:
    processes = accelerator.num_processes
    batch_size = recipe.batch_size // (processes * recipe.grad_accum_steps)
    more = (replace(recipe, grad_accum_steps=steps) for steps in _more_steps(recipe, processes, batch_size))
    steps = next((each.grad_accum_steps for each in more if _is_possible(each, processes, model, rest)), None)
    advice = (
        f"--grad-accum-steps {steps} has the same batch_size {recipe.batch_size} with "
        f"{recipe.batch_size // (processes * steps)} images at a time"
        if steps
        else "use a smaller --batch-size"
    )
    return (
        f"out of memory with {batch_size} images of {recipe.img_size} x {recipe.img_size} pixels at a time "
        f"(batch_size {recipe.batch_size} / {processes} processes / {recipe.grad_accum_steps} grad_accum_steps) on "
        f"{accelerator.device}: {advice}; --mixed-precision bf16 needs less, too."
    )


def _is_possible(recipe: Recipe, processes: int, model: nn.Module, rest: int) -> bool:
    try:
        micro_batch_size(recipe, processes, model, rest)
    except UserError:
        return False
    return True


def _more_steps(recipe: Recipe, processes: int, batch_size: int) -> Iterator[int]:
    """Accumulation steps with at most half as many images in each, but 2 or more; the fewest first."""
    for size in range(batch_size // 2, 1, -1):
        if recipe.batch_size % (processes * size) == 0:
            yield recipe.batch_size // (processes * size)
