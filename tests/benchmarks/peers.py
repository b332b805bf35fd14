"""TASN's own steps beside those of its peers and beside what cannot be avoided, as ratios with the bars that we set.

    python tests/benchmarks/peers.py                  # everything, on two cores about 10 minutes
    python tests/benchmarks/peers.py maps positions   # some of it

Everything in a table is timed in turns in the same run. Ratios are of medians, with the extremes of the rounds; memory
is what PyTorch's allocator gave out at the busiest moment, beyond what there was before. Weights are random.

Peers: dense trilinear attention, which builds all C maps; the published sampler, one position after the other, and
SSN's, on 31 x 31 positions (both written afresh from their descriptions); the plain backbone.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from tasn_timm import TASN, TASNLoss
from tasn_timm.attention_sampler import attention_grid, saliency_grid, sample, sample_pixels
from tasn_timm.benchmark import peak_of_changes, turns
from tasn_timm.trilinear_attention import structure_and_detail_maps, trilinear_attention

MODEL, IMAGE, SAMPLE, CLASSES = "tasn_resnet50", 512, 224, 200


def main() -> None:
    sections = dict(maps=maps, positions=positions, sampling=sampling, evaluation=evaluation, training=training)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", choices=[[], *sections], metavar="SECTION", help=", ".join(sections))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {options.threads} threads")
    torch.manual_seed(0)
    for name in options.sections or sections:
        sections[name](options.rounds)


@torch.inference_mode()
def maps(rounds: int) -> None:
    """Structure map and one detail map of a batch of the published size."""
    features = torch.randn(96, 512, 28, 28).relu()
    chosen = torch.randint(512, (96,))

    def dense() -> tuple[Tensor, Tensor]:
        every = trilinear_attention(features)
        return every.mean(1), every[torch.arange(96), chosen]

    contenders = {"dense": dense, "fused": lambda: structure_and_detail_maps(features, reduction="mean_all")}
    torch.testing.assert_close(contenders["fused"]()[0], dense()[0], rtol=1e-5, atol=1e-6)
    seconds = in_turns(contenders, rounds)
    peaks = {name: peak_bytes(function) for name, function in contenders.items()}
    table("Maps of 96 x 512 x 28 x 28", seconds, "dense", peaks)
    bar("dense / fused, time", ratio(seconds, "dense", "fused"), 1.5, at_least=True)
    bar("fused / dense, extra memory", [peaks["fused"] / peaks["dense"]], 0.5)


@torch.inference_mode()
def positions(rounds: int) -> None:
    """From 28 x 28 maps to the positions of 224 x 224 pixels."""
    attention = F.interpolate(torch.rand(8, 1, 7, 7), 28, mode="bicubic").clamp(min=0)[:, 0] ** 3
    ours = attention_grid(attention, SAMPLE, size=(IMAGE, IMAGE))
    theirs = sequential_grid(attention)
    off = (ours - theirs).abs().amax(-1) * IMAGE / 2
    print(f"\nours against the sequential algorithm: {off.mean():.2f} pixels of 512 apart, at most {off.max():.1f}")
    contenders = {
        "ours": lambda: attention_grid(attention, SAMPLE, size=(IMAGE, IMAGE)),
        "ours of a 512 x 512 map": lambda: attention_grid(resized(attention), SAMPLE),
        "the published algorithm, sequential": lambda: sequential_grid(attention),
        "SSN, 31 x 31 positions": lambda: ssn_grid(attention),
        "SSN, exact (saliency_grid)": lambda: saliency_grid(attention, SAMPLE),
    }
    table("Positions, 8 maps of 28 x 28", in_turns(contenders, rounds), "ours")


@torch.inference_mode()
def sampling(rounds: int) -> None:
    """From 512 x 512 pixels to 224 x 224 normalised ones."""
    pixels = torch.randint(256, (8, 3, IMAGE, IMAGE), dtype=torch.uint8)
    grid = attention_grid(torch.rand(8, 28, 28), SAMPLE, size=(IMAGE, IMAGE))
    x, y = grid[:, 0, :, 0], grid[:, :, 0, 1]
    mean, std = torch.full((1, 3, 1, 1), 120.0), torch.full((1, 3, 1, 1), 60.0)
    contenders = {
        "ours, from uint8": lambda: (sample_pixels(pixels, x, y) - mean) / std,
        "normalised before, grid_sample": lambda: sample((pixels.float() - mean) / std, grid),
    }
    peaks = {name: peak_bytes(function) for name, function in contenders.items()}
    table("Sampling, 8 pictures", in_turns(contenders, rounds), "normalised before, grid_sample", peaks)


@torch.inference_mode()
def evaluation(rounds: int) -> None:
    """Pixels to logits, beside the attention net and the backbone alone."""
    model = timm.create_model(MODEL, num_classes=CLASSES).eval()
    pixels = torch.randint(256, (8, 3, IMAGE, IMAGE), dtype=torch.uint8)
    small, sampled, twice = (torch.randn(8, 3, side, side) for side in (SAMPLE, SAMPLE, 2 * SAMPLE))
    features = model.attention_net(small)

    def front() -> Tensor:
        return model.structure_sampler(pixels, model.trilinear_attention(features)[0])

    contenders = {
        f"{MODEL}, whole": lambda: model(pixels),
        "attention net": lambda: model.attention_net(small),
        "features to sampled image": front,
        "backbone and heads": lambda: model.heads(model.embed(sampled)),
        "the same at 448": lambda: model.heads(model.embed(twice)),
    }
    seconds = in_turns(contenders, rounds)
    table("Evaluation, batch 8", seconds, f"{MODEL}, whole")
    whole = seconds[f"{MODEL}, whole"]
    bar("features to sampled image / whole", ratio(seconds, "features to sampled image", f"{MODEL}, whole"), 0.05)
    parts = [sum(each) for each in zip(seconds["attention net"], seconds["backbone and heads"])]
    bar("whole / (attention net + backbone)", medians_first(whole, parts), 1.05)


def training(rounds: int) -> None:
    """Forward, loss and backward, beside those of the attention net, and of the backbone on as many views."""
    model = timm.create_model(MODEL, num_classes=CLASSES).train()
    model.set_distilled_training(True)
    loss = TASNLoss()
    pixels, target = torch.randint(256, (4, 3, IMAGE, IMAGE), dtype=torch.uint8), torch.randint(CLASSES, (4,))
    small, views = torch.randn(4, 3, SAMPLE, SAMPLE), torch.randn(8, 3, SAMPLE, SAMPLE)

    def backward(value: Tensor) -> None:
        value.backward()
        model.zero_grad()

    contenders = {
        f"{MODEL}, whole": lambda: backward(loss(model(pixels), target)["loss"]),
        "attention net": lambda: backward(attention_loss(model, small, target)),
        "backbone, 8 views": lambda: backward(model.embed(views).square().mean()),
    }
    seconds = in_turns(contenders, rounds)
    table("Training step without optimizer, batch 4", seconds, f"{MODEL}, whole")
    parts = [sum(each) for each in zip(seconds["attention net"], seconds["backbone, 8 views"])]
    bar("whole / (attention net + backbone on 2B)", medians_first(seconds[f"{MODEL}, whole"], parts), 1.1)


def attention_loss(model: TASN, small: Tensor, target: Tensor) -> Tensor:
    net = model.attention_net
    return nn.functional.cross_entropy(net.classify(net(small)), target)


def resized(attention: Tensor) -> Tensor:
    return F.interpolate(attention[:, None], (IMAGE, IMAGE), mode="bilinear")[:, 0]


def sequential_grid(attention: Tensor, max_zoom: float = 4.0, iterations: int = 5) -> Tensor:
    """The published sampler's way: each map resized to the image, then one output position after the other.

    Positions are ours: half-pixel, and exact for a flat map.
    """
    grids = []
    for image_map in resized(attention).numpy():
        densities = [image_map.max(axis) / image_map.max(axis).mean() for axis in (0, 1)]  # over x, over y
        for round_ in range(iterations):
            limit = min(density.max() for density in densities)
            limit = min(limit, max_zoom) if round_ == 0 else limit
            clipped = [np.minimum(density, limit) for density in densities]
            densities = [density + (1 - density.mean()) for density in clipped]
        x, y = (walk(density / density.sum()) for density in densities)
        grids.append(np.stack(np.broadcast_arrays(x[None, :], y[:, None]), -1))
    return torch.from_numpy(np.stack(grids)).float()


def walk(mass: np.ndarray) -> np.ndarray:
    """Positions in [-1, 1] where so much of the mass lies before: one pass over outputs and cells."""
    found, cell, before = np.empty(SAMPLE), 0, 0.0
    for output in range(SAMPLE):
        target = (output + 0.5) / SAMPLE
        while cell < len(mass) - 1 and before + mass[cell] <= target:
            before += mass[cell]
            cell += 1
        found[output] = (cell + min(max((target - before) / mass[cell], 0), 1)) / len(mass)
    return 2 * found - 1


def ssn_grid(attention: Tensor, cells: int = 31, sigma: float = 0.178) -> Tensor:
    """SSN's way: mean positions under a Gaussian window at 31 x 31 places, by convolution, then enlarged."""
    reach = cells - 1
    offsets = torch.arange(-reach, reach + 1) / cells
    window = (-0.5 * (offsets / sigma).square()).exp()
    window = (window[:, None] * window)[None, None]
    saliency = F.interpolate(attention[:, None], (cells, cells), mode="bilinear")
    saliency = F.pad(saliency, [reach] * 4, mode="replicate")
    place = (torch.arange(-reach, cells + reach) + 0.5) / cells
    mass = F.conv2d(saliency, window)
    x, y = (F.conv2d(saliency * each, window) / mass for each in (place, place[:, None]))
    grid = F.interpolate(torch.cat([x, y], 1), (SAMPLE, SAMPLE), mode="bilinear")
    return 2 * grid.clamp(0, 1).movedim(1, -1) - 1


def in_turns(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender in each round, after one that is not counted; every round begins with the next one."""
    names = list(contenders)
    for name in names:
        contenders[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for order in turns(len(names), rounds):
        for name in (names[index] for index in order):
            begin = time.perf_counter()
            contenders[name]()
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def peak_bytes(function: Callable[[], object]) -> int:
    """The most that the CPU's allocator had given out at a time while a function ran."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    return peak_of_changes(profiler)


def ratio(seconds: dict[str, list[float]], one: str, other: str) -> list[float]:
    return medians_first(seconds[one], seconds[other])


def medians_first(one: Sequence[float], other: Sequence[float]) -> list[float]:
    """The ratio of the medians, then those of the rounds."""
    return [statistics.median(one) / statistics.median(other), *(a / b for a, b in zip(one, other))]


def table(title: str, seconds: dict[str, list[float]], reference: str, memory: dict[str, int] | None = None) -> None:
    print(f"\n| {title} | ms | of {reference} |{' extra memory |' if memory else ''}")
    print(f"|---|---|---|{'---|' if memory else ''}")
    for name, each in seconds.items():
        share, *rounds = ratio(seconds, name, reference)
        extra = f" {memory[name] / 1e6:.0f} MB |" if memory else ""
        spread = f"({min(rounds):.3f}-{max(rounds):.3f})"
        print(f"| {name} | {1000 * statistics.median(each):.1f} | {share:.3f} {spread} |{extra}")


def bar(what: str, found: Sequence[float], limit: float, at_least: bool = False) -> None:
    """Print whether the first ratio keeps to the bar; the others are its rounds."""
    kept = found[0] >= limit if at_least else found[0] <= limit
    spread = f" ({min(found[1:]):.3f}-{max(found[1:]):.3f})" if found[1:] else ""
    print(
        f"{what}: {found[0]:.3f}{spread}, at {'least' if at_least else 'most'} {limit}: {'met' if kept else 'NOT MET'}"
    )


if __name__ == "__main__":
    main()
