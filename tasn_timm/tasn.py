"""TASN (Fig. 2): attention net -> trilinear attention -> attention sampler -> master and part net -> heads."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .attention_net import PRESETS, AttentionNet, create_backbone, stem_convolutions
from .attention_sampler import AttentionSampler
from .errors import unknown
from .heads import Heads
from .trilinear_attention import TrilinearAttention


class TASNOutput(NamedTuple):
    """Logits (B, K) of every classifier, as the loss takes them (`distillation.TASNLoss`).

    With heads="shared" or "separate" there are two classifications, not four: master is logits, shared_part is part.
    """

    logits: Tensor  # the prediction: structure image
    master: Tensor  # structure image, the student of Eq. 8
    part: Tensor  # detail image, the teacher of Eq. 8
    shared_part: Tensor  # detail image, the predicting classifier
    attention: Tensor  # the attention net's own classifier


class TASN(nn.Module):
    """Trilinear Attention Sampling Network around any timm backbone.

    In evaluation an image (B, 3, H, W) becomes logits (B, K): only the structure-preserved image is classified. In
    training it becomes the mean of all classifiers' logits, so that any training loop reaches every parameter; that is
    not the paper's loss. After `set_distilled_training(True)` it becomes a `TASNOutput`, which `TASNLoss` takes.

    Args:
        backbone: timm model of master and part net, optionally with the tag of its weights.
        num_classes: K; 0 for pooled features (B, C) in place of logits.
        in_chans: Channels of the image.
        global_pool: The backbone's pooling; None for its own.
        drop_rate: Dropout on the backbone's pooled features.
        drop_path_rate: Stochastic depth in the backbone, where it has it.
        sample_size: Pixels of the sampled images, one number or (H', W'); the input must not be smaller.
        attention_net: Layout of the attention net, a key of `attention_net.PRESETS`: "published", "lite" or "tiny".
        attention_backbone: timm model that takes the place of the layout's own.
        attention_args: Other arguments of `AttentionNet` that replace the layout's.
        normalization: Formula of the attention maps, see `trilinear_attention`.
        spatial_scale: Factor on the input of its inner softmax.
        relation_scale: Factor on the input of its outer softmax.
        selection: Choice of the detail map, see `structure_and_detail_maps`.
        structure_shape: Shaping of the structure map, see `shape_map`; "square" is the published code's.
        detail_shape: Shaping of the detail map.
        max_zoom: Largest magnification along an axis, see `attention_grid`; 0 for no bound (None means the same, but
            timm.create_model does not pass None on, and would give the default).
        iterations: Rounds of balancing the two axes.
        marginal: "max" (Eq. 4) or "sum".
        heads: "both" (published result), "shared" or "separate" (the paper's text), see `heads.HEADS`.
        backbone_args: More arguments for the backbone.

    Raises:
        ValueError: An argument that is not allowed: unknown backbone, layout, formula, ...
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
        sample_size: int | tuple[int, int] = 224,
        attention_net: str = "published",
        attention_backbone: str | None = None,
        attention_args: dict | None = None,
        normalization: str = "spatial_relation",
        spatial_scale: float = 7.0,
        relation_scale: float = 1.0,
        selection: str = "random",
        structure_shape: str = "square",
        detail_shape: str = "none",
        max_zoom: float | None = 4.0,
        iterations: int = 5,
        marginal: str = "max",
        heads: str = "both",
        backbone_args: dict | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        if attention_net not in PRESETS:
            raise unknown("attention_net", attention_net, PRESETS)
        layout = PRESETS[attention_net] | (dict(backbone=attention_backbone) if attention_backbone else {})

        # The attention net comes first, the heads last: timm's gradient clipping leaves out the last parameters.
        self.attention_net = AttentionNet(
            **layout | (attention_args or {}), num_classes=num_classes, in_chans=in_chans, **dd
        )
        self.trilinear_attention = TrilinearAttention(normalization, spatial_scale, relation_scale, selection)
        self.structure_sampler = AttentionSampler(sample_size, structure_shape, max_zoom or None, iterations, marginal)
        self.detail_sampler = AttentionSampler(sample_size, detail_shape, max_zoom or None, iterations, marginal)
        self.backbone = create_backbone(
            backbone,
            self.sample_size,
            num_classes=0,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate or None,  # not every timm model has it
            **(backbone_args or {}),
            **dd,
        )
        self.heads = Heads(heads, self.backbone.head_hidden_size, num_classes, **dd)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.distilled_training = False

        # What timm adapts to another number of channels when it loads weights.
        parts = {"attention_net.trunk": self.attention_net.trunk, "backbone": self.backbone}
        self._traits = dict(
            first_conv=tuple(f"{prefix}.{name}" for prefix, part in parts.items() for name in stem_convolutions(part))
        )
        # What rebuilds these weights: goes to config.json, so that later defaults cannot change a saved model.
        self._model_args = dict(
            sample_size=sample_size,
            attention_net=attention_net,
            normalization=normalization,
            spatial_scale=spatial_scale,
            relation_scale=relation_scale,
            selection=selection,
            structure_shape=structure_shape,
            detail_shape=detail_shape,
            max_zoom=max_zoom or 0,
            iterations=iterations,
            marginal=marginal,
            heads=heads,
        )

    def forward(self, image: Tensor) -> Tensor | TASNOutput:
        features = self.attention_net(image)  # X: (B, C, h, w)
        structure_map, detail_maps = self.trilinear_attention(features)  # Eq. 2: (B, h, w), (B, 1, h, w)
        structure = self.structure_sampler(image, structure_map)  # I_s: (B, 3, H', W')
        if not self.training or self.num_classes == 0:
            return self.heads(self.backbone(structure))

        detail = self.detail_sampler(image, detail_maps[:, 0])  # I_d: (B, 3, H', W')
        pooled = self.backbone(torch.cat([structure, detail]))  # one batch: shared weights and BatchNorm statistics
        pooled_structure, pooled_detail = pooled.chunk(2)
        logits = self.heads.forward_pair(pooled_structure, pooled_detail)
        output = TASNOutput(*logits, self.attention_net.classify(features))
        return output if self.distilled_training else self._mean_logits(output)

    def sample(self, image: Tensor) -> Tensor:
        """The structure-preserved image I_s (B, 3, H', W') of an image (B, 3, H, W)."""
        structure_map, _ = self.trilinear_attention(self.attention_net(image))
        return self.structure_sampler(image, structure_map)

    @property
    def sample_size(self) -> tuple[int, int]:
        """Pixels (H', W') of the sampled images."""
        return self.structure_sampler.output_size

    def set_distilled_training(self, enable: bool = True) -> None:
        """Make training-mode forward return a `TASNOutput` (timm's name for this switch, from DeiT)."""
        self.distilled_training = enable

    # What timm expects of a model, on the structure-preserved image.

    @property
    def num_features(self) -> int:
        return self.backbone.num_features

    @property
    def head_hidden_size(self) -> int:
        return self.backbone.head_hidden_size

    @property
    def feature_info(self) -> list[dict]:
        return self.backbone.feature_info

    @property
    def global_pool(self) -> str | nn.Module | None:
        head = getattr(self.backbone, "head", None)
        return getattr(head, "global_pool", None) or getattr(self.backbone, "global_pool", None)

    def forward_features(self, image: Tensor) -> Tensor:
        """The backbone's features before pooling."""
        return self.backbone.forward_features(self.sample(image))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify `forward_features`; pooled features (B, C) with `pre_logits`."""
        pooled = self.backbone.forward_head(x)
        return pooled if pre_logits else self.heads(pooled)

    def forward_intermediates(self, image: Tensor, *args, **kwargs) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The backbone's `forward_intermediates`, with its arguments."""
        return self.backbone.forward_intermediates(self.sample(image), *args, **kwargs)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """The backbone's method of that name. Without classifiers nothing trains the attention net, so it is frozen."""
        taken = self.backbone.prune_intermediate_layers(indices, prune_norm, prune_head)
        if prune_head:
            self.reset_classifier(0)
            self.attention_net.requires_grad_(False)
        return taken

    def get_classifier(self) -> nn.Module:
        """The predicting classifier."""
        return self.heads.predictor

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace all classifiers, the attention net's among them, by new ones; 0 for none."""
        if global_pool is not None:
            self.backbone.reset_classifier(0, global_pool)
        self.num_classes = num_classes
        like = next(self.backbone.parameters())
        self.heads = Heads(self.heads.heads, self.head_hidden_size, num_classes, device=like.device, dtype=like.dtype)
        self.heads.train(self.training)
        self.attention_net.reset_classifier(num_classes)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the backbone's activations in the backward pass to save memory."""
        self.backbone.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that the backbone does not want decayed."""
        inner = getattr(self.backbone, "no_weight_decay", set)
        return {f"backbone.{name}" for name in inner()}

    def group_matcher(self, coarse: bool = False) -> dict:
        """Layers for layer-wise learning rates: attention net (ahead of everything), the backbone's own, heads."""
        groups = {"attention_net": r"^attention_net"}
        for name, pattern in self.backbone.group_matcher(coarse).items():
            groups[name] = _prefixed(pattern)
        return groups

    def _mean_logits(self, output: TASNOutput) -> Tensor:
        distinct = output if self.heads.heads == "both" else (output.logits, output.part, output.attention)
        return torch.stack(list(distinct)).mean(0)


def _prefixed(pattern: str | Sequence[tuple]) -> str | list[tuple]:
    """timm's matcher patterns, "^stem" or [("^stage", None), ...], for parameters that now begin with "backbone."."""
    if isinstance(pattern, str):
        return r"^backbone\." + pattern.removeprefix("^")
    return [(r"^backbone\." + regex.removeprefix("^"), suffix) for regex, suffix in pattern]
