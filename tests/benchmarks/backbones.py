"""Train and evaluate TASN with one small member of every timm family: python tests/benchmarks/backbones.py

A family is a module of timm, its small member the model with the fewest parameters. It is once the backbone of master
and part net, beside the "tiny" attention net, and once the backbone of the "published" attention net, beside
test_resnet. Both have to be built, take one SGD step on `TASNLoss` in which every parameter has a finite gradient, and
give finite logits in evaluation. Writes the table backbones.md beside this file; exits with 1 where less than 95 % of
the families pass, or where one fails with anything but a `UserError` at construction. About 15 minutes on two cores.

"""

import argparse
import platform
import signal
import sys
import time
from collections import Counter
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import timm
import torch

import tasn_timm  # noqa: F401
from tasn_timm.backbone import backbone_cfg
from tasn_timm.distillation import TASNLoss
from tasn_timm.errors import UserError

NUM_CLASSES = 7
SIZES = (96, 112, 224)  # pixels that are tried before a model's own size, which can be large
SECONDS = 300  # for one model in one place
REQUIRED = 0.95


class Row(NamedTuple):
    family: str
    name: str
    parameters: int
    main: str
    attention: str


def families() -> dict[str, list[str]]:
    """The models of every module of timm, without those of tasn_timm."""
    members: dict[str, list[str]] = {}
    for name in timm.list_models():
        module = timm.models.model_entrypoint(name).__module__
        if module.startswith("timm."):
            members.setdefault(module.rsplit(".", 1)[-1], []).append(name)
    return members


def smallest(names: list[str]) -> tuple[int, str]:
    """The model with the fewest parameters, and their number."""
    counts = []
    for name in names:
        model = timm.create_model(name, num_classes=NUM_CLASSES, device="meta")
        counts.append((sum(parameter.numel() for parameter in model.parameters()), name))
    return min(counts)


def train_and_evaluate(model: torch.nn.Module, size: tuple[int, int]) -> None:
    """One step and one evaluation; AssertionError where a gradient is missing or anything is not finite."""
    generator = torch.Generator().manual_seed(0)
    image, target = torch.randn(2, 3, *size, generator=generator), torch.tensor([1, 4])
    model.train().set_distilled_training(True)
    TASNLoss()(model(image), target)["loss"].backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    without = [name for name, p in trained.items() if p.grad is None or not p.grad.isfinite().all()]
    assert not without, f"no finite gradient for {len(without)} parameters, the first {without[0]}"
    torch.optim.SGD(model.parameters(), lr=0.001).step()
    with torch.inference_mode():
        logits = model.eval()(image)
    assert logits.shape == (2, NUM_CLASSES) and logits.isfinite().all(), f"logits {logits}"


def as_main(name: str) -> str:
    """Outcome as the backbone of master and part net, at the first size that the model takes."""
    for size in [*((side, side) for side in SIZES), backbone_cfg(name).input_size[1:]]:
        try:
            model = timm.create_model(
                "tasn", backbone=name, num_classes=NUM_CLASSES, sample_size=size, attention_net="tiny"
            )
        except UserError as error:
            refusal = error
            continue
        train_and_evaluate(model, size)
        return f"pass, {size[0]} px"
    return f"refused: {refusal}"


def as_attention_net(name: str) -> str:
    """Outcome as the backbone of the published attention net."""
    try:
        model = timm.create_model(
            "tasn", backbone="test_resnet", num_classes=NUM_CLASSES, sample_size=64, attention_backbone=name
        )
    except UserError as error:
        return f"refused: {error}"
    train_and_evaluate(model, (96, 96))
    net = model.attention_net
    with torch.inference_mode():
        channels, height, width = net(torch.randn(1, 3, 96, 96)).shape[1:]
    return f"pass, {height} x {width} x {channels} from {net.input_size[0]} px"


def outcome(test, name: str) -> str:
    """What `test` says of a model, or how it fails."""
    signal.signal(signal.SIGALRM, _time_is_up)
    signal.alarm(SECONDS)
    torch.manual_seed(0)
    try:
        return test(name)
    except Exception as error:  # whatever timm raises belongs into the table
        return f"FAIL: {type(error).__name__} {' '.join(str(error).split())}"
    finally:
        signal.alarm(0)


def _check(family_and_names: tuple[str, list[str]]) -> Row:
    family, names = family_and_names
    torch.set_num_threads(1)
    parameters, name = smallest(names)
    return Row(family, name, parameters, outcome(as_main, name), outcome(as_attention_net, name))


def table(rows: list[Row], command: str, seconds: float) -> str:
    lines = [
        "# Every timm family as backbone and as attention net",
        "",
        f"`{command}`, {seconds / 60:.0f} minutes; timm {timm.__version__}, torch {torch.__version__}, Python "
        f"{platform.python_version()}. What a pass is: see the script.",
        "",
        *(f"- {what}: {summary(outcomes)}" for what, outcomes in columns(rows).items()),
        "",
        "| family | model | parameters (M) | main | attention net |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        cells = (row.family, row.name, f"{row.parameters / 1e6:.1f}", row.main, row.attention)
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def columns(rows: list[Row]) -> dict[str, list[str]]:
    both = ["pass" if {_kind(row.main), _kind(row.attention)} == {"pass"} else "not both" for row in rows]
    return dict(main=[row.main for row in rows], attention=[row.attention for row in rows]) | {"in both places": both}


def summary(outcomes: list[str]) -> str:
    kinds = Counter(map(_kind, outcomes))
    return f"{kinds['pass']} of {len(outcomes)} pass" + "".join(
        f", {number} {kind}" for kind, number in sorted(kinds.items()) if kind != "pass"
    )


def _kind(result: str) -> str:
    return result.split(",")[0].split(":")[0]


def _time_is_up(signum, frame) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="timm modules; all of them, and the table is written, when none")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    start = time.monotonic()
    members = families()
    chosen = args.families or sorted(members)
    rows = []
    # New processes now and then give memory back.
    with get_context("spawn").Pool(args.processes, maxtasksperchild=8) as pool:
        for row in pool.imap(_check, [(family, members[family]) for family in chosen]):
            rows.append(row)
            print(f"{len(rows)}/{len(chosen)}", *row, sep="  ", flush=True)
    for what, outcomes in columns(rows).items():
        print(f"{what}: {summary(outcomes)}")
    if not args.families:
        text = table(rows, f"python tests/benchmarks/{Path(__file__).name}", time.monotonic() - start)
        Path(__file__).with_suffix(".md").write_text(text)
    unclear = any(_kind(cell) == "FAIL" for row in rows for cell in (row.main, row.attention))
    passed = sum({_kind(row.main), _kind(row.attention)} == {"pass"} for row in rows)
    return int(unclear or passed < REQUIRED * len(rows))


if __name__ == "__main__":
    sys.exit(main())
