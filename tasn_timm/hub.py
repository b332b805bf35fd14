"""Trained models as folders in timm's Hub format: config.json, model.safetensors and a card."""

import copy
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import EvalResult, ModelCardData
from timm.models import save_for_hf
from torch import nn

from .errors import UserError


@dataclass
class Measured:
    """What a card says about a model."""

    dataset: str
    split: str
    images: int
    top1: float  # percent
    top5: float | None  # percent
    recipe: str
    command: str
    gflops: float  # per image

    @property
    def metrics(self) -> dict[str, float]:
        values = dict(top1=self.top1, top5=self.top5)
        return {name: value for name, value in values.items() if value is not None}


def save_folder(
    model: nn.Module,
    folder: Path,
    *,
    label_names: list[str],
    data_config: dict,
    measured: Measured | None = None,
) -> None:
    """Write a model as `timm.create_model("local-dir:FOLDER", pretrained=True)` and the Hub take it.

    The folder appears, or takes the place of an older model, only when it is complete.

    Args:
        model: A timm model, not wrapped.
        folder: Where to.
        label_names: Names of its classes, in order.
        data_config: timm's input_size, mean, std, interpolation and crop_pct of the pictures it was trained on.
        measured: For README.md, the card; None for a folder without one.
    """
    if folder.exists() and not (folder / "config.json").is_file():
        raise UserError(f"{str(folder)!r} exists and is not a model folder: choose another one.")
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    # safetensors takes contiguous tensors only, and training may have made them channels_last.
    plain = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    save_for_hf(
        plain,
        str(aside),
        model_config=dict(label_names=label_names),
        safe_serialization=True,
        data_config=data_config,
    )
    _drop_num_classes(aside / "config.json")
    if measured is not None:
        _write_card(plain, aside, folder, measured)
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
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise UserError(f"model folder {str(folder)!r} has no {name}: give a complete one, such as RUN/best.")


def _drop_num_classes(path: Path) -> None:
    # transformers passes num_classes itself and beside model_args, which fails when it is in both (seen with 5.23 and
    # timm 1.0.31). timm itself reads it from pretrained_cfg.
    config = json.loads(path.read_text())
    config.get("model_args", {}).pop("num_classes", None)
    path.write_text(json.dumps(config, indent=2) + "\n")


def _write_card(model: nn.Module, aside: Path, folder: Path, measured: Measured) -> None:
    data = ModelCardData(
        model_name=folder.resolve().parent.name,
        library_name="timm",
        tags=["image-classification", "timm", "tasn", "fine-grained"],
        eval_results=[
            EvalResult(
                task_type="image-classification",
                dataset_type=measured.dataset,
                dataset_name=measured.dataset,
                dataset_split=measured.split,
                metric_type="accuracy",
                metric_name=f"{name} (%)",
                metric_value=round(value, 2),
            )
            for name, value in measured.metrics.items()
        ],
    )
    accuracy = ", ".join(f"{name} {value:.2f} %" for name, value in measured.metrics.items())
    parameters = sum(p.numel() for p in model.parameters())
    text = f"""---
{data.to_yaml()}
---

# {data.model_name}

`{model.pretrained_cfg["architecture"]}`, {model.num_classes} classes, trained with tasn_timm on `{measured.dataset}`.

| split | images | accuracy | parameters | GFLOPs an image |
|---|---|---|---|---|
| {measured.split} | {measured.images} | {accuracy} | {parameters / 1e6:.2f} M | {measured.gflops:.4g} |

The split was read once, after training; one centre crop an image. FLOPs are those of convolutions and matrix products,
two per multiply-add.

## Use

```python
import timm, tasn_timm  # the import registers the architecture

model = timm.create_model("local-dir:{folder}", pretrained=True).eval()  # once published: "hf-hub:user/name"
config = timm.data.resolve_model_data_config(model)
transform = timm.data.create_transform(**config)
logits = model(transform(image).unsqueeze(0))  # from a PIL image; (1, {model.num_classes})
model.pretrained_cfg["label_names"][logits.argmax()]
```

## Training

Recipe `{measured.recipe}`; every option is in `recipe.yaml` beside the run. Command: `{measured.command}`

## Limits

It knows the {model.num_classes} classes of its dataset and nothing else: any other picture gets one of these names.

## Citation

Zheng, Fu, Zha, Luo: Looking for the Devil in the Details: Learning Trilinear Attention Sampling Network for
Fine-grained Image Recognition. CVPR 2019.
"""
    (aside / "README.md").write_text(text)
