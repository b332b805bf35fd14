"""Measure what models cost, beside their plain backbones: parameters, FLOPs, time and memory.

A TASN is measured beside its backbone at the size of the sampled pictures and at twice that, any other model beside
itself at twice its size, all with random weights. They take turns in every round; figures are medians, and the ratio to
the plain backbone comes with its extremes over the rounds. Inference goes from uint8 pictures on the device to logits,
a training step to updated weights, a TASN's with its own loss.

With --plot one TASN is measured beside its plain backbone for batches of 1 to 256 pictures and for sampled sizes of 112
to 448 pixels, and drawn.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from ..errors import UserError
from ..files import STDOUT, check_outputs, write_text
from ..tables import table
from . import at_least

if TYPE_CHECKING:
    from ..benchmark import Machine

SUMMARY = "measure parameters, FLOPs, time and memory of models beside their plain backbones"
EXAMPLES = """examples:
  python -m tasn_timm benchmark tasn_resnet50 --batch-size 1 8 --threads 1
  python -m tasn_timm benchmark tasn_resnet50 --precision bf16 --channels-last --compile --json cost.json
  python -m tasn_timm benchmark tasn_tiny --plot cost.png"""

LEGEND = """\
ms         median of the rounds; parts of a TASN are timed by themselves, in the same rounds
products   convolutions and matrix products alone, in ms, as the profiler sees them
peak MiB   tensors at the busiest moment: weights, batch, activations; gradients and momentum, too
x plain    ratio of the medians to the plain backbone's; in rounds: the extremes of the ratios"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add = parser.add_argument
    add("models", metavar="MODEL", nargs="+", help="name of a timm model, these here or others")
    add("--batch-size", type=at_least(1), nargs="+", metavar="B", help="pictures at once (default: 1 8)")
    add("--precision", nargs="+", choices=["fp32", "bf16", "fp16"], default=["fp32"], help="bf16, fp16 by autocast")
    add("--mode", nargs="+", choices=["inference", "training"], help="what to time (default: both; plot: inference)")
    add("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    add("--threads", type=at_least(1), metavar="N", help="of a CPU (default: as many as PyTorch takes)")
    add("--channels-last", action="store_true", help="memory format of weights and pictures")
    add("--compile", action="store_true", help="with torch.compile, which takes a while for each batch size")
    add("--rounds", type=at_least(1), default=11, help="how often each is timed at most (default: %(default)s)")
    add("--max-seconds", type=float, default=10, help="of rounds for each model and setting (default: %(default)s)")
    add(
        "--json",
        type=Path,
        metavar="FILE",
        help="write everything measured, also each round, to this file; -: to standard output, alone",
    )
    add("--plot", type=Path, metavar="FILE.png", help="draw cost over batch and sampled size of one TASN")


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    import torch

    from ..benchmark import Machine, find_device

    _check(options)
    device = find_device(options.device)
    if device.type == "cpu" and "fp16" in options.precision:
        raise UserError("--precision fp16 is for GPUs: use bf16 on a CPU.")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # whose clock times the parts
    if options.threads:
        torch.set_num_threads(options.threads)
    machine = Machine(device, options.channels_last, options.compile, options.rounds, options.max_seconds)
    check_outputs(json=options.json, plot=options.plot)
    tell = print if options.json != STDOUT else lambda text: None
    result = dict(machine=machine.describe()) | (_sweep if options.plot else _compare)(options, machine, tell)
    write_text(options.json, json.dumps(result, indent=2) + "\n", "--json")


def _check(options: argparse.Namespace) -> None:
    if not options.max_seconds > 0:
        raise UserError(f"--max-seconds must be more than 0, got {options.max_seconds}.")
    if options.plot:
        _check_plot(options)


def _check_plot(options: argparse.Namespace) -> None:
    from ..cost_plot import check_plot

    if options.batch_size:
        raise UserError("--batch-size has no effect with --plot, which has its own: leave out one of them.")
    for name, values in (("MODEL", options.models), ("--precision", options.precision), ("--mode", options.mode or [])):
        if len(values) > 1:
            raise UserError(f"--plot draws one {name}, got {' '.join(values)}: give one.")
    check_plot(options.plot)


def _compare(options: argparse.Namespace, machine: "Machine", tell: Callable[[str], None]) -> dict:
    """Measure and tell of every model in every setting."""
    from ..benchmark import Work, measure
    from ..contenders import create_contenders, fixed_cost

    created = [create_contenders(name) for name in dict.fromkeys(options.models)]
    contenders = list({each.name: each for some, _ in created for each in some}.values())
    left_out = [line for _, lines in created for line in lines]
    models = [dict(name=each.name, reference=each.reference) | fixed_cost(each) for each in contenders]
    tell("\n".join([machine_line(machine.describe()), *left_out, "", cost_table(models)]))
    timings = []
    for mode, precision in product(options.mode or ["inference", "training"], dict.fromkeys(options.precision)):
        works = [Work(mode, precision, size) for size in dict.fromkeys(options.batch_size or [1, 8])]
        cells = [
            measure([(each, work) for each in contenders], machine, progress=_progress(", ".join(map(str, work))))
            for work in works
        ]
        tell(f"\n{timings_table(cells)}")
        timings += [each for some in cells for each in some]
    tell(f"\n{LEGEND}")
    return dict(models=models, timings=timings, left_out=left_out)


def _sweep(options: argparse.Namespace, machine: "Machine", tell: Callable[[str], None]) -> dict:
    """Measure and draw one TASN over batch and sampled size."""
    from ..cost_plot import draw, sweep

    (mode,) = options.mode or ["inference"]
    points, left_out = sweep(options.models[0], mode, options.precision[0], machine, _progress("rounds"))
    where = machine_line(machine.describe())
    tell("\n".join([where, *left_out, "", sweep_table(points)]))
    title = f"What {options.models[0]} costs beside its plain backbone"
    draw(points, title, f"{mode}, {options.precision[0]}; {where}", options.plot)
    tell(f"\n{options.plot} written")
    return dict(points=points, left_out=left_out)


def _progress(what: str) -> Callable[[Iterable], Iterable]:
    """A bar over rounds, on a terminal."""
    return partial(tqdm, desc=what, unit="round", disable=not sys.stderr.isatty(), leave=False)


def machine_line(machine: dict) -> str:
    """Where and how it was measured, in a line. `machine` is what `Machine.describe` says."""
    threads = f"{machine['threads']} thread{'s' * (machine['threads'] > 1)}"
    where = threads if machine["cuda"] is None else f"CUDA {machine['cuda']}"
    how = [name.replace("_", " ") for name in ("channels_last", "compile") if machine[name]]
    software = f"PyTorch {machine['torch']}, timm {machine['timm']}"
    return ", ".join([machine["device_name"], where, software, *how])


def cost_table(models: list[dict]) -> str:
    """Parameters and FLOPs of one picture, as `fixed_cost` finds them, and of their parts."""
    rows = [("one picture", "parameters", "GFLOPs", "x plain")]
    flops = {model["name"]: model["flops"] for model in models}
    for model in models:
        ratio = f"{model['flops'] / flops[model['reference']]:.2f}"
        rows.append((model["name"], f"{model['parameters']:,}", _giga(model["flops"]), ratio))
        for part, cost in model["parts"].items():
            rows.append((f"  {part}", f"{cost['parameters']:,}", _giga(cost["flops"]), ""))
    return f"{table(rows, '<>>>')}\n(FLOPs of convolutions and matrix products: what PyTorch's counter knows)"


def timings_table(cells: list[list[dict]]) -> str:
    """Time and memory in one mode and precision: for each batch size, what `measure` found."""
    mode, precision = cells[0][0]["mode"], cells[0][0]["precision"]
    head = f"{mode}, {precision}"
    rows = [(head, "batch", "ms", "images/s", "products", "peak MiB", "x plain", "in rounds")]
    for number, batch in enumerate(cells):
        rows += [("",) * len(rows[0])] if number else []
        for cell in batch:
            rows.append((cell["name"], str(cell["batch_size"]), *_figures(cell)))
            rows += [
                (f"  {part}", "", _milli(seconds), *[""] * 5) for part, seconds in cell.get("part_seconds", {}).items()
            ]
    return table(rows, "<>>>>>><")


def _figures(cell: dict) -> tuple[str, ...]:
    if cell["failure"]:
        return "-", "-", "-", "-", "-", cell["failure"]
    figures = _milli(cell["median_seconds"]), f"{cell['images_per_second']:,.1f}", _milli(cell["products_seconds"])
    figures += (_three_digits(cell["peak_bytes"] / 2**20),)
    if "ratio" not in cell:
        return *figures, "-", ""
    return *figures, f"{cell['ratio']:.2f}", _spread(cell)


def sweep_table(points: list[dict]) -> str:
    """What `sweep` found."""
    rows = [("", "sampled", "batch", "GFLOPs", "ms", "x plain", "in rounds")]
    for point in points:
        figures = ("-", "-", point["failure"])
        if not point["failure"]:
            ratio = f"{point['ratio']:.2f}" if "ratio" in point else "-"
            figures = (_milli(point["median_seconds"]), ratio, _spread(point))
        sizes = str(point["sample_size"]), str(point["batch_size"])
        rows.append((point["series"], *sizes, _giga(point["flops"]), *figures))
    return table(rows, "<>>>>><")


def _spread(cell: dict) -> str:
    """Of the ratio over the rounds; of the plain model there is none."""
    if "ratio" not in cell or cell["name"] == cell["reference"]:
        return ""
    return f"{cell['ratio_low']:.2f} - {cell['ratio_high']:.2f}"


def _giga(flops: int) -> str:
    return f"{flops / 1e9:.4f}" if flops < 1e8 else f"{flops / 1e9:,.2f}"


def _milli(seconds: float) -> str:
    return _three_digits(1000 * seconds)


def _three_digits(number: float) -> str:
    return f"{number:,.{2 if number < 10 else 1 if number < 100 else 0}f}"
