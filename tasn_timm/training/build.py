"""What a recipe says, as objects: the model, and all that trains it."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from timm.data import Mixup
from timm.layers import convert_sync_batchnorm
from timm.optim import create_optimizer_v2, get_optimizer_info
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import Optimizer

from ..backbone import backbone_cfg, refuse_places
from ..data.transforms import Normalize
from ..errors import UserError
from ..hub import check_folder, model_folder
from ..memory import lacks_memory
from ..recipe import Recipe
from ..starting_point import common_license
from ..tasn import TASN, structure_norm
from ..weights import CONFIG, weights_in
from .evaluation import count_flops
from .freezing import FreezeSchedule
from .objective import Objective, create_objective


class Parts(NamedTuple):
    """What an update takes."""

    model: nn.Module
    objective: Objective
    optimizer: Optimizer
    scheduler: Scheduler
    normalize: nn.Module
    average: ModelEmaV3 | None  # of the weights
    mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None  # images and labels with others of the batch
    freeze: FreezeSchedule

    @property
    def rates(self) -> dict[str, float]:
        """Learning rate "lr"; where groups of parameters have their own, the highest one, and "lr_lowest"."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        return dict(lr=max(rates)) | (dict(lr_lowest=min(rates)) if min(rates) < max(rates) else {})


def build_model(recipe: Recipe, classes: int) -> nn.Module:
    """Create the recipe's timm model for the dataset's classes."""
    if recipe.num_classes not in (None, classes):
        raise UserError(
            f"num_classes is {recipe.num_classes}, but dataset {recipe.data!r} has {classes} classes: set num_classes "
            f"to {classes}, or to null for any."
        )
    refuse_places("model_kwargs", recipe.model_kwargs)
    if recipe.model.startswith("local-dir:"):
        check_folder(Path(recipe.model.removeprefix("local-dir:")))
        if not recipe.pretrained:
            raise UserError(
                f"model {recipe.model} without pretrained would start from random weights: add --pretrained."
            )
    elif not recipe.model.startswith("hf-hub:"):
        backbone_cfg(recipe.model)  # fails with the names that come close
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
    if recipe.initial_checkpoint is not None:
        start_from(model, Path(recipe.initial_checkpoint))
    model.pretrained_cfg["license"] = _license(recipe, model)
    if recipe.sync_bn and getattr(model, "split_bn", False):
        raise UserError("sync_bn would take the place of split_bn's norms: leave out one of them.")
    if recipe.sync_bn:
        model = convert_sync_batchnorm(model)
    return model.to(memory_format=torch.channels_last) if recipe.channels_last else model


def _license(recipe: Recipe, model: nn.Module) -> str | None:
    """`common_license` of the weights that a model starts from.

    timm's own is of the pretrained weights, whether they were asked for or not.
    """
    licenses = [model.pretrained_cfg.get("license")] if recipe.pretrained else []
    if recipe.initial_checkpoint is not None:
        config = json.loads((model_folder(Path(recipe.initial_checkpoint)) / CONFIG).read_text())
        licenses.append(config.get("pretrained_cfg", {}).get("license"))
    return common_license(licenses)


def start_from(model: nn.Module, folder: Path) -> None:
    """Give a model the weights of another one of ours, or of a plain timm model, that have the same names and shapes.

    A TASN's backbone and a plain timm model's weights are the same thing. Classifiers stay new. What the other one does
    not have at all (a plain model's attention net) stays as it is.

    Args:
        model: As created.
        folder: Of a run, for its best/, or of a model.

    Raises:
        UserError: There is no such model, or its backbone or attention net is another one.
    """
    folder = model_folder(folder)
    given = load_file(weights_in(folder))
    if not any(name.startswith("backbone.") for name in given):
        given = {f"backbone.{name}": value for name, value in given.items()}
    own = model.state_dict()
    ours = any(name.startswith("backbone.") for name in own)
    classifiers = model.pretrained_cfg["classifier"]
    classifiers = tuple(f"{name}." for name in ([classifiers] if isinstance(classifiers, str) else classifiers))
    parts = {name.split(".")[0] for name in given}
    taken, missing = {}, []
    for name, value in own.items():
        source = name if ours else f"backbone.{name}"
        if name.startswith(classifiers) or source.split(".")[0] not in parts:
            continue
        if source not in given:  # the details' own norms of split_bn start as those of the structure image
            source = structure_norm(source)
        if source not in given or given[source].shape != value.shape:
            missing.append(name)
        else:
            taken[name] = given[source]
    if missing:
        more = f", nor {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"initial_checkpoint {str(folder)!r} is another network: it has no {missing[0]} of that shape{more}. Give "
            f"one with the same backbone and attention net."
        )
    model.load_state_dict(own | taken)


def flops_of(recipe: Recipe, model: nn.Module) -> int:
    """`count_flops` of a recipe's model, which also tells whether it takes the recipe's pictures.

    Raises:
        UserError: It does not: a ViT is made for one size.
    """
    try:
        return count_flops(model, (3, recipe.img_size, recipe.img_size))
    except UserError:
        raise
    except (AssertionError, RuntimeError, ValueError) as error:
        if lacks_memory(error):
            raise
        reason = " ".join(str(error).split())
        raise UserError(
            f"{recipe.model} does not take pictures of img_size {recipe.img_size}: {reason} Use another img_size here, "
            f"or img_size={recipe.img_size} in model_kwargs where the model has it."
        ) from error


def crop_share(img_size: int, resize: int) -> float:
    """timm's crop_pct for a crop of img_size from a short side of resize; timm rounds img_size / crop_pct down."""
    share = img_size / resize
    return share if math.floor(img_size / share) == resize else math.nextafter(share, 0)


def build_parts(recipe: Recipe, model: nn.Module, updates: int, data_config: dict) -> Parts:
    """All that trains a model which makes so many updates an epoch, for pictures of timm's `data_config`."""
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
    mix = _mixup(recipe, model)
    return Parts(
        model=model,
        objective=create_objective(model, recipe),
        optimizer=optimizer,
        scheduler=scheduler,
        normalize=Normalize(data_config["mean"], data_config["std"], isinstance(model, TASN) and mix is None),
        # With power 1 the decay of step n is at most (n - 1) / n, which makes the mean of all weights so far. Without a
        # warm-up much of the first weights would be left of a short training.
        average=recipe.model_ema_decay
        and ModelEmaV3(model, recipe.model_ema_decay, use_warmup=True, warmup_gamma=1.0, warmup_power=1.0),
        mix=mix,
        freeze=FreezeSchedule(model, recipe.freeze, recipe.epochs),
    )


def _mixup(recipe: Recipe, model: nn.Module) -> Mixup | None:
    if not recipe.mixup and not recipe.cutmix:
        return None
    return Mixup(recipe.mixup, recipe.cutmix, label_smoothing=recipe.smoothing, num_classes=model.num_classes)


def prepare_parts(parts: Parts, accelerator: Accelerator) -> Parts:
    """Bring them to the device and wrap them for all processes.

    Not the scheduler, which Accelerate would step once per process. An average is not trained, so it is compiled and
    computes in mixed precision without being wrapped for several processes.
    """
    return parts._replace(
        model=accelerator.prepare(parts.model),
        optimizer=accelerator.prepare(parts.optimizer),
        normalize=parts.normalize.to(accelerator.device),
        average=parts.average and parts.average.to(accelerator.device),
    )
