"""`python -m tasn_timm predict` and `predict.predict`: values against timm and PIL, and what cannot be read."""

import csv
import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from tasn_timm import cli
from tasn_timm.data import synthbirds
from tasn_timm.data.decoding import ORIENTATION, UnreadableImage, convert, decode
from tasn_timm.errors import UserError, run_command
from tasn_timm.hub import load_model, save_folder
from tasn_timm.predict import find_pictures, label_names, predict

NAMES = ["ant", "bee", "Grünspecht, $5", "dodo"]
CONFIG = dict(input_size=(3, 32, 32), mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.3), interpolation="bicubic", crop_pct=0.8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model of four classes that tells pictures apart: their features less their mean decide."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=4).eval()
    inputs = torch.stack([timm.data.create_transform(**CONFIG)(noise(seed)) for seed in range(20)])
    with torch.no_grad():
        features = model.forward_head(model.forward_features(inputs), pre_logits=True)
        head = model.get_classifier()
        head.weight.copy_(torch.randn_like(head.weight) / features.std(0).clamp(min=0.01) / 8)
        head.bias.copy_(-features.mean(0) @ head.weight.T)
    save_folder(model, path := tmp_path_factory.mktemp("run") / "best", label_names=NAMES, data_config=CONFIG)
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Pictures of several sizes, modes and formats in folders, and beside them what is no picture."""
    root = tmp_path_factory.mktemp("photos")
    (root / "deep" / "er").mkdir(parents=True)
    noise(0).save(root / "a.png")
    noise(1, (50, 40)).save(root / "b.jpg")
    turned = Image.Exif()
    turned[ORIENTATION] = 6
    noise(2, (64, 48)).save(root / "deep" / "c.JPG", exif=turned)
    noise(3).convert("L").save(root / "deep" / "er" / "d.webp")
    (root / "deep" / "notes.txt").write_text("no picture")
    (root / ".hidden.png").write_bytes(b"")
    return root


def noise(seed: int, size: tuple[int, int] = (40, 40)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1] // 8, size[0] // 8, 3)).astype(np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def plain(folder: Path, image: Image.Image) -> dict[str, float]:
    """Probabilities by name: one RGB image, timm's transform and a softmax in float64."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.no_grad():
        logits = model(transform(image)[None])[0].double()
    return dict(zip(NAMES, (logits.exp() / logits.exp().sum()).tolist()))


@pytest.fixture
def command(capsys):
    """Run the command in this process: exit code, standard output and error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        given = [*map(str, arguments), "--cpu", "--workers", "0"]
        code = run_command(lambda: cli.main(["predict", *given]))
        return code, *capsys.readouterr()

    return run


@pytest.mark.parametrize("batch_size", [1, 3, 32])
@pytest.mark.parametrize("workers", [0, 2])
def test_probabilities_are_those_of_a_plain_loop(folder, batch_size, workers):
    pictures = [noise(seed, (40 + seed, 50)) for seed in range(5)]
    found = list(predict(load_model(str(folder)), pictures, topk=3, batch_size=batch_size, workers=workers))
    assert [one.picture for one in found] == pictures
    for one in found:
        expected = sorted(plain(folder, one.picture).items(), key=lambda item: -item[1])[:3]
        assert one.labels == [label for label, _ in expected]
        assert one.probabilities == pytest.approx([share for _, share in expected], abs=1e-5)
    assert len({one.labels[0] for one in found}) > 1, "a test of something"


def test_all_classes_sum_to_1_and_topk_is_a_limit(folder):
    (one,) = predict(load_model(str(folder)), [noise(0)], topk=99)
    assert sorted(one.labels) == sorted(NAMES) and sum(one.probabilities) == pytest.approx(1)


def test_a_file_and_the_same_picture_in_memory_are_the_same(folder, photos):
    files = find_pictures([str(photos)])
    opened = [Image.open(file) for file in files]
    for one, other, image in zip(*(predict(load_model(str(folder)), each) for each in (files, opened)), opened):
        assert one[1:] == other[1:]
        upright = {6: Image.Transpose.ROTATE_270}.get(image.getexif().get(ORIENTATION))
        image = image.convert("RGB") if upright is None else image.convert("RGB").transpose(upright)
        assert dict(zip(*one[1:])) == pytest.approx(plain(folder, image), abs=1e-5)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "I;16"])
def test_pictures_in_memory_are_converted_as_files_are(mode):
    image = noise(0).convert("L") if mode in ("1", "I;16") else noise(0)
    image = image.convert(mode)
    file = io.BytesIO()
    image.save(file, "TIFF" if mode in ("CMYK", "LA", "PA") else "PNG")
    again = Image.open(file)
    assert again.mode == image.mode or mode == "PA"
    assert np.array_equal(convert(Image.open(file)), decode(dict(bytes=file.getvalue(), path=None)))
    if again.mode == image.mode:
        assert np.array_equal(convert(image), convert(again))


def test_unreadable_pictures_are_an_error_or_passed_over(folder, photos, tmp_path):
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "half.jpg").write_bytes((photos / "b.jpg").read_bytes()[:400])
    strip = Image.new("RGB", (510, 10))
    pictures = [tmp_path / "text.jpg", photos / "a.png", tmp_path / "half.jpg", strip, noise(1)]
    told = []
    model = load_model(str(folder))
    for batch_size in (1, 2, 5):
        found = list(predict(model, pictures, batch_size=batch_size, on_unreadable=lambda *what: told.append(what)))
        assert [one.picture for one in found] == [pictures[1], pictures[4]]
    assert [picture for picture, _ in told] == [pictures[0], pictures[2], pictures[3]] * 3
    assert all(isinstance(error, UnreadableImage) for _, error in told)
    with pytest.raises(UnreadableImage, match="not an image"):
        list(predict(model, pictures))


def test_names_come_from_the_model_from_imagenet_or_are_numbers(folder):
    assert label_names(load_model(str(folder))) == NAMES
    assert label_names(timm.create_model("tasn_tiny.synthbirds")) == synthbirds.CLASS_NAMES
    assert label_names(timm.create_model("test_resnet"))[207] == "golden retriever"
    assert label_names(timm.create_model("resnet10t.c3_in1k"))[0].startswith("tench")
    assert label_names(timm.create_model("test_resnet", num_classes=3)) == ["class 0", "class 1", "class 2"]
    with pytest.raises(UserError, match="has no classifier"):
        label_names(timm.create_model("test_resnet", num_classes=0))
    for names, count in ((["ant", "bee"], 2), (["ant", "bee", "bee"], 2)):
        with pytest.raises(
            UserError, match=f"has 3 classes, but {count} different label_names: correct its config.json"
        ):
            label_names(timm.create_model("test_resnet", num_classes=3, pretrained_cfg=dict(label_names=names)))
    with pytest.raises(UserError, match="takes 1 channels"):
        label_names(timm.create_model("test_resnet", in_chans=1))


def test_files_folders_and_patterns_are_found_once_and_in_order(photos, monkeypatch):
    monkeypatch.chdir(photos)
    everything = ["a.png", "b.jpg", "deep/c.JPG", "deep/er/d.webp"]

    def found(*places: str) -> list[str]:
        return [str(path) for path in find_pictures(places)]

    assert found(".") == everything
    assert found("deep", "a.png", "./a.png", ".") == ["deep/c.JPG", "deep/er/d.webp", "a.png", "b.jpg"]
    assert found("*.[jp]*g") == ["a.png", "b.jpg"]
    assert found("**/*.webp") == ["deep/er/d.webp"]
    assert found("*") == [*everything], "folders that match a pattern are searched, too"
    assert found("deep/notes.txt") == ["deep/notes.txt"], "what is named is tried, whatever its ending"
    noise(0).save("odd[1].png")
    try:
        assert found("odd[1].png") == ["odd[1].png"]
    finally:
        os.remove("odd[1].png")


def test_text_json_and_csv_tell_the_same(command, folder, photos, tmp_path):
    code, out, err = command(folder, photos, "--topk", 2, "--json", tmp_path / "x.json", "--csv", tmp_path / "x.csv")
    assert (code, err) == (0, ""), "no bar where nobody watches"
    result = json.loads((tmp_path / "x.json").read_text())
    assert result["model"] == str(folder) and result["unreadable"] == []
    files = find_pictures([str(photos)])
    assert [one["file"] for one in result["pictures"]] == [str(file) for file in files]
    lines = iter(out.splitlines())
    rows = list(csv.DictReader((tmp_path / "x.csv").open(newline="")))
    for one, row, reference in zip(result["pictures"], rows, predict(load_model(str(folder)), files, topk=2)):
        assert (one["labels"], one["probabilities"]) == (reference.labels, pytest.approx(reference.probabilities))
        assert next(lines) == one["file"] == row["file"]
        for rank, (label, share) in enumerate(zip(one["labels"], one["probabilities"]), start=1):
            assert next(lines) == f"{100 * share:7.2f} %  {label}"
            assert row[f"label_{rank}"] == label and float(row[f"probability_{rank}"]) == share
        assert row["error"] == ""
    assert not list(lines)


def test_standard_output_can_be_json_or_csv_alone(command, folder, photos):
    code, out, _ = command(folder, photos, "--json", "-")
    assert code == 0 and len(json.loads(out)["pictures"]) == 4
    code, out, _ = command(folder, photos, "--csv", "-")
    assert code == 0 and len(list(csv.DictReader(io.StringIO(out)))) == 4


def test_file_names_need_not_be_utf_8(command, folder, tmp_path):
    """Old archives have such names; the whole folder's predictions would be lost."""
    picture = tmp_path / os.fsdecode(b"gr\xfcn.png")
    noise(0).save(picture)
    code, out, err = command(folder, picture, "--json", tmp_path / "all.json", "--csv", tmp_path / "all.csv")
    assert code == 0, err
    assert "gr\\udcfcn.png" in out
    (prediction,) = json.loads((tmp_path / "all.json").read_text())["pictures"]
    assert prediction["file"] == str(picture)
    assert "gr\\udcfcn.png" in (tmp_path / "all.csv").read_text()


def test_unreadable_files_are_reported_and_end_with_2(command, folder, photos, tmp_path):
    (tmp_path / "text.jpg").write_text("hello")
    code, out, err = command(folder, tmp_path, photos / "a.png", "--topk", 1, "--csv", tmp_path / "x.csv")
    assert code == 2 and out.splitlines()[0] == str(photos / "a.png")
    reason = "not an image, or of a format that Pillow does not know"
    assert err.splitlines() == [
        f"{tmp_path / 'text.jpg'} cannot be read: {reason}",
        "error: 1 of 2 files cannot be read: see above which, and why.",
    ]
    rows = list(csv.DictReader((tmp_path / "x.csv").open(newline="")))
    assert [(row["file"], row["label_1"] == "", row["error"]) for row in rows] == [
        (str(photos / "a.png"), False, ""),
        (str(tmp_path / "text.jpg"), True, reason),
    ]
    code, out, _ = command(folder, tmp_path / "text.jpg", "--json", "-", "--panel", tmp_path / "x.png")
    assert code == 2 and json.loads(out)["pictures"] == [] and not (tmp_path / "x.png").exists()


def test_a_bar_is_shown_where_somebody_watches(command, folder, photos, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert "predicting:   0%|" in command(folder, photos)[2]


def test_the_shipped_model_knows_its_birds_without_a_network(command, tmp_path, no_network):
    for index in range(12):
        Image.fromarray(synthbirds.draw("test", index)).save(tmp_path / f"{index:02}.png")
    code, out, _ = command("tasn_tiny", tmp_path, "--topk", 1, "--json", "-")
    best = [one["labels"][0] for one in json.loads(out)["pictures"]]
    assert code == 0 and sum(map(str.__eq__, best, synthbirds.CLASS_NAMES)) >= 10


@pytest.mark.parametrize("ending", ["png", "jpg", "pdf", "svg"])
def test_a_panel_is_written_as_its_ending_says(command, folder, photos, tmp_path, ending):
    file = tmp_path / f"x.{ending}"
    code, _, err = command(folder, photos / "a.png", "--panel", file)
    assert code == 0, err
    start = dict(png=b"\x89PNG", jpg=b"\xff\xd8", pdf=b"%PDF", svg=b"<?xml")[ending]
    assert file.read_bytes().startswith(start)


def test_a_panel_shows_what_the_model_sees(command, tmp_path):
    colours = [(10, 200, 30), (20, 40, 200)]
    for number, colour in enumerate(colours):
        Image.new("RGB", (192, 192), colour).save(tmp_path / f"{number}.png")
    code, _, err = command("tasn_tiny", tmp_path, "--panel", tmp_path / "x.png")
    assert code == 0, err
    pixels = np.asarray(Image.open(tmp_path / "x.png").convert("RGB")).astype(int)
    for colour in colours:
        same = (abs(pixels - colour).max(2) < 6).sum()
        assert same == pytest.approx(2 * 440 * 440, rel=0.02), "the picture, and the pixels that the backbone sees"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{model}"], "the following arguments are required: PICTURE"),
        (["{model}", "nowhere.jpg"], "there is no file or folder 'nowhere.jpg'"),
        (["{model}", "no*where.jpg"], "there is no file or folder 'no*where.jpg'"),
        (["{model}", "{empty}"], "folder '{empty}' has no pictures"),
        (["nowhere/best", "{photos}"], "there is no model folder 'nowhere/best'"),
        (["tasn_tny", "{photos}"], "did you mean 'tasn_tiny'"),
        (["{model}", "{photos}", "--topk", "0"], "--topk: must be a whole number, 1 or more, got '0'"),
        (["{model}", "{photos}", "--batch-size", "0"], "--batch-size: must be a whole number, 1 or more"),
        (["{model}", "{photos}", "--json", "{photos}"], "--json '{photos}' cannot be written ('{photos}' is a folder)"),
        (["{model}", "{photos}", "--csv", "{photos}/no/x.csv"], "--csv '{photos}/no/x.csv' cannot be written (No such"),
        (["{model}", "{photos}", "--panel", "/proc/x.png"], "--panel '/proc/x.png' cannot be written"),
        (["{model}", "{photos}", "--panel", "{empty}/x.docx"], "unknown format of --panel"),
        (["{model}", "{photos}", "--json", "-", "--csv", "-"], "--json and --csv name the same file"),
        (["{model}", *["{photos}/a.png"], "--flip"], "unrecognized arguments: --flip: see python -m tasn_timm predict"),
    ],
)
def test_mistakes_get_one_line_and_exit_code_2(command, folder, photos, tmp_path, arguments, message):
    names = dict(model=folder, photos=photos, empty=tmp_path)
    code, out, err = command(*[argument.format(**names) for argument in arguments])
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("error: ") and message.format(**names) in line


def test_missing_packages_are_named(command, folder, photos, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, out, err = command(folder, photos, "--panel", tmp_path / "x.png")
    assert (code, out) == (2, "") and err == "error: --panel needs matplotlib: pip install 'tasn_timm[plot]'.\n"


def test_a_panel_has_a_limit(command, folder, tmp_path):
    for number in range(51):
        (tmp_path / f"{number}.png").touch()
    code, _, err = command(folder, tmp_path, "--panel", tmp_path / "x.png")
    assert code == 2 and "--panel draws at most 50 pictures, got 51" in err


def test_folders_without_access_are_named(photos, monkeypatch):
    def refuse(folder: str) -> None:
        raise PermissionError(13, "Permission denied", folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"folder '.*' cannot be read \(Permission denied\)"):
        find_pictures([str(photos)])


def test_a_loading_process_that_is_killed_is_told(command, folder, photos, monkeypatch):
    def killed(*arguments, **settings):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that ...\nmore")

    monkeypatch.setattr("tasn_timm.predict.predict", killed)
    code, _, err = command(folder, photos)
    expected = "a loading process ended (DataLoader worker (pid 7) is killed by signal: Bus error."
    assert code == 2 and expected in err and "--shm-size" in err and "Traceback" not in err


def test_lack_of_memory_names_the_option(command, folder, photos, monkeypatch):
    def fail(self, images):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("tasn_timm.ensemble.Ensemble.forward", fail)
    code, _, err = command(folder, photos)
    assert code == 2 and err.endswith("error: out of memory with --batch-size 32 on cpu: use a smaller --batch-size.\n")
