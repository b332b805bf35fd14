"""What the sampler does to the same few pictures in the course of a training."""

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, default_collate
from torch.utils.data.dataset import IterableDataset

from ..back_projection import magnification
from ..tasn import TASN

PICTURES = 16


class ZoomProbe:
    """Measures a TASN's sampler on pictures spread evenly over a split.

    Args:
        model: As it is evaluated, not wrapped.
        loader: Of the split.
        normalize: Pixels to the model's input.
        accelerator: Of the run; only the main process measures.
    """

    def __init__(self, model: nn.Module, loader: DataLoader, normalize: nn.Module, accelerator: Accelerator) -> None:
        self.model = model
        self.images = None
        if isinstance(model, TASN) and accelerator.is_main_process and not isinstance(loader.dataset, IterableDataset):
            count = min(PICTURES, len(loader.dataset))
            rows = [index * len(loader.dataset) // count for index in range(count)]
            pixels = default_collate([loader.dataset[row][0] for row in rows])
            self.images = normalize([tensor.to(accelerator.device) for tensor in pixels])

    @torch.inference_mode()
    def measure(self) -> dict[str, float] | None:
        """Measure the structure image's sampler.

        Returns:
            "x", "y": largest magnification along an axis, averaged over the pictures; "largest" of all of them;
            "area_of_half": the share of the picture that half of the pixels see, 0.5 for a plain resize. None for other
            models, and where a split is a stream.
        """
        if self.images is None:
            return None
        zoom = magnification(self.model.eval().sampling_grid(self.images)).flatten(1, 2)  # (B, H' * W', 2)
        x, y = zoom.amax(1).mean(0).tolist()
        areas = (1 / zoom.prod(-1)).sort(1).values.cumsum(1)  # from the most magnified pixel on
        half = areas[:, areas.shape[1] // 2 - 1] / areas[:, -1]
        return dict(x=x, y=y, largest=zoom.amax().item(), area_of_half=half.mean().item())
