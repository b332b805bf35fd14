"""Runs contenders of `evidence.yaml` with the training script, and reads off what they have shown."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from .data.loading import create_loader
from .data.transforms import eval_transform
from .errors import UserError
from .evidence import Contender, Plan, Result
from .hub import load_model
from .recipe import Recipe, load_recipe
from .tasn import TASN
from .training.evaluation import count_flops
from .training.loaders import load_data

BATCH = 64  # pictures at once, of `accuracy_of_views`
DETAILS = 4  # detail images of each picture there


def run_contender(
    contender: Contender, seed: int, plan: Plan, runs: Path, script: Path, results: Mapping[tuple[str, int], Result]
) -> Result:
    """Train a contender with a seed, or go on where that was interrupted, and read off the result.

    The training is a process of its own, one on one thread, whose output is kept in log.txt beside the run's folder.

    Args:
        contender: Of the plan.
        seed: Of the run.
        plan: Has the contender that it may start from.
        runs: Folder of all runs: RUNS/CONTENDER/seedN/RECIPE.
        script: train_accelerate.py.
        results: Those there are; of the contender that it starts from there must be one.

    Raises:
        UserError: The training failed; its last words are in the message.
    """
    output = _output(runs, contender.name, seed)
    recipe_file = output / f"{Path(contender.recipe).stem}.yaml"
    options = contender.options_of(seed) | dict(output=str(output))
    if contender.start is not None:
        start = plan.contenders[contender.start]
        if (start.name, seed) not in results:
            raise UserError(f"{contender.name} starts from {start.name}, of which seed {seed} has no result.")
        options["initial_checkpoint"] = str(_folder(runs, start, seed))
    output.mkdir(parents=True, exist_ok=True)
    recipe_file.write_text(yaml.safe_dump(dict(base=contender.recipe) | options, sort_keys=False))
    load_recipe(str(recipe_file))  # a mistake in the plan is told at once
    folder = _folder(runs, contender, seed)
    if not _has_ended(folder):
        _launch([str(script), "--recipe", str(recipe_file), "--resume", "auto"], output / "log.txt")
    return read_off(contender, seed, folder)


def _output(runs: Path, contender: str, seed: int) -> Path:
    return (runs / contender / f"seed{seed}").absolute()


def _folder(runs: Path, contender: Contender, seed: int) -> Path:
    return _output(runs, contender.name, seed) / Path(contender.recipe).stem


def _has_ended(folder: Path) -> bool:
    return any("test" in line for line in _metrics(folder))


def _metrics(folder: Path) -> list[dict[str, Any]]:
    """Lines of a run's log; none before it has one, and without the last one where a crash has torn it."""
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def _launch(arguments: list[str], log: Path) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    command += ["--num_cpu_threads_per_process", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    environment = os.environ | dict(OMP_NUM_THREADS="1")
    with log.open("a") as file:
        print("$", shlex.join(arguments), file=file, flush=True)
        code = subprocess.run([*command, *arguments], stdout=file, stderr=subprocess.STDOUT, env=environment).returncode
    if code:
        said = [line for line in log.read_text().splitlines() if line.strip()]
        last = next((line for line in reversed(said) if not line.startswith((" ", "Traceback", "subprocess."))), "")
        raise UserError(f"training ended with exit code {code}: {last} (all of it is in {str(log)!r}).")


def read_off(contender: Contender, seed: int, folder: Path) -> Result:
    """What a finished run has shown."""
    metrics, model = _metrics(folder), load_model(str(folder))
    recipe = load_recipe(str(folder / "recipe.yaml"))
    epochs = [line for line in metrics if "epoch" in line]
    size = model.pretrained_cfg["input_size"]
    environment = json.loads((folder / "environment.json").read_text())
    kept = ("commit", "versions", "python", "machine", "cpu", "device", "system", "mixed_precision")
    return Result(
        contender=contender.name,
        seed=seed,
        recipe=contender.recipe,
        options=contender.options_of(seed),
        start=contender.start,
        top1=metrics[-1]["test"]["top1"],
        images=metrics[-1]["test"]["images"],
        validation=[round(line["validation"]["top1"], 3) for line in epochs],
        train_loss=[round(line["train"]["loss"], 4) for line in epochs],
        views=accuracy_of_views(model, recipe),
        mflops=round(count_flops(model, size) / 1e6, 2),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        steps=metrics[-1]["step"],
        images_per_second=sorted(line["speed"]["images_per_second"] for line in epochs)[len(epochs) // 2],
        environment={name: environment.get(name) for name in kept},
    )


def accuracy_of_views(model: nn.Module, recipe: Recipe) -> dict[str, float] | None:
    """Top-1 of each classifier on each view of the validation split, per cent; None without both nets.

    None with split_bn, too: in evaluation it has the structure images' statistics alone.

    A part net that recognises unseen details no better than the master net does the structure has nothing to teach.

    Returns:
        "shared_on_structure" (the prediction), "master_on_structure", "part_on_detail" (one random detail of each
        picture), "part_on_details" (the mean of four details' logits), "shared_on_detail".
    """
    if not isinstance(model, TASN) or not (model.part_net and model.master_net) or model.split_bn:
        return None
    split = load_data(recipe)[0]["val"]
    loader = create_loader(split, eval_transform(recipe.img_size, recipe.resize), BATCH)
    torch.manual_seed(0)
    model.eval().trilinear_attention.train()  # which draws details in training mode alone
    right: dict[str, int] = {}
    with torch.inference_mode():
        for batch in loader:
            for name, logits in _logits_of_views(model, batch.images[0]).items():
                right[name] = right.get(name, 0) + int((logits.argmax(1) == batch.labels).sum())
    return {name: round(100 * count / len(split), 2) for name, count in right.items()}


def _logits_of_views(model: TASN, pixels: Tensor) -> dict[str, Tensor]:
    features = model.attention_features(pixels)
    parts = []
    for _ in range(DETAILS):
        pooled = model.embed(model.views(pixels, features))
        structure, detail = pooled[: len(pixels)], pooled[len(pixels) : 2 * len(pixels)]
        shared, master, part, shared_part = model.heads.forward_views(structure, detail)
        parts.append(part)
    return dict(
        shared_on_structure=shared,
        master_on_structure=master,
        part_on_detail=part,
        part_on_details=torch.stack(parts).mean(0),
        shared_on_detail=shared_part,
    )
