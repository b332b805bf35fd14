"""Trains contenders of `evidence.yaml` with the training script, and reads off what they have shown."""

import json
import os
import shlex
import statistics
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch
import yaml
from filelock import FileLock, Timeout
from torch import Tensor, nn

from .data.loading import create_loader
from .data.transforms import eval_transform
from .errors import UserError
from .evidence import Contender, Result, same_options, what_counts
from .files import digest
from .finished_run import read_metrics, read_run
from .hub import load_model
from .recipe import Recipe, load_recipe, recipe_name
from .tasn import TASN
from .training.evaluation import count_flops
from .training.loaders import load_data
from .weights import WEIGHTS

START = "start.sha256"  # beside a run: of the weights that it starts from
BATCH = 64  # pictures at once, of `accuracy_of_views`
DETAILS = 4  # detail images of each picture there
KEPT = ("versions", "python", "machine", "cpu", "gpu", "device", "system", "mixed_precision")  # of environment.json


def run_folder(runs: Path, contender: Contender, seed: int) -> Path:
    """Where a run is: RUNS/CONTENDER/seedN/RECIPE, as the training script names it."""
    return (runs / contender.name / f"seed{seed}" / recipe_name(contender.recipe)).absolute()


def weights_of(folder: Path) -> str | None:
    """SHA-256 of the best weights of a run; None where it has none yet."""
    weights = folder / "best" / WEIGHTS
    return digest(weights) if weights.is_file() else None


def train(contender: Contender, seed: int, folder: Path, script: Path, start: Path | None) -> None:
    """Train a contender with a seed, go on where that was interrupted, or do nothing where it has ended.

    The training is a process of its own, on one thread, whose output is kept in log.txt beside the run's folder.

    Args:
        contender: What is trained.
        seed: Of the run.
        folder: See `run_folder`.
        script: train_accelerate.py.
        start: Folder of the run that it starts from.

    Raises:
        UserError: The folder has a run of other options or from another start, somebody else is training it, or the
            training failed, with its last words.
    """
    output = folder.parent
    recipe = contender.recipe_of(seed)
    recipe_file = output / f"{folder.name}.yaml"
    known, weights = output / START, start and weights_of(start)
    if (folder / "recipe.yaml").is_file():
        # Not its own recipe.yaml, which names data of the Hub with their commit.
        if not same_options(what_counts(load_recipe(str(recipe_file))), recipe):
            raise UserError(f"{str(folder)!r} has a run of other options: remove it, and it is run again.")
        if start and (not known.is_file() or known.read_text() != weights):
            raise UserError(f"{str(folder)!r} has not this start, or none known: remove it, and it is run again.")
        if _has_ended(folder):
            return
    output.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(output / ".lock", timeout=0):
            if start:
                known.write_text(weights)
            placed = replace(recipe, output=str(output), initial_checkpoint=start and str(start))
            recipe_file.write_text(yaml.safe_dump(asdict(placed), sort_keys=False))
            _launch([str(script), "--recipe", str(recipe_file), "--resume", "auto"], output / "log.txt")
    except Timeout:
        raise UserError(f"{str(output)!r} is being trained by another command: wait for its end.") from None


def _has_ended(folder: Path) -> bool:
    return (folder / "metrics.jsonl").is_file() and any("test" in line for line in read_metrics(folder))


def _launch(arguments: list[str], log: Path) -> None:
    with log.open("a") as file:
        print("$", shlex.join(arguments), file=file, flush=True)
        options = dict(stdout=file, stderr=subprocess.STDOUT, env=os.environ | dict(OMP_NUM_THREADS="1"))
        code = subprocess.run([sys.executable, *arguments], **options).returncode
    if code:
        said = [line for line in log.read_text().splitlines() if line.strip()]
        raise UserError(f"training ended with exit code {code}: {said[-1]} (all of it is in {str(log)!r}).")


def read_off(contender: Contender, seed: int, folder: Path, start: Path | None) -> Result:
    """What a run that has ended has shown.

    Args:
        contender: What was trained.
        seed: Of the run.
        folder: See `run_folder`.
        start: Folder of the run that it started from.

    Raises:
        UserError: It has not ended as its recipe says: cut short, or resumed with other settings.
    """
    run, metrics, model = read_run(folder), read_metrics(folder), load_model(str(folder))
    if run.steps < run.planned_steps or run.inexact:
        raise UserError(f"run {str(folder)!r} was cut short or resumed inexactly: remove it, and it is run again.")
    epochs = [line for line in metrics if "epoch" in line]
    environment = json.loads((folder / "environment.json").read_text())
    commits = [each.get("commit") for each in (environment, *environment.get("resumed", []))]
    return Result(
        contender=contender.name,
        seed=seed,
        recipe=contender.recipe,
        options=what_counts(contender.recipe_of(seed)),
        start=contender.start,
        start_weights=start and weights_of(start),
        weights=weights_of(folder),
        top1=run.test["top1"],
        images=run.test["images"],
        validation=[round(line["validation"]["top1"], 3) for line in epochs],
        train_loss=[round(line["train"]["loss"], 4) for line in epochs],
        views=accuracy_of_views(model, run.recipe),
        mflops=round(count_flops(model, model.pretrained_cfg["input_size"]) / 1e6, 2),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        steps=run.steps,
        images_per_second=statistics.median(line["speed"]["images_per_second"] for line in epochs),
        environment={name: environment.get(name) for name in KEPT} | dict(commits=sorted({*filter(None, commits)})),
    )


def accuracy_of_views(model: nn.Module, recipe: Recipe) -> dict[str, float] | None:
    """Top-1 of each classifier on each view of the validation split, per cent; None without both nets.

    None with split_bn, too: in evaluation it has the structure images' statistics alone.

    A part net that recognises unseen details no better than the master net does the structure has nothing to teach.
    In float32, whatever the run was trained in.

    Returns:
        "prediction" (predicting classifier, structure), "master_on_structure", "part_on_detail" (one random detail of
        each picture), "part_on_details" (the mean of four details' logits), "prediction_on_detail" (the shared
        classifier). With one pair of classifiers the second is the first, and the last the third.
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
        prediction=shared,
        master_on_structure=shared if master is None else master,
        part_on_detail=part,
        part_on_details=torch.stack(parts).mean(0),
        prediction_on_detail=part if shared_part is None else shared_part,
    )
