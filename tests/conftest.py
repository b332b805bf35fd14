"""Small data and offline Hubs for the tests."""

import json
import socket
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file


@pytest.fixture(autouse=True)
def _one_thread():
    """Tiny tensors are slower on several threads, and the results would depend on their number."""
    torch.set_num_threads(1)


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
