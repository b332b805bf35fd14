"""A saved model is what timm loads: same logits, other numbers of classes, no network, and clear errors."""

import json

import pytest
import timm
import torch
from huggingface_hub import ModelCard

import tasn_timm  # noqa: F401
from tasn_timm.hub import Measured, check_folder, save_folder

DATA = dict(input_size=(3, 64, 64), mean=[0.4, 0.5, 0.6], std=[0.2, 0.2, 0.3], interpolation="bicubic", crop_pct=0.875)
MEASURED = Measured(
    dataset="mine", split="test", images=21, top1=95.238, top5=None, recipe="mine", command="train", gflops=0.5
)
TINY = dict(num_classes=3, attention_net="tiny")
MODELS = [
    ("tasn_tiny", dict(num_classes=3, heads="separate", max_zoom=0)),
    ("tasn_tiny", dict(num_classes=3, in_chans=1)),
    ("tasn", dict(backbone="test_vit", sample_size=160, structure_shape="flat_top", **TINY)),
    ("tasn", dict(backbone="test_resnet", sample_size=(32, 24), attention_args=dict(channels=8), **TINY)),
    ("test_resnet", dict(num_classes=3)),
]


def trained(name: str, kwargs: dict) -> torch.nn.Module:
    """A model in whose weights and statistics nothing is as it was created, laid out as in training."""
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs)
    for tensor in [*model.parameters(), *(buffer for buffer in model.buffers() if buffer.is_floating_point())]:
        tensor.data += 0.01 * torch.rand_like(tensor)
    return model.to(memory_format=torch.channels_last).eval()


def save(model: torch.nn.Module, folder, **kwargs):
    size = dict(input_size=(model.in_chans, 64, 64))
    data_config = DATA | size if model.in_chans == 3 else size
    save_folder(model, folder, label_names=["ant", "bee", "cat"], data_config=data_config, **kwargs)
    return folder


def image(model: torch.nn.Module) -> torch.Tensor:
    return torch.rand(2, model.in_chans, 192, 192, generator=torch.Generator().manual_seed(0))


def sized(model: torch.nn.Module) -> torch.Tensor:
    x = image(model)
    return x if hasattr(model, "sample_size") else x[..., :64, :64]


@pytest.mark.parametrize(("name", "kwargs"), MODELS)
def test_a_folder_loads_with_bit_identical_logits_and_no_network(tmp_path, no_network, name, kwargs):
    model = trained(name, kwargs)
    folder = save(model, tmp_path / "best")
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    plain = model.to(memory_format=torch.contiguous_format)
    assert torch.equal(loaded(sized(model)), plain(sized(model)))


@pytest.mark.parametrize(("name", "kwargs"), MODELS)
def test_another_number_of_classes_keeps_everything_but_the_classifiers(tmp_path, no_network, name, kwargs):
    model = trained(name, kwargs)
    loaded = timm.create_model(f"local-dir:{save(model, tmp_path / 'best')}", pretrained=True, num_classes=7).eval()
    plain = model.to(memory_format=torch.contiguous_format)
    assert torch.equal(loaded.forward_features(sized(model)), plain.forward_features(sized(model)))
    assert loaded(sized(model)).shape == (2, 7)
    assert all(p.shape[0] == 7 for key, p in loaded.named_parameters() if key.startswith("heads."))


def test_the_config_says_what_the_model_was_trained_with(tmp_path):
    folder = save(trained(*MODELS[0]), tmp_path / "best")
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == "tasn_tiny"
    assert config["label_names"] == ["ant", "bee", "cat"]
    assert config["model_args"]["heads"] == "separate" and config["model_args"]["sample_size"] == 48
    assert "num_classes" not in config["model_args"], "transformers would pass it twice"
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True)
    data = timm.data.resolve_model_data_config(loaded)
    assert {key: list(data[key]) if key in ("mean", "std") else data[key] for key in DATA} == DATA
    assert loaded.structure_sampler.max_zoom is None
    assert not list(folder.glob("*.bin")), "no pickle"


def test_another_attention_net_than_a_saved_model_s_is_refused(tmp_path, no_network):
    source = f"local-dir:{save(trained(*MODELS[0]), tmp_path / 'best')}"
    expected = (
        "attention_net='lite' has no effect beside the attention_args of a saved 'tiny' net, .* create a new model"
    )
    with pytest.raises(ValueError, match=expected):
        timm.create_model(source, attention_net="lite")
    with pytest.raises(ValueError, match="part_net=False.* give heads='shared'"):
        timm.create_model(source, part_net=False)
    assert timm.create_model(source, part_net=False, heads="shared").part_net is False


def test_saving_again_replaces_the_folder_and_leaves_nothing_beside_it(tmp_path):
    folder = save(trained(*MODELS[0]), tmp_path / "best", measured=MEASURED)
    (folder / "stale").touch()
    save(trained(*MODELS[0]), folder)
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_the_card_has_the_measured_numbers(tmp_path):
    folder = save(trained(*MODELS[0]), tmp_path / "best", measured=MEASURED)
    card = ModelCard.load(folder / "README.md")
    (result,) = card.data.eval_results
    assert (result.dataset_name, result.dataset_split, result.metric_value) == ("mine", "test", 95.24)
    assert "| test | 21 | top1 95.24 % |" in card.text
    assert "import timm, tasn_timm" in card.text


def test_the_python_of_the_card_runs(tmp_path):
    from PIL import Image

    card = (save(trained(*MODELS[0]), tmp_path / "best", measured=MEASURED) / "README.md").read_text()
    code = card.split("```python")[1].split("```")[0]
    scope = dict(image=Image.new("RGB", (80, 100)))
    exec(code, scope)
    assert scope["logits"].shape == (1, 3)


@pytest.mark.parametrize("missing", ["model.safetensors", "config.json"])
def test_incomplete_folders_are_named(tmp_path, missing):
    folder = save(trained(*MODELS[0]), tmp_path / "best")
    check_folder(folder)
    (folder / missing).unlink()
    with pytest.raises(ValueError, match=rf"best' has no {missing}"):
        check_folder(folder)
    with pytest.raises(ValueError, match="there is no model folder"):
        check_folder(tmp_path / "worst")
