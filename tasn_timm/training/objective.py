"""What a model is trained for: TASN's loss, or plain cross-entropy for any other timm model."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ..distillation import TASNLoss
from ..errors import UserError
from ..recipe import Recipe
from ..tasn import TASN

Objective = Callable[[Any, Tensor], dict[str, Tensor]]


def create_objective(model: nn.Module, recipe: Recipe) -> Objective:
    """Build the loss that fits a model, and make the model return what it takes.

    Returns:
        (output, labels (B,)) -> dict of scalars with "loss" and its parts.
    """
    if not isinstance(model, TASN):
        return lambda output, target: dict(loss=F.cross_entropy(output, target, label_smoothing=recipe.smoothing))
    model.set_distilled_training(True)
    return TASNLoss(
        temperature=recipe.temperature,
        soft_weight=recipe.soft_weight,
        part_weight=recipe.part_weight,
        attention_weight=recipe.attention_weight,
        detach_teacher=recipe.detach_teacher,
        smoothing=recipe.smoothing,
        heads=model.heads.heads,
    )


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
