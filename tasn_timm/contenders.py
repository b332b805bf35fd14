"""What is compared when models are timed: one and its plain backbone at two sizes; and what can be counted of them."""

from typing import NamedTuple

import timm
import torch
from timm.data import resolve_model_data_config
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .backbone import backbone_cfg
from .classifier import SECOND_ORDER, BackboneClassifier
from .errors import UserError
from .tasn import TASN

# The boxes of Fig. 2, by the modules of a `TASN` which make one up.
PARTS = {
    "attention net": ("attention_net",),
    "trilinear attention": ("trilinear_attention",),
    "sampler": ("structure_sampler",),
    "backbone and heads": ("backbone", "pool", "heads"),
}


class Contender(NamedTuple):
    """A model to be measured.

    Args:
        name: "tasn_resnet50 @ 512": the model and the side of its pictures.
        model: Takes normalised pictures, a TASN pixels of uint8.
        image_size: (H, W) of its pictures.
        reference: Name of the contender that its ratios are relative to.
    """

    name: str
    model: nn.Module
    image_size: tuple[int, int]
    reference: str


def create_contenders(name: str, sample_size: int | None = None) -> tuple[list[Contender], list[str]]:
    """Create a model and what it is compared with, with random weights.

    That is its plain backbone, at the size of the sampled pictures and at twice that; for a model that does not sample,
    the model itself at its own size and at twice that.

    Args:
        name: timm model, with or without a tag.
        sample_size: Of a TASN, another one than its own. Its pictures are in proportion.

    Returns:
        Contenders, the model first, each with the plain one at the single size as its reference; and a sentence for
        each that cannot be made.

    Raises:
        UserError: timm knows no such model, or it cannot be made.
    """
    backbone_cfg(name)  # fails with the names that come close
    model = timm.create_model(name, **({} if sample_size is None else dict(sample_size=sample_size)))
    image_size = _image_size(model)
    if not isinstance(model, BackboneClassifier):
        model = BackboneClassifier(name, model.num_classes or 1000, img_size=image_size)
    samples = isinstance(model, TASN)
    height, width = model.sample_size if samples else image_size
    plain_name = _plain_name(model, name)
    reference = f"{plain_name} @ {_pixels((height, width))}"

    def plain(size: tuple[int, int]) -> Contender:
        return Contender(f"{plain_name} @ {_pixels(size)}", _plain(model, size), size, reference)

    contenders, left_out = [plain((height, width))], []
    if samples:
        image_size = image_size if sample_size is None else _in_proportion(name, model)
        contenders.insert(0, Contender(f"{name} @ {_pixels(image_size)}", model, image_size, reference))
    try:
        contenders.append(plain((2 * height, 2 * width)))
    except UserError as error:
        left_out.append(f"{plain_name} @ {_pixels((2 * height, 2 * width))} is left out: {error}")
    return contenders, left_out


def _in_proportion(name: str, model: TASN) -> tuple[int, int]:
    """(H, W) of pictures that are to the sampled ones as they are with the sample_size of the TASN of that name."""
    own = timm.create_model(name, device="meta")
    sides = zip(_image_size(own), own.sample_size, model.sample_size)
    return tuple(round(side / before * sampled) for side, before, sampled in sides)


def _image_size(model: nn.Module) -> tuple[int, int]:
    return tuple(resolve_model_data_config(model)["input_size"][1:])


def _pixels(size: tuple[int, int]) -> str:
    return f"{size[0]}" if size[0] == size[1] else f"{size[0]}x{size[1]}"


def _backbone_args(model: BackboneClassifier) -> dict:
    """What makes a model's backbone another than the timm model of its name."""
    given = ("num_classes", "in_chans", "img_size", "global_pool", "drop_rate", "drop_path_rate")
    return {key: value for key, value in model.backbone._model_args.items() if key not in given}


def _plain_name(model: BackboneClassifier, name: str) -> str:
    is_timms = not _backbone_args(model) and model.global_pool != SECOND_ORDER
    return model.backbone.pretrained_cfg["architecture"] if is_timms else f"backbone of {name}"


def _plain(model: BackboneClassifier, size: tuple[int, int]) -> BackboneClassifier:
    """The model's backbone with the same pooling and one classifier, for pictures of (H, W) pixels."""
    return BackboneClassifier(
        model.backbone.pretrained_cfg["architecture"],
        model.num_classes,
        model.in_chans,
        SECOND_ORDER if model.global_pool == SECOND_ORDER else model.backbone._model_args.get("global_pool"),
        img_size=size,
        pool_args=model.pool_args or None,
        backbone_args=_backbone_args(model),
    )


@torch.inference_mode()
def fixed_cost(contender: Contender) -> dict:
    """Parameters, and FLOPs of the inference of one picture, by part.

    A multiplication and an addition are two FLOPs. PyTorch's counter knows convolutions and matrix products alone:
    resizing, softmax, sampling and activations count as nothing.

    Returns:
        "parameters" and "flops", numbers, and "parts": of a TASN a dict of both for each of `PARTS`, else empty.
    """
    model = contender.model.eval()
    like = next(model.parameters())
    counter = FlopCounterMode(display=False)
    with counter:
        model(torch.zeros(1, model.in_chans, *contender.image_size, device=like.device, dtype=like.dtype))
    by_module = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    parts = {
        part: dict(
            parameters=sum(p.numel() for name in names for p in getattr(model, name).parameters()),
            flops=sum(by_module.get(f"{type(model).__name__}.{name}", 0) for name in names),
        )
        for part, names in (PARTS.items() if isinstance(model, TASN) else ())
    }
    return dict(parameters=sum(p.numel() for p in model.parameters()), flops=counter.get_total_flops(), parts=parts)
