"""`python -m tasn_timm run SCRIPT`, by which timm's scripts see our models, and transformers' pipelines on our folders.

timm's own scripts (train.py, validate.py, ...) are in its repository, not in its package. Those here stand in for them.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import timm.task
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.utils.onnx import onnx_export, onnx_forward

from tasn_timm import TASNLoss, cli
from tasn_timm.data import synthbirds
from tasn_timm.errors import UserError
from tasn_timm.hub import save_folder

# What a script may look at, written to the file that its first argument names.
REPORT = """
import json, sys
from pathlib import Path
import timm
import neighbour  # lies beside the script

def main():
    seen = dict(argv=sys.argv, path=sys.path[0], name=__name__, file=__file__, neighbour=neighbour.__file__)
    seen["models"] = timm.list_models("tasn_tiny*") + timm.list_models("isqrt*")
    Path(sys.argv[1]).write_text(json.dumps(seen))

if __name__ == "__main__":
    main()
"""

# As timm's train.py makes its task: imported by name, with these arguments, after the model.
TRAIN = """
import argparse, json, logging
import timm, torch
from safetensors.torch import save_file
from timm.data import create_dataset, create_loader, resolve_model_data_config
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask

parser = argparse.ArgumentParser()
parser.add_argument("data")
parser.add_argument("--model")
parser.add_argument("--output")
args = parser.parse_args()

torch.manual_seed(0)
model = timm.create_model(args.model, num_classes=3)
config = resolve_model_data_config(model)
loader = create_loader(
    create_dataset("", args.data, split="train"), config["input_size"], batch_size=8, num_workers=0,
    mean=config["mean"], std=config["std"], device=torch.device("cpu"), use_prefetcher=False, persistent_workers=False,
)
device = torch.device("cpu")
task = ClassificationTask(
    model=model, criterion=LabelSmoothingCrossEntropy(0.1), device=device, dtype=torch.float32, verbose=False
)
optimizer = create_optimizer_v2(task.get_trainable_module(), "sgd", lr=0.05, layer_decay=0.8)
save_file(model.state_dict(), f"{args.output}.safetensors")
losses = []
images, target = next(iter(loader))
save_file(dict(images=images, target=target), f"{args.output}.batch.safetensors")
for _ in range(4):
    torch.manual_seed(1)
    result = task(images, target)
    losses.append({name: value.item() for name, value in result.items() if name != "output"})
    optimizer.zero_grad()
    result["loss"].backward()
    optimizer.step()
logits = task.get_eval_model().eval()(images)
seen = dict(task=type(task).__name__, losses=losses, shape=list(logits.shape))
open(args.output, "w").write(json.dumps(seen))
"""


@pytest.fixture
def run(monkeypatch):
    """`python -m tasn_timm run` in this process, which is put back afterwards."""
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(timm.task, "ClassificationTask", timm.task.ClassificationTask)
    return lambda *arguments: cli.main(["run", *map(str, arguments)])


def write(folder: Path, text: str, name: str = "script.py") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    return folder / name


def test_a_script_finds_what_python_gives_it_and_our_models(tmp_path, monkeypatch, run):
    script = write(tmp_path / "scripts", REPORT)
    write(tmp_path / "scripts", "", "neighbour.py")
    monkeypatch.chdir(tmp_path)
    run("scripts/script.py", "seen.json", "--model", "tasn_tiny", "-b", "2", "--help", "--", "last")
    seen = json.loads(Path("seen.json").read_text())
    assert seen["argv"] == ["scripts/script.py", "seen.json", "--model", "tasn_tiny", "-b", "2", "--help", "--", "last"]
    assert seen["path"] == str(script.parent)
    assert seen["neighbour"] == str(script.with_name("neighbour.py"))
    assert (seen["name"], seen["file"]) == ("__main__", "scripts/script.py")
    assert seen["models"] == ["tasn_tiny", "isqrt_cov"]
    monkeypatch.delitem(sys.modules, "neighbour")


def test_a_training_script_trains_a_tasn_with_its_own_loss(tmp_path, image_folder, run):
    script, output = write(tmp_path, TRAIN), tmp_path / "seen.json"
    run(script, image_folder, "--model", "tasn_tiny", "--output", output)
    seen = json.loads(output.read_text())
    assert seen["task"] == "TASNTask" and seen["shape"][1] == 3
    first, last = seen["losses"][0], seen["losses"][-1]
    assert set(first) == {"loss", "structure", "detail", "soft", "attention"}

    model = timm.create_model("tasn_tiny", num_classes=3).train()
    model.load_state_dict(load_file(f"{output}.safetensors"))
    model.set_distilled_training(True)
    batch = load_file(f"{output}.batch.safetensors")
    torch.manual_seed(1)
    expected = TASNLoss(smoothing=0.1)(model(batch["images"]), batch["target"])
    assert first == pytest.approx({name: value.item() for name, value in expected.items()}, rel=1e-5)
    assert last["loss"] < first["loss"]


def test_a_training_script_trains_other_models_as_ever(tmp_path, image_folder, run):
    script, output = write(tmp_path, TRAIN), tmp_path / "seen.json"
    run(script, image_folder, "--model", "test_resnet", "--output", output)
    seen = json.loads(output.read_text())
    assert seen["task"] == "ClassificationTask"
    assert set(seen["losses"][0]) == {"loss"}


def test_a_missing_script_or_none_is_a_mistake_of_the_users(tmp_path, run):
    with pytest.raises(UserError, match=r"there is no script '.*validate.py': give the path of a Python file"):
        run(tmp_path / "validate.py", "--model", "tasn_tiny")
    with pytest.raises(UserError, match="there is no script"):
        run(tmp_path)
    with pytest.raises(UserError, match="required: SCRIPT"):
        run()


def test_a_scripts_exit_and_its_errors_are_its_own(tmp_path, run):
    with pytest.raises(SystemExit) as exit:
        run(write(tmp_path, "import sys; sys.exit(5)"))
    assert exit.value.code == 5
    with pytest.raises(ZeroDivisionError):
        run(write(tmp_path, "1 / 0"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "code", "last_line"),
    [
        ("print('done')", 0, "done"),
        ("import sys; sys.exit(5)", 5, None),
        ("1 / 0", 1, "ZeroDivisionError: division by zero"),
        ("import timm; timm.create_model('tasn_tiny', parts=0)", 2, "error: parts must be at least 1, got 0"),
        (None, 2, "error: there is no script"),
    ],
    ids=str,
)
def test_exit_codes(tmp_path, text, code, last_line):
    script = tmp_path / "script.py" if text is None else write(tmp_path, text)
    command = [sys.executable, "-m", "tasn_timm", "run", str(script)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == code
    lines = (process.stdout + process.stderr).strip().splitlines()
    assert last_line is None or lines[-1].startswith(last_line)
    assert ("Traceback" in process.stderr) == (code == 1)


@pytest.mark.slow
@pytest.mark.parametrize("start", ["fork", "spawn", "forkserver"])
def test_a_scripts_loader_may_start_its_workers_in_any_way(tmp_path, image_folder, start):
    """A worker that is not forked imports the main module again, which is tasn_timm's and must not run."""
    text = f"""
import timm, torch
from timm.data import create_dataset, create_transform
if __name__ == "__main__":
    model = timm.create_model("tasn_tiny", num_classes=3)
    dataset = create_dataset("", {str(image_folder)!r}, split="test", transform=create_transform(192))
    loader = torch.utils.data.DataLoader(dataset, 7, num_workers=2, multiprocessing_context={start!r})
    print([len(model(images)) for images, _ in loader])
"""
    command = [sys.executable, "-m", "tasn_timm", "run", str(write(tmp_path, text))]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    assert process.stdout == "[7, 7, 7]\n"


@pytest.mark.parametrize("use_dynamo", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_what_timms_onnx_script_writes_gives_the_models_logits(tmp_path, use_dynamo):
    """onnx_export.py has two exporters; without --dynamo it takes the older one."""
    model, path = timm.create_model("tasn_tiny", pretrained=True), str(tmp_path / "model.onnx")
    onnx_export(model, path, batch_size=2, opset=20, use_dynamo=use_dynamo, check_forward=True)
    pictures = [Image.fromarray(synthbirds.draw("test", index)) for index in range(5)]  # another number of images
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    images = torch.stack([transform(picture) for picture in pictures])
    logits = torch.from_numpy(onnx_forward(path, images))
    torch.testing.assert_close(logits, model(images).detach(), atol=1e-3, rtol=1e-3)


MODELS = [
    ("tasn_tiny", {}),
    ("tasn_tiny", dict(parts=2, heads="separate")),
    ("tasn", dict(backbone="test_vit", sample_size=160, attention_net="tiny")),
    ("isqrt_cov", dict(backbone="test_resnet", pool_args=dict(channels=8), img_size=(96, 96))),
]
NAMES = ["ant", "bee", "cat"]


@pytest.fixture
def picture() -> Image.Image:
    """Neither square nor of any model's size."""
    pixels = torch.rand(1, 3, 9, 13, generator=torch.Generator().manual_seed(0))
    pixels = torch.nn.functional.interpolate(pixels, (230, 310), mode="bicubic").clamp(0, 1)[0]
    return Image.fromarray((255 * pixels.movedim(0, -1)).byte().numpy())


def saved(folder: Path, name: str, kwargs: dict) -> torch.nn.Module:
    """A model in which nothing is as it was created, as `save_folder` writes it."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **kwargs)
    for tensor in [*model.parameters(), *(buffer for buffer in model.buffers() if buffer.is_floating_point())]:
        tensor.data += 0.02 * torch.rand_like(tensor)
    config = timm.data.resolve_model_data_config(model) | dict(crop_pct=0.9, mean=(0.4, 0.5, 0.6))
    save_folder(model, folder, label_names=NAMES, data_config=config)
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def own_logits(model: torch.nn.Module, picture: Image.Image) -> torch.Tensor:
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.inference_mode():
        return model(transform(picture)[None])[0]


@pytest.mark.parametrize(("name", "kwargs"), MODELS, ids=str)
def test_transformers_pipeline_gives_the_models_logits_their_names(tmp_path, no_network, picture, name, kwargs):
    from transformers import pipeline

    model = saved(tmp_path / "best", name, kwargs)
    expected = own_logits(model, picture)
    classify = pipeline("image-classification", model=str(tmp_path / "best"), device="cpu")
    scores = {each["label"]: each["score"] for each in classify(picture, function_to_apply="none", top_k=3)}
    assert scores == pytest.approx(dict(zip(NAMES, expected.tolist())), abs=1e-5)
    best = classify(picture, top_k=1)[0]
    assert best["label"] == NAMES[expected.argmax()]
    assert best["score"] == pytest.approx(expected.softmax(0).max().item(), abs=1e-5)


def test_transformers_pipeline_names_the_shipped_checkpoints_birds(tmp_path, no_network):
    from transformers import pipeline

    model = timm.create_model("tasn_tiny", pretrained=True).eval()
    config = timm.data.resolve_model_data_config(model)
    save_folder(model, tmp_path / "birds", label_names=synthbirds.CLASS_NAMES, data_config=config)
    classify = pipeline("image-classification", model=str(tmp_path / "birds"), device="cpu")
    pictures = [Image.fromarray(synthbirds.draw("test", index)) for index in range(24)]  # one of each class
    guesses = [each[0]["label"] for each in classify(pictures, top_k=1)]
    expected = [synthbirds.CLASS_NAMES[own_logits(model, picture).argmax()] for picture in pictures]
    assert guesses == expected
    assert sum(guess == name for guess, name in zip(guesses, synthbirds.CLASS_NAMES)) > 0.8 * 24


def test_transformers_models_have_our_features_and_train(tmp_path, no_network, picture):
    from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification

    model = saved(tmp_path / "best", *MODELS[0])
    pixels = AutoImageProcessor.from_pretrained(tmp_path / "best")(picture, return_tensors="pt")["pixel_values"]
    features = AutoModel.from_pretrained(tmp_path / "best")(pixels)
    expected = model.forward_features(pixels)
    torch.testing.assert_close(features.last_hidden_state, expected)
    torch.testing.assert_close(features.pooler_output, model.forward_head(expected, pre_logits=True))

    wrapped = AutoModelForImageClassification.from_pretrained(tmp_path / "best")
    levels = wrapped(pixels, output_hidden_states=True).hidden_states
    for level, own in zip(levels, model.forward_intermediates(pixels, intermediates_only=True)):
        torch.testing.assert_close(level, own)
    images = torch.cat([pixels, pixels.flip(3)])
    output = wrapped.train()(images, labels=torch.tensor([0, 1]))
    assert output.logits.shape == (2, 3)
    output.loss.backward()
    assert [name for name, parameter in wrapped.named_parameters() if parameter.grad is None] == []
    wrapped.eval().save_pretrained(tmp_path / "theirs")
    again = timm.create_model(f"local-dir:{tmp_path / 'theirs'}", pretrained=True).eval()
    torch.testing.assert_close(again(pixels), wrapped(pixels).logits, rtol=0, atol=0)
