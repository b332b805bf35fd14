"""Named models for timm's registry. Their default_cfgs come from hub_configs/, one file per architecture and tag."""

import copy
import dataclasses
import math
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from timm.layers import to_2tuple
from timm.models import (
    DefaultCfg,
    PretrainedCfg,
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    resolve_pretrained_cfg,
)

from .attention_net import PRESETS
from .backbone import backbone_cfg
from .classifier import SECOND_ORDER, BackboneClassifier
from .errors import UserError
from .hub_config import HUB_CONFIGS, HubConfig
from .starting_point import starting_state, weights_filter, weights_source
from .tasn import TASN
from .weights import check, weights_in, weights_on_hub

__all__: list[str] = []  # timm adds the registered names

CONFIGS = {path.stem: HubConfig.read(path) for path in sorted(HUB_CONFIGS.glob("*.json"))}

SOURCE = ("source", "file", "hf_hub_id")  # of a pretrained_cfg: where a trained model's weights are

LITE = dict(attention_net="lite")

# What a checkpoint says of the first is not meant for another value of the others than its own.
DEPENDENT = {
    "attention_args": ("attention_net", "attention_backbone"),
    "attention_affine": ("attention_net", "attention_backbone", "attention_args"),
    "heads": ("master_net", "part_net"),
}


def default_cfg(config: HubConfig) -> dict:
    """timm's default_cfg of a checkpoint.

    Its weights are those that ship with the package as "<architecture>.<tag>.safetensors", or that are published, or
    those of its backbone that its file names; or there are none.
    """
    cfg = {key: tuple(value) if isinstance(value, list) else value for key, value in config.pretrained_cfg.items()}
    cfg |= dict(architecture=config.architecture, tag=config.tag, num_classes=config.num_classes)
    if config.shipped:
        cfg["file"] = str(config.shipped)
    if config.tasn.repo_id:
        cfg["hf_hub_id"] = f"{config.tasn.repo_id}@{config.tasn.commit}"
    return cfg


def default_tag(architecture: str) -> str:
    """The tag of a name without one, whatever is published under others: a starting point, or what ships with us."""
    return "synthbirds" if architecture == "tasn_tiny" else "in1k"


def starting_cfg(backbone: str, sample_size: int | tuple[int, int] = 224) -> dict:
    """default_cfg of a TASN that starts from its backbone's own weights in the `timm/` repositories.

    Args:
        backbone: timm model, with or without the tag of its weights.
        sample_size: Pixels of the sampled images, one number or (H', W'). The input is 512 / 224 of it, as published
            for 224 (the paper samples larger sizes from 512 pixels, too, as the named models and recipes do).
    """
    sample_size = to_2tuple(sample_size)
    cfg = _weights_cfg(backbone)
    if cfg["pool_size"]:  # at the backbone's own input size
        strides = (side / positions for side, positions in zip(cfg["input_size"][1:], cfg["pool_size"]))
        cfg["pool_size"] = tuple(math.ceil(side / stride) for side, stride in zip(sample_size, strides))
    return cfg | dict(
        input_size=(3, *(round(side * 512 / 224) for side in sample_size)),
        min_input_size=(3, *sample_size),
        crop_pct=1.0,
        interpolation="bicubic",
        classifier=("heads.shared", "heads.master", "heads.part", "attention_net.classifier"),
    )


def _weights_cfg(backbone: str) -> dict:
    """What a default_cfg says of a backbone's own weights, and of a plain classifier on it."""
    cfg = backbone_cfg(backbone)
    source = dict(hf_hub_id=cfg.hf_hub_id) if cfg.hf_hub_id else dict(url=cfg.url)
    names = ("input_size", "pool_size", "crop_pct", "interpolation", "mean", "std", "license")
    return source | {name: getattr(cfg, name) for name in names} | dict(classifier="heads.shared")


def _default_cfgs(configs: Iterable[HubConfig]) -> dict[str, DefaultCfg]:
    """Default cfgs by architecture. A "*" is timm's mark of the default tag."""
    return generate_default_cfgs(
        {
            config.name + "*" * (config.tag == default_tag(config.architecture)): default_cfg(config)
            for config in configs
        }
    )


default_cfgs = _default_cfgs(CONFIGS.values())


def _create_tasn(variant: str, pretrained: bool, backbone: str, defaults: dict | None = None, /, **kwargs) -> TASN:
    """Build a TASN with the arguments given, else with those of its tag, else with `defaults`."""
    cfg = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
    # A saved model says everything in its own config, whatever tag it started from.
    config = None if cfg.source else CONFIGS.get(f"{variant}.{cfg.tag}")
    if pretrained and config and not weights_source(vars(cfg)):
        raise _unpublished(config)
    own = (defaults or {}) | (_arguments_of_tag(config, kwargs) if config else {})
    arguments = own | kwargs
    # A new model does not wait for pretrained=True: a checkpoint of a model that started from pretrained weights has to
    # give the same logits in one that did not. Not set afterwards: with features_only=True, feature_cls="fx" the model
    # is a graph by then.
    if not cfg.source and arguments.get("attention_affine") is None:
        arguments["attention_affine"] = _attention_affine(cfg, arguments)
    model = _build(TASN, variant, pretrained, backbone=backbone, **arguments)
    # What config.json has to say besides what `TASN` and timm note: they do not know what nobody gave.
    noted = {name: value for name, value in own.items() if value is not None and name not in kwargs}
    model._model_args = noted | getattr(model, "_model_args", {})
    return model


def _arguments_of_tag(config: HubConfig, given: dict) -> dict:
    """The model_args of a tag, without those that other arguments given leave no sense to."""
    own = copy.deepcopy(config.model_args)
    for name, others in DEPENDENT.items():
        if any(given.get(other, own.get(other)) != own.get(other) for other in others):
            own.pop(name, None)
    return own


def _unpublished(config: HubConfig) -> UserError:
    recipe = config.tasn.recipe
    return UserError(
        f"nobody has published weights for {config.name}. Recipe {recipe} makes them: `accelerate launch "
        f"train_accelerate.py --recipe {recipe}`, then `python -m tasn_timm publish runs/{recipe} --repo "
        f"USER/{recipe}`. {config.architecture} with pretrained=True starts from ImageNet weights."
    )


def _attention_affine(cfg: PretrainedCfg, arguments: dict) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """TASN's argument of that name, for its other ones and images normalised as a cfg says."""
    layout = PRESETS.get(arguments.get("attention_net", "published"), {}) | (arguments.get("attention_args") or {})
    backbone = arguments.get("attention_backbone") or layout.get("backbone")
    return _renormalization(cfg, backbone_cfg(backbone), arguments.get("in_chans", 3)) if backbone else None


def _renormalization(
    cfg: PretrainedCfg, own: PretrainedCfg, in_chans: int
) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Scales and shifts from pixels normalised as a cfg says to those that a backbone's weights were trained with.

    None where nothing changes, or nothing is known: a backbone without weights, or images that are not RGB.
    """
    mean, std = tuple(cfg.mean), tuple(cfg.std)
    if (mean, std) == (own.mean, own.std) or not weights_source(vars(own)) or in_chans != len(mean):
        return None
    scale = tuple(given / wanted for given, wanted in zip(std, own.std))
    shift = tuple((given - wanted) / by for given, wanted, by in zip(mean, own.mean, own.std))
    return scale, shift


def _build(cls: type[BackboneClassifier], variant: str, pretrained: bool, **kwargs) -> BackboneClassifier:
    """Build a model as timm does, with one of three kinds of weights.

    - None, without `pretrained`.
    - Those of a trained model of ours: checked before anything is built, then loaded by timm.
    - Those of its backbones, each from its own repository or file: a starting point.
    """
    overlay = kwargs.get("pretrained_cfg_overlay") or {}
    if weights_source(overlay):  # the licence that timm knows is not of these weights
        kwargs["pretrained_cfg_overlay"] = overlay = dict(license=None) | overlay
    cfg = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), overlay)
    source = weights_source(vars(cfg))
    untouched = source == weights_source(_weights_cfg(kwargs["backbone"]))
    # What is sure to be a backbone's is left to timm, whose loaders know its format. Elsewhere the keys tell.
    starts = pretrained and (untouched or "custom_load" in source)
    cache_dir = kwargs.get("cache_dir")
    checked = _checked_weights(cfg, cache_dir) if pretrained and not starts else None
    if checked:  # before anything is built
        kwargs["pretrained_cfg"] = dataclasses.replace(cfg, source=None, file=str(checked), hf_hub_id=None)
        kwargs.pop("pretrained_cfg_overlay", None)
    model = build_model_with_cfg(
        cls,
        variant,
        pretrained and not starts,
        feature_cfg=dict(out_indices=None, feature_cls="getter"),
        pretrained_filter_fn=partial(weights_filter, cache_dir=cache_dir),
        **kwargs,
    )
    classifier = getattr(model, "model", model)  # features_only=True wraps it
    if checked:  # what it says is where they come from, not where they lie
        model.pretrained_cfg.pop("file")
        model.pretrained_cfg.update({key: getattr(cfg, key) for key in SOURCE if getattr(cfg, key)})
    if starts:
        classifier.load_state_dict(starting_state(classifier, {} if untouched else source, cache_dir))
        model.pretrained_cfg["license"] = classifier.pretrained_cfg["license"]  # features_only=True has a copy
    # The names depend on the backbone, so the generic entries' cfgs do not have them.
    if not model.pretrained_cfg.get("first_conv"):
        model.pretrained_cfg["first_conv"] = classifier._traits["first_conv"]
    return model


def _checked_weights(cfg: PretrainedCfg, cache_dir: str | Path | None) -> Path | None:
    """The file of a trained model's weights, checked; None for weights that say nothing of themselves."""
    if cfg.source == "local-dir":
        return weights_in(Path(cfg.file))
    if cfg.source == "hf-hub":
        return weights_on_hub(cfg.hf_hub_id, cache_dir=cache_dir)
    config = CONFIGS.get(f"{cfg.architecture}.{cfg.tag}")
    if config is None or weights_source(vars(cfg)) != weights_source(default_cfg(config)):
        return None
    if config.tasn.repo_id:
        return weights_on_hub(cfg.hf_hub_id, config.tasn.sha256, cache_dir)
    check(Path(cfg.file), config.tasn.sha256)
    return Path(cfg.file)


@register_model
def tasn(pretrained: bool = False, backbone: str = "resnet50", **kwargs) -> TASN:
    """TASN on any timm backbone: `timm.create_model("tasn", backbone="convnext_tiny", num_classes=200)`."""
    kwargs["pretrained_cfg"] = _given_cfg("tasn", kwargs) or dict(
        architecture="tasn", **starting_cfg(backbone, kwargs.get("sample_size", 224))
    )
    return _create_tasn("tasn", pretrained, backbone, **kwargs)


@register_model
def isqrt_cov(pretrained: bool = False, backbone: str = "resnet50", **kwargs) -> BackboneClassifier:
    """Any timm backbone with second-order pooling (Table 7) and nothing else: no attention, no sampling."""
    kwargs["pretrained_cfg"] = _given_cfg("isqrt_cov", kwargs) or dict(
        architecture="isqrt_cov", **_weights_cfg(backbone)
    )
    if kwargs.get("heads", "shared") != "shared":
        raise UserError(
            f"heads={kwargs['heads']!r} has no effect with isqrt_cov, which has one classifier: leave it out."
        )
    kwargs.setdefault("img_size", kwargs["pretrained_cfg"]["input_size"][1:])
    kwargs.setdefault("global_pool", SECOND_ORDER)
    return _build(BackboneClassifier, "isqrt_cov", pretrained, backbone=backbone, **kwargs)


def _given_cfg(architecture: str, kwargs: dict) -> dict | None:
    """timm's argument pretrained_cfg, for an architecture whose own depends on its backbone."""
    cfg = kwargs.get("pretrained_cfg")
    if isinstance(cfg, str):
        raise UserError(f"{architecture} has no tag {cfg!r}: give the backbone's, as in backbone='resnet50.a1_in1k'.")
    return (PretrainedCfg(**cfg) if isinstance(cfg, dict) else cfg).to_dict() if cfg else None


@register_model
def tasn_resnet18(pretrained: bool = False, **kwargs) -> TASN:
    """ResNet-18 with the published attention net."""
    return _create_tasn("tasn_resnet18", pretrained, "resnet18.a1_in1k", **kwargs)


@register_model
def tasn_resnet50(pretrained: bool = False, **kwargs) -> TASN:
    """ResNet-50 with the published attention net: the paper's model for CUB-200-2011 and Stanford Cars."""
    return _create_tasn("tasn_resnet50", pretrained, "resnet50.a1_in1k", **kwargs)


@register_model
def tasn_resnet101(pretrained: bool = False, **kwargs) -> TASN:
    """ResNet-101 with the published attention net: the paper's model for iNaturalist 2017."""
    return _create_tasn("tasn_resnet101", pretrained, "resnet101.a1h_in1k", **kwargs)


@register_model
def tasn_vgg19(pretrained: bool = False, **kwargs) -> TASN:
    """VGG-19 with the published attention net: the paper's other model for CUB-200-2011 and Stanford Cars."""
    return _create_tasn("tasn_vgg19", pretrained, "vgg19.tv_in1k", **kwargs)


@register_model
def tasn_vgg19_bn(pretrained: bool = False, **kwargs) -> TASN:
    """VGG-19 with BatchNorm and the published attention net; the paper's VGG-19 has none."""
    return _create_tasn("tasn_vgg19_bn", pretrained, "vgg19_bn.tv_in1k", **kwargs)


@register_model
def tasn_convnext_tiny(pretrained: bool = False, **kwargs) -> TASN:
    """ConvNeXt-Tiny with the published attention net; not in the paper."""
    return _create_tasn("tasn_convnext_tiny", pretrained, "convnext_tiny.fb_in1k", **kwargs)


@register_model
def tasn_lite_resnet50(pretrained: bool = False, **kwargs) -> TASN:
    """ResNet-50 with the lite attention net: 1.07 x the cost of the plain ResNet-50 at the sampled size."""
    return _create_tasn("tasn_lite_resnet50", pretrained, "resnet50.a1_in1k", LITE, **kwargs)


@register_model
def tasn_lite_resnet101(pretrained: bool = False, **kwargs) -> TASN:
    """ResNet-101 with the lite attention net: 1.04 x the cost of the plain ResNet-101 at the sampled size."""
    return _create_tasn("tasn_lite_resnet101", pretrained, "resnet101.a1h_in1k", LITE, **kwargs)


@register_model
def tasn_lite_convnext_tiny(pretrained: bool = False, **kwargs) -> TASN:
    """ConvNeXt-Tiny with the lite attention net: 1.06 x the cost of the plain ConvNeXt-Tiny at the sampled size."""
    return _create_tasn("tasn_lite_convnext_tiny", pretrained, "convnext_tiny.fb_in1k", LITE, **kwargs)


@register_model
def tasn_tiny(pretrained: bool = False, **kwargs) -> TASN:
    """0.3 M parameters for the embedded dataset: a narrow ResNet-10-T at 48 pixels, sampled from 192.

    Trained from scratch, so with our additions where the paper counts on ImageNet weights: a sharper relation softmax
    and a flat top on the structure map.
    """
    defaults = dict(
        sample_size=48,
        attention_net="tiny",
        relation_scale=10.0,
        structure_shape="flat_top",
        backbone_args=dict(channels=(24, 48, 72, 96), stem_width=12),
    )
    return _create_tasn("tasn_tiny", pretrained, "resnet10t", defaults, **kwargs)
