"""Small data and offline Hubs for the tests."""

import json
import os
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

# Before the clients read them, and for the processes that tests start.
os.environ["HF_UPDATE_DOWNLOAD_COUNTS"] = "0"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from safetensors.torch import save_file
from training_runs import SMALL, train_accelerate

from tasn_timm.errors import run_command


@pytest.fixture(autouse=True)
def _one_thread():
    """Tiny tensors are slower on several threads, and the results would depend on their number."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def asked_elsewhere() -> Iterator[list[str]]:
    """Other machines that somebody has asked for; nobody reaches them."""
    asked, here = [], {"localhost", "::1", "0.0.0.0", "", None, socket.gethostname()}
    look_up, connect = socket.getaddrinfo, socket.socket.connect

    def check(host: str | None) -> None:
        if host not in here and not re.fullmatch(r"127(\.\d+){3}", str(host)):
            if not str(host).endswith(".127.0.0.1"):  # `datasets` asks the tests' Hub for a viewer, and it has none
                asked.append(str(host))
            raise OSError(f"tests do not leave this machine, for {host}")

    def look_up_here(host, *arguments, **options):
        check(host.decode() if isinstance(host, bytes) else host)
        return look_up(host, *arguments, **options)

    def connect_here(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6):
            check(address[0])
        return connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", look_up_here)
        patch.setattr(socket.socket, "connect", connect_here)
        yield asked


@pytest.fixture(autouse=True)
def _stays_on_this_machine(asked_elsewhere):
    """Fail a test that asks for another machine, at its end: many clients swallow the error."""
    yield
    asked = asked_elsewhere.copy()
    asked_elsewhere.clear()
    assert not asked, f"asked for {', '.join(asked)}"


@pytest.fixture
def no_network(monkeypatch):
    """Any attempt to leave this machine fails the test."""

    def refuse(self, address):
        raise AssertionError(f"tried to connect to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """Three classes told apart by colour, 40-pixel images: 16 each to train on, 5 to validate, 7 to test."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for split, count in (("train", 16), ("validation", 5), ("test", 7)):
        for channel, name in enumerate(("red", "green", "blue")):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 80, (40, 40, 3))
                pixels[..., channel] += 150
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / name / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    """The checkpoint that ships with the package."""
    return timm.create_model("tasn_tiny", pretrained=True).eval()


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """A warm Hub cache without a network: `hub_cache(model)` stores a timm model as its published weights."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def store(name: str, model: torch.nn.Module) -> Path:
        commit = "0" * 40
        repo = tmp_path / f"models--timm--{name}"
        snapshot = repo / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text(commit)
        save_file(model.state_dict(), snapshot / "model.safetensors")
        (snapshot / "config.json").write_text(json.dumps({"architecture": timm.models.get_arch_name(name)}))
        return tmp_path

    return store


@pytest.fixture
def recipe(tmp_path, image_folder) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL + f"data: {image_folder}\noutput: {tmp_path / 'runs'}\n")
    return path


@pytest.fixture
def train(monkeypatch, capsys, recipe):
    """Run the script in this process: exit code, standard output and error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        monkeypatch.setattr(sys, "argv", ["train_accelerate.py", "--recipe", str(recipe), *arguments])
        code = run_command(train_accelerate.main)
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def accelerator() -> Accelerator:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return Accelerator(cpu=True, mixed_precision="no")
