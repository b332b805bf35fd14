"""The training script: from a folder of images to a model that timm loads; what it refuses; two processes."""

import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file
from timm.utils import ModelEmaV3
from training_runs import SCRIPT, lines, stream_folder, top1_of_folder, train_accelerate, weights

from tasn_timm.recipe import Recipe
from tasn_timm.training.build import build_model, build_parts, crop_share
from tasn_timm.training.evaluation import Scores
from tasn_timm.training.objective import create_objective


def test_a_run_leaves_a_model_that_timm_loads_and_scores_what_it_says(train, tmp_path, image_folder, no_network):
    code, out, err = train("--epochs", "3")
    assert code == 0, err
    run = tmp_path / "runs" / "small"
    files = {"recipe.yaml", "environment.json", "metrics.jsonl", "best", "last", "checkpoints", "lock"}
    assert {path.name for path in run.iterdir()} == files
    *epochs, test = lines(run)
    assert [line["epoch"] for line in epochs] == [1, 2, 3]
    assert set(epochs[0]["train"]) == {"loss", "structure", "detail", "soft", "attention", "grad_norm"}
    assert all(line["validation"]["images"] == 15 and line["speed"]["images_per_second"] > 0 for line in epochs)
    assert test["test"]["images"] == 21
    assert f"{test['test']['top1']:.1f} %" in out

    scope = {}
    exec(next(line for line in out.splitlines() if line.startswith("load it:")).removeprefix("load it:").strip(), scope)
    assert scope["model"].pretrained_cfg["label_names"] == ["blue", "green", "red"]
    assert test["test"]["top1"] == pytest.approx(top1_of_folder(run / "best", image_folder / "test"))
    assert max(line["validation"]["top1"] for line in epochs) > 60, "three colours are easy"


def test_the_run_is_documented(train, tmp_path, image_folder):
    assert train("--epochs", "1", "--seed", "5")[0] == 0
    run = tmp_path / "runs" / "small"
    options = yaml.safe_load((run / "recipe.yaml").read_text())
    assert (options["seed"], options["temperature"], options["img_size"]) == (5, 10.0, 32), "defaults included"
    environment = json.loads((run / "environment.json").read_text())
    assert environment["processes"] == 1
    assert environment["versions"]["timm"] == timm.__version__
    assert "--seed 5" in environment["command"]
    assert "accuracy" in (run / "best" / "README.md").read_text()
    config = json.loads((run / "best" / "config.json").read_text())
    weights = (run / "best/model.safetensors").read_bytes()
    known = dict(recipe="small", dataset=str(image_folder), sha256=hashlib.sha256(weights).hexdigest())
    assert config["tasn"] == known


def test_the_same_seed_gives_the_same_weights_and_a_second_run_its_own_folder(train, tmp_path):
    for seed in ("1", "1", "2"):
        assert train("--epochs", "1", "--seed", seed)[0] == 0
    weights = [
        (tmp_path / "runs" / name / "last" / "model.safetensors").read_bytes()
        for name in ("small", "small-1", "small-2")
    ]
    assert weights[0] == weights[1] != weights[2]


def test_accumulation_takes_the_same_steps_as_a_large_batch(train, tmp_path):
    # Without BatchNorm and augmentation the two differ by rounding only.
    arguments = (
        "--epochs 1 --model test_vit2 --no-channels-last --hflip 0 --crop-padding 0 --opt sgd --img-size 64".split()
    )
    kwargs = ["--model-kwargs", "img_size=64"]
    for steps in ("1", "4"):
        code, _, err = train(*arguments, "--grad-accum-steps", steps, *kwargs)
        assert code == 0, err
    losses = [lines(tmp_path / "runs" / name)[0]["train"]["loss"] for name in ("small", "small-1")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_without_a_validation_split_the_last_epoch_is_kept(train, tmp_path):
    assert train("--val-split", "null")[0] == 0
    run = tmp_path / "runs" / "small"
    assert [line.get("validation") for line in lines(run)] == [None, None, None]
    best, last = ((run / name / "model.safetensors").read_bytes() for name in ("best", "last"))
    assert best == last


def test_a_comparison_is_trained_on_the_same_data_and_shown_in_the_table(train, tmp_path):
    plain = tmp_path / "plain.yaml"
    plain.write_text("model: test_resnet\nimg_size: 24\ndata: /nowhere\nlr: 2.0e-3\n")
    code, out, err = train("--epochs", "1", "--compare", str(plain))
    assert code == 0, err
    table = [line.split() for line in out.splitlines() if line.endswith("%") and "epoch" not in line]
    assert [row[1] for row in table] == ["tasn", "test_resnet"]
    assert all(row[-1] == "%" for row in table)
    flops = [float(row[-3]) for row in table]
    assert flops[0] > flops[1] > 0


def test_a_comparison_of_the_same_name_does_not_take_the_place_of_the_run(train, tmp_path):
    (tmp_path / "other").mkdir()
    plain = tmp_path / "other" / "small.yaml"
    plain.write_text("model: test_resnet\nimg_size: 24\nlr: 2.0e-3\n")
    code, out, err = train("--epochs", "1", "--compare", str(plain))
    assert code == 0, err
    table = [line.split() for line in out.splitlines() if line.endswith("%") and "epoch" not in line]
    assert [row[1] for row in table] == ["tasn", "test_resnet"]
    assert len(lines(tmp_path / "runs" / "small")) == len(lines(tmp_path / "runs" / "small" / "small")) == 2


def test_progress_is_a_line_now_and_then_where_nobody_watches(train):
    _, out, err = train("--epochs", "1", "--log-interval", "1")
    assert [line for line in err.splitlines() if "batch 1/3" in line]
    assert "\r" not in err
    assert "validation top-1" in out


def test_progress_is_a_bar_where_somebody_watches(train, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    _, _, err = train("--epochs", "1")
    assert "small epoch 1/1:   0%|" in err and "batch 1/3" not in err


def test_training_goes_on_from_a_folder(train, tmp_path):
    assert train("--epochs", "1")[0] == 0
    best = tmp_path / "runs" / "small" / "best"
    code, _, err = train(
        "--epochs",
        "1",
        "--model",
        f"local-dir:{best}",
        "--pretrained",
        "--lr",
        "0",
        "--min-lr",
        "0",
    )
    assert code == 0, err
    (first, _), (second, _) = lines(tmp_path / "runs" / "small"), lines(tmp_path / "runs" / "small-1")
    assert second["train"]["structure"] < first["train"]["structure"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "resnt50"], "unknown timm model 'resnt50': did you mean 'resnet50'"),
        (["--model-kwargs", "backbone=resnt50"], "unknown timm model 'resnt50'"),
        (["--model-kwargs", "no_such=1"], "do not fit tasn"),
        (["--model-kwargs", "checkpoint_path=x.pth"], "checkpoint_path does not belong into model_kwargs"),
        (["--model", "qqqq"], "unknown timm model 'qqqq'. See timm.list_models()."),
        (
            ["--recipe", "me/own"],
            "unknown recipe 'me/own'. See python -m tasn_timm recipes; a file's name ends in .yaml",
        ),
        (["--zzzzzz", "3"], "unknown argument '--zzzzzz'. See --help."),
        (["--epoch", "3"], "did you mean '--epochs'"),
        (["--data", "/no/such/folder"], "data folder '/no/such/folder' does not exist"),
        (["--num-classes", "200"], "num_classes is 200, but dataset"),
        (["--train-split", "all"], "only train, validation, test: set train_split to one of these."),
        (["--val-split", "all"], "only train, validation, test: set val_split to one of these, or to null for none."),
        (["--batch-size", "1"], "BatchNorm, which needs at least 2: use batch_size 2 or more"),
        (["--batch-size", "10", "--grad-accum-steps", "4"], "cannot be divided among 1 processes x 4"),
        (["--batch-size", "1000"], "48 images, fewer than batch_size 1000"),
        (["--img-size", "20"], "img_size 20 is smaller than the 24 pixels"),
        (["--model", "local-dir:nowhere"], "there is no model folder 'nowhere'"),
        (["--opt", "adamm"], "did you mean 'adam'"),
        (["--opt-kwargs", "foo=1"], "opt adamw does not take opt_kwargs {'foo': 1}"),
        (["--opt", "sgd", "--momentum", "0"], "opt sgd does not take momentum 0.0 and opt_kwargs {}: Nesterov"),
        (
            ["--sched", "multistep", "--decay-milestones", "[1, 2]", "--epochs", "2", "--warmup-epochs", "0"],
            "decay_milestones [1, 2] must be less than epochs (2)",
        ),
        (["--model-kwargs", "foo"], "--model-kwargs takes KEY=VALUE, such as sample_size=336, got 'foo'"),
        (["--model-kwargs", "in_chans=1"], "pictures have 3 channels"),
        (["--model", "tasn_tiny", "--pretrained", "--model-kwargs", "attention_net=tny"], "did you mean 'tiny'"),
        (["--compare", "nowhere"], "unknown recipe 'nowhere'"),
        (["--lr", "-1"], "lr must be 0 or more"),
        (["--workers", "-1"], "workers must be 0 or more"),
        (["--warmup-epochs", "2"], "warmup_epochs must be less than epochs (2), got 2.0"),
        (["--decay-milestones", "[1]"], "decay_milestones are for sched multistep"),
        (["--mixed-precision", "fp16"], "fp16 has no effect on a CPU"),
        (["--data", "my: photos"], "unknown dataset 'my: photos'"),
        (["--sched", "cosin"], "did you mean 'cosine'"),
        (["--decoder", "pilow"], "unknown decoder 'pilow': did you mean 'pillow'"),
        (["--aa", "augmix-m3"], "aa must be timm's RandAugment"),
        (["--crop-padding", "32"], "crop_padding (32) mirrors the picture"),
        (["--max-bad-images", "-1"], "max_bad_images must be 0 or more"),
        (["--reprob", "2"], "reprob must be between 0 and 1"),
        (["--input-key", "photo"], "--input-key 'photo' is not a column"),
        (["--streaming", "--workers", "100"], "use --workers"),
    ],
)
def test_mistakes_get_one_line_and_exit_code_2_before_anything_is_written(train, tmp_path, arguments, message):
    code, out, err = train(*arguments)
    assert code == 2
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert message in line
    assert "Traceback" not in err + out
    assert not (tmp_path / "runs").exists()


def test_a_checkpoint_folder_without_weights_is_named(train, tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    code, _, err = train("--model", f"local-dir:{folder}", "--pretrained")
    assert code == 2 and "empty' has no model.safetensors" in err


def test_a_model_folder_without_pretrained_is_refused(train, tmp_path):
    assert train("--epochs", "1")[0] == 0
    code, _, err = train("--model", f"local-dir:{tmp_path / 'runs' / 'small' / 'best'}")
    assert code == 2 and "add --pretrained" in err


def test_a_loss_that_is_not_finite_ends_the_run_and_spoils_nothing(train, tmp_path):
    code, _, err = train("--opt", "sgd", "--lr", "1e30", "--epochs", "3")
    assert code == 3 and "the loss is not finite in step" in err
    run = tmp_path / "runs" / "small"
    assert all("NaN" not in path.read_text() for path in run.glob("metrics.jsonl"))
    for folder in run.glob("*/model.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(folder).values())


@pytest.mark.parametrize("workers", ["0", "1"])
def test_an_unreadable_image_is_named_in_one_line(train, image_folder, tmp_path, workers):
    copy = tmp_path / "spoiled"
    shutil.copytree(image_folder, copy)
    (copy / "train" / "red" / "3.png").write_bytes(b"no image")
    code, _, err = train("--data", str(copy), "--workers", workers, "--epochs", "1")
    (line,) = [line for line in err.splitlines() if "error: " in line]
    assert code == 2 and "cannot be read" in line and "3.png" in line and "Traceback" not in err


def test_the_output_folder_must_be_usable(train, tmp_path):
    (tmp_path / "file").touch()
    code, _, err = train("--output", str(tmp_path / "file"))
    assert code == 2 and "cannot be used" in err


def test_the_learning_rate_follows_timms_schedule_update_by_update(train, tmp_path):
    assert train("--epochs", "4", "--lr", "1e-3", "--min-lr", "1e-4")[0] == 0
    updates = 3  # 48 images, 16 a step
    expected = [1e-4 + (1e-3 - 1e-4) * (1 + math.cos(math.pi * e * updates / (4 * updates))) / 2 for e in range(1, 5)]
    assert [line["lr"] for line in lines(tmp_path / "runs" / "small")[:-1]] == pytest.approx(expected)


def test_the_first_best_epoch_is_kept_and_tested(train, tmp_path, monkeypatch):
    scores = iter([50.0, 80.0, 80.0, 60.0, 70.0])
    weights = []

    def fake(accelerator, predict, loader, check, batches):
        weights.append({name: tensor.clone() for name, tensor in predict[1].state_dict().items()})
        right = int(next(scores))
        best = (torch.arange(100) >= right).long()[:, None]
        return Scores(best, best.float(), labels=torch.zeros(100, dtype=torch.long), num_classes=2)

    monkeypatch.setattr(train_accelerate, "evaluate", fake)
    assert train("--epochs", "4")[0] == 0
    best = load_file(tmp_path / "runs" / "small" / "best" / "model.safetensors")
    for name, tensor in best.items():
        assert torch.equal(tensor, weights[1][name]) and torch.equal(tensor, weights[4][name]), name
    assert any(not torch.equal(best[name], weights[2][name]) for name in best)


def test_the_average_of_the_weights_is_what_is_saved_and_tested(train, tmp_path):
    runs = tmp_path / "runs"
    for arguments in ([], ["--model-ema-decay", "1e-9"], ["--model-ema-decay", "0.999999"]):
        code, _, err = train("--epochs", "1", *arguments)
        assert code == 0, err
    trained, quick, slow = (weights(runs / name) for name in ("small", "small-1", "small-2"))
    for name in trained:
        torch.testing.assert_close(quick[name], trained[name])
    assert any(not torch.allclose(slow[name], trained[name], atol=1e-3) for name in trained)
    tested = [lines(runs / name)[-1]["test"]["top1"] for name in ("small", "small-1")]
    assert tested[0] == tested[1]


def test_the_average_is_timms_formula(train, tmp_path, monkeypatch):
    """With its warm-up, so that nothing is left of the first weights however short the training."""
    after = []
    update = ModelEmaV3.update

    def record(average, model, step):
        update(average, model, step)
        after.append({name: value.detach().clone() for name, value in model.named_parameters()})

    monkeypatch.setattr(ModelEmaV3, "update", record)
    assert train("--epochs", "1", "--model-ema-decay", "0.6")[0] == 0
    assert len(after) == 3, "48 images in batches of 16"
    saved = weights(tmp_path / "runs" / "small")
    for name, first in after[0].items():
        mean = (first + after[1][name]) / 2
        expected = 0.6 * mean + 0.4 * after[2][name]  # less than the 2/3 of a mean of three
        torch.testing.assert_close(saved[name], expected.contiguous(), atol=1e-6, rtol=1e-4)


def test_layer_decay_lowers_the_rate_from_layer_to_layer_of_the_backbone_alone():
    recipe = Recipe(model="tasn", layer_decay=0.5, lr=1.0, model_kwargs=dict(backbone="test_resnet", sample_size=24))
    model = build_model(recipe, classes=3)
    optimizer = build_parts(recipe, model, 3, dict(mean=(0.5,) * 3, std=(0.5,) * 3)).optimizer
    scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    of = {name: scale[id(parameter)] for name, parameter in model.named_parameters()}
    assert of["heads.shared.weight"] == of["attention_net.classifier.weight"] == 1
    assert (
        of["backbone.conv1.0.weight"] < of["backbone.layer1.0.conv1.weight"] < of["backbone.layer4.0.conv1.weight"] < 1
    )


def test_options_of_the_loss_that_do_nothing_are_refused():
    for kwargs, options, message in (
        (None, dict(soft_weight=1.0), "soft_weight=1.0 has no effect with model test_resnet, which is not a TASN"),
        (dict(part_net=False), dict(part_weight=2.0), "part_weight=2.0 has no effect with part_net=False"),
        (
            dict(master_net=False),
            dict(detach_teacher=False),
            "detach_teacher=False has no effect with master_net=False",
        ),
        (dict(heads="shared"), dict(master_weight=0.3), "master_weight=0.3 has no effect with heads='shared'"),
        ({}, dict(soft_weight=0.0, temperature=4.0), "temperature=4.0 has no effect with soft_weight=0"),
    ):
        name = "test_resnet" if kwargs is None else "tasn_tiny"
        model = timm.create_model(name, num_classes=3, **kwargs or {})
        with pytest.raises(ValueError, match=re.escape(message)):
            create_objective(model, Recipe(model=name, **options))


def test_the_objective_is_what_the_recipe_says():
    options = dict(temperature=3.0, soft_weight=5.0, part_weight=0.25, attention_weight=0.5)
    recipe = Recipe(detach_teacher=False, smoothing=0.1, **options)
    objective = create_objective(timm.create_model("tasn_tiny", heads="separate"), recipe)
    assert {name: getattr(objective, name) for name in options} == options
    assert (objective.detach_teacher, objective.master_weight) == (False, 1.0)
    plain = create_objective(timm.create_model("test_resnet", num_classes=3), Recipe(smoothing=0.1))
    logits, target = torch.randn(2, 3), torch.tensor([0, 2])
    expected = torch.nn.functional.cross_entropy(logits, target, label_smoothing=0.1)
    torch.testing.assert_close(plain(logits, target)["loss"], expected)
    torch.testing.assert_close(objective.criterion(logits, target), expected)


@pytest.mark.parametrize("resize", range(192, 400))
def test_timm_resizes_to_the_short_side_of_the_recipe(resize):
    assert math.floor(192 / crop_share(192, resize)) == resize


def test_every_augmentation_trains(train, tmp_path):
    arguments = "--epochs 1 --degrees 20 --color-jitter 0.4 --pca-noise 0.1 --reprob 0.5 --decoder simplejpeg".split()
    code, _, err = train(*arguments, "--aa", "rand-m5-mstd0.5", "--resize", "36")
    assert code == 0, err
    assert math.isfinite(lines(tmp_path / "runs" / "small")[0]["train"]["loss"])


@pytest.fixture
def spoiled(tmp_path, image_folder) -> Path:
    """`image_folder` with three training images that are none."""
    folder = shutil.copytree(image_folder, tmp_path / "spoiled")
    for name in ("red/3.png", "green/0.png", "blue/15.png"):
        (folder / "train" / name).write_bytes(b"spoiled")
    return folder


def test_as_many_bad_images_as_allowed_are_replaced_and_logged(train, tmp_path, spoiled):
    code, _, err = train("--data", str(spoiled), "--max-bad-images", "3")
    assert code == 0, err
    logged = [json.loads(line) for line in (tmp_path / "runs/small/bad_images.jsonl").read_text().splitlines()]
    assert {Path(line["file"]).relative_to(spoiled / "train").as_posix() for line in logged} == {
        *("red/3.png", "green/0.png", "blue/15.png")
    }
    assert len(logged) == 3 and all(line["split"] == "train" for line in logged)
    assert [line["row"] for line in logged] == [int(line["image_id"]) for line in logged]
    assert all(line["reason"].startswith("not an image") for line in logged)
    assert err.count("unreadable image, another one is taken") == 3, "each once, in both epochs together"


def test_the_replacement_does_not_depend_on_the_number_of_workers(train, tmp_path, spoiled):
    for workers in ("0", "2"):
        code, _, err = train("--data", str(spoiled), "--max-bad-images", "3", "--workers", workers, "--epochs", "1")
        assert code == 0, err
    first, second = (weights(tmp_path / "runs" / name) for name in ("small", "small-1"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("allowed", ["0", "2"])
def test_more_bad_images_than_allowed_stop_the_run(train, spoiled, allowed):
    code, _, err = train("--data", str(spoiled), "--max-bad-images", allowed)
    assert code == 2
    error = err.splitlines()[-1]
    assert error.startswith("error: ") and "cannot be read" in error and "Traceback" not in err
    assert ("more than --max-bad-images 2" in error) == (allowed == "2")


def test_a_bad_image_always_stops_an_evaluation(train, tmp_path, image_folder):
    folder = shutil.copytree(image_folder, tmp_path / "spoiled")
    (folder / "validation/red/1.png").write_bytes(b"spoiled")
    code, _, err = train("--data", str(folder), "--max-bad-images", "9")
    assert code == 2 and "validation/red/1.png) cannot be read: not an image" in err


def test_a_stream_trains_and_is_evaluated_whole(train, tmp_path, image_folder, monkeypatch):
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    data = stream_folder(image_folder, tmp_path / "parquet", info=True)
    code, _, err = train("--data", str(data), "--streaming", "--epochs", "3")
    assert code == 0, err
    *epochs, test = lines(tmp_path / "runs" / "small")
    assert [line["validation"]["images"] for line in epochs] == [15, 15, 15] and test["test"]["images"] == 21
    assert max(line["validation"]["top1"] for line in epochs) > 60
    assert test["test"]["top1"] == pytest.approx(top1_of_folder(tmp_path / "runs/small/best", image_folder / "test"))


def test_a_stream_of_unknown_length_is_refused(train, tmp_path, image_folder):
    data = stream_folder(image_folder, tmp_path / "parquet", info=False)
    code, _, err = train("--data", str(data), "--streaming")
    assert code == 2 and "does not say how many images split 'train' has" in err


@pytest.mark.slow
def test_two_processes_share_a_stream_and_count_bad_images_together(recipe, tmp_path, image_folder, spoiled):
    data = stream_folder(image_folder, tmp_path / "parquet", info=True)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", str(SCRIPT)]
    launch += ["--recipe", str(recipe), "--workers", "1"]

    def run(*arguments: str) -> subprocess.CompletedProcess:
        environment = os.environ | dict(OMP_NUM_THREADS="1")
        return subprocess.run(
            [*launch, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )

    result = run("--data", str(data), "--streaming")
    assert result.returncode == 0, result.stderr
    assert all(line["validation"]["images"] == 15 for line in lines(tmp_path / "runs/small")[:-1])
    result = run("--data", str(spoiled), "--max-bad-images", "3")
    assert result.returncode == 0, result.stderr
    result = run("--data", str(spoiled), "--max-bad-images", "2")
    assert result.returncode != 0 and "3 images of split 'train' cannot be read" in result.stderr


@pytest.mark.slow
def test_two_processes_are_two_and_count_every_image_once(recipe, tmp_path, image_folder):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += [str(SCRIPT), "--recipe", str(recipe), "--workers", "1"]
    result = subprocess.run(
        command, cwd=tmp_path, env=os.environ | dict(OMP_NUM_THREADS="1"), capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert "processes: 2 (cpu)" in result.stdout
    run = tmp_path / "runs" / "small"
    assert json.loads((run / "environment.json").read_text())["processes"] == 2
    *epochs, test = lines(run)
    assert len(epochs) == 2 and result.stdout.count("epoch 1/2") == 1, "one process speaks"
    assert all(line["validation"]["images"] == 15 for line in epochs) and test["test"]["images"] == 21
    assert test["test"]["top1"] == pytest.approx(top1_of_folder(run / "best", image_folder / "test"))


@pytest.mark.slow
def test_a_mistake_ends_a_process_with_2(recipe):
    command = [sys.executable, str(SCRIPT), "--recipe", str(recipe), "--batch-size", "1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert "needs at least 2" in result.stderr and "Traceback" not in result.stderr
