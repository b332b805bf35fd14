"""What a model is trained for: TASN's loss, or plain cross-entropy for any other timm model."""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ..distillation import TASNLoss
from ..errors import UserError, no_effect
from ..recipe import Recipe
from ..tasn import TASN

Objective = Callable[[Any, Tensor], dict[str, Tensor]]


# What of a recipe belongs to TASNLoss.
LOSS_OPTIONS = (
    *("temperature", "soft_weight", "scale_soft", "detach_teacher"),
    *("attention_weight", "master_weight", "part_weight", "shared_part_weight"),
)


def create_objective(model: nn.Module, recipe: Recipe) -> Objective:
    """Build the loss that fits a model, and make the model return what it takes.

    Returns:
        (output, labels (B,)) -> dict of scalars with "loss" and its parts.

    Raises:
        UserError: An option of the recipe that has no effect on this model.
    """
    options = {name: getattr(recipe, name) for name in LOSS_OPTIONS}
    mixed = recipe.mixup or recipe.cutmix  # then smoothing is part of the targets
    smoothing = 0.0 if mixed else recipe.smoothing
    if not isinstance(model, TASN):
        no_effect(Recipe, options, f"model {recipe.model}, which is not a TASN")
        return lambda output, target: dict(loss=F.cross_entropy(output, target, label_smoothing=smoothing))
    if mixed and model.part_net:
        raise UserError(
            f"mixup={recipe.mixup}, cutmix={recipe.cutmix} make no sense with a part net: the detail image shows a "
            f"part of one of the two pictures, and would teach both of their classes. Leave them out, or set "
            f"part_net=False."
        )
    if not model.part_net:
        no_effect(Recipe, options, "part_net=False", except_for=["attention_weight"])
    if not model.master_net:
        no_effect(Recipe, options, "master_net=False", except_for=["attention_weight", "part_weight"])
    model.set_distilled_training(True)
    return TASNLoss(**options, smoothing=smoothing, heads=model.heads.heads)


def smallest_batch(model: nn.Module) -> int:
    """Fewest images that a forward pass in training may have: BatchNorm needs 2."""
    return 2 if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()) else 1


def micro_batch_size(recipe: Recipe, processes: int, model: nn.Module, rest: int = 0) -> int:
    """Images per process and forward pass, from the recipe's images per optimizer step.

    Args:
        recipe: Of the run.
        processes: Of the run.
        model: To be trained.
        rest: Images of a short last step of an epoch.

    Raises:
        UserError: They cannot be divided evenly, or single images would meet BatchNorm.
    """
    shares = processes * recipe.grad_accum_steps
    if recipe.batch_size % shares:
        raise UserError(
            f"batch_size {recipe.batch_size} is per optimizer step and cannot be divided among {processes} processes x "
            f"{recipe.grad_accum_steps} accumulation steps: use a multiple of {shares}."
        )
    size = recipe.batch_size // shares
    least = smallest_batch(model)
    if size < least:
        raise UserError(
            f"batch_size {recipe.batch_size} leaves 1 image per forward pass, but {recipe.model} has BatchNorm, which "
            f"needs at least 2: use batch_size {2 * shares} or more."
        )
    last = rest // (math.ceil(rest / (size * processes)) * processes) if rest else size
    if last < least:
        raise UserError(
            f"the last step of an epoch has {rest} images for {processes} processes, and each forward pass of "
            f"{recipe.model} needs {least}: use another batch_size than {recipe.batch_size}, or --drop-last."
        )
    if (recipe.mixup or recipe.cutmix) and (size % 2 or rest):
        raise UserError(
            f"mixup and cutmix need an even number of images in each forward pass, got {size}"
            f"{' and others in the last one' if rest else ''}: use an even batch size, and drop_last."
        )
    return size
