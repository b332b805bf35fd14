"""Accelerate, as a recipe and `accelerate launch` want it."""

import os
from dataclasses import replace
from importlib.util import find_spec

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    DynamoBackend,
    GradientAccumulationPlugin,
)

from ..errors import UserError, unknown
from ..recipe import Recipe


def create_accelerator(recipe: Recipe, other: Recipe | None = None) -> Accelerator:
    """Create it for a recipe; what the recipe leaves open is as accelerate was configured or launched.

    Args:
        recipe: Of the run.
        other: Of another one in the same process, with the same options for accelerate.

    Raises:
        UserError: Something that this machine, or this script, cannot do.
    """
    for tracker in recipe.trackers:
        _check_tracker(tracker)
    _check_environment(recipe)
    backends = [backend.value.lower() for backend in DynamoBackend]
    if recipe.torchcompile not in (None, *backends):
        raise unknown("torchcompile", recipe.torchcompile, backends)
    freezes = any(each.freeze for each in (recipe, other) if each)
    try:
        accelerator = Accelerator(
            cpu=recipe.cpu,
            mixed_precision=recipe.mixed_precision,
            dynamo_backend=recipe.torchcompile,
            # Ours, because the last step of an epoch may have fewer.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            log_with=recipe.trackers or None,
            project_dir=recipe.output,
            # A part that is frozen for some epochs has no gradient in them.
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=freezes)],
        )
    except ValueError as error:
        raise UserError(f"accelerate cannot be used as configured: {error}") from error
    _check_device(recipe, accelerator)
    if recipe.tf32 is not None:
        torch.set_float32_matmul_precision("high" if recipe.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = recipe.tf32
    return accelerator


def as_launched(recipe: Recipe, accelerator: Accelerator) -> Recipe:
    """A recipe with what it had left to accelerate's configuration and launcher.

    Raises:
        UserError: They want a precision that recipes do not have.
    """
    backend = accelerator.state.dynamo_plugin.backend.value.lower()
    return replace(recipe, mixed_precision=accelerator.mixed_precision, torchcompile=backend)


def _check_tracker(tracker: object) -> None:
    if not isinstance(tracker, str) or tracker not in LOGGER_TYPE_TO_CLASS:
        raise unknown("tracker", tracker, LOGGER_TYPE_TO_CLASS)
    if find_spec(tracker) is None:  # accelerate would leave it out without a word
        raise UserError(f"tracker {tracker} is not installed: pip install {tracker}.")


def _check_environment(recipe: Recipe) -> None:
    """Refuse what accelerate would take from its launcher, and leave out without a word."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        # On a CPU accelerate would train with DDP. With FSDP the main process alone would save its own shards.
        raise UserError("FSDP is not for this script: use DDP (--multi_gpu); these models fit into one GPU each.")
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", str(recipe.grad_accum_steps))
    if steps != str(recipe.grad_accum_steps):
        raise UserError(
            f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS is {steps}, but the recipe has {recipe.grad_accum_steps}: say it "
            f"with --grad-accum-steps."
        )


def _check_device(recipe: Recipe, accelerator: Accelerator) -> None:
    on_cpu = accelerator.device.type == "cpu"
    if accelerator.mixed_precision == "fp16" and on_cpu:
        raise UserError("mixed_precision fp16 has no effect on a CPU: use bf16 or no.")
    if recipe.tf32 is not None and accelerator.device.type != "cuda":
        raise UserError(f"tf32 {recipe.tf32} has no effect on {accelerator.device.type}: leave it out.")
    if recipe.sync_bn and on_cpu and accelerator.num_processes > 1:
        raise UserError("sync_bn is for GPUs, torch has none for a CPU: leave it out.")
    several = {DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU}
    if accelerator.distributed_type not in several:
        raise UserError(
            f"accelerate is configured for {accelerator.distributed_type.value}, which this script has not been made "
            f"for: use plain multi-GPU training (DDP); these models fit into one GPU each."
        )
