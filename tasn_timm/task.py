"""TASN's objective as a task of timm's own training loop (timm.task, which timm's train.py runs)."""

from collections.abc import Callable
from typing import Any

import torch
from timm.task import ClassificationTask, resolve_classification_loss
from timm.utils import unwrap_model
from torch import Tensor, nn

from .distillation import TASNLoss
from .errors import UserError
from .tasn import TASN


class TASNTask(ClassificationTask):
    """Trains a `TASN` with `TASNLoss`; compilation, DDP, EMA, checkpoints and evaluation are timm's.

    Args:
        model: Made by timm.create_model. It returns a `TASNOutput` in training from here on.
        criterion: Loss of every classifier, (logits, targets) -> scalar, e.g. one of timm's; None for cross-entropy.
        criterion_kwargs: Or the arguments of timm.loss.create_classification_loss, which makes it: smoothing, ...
        device, dtype, verbose: timm's.
        loss_kwargs: Arguments of `TASNLoss`: temperature, soft_weight, ...; heads is the model's.

    Raises:
        ValueError: The model is not a `TASN`, there are both a criterion and criterion_kwargs, or arguments that
            `TASNLoss` refuses.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[[Tensor, Tensor], Tensor] | None = None,
        criterion_kwargs: dict[str, Any] | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
        *,
        loss_kwargs: dict[str, Any] | None = None,
    ) -> None:
        tasn = unwrap_model(model)
        if not isinstance(tasn, TASN):
            raise UserError(f"TASNTask trains a TASN, got {type(tasn).__name__}: use timm.task.ClassificationTask.")
        if criterion_kwargs:
            criterion = resolve_classification_loss(criterion, device, criterion_kwargs=criterion_kwargs)
        loss = TASNLoss(**loss_kwargs or {}, heads=tasn.heads.heads, criterion=criterion)
        super().__init__(model, loss, device=device, dtype=dtype, verbose=verbose)
        tasn.set_distilled_training(True)

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Compute the losses of images (B, 3, H, W) and labels (B,), or what the criterion takes.

        Returns:
            `TASNLoss`'s scalars, "loss" among them, and "output": the predicting logits (B, K), or with
            master_net=False those of the first detail images.
        """
        output = self.trainable_module(input)
        logits = output.part[: len(input)] if output.logits is None else output.logits
        return self.criterion(output, target) | dict(output=logits)

    def get_clip_parameters(self, exclude_head: bool = False) -> list[nn.Parameter]:
        """Parameters whose gradients timm clips: all, or all but the classifiers', of which timm knows only one."""
        tasn = unwrap_model(self.trainable_module)
        classifiers = [*tasn.heads.parameters(), *tasn.attention_net.classifier.parameters()] if exclude_head else []
        left_out = {id(parameter) for parameter in classifiers}
        return [parameter for parameter in tasn.parameters() if id(parameter) not in left_out]


def create_task(model: nn.Module, *args, **kwargs) -> ClassificationTask:
    """`TASNTask` for a TASN, timm's `ClassificationTask` for any other model, with timm's arguments."""
    task = TASNTask if isinstance(unwrap_model(model), TASN) else ClassificationTask
    return task(model, *args, **kwargs)
