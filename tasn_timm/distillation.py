"""Details distiller: the part net teaches the master net by soft targets (Sec. 3.3, Eqs. 6-8)."""

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import UserError, no_effect, unknown

if TYPE_CHECKING:
    from .tasn import TASNOutput

# Default weight of the (master, part) pair of classifiers; the (logits, shared_part) pair has the rest.  With two pairs
# the published code halves every classification loss; with one pair Eq. 8 stands as printed.
_MASTER_WEIGHT = {"both": 0.5, "shared": 1.0, "separate": 1.0}


def soft_target_cross_entropy(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 10.0) -> Tensor:
    """Cross-entropy of the student's against the teacher's softened distribution, Eqs. 6-7, averaged over the batch.

    No factor T^2, as in paper and published code (`TASNLoss(scale_soft=True)` has it).

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
             + (1 - m) * (CE(logits) + shared_part_weight * CE(shared_part))
             + m * (CE(master) + part_weight * CE(part) + soft_weight * L_soft(master, part))

    m is `master_weight`. With heads="both" the defaults are the published weights (1; 4 x 0.5; 1 for the soft target),
    and lambda = 2 is relative to the classification of the master, as in Eq. 8. Terms of a view that the model does not
    have (part_net=False, master_net=False) are left out. Over several parts an image's details are averaged.

    Args:
        temperature: T of Eq. 6.
        soft_weight: lambda of Eq. 8.
        part_weight: Weight of the detail images' classification relative to the structure image's.
        attention_weight: Weight of the attention net's own classification; its gradient reaches nothing else.
        detach_teacher: Keep the soft target from changing the part net. False is the published code, which lets the
            distillation pull the teacher towards the student as well.
        smoothing: Label smoothing of the classification losses, 0 to 1.
        heads: The model's `heads`.
        master_weight: Share of the master and part classifiers, 0 to 1, the shared one having the rest. None: 1/2 with
            heads="both". With one pair of classifiers it is 1.
        shared_part_weight: `part_weight` of the shared classifier; None for the same.
        criterion: Classification loss, (logits (N, K), targets) -> scalar, in the place of cross-entropy; it may take
            soft targets (B, K), such as timm's with mixup.
        scale_soft: Multiply L_soft by T^2, which makes its gradient's size independent of T (Hinton et al., 2015).
            Neither paper nor published code does.

    Raises:
        ValueError: A value out of range, or one that has no effect beside another.
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
        *,
        master_weight: float | None = None,
        shared_part_weight: float | None = None,
        scale_soft: bool = False,
        criterion: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        _check_temperature(temperature)
        if heads not in _MASTER_WEIGHT:
            raise unknown("heads", heads, _MASTER_WEIGHT)
        for name, weight in (
            *(("soft_weight", soft_weight), ("part_weight", part_weight), ("attention_weight", attention_weight)),
            ("shared_part_weight", shared_part_weight),
        ):
            if weight is not None and not 0 <= weight < math.inf:
                raise UserError(f"{name} must be 0 or more, got {weight}.")
        for name, share in (("smoothing", smoothing), ("master_weight", master_weight)):
            if share is not None and not 0 <= share <= 1:
                raise UserError(f"{name} must be between 0 and 1, got {share}.")
        if heads != "both":
            no_effect(
                TASNLoss,
                dict(master_weight=master_weight, shared_part_weight=shared_part_weight),
                f"heads={heads!r}, which has one pair of classifiers",
            )
        if master_weight == 1:
            no_effect(TASNLoss, dict(shared_part_weight=shared_part_weight), "master_weight=1")
        if master_weight == 0:
            no_effect(TASNLoss, dict(soft_weight=soft_weight), "master_weight=0")
            if shared_part_weight is not None:
                no_effect(TASNLoss, dict(part_weight=part_weight), "master_weight=0 and shared_part_weight")
        if soft_weight == 0 or master_weight == 0:
            no_effect(
                TASNLoss,
                dict(temperature=temperature, detach_teacher=detach_teacher, scale_soft=scale_soft),
                "soft_weight=0" if soft_weight == 0 else "master_weight=0",
            )
        self.temperature = temperature
        self.soft_weight = soft_weight
        self.part_weight = part_weight
        self.attention_weight = attention_weight
        self.detach_teacher = detach_teacher
        if criterion is not None:
            no_effect(TASNLoss, dict(smoothing=smoothing), "criterion")
        self.criterion = criterion or partial(F.cross_entropy, label_smoothing=smoothing)
        self.heads = heads
        self.master_weight = _MASTER_WEIGHT[heads] if master_weight is None else master_weight
        self.shared_part_weight = part_weight if shared_part_weight is None else shared_part_weight
        self.soft_scale = temperature**2 if scale_soft else 1.0

    def forward(self, output: "TASNOutput", target: Tensor) -> dict[str, Tensor]:
        """Compute the loss of a `TASNOutput` against class indices (B,), or what `criterion` takes.

        Returns:
            Scalars: "loss" and its parts before `attention_weight`, `part_weight` and lambda: "structure", "detail",
            "soft" and "attention", those that the model has.

        Raises:
            UserError: The model has other `heads`.
        """
        m = self.master_weight
        if (output.master is not None) != (self.heads == "both"):
            pairs = "one pair" if output.master is None else "two pairs"
            raise UserError(
                f"TASNLoss(heads={self.heads!r}) does not fit a model with {pairs} of classifiers: pass its kind, "
                f"TASNLoss(heads=model.heads.heads)."
            )
        losses = dict(attention=self._classify(output.attention, target))
        loss = self.attention_weight * losses["attention"]
        master = output.logits if output.master is None else output.master
        shared_part = output.part if output.shared_part is None else output.shared_part
        if output.logits is not None:
            losses["structure"] = (1 - m) * self._classify(output.logits, target)
            losses["structure"] = losses["structure"] + m * self._classify(master, target)
            loss = loss + losses["structure"]
        if output.part is not None:
            shared, part = (self._classify(logits, target) for logits in (shared_part, output.part))
            losses["detail"] = (1 - m) * shared + m * part
            loss = loss + (1 - m) * self.shared_part_weight * shared + m * self.part_weight * part
        if output.logits is not None and output.part is not None:
            teacher = output.part.detach() if self.detach_teacher else output.part
            student = master.repeat(len(teacher) // len(master), 1)  # once for every part
            losses["soft"] = self.soft_scale * soft_target_cross_entropy(student, teacher, self.temperature)
            loss = loss + m * self.soft_weight * losses["soft"]
        return dict(loss=loss, **losses)

    def _classify(self, logits: Tensor, target: Tensor) -> Tensor:
        # Part by part: a criterion may compare the images of a batch, as timm's JSD with its augmentation splits does.
        parts = _precise(logits).split(len(target))
        return torch.stack([self.criterion(part, target) for part in parts]).mean()


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise UserError(f"temperature must be greater than 0, got {temperature}.")


def _precise(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
