"""Details distiller: the part net teaches the master net by soft targets (Sec. 3.3, Eqs. 6-8)."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import UserError, unknown

if TYPE_CHECKING:
    from .tasn import TASNOutput

# Weight of the (master, part) pair of classifiers; the (logits, shared_part) pair has the rest.  With two pairs the
# published code halves every classification loss; with one pair Eq. 8 stands as printed.
_MASTER_WEIGHT = {"both": 0.5, "shared": 1.0, "separate": 1.0}


def soft_target_cross_entropy(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 10.0) -> Tensor:
    """Cross-entropy of the student's against the teacher's softened distribution, Eqs. 6-7, averaged over the batch.

    No factor T^2, as in paper and published code.

    Args:
        student_logits: z_s, (B, K).
        teacher_logits: z_d, (B, K).
        temperature: T > 0 of both softmaxes.

    Returns:
        Scalar, in float32 at least.
    """
    _check_temperature(temperature)
    return F.cross_entropy(_precise(student_logits) / temperature, (_precise(teacher_logits) / temperature).softmax(-1))


class TASNLoss(nn.Module):
    """The objective of the whole network: classification of every view, and Eq. 8's distillation.

        loss = attention_weight * CE(attention)
             + (1 - m) * (CE(logits) + part_weight * CE(shared_part))
             + m * (CE(master) + part_weight * CE(part) + soft_weight * L_soft(master, part))

    m is 1/2 with heads="both" and 1 else. So for "both" the defaults are the published weights (1; 4 x 0.5; 1 for
    the soft target), and for all three lambda = 2 is relative to the classification of the master, as in Eq. 8.

    Args:
        temperature: T of Eq. 6.
        soft_weight: lambda of Eq. 8.
        part_weight: Weight of the detail image's classification relative to the structure image's.
        attention_weight: Weight of the attention net's own classification; its gradient reaches nothing else.
        detach_teacher: Keep the soft target from changing the part net. False is the published code, which lets the
            distillation pull the teacher towards the student as well.
        smoothing: Label smoothing of the classification losses, 0 to 1.
        heads: The model's `heads`.
    """

    def __init__(
        self,
        temperature: float = 10.0,
        soft_weight: float = 2.0,
        part_weight: float = 1.0,
        attention_weight: float = 1.0,
        detach_teacher: bool = True,
        smoothing: float = 0.0,
        heads: str = "both",
    ) -> None:
        super().__init__()
        _check_temperature(temperature)
        if not 0 <= smoothing <= 1:
            raise UserError(f"smoothing must be between 0 and 1, got {smoothing}.")
        if heads not in _MASTER_WEIGHT:
            raise unknown("heads", heads, _MASTER_WEIGHT)
        self.temperature = temperature
        self.soft_weight = soft_weight
        self.part_weight = part_weight
        self.attention_weight = attention_weight
        self.detach_teacher = detach_teacher
        self.smoothing = smoothing
        self.master_weight = _MASTER_WEIGHT[heads]

    def forward(self, output: "TASNOutput", target: Tensor) -> dict[str, Tensor]:
        """Compute the loss of a `TASNOutput` against class indices (B,).

        Returns:
            Scalars: "loss" and its parts before weighting, "structure", "detail", "soft" and "attention".
        """
        m = self.master_weight
        if m < 1 and output.master is output.logits:
            raise UserError("this model has one pair of classifiers: pass its kind, TASNLoss(heads=model.heads.heads).")
        teacher = output.part.detach() if self.detach_teacher else output.part
        structure = (1 - m) * self._classify(output.logits, target) + m * self._classify(output.master, target)
        detail = (1 - m) * self._classify(output.shared_part, target) + m * self._classify(output.part, target)
        soft = soft_target_cross_entropy(output.master, teacher, self.temperature)
        attention = self._classify(output.attention, target)
        loss = structure + self.part_weight * detail + m * self.soft_weight * soft + self.attention_weight * attention
        return dict(loss=loss, structure=structure, detail=detail, soft=soft, attention=attention)

    def _classify(self, logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(_precise(logits), target, label_smoothing=self.smoothing)


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise UserError(f"temperature must be greater than 0, got {temperature}.")


def _precise(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
