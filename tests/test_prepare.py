"""`python -m tasn_timm prepare`: archives in the official layouts in, checked parquet splits out, or nothing at all."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from archives_of import RELEASES, Release, cars_mat, cub, inat, mat, tar
from datasets import ClassLabel, Image, load_dataset, load_dataset_builder
from huggingface_hub.errors import LocalTokenNotFoundError

from tasn_timm import cli
from tasn_timm.data import cars196, inat2017, official
from tasn_timm.data import prepare as data_prepare
from tasn_timm.data.prepare import PREPARED, is_prepared, prepare
from tasn_timm.data.splits import load_splits, super_classes
from tasn_timm.errors import UserError, run_command

CUB = "CUB_200_2011/"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def command(capsys, monkeypatch):
    """Run the command in this process, with the facts of a small release: exit code, standard output and error."""

    def run(facts: official.Official, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setitem(PREPARED, facts.name, facts)
        code = run_command(lambda: cli.main(["prepare", facts.name, *map(str, arguments)]))
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def refused(command, tmp_path):
    """Run the command, which has to fail with one line of this text and to leave nothing behind; gives the line."""

    def run(facts: official.Official, archives: list[Path], text: str) -> str:
        folder = tmp_path / "out"
        code, out, err = command(facts, "--archive", *archives, "--out", folder / facts.name)
        assert (code, out) == (2, "")
        assert err.count("\n") == 1 and text in err, err
        assert not folder.exists() or not list(folder.iterdir())
        return err

    return run


def check_written(folder: Path, release: Release, tmp_path: Path, in_order: bool = True) -> None:
    """Compare a prepared folder with what should be in it, byte for byte."""
    splits = load_dataset(str(folder), cache_dir=str(tmp_path / "loaded"))
    assert list(splits) == ["train", "test"]
    for split, expected in release.rows.items():
        rows = list(splits[split].cast_column("image", Image(decode=False)))
        got = [row.pop("image") | row for row in rows]
        if not in_order:
            got.sort(key=lambda row: row["path"])
        assert got == expected


# What comes out


@pytest.mark.parametrize("name", RELEASES)
@pytest.mark.parametrize("form", ["archives", "folder", "tops"])
def test_archives_and_folders_become_splits_with_the_same_bytes(name, form, command, tmp_path):
    release = RELEASES[name]()
    facts, archives = release.write(tmp_path / "downloads")
    if form == "folder":
        archives = [release.unpack(tmp_path / "unpacked")]
    elif form == "tops":
        folder = release.unpack(tmp_path / "unpacked")
        tops = [archive.contents for archive in facts.archives]
        archives = [folder / top[0] if (folder / top[0]).is_dir() else a for top, a in zip(tops, archives)]
    out = tmp_path / "data" / name
    code, printed, err = command(facts, "--archive", *archives, "--out", out)
    assert (code, err) == (0, "")
    assert os.listdir(tmp_path / "data") == [name]
    in_order = form == "archives" or name != "inat2017"  # which is in the archive's order, or sorted by folder
    check_written(out, release, tmp_path, in_order)
    counts = f"{facts.images['train']} train and {facts.images['test']} test images of {facts.classes} classes"
    recipe = f"train with: accelerate launch train_accelerate.py --recipe {facts.recipe} --data {out}"
    assert printed.splitlines() == [f"{out}: {facts.title}, {counts}", recipe]
    card = (out / "README.md").read_text()
    for archive, given in zip(facts.archives, archives if form == "tops" else [archives[0]] * 9):
        checked = "from an unpacked folder" if Path(given).is_dir() else f"md5 {archive.md5}"
        assert f"- {archive.name}, {checked}\n" in card
        assert json.loads((out / "prepared.json").read_text())["archives"][archive.name] == checked
    assert is_prepared(facts, out)


def test_the_splits_are_what_training_and_streaming_expect(tmp_path):
    release = inat()
    prepare(*release.write(tmp_path / "downloads"), tmp_path / "inat")
    splits = load_splits(str(tmp_path / "inat"))
    names = splits["train"].features["label"].names
    assert names == ["Species 0 (Plantae)", *(f"Species {i}" for i in range(1, 13)), "Species 0 (Aves)"]
    families = super_classes(splits["train"])
    assert families["Species 0 (Aves)"] == "Aves" and families["Species 12"] == "Protozoa"
    assert Counter(families.values())["Aves"] == 2
    info = load_dataset_builder(str(tmp_path / "inat")).info
    assert {name: split.num_examples for name, split in info.splits.items()} == dict(train=28, test=14)
    assert info.features["super"] == ClassLabel(names=list(inat2017.INAT2017.super_classes))
    streamed = load_dataset(str(tmp_path / "inat"), split="test", streaming=True)
    assert streamed.info.splits["test"].num_examples == 14 == len(list(streamed))
    assert info.download_size == sum(path.stat().st_size for path in (tmp_path / "inat" / "data").iterdir())


def test_splits_are_divided_into_shards_and_row_groups(tmp_path, monkeypatch):
    import pyarrow.parquet as parquet

    monkeypatch.setattr(data_prepare, "ROW_GROUP", 3)
    monkeypatch.setattr(data_prepare, "SHARD_BYTES", 3000)
    release = cub()
    prepare(*release.write(tmp_path / "downloads"), tmp_path / "cub")
    files = sorted(path.name for path in (tmp_path / "cub" / "data").iterdir())
    assert files == ["test-00000-of-00001.parquet", *(f"train-{i:05d}-of-00002.parquet" for i in (0, 1))]
    first = parquet.ParquetFile(tmp_path / "cub" / "data" / files[1])
    assert [first.metadata.row_group(i).num_rows for i in range(first.num_row_groups)] == [3, 3]
    check_written(tmp_path / "cub", release, tmp_path)


def test_the_default_folder_is_data_and_an_empty_one_or_a_link_is_no_hindrance(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    facts, archives = cub().write(tmp_path / "downloads")
    assert command(facts, "--archive", *archives)[0] == 0
    assert is_prepared(facts, tmp_path / "data" / "cub200")
    (tmp_path / "elsewhere" / "empty").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "empty")
    assert command(facts, "--archive", *archives, "--out", "link")[0] == 0
    assert is_prepared(facts, tmp_path / "elsewhere" / "empty")
    assert os.listdir(tmp_path / "elsewhere") == ["empty"]


def test_names_with_a_dot_in_front_are_the_same_names(tmp_path):
    release = cub()
    files = release.files["CUB_200_2011.tgz"]
    release.files["CUB_200_2011.tgz"] = {f"./{name}": content for name, content in files.items()}
    prepare(*release.write(tmp_path / "downloads"), tmp_path / "cub")
    check_written(tmp_path / "cub", release, tmp_path)


def test_facts_are_those_of_the_paper_and_add_up():
    assert {name: (o.classes, *o.images.values()) for name, o in PREPARED.items()} == {
        "cub200": (200, 5994, 5794),
        "cars196": (196, 8144, 8041),
        "inat2017": (5089, 579184, 95986),
    }
    facts = PREPARED["inat2017"]
    assert len(facts.super_classes) == 13
    assert [sum(counts) for counts in zip(*facts.super_classes.values())] == list(facts.images.values())
    for name, o in PREPARED.items():
        assert o.name == name and list(o.images) == ["train", "test"]
        assert (Path(data_prepare.__file__).parents[1] / "recipes" / f"{o.recipe}.yaml").is_file()
        assert all(re.fullmatch("[0-9a-f]{32}", archive.md5) for archive in o.archives)


# How it reads


class Counted(io.FileIO):
    """A file that counts the bytes read, and does not go back."""

    total = 0

    def readinto(self, buffer):
        count = super().readinto(buffer)
        Counted.total += count
        return count

    def seek(self, *_):
        raise AssertionError("went back")


@pytest.mark.parametrize("name", RELEASES)
def test_every_archive_is_read_once(name, tmp_path, monkeypatch):
    facts, archives = RELEASES[name]().write(tmp_path / "downloads")
    opened, plain_open = Counter(), Path.open

    def counting_open(path, mode="r", *arguments, **settings):
        if path not in archives:
            return plain_open(path, mode, *arguments, **settings)
        assert mode == "rb" and settings == dict(buffering=0)
        opened[path] += 1
        return Counted(path)

    monkeypatch.setattr(Path, "open", counting_open)
    monkeypatch.setattr(Counted, "total", 0)
    prepare(facts, archives, tmp_path / "out")
    assert opened == Counter(archives)
    assert Counted.total == sum(path.stat().st_size for path in archives)


def test_a_terminal_shows_how_much_of_an_archive_is_read(tmp_path, monkeypatch):
    facts, archives = cub().write(tmp_path / "downloads")
    for number, terminal in enumerate((True, False)):
        monkeypatch.setattr(sys, "stderr", screen := io.StringIO())
        monkeypatch.setattr(screen, "isatty", lambda terminal=terminal: terminal)
        prepare(facts, archives, tmp_path / str(number))
        shown = screen.getvalue()
        assert ("CUB_200_2011.tgz:   0%|" in shown) == bool(shown) == terminal


@pytest.mark.parametrize("name", ["cub200", "inat2017"])
def test_memory_does_not_grow_with_the_archive(name, tmp_path):
    import pyarrow as pa

    big = b"\xff\xd8\xff" + bytes(1 << 20)  # 224 of them
    if name == "inat2017":
        release = inat(image=lambda number: big, each=(15, 1))
    else:
        release = cub()
        files = release.files["CUB_200_2011.tgz"]
        release.files["CUB_200_2011.tgz"] = {k: big if k.endswith("jpg") else v for k, v in files.items()}
        more = {f"{CUB}images/extra/{number}.jpg": big for number in range(200)}
        release.files["CUB_200_2011.tgz"] |= more
    facts, archives = release.write(tmp_path / "downloads")
    del release
    tracemalloc.start()
    prepare(facts, archives, tmp_path / "out")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 90 << 20  # a row group is 32 MiB
    assert pa.default_memory_pool().max_memory() < 120 << 20


def test_a_killed_run_leaves_nothing_that_looks_finished_and_the_next_one_cleans_up(tmp_path):
    facts, archives = inat().write(tmp_path / "downloads")
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from archives_of import inat
import tasn_timm.cli
from tasn_timm.data import prepare
assert not {{"datasets", "pyarrow", "scipy"}} & set(sys.modules)
release = inat()
archives = sorted(Path({str(tmp_path / "downloads")!r}).iterdir())
prepare.ROW_GROUP = 3
write = prepare._Shards._write_group
def stop(shards):
    write(shards)
    print("writing", flush=True)
    sys.stdin.read()
prepare._Shards._write_group = stop
prepare.prepare(release.facts(archives), archives, Path({str(tmp_path / "data" / "inat")!r}))
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    assert os.listdir(tmp_path / "data") == [".inat.preparing"]
    with pytest.raises(UserError, match="another process is writing .*/data/inat'"):
        prepare(facts, archives, tmp_path / "data" / "inat")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    left = [path for path in (tmp_path / "data").rglob("*") if path.suffix == ".parquet"]
    assert left and not (tmp_path / "data" / "inat").exists()
    prepare(facts, archives, tmp_path / "data" / "inat")
    assert os.listdir(tmp_path / "data") == ["inat"]
    check_written(tmp_path / "data" / "inat", inat(), tmp_path)


def test_an_interrupted_run_cleans_up(tmp_path, monkeypatch):
    def interrupt(shards):
        raise KeyboardInterrupt

    monkeypatch.setattr(data_prepare._Shards, "_write_group", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare(*cub().write(tmp_path / "downloads"), tmp_path / "data" / "cub")
    assert not os.listdir(tmp_path / "data")


def test_a_full_disk_is_told_in_a_line(refused, tmp_path, monkeypatch):
    def fill(shards):
        raise OSError(28, "No space left on device")

    facts, archives = cub().write(tmp_path / "downloads")
    monkeypatch.setattr(data_prepare._Shards, "_write_group", fill)
    refused(facts, archives, "cannot be written ([Errno 28] No space left on device): give a folder with space")


# What it refuses: the folder


def test_a_folder_that_is_taken_is_refused_before_any_work(command, tmp_path, monkeypatch):
    facts, archives = cub().write(tmp_path / "downloads")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    prepare(facts, archives, tmp_path / "finished")
    monkeypatch.setattr(data_prepare, "find_sources", lambda *_: pytest.fail("looked at the archives"))
    for out, text in (
        ("taken", "/taken' is not empty: remove it, or give another one with --out."),
        ("finished", "/finished' holds CUB-200-2011 already: remove it, or give another one with --out."),
        ("taken/notes.txt", "/taken/notes.txt' cannot become a folder of its own: give a new one with --out."),
    ):
        code, printed, err = command(facts, "--archive", *archives, "--out", tmp_path / out)
        assert (code, printed) == (2, "") and text in err
    assert (tmp_path / "taken" / "notes.txt").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["downloads", "finished", "taken"]


# What it refuses: archives


def test_archives_are_told_by_their_names(refused, command, tmp_path):
    facts, archives = RELEASES["cars196"]().write(tmp_path / "downloads")
    train, test, kit, labels = archives
    needed = "car_devkit.tgz (unpacked: devkit), cars_test_annos_withlabels.mat: give the official archive, or a folder"
    refused(facts, [train, test], f"--archive lacks {needed}")
    refused(facts, [*archives, train], "cars_train.tgz is given twice, by '")
    refused(facts, [*archives, tmp_path / "no.tgz"], "no.tgz' does not exist: give cars_train.tgz (unpacked: cars_tra")
    renamed = train.rename(tmp_path / "downloads" / "cars_train (1).tgz")
    refused(facts, [renamed, test, kit, labels], "cars_train (1).tgz' is none of the archives needed, which are told")
    unlabelled = labels.with_name("cars_test_annos.mat")
    unlabelled.write_bytes(b"of the devkit")
    err = refused(
        facts, [renamed.rename(train), test, kit, unlabelled], "cars_test_annos.mat' is none of the archives needed"
    )
    assert "cars_test_annos_withlabels.mat. Give one of them" in err
    refused(facts, [tmp_path], f"{str(tmp_path)!r} is none of the archives needed")
    code, _, err = command(facts)
    assert code == 2 and "give --archive cars_train.tgz cars_test.tgz car_devkit.tgz cars_test_annos_with" in err


def test_an_archive_with_another_checksum_is_refused(refused, tmp_path):
    facts, archives = cub().write(tmp_path / "downloads")
    expected = facts.archives[0].md5
    other = cub()
    other.files["CUB_200_2011.tgz"]["extra"] = b"repacked"
    _, archives = other.write(tmp_path / "downloads")
    err = refused(facts, archives, f"but the official CUB_200_2011.tgz has {expected}: download it again; of a rep")
    assert re.search(r"/downloads/CUB_200_2011.tgz has the md5 [0-9a-f]{32}, ", err)


@pytest.mark.parametrize("name, archive", [(n, a) for n, r in RELEASES.items() for a in range(len(r().files))])
@pytest.mark.parametrize("kept", ["nothing", "half", "all but 20 bytes"])
def test_truncated_archives_are_refused(name, archive, kept, refused, tmp_path):
    facts, archives = RELEASES[name]().write(tmp_path / "downloads")
    content = archives[archive].read_bytes()
    size = {"nothing": 0, "half": len(content) // 2, "all but 20 bytes": len(content) - 20}[kept]
    archives[archive].write_bytes(content[:size])
    err = refused(facts, archives, str(archives[archive]))
    assert "download it again" in err


def test_truncated_tar_files_are_refused(refused, tmp_path):
    facts, archives = inat().write(tmp_path / "downloads")
    files = inat().files["train_val_images.tar.gz"]
    plain = tar(tmp_path / "plain.tar", files).read_bytes()
    for size in (512 * 40, 512 * 40 + 100):  # between two blocks and within one
        archives[0].write_bytes(plain[:size])
        assert "download it again" in refused(facts, archives, str(archives[0]))


def test_damage_in_the_middle_is_noticed(refused, tmp_path):
    for name in RELEASES:
        facts, archives = RELEASES[name]().write(tmp_path / name)
        for path in archives:
            content = path.read_bytes()
            middle = len(content) // 2
            path.write_bytes(content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :])
            refused(facts, archives, str(path))
            path.write_bytes(content)


def test_a_page_saved_in_place_of_an_archive_is_refused(refused, tmp_path):
    facts, archives = cub().write(tmp_path / "downloads")
    archives[0].write_text("<html>Sign in to download</html>" * 100)
    refused(facts, archives, "it is incomplete or damaged, or no archive at all; download it again")


def entry(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0, target: str = "") -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.size, made.linkname = kind, size, target
    return made


@pytest.mark.parametrize(
    "extra, text",
    [
        (entry("../evil.jpg"), "'../evil.jpg' leads out of the archive"),
        (entry(f"{CUB}images/../../../evil"), "'CUB_200_2011/images/../../../evil' leads out of the archive"),
        (entry("/etc/evil"), "'/etc/evil' leads out of the archive"),
        (entry("../evil", tarfile.DIRTYPE), "'../evil' leads out of the archive"),
        (entry(f"{CUB}link", tarfile.SYMTYPE, target="/etc/passwd"), "'CUB_200_2011/link' is a link, a device"),
        (entry(f"{CUB}hard", tarfile.LNKTYPE, target="images.txt"), "'CUB_200_2011/hard' is a link, a device"),
        (entry(f"{CUB}device", tarfile.CHRTYPE), "'CUB_200_2011/device' is a link, a device"),
        (entry(f"{CUB}disk", tarfile.BLKTYPE), "'CUB_200_2011/disk' is a link, a device"),
        (entry(f"{CUB}pipe", tarfile.FIFOTYPE), "'CUB_200_2011/pipe' is a link, a device"),
        (entry(f"{CUB}sparse", tarfile.GNUTYPE_SPARSE), "'CUB_200_2011/sparse' is a link, a device"),
        (entry(f"{CUB}long", tarfile.GNUTYPE_LONGNAME, 1 << 40), "'CUB_200_2011/long' is a link, a device"),
    ],
)
def test_hostile_tar_members_are_refused(extra, text, refused, tmp_path):
    release = cub()
    path = tmp_path / "CUB_200_2011.tgz"
    if extra.type == tarfile.GNUTYPE_LONGNAME:  # tarfile would read as much as its header says
        files = io.BytesIO()
        with tarfile.open(fileobj=files, mode="w") as archive:
            archive.addfile(entry("first"))
        path.write_bytes(files.getvalue()[:512] + extra.tobuf(tarfile.GNU_FORMAT) + bytes(10240))
    else:
        tar(path, release.files["CUB_200_2011.tgz"], extra)
    err = refused(release.facts([path]), [path], f"{path} is refused, because {text}")
    assert err.endswith("which no official archive has: download it again.\n")


@pytest.mark.parametrize("name", ["../evil.json", "/evil.json", "a/../../evil.json"])
def test_hostile_zip_names_are_refused(name, refused, tmp_path):
    release = inat()
    release.files["train_val2017.zip"][name] = b"{}"
    refused(*release.write(tmp_path / "downloads"), "leads out of the archive, which no official archive has")


def test_links_in_zip_files_are_refused(refused, tmp_path):
    release = inat()
    _, archives = release.write(tmp_path / "downloads")
    with zipfile.ZipFile(archives[1], "a") as archive:
        link = zipfile.ZipInfo("link")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    refused(release.facts(archives), archives, "'link' is a link, a device or the like, which no official archive has")


def test_large_members_are_refused_without_being_read(refused, tmp_path, monkeypatch):
    release = cub()
    release.files["CUB_200_2011.tgz"][f"{CUB}images.txt"] = bytes((64 << 20) + 1)
    refused(*release.write(tmp_path / "a"), "'CUB_200_2011/images.txt' in ")
    release = inat()
    first = next(iter(release.files["train_val_images.tar.gz"]))
    release.files["train_val_images.tar.gz"][first] = b"\xff\xd8\xff" + bytes(64 << 20)
    refused(*release.write(tmp_path / "b"), "is larger than the 64 MiB that such a file may have")
    monkeypatch.setattr(inat2017, "JSON_BYTES", 1 << 20)
    release = inat()
    release.files["train_val2017.zip"]["val2017.json"] = bytes(1 << 21)
    refused(*release.write(tmp_path / "c"), "is larger than the 1 MiB that such a file may have")


def test_a_zip_file_whose_header_lies_about_a_size_is_refused(refused, tmp_path):
    release = inat()
    release.files["train_val2017.zip"]["val2017.json"] = bytes(1 << 22)
    _, archives = release.write(tmp_path / "downloads")
    lying = archives[1].read_bytes().replace((1 << 22).to_bytes(4, "little"), (100).to_bytes(4, "little"))
    archives[1].write_bytes(lying)
    refused(release.facts(archives), archives, "train_val2017.zip cannot be read (Bad CRC-32")


def test_members_have_the_size_that_their_header_says(tmp_path):
    from tasn_timm.data.archives import Member

    (tmp_path / "file").write_bytes(bytes(1000))
    for size in (999, 1001):
        member = Member("file", "here", size, partial((tmp_path / "file").open, "rb"))
        with pytest.raises(UserError, match=f"here cannot be read \\('file' is not of {size} bytes\\): it is incompl"):
            member.read(5000)


# What it refuses: folders


def test_links_that_lead_out_of_a_folder_are_refused(refused, tmp_path):
    folder = cub().unpack(tmp_path / "unpacked")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "file").write_text("private")
    for target in ("secret/file", "secret", "missing"):
        link = folder / CUB / "images" / "link"
        link.symlink_to(tmp_path / target)
        for given in (folder, folder / CUB):
            refused(cub().official, [given], f"{str(link)!r} is a link that leads out of {str(given)!r}: put the file")
        link.unlink()
    outside = (folder / CUB).rename(tmp_path / "outside")
    (folder / "CUB_200_2011").symlink_to(outside)
    refused(cub().official, [folder], "CUB_200_2011' is a link that leads out of")
    prepare(cub().official, [folder / "CUB_200_2011"], tmp_path / "cub")  # the user's own link
    check_written(tmp_path / "cub", cub(), tmp_path)


def test_links_inside_a_folder_are_followed_and_pipes_are_never_opened(tmp_path):
    folder = cub().unpack(tmp_path / "unpacked")
    (folder / CUB / "images.txt").rename(folder / "elsewhere.txt")
    (folder / CUB / "images.txt").symlink_to(folder / "elsewhere.txt")
    os.mkfifo(folder / CUB / "images" / "pipe.jpg")
    prepare(cub().official, [folder], tmp_path / "cub")
    check_written(tmp_path / "cub", cub(), tmp_path)


# What it refuses: content. Each change is made in an unpacked folder and in an archive with the right checksum.

ALBATROSS = f"{CUB}images/001.Black_footed_Albatross/Black_footed_Albatross_0001.jpg"


def edit(name: str, old: str, new: str):
    """Replace the first occurrence of a text in a file of CUB."""

    def change(files: dict) -> None:
        files[CUB + name] = files[CUB + name].decode().replace(old, new, 1).encode()

    return change


def edit_json(name: str, change):
    """Change what a JSON file of iNaturalist says."""

    def changed(files: dict) -> None:
        content = json.loads(files[name])
        change(content)
        files[name] = json.dumps(content).encode()

    return changed


def put(name: str, content: object):
    return lambda files: files.__setitem__(name, content)


def lose(name: str):
    return lambda files: files.pop(name)


def all_categories(files: dict, change) -> None:
    for name in inat2017.FILES.values():
        edit_json(name, change)(files)


PICTURE = "train_val_images/Plantae/Species 0/" + "0" * 32 + ".jpg"
BAD_CONTENT = {
    "cub image missing": ("cub200", 0, lose(ALBATROSS), "lacks 1 of the 12 images that are listed, the first"),
    "cub list missing": ("cub200", 0, lose(f"{CUB}classes.txt"), "has no classes.txt: use the official archive"),
    "cub no image": ("cub200", 0, put(ALBATROSS, b"<html>"), "is not an image (it starts with b'<html>'): it is dam"),
    "cub empty image": ("cub200", 0, put(ALBATROSS, b""), "is not an image (it starts with b'')"),
    "cub image not listed": (
        "cub200",
        0,
        edit("images.txt", "1 001.Black", "99 001.Black"),
        "image id 1 is in only one of images.txt and image_class_labels.txt",
    ),
    "cub split lost": (
        "cub200",
        0,
        edit("train_test_split.txt", "12 1\n", ""),
        "image id 12 is in only one of images.txt and train_test_split.txt",
    ),
    "cub box lost": ("cub200", 0, edit("bounding_boxes.txt", "3 6", "33 6"), "images.txt and bounding_boxes.txt"),
    "cub box of three": ("cub200", 0, edit("bounding_boxes.txt", "304.0", ""), "line 1 of the lists of images is not"),
    "cub class of the folder": (
        "cub200",
        0,
        edit("image_class_labels.txt", "1 1\n", "1 2\n"),
        "of class 2 in image_class_labels.txt, which is '002.Laysan_Albatross': use",
    ),
    "cub label too high": ("cub200", 0, edit("image_class_labels.txt", "1 1\n", "1 4\n"), "which is None: use"),
    "cub ids of classes": ("cub200", 0, edit("classes.txt", "3 003", "4 003"), "classes.txt are not 1 to 3"),
    "cub split of 2": ("cub200", 0, edit("train_test_split.txt", "1 1\n", "1 2\n"), "(KeyError: '2')"),
    "cub id twice": ("cub200", 0, edit("images.txt", "2 001", "1 001"), "images.txt is not laid out as the official"),
    "cub no text": (
        "cub200",
        0,
        put(f"{CUB}images.txt", b"\xff\xfe1 2"),
        "images.txt is not laid out as the official file is (UnicodeDecod",
    ),
    "cub file twice": (
        "cub200",
        0,
        edit("images.txt", "Albatross_0001", "Albatross_0000"),
        "images.txt lists '001.Black_footed_Albatross/Black_footed_Albatross_0000.jpg' twice",
    ),
    "cub counts": (
        "cub200",
        0,
        edit("train_test_split.txt", "1 1\n", "1 0\n"),
        "CUB-200-2011 has 3 classes, 7 train images, 5 test images (Table 1 of the paper), but the lists given have 3 "
        "classes, 6 train images, 6 test images: use the official archives",
    ),
    "cars image missing": (
        "cars196",
        1,
        lose("cars_test/00002.jpg"),
        "lacks 1 of the 3 images that are listed, the first 'cars_test/00002.jpg'",
    ),
    "cars no image": ("cars196", 0, put("cars_train/00001.jpg", b"PK"), "'cars_train/00001.jpg' in "),
    "cars names": (
        "cars196",
        2,
        put("devkit/cars_meta.mat", mat(class_names=np.array(["one", "one"], object)[None])),
        "two classes of Stanford Cars are called 'one'",
    ),
    "cars more classes": (
        "cars196",
        2,
        put("devkit/cars_meta.mat", mat(class_names=np.array(["one", "two", "three"], object)[None])),
        "but the lists given have 3 classes, 4 train images, 3 test images",
    ),
    "cars other mat": ("cars196", 2, put("devkit/cars_meta.mat", mat(x=np.ones(2))), "cars_meta.mat is not laid out"),
    "cars no mat": ("cars196", 2, put("devkit/cars_train_annos.mat", b"no"), "cars_train_annos.mat is not laid out"),
    "cars without labels": (
        "cars196",
        3,
        put(cars196.TEST_LABELS, cars_mat(None, ["00001.jpg"])),
        "the annotations of test images have no classes: those in cars_test_annos_withlabels.mat have them",
    ),
    "cars twice": (
        "cars196",
        3,
        put(cars196.TEST_LABELS, cars_mat([0, 1, 1], ["00001.jpg"] * 3)),
        "cars_test_annos_withlabels.mat lists '00001.jpg' twice",
    ),
    "cars label": (
        "cars196",
        3,
        put(cars196.TEST_LABELS, cars_mat([0, 1, 2], ["00001.jpg", "00002.jpg", "00003.jpg"])),
        "labels of Stanford Cars go from 0 to 2, counted from 0, but there are 2 classes",
    ),
    "cars no label": (
        "cars196",
        3,
        put(cars196.TEST_LABELS, cars_mat([0, -1, 1], ["00001.jpg", "00002.jpg", "00003.jpg"])),
        "labels of Stanford Cars go from -1 to 1, counted from 0",
    ),
    "cars untrained": (
        "cars196",
        2,
        put("devkit/cars_train_annos.mat", cars_mat([0] * 4, [f"{i:05d}.jpg" for i in range(1, 5)])),
        "class 'Acura RL Sedan 2012' of Stanford Cars has no image to train on",
    ),
    "inat image missing": ("inat2017", 0, lose(PICTURE), "lacks 1 of the 42 images that are listed, the first 'train_"),
    "inat no image": ("inat2017", 0, put(PICTURE, b"nothing here"), "(it starts with b'nothing ')"),
    "inat no json": ("inat2017", 1, put("train2017.json", b"{"), "train2017.json is not laid out as the official"),
    "inat other json": ("inat2017", 1, put("val2017.json", b"[]"), "val2017.json is not laid out as the official file"),
    "inat deep json": (
        "inat2017",
        1,
        put("val2017.json", b"[" * 10**6),
        "val2017.json is not laid out as the official file is (RecursionEr",
    ),
    "inat categories": (
        "inat2017",
        1,
        edit_json("val2017.json", lambda content: content["categories"].reverse()),
        "train2017.json and val2017.json have different categories",
    ),
    "inat ids": (
        "inat2017",
        1,
        edit_json("train2017.json", lambda content: content["categories"][3].update(id=99)),
        "the ids of the categories in train2017.json are not 0 to N - 1",
    ),
    "inat folder": (
        "inat2017",
        1,
        edit_json("train2017.json", lambda content: content["annotations"][0].update(category_id=3)),
        f"image 0 of train2017.json is '{PICTURE}', but its category is Reptilia/Species 3",
    ),
    "inat no annotation": (
        "inat2017",
        1,
        edit_json("val2017.json", lambda content: content["annotations"].pop()),
        "val2017.json has not exactly one annotation for each image (14 images, 13 annotations)",
    ),
    "inat two annotations": (
        "inat2017",
        1,
        edit_json("val2017.json", lambda content: content["annotations"].append(content["annotations"][0])),
        "(14 images, 15 annotations)",
    ),
    "inat unknown image": (
        "inat2017",
        1,
        edit_json("val2017.json", lambda content: content["annotations"][0].update(image_id=999)),
        "val2017.json has not exactly one annotation for each image",
    ),
    "inat super-class": (
        "inat2017",
        1,
        lambda files: all_categories(files, lambda content: content["categories"][0].update(supercategory="Plants")),
        "but its category is Plants/Species 0",
    ),
}


@pytest.mark.parametrize("case", BAD_CONTENT)
@pytest.mark.parametrize("form", ["archives", "folder"])
def test_wrong_content_is_refused(case, form, refused, tmp_path):
    name, archive, change, text = BAD_CONTENT[case]
    release = RELEASES[name]()
    change(list(release.files.values())[archive])
    facts, archives = release.write(tmp_path / "downloads")
    if form == "folder":
        archives = [release.unpack(tmp_path / "unpacked")]
    refused(facts, archives, text)


def test_a_missing_list_is_a_missing_archive_in_a_folder(refused, tmp_path):
    release = inat()
    del release.files["train_val2017.zip"]["val2017.json"]
    refused(*release.write(tmp_path / "downloads"), "has no val2017.json: use the official archive")
    folder = release.unpack(tmp_path / "unpacked")
    refused(release.official, [folder], "--archive lacks train_val2017.zip (unpacked: train2017.json and val2017.json)")


def test_super_classes_have_their_official_numbers(refused, tmp_path):
    facts, archives = inat().write(tmp_path / "downloads")
    facts = replace(facts, super_classes=facts.super_classes | dict(Fungi=(3, 1)))
    refused(facts, archives, "super-class Fungi has 2 train and 1 test images, but officially it has 3 and 1: use the")


@pytest.mark.parametrize("name, again", [("cub200", ALBATROSS), ("cub200", f"{CUB}classes.txt"), ("inat2017", PICTURE)])
def test_files_that_are_there_twice_are_refused(name, again, refused, tmp_path):
    release = RELEASES[name]()
    _, archives = release.write(tmp_path / "downloads")
    with tarfile.open(archives[0], "w:gz") as archive:
        files = next(iter(release.files.values()))
        for file in (*files, again):
            made = entry(file, size=len(files[file]))
            archive.addfile(made, io.BytesIO(files[file]))
    refused(release.facts(archives), archives, "twice: use the official archive")


def test_without_scipy_cars_say_what_to_install(refused, tmp_path, monkeypatch):
    facts, archives = RELEASES["cars196"]().write(tmp_path / "downloads")
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    refused(facts, archives, "Stanford Cars' lists are .mat files, which need scipy: pip install scipy.")


def test_pictures_of_other_formats_are_pictures(tmp_path):
    from PIL import Image as PILImage

    release = inat()
    formats = ["PNG", "GIF", "BMP", "TIFF", "WEBP"]
    for kind, name in zip(formats, release.files["train_val_images.tar.gz"]):
        file = io.BytesIO()
        PILImage.new("RGB", (8, 8)).save(file, kind)
        release.files["train_val_images.tar.gz"][name] = file.getvalue()
    prepare(*release.write(tmp_path / "downloads"), tmp_path / "inat")
    assert len(load_splits(str(tmp_path / "inat"))["train"]) == 28


def test_unknown_datasets_and_options_without_effect_are_refused(capsys):
    for line, text in (
        ("cub", "unknown dataset 'cub': did you mean 'cub200'? Choose from cars196, cub200, inat2017."),
        ("cub200 --archive x --public", "--public has no effect without --push USER/NAME: leave it out."),
    ):
        assert run_command(lambda line=line: cli.main(["prepare", *line.split()])) == 2
        assert capsys.readouterr().err == f"error: {text}\n"


# Pushing


class Hub:
    """Stands for HfApi: answers as told, and notes what it was asked."""

    def __init__(self, asked: list, *, role="write", exists=None, fails=None, error=None):
        self.asked, self.role, self.exists, self.fails, self.error = asked, role, exists, fails, error

    def _note(self, name, *arguments, **settings):
        self.asked.append((name, arguments, settings))
        if self.fails == name:
            raise self.error

    def whoami(self):
        self._note("whoami")
        return dict(name="me", orgs=[dict(name="lab")], auth=dict(accessToken=dict(role=self.role)))

    def repo_exists(self, repo, *, repo_type):
        self._note("repo_exists", repo, repo_type)
        return self.exists is not None

    def repo_info(self, repo, *, repo_type):
        return SimpleNamespace(private=self.exists == "private")

    def create_repo(self, *arguments, **settings):
        self._note("create_repo", *arguments, **settings)

    def upload_folder(self, *arguments, **settings):
        self._note("upload_folder", *arguments, **settings)
        return SimpleNamespace(oid="c0ffee")


@pytest.fixture
def hub(monkeypatch):
    """Put a Hub in place: what it was asked."""
    asked = []

    def connect(**settings):
        for place in ("huggingface_hub", "tasn_timm.hub_write"):
            monkeypatch.setattr(f"{place}.HfApi", lambda: Hub(asked, **settings))
        monkeypatch.setattr("tasn_timm.hub_errors.get_token", lambda: "hf_SECRET")
        return asked

    return connect


@pytest.mark.parametrize("public", [False, True])
def test_push_uploads_the_folder_privately_unless_told_otherwise(public, command, hub, tmp_path):
    asked = hub()
    facts, archives = cub().write(tmp_path / "downloads")
    out = tmp_path / "cub"
    flags = ["--public"] if public else []
    code, printed, err = command(facts, "--archive", *archives, "--out", out, "--push", "lab/birds", *flags)
    assert (code, err) == (0, "")
    assert "pushed: --data lab/birds@c0ffee\n" in printed
    assert [name for name, _, _ in asked] == ["whoami", "repo_exists", "create_repo", "upload_folder"]
    assert asked[2][1:] == (("lab/birds",), dict(repo_type="dataset", private=not public, exist_ok=True))
    uploaded = asked[3][2]
    assert (uploaded["repo_id"], uploaded["repo_type"], uploaded["folder_path"]) == ("lab/birds", "dataset", out)
    # What is there already is pushed without archives.
    code, printed, _ = command(facts, "--out", out, "--push", "lab/birds")
    assert code == 0 and "lab/birds@c0ffee" in printed and len(asked) == 8


def test_push_takes_only_a_finished_folder_of_the_same_dataset(command, hub, tmp_path):
    asked = hub()
    prepare(*cub().write(tmp_path / "downloads"), tmp_path / "cub")
    for facts, out in ((inat().official, tmp_path / "cub"), (cub().official, tmp_path / "none")):
        code, _, err = command(facts, "--out", out, "--push", "me/data")
        assert code == 2 and f"{str(out)!r} holds nothing to push: give --archive" in err
    assert not asked


@pytest.mark.parametrize(
    "repo, settings, text",
    [
        ("birds", {}, "--push must be USER/NAME, got 'birds'."),
        ("me/a--b", {}, "--push must be USER/NAME, got 'me/a--b': Cannot have -- or .. in repo_id"),
        ("you/birds", {}, "write to you/birds: you are logged in as me, so give a repository of me or lab."),
        ("me/birds", dict(role="read"), "your token may only read, so log in with one that may write"),
        ("me/birds", dict(exists="public"), "dataset me/birds exists and is public: add --public, or push to another"),
        (
            "me/birds",
            dict(fails="whoami", error=LocalTokenNotFoundError("Token is required,\nbut no token found")),
            "nobody is logged in to the Hub: log in with hf auth login",
        ),
        (
            "me/birds",
            dict(fails="repo_exists", error=ConnectionError("no route")),
            "could not be checked: the Hub cannot be reached (no route)",
        ),
    ],
)
def test_the_login_is_checked_before_any_work(repo, settings, text, command, hub, tmp_path):
    hub(**settings)
    facts, archives = cub().write(tmp_path / "downloads")
    code, printed, err = command(facts, "--archive", *archives, "--out", tmp_path / "cub", "--push", repo)
    assert (code, printed) == (2, "") and text in err and err.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == ["downloads"]


def test_a_private_repository_does_not_become_public(command, hub, tmp_path):
    hub(exists="private")
    facts, archives = cub().write(tmp_path / "downloads")
    given = ["--archive", *archives, "--out", tmp_path / "cub", "--push", "me/birds"]
    code, _, err = command(facts, *given, "--public")
    assert code == 2 and "dataset me/birds exists and is private: leave out --public, or push to another name." in err
    assert command(facts, *given)[0] == 0


def test_a_failed_upload_is_one_line_without_the_token_and_can_be_repeated(command, hub, tmp_path):
    hub(fails="upload_folder", error=RuntimeError("Illegal header value b'Bearer hf_SECRET'"))
    facts, archives = cub().write(tmp_path / "downloads")
    given = ["--out", tmp_path / "cub", "--push", "me/birds"]
    code, printed, err = command(facts, "--archive", *archives, *given)
    assert code == 2 and "me/birds could not be uploaded: Illegal header value b'Bearer ***'. Run the same" in err
    assert "SECRET" not in printed + err
    hub()
    assert command(facts, *given)[0] == 0
