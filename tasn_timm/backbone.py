"""Backbone: any model of timm's, found by name, tried without values, created without weights."""

from collections.abc import Mapping, Sequence

import timm
import torch
from timm.models import PretrainedCfg, get_pretrained_cfg
from timm.models._registry import get_arch_pretrained_cfgs, split_model_name_tag
from torch import Tensor, nn

from .errors import UserError, unknown

# timm's arguments that say where weights are, on this machine or elsewhere.
PLACES = ("checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")


def backbone_cfg(name: str) -> PretrainedCfg:
    """timm's pretrained_cfg of a model, with or without a tag.

    Raises:
        UserError: timm knows no such model or tag.
    """
    architecture, tag = split_model_name_tag(name)
    if not timm.is_model(architecture):
        raise unknown("timm model", name, timm.list_models(), "timm.list_models()")
    tagged = get_arch_pretrained_cfgs(architecture)
    if tag and name not in tagged:
        raise unknown(f"weights of {architecture}:", name, tagged)
    return get_pretrained_cfg(name) or PretrainedCfg()


def refuse_places(what: str, arguments: Mapping[str, object]) -> None:
    """Refuse arguments that say where weights are, among those that are published with a model.

    Raises:
        UserError: There is one.
    """
    for place in PLACES:
        if arguments.get(place) is not None:
            raise UserError(
                f"{place} does not belong into {what}, which is published with the model: weights come with pretrained "
                f"alone, in training with initial_checkpoint or model local-dir:FOLDER, in Python with the model's own "
                f"pretrained_cfg_overlay."
            )


def create_backbone(name: str, image_size: tuple[int, int], **kwargs) -> nn.Module:
    """Create a timm model without weights for images of a given size.

    Many models refuse a size only when they see an image, so one without values (device "meta", about 0.1 s)
    goes through a copy first.

    Args:
        name: timm model, with or without a tag.
        image_size: (H, W) in pixels; passed on as img_size to models of a fixed input size.
        **kwargs: timm's arguments. None is not passed on.

    Raises:
        UserError: See `create_on_meta` and `try_backbone`.
    """
    without_effect = try_backbone(name, image_size, **kwargs)
    model = timm.create_model(name, pretrained=False, **_with_size(name, image_size, kwargs))
    for parameter in without_effect:  # timm builds some later stages all the same, for whose gradients DDP would wait
        model.get_parameter(parameter).requires_grad_(False)
    return model


def _with_size(name: str, image_size: tuple[int, int], kwargs: dict) -> dict:
    return (dict(img_size=image_size) if backbone_cfg(name).fixed_input_size else {}) | kwargs


def create_on_meta(name: str, image_size: tuple[int, int], **kwargs) -> nn.Module:
    """Create a timm model without values.

    Args:
        name, image_size, **kwargs: As in `create_backbone`.

    Raises:
        UserError: timm knows no such model or tag, or it takes no such arguments; or one says where weights are.
    """
    refuse_places("backbone_args", kwargs)
    kwargs = _with_size(name, image_size, kwargs | dict(device=None, dtype=None))
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):  # EfficientNet draws random numbers all the same
            return timm.create_model(name, pretrained=False, **kwargs)
    except (TypeError, ValueError, IndexError, RuntimeError, AssertionError) as error:  # timm's ways to refuse
        arguments = ", ".join(f"{key}={value!r}" for key, value in kwargs.items() if value is not None)
        raise UserError(
            f"timm model {name} cannot be made with {arguments}: {_reason(error)}. Leave out what it lacks."
        ) from error


@torch.inference_mode(False)
def try_backbone(name: str, image_size: tuple[int, int], **kwargs) -> list[str]:
    """Put an image without values through a model without weights.

    Args:
        name, image_size, **kwargs: As in `create_backbone`.

    Returns:
        With features_only the names of the parameters that have no effect on the features.

    Raises:
        UserError: It does not take such images, or gives neither maps (features_only) nor one vector for each image
            (else, unless global_pool is "").
    """
    model = create_on_meta(name, image_size, **kwargs).eval()
    if any(isinstance(module, nn.RNNBase) for module in model.modules()):  # PyTorch takes seconds for an LSTM there
        return []
    features_only = kwargs.get("features_only", False)
    image = torch.empty(1, kwargs.get("in_chans") or 3, *image_size, device="meta")
    try:
        with torch.set_grad_enabled(features_only), torch.device("meta"):
            output = model(image)
    except (AssertionError, RuntimeError, ValueError) as error:
        if isinstance(error, NotImplementedError) or "meta tensor" in str(error):  # it reads values, as Gemma's does
            return []
        own = backbone_cfg(name).input_size[1:]
        raise UserError(
            f"timm model {name} does not take images of {image_size[0]} x {image_size[1]} pixels: {_reason(error)}. "
            f"Its own size is {own[0]} x {own[1]}: give that as sample_size (isqrt_cov: img_size; attention net: "
            f"input_size), or choose a backbone for any size, such as resnet50 or convnext_tiny."
        ) from error
    if features_only:
        if not all(isinstance(x, Tensor) and x.ndim == 4 for x in output):
            raise UserError(
                f"timm model {name} gives no feature maps (B, C, h, w), which attention needs: choose another "
                f"backbone, such as resnet50 or vit_base_patch16_224."
            )
        return _names_without_effect(model, output)
    if kwargs.get("global_pool") != "" and getattr(output, "shape", None) != (1, model.head_hidden_size):
        raise UserError(
            f"timm model {name} does not pool its features to one vector for each image: give a global_pool that does, "
            f"such as 'avg', or choose another backbone, such as resnet50 or vit_base_patch16_224."
        )
    return []


def _names_without_effect(model: nn.Module, output: Sequence[Tensor]) -> list[str]:
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad))
    gradients = torch.autograd.grad(sum(x.sum() for x in output), parameters, allow_unused=True)
    return [name for name, gradient in zip(names, gradients) if gradient is None]


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def stem_convolutions(model: nn.Module) -> list[str]:
    """Names of the convolutions of a timm model, or of its features, that see the image."""
    names = model.pretrained_cfg.get("first_conv") or ()
    modules = dict(model.named_modules())
    names = [names] if isinstance(names, str) else names
    # timm's feature extractors flatten the first level of names, or put the model into an attribute "model".
    candidates = ((name, name.replace(".", "_", 1), f"model.{name}") for name in names)
    return [name for spellings in candidates for name in dict.fromkeys(spellings) if name in modules]
