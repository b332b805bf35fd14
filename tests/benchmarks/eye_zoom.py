"""How much each sampler enlarges the eye of a bird, beside a plain resize to the same size.

    python tests/benchmarks/eye_zoom.py runs/reproduce/hard_{uniform,saliency}_master/seed?/synthbirds_hard
    python tests/benchmarks/eye_zoom.py runs/reproduce/hard_master/seed?/synthbirds_hard

Of the first 96 validation pictures of the data that a run was trained on, for which it is known where the eye is: the
magnification of the sampled pixel that looks closest to it, as the root of its area; and in how many pictures no pixel
looks within 3 % of the picture's side.
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
from tasn_timm.hub import load_model

PICTURES = 96
CLOSE = 0.03  # of the picture's side


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    print("| run | magnification at the eye: mean | median | not seen |\n|---|---|---|---|")
    for run in parser.parse_args().runs:
        zoom, seen = at_the_eyes(run)
        missing = f"{100 * (~seen).float().mean():.0f} %"
        name = "/".join(run.resolve().parts[-3:-1])
        print(f"| {name} | {zoom[seen].mean():.2f} | {zoom[seen].median():.2f} | {missing} |", flush=True)


@torch.inference_mode()
def at_the_eyes(run: Path) -> tuple[Tensor, Tensor]:
    """(PICTURES,) magnification, and whether the eye is seen."""
    variant, model = read_run(run).recipe.data, load_model(str(run)).eval()
    drawn = [synthbirds.draw("validation", index, variant=variant) for index in range(PICTURES)]
    pixels = torch.from_numpy(np.stack(drawn)).movedim(-1, 1)
    grid = model.sampling_grid(pixels)  # (B, H', W', 2) in [-1, 1]
    eyes = torch.tensor(np.stack([eye(index, variant) for index in range(PICTURES)]), dtype=grid.dtype)
    distance = (grid - eyes[:, None, None]).square().sum(-1).sqrt().flatten(1).min(1)
    area = magnification(grid).prod(-1).flatten(1)
    return area.gather(1, distance.indices[:, None])[:, 0].sqrt(), distance.values / 2 < CLOSE


def eye(index: int, variant: str) -> np.ndarray:
    """Where the eye of a validation picture is, x and y in [-1, 1]: drawn again as far as its pose."""
    rng, family, _, chosen = synthbirds.specimen("validation", index, variant=variant)
    return birds.sketch(rng, family, chosen).pose.place(birds.EYE) / SIZE * 2 - 1


if __name__ == "__main__":
    main()
