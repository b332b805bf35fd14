"""A prepared dataset goes to a Hub on this machine, through the real client, and comes back the same."""

import re

import pytest
from archives_of import cub
from datasets import Image
from loopback_hub import LoopbackHub, connect

from tasn_timm import cli
from tasn_timm.data.prepare import PREPARED
from tasn_timm.data.splits import load_splits, pinned
from tasn_timm.errors import run_command


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = LoopbackHub()
    connect(monkeypatch, hub, tmp_path / "cache")
    yield hub
    hub.stop()


@pytest.fixture
def push(tmp_path, monkeypatch, capsys):
    """Prepare a small release of CUB-200-2011 and push it: exit code, standard output and error."""
    release = cub()
    facts, archives = release.write(tmp_path / "downloads")
    monkeypatch.setitem(PREPARED, "cub200", facts)
    prepared = []

    def run(*arguments: str) -> tuple[int, str, str]:
        given = [] if prepared else ["--archive", *map(str, archives)]
        code = run_command(
            lambda: cli.main(["prepare", "cub200", "--out", str(tmp_path / "cub"), *given, "--push", *arguments])
        )
        prepared.append(code)
        return code, *capsys.readouterr()

    run.rows = release.rows
    return run


def test_what_is_pushed_comes_back_at_its_commit_with_the_same_bytes(hub, push):
    code, out, err = push("me/birds")
    assert code == 0, err
    (name,) = re.findall(r"pushed: --data (me/birds@[0-9a-f]{40})\n", out)
    assert hub.repo("me/birds").private
    assert "hf_secret" not in out + err
    splits = load_splits(name)
    assert pinned("me/birds", splits) == name
    for split, expected in push.rows.items():
        rows = splits[split].cast_column("image", Image(decode=False))
        assert [row["image"]["bytes"] for row in rows] == [row["bytes"] for row in expected]
        assert [row["image"]["path"] for row in rows] == [row["path"] for row in expected]
        assert rows["label"][:] == [row["label"] for row in expected]
    stream = load_splits(name, only=["train"], streaming=True)["train"].decode(False)
    assert [row["image"]["bytes"] for row in stream] == [row["bytes"] for row in push.rows["train"]]
    assert stream.info.splits["train"].num_examples == len(push.rows["train"])


def test_pushing_again_replaces_the_files_of_an_earlier_upload(hub, push):
    hub.publish("me/birds", {"data/train-00000-of-00009.parquet": b"old", "notes.txt": b"kept"})
    code, _, err = push("me/birds", "--public")  # as the repository is already
    assert code == 0, err
    assert set(hub.repo("me/birds").find().files) == {
        *("README.md", "prepared.json", "notes.txt"),
        *("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"),
    }
