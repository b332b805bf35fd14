"""`python -m tasn_timm check-data` finds what was planted, and counts what a plain loop counts."""

import io
import json
import os
import re
import signal
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value, concatenate_datasets
from PIL import Image as PILImage
from PIL.GifImagePlugin import GifImageFile

from tasn_timm import cli
from tasn_timm.commands import check_data
from tasn_timm.data import checking
from tasn_timm.data.checking import RECORD, TRAITS, check_splits, examine, examine_split, same_rows
from tasn_timm.data.decoding import ORIENTATION
from tasn_timm.errors import run_command
from tasn_timm.files import write_whole

NAMES = ["ant", "bee", "cat"]


def encode(image: PILImage.Image, format: str = "JPEG", **options) -> bytes:
    """An image file."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def picture(seed: int, width: int = 40, height: int = 30) -> PILImage.Image:
    """Noise that no other seed has."""
    return PILImage.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8))


def dataset(rows: list[tuple[bytes | None, int | None]], ids: bool = True) -> Dataset:
    """A split of image files and labels, with the ids "id 0", "id 1", ..."""
    features = Features(image=Image(), label=ClassLabel(names=NAMES))
    columns = dict(image=[dict(bytes=data, path=f"{n}.jpg") for n, (data, _) in enumerate(rows)])
    columns["label"] = [label for _, label in rows]
    if ids:
        features["image_id"] = Value("string")
        columns["image_id"] = [f"id {n}" for n in range(len(rows))]
    return Dataset.from_dict(columns, features=features)


def reason_of(data: bytes) -> str:
    """Why bytes are no image."""
    with pytest.raises(ValueError) as error:
        examine(dict(bytes=data, path=None))
    return str(error.value)


@pytest.fixture
def command(capsys):
    """Run the command in this process: exit code, standard output and error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = run_command(lambda: cli.main(["check-data", *map(str, arguments)]))
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def photos(tmp_path) -> Path:
    """Folders of images: 2 are damaged, 2 are in both splits (1 under another label), 1 is twice in one split."""
    folder = tmp_path / "photos"
    for split, count in (("train", 6), ("test", 3)):
        for number, name in enumerate(NAMES[: count // 2 + 1]):
            (folder / split / name).mkdir(parents=True)
            for index in range(count + number):
                seed = 1000 * count + 100 * number + index
                data = encode(picture(seed, 40 + 10 * index, 30 + number))
                (folder / split / name / f"{index}.jpg").write_bytes(data)
    train, test = folder / "train", folder / "test"
    (train / "bee" / "3.jpg").write_bytes((train / "bee" / "3.jpg").read_bytes()[:900])
    (test / "ant" / "1.jpg").write_text("<html>404</html>")
    (test / "bee" / "same.jpg").write_bytes((train / "bee" / "0.jpg").read_bytes())
    (test / "ant" / "other.jpg").write_bytes((train / "cat" / "1.jpg").read_bytes())
    (train / "ant" / "twice.jpg").write_bytes((train / "bee" / "2.jpg").read_bytes())
    (train / "ant" / "copy.jpg").write_bytes((train / "ant" / "0.jpg").read_bytes())  # harmless: the same label
    return folder


def test_what_was_planted_is_found(command, photos, tmp_path):
    code, out, err = command(photos, "--json", tmp_path / "out.json")
    assert code == 2
    assert err.endswith(
        "error: 2 of 32 images cannot be read: replace or remove them. Training can pass over images "
        "(--max-bad-images), evaluation cannot.\n"
    )
    result = json.loads((tmp_path / "out.json").read_text())
    assert (result["data"], result["images"], result["classes"]) == (str(photos), 32, 3)

    def place(one: dict) -> tuple[str, str]:
        return one["split"], str(Path(one["file"]).relative_to(photos.resolve()))

    assert [(*place(one), one["reason"].split(" (")[0]) for one in result["unreadable"]] == [
        ("train", "train/bee/3.jpg", "image file is truncated"),
        ("test", "test/ant/1.jpg", "not an image, or of a format that Pillow does not know"),
    ]
    found = {
        tuple((*place(one), one["label"]) for one in pair["places"]): (pair["across_splits"], pair["labels_agree"])
        for pair in result["duplicates"]
    }
    assert found == {
        (("train", "train/ant/twice.jpg", "ant"), ("train", "train/bee/2.jpg", "bee")): (False, False),
        (("train", "train/bee/0.jpg", "bee"), ("test", "test/bee/same.jpg", "bee")): (True, True),
        (("train", "train/cat/1.jpg", "cat"), ("test", "test/ant/other.jpg", "ant")): (True, False),
    }
    assert str(photos.resolve()) not in out.partition("\n")[2], "files without the folder that was given"
    assert re.search(r"train +row \d+ +train/bee/3.jpg +image file is truncated", out)
    assert "duplicates: 2 files in several splits (spoils tests), 1 file in one split under several labels" in out
    assert re.search(r"test +row \d+ +test/ant/other.jpg +ant  labels differ", out)
    assert "test lacks 1 class of the training split: cat" in out


def test_numbers_are_those_of_a_plain_loop(command, photos, tmp_path):
    command(photos, "--workers", 0, "--json", tmp_path / "out.json")
    splits = json.loads((tmp_path / "out.json").read_text())["splits"]
    for split in ("train", "test"):
        files = sorted((photos / split).glob("*/*.jpg"))
        sizes = []
        for file in files:
            try:
                image = PILImage.open(file)
                image.load()
                sizes.append(image.size)
            except OSError:
                pass
        summary = splits[split]
        counts = Counter(file.parent.name for file in files)
        assert summary["classes"] == {name: counts[name] for name in NAMES}
        assert (summary["images"], summary["unreadable"]) == (len(files), len(files) - len(sizes))
        for side, values in zip(("width", "height"), zip(*sizes)):
            assert summary[side] == dict(min=min(values), median=float(np.median(values)), max=max(values))
        assert (summary["formats"], summary["converted"]) == ({"JPEG": len(sizes)}, {})
        assert summary["small"] == len(sizes)
    assert splits["test"]["missing"] == ["cat"] and splits["test"]["untrained"] == []


def test_workers_change_nothing(photos, command, tmp_path):
    results = []
    for workers in (0, 1, 2):
        code, out, _ = command(photos, "--workers", workers, "--json", tmp_path / "out.json")
        results.append((code, out, (tmp_path / "out.json").read_text()))
    assert results[0] == results[1] == results[2]


def test_standard_output_can_be_json_alone(command, image_folder):
    code, out, _ = command(image_folder, "--workers", 0, "--json", "-")
    assert code == 0 and json.loads(out)["images"] == 84


def test_good_data_is_short_and_exits_with_0(command, image_folder):
    code, out, err = command(image_folder, "--workers", 0)
    assert (code, "error" in err) == (0, False)
    assert out.splitlines() == [
        f"{image_folder}: 84 images of 3 classes in 3 splits",
        "",
        "split       images  classes  images per class",
        "train           48   3 of 3  16",
        "validation      15   3 of 3  5",
        "test            21   3 of 3  7",
        "",
        "pixels      width: min  median  max  height: min  median  max  short side < 224",
        "train               40      40   40           40      40   40                48",
        "validation          40      40   40           40      40   40                15",
        "test                40      40   40           40      40   40                21",
        "",
        "formats    PNG 84",
        "converted  none",
        "",
        "unreadable: none",
        "",
        "duplicates: none",
    ]


def test_duplicates_alone_are_a_warning(command, tmp_path):
    rows = [(encode(picture(seed)), seed % 3) for seed in range(6)]
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        dataset(rows).to_parquet(tmp_path / "data" / f"{split}-00000.parquet")
    code, out, _ = command(tmp_path / "data", "--workers", 0)
    assert code == 0 and "duplicates: 6 files in several splits (spoils tests)" in out


def test_ids_and_files_name_an_image():
    good, bad = encode(picture(0)), b"text"
    result = check_splits(DatasetDict(train=dataset([(good, 0), (bad, 1), (None, 2)]), test=dataset([(good, 0)])))
    assert result["unreadable"] == [
        dict(split="train", row=1, image_id="id 1", file="1.jpg", reason=reason_of(bad)),
        dict(split="train", row=2, image_id="id 2", file="2.jpg", reason="the file does not exist"),
    ]
    assert result["duplicates"] == [
        dict(
            across_splits=True,
            labels_agree=True,
            places=[
                dict(split=split, row=0, image_id="id 0", file="0.jpg", label="ant") for split in ("train", "test")
            ],
        )
    ]
    text = check_data.report(result | dict(data="mine"))
    assert "  train  row 1  id 1  1.jpg  not an image, or of a format" in text
    assert "error" not in text
    without = check_splits(DatasetDict(train=dataset([(bad, 1)], ids=False)))
    assert without["unreadable"] == [dict(split="train", row=0, file="0.jpg", reason=reason_of(bad))]


def test_a_selection_of_rows_is_named_by_its_own_rows():
    """`select` leaves the table as it is and maps rows; ids have to be looked up by the same map."""
    split = dataset([(encode(picture(seed)) if seed % 2 else b"text", 0) for seed in range(9)])
    picked = split.select([8, 1, 4, 3])
    found = check_splits(DatasetDict(train=picked))["unreadable"]
    assert [(one["row"], one["image_id"], one["file"]) for one in found] == [(0, "id 8", "8.jpg"), (2, "id 4", "4.jpg")]


def test_unreadable_files_are_no_duplicates_of_each_other():
    split = dataset([(b"text", 0), (b"text", 1)])
    assert check_splits(DatasetDict(train=split, test=split))["duplicates"] == []


def test_a_file_in_many_places_is_one_duplicate():
    data = encode(picture(0))
    result = check_splits(DatasetDict(train=dataset([(data, 1)] * 5), test=dataset([(data, 1), (data, 2)])))
    (one,) = result["duplicates"]
    assert [(place["split"], place["row"]) for place in one["places"]] == [
        *(("train", row) for row in range(5)),
        ("test", 0),
        ("test", 1),
    ]
    assert one["across_splits"] and not one["labels_agree"]
    lines = check_data.report(result | dict(data="mine")).splitlines()
    assert lines[-2].split() == "1 train row 0 id 0 0.jpg bee".split()
    assert lines[-1].split() == "test row 0 id 0 0.jpg bee labels differ, 5 more places".split()


def test_classes_of_only_one_split_and_missing_labels_are_told():
    def split(*labels: int | None) -> Dataset:
        rows = dataset([(encode(picture(len(labels))), 0)] * len(labels))
        table = rows.remove_columns("label").add_column("label", list(labels)).select_columns(rows.column_names).data
        return Dataset(table, info=rows.info)  # ClassLabel's own cast would refuse such labels

    result = check_splits(DatasetDict(train=split(0, 0, 1, None), test=split(0, 2, -1, 7, 3)))
    train, test = result["splits"]["train"], result["splits"]["test"]
    assert (train["unlabelled"], test["unlabelled"]) == (1, 3)
    assert train["classes"] == dict(ant=2, bee=1, cat=0) and test["classes"] == dict(ant=1, bee=0, cat=1)
    assert (test["missing"], test["untrained"]) == (["bee"], ["cat"])
    assert "missing" not in train
    text = check_data.report(result | dict(data="mine"))
    assert "test has 3 images without the label of a class" in text
    assert "test lacks 1 class of the training split: bee" in text
    assert "test has 1 class that the training split has no image of: cat" in text


def test_conversions_are_counted():
    exif = PILImage.Exif()
    exif[ORIENTATION] = 6
    image, second = picture(0), picture(1)
    sixteen = PILImage.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40))
    clear = image.quantize(8)
    clear.info["transparency"] = 0
    files = {
        encode(image): [],
        encode(image, exif=exif): ["turned by EXIF"],
        encode(image, "PNG", exif=exif): ["turned by EXIF"],
        encode(image.convert("L")): ["grey"],
        encode(image.convert("1"), "PNG"): ["grey"],
        encode(image.convert("LA"), "PNG"): ["grey", "transparency"],
        encode(image.quantize(8), "PNG"): ["palette"],
        encode(clear, "PNG"): ["palette", "transparency"],
        encode(image.convert("RGBA"), "PNG"): ["transparency"],
        encode(image.convert("CMYK")): ["CMYK"],
        encode(sixteen, "PNG"): ["16-bit grey"],
        encode(image, "WEBP", save_all=True, append_images=[second]): ["several frames"],
    }
    result = check_splits(DatasetDict(train=dataset([(data, 0) for data in files])))
    assert result["unreadable"] == []
    summary = result["splits"]["train"]
    assert summary["converted"] == dict(Counter(trait for traits in files.values() for trait in traits))
    assert summary["converted"].keys() == TRAITS.keys()
    assert summary["formats"] == dict(JPEG=4, PNG=7, WEBP=1)
    assert (summary["width"]["min"], summary["height"]["max"]) == (30, 40), "upright"


def test_damage_behind_the_first_frame_does_not_matter(monkeypatch):
    def fail(self):
        raise IndexError("damaged")

    data = encode(picture(0).quantize(8), "GIF", save_all=True, append_images=[picture(1).quantize(8)])
    monkeypatch.setattr(GifImageFile, "is_animated", property(fail))
    assert examine(dict(bytes=data, path=None))[1:3] == (40, 30)


def test_a_split_without_an_image_is_reported(command):
    result = check_splits(DatasetDict(train=dataset([(encode(picture(0)), 0)]), test=dataset([]).select([])))
    assert result["splits"]["test"]["width"] is None
    text = check_data.report(result | dict(data="mine"))
    assert re.search(r"^test +0 +0 of 3  -$", text, re.MULTILINE) and "mine: 1 image of 3 classes in 2 splits" in text


def test_long_lists_are_cut_on_the_terminal_only(command, tmp_path):
    rows = [(b"text", 0)] * 30 + [(encode(picture(seed)), 0) for seed in range(30)]
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        dataset(rows).to_parquet(tmp_path / "data" / f"{split}-00000.parquet")
    code, out, _ = command(tmp_path / "data", "--workers", 0, "--json", tmp_path / "out.json")
    assert code == 2 and out.count("not an image") == 20
    assert "... and 40 more (--json FILE has all)" in out and "... and 20 more (--json FILE has all)" in out
    assert len(out.splitlines()) < 70
    result = json.loads((tmp_path / "out.json").read_text())
    assert (len(result["unreadable"]), len(result["duplicates"])) == (60, 30)


@pytest.mark.parametrize("name", ["train", "training"])
def test_the_verdict_says_what_helps(name):
    train, test = dict(split=name), dict(split="test")
    splits = {name: {}, "test": {}}
    assert check_data.verdict(dict(images=5994, splits=splits, unreadable=[train] * 3)) == (
        "3 of 5,994 images cannot be read: replace or remove them, or train with --max-bad-images 3."
    )
    assert "replace or remove it, or train" in check_data.verdict(dict(images=2, splits=splits, unreadable=[train]))
    assert "evaluation cannot" in check_data.verdict(dict(images=2, splits=splits, unreadable=[train, test]))


def test_the_training_split_may_have_another_usual_name(command, photos):
    (photos / "train").rename(photos / "training")
    assert "test lacks 1 class of the training split: cat" in command(photos)[1]


def test_records_are_small_and_equal_rows_are_found():
    assert RECORD.itemsize <= 40
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 20, (300, 2), np.uint64) + np.uint64(2**64 - 20)
    expected: dict[tuple, list[int]] = {}
    for index, row in enumerate(rows.tolist()):
        expected.setdefault(tuple(row), []).append(index)
    found = [group.tolist() for group in same_rows(rows)]
    assert found == [group for group in expected.values() if len(group) > 1]


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_killed_worker_is_told_in_one_line(command, photos, tmp_path, monkeypatch, signal_number):
    def killed(image: dict) -> tuple:
        if os.getpid() != parent:
            os.kill(os.getpid(), signal_number)
        return examine(image)

    parent = os.getpid()
    monkeypatch.setattr(checking, "examine", killed)
    code, out, err = command(photos, "--workers", 1, "--json", tmp_path / "out.json")
    assert (code, out) == (2, "") and not (tmp_path / "out.json").exists()
    assert "error: decoding stopped soon after image 0 of split 'train' (DataLoader worker" in err.splitlines()[-1]


def test_lack_of_memory_is_told_but_bugs_are_not_hidden(command, photos, monkeypatch):
    def fail(image: dict) -> tuple:
        raise error

    monkeypatch.setattr(checking, "examine", fail)
    error = MemoryError("no memory")
    assert "image 0 of split 'train' (out of memory): free some" in command(photos, "--workers", 0)[2]
    error = RuntimeError("Caught RuntimeError in DataLoader worker process 0.")  # as a worker hands it over
    with pytest.raises(RuntimeError, match="Caught"):
        command(photos, "--workers", 0)


def test_json_is_written_whole_or_not_at_all(command, photos, tmp_path, monkeypatch):
    out = tmp_path / "results"
    out.mkdir()

    def interrupt(result: dict) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(check_data, "report", interrupt)
    code, _, err = command(photos, "--workers", 0, "--json", out / "x.json")
    assert code == 130 and err.endswith("interrupted\n")
    assert not list(out.iterdir())
    monkeypatch.setattr(Path, "replace", interrupt)
    with pytest.raises((KeyboardInterrupt, TypeError)):
        write_whole(out / "x.json", "text", "--json")
    assert not list(out.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "unknown dataset 'nowhere'"),
        (["{photos}", "--workers", "-1"], "--workers: must be a whole number, 0 or more, got '-1'"),
        (["{photos}", "--json", "{photos}"], "is a folder"),
        (["{photos}", "--json", "{photos}/no/x.json"], "cannot be written"),
        (["{photos}", "--json", "{photos}/test/ant/0.jpg/x.json"], "cannot be written"),
        (["{photos}", "--input-key", "picture"], "picture"),
        ([], "required: DATA"),
    ],
)
def test_mistakes_get_one_line_and_exit_code_2(command, photos, arguments, message):
    code, out, err = command(*[argument.format(photos=photos) for argument in arguments])
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("error: ") and message in err.splitlines()[-1]


def test_keys_choose_the_columns(command, tmp_path):
    rows = [(encode(picture(seed)), seed % 3) for seed in range(3)]
    split = dataset(rows)
    split = split.add_column("other", [2, 2, 2]).cast_column("other", ClassLabel(names=NAMES))
    (tmp_path / "data").mkdir()
    split.to_parquet(tmp_path / "data" / "train-00000.parquet")
    code, out, err = command(tmp_path / "data", "--workers", 0, "--target-key", "other")
    assert code == 0, err
    assert re.search(r"^train +3 +1 of 3  3$", out, re.MULTILINE)


def test_no_image_is_kept():
    data = encode(picture(0, 400, 400), "BMP")
    split = concatenate_datasets([dataset([(data, 0)])] * 100)
    tracemalloc.start()
    try:
        examine_split(split, "train")
        assert tracemalloc.get_traced_memory()[1] < 10 * len(data)
    finally:
        tracemalloc.stop()
