"""A timm backbone with our choice of pooling and classifiers, and what timm expects of a model."""

import re
from collections.abc import Callable, Sequence
from typing import NoReturn

from torch import Tensor, nn

from .backbone import create_backbone, stem_convolutions
from .errors import UserError, no_effect
from .heads import Heads, SecondOrderPool

SECOND_ORDER = "isqrt_cov"


class BackboneClassifier(nn.Module):
    """A plain classifier: image (B, 3, H, W) -> backbone -> pooling -> logits (B, K). `TASN` is one, too.

    Args:
        backbone: timm model, optionally with the tag of its weights.
        num_classes: K; 0 for pooled features (B, D) in place of logits.
        in_chans: Channels of the image.
        global_pool: The backbone's pooling, None for its own, or "isqrt_cov" for `SecondOrderPool`.
        drop_rate: Dropout of the backbone, where it pools.
        drop_path_rate: Stochastic depth in the backbone, where it has it.
        img_size: (H, W) in pixels, for backbones of a fixed input size.
        heads: Classifiers, see `heads.HEADS`.
        pool_args: Arguments of `SecondOrderPool`: channels, iterations.
        backbone_args: More arguments of the backbone.
        front: Modules by name that make the picture which the backbone sees. They are registered first: timm's adaptive
            gradient clipping leaves out the last parameters, which have to be a classifier's.

    Raises:
        ValueError: Unknown backbone, or arguments that it does not take.
    """

    def __init__(
        self,
        backbone: str = "resnet50",
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        *,
        img_size: tuple[int, int] = (224, 224),
        heads: str = "shared",
        pool_args: dict | None = None,
        backbone_args: dict | None = None,
        front: dict[str, nn.Module] | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        for name, module in (front or {}).items():
            self.add_module(name, module)
        dd = dict(device=device, dtype=dtype)
        second_order = global_pool == SECOND_ORDER
        if not second_order:
            no_effect(BackboneClassifier, dict(pool_args=pool_args), f"global_pool={global_pool!r}")
        self.backbone = create_backbone(
            backbone,
            img_size,
            num_classes=0,
            in_chans=in_chans,
            global_pool="" if second_order else global_pool,
            drop_rate=drop_rate or None,  # not every timm model has it,
            drop_path_rate=drop_path_rate or None,  # nor this
            **(backbone_args or {}),
            **dd,
        )
        self.drop_rate = drop_rate
        self.pool_args = pool_args or {}
        self.mixed_features = False  # whether a part of the backbone's head had to go
        self.pool = self._second_order_pool() if second_order else nn.Identity()
        self.heads = Heads(heads, self.head_hidden_size, num_classes, **dd)
        self.num_classes = num_classes
        self.in_chans = in_chans
        # What timm saves in config.json, besides what it is given, to build the model again.
        self._model_args = dict(img_size=tuple(img_size))
        # What timm adapts to another number of channels when it loads weights.
        self._traits = dict(first_conv=tuple(f"backbone.{name}" for name in stem_convolutions(self.backbone)))

    def forward(self, image: Tensor) -> Tensor:
        return self.heads(self.embed(image))

    def embed(self, image: Tensor) -> Tensor:
        """Pooled features (B, D) of an image as the backbone sees it."""
        return self.pool(self.backbone(image))

    def sample(self, image: Tensor) -> Tensor:
        """What the backbone sees of an image: all of it. `TASN` samples."""
        return image

    @property
    def num_features(self) -> int:
        return self.backbone.num_features

    @property
    def head_hidden_size(self) -> int:
        return getattr(self.pool, "num_features", self.backbone.head_hidden_size)

    @property
    def feature_info(self) -> list[dict]:
        return [info | dict(module=f"backbone.{info['module']}") for info in self.backbone.feature_info]

    @property
    def global_pool(self) -> str | nn.Module | None:
        if isinstance(self.pool, SecondOrderPool):
            return SECOND_ORDER
        head = getattr(self.backbone, "head", None)
        return getattr(head, "global_pool", None) or getattr(self.backbone, "global_pool", None)

    def forward_features(self, image: Tensor) -> Tensor:
        """The backbone's features before pooling."""
        return self.backbone.forward_features(self.sample(image))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify `forward_features`; pooled features (B, D) with `pre_logits`."""
        pooled = self.pool(self.backbone.forward_head(x))
        return pooled if pre_logits else self.heads(pooled)

    def forward_intermediates(self, image: Tensor, *args, **kwargs) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The backbone's `forward_intermediates`, with its arguments."""
        return self.backbone.forward_intermediates(self.sample(image), *args, **kwargs)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """The backbone's method of that name, which with `prune_head` leaves no pooling and no classifiers."""
        taken = self.backbone.prune_intermediate_layers(indices, prune_norm, prune_head)
        if prune_head:
            self.pool = nn.Identity()
            self.reset_classifier(0)
        return taken

    def get_classifier(self) -> nn.Module:
        """The predicting classifier."""
        return self.heads.predictor

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace all classifiers by new ones, 0 for none, and the pooling where one is given."""
        if global_pool is not None:
            second_order = global_pool == SECOND_ORDER
            if self.mixed_features and not second_order:
                raise UserError(
                    f"global_pool={global_pool!r} cannot take the place of {SECOND_ORDER!r}, for which the head of "
                    f"{self.backbone.pretrained_cfg['architecture']} was removed: create a new model."
                )
            self.pool = self._second_order_pool().train(self.training) if second_order else nn.Identity()
            self._reset_pool("" if second_order else global_pool)
        self.num_classes = num_classes
        like = next(self.backbone.parameters())
        self.heads = Heads(self.heads.heads, self.head_hidden_size, num_classes, device=like.device, dtype=like.dtype)
        self.heads.train(self.training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the backbone's activations in the backward pass to save memory."""
        self.backbone.set_grad_checkpointing(enable)

    def __prepare_scriptable__(self) -> NoReturn:
        """Say what to use in the place of torch.jit.script, which asks this first.

        PyTorch has deprecated it; it cannot read how formulas, samplers and maps are looked up by their names.
        """
        raise UserError(
            "torch.jit.script does not take this model: use torch.compile, torch.export, torch.jit.trace or `python -m "
            "tasn_timm export` (ONNX)."
        )

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that the backbone does not want decayed."""
        inner = getattr(self.backbone, "no_weight_decay", set)
        return {f"backbone.{name}" for name in inner()}

    def group_matcher(self, coarse: bool = False) -> dict | Callable[[str], float | tuple]:
        """Layers for layer-wise learning rates: the backbone's own; all else is timm's last layer, at the full rate.

        The attention net of `TASN` is there, too: it learns on its own, and much of it is new.
        """
        matcher = self.backbone.group_matcher(coarse)
        if callable(matcher):
            last = float("inf")
            return lambda name: matcher(name.removeprefix("backbone.")) if name.startswith("backbone.") else last
        return {name: _prefixed(pattern) for name, pattern in matcher.items()}

    def _reset_pool(self, global_pool: str) -> None:
        """Give the backbone another pooling, and keep what config.json says of the model true."""
        before = dict(self.backbone._model_args)
        self.backbone.reset_classifier(0, global_pool)
        # A ViT keeps its norm where it was, which timm notes among the backbone's arguments.
        noted = {key: value for key, value in self.backbone._model_args.items() if key not in before}
        if noted:
            self._model_args["backbone_args"] = (self._model_args.get("backbone_args") or {}) | noted
        self._model_args.pop("pool_args", None)
        if global_pool == "" and self.pool_args:
            self._model_args["pool_args"] = self.pool_args

    def _second_order_pool(self) -> SecondOrderPool:
        if self.drop_rate:
            raise UserError(
                f"drop_rate={self.drop_rate} has no effect with global_pool={SECOND_ORDER!r}: leave out one of them."
            )
        if self.backbone.num_features != self.backbone.head_hidden_size:
            # VGG, MobileNetV3 and others mix the features once more in their head, which is no map any more.
            self.mixed_features = True
            self.backbone.prune_intermediate_layers([len(self.backbone.feature_info) - 1])
            self.backbone.reset_classifier(0, "")
        like = next(self.backbone.parameters())
        has_class_token = getattr(self.backbone, "cls_token", None) is not None
        try:
            return SecondOrderPool(
                self.backbone.num_features,
                **self.pool_args,
                prefix_tokens=getattr(self.backbone, "num_prefix_tokens", int(has_class_token)),
                output_fmt=getattr(self.backbone, "output_fmt", "NCHW"),
                device=like.device,
                dtype=like.dtype,
            )
        except TypeError as error:
            raise UserError(
                f"pool_args={self.pool_args}: {error}. SecondOrderPool has channels, iterations."
            ) from error


def _prefixed(pattern: str | Sequence[tuple]) -> str | list[tuple]:
    """timm's matcher patterns, "^conv1|bn1" or [("^stage", None), ...], for names that now begin with "backbone."."""
    if not isinstance(pattern, str):
        return [(_prefixed(regex), suffix) for regex, suffix in pattern]
    alternatives = re.sub(r"(^|\|)\^", r"\1", pattern)  # the first of them has a ^, or each
    return rf"^backbone\.(?:{alternatives})"
