"""Train TASN, or any timm model, with Hugging Face Accelerate on any number of devices.

accelerate launch train_accelerate.py                                  # the embedded dataset
accelerate launch train_accelerate.py --recipe my.yaml --data photos/  # anything else
accelerate launch train_accelerate.py --recipe my.yaml --resume auto   # go on after an interruption
python train_accelerate.py --help                                      # every option
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import astuple, replace
from pathlib import Path
from typing import NamedTuple

from accelerate import Accelerator
from accelerate.utils import broadcast, set_seed
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tasn_timm.data.loading import Batch, keyed_randomness, keyed_seed, seed_torch
from tasn_timm.data.splits import class_names
from tasn_timm.errors import Interrupted, UserError, run_command
from tasn_timm.recipe import Launch, Recipe, load_recipe, parse_args, recipe_name
from tasn_timm.training.accelerator import as_launched, create_accelerator
from tasn_timm.training.bad_images import BadImages
from tasn_timm.training.build import Parts, build_model, build_parts, crop_share, flops_of, prepare_parts
from tasn_timm.training.dry_run import estimate, temporary_output
from tasn_timm.training.evaluation import Scores, evaluate
from tasn_timm.training.gradients import Step, clip_gradient
from tasn_timm.training.loaders import Plan, batches_from, build_loaders, fingerprint, load_data, plan_epoch
from tasn_timm.training.memory import out_of_memory
from tasn_timm.training.objective import micro_batch_size
from tasn_timm.training.progress import Progress, crosses
from tasn_timm.training.run import Run, comparison_table
from tasn_timm.training.state import TrainingState, load_weights
from tasn_timm.training.stopping import StopRequest
from tasn_timm.training.zoom import ZoomProbe

# What a comparison takes over from the first recipe: data, length and machine. Optimizer, loss and augmentation stay
# the second's own, as do the model and its input.
SHARED_OPTIONS = [
    *("data", "train_split", "val_split", "test_split", "num_classes", "initial_checkpoint"),
    *("input_key", "target_key", "streaming", "max_bad_images", "decoder", "overfit_batches"),
    *("epochs", "warmup_epochs", "batch_size", "grad_accum_steps", "drop_last", "seed"),
    *("mixed_precision", "tf32", "torchcompile", "sync_bn"),
    *("workers", "cpu", "log_interval", "recovery_interval", "checkpoint_hist", "trackers"),
]


def main() -> None:
    name, recipe, launch = parse_args(sys.argv[1:])
    other = None
    if recipe.compare and not launch.validate_only:
        other = load_recipe(recipe.compare, {option: getattr(recipe, option) for option in SHARED_OPTIONS})
    accelerator = create_accelerator(recipe, other)
    accelerator.print(f"processes: {accelerator.num_processes} ({accelerator.device.type})")
    if launch.validate_only:
        return validate(name, recipe, launch, accelerator)
    temporary = temporary_output(recipe.output, accelerator) if launch.dry_run else nullcontext(recipe.output)
    with StopRequest(accelerator) as stop, temporary as output:
        runs = [train(name, replace(recipe, output=output), launch, accelerator, stop)]
        if other:  # in a folder of the first run's, so that it is resumed with it
            launch, output = replace(launch, resume=launch.resume and "auto"), str(runs[0].folder)
            runs.append(train(recipe_name(recipe.compare), replace(other, output=output), launch, accelerator, stop))
    if not launch.dry_run:
        accelerator.print(comparison_table(runs))
        accelerator.print(runs[0].how_to_load())
    accelerator.end_training()


class Built(NamedTuple):
    """A recipe, ready to train."""

    recipe: Recipe
    label_names: list[str]
    plan: Plan
    loaders: dict[str, DataLoader]
    data_config: dict
    flops: int  # of an image in evaluation
    fingerprint: str  # of the images
    parts: Parts
    scored: nn.Module  # what is evaluated and published: the model or the average of its weights, not wrapped
    predict: nn.Module  # pixels to its logits
    probe: ZoomProbe


def build(recipe: Recipe, accelerator: Accelerator) -> Built:
    """Build and prepare everything. Whatever is wrong in a recipe shows here, before anything is written."""
    set_seed(recipe.seed)
    with accelerator.local_main_process_first():  # on each machine the first process fills the cache
        splits, data = load_data(recipe)
    recipe = replace(as_launched(recipe, accelerator), data=data)
    names = class_names(splits)
    plan = plan_epoch(recipe, splits["train"])
    model = build_model(recipe, len(names))
    batch_size = micro_batch_size(recipe, accelerator.num_processes, model, plan.images % plan.group)
    loaders = build_loaders(recipe, splits, plan, batch_size, accelerator)
    data_config = resolve_model_data_config(model) | dict(
        input_size=(3, recipe.img_size, recipe.img_size),
        interpolation="bicubic",
        crop_pct=crop_share(recipe.img_size, recipe.resize or recipe.img_size),
    )
    flops = flops_of(recipe, model)
    parts = build_parts(recipe, model, plan.steps, data_config)
    scored = parts.average.module if parts.average else model
    parts = prepare_parts(parts, accelerator)
    prepared = accelerator.prepare_model(scored, evaluation_mode=True) if parts.average else parts.model
    predict = nn.Sequential(parts.normalize, prepared)
    probe = ZoomProbe(scored, loaders.get("val", loaders["train"]), parts.normalize, accelerator)
    return Built(recipe, names, plan, loaders, data_config, flops, fingerprint(splits), parts, scored, predict, probe)


def train(name: str, recipe: Recipe, launch: Launch, accelerator: Accelerator, stop: StopRequest) -> Run:
    """Train one recipe epoch by epoch, keep the best epoch's model, and test that one once."""
    with stop.suspended():
        built = build(recipe, accelerator)
    recipe, plan, loaders = built.recipe, built.plan, built.loaders
    if launch.dry_run:  # leaves nothing behind, on a tracker's server neither
        recipe = replace(recipe, trackers=[])
    run = Run(name, recipe, accelerator, built.scored, built.label_names, built.data_config, built.flops, launch.resume)
    with closing(run), out_of_memory(recipe, accelerator, built.scored, plan.images % plan.group):
        bad_images = BadImages(recipe.max_bad_images, recipe.train_split, run.folder / "bad_images.jsonl", accelerator)
        state = TrainingState(recipe, accelerator, plan, built.parts, run, bad_images, built.fingerprint)
        if not (launch.resume and state.resume(launch.resume, launch.resume_inexact)):
            run.begin()
            state.save()

        def scores(role: str) -> Scores | None:
            if role not in loaders:
                return None
            return evaluate(accelerator, built.predict.eval(), loaders[role], stop.check, launch.eval_batches)

        with nullcontext() if launch.dry_run else can_go_on():
            progress, validation = train_epochs(name, launch, accelerator, built, state, stop, scores)
            if "test" in loaders:
                run.load_best()
                run.finish(state.step, state.planned_steps, state.inexact, scores("test"))
    if launch.dry_run:
        state.resume("auto")
        accelerator.print(estimate(recipe, plan, progress, loaders, run.test_scores or validation, run.folder))
    accelerator.free_memory()
    return run


def train_epochs(
    name: str,
    launch: Launch,
    accelerator: Accelerator,
    built: Built,
    state: TrainingState,
    stop: StopRequest,
    scores: Callable[[str], Scores | None],
) -> tuple[Progress | None, Scores | None]:
    """Train the epochs that are left, each with its validation; returns the last one's averaged losses and scores.

    A signal ends them with a checkpoint.
    """
    batches = batches_from(built.loaders["train"], *astuple(state.position), built.recipe.epochs, accelerator)
    progress = validation = None
    try:
        while state.goes_on(launch.train_steps):
            epoch = state.position.epoch
            progress = train_one_epoch(name, launch, accelerator, built, state, batches, stop)
            validation = scores("val")
            state.run.end_epoch(epoch, state.step, progress, built.parts.rates, validation, built.probe.measure())
            if state.position.images < built.plan.images:
                assert state.ends_at(launch.train_steps)
                break
            state.end_epoch()
    except Interrupted:
        if not launch.dry_run:
            state.save()
        raise
    return progress, validation


@contextmanager
def can_go_on() -> Iterator[None]:
    """Say of what a signal ends that it can be gone on with."""
    try:
        yield
    except Interrupted as stopped:
        raise Interrupted(f"{stopped}; --resume auto goes on", stopped.number) from None


def train_one_epoch(
    name: str,
    launch: Launch,
    accelerator: Accelerator,
    built: Built,
    state: TrainingState,
    batches: Iterator[Batch],
    stop: StopRequest,
) -> Progress:
    """One pass over the training split, or what is left of it; returns the averaged losses."""
    recipe, plan, parts = built.recipe, built.plan, built.parts
    epoch = state.position.epoch
    parts.model.train()
    parts.freeze.begin_epoch(epoch)
    done = plan.passes_of(state.position.images)
    title = f"{name} epoch {epoch + 1}/{recipe.epochs}"
    progress = state.begin_epoch(Progress(accelerator, title, done, plan.passes_of(plan.images)))
    losses, ids = [], []  # of the forward passes of a step
    for index, batch in enumerate(progress.over(batches), start=done):
        if state.ends_at(launch.train_steps):
            state.save()
            break
        if not losses:
            group = min(plan.group, plan.images - state.position.images)  # images of this step, of all processes
            last = index + plan.passes_of(group) - 1  # forward pass of it
        state.bad_images.add(batch.bad)
        with nullcontext() if index == last else accelerator.no_sync(parts.model):
            losses.append(forward_and_backward(accelerator, built, state, batch, index, group))
        ids += batch.ids
        progress.add(losses[-1], len(batch.labels))
        if index < last:
            continue

        norm = clip_gradient(accelerator, parts.model, recipe.clip_grad)
        state.guard.check(Step(state.step + 1, epoch + 1, parts.rates["lr"], losses, ids, norm))
        parts.optimizer.step()
        parts.optimizer.zero_grad()
        losses, ids = [], []
        state.position.images += group
        parts.scheduler.step_update(state.step)
        if parts.average:
            parts.average.update(accelerator.unwrap_model(parts.model, keep_torch_compile=False), state.step)
        progress.add(dict(grad_norm=norm))
        progress.end_step(group)
        if crosses(recipe.log_interval, index + 1 - plan.passes_of(group), index + 1):
            state.guard.flush()
            means, speed = progress.end_line()
            state.run.log(state.step, **parts.rates, train=means, speed=speed)
        if crosses(recipe.recovery_interval, state.step - 1, state.step):
            state.save()
        stop.check()
    state.guard.flush()
    progress.end()
    state.bad_images.end_epoch()
    if parts.average:  # each process has averaged its own BatchNorm statistics: the main one's count, as in DDP
        broadcast(list(parts.average.module.buffers()))
    return progress


def forward_and_backward(
    accelerator: Accelerator, built: Built, state: TrainingState, batch: Batch, index: int, group: int
) -> dict[str, Tensor]:
    """Add the gradient of a batch, the `index`-th of an epoch, to that of its step's `group` images; its losses."""
    parts = built.parts
    # Dropout, mixup and the choice of parts depend on nothing but the place in the run.
    place = (built.recipe.seed, "step", state.position.epoch, index, accelerator.process_index)
    seed_torch(keyed_seed(*place))
    images, targets = parts.normalize(batch.images), batch.labels
    if parts.mix:
        with keyed_randomness(*place):
            images, targets = parts.mix(images, targets)
    loss = parts.objective(parts.model(images), targets)
    share = len(batch.labels) * accelerator.num_processes / group  # DDP averages over the processes
    accelerator.backward(state.guard.marked(loss["loss"]) * share)
    return {part: value.detach() for part, value in loss.items()}


def validate(name: str, recipe: Recipe, launch: Launch, accelerator: Accelerator) -> None:
    """Evaluate the validation split and write nothing."""
    if not launch.resume and not recipe.pretrained:
        raise UserError("--validate-only of random weights: add --resume auto (or a run's folder), or --pretrained.")
    if recipe.val_split is None:
        raise UserError("--validate-only needs a validation split: name one with --val-split.")
    built = build(recipe, accelerator)
    if launch.resume:
        load_weights(launch.resume, Path(recipe.output), name, built.scored, built.label_names, accelerator)
    with out_of_memory(recipe, accelerator, built.scored):
        scores = evaluate(accelerator, built.predict.eval(), built.loaders["val"])
    accelerator.print(json.dumps(dict(split=recipe.val_split) | scores.metrics))


if __name__ == "__main__":
    sys.exit(run_command(main))
