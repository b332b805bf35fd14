"""What a model is trained for: TASN's loss, or plain cross-entropy for any other timm model."""

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
    if not isinstance(model, TASN):
        no_effect(Recipe, options, f"model {recipe.model}, which is not a TASN")
        return lambda output, target: dict(loss=F.cross_entropy(output, target, label_smoothing=recipe.smoothing))
    if not model.part_net:
        no_effect(Recipe, options, "part_net=False", except_for=["attention_weight"])
    if not model.master_net:
        no_effect(Recipe, options, "master_net=False", except_for=["attention_weight", "part_weight"])
    model.set_distilled_training(True)
    return TASNLoss(**options, smoothing=recipe.smoothing, heads=model.heads.heads)


def micro_batch_size(recipe: Recipe, processes: int, model: nn.Module) -> int:
    """Images per process and forward pass, from the recipe's images per optimizer step.

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
    if size == 1 and any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        raise UserError(
            f"batch_size {recipe.batch_size} leaves 1 image per forward pass, but {recipe.model} has BatchNorm, which "
            f"needs at least 2: use batch_size {2 * shares} or more."
        )
    return size
