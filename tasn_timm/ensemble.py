"""Classifiers of pictures: from decoded pictures to the probabilities of one model, or the average of several."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

from .data.transforms import Normalize, Transform
from .errors import NumericalError
from .tasn import TASN


class Ensemble(nn.Module):
    """Averages the probabilities of classifiers; one is fine.

    Each has its own input size, crop and normalisation, those of its pretrained_cfg.

    Args:
        models: timm models of 3-channel images and the same classes.
        flip: Average over each image and its mirror image, too (Table 7).
    """

    def __init__(self, models: Sequence[nn.Module], flip: bool = False) -> None:
        super().__init__()
        configs = [resolve_model_data_config(model) for model in models]
        self.models = nn.ModuleList(models)
        self.normalize = nn.ModuleList(
            Normalize(config.pop("mean"), config.pop("std"), keep_pixels=isinstance(model, TASN))
            for model, config in zip(models, configs)
        )
        self.views = [config for i, config in enumerate(configs) if config not in configs[:i]]
        self.view_of = [self.views.index(config) for config in configs]
        self.flip = flip

    def transform(self) -> Callable[[Image.Image], tuple[Tensor, ...]]:
        """RGB image -> one (3, H, W), uint8, for each distinct geometry: what `forward` takes, as batches."""
        # timm's own (pixels as `eval_transform`'s), since models from elsewhere may be bilinear, or not square.
        return partial(_each, [create_transform(**view, use_prefetcher=True) for view in self.views])

    def forward(self, images: Sequence[Tensor]) -> Tensor:
        """Probabilities (B, K) from `transform`'s images, (B, 3, H, W) for each geometry.

        Raises:
            NumericalError: A model's output is not finite.
        """
        members = zip(self.models, self.normalize, self.view_of)
        each = torch.stack([self._member(model, normalize([images[view]])) for model, normalize, view in members])
        if not each.isfinite().all():
            number = int((~each.isfinite()).any(-1).any(-1).nonzero()[0])
            raise NumericalError(
                f"the output of model {number + 1} of {len(each)} is not finite: its weights are spoiled."
            )
        return each.mean(0)

    def _member(self, model: nn.Module, images: Tensor) -> Tensor:
        views = [images, images.flip(-1)] if self.flip else [images]
        return torch.stack([model(view).float().softmax(-1) for view in views]).mean(0)


def _each(transforms: list[Transform], image: Image.Image) -> tuple[Tensor, ...]:
    return tuple(transform(image) for transform in transforms)
