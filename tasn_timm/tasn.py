"""TASN (Fig. 2): attention net -> trilinear attention -> attention sampler -> master and part net -> heads."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from timm.layers import convert_splitbn_model, to_2tuple
from torch import Tensor, nn

from .attention_net import AttentionNet, attention_layout, complete_layout, normalize_pixels, resize_image
from .attention_sampler import AttentionSampler, shape_map
from .backbone import stem_convolutions
from .classifier import BackboneClassifier
from .detail_controls import CONTROLS, control_maps
from .errors import UserError, no_effect, unknown
from .trilinear_attention import TrilinearAttention


class TASNOutput(NamedTuple):
    """Logits (B, K) of every classifier, as the loss takes them (`distillation.TASNLoss`).

    With heads="shared" or "separate" each view has one classifier, not two: master and shared_part are None. With
    several parts, those of the detail images are (parts * B, K), all images' first part first.
    """

    logits: Tensor | None  # the prediction: structure image; None with master_net=False
    master: Tensor | None  # structure image, the student of Eq. 8; None where the predicting classifier is
    part: Tensor | None  # detail images, the teacher of Eq. 8; None with part_net=False
    shared_part: Tensor | None  # detail images, the predicting classifier; None where the teacher is
    attention: Tensor  # the attention net's own classifier


class TASN(BackboneClassifier):
    """Trilinear Attention Sampling Network around any timm backbone.

    An image (B, 3, H, W) is floating point, normalised, or its pixels as they are, uint8, 0 to 255: these the model
    normalises itself, after resizing and sampling, so that the large picture never exists in floating point (but for
    the saliency sampler, and devices that cannot resize uint8).

    In evaluation it becomes logits (B, K): only the structure-preserved image is classified. In training it becomes the
    mean of all classifiers' logits, so that any training loop reaches every parameter; that is not the paper's loss.
    After `set_distilled_training(True)` it becomes a `TASNOutput`, which `TASNLoss` takes.

    Args:
        backbone: timm model of master and part net, optionally with the tag of its weights.
        num_classes: K; 0 for pooled features (B, C) in place of logits.
        in_chans: Channels of the image.
        global_pool: The backbone's pooling; None for its own; "isqrt_cov" for second-order pooling (Table 7).
        drop_rate: Dropout on the backbone's pooled features.
        drop_path_rate: Stochastic depth in the backbone, where it has it.
        sample_size: Pixels of the sampled images, one number or (H', W'); the input must not be smaller.
        attention_net: Layout of the attention net, a key of `attention_net.PRESETS`: "published", "lite" or "tiny".
        attention_backbone: timm model in the place of the layout's own, see `attention_layout`.
        attention_args: Other arguments of `AttentionNet` that replace the layout's.
        attention_affine: Scales and shifts of the attention net's input, see `AttentionNet`. timm.create_model makes a
            TASN with those that bring images normalised for the backbone to the attention net's own mean and std.
        normalization: Formula of the attention maps, see `trilinear_attention`.
        spatial_scale: Factor on the input of its inner softmax.
        relation_scale: Factor on the input of its outer softmax.
        selection: Choice of the detail maps, see `structure_and_detail_maps`.
        parts: Detail images per image and training step.
        detail_control: What detail images show in place of details, see `detail_controls`; None for details.
        reduction: Structure map as the mean of the distinct maps ("mean") or of all ("mean_all", the paper's text).
        structure_shape: Shaping of the structure map, see `shape_map`; "square" is the published code's.
        detail_shape: Shaping of the detail map.
        sampler: "attention" (the paper's), "saliency" (SSN's) or "uniform" (a crop), see `AttentionSampler`.
        max_zoom: Largest magnification along an axis, see `attention_grid`; 0 for no bound (None means the same, but
            timm.create_model does not pass None on, and would give the default).
        iterations: Rounds of balancing the two axes.
        marginal: "max" (Eq. 4) or "sum".
        sigma: Of the saliency sampler, see `saliency_grid`.
        threshold: Of the uniform sampler, see `uniform_grid`.
        master_net: Train on the structure image. False leaves the part net alone, as in Table 2: trained on detail
            images, evaluated on the structure image.
        part_net: Train on detail images. False leaves the master net alone, as in Tables 3, 4 and 8.
        heads: "both" (published result), "shared" or "separate" (the paper's text), see `heads.HEADS`. None: "both",
            or with one net the one classifier that it needs.
        split_bn: BatchNorm statistics, scales and shifts of their own for the detail images (timm's SplitBatchNorm2d);
            evaluation has those of the structure image. Paper and published code share them.
        pool_args: Arguments of `SecondOrderPool`.
        backbone_args: More arguments for the backbone.

    Raises:
        ValueError: An argument that is not allowed (unknown backbone, layout, formula, ...), or that has no effect
            beside another one.
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
        attention_affine: tuple[Sequence[float], Sequence[float]] | None = None,
        normalization: str = "spatial_relation",
        spatial_scale: float = 7.0,
        relation_scale: float = 1.0,
        selection: str = "random",
        parts: int = 1,
        detail_control: str | None = None,
        reduction: str = "mean",
        structure_shape: str = "square",
        detail_shape: str = "none",
        sampler: str = "attention",
        max_zoom: float | None = 4.0,
        iterations: int = 5,
        marginal: str = "max",
        sigma: float = 0.178,
        threshold: float = 1.0,
        master_net: bool = True,
        part_net: bool = True,
        heads: str | None = None,
        split_bn: bool = False,
        pool_args: dict | None = None,
        backbone_args: dict | None = None,
        device=None,
        dtype=None,
    ) -> None:
        dd = dict(device=device, dtype=dtype)
        heads = _heads_of(master_net, part_net, heads)
        if parts < 1:
            raise UserError(f"parts must be at least 1, got {parts}: for no detail images use part_net=False.")
        if not part_net:
            details = dict(parts=parts, selection=selection, detail_shape=detail_shape, detail_control=detail_control)
            no_effect(TASN, details, "part_net=False")
        if not (master_net and part_net):
            no_effect(TASN, dict(split_bn=split_bn), "one net, whose statistics are its own")
        if detail_control is not None:
            if detail_control not in CONTROLS:
                raise unknown("detail_control", detail_control, CONTROLS)
            no_effect(TASN, dict(selection=selection), f"{detail_control=}")
        grid = dict(sampler=sampler, iterations=iterations, marginal=marginal, sigma=sigma, threshold=threshold)
        # What rebuilds these weights: goes to config.json, so that later defaults cannot change a saved model.
        model_args = dict(
            sample_size=sample_size,
            attention_net=attention_net,
            attention_affine=attention_affine,
            normalization=normalization,
            spatial_scale=spatial_scale,
            relation_scale=relation_scale,
            selection=selection,
            parts=parts,
            detail_control=detail_control,
            reduction=reduction,
            structure_shape=structure_shape,
            detail_shape=detail_shape,
            **grid,
            max_zoom=max_zoom or 0,
            master_net=master_net,
            part_net=part_net,
            heads=heads,
            split_bn=split_bn,
        )
        layout = attention_layout(attention_net, attention_backbone, attention_args)
        drawn = parts if part_net and detail_control is None else 0  # detail maps, by trilinear attention
        front = dict(
            attention_net=AttentionNet(
                **layout,
                num_classes=num_classes,
                in_chans=in_chans,
                input_affine=attention_affine,
                **dd,
            ),
            trilinear_attention=TrilinearAttention(
                normalization, spatial_scale, relation_scale, selection, drawn, reduction
            ),
            structure_sampler=AttentionSampler(sample_size, structure_shape, max_zoom or None, **grid),
            detail_sampler=AttentionSampler(sample_size, detail_shape, max_zoom or None, **grid),
        )
        super().__init__(
            backbone,
            num_classes,
            in_chans,
            global_pool,
            drop_rate,
            drop_path_rate,
            img_size=to_2tuple(sample_size),
            heads=heads,
            pool_args=pool_args,
            backbone_args=backbone_args,
            front=front,
            **dd,
        )
        if split_bn:
            self.backbone = _with_split_bn(self.backbone, views=1 + parts)
        self.attention_layout = complete_layout(layout)  # as attention_args the same net, whatever the presets become
        self.master_net = master_net
        self.part_net = part_net
        self.parts = parts if part_net else 0
        self.detail_control = detail_control
        self.split_bn = split_bn
        self.distilled_training = False
        self._model_args = model_args
        stem = tuple(f"attention_net.trunk.{name}" for name in stem_convolutions(self.attention_net.trunk))
        self._traits = dict(first_conv=stem + self._traits["first_conv"])

    def forward(self, image: Tensor) -> Tensor | TASNOutput:
        if not self.training or self.num_classes == 0:
            return super().forward(self.sample(image))
        features = self.attention_features(image)  # X: (B, C, h, w)
        pooled = self.embed(self.views(image, features))  # one batch: shared weights and BN statistics
        first = image.shape[0] if self.master_net else 0
        logits = self.heads.forward_views(
            pooled[:first] if self.master_net else None, pooled[first:] if self.part_net else None
        )
        output = TASNOutput(*logits, self.attention_net.classify(features))
        return output if self.distilled_training else self._mean_logits(output)

    def views(self, image: Tensor, features: Tensor) -> Tensor:
        """What the backbone is trained on: structure images, where there is a master net, and details of each part.

        Args:
            image: (B, 3, H, W).
            features: X of it, see `attention_features`.

        Returns:
            (B (1 + parts), 3, H', W'), normalised: all structure images, all first details, ... Details are random;
            `trilinear_attention` draws them in training mode alone.
        """
        maps = self.trilinear_attention(features)  # Eq. 2: (B, h, w), (B, parts, h, w)
        structure_map, detail_maps = maps[0], maps[1]  # without iteration or len(), which torch.fx cannot trace
        views = [self.structure_sampler(image, structure_map)] if self.master_net else []  # I_s: (B, 3, H', W')
        if self.detail_control is not None:
            shaped = shape_map(structure_map, self.structure_sampler.shape)
            detail_maps = control_maps(self.detail_control, shaped, self.parts)
        views += [self.detail_sampler(image, detail_maps[:, i]) for i in range(self.parts)]  # I_d
        return self.normalized(torch.cat(views), image)

    def attention_features(self, image: Tensor) -> Tensor:
        """The attention net's features X (B, C, h, w) of an image (B, 3, H, W)."""
        return self.attention_net(self.normalized(resize_image(image, self.attention_net.input_size), image))

    def sample(self, image: Tensor) -> Tensor:
        """The structure-preserved image I_s (B, 3, H', W') of an image (B, 3, H, W), normalised.

        Raises:
            UserError: In training mode with split_bn, whose norms tell the views apart by their place in the batch.
        """
        if self.split_bn and self.training:
            raise UserError("split_bn=True trains on structure and detail images together: use evaluation mode here.")
        return self.normalized(self.structure_sampler(image, self._structure_map(image)), image)

    def sampling_grid(self, image: Tensor) -> Tensor:
        """Where each pixel of the structure-preserved image looks: (B, H', W', 2), see `attention_grid`."""
        return self.structure_sampler.grid(self._structure_map(image), tuple(image.shape[-2:]))

    def normalized(self, resized: Tensor, image: Tensor) -> Tensor:
        """What was resized or sampled of an image, (B, 3, h, w), normalised if the image is pixels of uint8."""
        config = getattr(self, "pretrained_cfg", None)
        return normalize_pixels(resized, image, config, self.attention_net.norm.weight.dtype)

    @property
    def sample_size(self) -> tuple[int, int]:
        """Pixels (H', W') of the sampled images."""
        return self.structure_sampler.output_size

    def set_distilled_training(self, enable: bool = True) -> None:
        """Make training-mode forward return a `TASNOutput` (timm's name for this switch, from DeiT)."""
        self.distilled_training = enable

    # Where timm's contract, which `BackboneClassifier` fulfils, has to reach the attention net as well.

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations of backbone and attention net in the backward pass to save memory.

        Raises:
            UserError: The attention net's backbone cannot; nothing is changed then.
        """
        self.attention_net.set_grad_checkpointing(enable)
        super().set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that backbone or attention net do not want decayed."""
        return super().no_weight_decay() | {f"attention_net.{name}" for name in self.attention_net.no_weight_decay()}

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """The backbone's method of that name. Without classifiers nothing trains the attention net, so it is frozen."""
        taken = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if prune_head:
            self.attention_net.requires_grad_(False)
        return taken

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace all classifiers, the attention net's among them, by new ones; 0 for none."""
        super().reset_classifier(num_classes, global_pool)
        self.attention_net.reset_classifier(num_classes)

    def _structure_map(self, image: Tensor) -> Tensor:
        """The average map (B, h, w) of an image (B, 3, H, W), which guides the structure sampler."""
        return self.trilinear_attention(self.attention_features(image))[0]

    def _mean_logits(self, output: TASNOutput) -> Tensor:
        """The mean over all classifiers; the details of an image count as one."""
        structure = [logits for logits in (output.logits, output.master) if logits is not None]
        detail = [logits for logits in (output.part, output.shared_part) if logits is not None]
        means = [logits.unflatten(0, (self.parts, -1)).mean(0) for logits in detail]
        return torch.stack([*structure, *means, output.attention]).mean(0)


def _with_split_bn(backbone: nn.Module, views: int) -> nn.Module:
    """The backbone with BatchNorms of its own for each of so many views, which come as equal parts of a batch."""
    kinds = {type(module) for module in backbone.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)}
    if kinds != {nn.BatchNorm2d}:  # timm's conversion would lose the activation of its own BatchNormAct2d
        found = ", ".join(sorted(kind.__name__ for kind in kinds)) or "none"
        raise UserError(f"split_bn=True needs a backbone whose norms are BatchNorm2d, as a ResNet's; got {found}.")
    return convert_splitbn_model(backbone, views)


def structure_norm(name: str) -> str:
    """Name of the structure images' norm for a parameter of the details' own (`split_bn`); any other name as it is."""
    return re.sub(r"aux_bn\.\d+\.", "", name)


def _heads_of(master_net: bool, part_net: bool, heads: str | None) -> str:
    if master_net and part_net:
        return heads or "both"
    if not master_net and not part_net:
        raise UserError("master_net=False and part_net=False leave nothing to train: switch one of them on.")
    if heads not in (None, "shared"):
        missing = "part_net" if master_net else "master_net"
        raise UserError(
            f"heads={heads!r} has no effect with {missing}=False, which needs one classifier: leave it out, or for a "
            f"saved model, which has it, give heads='shared'."
        )
    return "shared"
