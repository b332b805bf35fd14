"""A trained model at another resolution than it was trained at."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from .errors import UserError
from .tasn import TASN


class Resolution(NamedTuple):
    """Sides of square pictures in pixels."""

    input: int  # of a model's input, timm's img_size
    sampled: int | None = None  # of what a TASN samples from it; None for the model's own share of the input

    @classmethod
    def parse(cls, text: str) -> Resolution:
        """Read "INPUT" or "INPUT:SAMPLED".

        Raises:
            UserError: It is neither, or more pixels would be sampled than there are.
        """
        sides = text.split(":")
        if len(sides) > 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
            raise UserError(
                f"--resolution takes INPUT or INPUT:SAMPLED in pixels, such as 448 or 512:336, got {text!r}."
            )
        resolution = cls(*map(int, sides))
        if resolution.sampled and resolution.sampled > resolution.input:
            raise UserError(f"--resolution {text}: what is sampled cannot be larger than the input.")
        return resolution

    def __str__(self) -> str:
        return f"{self.input}:{self.sampled}" if self.sampled else str(self.input)


def set_resolution(model: nn.Module, resolution: Resolution, source: str) -> None:
    """Let a model take pictures of another size, in the way that it takes its own: same crop, same share sampled.

    The attention net's own input stays what it is. Position embeddings are resized where timm can.

    Args:
        model: timm model in evaluation mode; changed in place.
        resolution: Its new one.
        source: The model's name, for messages.

    Raises:
        UserError: The model does not take this resolution.
    """
    own = model.pretrained_cfg["input_size"]
    trained = Resolution(own[1], model.sample_size[0] if isinstance(model, TASN) else None)
    seen = (resolution.input, resolution.input)
    if isinstance(model, TASN):
        if resolution.sampled:
            seen = (resolution.sampled, resolution.sampled)
        else:
            seen = tuple(round(resolution.input * s / side) for s, side in zip(model.sample_size, own[1:]))
        model.structure_sampler.output_size = seen
    elif resolution.sampled:
        raise UserError(f"--resolution {resolution}: {source!r} samples nothing: give --resolution {resolution.input}.")
    model.pretrained_cfg = model.pretrained_cfg | dict(input_size=(own[0], resolution.input, resolution.input))
    backbone = getattr(model, "backbone", model)
    try:
        if hasattr(backbone, "set_input_size"):
            backbone.set_input_size(img_size=seen)
        with torch.inference_mode():
            model(torch.zeros(1, own[0], resolution.input, resolution.input))
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"--resolution {resolution}: model {source!r} does not take {seen[0]} x {seen[1]} pixels ({reason}): give "
            f"{trained}, its own, or another size that its backbone takes (a ViT, multiples of its patches' side)."
        ) from error
