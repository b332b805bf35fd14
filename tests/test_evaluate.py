"""`python -m tasn_timm evaluate` measures what plain timm and PIL code measures; what it refuses."""

import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from datasets import ClassLabel, Dataset, Features, Image, Value
from loopback_hub import LoopbackHub, connect, go_online
from PIL import Image as PILImage
from scipy.stats import binomtest

from tasn_timm import cli, sheets
from tasn_timm.commands import evaluate as command_evaluate
from tasn_timm.data.loading import Batch
from tasn_timm.data.splits import load_splits, super_classes
from tasn_timm.data.transforms import eval_transform
from tasn_timm.ensemble import Ensemble
from tasn_timm.errors import UserError, run_command
from tasn_timm.hub import load_model, save_folder, trained_on
from tasn_timm.resolution import Resolution, set_resolution
from tasn_timm.training.evaluation import Scores, evaluate
from tasn_timm.zoo import HUB_CONFIGS

COLOURS = ["blue", "green", "red"]
SPECIES = [f"species {number}" for number in range(8)]
SUPERS = ["Aves", "Fungi", "Insecta", "Pisces"]
SUPER_OF = [2, 0, 0, 1, 1, 1, 0, 2]  # Pisces has none
COUNTS = [3, 4, 5, 3, 2, 6, 1, 3]  # test images of each species


def write_data(folder: Path, supers: list | None = SUPER_OF, kind: object = None) -> Path:
    """Parquet files of noisy pictures of three sizes: labels, and super-classes where they are given."""
    rng = np.random.default_rng(0)
    features = Features(image=Image(), label=ClassLabel(names=SPECIES))
    if supers:
        features["super"] = kind or ClassLabel(names=SUPERS)
    for split in ("train", "test"):
        labels = [label for label, count in enumerate(COUNTS) for _ in range(count)]
        rows = []
        for index, label in enumerate(labels):
            pixels = rng.integers(0, 256, ((40, 50), (48, 40), (64, 64))[index % 3] + (3,)) // 2 + 8 * label
            row = dict(image=PILImage.fromarray(pixels.astype(np.uint8)), label=label)
            rows.append(row | dict(super=supers[label]) if supers else row)
        folder.mkdir(exist_ok=True)
        Dataset.from_list(rows, features=features).to_parquet(folder / f"{split}-00000.parquet")
    return folder


@pytest.fixture(scope="module")
def species(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "species")


def pictures(data: Path) -> list[tuple[PILImage.Image, int]]:
    """The test images and their labels, read without the package."""
    if (data / "test").is_dir():
        return [
            (PILImage.open(path).convert("RGB"), label)
            for label, name in enumerate(COLOURS)
            for path in (data / "test" / name).glob("*.png")
        ]
    split = Dataset.from_parquet(str(data / "test-00000.parquet"))
    return [(row["image"].convert("RGB"), row["label"]) for row in split]


def save(folder: Path, names: list[str], data: Path, *, seed: int = 0, size: int = 32, **config) -> Path:
    """A model that tells the pictures of `data` apart, though not correctly: its features less their mean decide."""
    torch.manual_seed(seed)
    model = timm.create_model("test_resnet", num_classes=len(names)).eval()
    data_config = dict(input_size=(3, size, size), interpolation="bicubic", crop_pct=1.0) | config
    data_config = dict(mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.3)) | data_config
    transform = timm.data.create_transform(**data_config)
    with torch.no_grad():
        inputs = torch.stack([transform(image) for image, _ in pictures(data)])
        features = model.forward_head(model.forward_features(inputs), pre_logits=True)
        head = model.get_classifier()
        head.weight.copy_(torch.randn_like(head.weight) / features.std(0).clamp(min=0.01))
        head.bias.copy_(-features.mean(0) @ head.weight.T)
    save_folder(model, folder, label_names=names, data_config=data_config, recipe="mine", dataset=str(data))
    return folder


def constant(folder: Path, logits: list[float], data: Path) -> Path:
    """A model that gives every image the same logits."""
    model = timm.create_model("test_resnet", num_classes=len(logits))
    with torch.no_grad():
        model.get_classifier().weight.zero_()
        model.get_classifier().bias.copy_(torch.tensor(logits))
    config = dict(input_size=(3, 32, 32), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", crop_pct=1.0)
    save_folder(model, folder, label_names=COLOURS, data_config=config, recipe="mine", dataset=str(data))
    return folder


def probabilities(folders: list[Path], data: Path, flip: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, K) and labels (N,): one image and one model at a time, with timm's transform."""
    rows = []
    models = [timm.create_model(f"local-dir:{folder}", pretrained=True).eval() for folder in folders]
    for image, _ in pictures(data):
        row = []
        for model in models:
            transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
            tensor = transform(image).unsqueeze(0)
            for view in [tensor, torch.flip(tensor, (3,))][: 1 + flip]:
                with torch.no_grad():
                    logits = model(view)[0].double()
                row.append(torch.exp(logits) / torch.exp(logits).sum())
        rows.append(sum(row) / len(row))
    return torch.stack(rows), torch.tensor([label for _, label in pictures(data)])


@pytest.fixture
def command(capsys):
    """Run the command in this process: exit code, standard output and error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        given = [str(argument) for argument in arguments]
        code = run_command(lambda: cli.main([*given, "--cpu"] if "evaluate" in given else given))
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def measure(command, tmp_path):
    """Evaluate and return what --json has."""

    def run(*arguments: object) -> dict:
        code, _, err = command("evaluate", *arguments, "--workers", 0, "--json", tmp_path / "out.json")
        assert code == 0, err
        return json.loads((tmp_path / "out.json").read_text())

    return run


def check(result: dict, p: torch.Tensor, labels: torch.Tensor, names: list[str]) -> None:
    """Every number of the result, from probabilities (N, K) and labels (N,)."""
    right = p.argmax(1) == labels
    assert result["images"] == len(labels)
    assert result["top1"] == pytest.approx(100 * right.double().mean().item())
    if len(names) > 5:
        in_top5 = [label in row.argsort()[-5:] for row, label in zip(p, labels)]
        assert result["top5"] == pytest.approx(100 * sum(in_top5) / len(labels))
    else:
        assert result["top5"] is None
    for label, name in enumerate(names):
        mine = labels == label
        assert result["classes"][name] == dict(correct=int(right[mine].sum()), images=int(mine.sum())), name


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("batch_size", [4, 64])
def test_a_model_scores_what_a_plain_loop_scores(measure, tmp_path, image_folder, no_network, flip, batch_size):
    folder = save(tmp_path / "best", COLOURS, image_folder, seed=3, crop_pct=0.8)
    result = measure(folder, image_folder, "--batch-size", batch_size, *["--flip"] * flip)
    check(result, *probabilities([folder], image_folder, flip), COLOURS)
    assert 0 < result["top1"] < 100, "a test of something"
    assert (result["models"], result["data"], result["split"]) == ([str(folder)], str(image_folder), "test")
    assert result["flip"] == flip and result["super_classes"] is None


@pytest.mark.parametrize("flip", [False, True])
def test_an_ensemble_of_different_inputs_scores_what_a_plain_loop_scores(measure, tmp_path, species, flip):
    folders = [
        save(tmp_path / "a", SPECIES, species, seed=1, size=32),
        save(tmp_path / "b", SPECIES, species, seed=2, size=24, crop_pct=0.7, mean=(0.1, 0.2, 0.3)),
        save(tmp_path / "c", SPECIES, species, seed=3, size=32, std=(0.5, 0.6, 0.7)),
        save(tmp_path / "d", SPECIES, species, seed=4, size=24, interpolation="bilinear"),
    ]
    result = measure(species, "--ensemble", *folders, *["--flip"] * flip)
    p, labels = probabilities(folders, species, flip)
    check(result, p, labels, SPECIES)
    assert result["models"] == [str(folder) for folder in folders]

    ensemble = Ensemble([load_model(str(folder)) for folder in folders], flip).eval()
    assert len(ensemble.views) == 3, "a and c share their view of an image"
    views = [ensemble.transform()(image) for image, _ in pictures(species)]
    with torch.inference_mode():
        torch.testing.assert_close(ensemble([torch.stack(view) for view in zip(*views)]), p.float())


def test_views_have_the_pixels_of_evaluation_in_training(tmp_path, image_folder):
    ensemble = Ensemble([load_model(str(save(tmp_path / "best", COLOURS, image_folder, crop_pct=0.8)))])
    image = pictures(image_folder)[0][0]
    assert torch.equal(ensemble.transform()(image)[0], eval_transform(32, resize=40)(image)[0])


def test_probabilities_are_averaged_not_logits(measure, tmp_path, image_folder):
    sure = constant(tmp_path / "sure", [2.0, 0.0, -9.0], image_folder)
    torn = constant(tmp_path / "torn", [-20.0, 1.0, 0.9], image_folder)
    result = measure("--ensemble", sure, torn)
    right = {name: numbers["correct"] for name, numbers in result["classes"].items()}
    assert right == dict(blue=7, green=0, red=0), "0.44, 0.32, 0.24; the logits' mean is highest for green"


def test_super_classes_sum_up_their_classes(command, measure, tmp_path, species):
    folder = save(tmp_path / "best", SPECIES, species)
    result = measure(folder)
    p, labels = probabilities([folder], species)
    check(result, p, labels, SPECIES)
    above = torch.tensor(SUPER_OF)[labels]
    assert list(result["super_classes"]) == SUPERS[:3], "most classes first; Pisces has no images"
    for number, name in enumerate(SUPERS[:3]):
        mine = above == number
        top1 = 100 * (p.argmax(1) == labels)[mine].double().mean().item()
        expected = dict(classes=SUPER_OF.count(number), images=int(mine.sum()), top1=pytest.approx(top1))
        found = result["super_classes"][name]
        assert found.pop("interval") == pytest.approx(wilson(round(top1 * int(mine.sum()) / 100), int(mine.sum())))
        assert found == expected

    code, out, err = command("evaluate", folder)
    assert code == 0 and err == "", "no bar where nobody watches"
    head, measures, families, classes, pairs = (part.splitlines() for part in out.strip().split("\n\n"))
    assert head == [f"{folder} on {species}, split test: 27 images of 8 classes"]
    low, high = result["top1_interval"]
    assert measures[1].split() == f"top-1 {result['top1']:.2f} % {low:.2f} to {high:.2f}".split()
    assert measures[2].startswith(f"top-5              {result['top5']:.2f} %")
    assert measures[3].split()[:3] == f"calibration error {result['calibration_error']:.2f}".split()
    assert measures[4].endswith("1 process on cpu, loading included")
    assert families[0].split() == "Super Class # Class images accuracy 95 % interval".split()
    assert [row.split()[:3] for row in families[1:]] == [
        ["Aves", "3", "10"],
        ["Fungi", "3", "11"],
        ["Insecta", "2", "6"],
        ["Total", "8", "27"],
    ]
    assert families[-1].split()[3] == f"{result['top1']:.2f}"
    shares = [float(row.split()[3]) for row in classes[1:]]
    assert shares == sorted(shares) and len(shares) == 8, "the lowest first"
    first = result["confusions"][0]
    assert re.split("  +", pairs[1]) == [first["label"], first["prediction"], f"{first['images']} of {first['of']}"]


def test_without_super_classes_and_mistakes_the_report_is_short(command, tmp_path, image_folder):
    folder = constant(tmp_path / "best", [9.0, 0.0, 0.0], image_folder)
    shutil.copytree(image_folder / "test" / "blue", tmp_path / "data" / "test" / "blue")
    code, out, _ = command("evaluate", folder, tmp_path / "data", "--flip", "--confusions", tmp_path / "x.png")
    assert code == 0 and (tmp_path / "x.png").is_file()
    head, *_, classes = out.strip().split("\n\n")
    assert head.splitlines() == [
        f"{folder} (image and mirror image) on {tmp_path / 'data'}, split test: 7 images of 1 class",
        "classes matched by name: 1 of the model's 3",
    ]
    assert "top-5" not in out and "most confused" not in out and len(classes.splitlines()) == 2


def wilson(right: int, total: int) -> tuple[float, float]:
    interval = binomtest(right, total).proportion_ci(0.95, method="wilson")
    return 100 * interval.low, 100 * interval.high


def check_tables(result: dict, out: Path, p: torch.Tensor, labels: torch.Tensor) -> None:
    """Confusions, calibration, intervals and both CSV files, from probabilities (N, K) and labels (N,)."""
    sure, best = p.max(1)
    right = best == labels
    assert result["top1_interval"] == pytest.approx(wilson(int(right.sum()), len(labels)), abs=1e-4)
    error = 0.0
    for number in range(15):
        inside = (sure > number / 15) & (sure <= (number + 1) / 15)
        error += abs(float(right[inside].double().sum() - sure[inside].sum())) / len(labels)
    assert result["calibration_error"] == pytest.approx(100 * error, abs=1e-3)

    wrong = Counter((SPECIES[a], SPECIES[b]) for a, b in zip(labels.tolist(), best.tolist()) if a != b)
    assert {(one["label"], one["prediction"]): one["images"] for one in result["confusions"]} == wrong
    assert all(one["of"] == COUNTS[SPECIES.index(one["label"])] for one in result["confusions"])

    rows = list(csv.DictReader((out / "pictures.csv").open(newline="")))
    assert [int(row["row"]) for row in rows] == list(range(len(labels)))
    assert [row["label"] for row in rows] == [SPECIES[label] for label in labels]
    assert [row["prediction"] for row in rows] == [SPECIES[label] for label in best]
    assert [float(row["probability"]) for row in rows] == pytest.approx(sure.tolist(), abs=1e-5)
    assert [bool(int(row["correct"])) for row in rows] == right.tolist()
    in_top5 = [int(label) in row.argsort(descending=True)[:5] for row, label in zip(p, labels)]
    assert [bool(int(row["in_top5"])) for row in rows] == in_top5

    classes = list(csv.DictReader((out / "classes.csv").open(newline="")))
    assert [row["class"] for row in classes] == SPECIES
    for label, row in enumerate(classes):
        mine = labels == label
        assert (int(row["images"]), int(row["correct"])) == (int(mine.sum()), int(right[mine].sum()))
        assert row["super_class"] == SUPERS[SUPER_OF[label]]
        interval = wilson(int(right[mine].sum()), int(mine.sum()))
        assert (float(row["low"]), float(row["high"])) == pytest.approx(interval, abs=1e-4)
        if row["most_taken_for"]:
            most = max(number for (name, _), number in wrong.items() if name == row["class"])
            assert wrong[row["class"], row["most_taken_for"]] == int(row["taken"]) == most


def test_confusions_calibration_and_tables_are_those_of_plain_loops(measure, tmp_path, species):
    folder = save(tmp_path / "best", SPECIES, species)
    files = ["--csv", tmp_path / "pictures.csv", "--class-csv", tmp_path / "classes.csv"]
    result = measure(folder, *files)
    p, labels = probabilities([folder], species)
    check_tables(result, tmp_path, p, labels)
    assert result["images_per_second"] == pytest.approx(27 / result["seconds"])
    assert (result["device"], result["processes"], result["resolution"]) == ("cpu", 1, None)


def test_pictures_are_named_in_the_table(measure, tmp_path, image_folder, species):
    folder = save(tmp_path / "best", COLOURS, image_folder)
    measure(folder, "--csv", tmp_path / "x.csv")
    for row in csv.DictReader((tmp_path / "x.csv").open(newline="")):
        assert Path(row["image"]).parent == image_folder.resolve() / "test" / row["label"]
        assert row["in_top5"] == "", "of three classes there are no five"
    named = Dataset.from_parquet(str(species / "test-00000.parquet")).add_column(
        "image_id", [f"n{i}" for i in range(27)]
    )
    (tmp_path / "named").mkdir()
    named.to_parquet(tmp_path / "named" / "test-00000.parquet")
    measure(save(tmp_path / "birds", SPECIES, species), tmp_path / "named", "--csv", tmp_path / "x.csv")
    assert [row["image"] for row in csv.DictReader((tmp_path / "x.csv").open(newline=""))] == named["image_id"][:]


def test_standard_output_can_be_a_file_alone(command, tmp_path, image_folder):
    folder = save(tmp_path / "best", COLOURS, image_folder)
    assert json.loads(command("evaluate", folder, "--json", "-")[1])["images"] == 21
    assert len(list(csv.DictReader(io.StringIO(command("evaluate", folder, "--csv", "-")[1])))) == 21
    assert len(list(csv.DictReader(io.StringIO(command("evaluate", folder, "--class-csv", "-")[1])))) == 3


def test_the_figure_shows_the_surest_mistakes(command, tmp_path, image_folder, monkeypatch):
    """All is taken for blue; how sure the model is of it depends on the picture."""
    drawn = []
    monkeypatch.setattr(sheets, "confusion_sheet", lambda pairs, *rest: drawn.extend(pairs) or b"drawn")
    folder = constant(tmp_path / "best", [3.0, 0.0, 0.0], image_folder)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    with torch.no_grad():
        model.get_classifier().weight[0] = 0.05 * torch.randn(model.num_features)
    save_folder(model, folder, label_names=COLOURS, data_config=model.pretrained_cfg, dataset=str(image_folder))
    code, _, err = command("evaluate", folder, "--confusions", tmp_path / "x.png", "--csv", tmp_path / "x.csv")
    assert code == 0, err
    assert (tmp_path / "x.png").read_bytes() == b"drawn"
    rows = list(csv.DictReader((tmp_path / "x.csv").open(newline="")))
    for pair in drawn:
        assert pair.prediction == "blue" and (pair.images, pair.of) == (7, 7)
        mine = sorted((row for row in rows if row["label"] == pair.label), key=lambda row: -float(row["probability"]))
        assert [share for _, share in pair.wrong] == pytest.approx([float(row["probability"]) for row in mine[:4]])
        for (picture, _), row in zip(pair.wrong, mine):
            assert np.array_equal(picture, PILImage.open(row["image"]).convert("RGB"))
        assert len(pair.right) == 3
    assert [pair.label for pair in drawn] == ["green", "red"]


def test_a_figure_is_drawn(command, tmp_path, image_folder):
    folder = constant(tmp_path / "best", [1.0, 0.0, 0.0], image_folder)
    assert command("evaluate", folder, "--confusions", tmp_path / "x.png")[0] == 0
    pixels = np.asarray(PILImage.open(tmp_path / "x.png").convert("RGB")).astype(int)
    shares = [(pixels[..., channel] > pixels.sum(2) * 0.55).mean() for channel in range(3)]
    assert shares[0] == pytest.approx(shares[1], rel=0.1), "four red and four green pictures"
    assert shares[2] == pytest.approx(6 / 4 * shares[0], rel=0.1), "three blue ones beside each"


def test_a_resolution_is_that_of_a_model_made_for_it(measure, tmp_path, species):
    folder = save(tmp_path / "best", SPECIES, species, size=32)
    result = measure(folder, "--resolution", 48)
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"]["input_size"] = [3, 48, 48]
    shutil.copytree(folder, tmp_path / "larger")
    (tmp_path / "larger" / "config.json").write_text(json.dumps(config))
    check(result, *probabilities([tmp_path / "larger"], species), SPECIES)
    assert result["resolution"] == "48"


@pytest.mark.parametrize(("text", "sampled"), [("256", 64), ("240:96", 96), ("192", 48)])
def test_a_tasn_samples_the_same_share_or_what_is_said(text, sampled):
    model, resolution = load_model("tasn_tiny"), Resolution.parse(text)
    set_resolution(model, resolution, "tasn_tiny")
    images = torch.rand(2, 3, resolution.input, resolution.input, generator=torch.Generator().manual_seed(0))
    twin = timm.create_model("tasn_tiny", pretrained=True, sample_size=sampled).eval()
    with torch.inference_mode():
        assert model.sample(images).shape[-2:] == (sampled, sampled)
        torch.testing.assert_close(model(images), twin(images))
    (view,) = Ensemble([model]).views
    assert view["input_size"] == (3, resolution.input, resolution.input)


def test_position_embeddings_are_resized_with_the_resolution():
    model = timm.create_model("test_vit", num_classes=3).eval()
    set_resolution(model, Resolution(192), "test_vit")
    assert model(torch.rand(1, 3, 192, 192)).shape == (1, 3)
    refused = r"^--resolution 100: model 'test_vit' does not take 100 x 100 pixels \(.+\): give 160, its own, or "
    with pytest.raises(UserError, match=refused):
        set_resolution(timm.create_model("test_vit").eval(), Resolution(100), "test_vit")
    arguments = dict(backbone="test_vit", sample_size=64, attention_net="tiny", num_classes=3)
    with pytest.raises(UserError, match=r"^--resolution 146:50: .* not take 50 x 50 .*: give 146:64, its own, or "):
        set_resolution(timm.create_model("tasn", **arguments).eval(), Resolution(146, 50), "tasn")


@pytest.mark.parametrize("text", ["", "0", "-3", "a", "3.5", "224:", "1:2:3", "64:128"])
def test_resolutions_that_are_none_are_refused(text):
    with pytest.raises(UserError, match="--resolution"):
        Resolution.parse(text)


def write_part(path: Path, data: Path, names: list[str], **more: str) -> Path:
    """The test images of these classes, in a parquet file with the classes in this order."""
    rows = Dataset.from_parquet(str(data / "test-00000.parquet"))
    keep = [row for row, label in enumerate(rows["label"][:]) if SPECIES[label] in names]
    rows, texts = rows.select(keep), [SPECIES[label] for label in rows.select(keep)["label"][:]]
    labels = [names.index(text) for text in texts]
    rows = rows.remove_columns("label").add_column("label", labels, feature=ClassLabel(names=names))
    path.mkdir()
    rows.add_column("other", labels, feature=ClassLabel(num_classes=len(names))).rename_columns(more).to_parquet(
        path / "test-00000.parquet"
    )
    return path


def test_a_part_of_the_classes_is_matched_by_name(command, measure, tmp_path, species):
    folder, twin = (save(tmp_path / name, SPECIES, species, seed=seed) for seed, name in enumerate("ab"))
    part = write_part(tmp_path / "part", species, ["species 6", "species 2", "species 4"])
    for whole, result in (
        (measure(folder, species), measure(folder, part)),
        (measure(species, "--ensemble", folder, twin), measure(part, "--ensemble", folder, twin)),
    ):
        assert result["matched_by_name"] == dict(classes=3, of=8) and whole["matched_by_name"] is None
        kept = {name: whole["classes"][name] for name in ("species 2", "species 4", "species 6")}
        assert result["classes"] == kept and result["images"] == sum(one["images"] for one in kept.values()) == 8
        assert result["top1"] == pytest.approx(100 * sum(one["correct"] for one in kept.values()) / 8)
        assert {name: family["classes"] for name, family in result["super_classes"].items()} == dict(Aves=2, Fungi=1)
    out = command("evaluate", folder, part)[1]
    assert out.splitlines()[1:3] == ["classes matched by name: 3 of the model's 8", ""]
    code, _, err = command("evaluate", folder, part, "--target-key", "other")
    assert code == 2 and "does not know 3 of the 3 classes" in err and "unknown class '0'" in err


def test_classes_in_another_order_are_matched_by_name(measure, tmp_path, species):
    folder = save(tmp_path / "best", SPECIES, species)
    turned = write_part(tmp_path / "turned", species, SPECIES[::-1], image="photo", label="kind")
    result = measure(folder, turned, "--target-key", "kind", "--input-key", "photo")
    assert result.pop("matched_by_name") == dict(classes=8, of=8)
    whole = measure(folder, species)
    assert all(result[key] == whole[key] for key in ("images", "top1", "top5", "classes", "super_classes"))


def test_data_of_the_hub_is_recorded_with_its_commit(measure, tmp_path, species, monkeypatch):
    hub = LoopbackHub()
    connect(monkeypatch, hub, tmp_path / "cache")
    commit = hub.publish("me/birds", {path.name: path.read_bytes() for path in species.iterdir()}, tag="v1")
    folder = save(tmp_path / "best", SPECIES, species)
    result = measure(folder, "me/birds@v1")
    assert result["data"] == f"me/birds@{commit}"
    assert result["classes"] == measure(folder, species)["classes"]
    assert not any("train" in request for request in hub.requests), "the other split is not downloaded"
    go_online(monkeypatch)
    hub.stop()


def test_a_bar_is_shown_where_somebody_watches(command, tmp_path, image_folder, monkeypatch):
    folder = save(tmp_path / "best", COLOURS, image_folder)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert "evaluation:   0%|" in command("evaluate", folder)[2]


def test_a_model_is_named_in_four_ways(tmp_path, image_folder):
    folder = save(tmp_path / "run" / "best", COLOURS, image_folder)
    expected = timm.create_model(f"local-dir:{folder}", pretrained=True).state_dict()
    for source in (folder, folder.parent, f"local-dir:{folder}"):
        model = load_model(str(source))
        assert not model.training
        assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
        assert trained_on(str(source)) == str(image_folder)
    for source in ("tasn_tiny", "tasn_tiny.synthbirds"):
        assert load_model(source).num_classes == 24
        assert trained_on(source) == "synthbirds"
    assert trained_on("test_resnet") is None


def test_another_split_is_measured(measure, tmp_path, image_folder):
    result = measure(save(tmp_path / "best", COLOURS, image_folder), "--split", "validation")
    assert (result["split"], result["images"]) == ("validation", 15)


def test_scores_count_classes_and_tell_top5_only_beyond_5():
    best = torch.tensor([0, 0, 1, 2, 2, 1, 0, 1])[:, None]
    scores = Scores(best, best, labels=torch.tensor([0, 0, 0, 0, 2, 2, 2, 2]), num_classes=3)
    assert scores.metrics == dict(top1=37.5, images=8)
    assert scores.correct.tolist() == [2, 0, 1] and scores.counts.tolist() == [4, 0, 4]
    loader = [Batch(torch.eye(8)[[0, 1, 2, 3]], torch.tensor([0, 1, 2, 7]), [], [])] * 2
    scores = evaluate(Accelerator(cpu=True), lambda images: images - torch.arange(8) / 100, loader)
    assert scores.metrics == dict(top1=75.0, top5=75.0, images=8)
    assert scores.correct.tolist() == [2, 2, 2, 0, 0, 0, 0, 0] and scores.counts.tolist() == [2, 2, 2, 0, 0, 0, 0, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate"], "evaluate needs a model"),
        (["evaluate", "runs/none"], "there is no model folder 'runs/none'"),
        (["evaluate", "local-dir:none"], "there is no model folder 'none'"),
        (["evaluate", "tasn_tny"], "unknown timm model 'tasn_tny': did you mean 'tasn_tiny'"),
        (["evaluate", "runs2"], "unknown timm model 'runs2'. See timm.list_models(). A model is a folder of training,"),
        (["evaluate", "hub:user/name"], "there is no model folder 'hub:user/name'"),
        (["evaluate", "tasn_tiny.cub"], "unknown weights of tasn_tiny"),
        (["evaluate", "tasn_resnet50.in1k", "synthbirds"], "'tasn_resnet50.in1k' has no trained classifier"),
        (["evaluate", "tasn", "synthbirds"], "'tasn' has no trained classifier"),
        (["evaluate", "test_resnet"], "test_resnet does not say what it was trained on: give DATA after MODEL"),
        (["evaluate", "resnet6s", "{photos}"], "model 'resnet6s' cannot be loaded: No pretrained weights"),
        (["evaluate", "{best}", "--split", "dusk"], "only train, validation, test: choose one of these with --split"),
        (
            ["evaluate", "{best}", "{species}"],
            "'{best}' does not know 8 of the 8 classes of dataset '{species}': unknown",
        ),
        (["evaluate", "{misspelt}"], "class 'green': did you mean 'greem'? Choose from blue, greem, red."),
        (["evaluate", "{shorter}", "{photos}"], "model '{shorter}' has 4 classes, but 3 names of classes"),
        (
            ["evaluate", "--ensemble", "{best}", "{swapped}"],
            "class 1 of model '{swapped}' is 'red', but of model '{best}'",
        ),
        (["evaluate", "{nameless}", "{photos}"], "has 4 classes, but dataset '{photos}' has 3"),
        (["evaluate", "--ensemble", "{best}"], "--ensemble takes two models or more"),
        (["evaluate", "--ensemble", "{best}", "tasn_tiny"], "not trained on the same data"),
        (["evaluate", "--ensemble", "{best}", "{swapped}", "{photos}"], "'{photos}' after --ensemble is a dataset"),
        (["evaluate", "--ensemble", "tasn_tiny", "tasn_tiny", "synthbirds"], "'synthbirds' after --ensemble is a"),
        (["evaluate", "--ensemble", "{best}", "{best}"], "'{best}' and '{best}' have the same weights"),
        (["evaluate", "isqrt_cov", "synthbirds"], "'isqrt_cov' has no trained classifier"),
        (["evaluate", "a", "b", "--ensemble", "{best}", "{best}"], "too many arguments (a b): evaluate takes [DATA]"),
        (["evaluate", "{best}", "{photos}", "x"], "evaluate takes MODEL [DATA]"),
        (["evaluate", "{best}", "nowhere"], "unknown dataset 'nowhere'"),
        (["evaluate", "{best}", "cub200"], "prepare cub200 --archive CUB_200_2011.tgz, or give the folder"),
        (
            ["evaluate", "{best}", "cars196"],
            "cars_train.tgz cars_test.tgz car_devkit.tgz cars_test_annos_withlabels.mat,",
        ),
        (["evaluate", "{best}", "inat2017"], "5,089 classes, 579,184/95,986 images) is not in 'data/inat2017'"),
        (["evaluate", "{best}", "--batch-size", "0"], "--batch-size: must be a whole number, 1 or more"),
        (["evaluate", "{best}", "--workers", "-1"], "--workers: must be a whole number, 0 or more"),
        (["evaluate", "{best}", "--batch-size", "x"], "must be a whole number, 1 or more, got 'x'"),
        (["evaluate", "{best}", "--json", "/no/such/folder/x.json"], "--json '/no/such/folder/x.json' cannot be"),
        (["evaluate", "{best}", "--json", "{photos}"], "is a folder"),
        (["evaluate", "{best}", "--csv", "/no/x.csv"], "--csv '/no/x.csv' cannot be written (No such file"),
        (["evaluate", "{best}", "--class-csv", "/proc/x.csv"], "--class-csv '/proc/x.csv' cannot be written"),
        (["evaluate", "{best}", "--confusions", "x.txt"], "unknown format of --confusions 'x.txt', the ending '.txt'"),
        (["evaluate", "{best}", "--csv", "x.csv", "--class-csv", "x.csv"], "name the same file"),
        (["evaluate", "{best}", "--resolution", "big"], "--resolution takes INPUT or INPUT:SAMPLED in pixels"),
        (["evaluate", "{best}", "--resolution", "64:32"], "'{best}' samples nothing: give --resolution 64"),
        (["evaluate", "{best}", "--flp"], "unrecognized arguments: --flp: see python -m tasn_timm evaluate"),
        (["evalute", "{best}"], "invalid choice: 'evalute'"),
    ],
)
def test_mistakes_get_one_line_and_exit_code_2(command, tmp_path, image_folder, species, arguments, message):
    folders = dict(photos=image_folder, species=species)
    logits = [0.0, 0.0, 0.0]
    folders["best"] = constant(tmp_path / "best", logits, image_folder)
    others = dict(swapped=["blue", "red", "green"], misspelt=["blue", "greem", "red"], shorter=COLOURS, nameless=None)
    for name, labels in others.items():
        count = 4 if name in ("shorter", "nameless") else 3
        folders[name] = constant(tmp_path / name, [0.0] * count, image_folder)
        path = folders[name] / "config.json"
        config = json.loads(path.read_text()) | dict(label_names=labels)
        path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    code, out, err = command(*[argument.format(**folders) for argument in arguments])
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("error: ") and message.format(**folders) in line


def test_a_tasn_without_class_names_is_refused_from_a_folder_too(tmp_path):
    model = timm.create_model("tasn_tiny", num_classes=3)
    save_folder(model, tmp_path / "best", label_names=COLOURS, data_config=dict(input_size=(3, 64, 64)))
    assert load_model(str(tmp_path / "best")).num_classes == 3
    path = tmp_path / "best" / "config.json"
    config = json.loads(path.read_text())
    del config["label_names"]
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="has no trained classifier"):
        load_model(str(tmp_path / "best"))


def test_outputs_that_are_not_finite_are_refused(command, tmp_path, image_folder):
    good, spoiled = (constant(tmp_path / name, [0.0, float(name), 0.0], image_folder) for name in ("1", "nan"))
    code, _, err = command("evaluate", "--ensemble", good, spoiled)
    assert code == 3 and "the output of model 2 of 2 is not finite" in err


def test_broken_folders_are_named(command, tmp_path, image_folder):
    folder = save(tmp_path / "best", COLOURS, image_folder)
    (folder / "model.safetensors").write_bytes(b"broken")
    code, _, err = command("evaluate", folder)
    assert code == 2 and f"error: model '{folder}' cannot be loaded" in err
    (folder / "config.json").write_text("{")
    code, _, err = command("evaluate", folder)
    assert code == 2 and "config.json is not JSON" in err


def test_a_class_belongs_to_one_super_class(tmp_path):
    splits = load_splits(str(write_data(tmp_path / "data")))
    assert splits["test"].column_names == ["image", "label", "super"]
    assert super_classes(splits["test"]) == {name: SUPERS[above] for name, above in zip(SPECIES, SUPER_OF)}
    assert super_classes(load_splits(str(write_data(tmp_path / "plain", None)))["test"]) is None
    split = splits["test"]
    twice = split.remove_columns("super").add_column(
        "super", [0] + [1] * (len(split) - 1), feature=split.features["super"]
    )
    with pytest.raises(ValueError, match="class 'species 0' is in super-classes 'Aves' and 'Fungi'"):
        super_classes(twice)
    unknown = split.remove_columns("super").add_column("super", [-1] * len(split))
    unknown = Dataset(unknown.data, info=split.info)  # ClassLabel's own cast would not let it pass
    with pytest.raises(ValueError, match="column 'super' has -1 for class 'species 0': it must be 0 to 3"):
        super_classes(unknown)


def test_super_classes_may_be_text_but_not_numbers(tmp_path):
    texts = [SUPERS[above] for above in SUPER_OF]
    splits = load_splits(str(write_data(tmp_path / "text", texts, Value("string"))))
    assert super_classes(splits["test"]) == dict(zip(SPECIES, texts))
    assert splits["test"].features["super"] == splits["train"].features["super"]
    with pytest.raises(ValueError, match="column 'super' of dataset .* must be text or a ClassLabel"):
        load_splits(str(write_data(tmp_path / "numbers", SUPER_OF, Value("int64"))))


def test_json_is_written_whole_or_not_at_all(command, tmp_path, image_folder, monkeypatch):
    folder, out = save(tmp_path / "best", COLOURS, image_folder), tmp_path / "results"
    out.mkdir()
    monkeypatch.setattr(command_evaluate, "report", lambda result: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        command("evaluate", folder, "--json", out / "x.json")
    assert not list(out.iterdir())
    monkeypatch.undo()
    assert command("evaluate", folder, "--json", out / "x.json")[0] == 0
    assert [path.name for path in out.iterdir()] == ["x.json"]


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["evaluate", "--help"])
    assert exit.value.code == 0
    assert "python -m tasn_timm evaluate tasn_tiny" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_count_every_image_once(tmp_path, species):
    folder = save(tmp_path / "best", SPECIES, species)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "-m"]
    command += ["tasn_timm", "evaluate", str(folder), "--cpu", "--batch-size", "4", "--json", str(tmp_path / "x.json")]
    command += ["--csv", str(tmp_path / "pictures.csv"), "--class-csv", str(tmp_path / "classes.csv")]
    result = subprocess.run(
        command, cwd=tmp_path, env=os.environ | dict(OMP_NUM_THREADS="1"), capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("27 images") == 1, "one process speaks"
    found, expected = json.loads((tmp_path / "x.json").read_text()), probabilities([folder], species)
    check(found, *expected, SPECIES)
    check_tables(found, tmp_path, *expected)
    assert found["processes"] == 2


@pytest.mark.slow
def test_the_shipped_model_scores_what_its_config_says(measure):
    result = measure("tasn_tiny")
    recorded = json.loads((HUB_CONFIGS / "tasn_tiny.synthbirds.json").read_text())["tasn"]
    assert round(result["top1"], 2) == recorded["measured_top1"]
    families = result["super_classes"]
    assert {name: (family["classes"], family["images"]) for name, family in families.items()} == dict.fromkeys(
        ("russet", "blue", "olive"), (8, 320)
    )
    for name, family in families.items():
        correct = sum(one["correct"] for label, one in result["classes"].items() if label.startswith(name))
        assert family["top1"] == pytest.approx(100 * correct / 320)
