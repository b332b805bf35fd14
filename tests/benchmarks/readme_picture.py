"""Draw the README's picture with the checkpoint that ships with the package: python tests/benchmarks/readme_picture.py

Rows: pictures of the test split (192 pixels), the structure map, the 48 pixels that the backbone sees, and the 48
pixels of a plain resize.
"""

from pathlib import Path

import timm
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

import tasn_timm  # noqa: F401
from tasn_timm.attention_sampler import shape_map
from tasn_timm.data import synthbirds

INDICES = (1, 4, 11, 14, 19, 22)
SIDE = 192


def tiles(images: Tensor) -> Tensor:
    """(B, 3, h, w) with values 0 to 255 -> one row (3, SIDE, B * SIDE)."""
    return torch.cat(list(F.interpolate(images, SIDE, mode="nearest")), dim=2)


@torch.inference_mode()
def main() -> None:
    model = timm.create_model("tasn_tiny", pretrained=True).eval()
    mean, std = (255 * torch.tensor(model.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    pictures = torch.stack(
        [torch.from_numpy(synthbirds.draw("test", index)).movedim(2, 0) for index in INDICES]
    ).float()
    normalized = (pictures - mean) / std
    structure_map, _ = model.trilinear_attention(model.attention_net(normalized))
    maps = shape_map(structure_map, model.structure_sampler.shape)
    maps = 255 * (maps / maps.amax((1, 2), keepdim=True))[:, None].expand(-1, 3, -1, -1)
    seen = model.structure_sampler(pictures, structure_map)
    plain = F.interpolate(pictures, seen.shape[-2:], mode="bilinear", antialias=True)
    sheet = torch.cat([tiles(row) for row in (pictures, maps, seen, plain)], dim=1)
    path = Path(__file__).parents[2] / ".github" / "synthbirds.png"
    Image.fromarray(sheet.clamp(0, 255).byte().movedim(0, 2).numpy()).save(path, optimize=True)
    right = [int(label) == index % 24 for label, index in zip(model(normalized).argmax(1), INDICES)]
    print(f"{path}: {sum(right)} of {len(right)} recognised")


if __name__ == "__main__":
    main()
