"""Where the time of a training step goes, operator by operator, and the limit that the processor sets.

    python tests/benchmarks/step_profile.py tasn_lite_resnet50 --batch-size 4

A step is forward, loss, backward and optimizer, from pixels of uint8, as `benchmark` has it. The limit is the step's
FLOPs at the speed of a large matrix product, measured between the steps. Printed as a Markdown table.
"""

import argparse
import os
import re
import statistics
import time
from collections import Counter

import timm
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import tasn_timm  # noqa: F401
from tasn_timm.benchmark import Machine, Training, Work
from tasn_timm.contenders import Contender

# Operators by what they are for; the first that fits counts. Time is an operator's own, without those that it calls.
KINDS = {
    "convolutions and products": r".*conv(?!ert).*|.*mm$|.*addmm.*|aten::mv|.*linear.*",
    "BatchNorm": r".*batch_norm.*",
    "activations": r".*relu.*|.*threshold.*|.*gelu.*|.*silu.*",
    "pooling and resizing": r".*pool.*|.*upsample.*|aten::mean",
    "softmax": r".*softmax.*",
    "picking pixels and rows": r".*(index|gather|searchsorted|lerp|scatter|cumsum|grid_sampler).*",
    "optimizer": r".*Optimizer.*|aten::_foreach.*|.*_fused_.*",
    "adding, multiplying, copying": r"aten::(add|sub|mul|div|copy|cat|stack|fill|zero|sum|clamp|where|threshold).*",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="tasn_lite_resnet50")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = timm.create_model(options.model, num_classes=200)
    size = model.pretrained_cfg["input_size"][1:]
    work = Work("training", "fp32", options.batch_size)
    step = Training(Contender(options.model, model, size, options.model), work, Machine(torch.device("cpu")))
    step()
    with FlopCounterMode(display=False) as counter:
        step()

    seconds, speeds, own = [], [], Counter()
    for _ in range(options.steps):
        speeds.append(product_speed())
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            step()
        for event in profiler.key_averages():
            own[kind_of(event.key)] += event.self_cpu_time_total / 1e6 / options.steps
    flops, speed, whole = counter.get_total_flops(), statistics.median(speeds), statistics.median(seconds)
    print(f"{options.model}, batch {options.batch_size}, {options.threads} thread(s), torch {torch.__version__}")
    print(f"a step: {whole:.2f} s, {flops / 1e9:.0f} GFLOPs; a large product: {speed / 1e9:.0f} GFLOP/s")
    print(f"the limit, all FLOPs at that speed: {flops / speed:.2f} s, {flops / speed / whole:.0%} of the step\n")
    print("| operators | ms, profiled | share |\n|---|---|---|")
    for kind, value in own.most_common():
        print(f"| {kind} | {1000 * value:.0f} | {value / own.total():.1%} |")


def kind_of(operator: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.fullmatch(pattern, operator)), "all else")


def product_speed(size: int = 1536) -> float:
    """FLOPs a second of a matrix product that is large enough for the processor to be at its best."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    torch.mm(a, b)
    start = time.perf_counter()
    torch.mm(a, b)
    return 2 * size**3 / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
