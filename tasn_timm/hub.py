"""Trained models: saved as folders in timm's Hub format (config.json, model.safetensors and a card), loaded by name."""

import copy
import json
import os
import shutil
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError
from timm.models import save_for_hf
from torch import nn

from .backbone import backbone_cfg
from .card import Context, Measured, model_card
from .classifier import BackboneClassifier
from .errors import UserError, unknown
from .files import digest
from .hub_config import HUB_CONFIGS
from .hub_errors import reason_of
from .tasn import TASN
from .weights import CONFIG, WEIGHTS, download, expected_digest
from .zoo import CONFIGS


def save_folder(
    model: nn.Module,
    folder: Path,
    *,
    label_names: list[str],
    data_config: dict,
    recipe: str | None = None,
    dataset: str | None = None,
    measured: Measured | None = None,
) -> None:
    """Write a model as `timm.create_model("local-dir:FOLDER", pretrained=True)` and the Hub take it.

    The folder appears, or takes the place of an older model, only when it is complete.

    Args:
        model: A timm model, not wrapped.
        folder: Where to.
        label_names: Names of its classes, in order.
        data_config: timm's input_size, mean, std, interpolation and crop_pct of the pictures it was trained on.
        recipe: Name of the recipe that it was trained with, for the "tasn" block of config.json.
        dataset: What `load_splits` takes for the data it was trained on, for the same block.
        measured: For README.md, the card; None for a folder without one.
    """
    if folder.exists() and not (folder / CONFIG).is_file():
        raise UserError(f"{str(folder)!r} exists and is not a model folder: choose another one.")
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    # safetensors takes contiguous tensors only, and training may have made them channels_last.
    plain = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    try:
        save_for_hf(
            plain,
            str(aside),
            model_config=dict(label_names=label_names),
            safe_serialization=True,
            data_config=data_config,
        )
        _complete_config(plain, aside, recipe, dataset)
        if measured is not None:
            context = Context(
                title=folder.resolve().parent.name,
                source=f"local-dir:{folder}",
                license=plain.pretrained_cfg.get("license"),
            )
            (aside / "README.md").write_text(model_card(plain, measured, context), encoding="utf-8")
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    if folder.exists():
        old = aside.with_name(f"{aside.name}.old")
        folder.rename(old)
        aside.rename(folder)
        shutil.rmtree(old)
    else:
        aside.rename(folder)


def check_folder(folder: Path) -> None:
    """Check that a `local-dir:` folder holds a model, before timm is asked for it.

    Raises:
        UserError: The folder, its config.json or its model.safetensors is missing.
    """
    if not folder.is_dir():
        raise UserError(f"there is no model folder {str(folder)!r}: give the folder that training wrote.")
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"model folder {str(folder)!r} has no {name}: give a complete one, such as RUN/best.")


def model_folder(folder: Path) -> Path:
    """The folder of a model, or of a run's best one.

    Raises:
        UserError: It holds none, see `check_folder`.
    """
    if not (folder / CONFIG).is_file() and (folder / "best").is_dir():
        folder /= "best"
    check_folder(folder)
    return folder


def load_model(source: str) -> nn.Module:
    """Load a trained classifier.

    Args:
        source: A folder as training writes it (RUN/best, or RUN for its best/), "local-dir:FOLDER",
            "hf-hub:user/name", or a timm name with or without a tag. Of a folder and a timm model of the same name, it
            is the model; write "./NAME" for the folder.

    Returns:
        The model in evaluation mode, on the CPU.

    Raises:
        UserError: There is no such model, it cannot be read, or it is one of ours without a trained classifier.
    """
    name = _timm_name(source)
    # timm would not tell what is wrong with a config.json, or in many lines.
    if name.startswith("hf-hub:"):
        expected_digest(download(name.removeprefix("hf-hub:"), CONFIG))
    elif name.startswith("local-dir:"):
        expected_digest(Path(name.removeprefix("local-dir:")) / CONFIG)
    if ":" not in name and name.startswith(("tasn", "isqrt_cov")):
        cfg = backbone_cfg(name)
        config = CONFIGS.get(f"{cfg.architecture}.{cfg.tag}")
        if not cfg.label_names and not (config and config.tasn.recipe):
            raise _untrained(source)  # before its backbones are downloaded
    try:
        model = timm.create_model(name, pretrained=True)
    except UserError:
        raise
    except (RuntimeError, OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise UserError(f"model {source!r} cannot be loaded: {reason_of(error)}") from error
    if isinstance(model, BackboneClassifier) and not model.pretrained_cfg.get("label_names"):
        raise _untrained(source)
    return model.eval()


def trained_on(source: str) -> str | None:
    """Read the dataset that a model was trained on.

    Args:
        source: As in `load_model`.

    Returns:
        What `load_splits` takes; None where neither a folder's config.json nor hub_configs/ says it.
    """
    name = _timm_name(source)
    if name.startswith("hf-hub:"):
        path = download(name.removeprefix("hf-hub:"), CONFIG)
    elif name.startswith("local-dir:"):
        path = Path(name.removeprefix("local-dir:")) / CONFIG
    else:
        cfg = backbone_cfg(name)
        path = HUB_CONFIGS / f"{cfg.architecture}.{cfg.tag}.json"
    try:
        config = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"model {source!r} cannot be loaded: {path} is not JSON ({error}).") from error
    tasn = config.get("tasn") or {}
    dataset, revision = tasn.get("dataset"), tasn.get("dataset_revision")
    return f"{dataset}@{revision}" if revision else dataset


def _timm_name(source: str) -> str:
    """What timm.create_model takes for a model; checks that its folder or its name exists."""
    if source.startswith("hf-hub:"):
        return source
    is_folder = source.startswith("local-dir:") or "/" in source or Path(source).is_dir()
    if not is_folder or timm.is_model(source):
        if ":" in source:
            raise unknown("kind of model", source.split(":")[0] + ":", ("hf-hub:", "local-dir:"))
        try:
            backbone_cfg(source)
        except UserError as error:  # with the names that come close
            raise UserError(f"{error} A model is a folder of training, hf-hub:user/name or a timm name.") from error
        return source
    return f"local-dir:{model_folder(Path(source.removeprefix('local-dir:')))}"


def _untrained(source: str) -> UserError:
    return UserError(
        f"model {source!r} has no trained classifier, only the ImageNet weights of its backbones to start from: train "
        f"it first, and give the folder that training writes (RUN/best)."
    )


def _complete_config(model: nn.Module, folder: Path, recipe: str | None, dataset: str | None) -> None:
    path = folder / CONFIG
    config = json.loads(path.read_text())
    arguments = config.get("model_args", {})
    # transformers passes num_classes itself and beside model_args, which fails when it is in both (seen with 5.23 and
    # timm 1.0.31). timm itself reads it from pretrained_cfg.
    arguments.pop("num_classes", None)
    if isinstance(model, TASN):  # every argument of it, so that later layouts cannot change a saved model
        arguments.pop("attention_backbone", None)
        arguments["attention_args"] = model.attention_layout | dict(layout=arguments["attention_net"])
    config["tasn"] = dict(recipe=recipe, dataset=dataset, sha256=digest(folder / WEIGHTS))
    path.write_text(json.dumps(config, indent=2) + "\n")
