"""Attention net: the network that turns an image into the features X which trilinear attention reads (Sec. 3.1)."""

import inspect
import math
from collections.abc import Iterable, Sequence

import timm
import torch
from timm.layers import SeparableConvNormAct, register_notrace_function, to_2tuple
from timm.models import generate_default_cfgs, register_model
from timm.models.byobnet import BasicBlock, ByoBlockCfg, ByobNet, ByoModelCfg, register_block
from timm.models.resnet import BasicBlock as ResNetBasicBlock
from torch import Tensor, nn
from torch.nn import functional as F

from .backbone import backbone_cfg, create_backbone, create_on_meta, try_backbone
from .errors import UserError, unknown

# timm adds resnet6s.
__all__ = ["PRESETS", "AttentionNet", "MultiRateConv", "attention_layout"]

# Layouts. "published": the paper's, 28 x 28 maps of 512 channels from 224 pixels, 39.4 GFLOPs.  "lite": two stages of a
# small ResNet merged, 14 x 14 maps of 256 channels from 112 pixels, 0.53 GFLOPs, with about the published receptive
# field (1.35 x the input; there 1.23 x).  "tiny": 12 x 12 maps of 24 channels from 96 pixels, 2.8 MFLOPs, for small
# pictures and synthbirds.
PRESETS: dict[str, dict] = {
    "published": dict(
        backbone="resnet18",
        input_size=224,
        out_indices=(4,),
        unit_stride_stages=(2, 4),
        tail_rates=((1, 2), (1, 2, 3)),
    ),
    "lite": dict(
        backbone="resnet10t",
        input_size=112,
        out_indices=(2, 3),
        channels=256,
        tail_rates=((1,), (1, 2)),
        separable_tail=True,
    ),
    "tiny": dict(backbone="resnet6s", input_size=96, out_indices=(2,)),
}

# The same layouts on any other backbone, see `attention_layout`: how many grids are merged, and into how many channels.
MERGED = {"published": (3, 512), "lite": (2, 256), "tiny": (1, 24)}
STRIDE = 8  # pixels of the input per position of the features, in all of them


class AttentionNet(nn.Module):
    """A timm backbone at high feature resolution, multi-rate dilated convolutions, and a classifier of its own.

    The classifier is the only thing that trains this network (Sec. 3.1).

    Args:
        backbone: Any timm model with feature maps, optionally with the tag of its weights ("resnet18.a1_in1k").
        input_size: Pixels, one number or (h, w), to which the image is resized first.
        out_indices: timm's indices of the stages to use. Later stages are not built. Several are merged on the grid of
            the finest: reduced to `channels` by a 1 x 1 convolution each, enlarged (nearest), added, ReLU.
        channels: C of the features; None for that of the only stage.
        unit_stride_stages: Stages of a ResNet of basic blocks whose stride is removed, without dilation instead (the
            paper's way to high resolution). For other backbones use `output_stride` or earlier stages.
        output_stride: timm's argument of that name, where the backbone has it: dilation in place of stride.
        tail_rates: Dilation rates of each set of dilated convolutions; no tail when empty.
        separable_tail: Depthwise 3 x 3 and pointwise convolutions in the tail in place of full ones.
        num_classes: K of its classifier; 0 for none.
        in_chans: Channels of the image.
        input_affine: Scales and shifts of the image's channels, where the backbone's weights want other means and
            standard deviations than the image was normalised with; None for none.
        backbone_args: More arguments for the backbone.
    """

    def __init__(
        self,
        backbone: str = "resnet18",
        input_size: int | tuple[int, int] = 224,
        out_indices: Sequence[int] = (4,),
        channels: int | None = None,
        unit_stride_stages: Sequence[int] = (),
        output_stride: int | None = None,
        tail_rates: Sequence[Sequence[int]] = (),
        separable_tail: bool = False,
        num_classes: int = 1000,
        in_chans: int = 3,
        input_affine: tuple[Sequence[float], Sequence[float]] | None = None,
        backbone_args: dict | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        self.input_affine = input_affine
        self.input_size = to_2tuple(input_size)
        self.trunk = create_backbone(
            backbone,
            self.input_size,
            features_only=True,
            out_indices=tuple(out_indices),
            in_chans=in_chans,
            output_stride=output_stride,
            **(backbone_args or {}),
            **dd,
        )
        for stage in unit_stride_stages:
            _remove_stride(self.trunk, backbone, stage)

        stage_channels = self.trunk.feature_info.channels()
        if channels is None and len(stage_channels) > 1:
            raise UserError(f"out_indices={tuple(out_indices)} merges stages, so channels must be given, e.g. 256.")
        self.reduce = nn.ModuleList([nn.Conv2d(c, channels, 1, **dd) for c in stage_channels] if channels else [])
        self.num_features = channels or stage_channels[-1]
        self.tail = nn.Sequential(
            *(MultiRateConv(self.num_features, rates, separable_tail, **dd) for rates in tail_rates)
        )
        self.norm = nn.BatchNorm2d(self.num_features, **dd)
        self.classifier = nn.Identity()
        self.reset_classifier(num_classes)

    def forward(self, image: Tensor) -> Tensor:
        """Compute the features X (B, C, h, w), not negative with the presets, of an image (B, 3, H, W) of any size."""
        image = resize_image(image, self.input_size)
        if self.input_affine is not None:
            scale, shift = (of_channels(values, image) for values in self.input_affine)
            image = image * scale + shift
        stages = self.trunk(image)
        if getattr(self.trunk, "output_fmt", None) == "NHWC":  # Swin and others
            stages = [x.movedim(-1, 1) for x in stages]
        return self.tail(self._merge(stages))

    def classify(self, features: Tensor) -> Tensor:
        """Logits (B, K) of the attention net's own classifier: BN, ReLU, average pool, FC, as in the published code."""
        return self.classifier(self.norm(features).relu().mean((2, 3)))

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier by a new one for `num_classes`, 0 for none."""
        like = self.norm.weight
        self.classifier = (
            nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
            if num_classes
            else nn.Identity()
        ).train(self.training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the backbone's activations in the backward pass to save memory.

        Raises:
            UserError: The backbone cannot (HRNet, CrossViT).
        """
        try:
            self._model.set_grad_checkpointing(enable)
        except (AssertionError, AttributeError) as error:  # timm's ways to say so
            raise UserError(
                f"the attention net's backbone does not take gradient checkpointing ({error}): "
                f"model.backbone.set_grad_checkpointing() is for the other one alone."
            ) from error

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that the backbone does not want decayed."""
        prefix = "trunk." if self._model is self.trunk else "trunk.model."
        return {f"{prefix}{name}" for name in getattr(self._model, "no_weight_decay", set)()}

    @property
    def _model(self) -> nn.Module:
        """What knows of such things: timm's wrapper of features, or the whole model in it (a ViT)."""
        return getattr(self.trunk, "model", self.trunk)

    def _merge(self, stages: list[Tensor]) -> Tensor:
        if not self.reduce:
            return stages[0]
        grid = finest_grid(stages)
        reduced = [F.interpolate(conv(x), size=grid, mode="nearest") for conv, x in zip(self.reduce, stages)]
        return torch.stack(reduced).sum(0).relu()


def attention_layout(name: str, backbone: str | None = None, arguments: dict | None = None) -> dict:
    """Arguments of `AttentionNet` for a layout of `PRESETS`, on its own backbone or on another one.

    A layout counts the stages of its own ResNet. On another backbone,

    - "published" is what it is where the backbone is a ResNet of basic blocks (resnet18, resnet34);
    - else the features have the grid that is nearest to 1/8 of the input. The deepest stage on it is merged with the
      deepest on the next coarser grids (two with "published", one with "lite", none with "tiny"): a deep net's
      semantics at the layout's resolution without a change to strides, which pretrained weights might not bear. A ViT
      has one grid, that of its tokens (14 x 14 from 224 pixels with patches of 16), and its last block is taken; a
      larger input_size makes it finer;
    - the input size is the layout's, or the next multiple of that grid's stride (98 in place of 96 with patches of
      14, so that the maps cover all of the image). Where the backbone does not take it, it is one of the three
      multiples that follow, else the backbone's own.

    Args:
        name: A key of `PRESETS`.
        backbone: timm model in place of the layout's own.
        arguments: Arguments of `AttentionNet` that go before all this. Those of a saved model are complete, and have
            the name of the layout that they were made of as "layout".

    Raises:
        UserError: Unknown layout or backbone, another layout than a saved model's, two backbones, or a backbone that
            takes none of the input sizes.
    """
    arguments = dict(arguments or {})
    if name not in PRESETS:
        raise unknown("attention_net", name, PRESETS)
    if (saved := arguments.pop("layout", name)) != name:
        raise UserError(
            f"attention_net={name!r} has no effect beside the attention_args of a saved {saved!r} net, which are "
            f"complete: leave it out, or create a new model."
        )
    if backbone is None:
        return PRESETS[name] | arguments
    if "backbone" in arguments:
        raise UserError(
            f"attention_backbone={backbone!r} has no effect with a backbone in attention_args: leave out one of them."
        )
    layout = PRESETS[name] | dict(backbone=backbone)
    extra = dict(output_stride=arguments.get("output_stride"), **arguments.get("backbone_args") or {})
    own_size = backbone_cfg(backbone).input_size[1:]
    trunk = create_on_meta(backbone, own_size, features_only=True, **extra)
    stages = layout.get("unit_stride_stages")
    if stages and all(_has_basic_blocks(trunk, stage) for stage in stages):
        return layout | arguments
    deepest = {info["reduction"]: index for index, info in enumerate(trunk.feature_info.info)}
    finest = min(deepest, key=lambda reduction: abs(math.log(reduction / STRIDE)))
    grids, channels = MERGED[name]
    merged = [reduction for reduction in sorted(deepest) if reduction >= finest][:grids]
    layout |= dict(
        out_indices=tuple(deepest[reduction] for reduction in merged),
        channels=channels,
        unit_stride_stages=(),
    )
    if "input_size" not in arguments:
        positions = math.ceil(layout["input_size"] / finest)
        sizes = [to_2tuple(finest * (positions + more)) for more in range(4)]
        layout["input_size"] = _first_size_taken(layout, [*sizes, own_size], extra)
    return layout | arguments


def complete_layout(layout: dict) -> dict:
    """A layout with every argument that says what net it is, also those that it leaves to `AttentionNet`'s defaults."""
    given_by_the_model = {"self", "num_classes", "in_chans", "input_affine", "device", "dtype"}
    parameters = inspect.signature(AttentionNet.__init__).parameters.values()
    return {each.name: each.default for each in parameters if each.name not in given_by_the_model} | layout


def _first_size_taken(layout: dict, sizes: Iterable[tuple[int, int]], extra: dict) -> tuple[int, int]:
    for size in sizes:
        try:
            try_backbone(layout["backbone"], size, features_only=True, out_indices=layout["out_indices"], **extra)
            return size
        except UserError as error:
            refusal = error
    raise refusal


@register_notrace_function
def finest_grid(stages: Sequence[Tensor]) -> tuple[int, int]:
    """The largest (h, w) of maps (B, C, h, w). torch.fx cannot trace it, and leaves no private function out."""
    return max((x.shape[-2:] for x in stages), key=lambda size: size[0] * size[1])


@register_notrace_function
def resize_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize images (B, 3, H, W) bilinearly to (B, 3, *size), without skipping pixels.

    Bilinear reads 2 x 2 pixels, so beyond a factor of 2 it would skip some: antialiased then (the published code is
    not). Pixels of uint8 stay what they are on a CPU, rounded, which is four times as fast; PyTorch's other devices
    resize floating point alone.
    """
    if image.shape[-2:] == size:
        return image
    skips = image.shape[-2] > 2 * size[0] or image.shape[-1] > 2 * size[1]
    pixels = image.dtype == torch.uint8
    precise = image
    if pixels and image.device.type != "cpu":
        precise = image.float()
    elif skips and not pixels:  # PyTorch does not implement antialiasing for bfloat16 on CPU.
        precise = image.to(torch.promote_types(image.dtype, torch.float32))
    resized = F.interpolate(precise, size, mode="bilinear", align_corners=False, antialias=skips)
    return resized if pixels else resized.to(image.dtype)


@register_notrace_function
def normalize_pixels(resized: Tensor, image: Tensor, config: dict | None, dtype: torch.dtype) -> Tensor:
    """What was resized or sampled of an image, as a model wants it.

    Args:
        resized: (B, 3, h, w), 0 to 255 where the image is uint8.
        image: Pixels of uint8, to be normalised after resizing, where they are fewer and the result is the same; or
            floating point that is normalised already.
        config: timm's pretrained_cfg with mean and std, for pixels in [0, 1].
        dtype: Of the model.

    Raises:
        UserError: uint8, but there is no mean and std, or of other channels.
    """
    if image.dtype != torch.uint8:
        return resized
    if not config:
        raise UserError(
            "an image of uint8 is normalised with the mean and std of the model's pretrained_cfg, which it does not "
            "have: create it with timm.create_model, or normalise the image."
        )
    if len(config["mean"]) != image.shape[1]:
        raise UserError(
            f"an image of uint8 has {image.shape[1]} channels, but the model's pretrained_cfg has the mean and std of "
            f"{len(config['mean'])}: normalise the image."
        )
    precise = resized.to(torch.promote_types(dtype, torch.float32))
    mean, std = (255 * of_channels(config[name], precise) for name in ("mean", "std"))
    return ((precise - mean) / std).to(dtype)


def of_channels(values: Sequence[float], image: Tensor) -> Tensor:
    """A value for each channel, (C, 1, 1). Filled in on the device: a copy there would make the host wait."""
    return torch.stack([image.new_full((1, 1), value) for value in values])


class MultiRateConv(nn.Module):
    """One 3 x 3 convolution applied at several dilation rates with the same weight; ReLU each, then added.

    Args:
        channels: C, in and out.
        rates: Dilation rates, 1 for an ordinary convolution.
        separable: Make it depthwise, followed by a pointwise convolution of the sum.
    """

    def __init__(self, channels: int, rates: Sequence[int], separable: bool = False, device=None, dtype=None) -> None:
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        if not rates:
            raise UserError("tail_rates has an empty set: give every set at least one dilation rate, such as (1, 2).")
        self.rates = tuple(rates)
        self.conv = nn.Conv2d(channels, channels, 3, groups=channels if separable else 1, **dd)
        self.pointwise = nn.Conv2d(channels, channels, 1, **dd) if separable else None
        nn.init.kaiming_normal_(self.conv.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, groups = self.conv.weight, self.conv.bias, self.conv.groups
        x = sum(F.conv2d(x, weight, bias, padding=rate, dilation=rate, groups=groups).relu() for rate in self.rates)
        return x if self.pointwise is None else self.pointwise(x).relu()


def _remove_stride(trunk: nn.Module, backbone: str, stage: int) -> None:
    if not _has_basic_blocks(trunk, stage):
        raise UserError(
            f"unit_stride_stages={stage}: {backbone} has no stage {stage} of ResNet basic blocks. Use resnet18 or "
            f"resnet34, or pass unit_stride_stages=() with output_stride or earlier out_indices."
        )
    if stage == 1:
        raise UserError("unit_stride_stages=1: the first stage of a ResNet has no stride; choose from 2, 3 and 4.")
    for module in getattr(trunk, f"layer{stage}")[0].modules():
        if isinstance(module, nn.Conv2d) and module.stride == (2, 2):
            module.stride = (1, 1)
        elif isinstance(module, nn.AvgPool2d):  # the shortcut of ResNet-D
            module.kernel_size = module.stride = 1


def _has_basic_blocks(trunk: nn.Module, stage: int) -> bool:
    blocks = getattr(trunk, f"layer{stage}", None)
    return blocks is not None and all(isinstance(block, ResNetBasicBlock) for block in blocks)


class SeparableBlock(BasicBlock):
    """ByobNet's basic block with a depthwise-separable second convolution."""

    def __init__(self, in_chs: int, out_chs: int, device=None, dtype=None, **kwargs) -> None:
        super().__init__(in_chs, out_chs, device=device, dtype=dtype, **kwargs)
        self.conv2_kxk = SeparableConvNormAct(out_chs, out_chs, 3, apply_act=False, device=device, dtype=dtype)


register_block("separable_basic", SeparableBlock)


class PooledStemNet(ByobNet):
    """A ByobNet whose first stage has a stride although the stem pools.

    timm then lists the pooled stem among the features, but `forward_intermediates` has no such map. Listed is the first
    stage in its place, so that all indices have a map.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        stem, pooled, last = self.feature_info
        assert pooled["module"] == "stem.pool", self.feature_info
        channels = self.stages[0][-1].conv2_kxk.conv_pw.out_channels
        first = dict(num_chs=channels, reduction=last["reduction"], module="stages.0", stage=1)
        self.feature_info = [stem, first, last]
        self.stage_ends = [info["stage"] for info in self.feature_info]


default_cfgs = generate_default_cfgs(
    {
        "resnet6s.untrained": dict(
            input_size=(3, 96, 96), pool_size=(12, 12), first_conv="stem.conv1.conv", classifier="head.fc"
        )
    }
)


@register_model
def resnet6s(pretrained: bool = False, **kwargs) -> PooledStemNet:
    """A 3 x 3 stem of 8 channels, max-pool, and two separable basic blocks of 16 and 24 channels, at stride 8."""
    blocks = (
        ByoBlockCfg("separable_basic", d=1, c=16, s=2),
        ByoBlockCfg("separable_basic", d=1, c=24, s=1),
    )
    cfg = ByoModelCfg(blocks=blocks, stem_chs=8, stem_type="3x3", stem_pool="maxpool", downsample="conv1x1")
    features = dict(flatten_sequential=True, out_indices=(0, 1, 2))
    return timm.models.build_model_with_cfg(
        PooledStemNet, "resnet6s", pretrained, model_cfg=cfg, feature_cfg=features, **kwargs
    )
