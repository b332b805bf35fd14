"""Train TASN, or any timm model, with Hugging Face Accelerate on any number of devices.

accelerate launch train_accelerate.py                                  # the embedded dataset
accelerate launch train_accelerate.py --recipe my.yaml --data photos/  # anything else
python train_accelerate.py --help                                      # every option
"""

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, broadcast, set_seed
from timm.data import resolve_model_data_config
from timm.optim import create_optimizer_v2, get_optimizer_info
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

import tasn_timm
from tasn_timm.data.loading import keyed_seed, seed_torch
from tasn_timm.data.splits import class_names
from tasn_timm.data.transforms import Normalize
from tasn_timm.errors import UserError, run_command
from tasn_timm.hub import check_folder
from tasn_timm.recipe import Recipe, load_recipe, parse_args, recipe_name
from tasn_timm.training.bad_images import BadImages
from tasn_timm.training.evaluation import evaluate
from tasn_timm.training.loaders import build_loaders, load_data
from tasn_timm.training.objective import Objective, create_objective, micro_batch_size
from tasn_timm.training.progress import Progress
from tasn_timm.training.run import Run, comparison_table

# What a comparison takes over from the first recipe, so that only the model and its input differ.
SHARED_OPTIONS = [
    *("data", "train_split", "val_split", "test_split", "num_classes"),
    *("input_key", "target_key", "streaming", "max_bad_images", "decoder"),
    *("epochs", "warmup_epochs", "batch_size", "grad_accum_steps", "seed", "mixed_precision"),
    *("workers", "cpu", "log_interval", "output"),
]


def main() -> None:
    name, recipe = parse_args(sys.argv[1:])
    accelerator = Accelerator(
        cpu=recipe.cpu,
        mixed_precision=recipe.mixed_precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=recipe.grad_accum_steps),
    )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("mixed_precision fp16 has no effect on a CPU: use bf16 or no.")
    accelerator.print(f"processes: {accelerator.num_processes} ({accelerator.device.type})")
    recipes = [(name, recipe)]
    if recipe.compare:
        shared = {option: getattr(recipe, option) for option in SHARED_OPTIONS}
        recipes.append((recipe_name(recipe.compare), load_recipe(recipe.compare, shared)))
    runs = [train(name, recipe, accelerator) for name, recipe in recipes]
    accelerator.print(comparison_table(runs))
    accelerator.print(runs[0].how_to_load())
    accelerator.end_training()


def train(name: str, recipe: Recipe, accelerator: Accelerator) -> Run:
    """Train one recipe epoch by epoch, keep the best epoch's model, and test that one once."""
    # Build. Whatever is wrong in a recipe shows here, before anything is written.
    set_seed(recipe.seed)
    with accelerator.local_main_process_first():  # on each machine the first process fills the cache
        splits, data = load_data(recipe)
    recipe = replace(recipe, data=data)
    names = class_names(splits)
    model = build_model(recipe, len(names))
    batch_size = micro_batch_size(recipe, accelerator.num_processes, model)
    loaders = build_loaders(recipe, splits, batch_size, accelerator)
    data_config = resolve_model_data_config(model) | dict(
        input_size=(3, recipe.img_size, recipe.img_size),
        interpolation="bicubic",
        crop_pct=crop_share(recipe.img_size, recipe.resize or recipe.img_size),
    )
    parts = build_parts(recipe, model, len(loaders["train"]) // recipe.grad_accum_steps, data_config)
    scored = parts.average.module if parts.average else model  # evaluated and saved
    run = Run(name, recipe, accelerator, scored, names, data_config)

    bad_images = BadImages(recipe.max_bad_images, recipe.train_split, run.folder / "bad_images.jsonl", accelerator)

    # Prepare. Not the scheduler: Accelerate would step it once per process.
    parts = parts._replace(
        model=accelerator.prepare(parts.model),
        optimizer=accelerator.prepare(parts.optimizer),
        normalize=parts.normalize.to(accelerator.device),
        average=parts.average and parts.average.to(accelerator.device),
    )
    scored = accelerator.prepare_model(scored, evaluation_mode=True) if parts.average else parts.model
    predict = nn.Sequential(parts.normalize, scored)
    for epoch in range(recipe.epochs):
        loaders["train"].set_epoch(epoch)
        progress = train_one_epoch(name, recipe, accelerator, epoch, parts, loaders["train"], bad_images)
        scores = evaluate(accelerator, predict.eval(), loaders["val"]) if "val" in loaders else None
        run.end_epoch(epoch, progress, parts.optimizer.param_groups[0]["lr"], scores)
    if "test" in loaders:
        run.load_best()
        run.finish(evaluate(accelerator, predict.eval(), loaders["test"]))
    accelerator.free_memory()
    return run


class Parts(NamedTuple):
    """What an update takes."""

    model: nn.Module
    objective: Objective
    optimizer: Optimizer
    scheduler: Scheduler
    normalize: nn.Module
    average: ModelEmaV3 | None  # of the weights


def train_one_epoch(
    name: str,
    recipe: Recipe,
    accelerator: Accelerator,
    epoch: int,
    parts: Parts,
    loader: DataLoader,
    bad_images: BadImages,
) -> Progress:
    """One pass over the training split; returns the averaged losses."""
    parts.model.train()
    progress = Progress(accelerator, f"{name} epoch {epoch + 1}/{recipe.epochs}", recipe.log_interval)
    update = epoch * len(loader) // recipe.grad_accum_steps
    for step, (images, labels, bad) in enumerate(progress.over(loader)):
        bad_images.add(bad)
        # Dropout and the choice of parts depend on nothing but the place in the run.
        seed_torch(keyed_seed(recipe.seed, "step", epoch, step, accelerator.process_index))
        with accelerator.accumulate(parts.model):
            losses = parts.objective(parts.model(parts.normalize(images)), labels)
            accelerator.backward(losses["loss"])
            if accelerator.sync_gradients and recipe.clip_grad is not None:
                accelerator.clip_grad_norm_(parts.model.parameters(), recipe.clip_grad)
            parts.optimizer.step()
            parts.optimizer.zero_grad()
        if accelerator.sync_gradients:
            update += 1
            parts.scheduler.step_update(update)
            if parts.average:
                parts.average.update(accelerator.unwrap_model(parts.model))
        progress.add(losses)
    bad_images.end_epoch()
    if parts.average:  # each process has averaged its own BatchNorm statistics: the main one's count, as in DDP
        broadcast(list(parts.average.module.buffers()))
    return progress


def build_model(recipe: Recipe, classes: int) -> nn.Module:
    """Create the recipe's timm model for the dataset's classes."""
    if recipe.num_classes not in (None, classes):
        raise UserError(
            f"num_classes is {recipe.num_classes}, but dataset {recipe.data!r} has {classes} classes: set num_classes "
            f"to {classes} or leave it out."
        )
    if recipe.model.startswith("local-dir:"):
        check_folder(Path(recipe.model.removeprefix("local-dir:")))
        if not recipe.pretrained:
            raise UserError(
                f"model {recipe.model} without pretrained would start from random weights: add --pretrained."
            )
    elif not recipe.model.startswith("hf-hub:"):
        tasn_timm.backbone_cfg(recipe.model)  # fails with the names that come close
    try:
        model = timm.create_model(recipe.model, recipe.pretrained, num_classes=classes, **recipe.model_kwargs)
    except UserError:
        raise
    except (TypeError, ValueError, AssertionError) as error:  # timm's ways to refuse an argument
        raise UserError(f"model_kwargs {recipe.model_kwargs} do not fit {recipe.model}: {error}.") from error
    except (RuntimeError, OSError) as error:  # no such weights, or no way to get them
        raise UserError(f"model {recipe.model} cannot be made: {' '.join(str(error).split())}") from error
    if model.in_chans != 3:
        raise UserError(f"model_kwargs in_chans={model.in_chans}: pictures have 3 channels here; leave it out.")
    smallest = max(getattr(model, "sample_size", (0,)))
    if recipe.img_size < smallest:
        raise UserError(
            f"img_size {recipe.img_size} is smaller than the {smallest} pixels that {recipe.model} samples from it: "
            f"use img_size {smallest} or more, or a smaller sample_size in model_kwargs."
        )
    return model.to(memory_format=torch.channels_last) if recipe.channels_last else model


def crop_share(img_size: int, resize: int) -> float:
    """timm's crop_pct for a crop of img_size from a short side of resize; timm rounds img_size / crop_pct down."""
    share = img_size / resize
    return share if math.floor(img_size / share) == resize else math.nextafter(share, 0)


def build_parts(recipe: Recipe, model: nn.Module, updates: int, data_config: dict) -> Parts:
    """Objective, optimizer and scheduler of a model that makes so many updates an epoch."""
    arguments = dict(
        lr=recipe.lr, weight_decay=recipe.weight_decay, momentum=recipe.momentum, layer_decay=recipe.layer_decay
    )
    try:
        optimizer = create_optimizer_v2(model, recipe.opt, **arguments, **recipe.opt_kwargs)
    except (TypeError, ValueError, AssertionError) as error:
        momentum = f"momentum {recipe.momentum} and " if get_optimizer_info(recipe.opt).has_momentum else ""
        given = f"{momentum}opt_kwargs {recipe.opt_kwargs}"
        raise UserError(f"opt {recipe.opt} does not take {given}: {error}.") from error
    scheduler, _ = create_scheduler_v2(
        optimizer,
        recipe.sched,
        num_epochs=recipe.epochs,
        warmup_epochs=recipe.warmup_epochs,
        warmup_lr=recipe.warmup_lr,
        min_lr=recipe.min_lr,
        decay_milestones=recipe.decay_milestones,
        decay_rate=recipe.decay_rate,
        step_on_epochs=False,
        updates_per_epoch=updates,
    )
    return Parts(
        model=model,
        objective=create_objective(model, recipe),
        optimizer=optimizer,
        scheduler=scheduler,
        normalize=Normalize(data_config["mean"], data_config["std"]),
        average=ModelEmaV3(model, decay=recipe.model_ema_decay) if recipe.model_ema_decay else None,
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
