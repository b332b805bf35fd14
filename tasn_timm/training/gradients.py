"""The gradient of an optimizer step: its norm, clipping, and what happens when it is not finite."""

import math
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from ..errors import NumericalError


def clip_gradient(accelerator: Accelerator, model: nn.Module, largest: float | None) -> Tensor:
    """Scale a prepared model's gradient down to a largest norm; None: leave it as it is.

    Returns:
        The norm before, a scalar on the device.
    """
    if largest is not None:
        return accelerator.clip_grad_norm_(model.parameters(), largest)
    accelerator.unscale_gradients()
    return get_total_norm([parameter.grad for parameter in model.parameters() if parameter.grad is not None])


class Step(NamedTuple):
    """An optimizer step, as far as a report on it goes."""

    number: int  # from 1
    epoch: int  # from 1
    lr: float
    losses: list[dict[str, Tensor]]  # of each forward pass
    ids: list[str]  # of this process's images
    norm: Tensor  # of the gradient


class FiniteGuard:
    """Ends training on all processes before numbers that are not finite reach a checkpoint.

    A CPU knows them before the optimizer step. A GPU computes while the host is ahead, and the host does not wait for
    it: the steps since the last look are looked at together, where a line is logged and before anything is saved, and
    the spoiled weights are dropped with the process. In fp16, where the scaler makes the host wait in each step, a
    gradient that overflows is skipped and the scale lowered, as it is meant to be; a scale below 1 ends training.

    Args:
        accelerator: Of the run.
        optimizer: Of the run, prepared.
        lagging: Look at steps when `flush` is called; None: on all devices but CPUs.
    """

    def __init__(self, accelerator: Accelerator, optimizer: AcceleratedOptimizer, lagging: bool | None = None) -> None:
        self.accelerator = accelerator
        self.optimizer = optimizer
        self.lagging = accelerator.device.type != "cpu" if lagging is None else lagging
        self.steps: list[Step] = []  # since the last look

    def marked(self, loss: Tensor) -> Tensor:
        """The loss, whose gradient is NaN, and so after the reduction everybody's, where it is not finite itself."""
        return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)

    def check(self, step: Step) -> None:
        """Look at a step whose gradients are computed; to be called by all processes, before the optimizer.

        Raises:
            NumericalError: It, or in fp16 the one before, was not finite.
        """
        if self.accelerator.scaler is not None:
            self.flush()  # the optimizer knows what became of the one before
        self.steps.append(step)
        if self.accelerator.scaler is None and not self.lagging:
            self.flush()

    def flush(self) -> None:
        """Look at the steps since the last look; to be called by all processes, between two steps.

        Raises:
            NumericalError: One was not finite; of several the first is told.
        """
        steps, self.steps = self.steps, []
        for step, is_finite in zip(steps, self._are_finite(steps)):
            if not is_finite:
                raise NumericalError(self._report(step))

    def _are_finite(self, steps: list[Step]) -> list[bool]:
        scaler = self.accelerator.scaler
        if not steps:
            return []
        if scaler is not None:  # has one step at a time
            return [not self.optimizer.step_was_skipped or scaler.get_scale() >= 1]
        return torch.stack([step.norm for step in steps]).isfinite().tolist()

    def _report(self, step: Step) -> str:
        mine = [{name: value.item() for name, value in losses.items()} for losses in step.losses]
        gathered = gather_object([(self.accelerator.process_index, mine, step.ids)])
        losses = [values for _, each, _ in gathered for values in each]
        worst = next((v for v in losses if not all(map(math.isfinite, v.values()))), losses[0])
        what = "the loss" if not math.isfinite(worst["loss"]) else "the gradient"
        where = ", ".join(image for _, _, ids in gathered for image in ids)
        return (
            f"{what} is not finite in step {step.number} (epoch {step.epoch}): "
            f"{', '.join(f'{name} {value:g}' for name, value in worst.items())}, gradient norm {step.norm.item():g}, "
            f"learning rate {step.lr:g}, images {where}. Nothing of it was saved: lower lr or set clip_grad and start "
            f"anew, or go on from the last checkpoint with --resume auto --resume-inexact and another lr."
        )
