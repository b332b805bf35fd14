"""The Hub of the tests answers the real clients as the real Hub does."""

import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import timm
import torch
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from loopback_hub import READ_TOKEN, WRITE_TOKEN, Fault, LoopbackHub, connect, environment
from PIL import Image

WEIGHTS = np.random.default_rng(0).bytes(2_000_000)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = LoopbackHub()
    connect(monkeypatch, hub, tmp_path / "cache")
    yield hub
    hub.stop()


@pytest.fixture
def api(hub) -> HfApi:
    return HfApi()


@pytest.fixture
def no_pause(monkeypatch):
    """The client tries again at once."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)


@pytest.fixture
def folder(tmp_path):
    """A model as a folder: 2 MB of weights and a configuration."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "config.json").write_text('{"architecture": "test_resnet"}')
    return folder


@pytest.fixture
def model(api, folder) -> str:
    """The folder on the Hub, as me/x."""
    api.create_repo("me/x")
    return api.upload_folder(repo_id="me/x", folder_path=folder).oid


def status(call, *args, **kwargs) -> int:
    """Of the answer that makes a client's call fail."""
    with pytest.raises(HfHubHTTPError) as raised:
        call(*args, **kwargs)
    return raised.value.response.status_code


def test_a_repository_is_created_once(api):
    assert api.whoami()["name"] == "me"
    assert not api.repo_exists("me/x")
    assert api.create_repo("x", private=True).repo_id == "me/x"
    assert api.repo_exists("me/x") and not api.repo_exists("me/x", repo_type="dataset")
    assert status(api.create_repo, "me/x") == 409
    assert api.create_repo("me/x", exist_ok=True).repo_id == "me/x"
    assert api.create_repo("me/x", repo_type="dataset").repo_type == "dataset"
    assert api.model_info("me/x").private and not api.dataset_info("me/x").private


def test_a_folder_is_one_commit_and_none_where_nothing_changed(hub, api, folder, model):
    commits = hub.repo("me/x", "model").commits
    assert [commit.title for commit in commits.values()] == ["initial commit", "Upload folder using huggingface_hub"]
    assert list(commits)[1] == model
    assert api.upload_folder(repo_id="me/x", folder_path=folder).oid == model
    (folder / "config.json").write_text("{}")
    requests = len(hub.requests)
    api.upload_folder(repo_id="me/x", folder_path=folder, parent_commit=model)
    assert not any(request.startswith("PUT") for request in hub.requests[requests:]), "the weights are there"
    assert len(commits) == 3


def test_a_stale_parent_and_deletions(hub, api, folder, model):
    api.upload_folder(repo_id="me/x", folder_path=folder, path_in_repo="old")
    assert status(api.delete_file, "config.json", "me/x", parent_commit=model) == 412
    api.delete_file("config.json", "me/x")
    api.delete_folder("old", "me/x")
    assert sorted(api.list_repo_files("me/x")) == [".gitattributes", "model.safetensors"]
    assert status(api.delete_file, "config.json", "me/x") == 400


def test_what_was_uploaded_comes_back_by_tag_branch_and_commit(api, folder, model):
    api.create_tag("me/x", tag="v1")
    api.create_branch("me/x", branch="next")
    assert status(api.create_tag, "me/x", tag="v1") == status(api.create_branch, "me/x", branch="next") == 409
    (folder / "config.json").write_text("{}")
    later = api.upload_folder(repo_id="me/x", folder_path=folder, revision="next").oid
    for revision, config in {"v1": "architecture", "main": "architecture", model: "architecture", "next": "{}"}.items():
        assert config in Path(hf_hub_download("me/x", "config.json", revision=revision)).read_text()
    whole = Path(snapshot_download("me/x", revision="next"))
    assert (whole / "model.safetensors").read_bytes() == WEIGHTS and (whole / "config.json").read_text() == "{}"
    refs = api.list_repo_refs("me/x")
    assert {ref.name: ref.target_commit for ref in refs.branches + refs.tags} == dict(main=model, v1=model, next=later)
    api.delete_tag("me/x", tag="v1")
    with pytest.raises(RevisionNotFoundError):
        api.model_info("me/x", revision="v1")


def test_files_are_described_as_git_and_lfs_keep_them(api, folder, model):
    info = api.model_info("me/x", files_metadata=True)
    assert (info.id, info.author, info.sha, info.private, info.gated) == ("me/x", "me", model, False, False)
    files = {file.rfilename: file for file in info.siblings}
    config, weights = files["config.json"], files["model.safetensors"]
    git = subprocess.run(["git", "hash-object", folder / "config.json"], capture_output=True, text=True).stdout.strip()
    assert (config.size, config.blob_id, config.lfs) == ((folder / "config.json").stat().st_size, git, None)
    assert weights.size == weights.lfs.size == len(WEIGHTS) and weights.lfs.pointer_size == 132
    assert [file.size for file in api.model_info("me/x").siblings] == [None] * 3
    (row,) = api.get_paths_info("me/x", ["model.safetensors", "absent"])
    assert (row.size, row.blob_id, row.lfs.sha256) == (len(WEIGHTS), weights.blob_id, weights.lfs.sha256)
    path = hf_hub_download("me/x", "model.safetensors")
    assert os.path.basename(os.path.realpath(path)) == weights.lfs.sha256, "the cache names it by its ETag"


def test_a_folder_of_a_repository_is_listed(api, folder):
    api.create_repo("me/x")
    api.upload_folder(repo_id="me/x", folder_path=folder, path_in_repo="a/b")
    assert {row.path for row in api.list_repo_tree("me/x")} == {".gitattributes", "a"}
    assert [row.path for row in api.list_repo_tree("me/x", "a")] == ["a/b"]
    assert len(list(api.list_repo_tree("me/x", "a", recursive=True))) == 3
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree("me/x", "c"))


def test_what_cannot_be_read_is_the_clients_own_error(hub, api, model):
    for repo in ("you/private", "you/gated", "me/gated"):
        hub.publish(repo, {"config.json": b"{}"}, repo_type="model")
        hub.repo(repo, "model").gated = repo.endswith("gated")
        hub.repo(repo, "model").private = repo.endswith("private")
    for repo, token in (("you/private", None), ("me/absent", None), ("me/absent", False)):
        with pytest.raises(RepositoryNotFoundError):
            hf_hub_download(repo, "config.json", token=token)
        with pytest.raises(RepositoryNotFoundError):
            api.model_info(repo, token=token)
    for repo, token in (("you/gated", None), ("me/gated", False)):
        with pytest.raises(GatedRepoError):
            hf_hub_download(repo, "config.json", token=token)
    assert hf_hub_download("me/gated", "config.json") and api.model_info("you/gated").gated == "manual"
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download("me/x", "config.json", revision="v1")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("me/x", "absent.json")
    assert not api.file_exists("me/x", "absent.json") and api.file_exists("me/x", "config.json")


def test_a_token_allows_what_its_role_allows(hub, api, model):
    api.create_repo("me/own", private=True)
    assert api.whoami(token=READ_TOKEN)["auth"]["accessToken"]["role"] == "read"
    assert api.model_info("me/own", token=READ_TOKEN).private
    assert status(api.whoami, token="hf_wrong") == status(api.model_info, "me/x", token="hf_wrong") == 401
    upload = dict(path_or_fileobj=b"x", path_in_repo="x")
    assert status(api.upload_file, repo_id="me/x", token=READ_TOKEN, **upload) == 403
    assert status(api.upload_file, repo_id="me/x", token=False, **upload) == 401
    assert status(api.create_repo, "you/x") == status(api.create_repo, "me/y", token=READ_TOKEN) == 403
    hub.publish("you/x", {}, repo_type="model")
    assert status(api.upload_file, repo_id="you/x", **upload) == 403


def test_faults_reach_the_client(hub, api, model, no_pause):
    faults = [Fault(cut=1_000_000)]
    hub.fault = lambda method, path: faults.pop() if faults and f"{method} {path}".startswith("GET /me/x/res") else None
    path = Path(hf_hub_download("me/x", "model.safetensors"))
    assert path.read_bytes() == WEIGHTS and not faults, "the client asks for the rest"
    faults = [Fault(cut=0)] * 6
    with pytest.raises(Exception, match="peer closed connection"):  # of httpx or httpx2
        hf_hub_download("me/x", "model.safetensors", force_download=True)
    faults = [Fault(flip=7)]
    hf_hub_download("me/x", "model.safetensors", force_download=True)
    assert path.read_bytes() == WEIGHTS[:7] + bytes([WEIGHTS[7] ^ 255]) + WEIGHTS[8:], "the client does not see it"
    hub.fault = lambda method, path: Fault(status=500)
    assert status(api.model_info, "me/x") == status(api.create_repo, "me/y") == 500
    assert ("models", "me/y") not in hub.repos


def test_an_answer_may_be_lost_after_the_commit(hub, api, model, no_pause):
    hub.fault = lambda method, path: Fault(cut=0) if "/commit/" in path else None
    with pytest.raises(Exception, match="peer closed connection"):
        api.upload_file(repo_id="me/x", path_or_fileobj=b"x", path_in_repo="x")
    assert hub.repo("me/x", "model").find().files["x"] == b"x"


def test_without_a_network_the_cache_is_read(hub, api, model, no_pause):
    path = hf_hub_download("me/x", "config.json")
    hub.stop()
    assert hf_hub_download("me/x", "config.json") == path
    with pytest.raises(LocalEntryNotFoundError):
        hf_hub_download("me/x", "model.safetensors")
    hub.start()
    assert Path(hf_hub_download("me/x", "model.safetensors")).read_bytes() == WEIGHTS


def test_timm_pushes_and_loads_a_model(hub):
    torch.manual_seed(0)
    pushed = timm.create_model("test_resnet", num_classes=5)
    timm.models.push_to_hf_hub(pushed, "me/x", private=True, safe_serialization=True)
    assert set(hub.repo("me/x", "model").find().files) >= {"README.md", "config.json", "model.safetensors"}
    assert hub.repo("me/x", "model").private and len(hub.repo("me/x", "model").commits) == 2
    loaded = timm.create_model("hf-hub:me/x", pretrained=True).state_dict()
    assert loaded.keys() == pushed.state_dict().keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in pushed.state_dict().items())


def test_datasets_pushes_and_loads_splits(hub):
    pictures = [Image.new("L", (8, 8), grey) for grey in range(4)]
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["owl", "wren"]))
    split = datasets.Dataset.from_dict(dict(image=pictures, label=[0, 1, 0, 1]), features=features)
    datasets.DatasetDict(train=split, test=split.select([2])).push_to_hub("me/birds")
    loaded = datasets.load_dataset("me/birds")
    assert loaded["train"].features == features and loaded["train"]["label"][:] == [0, 1, 0, 1]
    assert [image.getpixel((0, 0)) for image in loaded["train"]["image"]] == [0, 1, 2, 3]
    assert len(loaded["test"]) == 1 and len(hub.repo("me/birds").commits) == 2
    stream = datasets.load_dataset("me/birds", split="train", streaming=True)
    assert [row["label"] for row in stream] == [0, 1, 0, 1]


def test_another_process_uses_it(hub, model, tmp_path):
    code = "from huggingface_hub import *; print(whoami()['name'], hf_hub_download('me/x', 'config.json'))"
    env = os.environ | environment(hub, tmp_path / "other")
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert out.startswith(f"me {tmp_path}/other/hub/models--me--x/") and WRITE_TOKEN not in out
