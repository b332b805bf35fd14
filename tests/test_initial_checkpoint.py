"""A model that starts from another one: which weights it takes, and which models it refuses."""

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

import tasn_timm  # noqa: F401
from tasn_timm.hub import save_folder
from tasn_timm.recipe import Recipe
from tasn_timm.training.build import build_model

ARGUMENTS = dict(backbone="test_resnet", sample_size=32, attention_net="tiny")
CONFIG = dict(input_size=(3, 64, 64), mean=(0.5,) * 3, std=(0.25,) * 3, interpolation="bicubic", crop_pct=1.0)


def saved(folder: Path, name: str, classes: int = 3, **arguments) -> Path:
    """A model with random values for everything, statistics and scales as well."""
    torch.manual_seed(7)
    model = timm.create_model(name, num_classes=classes, **arguments)
    for value in [*model.parameters(), *model.buffers()]:
        if value.is_floating_point():
            nn.init.uniform_(value, 0.1, 0.2)
    save_folder(model, folder, label_names=[f"class {k}" for k in range(classes)], data_config=CONFIG, dataset="x")
    return folder


def started(folder: Path, model: str, classes: int = 5, **model_kwargs) -> dict[str, torch.Tensor]:
    recipe = Recipe(model=model, model_kwargs=model_kwargs, img_size=64, initial_checkpoint=str(folder))
    return build_model(recipe, classes).state_dict()


def fresh(model: str, classes: int = 5, **model_kwargs) -> dict[str, torch.Tensor]:
    return build_model(Recipe(model=model, model_kwargs=model_kwargs, img_size=64), classes).state_dict()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_tasn_starts_from_a_tasn_with_other_classes_and_nets(tmp_path):
    given = weights(saved(tmp_path / "tasn", "tasn", **ARGUMENTS))
    torch.manual_seed(0)
    state = started(tmp_path / "tasn", "tasn", **ARGUMENTS, part_net=False)
    torch.manual_seed(0)
    new = fresh("tasn", **ARGUMENTS, part_net=False)
    for name, value in state.items():
        is_new = name.startswith(("heads.", "attention_net.classifier."))
        assert torch.equal(value, new[name] if is_new else given[name]), name


def test_a_plain_model_starts_from_a_tasn_s_backbone(tmp_path):
    given = weights(saved(tmp_path / "tasn", "tasn", **ARGUMENTS))
    state = started(tmp_path / "tasn", "test_resnet")
    taken = [name for name in state if not name.startswith("fc.")]
    assert len(taken) == sum(name.startswith("backbone.") for name in given)
    assert all(torch.equal(state[name], given[f"backbone.{name}"]) for name in taken)
    assert state["fc.weight"].shape == (5, 96)


def test_a_tasn_starts_from_a_plain_model(tmp_path):
    given = weights(saved(tmp_path / "plain", "test_resnet"))
    torch.manual_seed(0)
    state = started(tmp_path / "plain", "tasn", **ARGUMENTS, split_bn=True)
    torch.manual_seed(0)
    new = fresh("tasn", **ARGUMENTS, split_bn=True)
    for name, value in state.items():
        if name.startswith("backbone."):
            assert torch.equal(value, given[name.removeprefix("backbone.").replace("aux_bn.0.", "")]), name
        else:
            assert torch.equal(value, new[name]), name


def test_the_folder_of_a_run_stands_for_its_best_model(tmp_path):
    saved(tmp_path / "run" / "best", "test_resnet")
    assert torch.equal(
        started(tmp_path / "run", "test_resnet")["conv1.0.weight"], weights(tmp_path / "run/best")["conv1.0.weight"]
    )


@pytest.mark.parametrize(
    ("model", "arguments"),
    [
        ("test_convnext", {}),
        ("tasn", dict(backbone="test_convnext", attention_net="tiny", sample_size=32)),
        ("tasn", ARGUMENTS | dict(attention_args=dict(backbone="test_resnet", out_indices=(3,)))),
        ("tasn", ARGUMENTS | dict(backbone_args=dict(stem_width=8))),
    ],
)
def test_another_network_is_refused(tmp_path, model, arguments):
    saved(tmp_path / "tasn", "tasn", **ARGUMENTS)
    with pytest.raises(ValueError, match=r"initial_checkpoint .*tasn' is another network: it has no .* of that shape"):
        started(tmp_path / "tasn", model, **arguments)


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no model folder .*nowhere"):
        started(tmp_path / "nowhere", "test_resnet")
    folder = saved(tmp_path / "plain", "test_resnet")
    (folder / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="plain"):
        started(folder, "test_resnet")


def test_a_tasn_keeps_the_details_own_norms_of_another_one(tmp_path):
    given = weights(saved(tmp_path / "tasn", "tasn", **ARGUMENTS, split_bn=True))
    state = started(tmp_path / "tasn", "tasn", **ARGUMENTS, split_bn=True)
    own = [name for name in state if "aux_bn" in name]
    assert own and all(torch.equal(state[name], given[name]) for name in own)


def test_synchronised_norms_do_not_take_the_place_of_the_details_own():
    kwargs = ARGUMENTS | dict(split_bn=True)
    with pytest.raises(ValueError, match="sync_bn would take the place of split_bn's norms"):
        build_model(Recipe(model="tasn", model_kwargs=kwargs, img_size=64, sync_bn=True), 5)


@pytest.mark.parametrize("pretrained", [False, True])
def test_the_licence_is_that_of_what_a_model_starts_from(tmp_path, monkeypatch, pretrained):
    folder = saved(tmp_path / "tasn", "tasn", **ARGUMENTS)
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"]["license"] = "cc-by-nc-4.0"
    (folder / "config.json").write_text(json.dumps(config))
    create = timm.create_model  # without a network
    monkeypatch.setattr("timm.create_model", lambda name, pretrained, **kwargs: create(name, **kwargs))
    recipe = dict(model="tasn", model_kwargs=ARGUMENTS, img_size=64, pretrained=pretrained)
    licenses = [
        build_model(Recipe(**recipe, initial_checkpoint=start), classes=3).pretrained_cfg["license"]
        for start in (None, str(folder))
    ]
    own = timm.get_pretrained_cfg("test_resnet").license
    assert licenses == ([own, None] if pretrained else [None, "cc-by-nc-4.0"]), "of two it is not known"
