"""What a model makes of the eye of a bird: how much its sampler enlarges it, and how its attention maps lie to it.

    python tests/benchmarks/eye_zoom.py runs/reproduce/hard_{uniform,saliency}_master/seed?/synthbirds_hard
    python tests/benchmarks/eye_zoom.py runs/reproduce/hard_part_*/seed?/synthbirds_hard

Of the first 96 validation pictures of the data that a run was trained on, for which it is known where the eye is: the
magnification of the sampled pixel that looks closest to it, as the root of its area, beside a plain resize to the same
size, over the pictures in which one looks within 3 % of the picture's side; and in how many none does. Of all attention
maps of these pictures: the number of cells that a map covers (1 / the sum of its squared shares, median), the share of
its mass within a tenth of the side around the eye (mean), and how far two different maps of a picture are apart (L1 of
their shares, 0 to 2, mean).
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tasn_timm.back_projection import magnification
from tasn_timm.data import birds, synthbirds
from tasn_timm.data.painting import SIZE
from tasn_timm.finished_run import read_run
from tasn_timm.gaze import channel_maps
from tasn_timm.hub import load_model
from tasn_timm.tasn import TASN

PICTURES = 96
CLOSE, NEAR = 0.03, 0.1  # of the picture's side


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    print("| run | magnification at the eye: mean | median | not seen | a map: cells | near the eye | apart |")
    print("|---|---|---|---|---|---|---|")
    for run in parser.parse_args().runs:
        variant, model = read_run(run).recipe.data, load_model(str(run)).eval()
        drawn = [synthbirds.draw("validation", index, variant=variant) for index in range(PICTURES)]
        pixels = torch.from_numpy(np.stack(drawn)).movedim(-1, 1)
        eyes = torch.tensor(np.stack([eye(index, variant) for index in range(PICTURES)]), dtype=torch.float32)
        zoom, seen = at_the_eyes(model, pixels, eyes)
        cells, near, apart = of_maps(model, pixels, eyes)
        name, missing = "/".join(run.resolve().parts[-3:-1]), f"{100 * (~seen).float().mean():.0f} %"
        zooms = f"{zoom[seen].mean():.2f} | {zoom[seen].median():.2f} | {missing}"
        print(f"| {name} | {zooms} | {cells:.1f} | {100 * near:.1f} % | {apart:.2f} |", flush=True)


@torch.inference_mode()
def at_the_eyes(model: TASN, pixels: Tensor, eyes: Tensor) -> tuple[Tensor, Tensor]:
    """(PICTURES,) magnification, and whether the eye is seen."""
    grid = model.sampling_grid(pixels)  # (B, H', W', 2) in [-1, 1]
    distance = (grid - eyes[:, None, None]).square().sum(-1).sqrt().flatten(1).min(1)
    area = magnification(grid).prod(-1).flatten(1)
    return area.gather(1, distance.indices[:, None])[:, 0].sqrt(), distance.values / 2 < CLOSE


@torch.inference_mode()
def of_maps(model: TASN, pixels: Tensor, eyes: Tensor) -> tuple[float, float, float]:
    """Cells that a map covers, share of its mass near the eye, distance of two maps."""
    maps = channel_maps(model.trilinear_attention, model.attention_features(pixels)).clamp(min=0)  # (B, M, h, w)
    height, width = maps.shape[2:]
    shares = maps.flatten(2) / maps.sum((2, 3)).clamp(min=torch.finfo(maps.dtype).tiny)[..., None]
    x, y = ((torch.arange(count) + 0.5) / count * 2 - 1 for count in (width, height))
    cells = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1)  # (hw, 2) in [-1, 1]
    near = (torch.cdist(eyes, cells) / 2 < NEAR)[:, None]  # (B, 1, hw)
    covered = 1 / shares.square().sum(2)
    count = shares.shape[1]
    apart = torch.cdist(shares, shares, p=1).sum((1, 2)) / (count * (count - 1))
    return covered.median().item(), (shares * near).sum(2).mean().item(), apart.mean().item()


def eye(index: int, variant: str) -> np.ndarray:
    """Where the eye of a validation picture is, x and y in [-1, 1]: drawn again as far as its pose."""
    rng, family, _, chosen = synthbirds.specimen("validation", index, variant=variant)
    return birds.sketch(rng, family, chosen).pose.place(birds.EYE) / SIZE * 2 - 1


if __name__ == "__main__":
    main()
