"""Several processes train as one does: the same images in each step, the same losses, the same weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close
from training_runs import SCRIPT

BASE = """
img_size: 64
crop_padding: 4
degrees: 10
color_jitter: 0.3
batch_size: 16
epochs: 3
opt: sgd
lr: 2.0e-2
min_lr: 1.0e-3
warmup_epochs: 0
clip_grad: 1.0
model_ema_decay: 0.9
channels_last: false
workers: 1
log_interval: 1
cpu: true
"""
# Without BatchNorm nothing but rounding depends on how a step is divided.
VIT = "model: test_vit2\nmodel_kwargs: {img_size: 64}\n"
# BatchNorm normalises with the images of a forward pass: 8 on each of two processes, as in two passes of one process.
# Without a part net, whose details each process draws by its own number.
TASN = """
model: tasn
model_kwargs: {backbone: test_resnet, sample_size: 24, attention_net: tiny, relation_scale: 10.0, part_net: false}
"""


def run(recipe: Path, processes: int, *arguments: str) -> Path:
    """The folder of a run."""
    output = recipe.parent / f"{recipe.stem}-{processes}-{len(arguments)}"
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)] * (processes > 1)
    command = [sys.executable, *launch, str(SCRIPT), "--recipe", str(recipe), "--output", str(output), *arguments]
    environment = os.environ | dict(OMP_NUM_THREADS="1")
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert f"processes: {processes} (cpu)" in result.stdout
    return output / recipe.stem


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["train"]["loss"] for line in lines if "train" in line and "epoch" not in line]


@pytest.mark.slow
@pytest.mark.parametrize("last", ["--drop-last", "--no-drop-last"])
def test_two_processes_have_the_loss_curve_of_one_with_the_same_global_batch(tmp_path, image_folder, last):
    recipe = tmp_path / "vit.yaml"
    # 48 images: three steps of 16, or of 20, 20 and 8.
    recipe.write_text(BASE + VIT + f"data: {image_folder}\n")
    arguments = [last, "--batch-size", "16" if last == "--drop-last" else "20"]
    one, two = run(recipe, 1, *arguments), run(recipe, 2, *arguments)
    assert len(losses(one)) == 9
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    for name, tensor in load_file(one / "last" / "model.safetensors").items():
        assert_close(load_file(two / "last" / "model.safetensors")[name], tensor, atol=1e-5, rtol=1e-3)


@pytest.mark.slow
def test_with_batchnorm_two_processes_are_two_forward_passes_of_one(tmp_path, image_folder):
    recipe = tmp_path / "tasn.yaml"
    recipe.write_text(BASE + TASN + f"data: {image_folder}\n")
    one, two = run(recipe, 1, "--grad-accum-steps", "2", "--log-interval", "2"), run(recipe, 2)
    assert len(losses(one)) == 9
    assert losses(two) == pytest.approx(losses(one), rel=1e-3)
