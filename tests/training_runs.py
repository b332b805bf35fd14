"""What tests of the training script have in common: a small recipe, and how to read what a run leaves."""

import hashlib
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from tasn_timm.data.splits import load_splits
from tasn_timm.tasn import TASN
from tasn_timm.training import build

SCRIPT = Path(__file__).parents[1] / "train_accelerate.py"
spec = importlib.util.spec_from_file_location("train_accelerate", SCRIPT)
train_accelerate = importlib.util.module_from_spec(spec)
spec.loader.exec_module(train_accelerate)

SMALL = """
model: tasn
model_kwargs: {backbone: test_resnet, sample_size: 24, attention_net: tiny, relation_scale: 10.0}
img_size: 32
crop_padding: 2
batch_size: 16
epochs: 2
lr: 2.0e-3
warmup_epochs: 0
workers: 0
cpu: true
log_interval: 2
"""


QUICK = ("--model", "test_resnet")  # where the model does not matter


# Nothing random, no BatchNorm, and a learning rate that stays: a step depends on the mean gradient alone.
PLAIN = "--model test_convnext --no-channels-last --hflip 0 --crop-padding 0 --opt sgd --lr 0.02 --min-lr 0.02".split()


# Checkpoints of the small recipe, with epochs of 3 steps.
STEP_3 = "epoch-0001-image-00000000-step-00000003"
STEP_4 = "epoch-0001-image-00000016-step-00000004"
STEP_6 = "epoch-0002-image-00000000-step-00000006"


def tree(folder: Path) -> dict[str, str]:
    """Every file below a folder, hidden ones too, and what is in it; folders as well."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in folder.rglob("*")
    }


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def checkpoint(run: Path, name: str) -> dict:
    return torch.load(run / "checkpoints" / name / "state.pt", weights_only=True)


def epochs_of(run: Path) -> list[dict]:
    """Weights and statistics in every checkpoint: at the beginning and after each epoch."""
    return [checkpoint(run, folder.name)["model"] for folder in sorted((run / "checkpoints").iterdir())]


def the_error(err: str) -> str:
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in err
    return line


def lines(run: Path) -> list[dict]:
    """Of metrics.jsonl: every epoch and the test."""
    every = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in every if "epoch" in line or "test" in line]


def top1_of_folder(model_folder: Path, images: Path) -> float:
    """Accuracy in percent with timm's transform and one image at a time: nothing in common with the script's."""
    model = timm.create_model(f"local-dir:{model_folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    names = model.pretrained_cfg["label_names"]
    right = []
    for path in images.glob("*/*.png"):
        with torch.inference_mode():
            logits = model(transform(Image.open(path)).unsqueeze(0))
        right.append(names[logits.argmax()] == path.parent.name)
    return 100 * sum(right) / len(right)


def weights(folder: Path, kind: str = "last") -> dict[str, torch.Tensor]:
    return load_file(folder / kind / "model.safetensors")


def stream_folder(image_folder: Path, folder: Path, info: bool) -> Path:
    """The images as parquet files, four of the training split."""
    splits = load_splits(str(image_folder))
    for name, split in splits.items():
        shards = 4 if name == "train" else 1
        for index in range(shards):
            path = folder / "data" / f"{name}-{index:05}-of-{shards:05}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            split.shard(shards, index, contiguous=False).to_parquet(path)
    if info:
        counts = "".join(f"  - name: {name}\n    num_examples: {len(split)}\n" for name, split in splits.items())
        (folder / "README.md").write_text(f"---\ndataset_info:\n  splits:\n{counts}---\n")
    return folder


def on_every_loss(monkeypatch, change: Callable[..., dict]) -> None:
    """Pass what the objective returns through `change`(model, number of the call from 1, losses, targets, output)."""
    create, calls = build.create_objective, []

    def create_changed(model, recipe):
        objective = create(model, recipe)

        def changed(output, target):
            calls.append(None)
            return change(model, len(calls), objective(output, target), target, output)

        return changed

    monkeypatch.setattr(build, "create_objective", create_changed)


def run_out(monkeypatch, images: int, error: Exception) -> None:
    """Training on more images at a time than this fails."""
    forward = TASN.forward

    def limited(model, image):
        if model.training and len(image) > images:
            raise error
        return forward(model, image)

    monkeypatch.setattr(TASN, "forward", limited)
