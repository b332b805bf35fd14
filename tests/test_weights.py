"""Weights of trained models: from a folder or a Hub on this machine they are checked, and nothing else is loaded."""

import json
import shutil
from collections.abc import Callable
from json import JSONDecodeError
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from loopback_hub import WRITE_TOKEN, Fault, LoopbackHub, connect, go_online
from safetensors.torch import load_file, save_file

from tasn_timm.attention_net import PRESETS
from tasn_timm.errors import UserError
from tasn_timm.hub import load_model, save_folder

DATA = dict(input_size=(3, 32, 32), mean=[0.4, 0.5, 0.6], std=[0.2, 0.2, 0.3], interpolation="bicubic", crop_pct=1.0)


def tiny(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    arguments = dict(sample_size=24, attention_net="tiny", num_classes=3)
    return timm.create_model("tasn", backbone="test_resnet", **arguments)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A model as training leaves it."""
    save_folder(tiny(), tmp_path / "best", label_names=["ant", "bee", "cat"], data_config=DATA)
    return tmp_path / "best"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub = LoopbackHub()
    connect(monkeypatch, hub, tmp_path / "cache")
    yield hub
    hub.stop()


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def load(name: str) -> torch.nn.Module:
    return timm.create_model(name, pretrained=True)


def the_refusal(name: str) -> str:
    """What `load_model`, and so every command, says in one line.

    timm.create_model loads nothing, either. It reads config.json before us, and what keeps it from that it tells with
    the error of the Hub's client, or of JSON.
    """
    with pytest.raises(UserError) as told:
        load_model(name)
    with pytest.raises((UserError, HfHubHTTPError, LocalEntryNotFoundError, JSONDecodeError)) as raised:
        load(name)
    functions = {entry.name for entry in raised.traceback}
    asked = bool(functions & {"load_model_config_from_hf", "load_model_config_from_path"})  # by timm
    assert asked != isinstance(raised.value, UserError), "all else is ours to tell"
    for error in (told, raised):
        assert WRITE_TOKEN not in str(error.value)
    assert "\n" not in str(told.value)
    return str(told.value)


# A folder.


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def flip_a_bit(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def swap(folder: Path) -> None:
    save_file(tiny(seed=1).state_dict(), folder / "model.safetensors")


def pickle_only(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


BREAKAGES = [
    (truncate, "is damaged"),
    (flip_a_bit, "has other weights than its description says"),
    (swap, "has other weights than its description says"),
]


@pytest.mark.parametrize(("spoil", "message"), [*BREAKAGES, (pickle_only, "has no model.safetensors")])
def test_a_folder_that_was_spoiled_is_refused(folder, spoil, message):
    assert load_model(str(folder)).num_classes == 3
    spoil(folder)
    assert message in the_refusal(f"local-dir:{folder}")


def test_a_pickle_beside_the_weights_is_left_alone(folder):
    (folder / "pytorch_model.bin").write_bytes(b"no pickle")
    assert load(f"local-dir:{folder}").num_classes == 3


def test_a_folder_by_timm_alone_loads_without_a_checksum(tmp_path):
    from timm.models import save_for_hf

    model = tiny()
    save_for_hf(model, tmp_path / "own", model_config=dict(label_names=["ant", "bee", "cat"]), safe_serialization=True)
    loaded = load(f"local-dir:{tmp_path / 'own'}")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    truncate(tmp_path / "own")
    assert "is damaged" in the_refusal(f"local-dir:{tmp_path / 'own'}")


def test_what_a_model_says_of_itself_does_not_change_by_being_checked(folder, hub):
    hub.publish("you/ants", files_of(folder), repo_type="model")
    for name in (f"local-dir:{folder}", "hf-hub:you/ants"):
        cfg = load(name).pretrained_cfg
        kind, _, where = name.partition(":")
        assert cfg["source"] == kind and cfg["hf_hub_id" if kind == "hf-hub" else "file"] == where
        assert "file" not in cfg or kind == "local-dir"


@pytest.mark.parametrize("arguments", [dict(num_classes=7), dict(in_chans=1), dict(features_only=True)])
def test_checked_weights_are_adapted_as_timm_does(folder, arguments):
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, **arguments)
    inner = getattr(model, "model", model)
    original = load_file(folder / "model.safetensors")
    assert torch.equal(inner.backbone.layer1[0].conv1.weight, original["backbone.layer1.0.conv1.weight"])


# The Hub.


def test_a_published_model_loads_by_branch_tag_and_commit(folder, hub):
    old = hub.publish("you/ants", files_of(folder), tag="v1", repo_type="model")
    shutil.rmtree(folder)
    save_folder(tiny(seed=1), folder, label_names=["ant", "bee", "cat"], data_config=DATA)
    new = hub.publish("you/ants", files_of(folder), repo_type="model")
    for revision, seed in (("", 1), ("@main", 1), (f"@{new}", 1), ("@v1", 0), (f"@{old}", 0)):
        model = load(f"hf-hub:you/ants{revision}")
        assert torch.equal(model.heads.shared.weight, tiny(seed).heads.shared.weight), revision


@pytest.mark.parametrize(("spoil", "message"), [*BREAKAGES, (pickle_only, "model 'you/ants' has no model.safetensors")])
def test_a_repository_that_was_spoiled_is_refused(folder, hub, spoil, message):
    spoil(folder)
    hub.publish("you/ants", files_of(folder), repo_type="model")
    assert message in the_refusal("hf-hub:you/ants")


@pytest.mark.parametrize("place", [100, -1])
def test_a_download_that_arrives_wrong_is_refused_and_can_be_repeated(folder, hub, place):
    hub.publish("you/ants", files_of(folder), repo_type="model")
    size = (folder / "model.safetensors").stat().st_size
    hub.fault = lambda method, path: Fault(flip=place % size) if method == "GET" and "safetensors" in path else None
    message = the_refusal("hf-hub:you/ants")
    hub.fault = None
    file = Path(message.split("'")[1])
    assert file.is_file() and "Delete it, and it is downloaded again" in message
    assert "Delete it" in the_refusal("hf-hub:you/ants"), "still in the cache"
    file.unlink()
    assert load_model("hf-hub:you/ants").num_classes == 3


def test_a_download_that_breaks_off_goes_on(folder, hub):
    hub.publish("you/ants", files_of(folder), repo_type="model")
    cuts = iter([1000, 50000])

    def fault(method: str, path: str) -> Fault | None:
        return Fault(cut=next(cuts, None)) if method == "GET" and "safetensors" in path else None

    hub.fault = fault
    model = load("hf-hub:you/ants")
    assert torch.equal(model.heads.shared.weight, tiny().heads.shared.weight) and next(cuts, None) is None


def close(hub: LoopbackHub, monkeypatch) -> None:
    hub.repo("you/ants", "model").gated = True


def hide(hub: LoopbackHub, monkeypatch) -> None:
    hub.repo("you/ants", "model").private = True


def forget_the_token(hub: LoopbackHub, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")


def fail(hub: LoopbackHub, monkeypatch) -> None:
    hub.fault = lambda method, path: Fault(500)


def stop(hub: LoopbackHub, monkeypatch) -> None:
    hub.stop()


def go_offline(hub: LoopbackHub, monkeypatch) -> None:
    go_online(monkeypatch, False)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "you/bees",
            None,
            "model 'you/bees' is not on the Hub, or it is private: check the name, or log in",
        ),
        ("you/ants", hide, "model 'you/ants' is not on the Hub, or it is private"),
        ("you/ants", close, "model 'you/ants' is gated: accept its terms at {url}/you/ants, then log in"),
        ("you/ants@v2", None, "unknown revision of model 'you/ants' 'v2'. Choose from main, v1."),
        ("you/ants", forget_the_token, "the Hub does not know the token of this machine: log in with hf auth login"),
        ("you/ants", fail, "model 'you/ants'"),
        ("you/ants", stop, "is not in the cache '{cache}', and the Hub cannot be reached"),
        ("you/ants", go_offline, "is not in the cache '{cache}', and HF_HUB_OFFLINE is set: unset it to load it once"),
    ],
)
def test_what_cannot_be_had_is_told_in_one_line(folder, hub, monkeypatch, name, change, message):
    hub.publish("you/ants", files_of(folder), tag="v1", repo_type="model")
    if change:
        change(hub, monkeypatch)
    assert message.format(url=hub.url, cache=constants.HF_HUB_CACHE) in the_refusal(f"hf-hub:{name}")


@pytest.mark.parametrize("change", [stop, go_offline, fail])
@pytest.mark.parametrize("revision", ["", "@v1"])
def test_without_a_network_a_warm_cache_is_enough(folder, hub, monkeypatch, change: Callable, revision):
    hub.publish("you/ants", files_of(folder), tag="v1", repo_type="model")
    before = load(f"hf-hub:you/ants{revision}")
    change(hub, monkeypatch)
    after = load_model(f"hf-hub:you/ants{revision}")
    assert torch.equal(after.heads.shared.weight, before.heads.shared.weight)


def test_a_repository_that_is_no_model_is_told(hub):
    hub.publish("you/poems", {"README.md": b"# Poems"}, repo_type="model")
    assert "model 'you/poems' has no config.json, only README.md." in the_refusal("hf-hub:you/poems")


def test_a_config_that_is_no_json_is_told(folder):
    (folder / "config.json").write_text("{")
    assert "config.json" in the_refusal(f"local-dir:{folder}")


def test_the_weights_are_of_the_commit_of_their_config(folder, hub, monkeypatch):
    """Somebody publishes between the two downloads."""
    hub.publish("you/ants", files_of(folder), repo_type="model")
    shutil.rmtree(folder)
    save_folder(tiny(seed=1), folder, label_names=["ant", "bee", "cat"], data_config=DATA)
    pushed = []

    def fault(method: str, path: str) -> None:
        if "safetensors" in path and not pushed:
            pushed.append(hub.publish("you/ants", files_of(folder), repo_type="model"))

    hub.fault = fault
    model = load("hf-hub:you/ants")
    assert pushed and torch.equal(model.heads.shared.weight, tiny().heads.shared.weight)


def test_the_whole_layout_of_the_attention_net_is_saved(folder, monkeypatch):
    config = json.loads((folder / "config.json").read_text())
    layout = config["model_args"]["attention_args"]
    assert layout.items() >= dict(backbone="resnet6s", input_size=96, out_indices=[2], channels=None).items()
    assert set(layout) >= set(PRESETS["published"]) | set(PRESETS["lite"])
    expected = load(f"local-dir:{folder}")
    monkeypatch.setitem(PRESETS, "tiny", dict(backbone="resnet10t", out_indices=(1,)))
    assert repr(load(f"local-dir:{folder}")) == repr(expected)
