"""Data from wherever it is: columns and splits found or asked for, class names, a Hub with and without a network."""

import csv
import io
import json
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, DatasetInfo, Features, Image, IterableDatasetDict, Value
from datasets.info import DatasetInfosDict
from huggingface_hub import DatasetCardData
from loopback_hub import LoopbackHub, connect, go_online
from PIL import Image as PILImage

from tasn_timm.data.columns import _in_order
from tasn_timm.data.decoding import decode
from tasn_timm.data.splits import class_names, load_splits, pick_split, pinned, super_classes, with_labels
from tasn_timm.errors import UserError


def png(value: int) -> bytes:
    """A picture that is all of one grey."""
    file = io.BytesIO()
    PILImage.new("RGB", (4, 4), (value,) * 3).save(file, "PNG")
    return file.getvalue()


def pictures(*values: int) -> list[dict]:
    return [dict(bytes=png(value), path=None) for value in values]


def photos(folder: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))
    return folder


def parquet(columns: dict, **features) -> bytes:
    file = io.BytesIO()
    Dataset.from_dict(columns, features=Features(**features) if features else None).to_parquet(file)
    return file.getvalue()


def birds(*labels: int, names: tuple = ("owl", "wren", "crow")) -> bytes:
    columns = dict(image=pictures(*labels), label=list(labels))
    return parquet(columns, image=Image(), label=ClassLabel(names=list(names)))


def folder_of(path: Path, columns: dict, **features) -> str:
    path.mkdir(exist_ok=True)
    (path / "train.parquet").write_bytes(parquet(columns, **features))
    return str(path)


def grey(row: dict) -> int:
    image = row["image"]
    if isinstance(image, dict):  # of a stream
        image = decode(image)
    return image.convert("RGB").getpixel((0, 0))[0]


def refused(*arguments, **options) -> str:
    """The message, always one line."""
    with pytest.raises(UserError) as error:
        load_splits(*arguments, **options)
    message = str(error.value)
    assert "\n" not in message and "hf_secret" not in message
    return message


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache" / "datasets")
    monkeypatch.chdir(tmp_path)


# Columns


def test_columns_are_found_by_kind_or_by_usual_names(tmp_path):
    columns = dict(picture=pictures(1, 2), Species=["wren", "owl"], note=["", ""], image_id=[7, 8])
    features = dict(picture=Image(), Species=Value("string"), note=Value("string"), image_id=Value("int64"))
    train = load_splits(folder_of(tmp_path / "a", columns, **features))["train"]
    assert set(train.column_names) == {"image", "label", "image_id"}
    assert train.features["label"] == ClassLabel(names=["owl", "wren"])
    assert (train["label"][:], train["image_id"][:], [grey(row) for row in train]) == ([1, 0], [7, 8], [1, 2])

    columns = dict(image=pictures(1), sex=[0], fine_label=[1], label_text=["x"])
    features = dict(image=Image(), sex=ClassLabel(names=["f", "m"]), fine_label=ClassLabel(names=["a", "b"]))
    folder = folder_of(tmp_path / "b", columns, **features, label_text=Value("string"))
    assert class_names(load_splits(folder)) == ["a", "b"]
    assert class_names(load_splits(folder, target_key="sex")) == ["f", "m"]
    assert class_names(load_splits(folder, target_key="label_text")) == ["x"]


def test_text_becomes_the_same_labels_in_all_splits(tmp_path):
    for split, texts in (("train", ["b", "c"]), ("test", ["c", "a", None])):
        columns = dict(image=pictures(*range(len(texts))), label=texts)
        (tmp_path / f"{split}.parquet").write_bytes(parquet(columns, image=Image(), label=Value("string")))
    splits = load_splits(str(tmp_path))
    assert class_names(splits) == splits["test"].features["label"].names == ["a", "b", "c"]
    assert splits["train"]["label"][:] == [1, 2]
    with pytest.raises(UserError, match="labels from -1 to 2, but names for 3 classes"):
        pick_split(splits, "test", "test_split", "mine")
    assert _in_order({"10", "9", "0"}) == ["0", "9", "10"]
    assert _in_order({"10", "9", "x", None}) == ["10", "9", "x"]


def test_bytes_and_paths_are_images_where_they_are_named(tmp_path):
    columns = dict(jpg=[png(5)], label=[0])
    features = dict(jpg=Value("binary"), label=ClassLabel(names=["a"]))
    folder = folder_of(tmp_path / "bytes", columns, **features)
    assert grey(load_splits(folder, input_key="jpg")["train"][0]) == 5
    assert "name the one with the images, or their paths, with --input-key (text or bytes here: jpg)" in refused(folder)

    photos(tmp_path / "p", "x.png", "y.png")
    columns["where"] = ["../p/y.png"]
    folder = folder_of(tmp_path / "paths", columns, **features, where=Value("string"))
    (row,) = load_splits(folder, input_key="where")["train"]
    assert (grey(row), row["image_id"]) == (1, "../p/y.png")
    assert "not read when streaming: leave out --streaming" in refused(folder, input_key="where", streaming=True)


@pytest.mark.parametrize(
    ("features", "options", "message"),
    [
        (
            dict(image=Image(), label=Value("int64")),
            {},
            "is Value('int64'), which says no names: name a column",
        ),
        (dict(image=Image(), a=ClassLabel(names=["x"]), b=ClassLabel(names=["x"])), {}, "b (ClassLabel): name the one"),
        (dict(image=Image(), a=Value("string")), {}, "with --target-key (text here: a)"),
        (
            dict(image=Image(), mask=Image(), label=Value("string")),
            {},
            "mask (Image), label (Value): name the one",
        ),
        (dict(image=Image(), label=Value("string")), dict(target_key="lable"), "--target-key 'lable' is not a column"),
        (dict(image=Image(), label=Value("string")), dict(input_key="img"), "--input-key 'img' is not a column of"),
        (dict(image=Image(), label=Value("string")), dict(input_key="label"), "cannot be both"),
        (dict(image=Image(), label=Value("string")), dict(input_key="image", target_key="image"), "cannot be both"),
        (
            dict(image=Value("int64"), label=Value("string")),
            dict(input_key="image"),
            "must be images, or paths",
        ),
        (dict(image=Image(), label=Image()), dict(input_key="image", target_key="label"), "must be text or a ClassL"),
        (
            dict(image=Image(), label=Value("string")),
            dict(streaming=True),
            "is text, and to stream data its",
        ),
    ],
)
def test_columns_that_cannot_be_told_are_listed(tmp_path, features, options, message):
    values = dict(Image=pictures(0), ClassLabel=[0])
    numbers = {name: values.get(type(kind).__name__, [0]) for name, kind in features.items()}
    columns = {name: ["x"] if kind == Value("string") else numbers[name] for name, kind in features.items()}
    assert message in refused(folder_of(tmp_path / "x", columns, **features), **options)


def test_splits_of_different_columns_or_class_names_are_refused(tmp_path):
    a = Dataset.from_dict(dict(image=pictures(0), label=[0]), Features(image=Image(), label=ClassLabel(names=["a"])))
    b = a.cast_column("label", ClassLabel(names=["b"]))
    DatasetDict(train=a, test=b).save_to_disk(tmp_path / "names")
    DatasetDict(train=a, test=b.rename_column("image", "photo")).save_to_disk(tmp_path / "columns")
    assert "'train' and 'test' of dataset 'names' have different names in column 'label'" in refused("names")
    assert "column 'image' of dataset 'columns' is in one of the splits 'train' and 'test' only" in refused("columns")


def test_labels_are_replaced_without_reading_or_copying_images(tmp_path):
    columns = dict(image=[dict(bytes=b"\xff" * 2000, path=None)] * 500, label=["b", "a"] * 250)
    splits = load_splits(folder_of(tmp_path / "x", columns, image=Image(), label=Value("string")))
    size = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.arrow"))
    assert 1_000_000 < size < 1_100_000, "the images are in the cache once"
    before = pa.total_allocated_bytes()
    turned = with_labels(splits["train"], np.arange(500), [str(i) for i in range(500)])
    assert pa.total_allocated_bytes() - before < 20_000
    assert turned["label"][:] == list(range(500)) and splits["train"]["label"][:3] == [1, 0, 1]
    assert turned.features["image"] == Image()


def test_streams_leave_images_as_they_are(tmp_path):
    for names in (("image", "label"), ("photo", "species")):
        columns = dict(zip(names, ([*pictures(1), dict(bytes=b"spoiled", path=None)], [0, 1])))
        folder = folder_of(tmp_path / names[0], columns, **dict(zip(names, (Image(), ClassLabel(names=["a", "b"])))))
        stream = load_splits(folder, streaming=True)["train"]
        assert stream.features["image"] == Image() and stream.features["label"] == ClassLabel(names=["a", "b"])
        assert grey(next(iter(stream))) == 1
        one, two = stream.cast_column("image", Image(decode=False))
        assert (one["image"]["bytes"], one["label"]) == (png(1), 0)
        assert (two["image"]["bytes"], two["label"]) == (b"spoiled", 1), "nobody has tried to decode it"


# Split names


def test_a_split_is_found_under_its_usual_names():
    rows = Dataset.from_dict(dict(label=range(5)), Features(label=ClassLabel(num_classes=5)))
    present = ("training", "val", "dev", "testing", "odd")
    splits = DatasetDict({name: rows.select([number]) for number, name in enumerate(present)})

    def picked(name: str) -> str:
        return present[pick_split(splits, name, "--split", "mine")["label"][0]]

    names = ("train", "training", "test", "testing", "val", "dev", "odd")
    assert [picked(name) for name in names] == ["training", "training", "testing", "testing", "val", "dev", "odd"]
    for name in ("validation", "valid", "tests", "Train"):  # two could be meant, or none
        with pytest.raises(UserError, match=f"no split '{name}', only training, val, dev, testing, odd: choose"):
            pick_split(splits, name, "--split", "mine")


def test_only_what_is_asked_for_is_loaded(tmp_path):
    (tmp_path / "birds").mkdir()
    for split in ("train", "validation", "test"):
        (tmp_path / "birds" / f"{split}.parquet").write_bytes(birds(0, 1, 2))
    splits = load_splits("birds", only=["test", "val"])
    assert list(splits) == ["validation", "test"]
    cached = {path.name for path in (tmp_path / "cache").rglob("*.arrow")}
    assert {name.split("-")[-1] for name in cached} == {"validation.arrow", "test.arrow"}, "train is not converted"
    message = "no split 'x', only train, validation, test: choose one of these."
    for options in (dict(only=["x"]), dict(only=["test", "x"]), dict(only=["x"], streaming=True)):
        assert message in refused("birds", **options)


# Folders and tables


def test_folders_of_images_with_and_without_splits(tmp_path):
    files = ("train/a/1.JPG", "train/b/2.png", "val/a/3.png", "Test/c/4.webp", "test.txt", "train/a/notes.txt")
    splits = load_splits(str(photos(tmp_path / "birds [2024]", *files)))
    assert {name: len(rows) for name, rows in splits.items()} == dict(train=2, val=1, test=1)
    assert class_names(splits) == ["a", "b", "c"]
    assert [splits[name]["label"][0] for name in ("train", "val", "test")] == [0, 0, 2]
    raw = splits["test"].cast_column("image", Image(decode=False))[0]["image"]
    assert raw == dict(bytes=None, path=str(tmp_path / "birds [2024]" / "Test" / "c" / "4.webp"))

    # `datasets` by itself takes these classes for parts of other splits.
    splits = load_splits(str(photos(tmp_path / "tools", "dev-board/1.png", "test tube/2.png", "train/3.png")))
    assert (list(splits), class_names(splits)) == (["train"], ["dev-board", "test tube", "train"])
    assert splits["train"]["label"][:] == [0, 1, 2]
    one = load_splits(str(photos(tmp_path / "one", "test/owl/1.png")))
    assert (list(one), class_names(one)) == (["test"], ["owl"])
    deep = photos(tmp_path / "deep", "train/a/1.png", "train/a/deep/2.png")
    assert "train/a' has images in folders of its own" in refused(str(deep))
    empty = photos(tmp_path / "empty", "train/a/1.png", "train/z/notes.txt")
    assert "train/z' has no images: remove it" in refused(str(empty))


def test_folders_of_parquet_with_a_readme_and_of_save_to_disk(tmp_path):
    table = pa.table(dict(image=pictures(3, 4), label=[1, 0]))  # without what `datasets` would write beside it
    features = Features(image=Image(), label=ClassLabel(names=["a", "b"]))
    info = DatasetInfo(features=features)
    data = DatasetCardData(configs=[dict(config_name="default", data_files=[dict(split="test", path="data/test-*")])])
    DatasetInfosDict(default=info).to_dataset_card_data(data)
    (tmp_path / "p" / "data").mkdir(parents=True)
    pq.write_table(table, tmp_path / "p" / "data" / "test-00000-of-00001.parquet")
    (tmp_path / "p" / "README.md").write_text(f"---\n{data.to_yaml()}\n---\n")
    for options in ({}, dict(only=["test"]), dict(streaming=True)):
        splits = load_splits(str(tmp_path / "p"), **options)
        assert (list(splits), class_names(splits)) == (["test"], ["a", "b"])
        assert [(grey(row), row["label"]) for row in splits["test"]] == [(3, 1), (4, 0)]

    splits = load_splits(str(tmp_path / "p"))
    splits.save_to_disk(tmp_path / "saved")
    splits["test"].save_to_disk(tmp_path / "single")
    for name in ("saved", "single"):
        again = load_splits(str(tmp_path / name))
        assert [(grey(row), row["label"]) for row in again["test"]] == [(3, 1), (4, 0)]


def write_csv(path: Path, *rows: tuple) -> str:
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return str(path)


def test_a_table_of_paths_and_labels(tmp_path):
    photos(tmp_path / "t", "p/0.png", "p/1, or so.png", "2.png")
    rows = [("file", "species", "split", "super"), ("p/1, or so.png", "NA", "train", "Aves")]
    rows += [(str(tmp_path / "t" / "2.png"), "007", "test", "Fungi"), ("p/0.png", "007", "train", "Fungi")]
    table = write_csv(tmp_path / "t" / "photos.csv", *rows)
    splits = load_splits(table)
    assert (list(splits), class_names(splits)) == (["train", "test"], ["007", "NA"])
    train = splits["train"]
    assert [(grey(row), row["label"], row["image_id"]) for row in train] == [
        (1, 1, "p/1, or so.png"),
        (0, 0, "p/0.png"),
    ]
    assert super_classes(train) == {"NA": "Aves", "007": "Fungi"}
    assert grey(splits["test"][0]) == 2
    assert train.cast_column("image", Image(decode=False))[0]["image"]["bytes"] is None
    assert list(load_splits(table, only=["testing"])) == ["test"]
    streams = load_splits(table, streaming=True)
    assert isinstance(streams, IterableDatasetDict) and streams["train"].info.splits["train"].num_examples == 2
    assert sorted((grey(row), row["label"]) for row in streams["train"]) == [(0, 0), (1, 1)]

    for split in ("train", "test"):
        write_csv(tmp_path / "two" / f"{split}.csv", ("image_id", "path", "class"), (split, "../t/2.png", split))
    splits = load_splits(str(tmp_path / "two"))
    assert class_names(splits) == ["test", "train"] and splits["test"]["image_id"][:] == ["test"]
    assert splits["test"]["label"][:] == [0] and grey(splits["test"][0]) == 2


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [("image", "label"), ("x.png", "a"), ("x.png",)],
            "cannot be read (CSV parse error: Row #3: Expected 2 col",
        ),
        ([("image", "label")], "has no rows"),
        ([("image", "label", "label"), ("x.png", "a", "b")], "has two columns of one name"),
        ([("image", "label", "split"), ("x.png", "a", "")], "column 'split' of"),
        ([("image", "label"), ("nowhere.png", "a")], "names an image 'nowhere.png', but there is no file"),
        ([("image", "label"), ("", "a")], "has no path for image 0"),
        ([("a", "label"), ("x.png", "a")], "needs exactly one column of paths with a usual name, but has a (Value)"),
        ([("image", "path", "label"), ("x.png", "x.png", "a")], "but has image (Value), path (Value), label (Value)"),
        ([("image", "b"), ("x.png", "a")], "with --target-key (text here: image, b)"),
        (
            [("image", "label", "class_name"), ("x.png", "1", "a")],
            "needs exactly one ClassLabel column, or one of",
        ),
    ],
)
def test_tables_that_are_not_understood(tmp_path, rows, message):
    photos(tmp_path, "x.png")
    assert message in refused(write_csv(tmp_path / "photos.csv", *rows))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.csv", "table 'nowhere.csv' cannot be read"),
        ("x.png", "'x.png' is neither a folder nor a .csv file"),
        ("empty", "data folder"),
        ("broken", "broken' cannot be read ("),
        (
            "inat2018",
            "unknown dataset 'inat2018': did you mean 'inat2017'? Choose from cars196, cub200",
        ),
        (
            "cub200",
            "not in 'data/cub200': make it with python -m tasn_timm prepare cub200 --archive CUB_200_2011.tgz",
        ),
        (
            "cars196",
            "--archive cars_train.tgz cars_test.tgz car_devkit.tgz cars_test_annos_withlabels.mat, or give",
        ),
        ("inat2017", "prepare inat2017 --archive train_val_images.tar.gz train_val2017.zip, or give the folder"),
    ],
)
def test_what_is_not_there_or_broken_is_named(tmp_path, capfd, name, message):
    photos(tmp_path, "x.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train.parquet").write_bytes(b"broken")
    (tmp_path / "cub200").mkdir()  # a folder of that name counts where it is said to be one
    assert message in refused(name)


def test_built_in_names_are_what_prepare_writes(tmp_path):
    for place in ("data/cub200", "cub200"):
        (tmp_path / place / "data").mkdir(parents=True)
        (tmp_path / place / "data" / "test-00000-of-00001.parquet").write_bytes(birds(len(place) % 3))
    assert load_splits("cub200")["test"]["label"][:] == [2]
    assert load_splits("./cub200")["test"]["label"][:] == [0]
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "test.parquet").write_bytes(birds(1))
    assert load_splits("csv")["test"]["label"][:] == [1], "the name of a format is a folder's, too"


def test_progress_bars_are_as_they_were(tmp_path, capfd, monkeypatch):
    datasets.enable_progress_bars()
    for watched in (False, True):
        (tmp_path / "birds").mkdir(exist_ok=True)
        (tmp_path / "birds" / "test.parquet").write_bytes(birds(1 + watched))
        monkeypatch.setattr("sys.stderr.isatty", lambda watched=watched: watched)
        capfd.readouterr()
        load_splits("birds")
        assert ("Generating test split" in capfd.readouterr().err) == watched
        assert not datasets.are_progress_bars_disabled()


def test_super_classes_of_many_images_are_found():
    labels = np.random.default_rng(0).integers(0, 5089, 600_000)
    features = Features({"label": ClassLabel(num_classes=5089), "super": ClassLabel(num_classes=13)})
    split = Dataset.from_dict({"label": labels, "super": labels % 13}, features)
    families = super_classes(split)
    assert families == {str(label): str(label % 13) for label in range(5089)}
    assert list(families.values()) == sorted(families.values(), key=int)


# The Hub

README = b"""---
configs:
- config_name: default
  data_files:
  - {split: train, path: data/train-*}
  - {split: test, path: data/test-*}
dataset_info:
  features:
  - {name: image, dtype: image}
  - {name: label, dtype: {class_label: {names: {'0': owl, '1': wren, '2': crow}}}}
  splits:
  - {name: train, num_bytes: 1, num_examples: 3}
  - {name: test, num_bytes: 1, num_examples: 2}
---
"""
TRAIN, TEST = "data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"
FILES = {"README.md": README, TRAIN: birds(0, 1, 2), TEST: birds(2, 1)}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = LoopbackHub()
    connect(monkeypatch, hub, tmp_path / "cache")
    yield hub
    go_online(monkeypatch)
    hub.stop()


@pytest.fixture
def two(hub) -> tuple[str, str]:
    """Commits of me/birds: v1 with three training images, and main with one."""
    old = hub.publish("me/birds", FILES, tag="v1")
    return old, hub.publish("me/birds", {TRAIN: birds(1), TEST: birds(1, 1)})


def fetched(hub: LoopbackHub) -> set[str]:
    """Data files that were downloaded, or of which a part was."""
    return {Path(path).name for method, path in map(str.split, hub.requests) if method == "GET" and "parquet" in path}


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub, two):
    old, new = two
    for revision, commit in (("", new), ("@main", new), ("@v1", old), (f"@{old}", old)):
        splits = load_splits(f"me/birds{revision}")
        assert len(splits["train"]) == (3 if commit == old else 1)
        assert pinned(f"me/birds{revision}", splits) == f"me/birds@{commit}"
    assert [grey(row) for row in load_splits(pinned("me/birds@v1", load_splits("me/birds@v1")))["train"]] == [0, 1, 2]
    assert pinned("photos/", splits) == "photos/"


def test_only_the_splits_asked_for_are_downloaded(hub, two):
    splits = load_splits("me/birds@v1", only=["testing"])
    assert fetched(hub) == {Path(TEST).name} and list(splits) == ["test"]
    assert class_names(splits) == ["owl", "wren", "crow"]
    load_splits("me/birds@v1", only=["train", "test"])
    assert fetched(hub) == {Path(TEST).name, Path(TRAIN).name}
    assert "no split 'dev', only train, test" in refused("me/birds@v1", only=["dev"])


def test_a_stream_downloads_nothing_before_it_is_read(hub, two):
    splits = load_splits("me/birds@v1", only=["train"], streaming=True)
    assert isinstance(splits, IterableDatasetDict) and list(splits) == ["train"]
    train = pick_split(splits, "training", "train_split", "me/birds")
    assert set(train.features) == {"image", "label"} and class_names(splits) == ["owl", "wren", "crow"]
    assert train.info.splits["train"].num_examples == 3
    assert pinned("me/birds@v1", splits) == f"me/birds@{two[0]}"
    assert not fetched(hub)
    assert [(grey(row), row["label"]) for row in train] == [(0, 0), (1, 1), (2, 2)]
    assert fetched(hub) == {Path(TRAIN).name}


@pytest.mark.parametrize("how", ["offline", "server down"])
def test_a_warm_cache_needs_no_hub_and_keeps_revisions_apart(hub, two, monkeypatch, caplog, how):
    old, new = two
    for name in ("me/birds", "me/birds@v1"):
        load_splits(name)
        load_splits(name, only=["test"])
    hub.requests.clear()
    go_online(monkeypatch, how == "server down")
    if how == "server down":
        hub.stop()
    start = time.perf_counter()
    for name, commit in (("me/birds@v1", old), ("me/birds", new), (f"me/birds@{old}", old)):
        for only in (None, ["test"], ["train", "test"]):
            splits = load_splits(name, only=only)
            assert pinned(name, splits) == f"me/birds@{commit}"
            assert list(splits) == (["test"] if only == ["test"] else ["train", "test"])
            assert splits["test"]["label"][:] == ([2, 1] if commit == old else [1, 1])
    stream = load_splits("me/birds@v1", only=["train"], streaming=True)
    assert [grey(row) for row in stream["train"]] == [0, 1, 2] and pinned("me/birds", stream) == f"me/birds@{old}"
    assert time.perf_counter() - start < 15 and not hub.requests
    assert ("taken from the cache, commit" in caplog.text) == (how == "server down")
    message = refused("me/birds@v2")
    assert "'me/birds@v2' is not in the cache" in message and str(datasets.config.HF_DATASETS_CACHE) in message
    assert ("HF_HUB_OFFLINE is set: unset it" if how == "offline" else "the Hub cannot be reached") in message


def test_an_empty_cache_without_a_hub_is_told(hub, two, monkeypatch):
    go_online(monkeypatch, False)
    assert "and HF_HUB_OFFLINE is set: unset it to load the data once, or give a folder" in refused("me/birds")
    go_online(monkeypatch)
    load_splits("me/birds", only=["test"])
    go_online(monkeypatch, False)
    assert "is not in the cache" in refused("me/birds"), "the training images were never loaded"
    assert "is not in the cache" in refused("me/birds", only=["train"])


def test_every_problem_with_the_hub_is_one_line(hub, two):
    for repo in ("you/gated", "you/private"):
        hub.publish(repo, FILES)
    hub.repo("you/gated").gated = hub.repo("you/private").private = True
    hub.publish("me/script", {"script.py": b"", "README.md": b"# x\n"})
    hub.publish("me/text", {"notes.docx": b"x"})
    hub.publish("me/broken", {TEST: b"broken"})
    hub.publish("me/bare", {TEST: parquet(dict(image=pictures(0), note=["x"]), image=Image(), note=Value("string"))})
    for repo in ("you/private", "me/absent", "data/photos"):
        assert f"dataset '{repo}' is neither a folder here nor on the Hub, or it is private" in refused(repo)
    assert f"'you/gated' is gated: accept its terms at {hub.url}/datasets/you/gated, then" in refused("you/gated")
    assert "'you/gated' is gated" in refused("you/gated", streaming=True)
    assert "unknown revision of dataset 'me/birds' 'v1x': did you mean 'v1'? Choose from main" in refused(
        "me/birds@v1x"
    )
    assert "unknown revision" in refused(f"me/birds@{'0' * 40}")
    assert "'me/script' is a script, which datasets no longer runs: use a" in refused("me/script")
    assert "'me/text' has no files that datasets reads" in refused("me/text")
    assert "'me/broken' cannot be loaded: " in refused("me/broken")
    assert "but has image (Image), note (Value)" in refused("me/bare")


def test_the_commit_is_read_from_the_info_that_datasets_keep(hub, two):
    split = load_splits("me/birds@v1")["test"]
    assert json.dumps(split.select([0]).info.download_checksums) == json.dumps({f"hf://datasets/me/birds@{two[0]}": {}})
