"""The attention net sees images as its own backbone's weights were trained with, whatever the backbone's were."""

import json

import pytest
import timm
import torch

import tasn_timm  # noqa: F401
from tasn_timm.attention_net import PRESETS, AttentionNet
from tasn_timm.hub import save_folder

# means and stds of 0.5, and ImageNet's
UNEQUAL = dict(
    backbone="test_convnext",
    attention_net="lite",
    attention_backbone="test_efficientnet",
    attention_args=dict(out_indices=(2, 3)),
    sample_size=32,
    num_classes=3,
)


def create(seed: int = 0, **kwargs) -> torch.nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("tasn", **UNEQUAL | kwargs).eval()


def normalized(pixels: torch.Tensor, cfg: dict) -> torch.Tensor:
    return (pixels - torch.tensor(cfg["mean"])[:, None, None]) / torch.tensor(cfg["std"])[:, None, None]


def test_the_attention_net_sees_images_normalized_for_its_own_weights():
    model = create()
    plain = AttentionNet(
        **PRESETS["lite"] | dict(backbone="test_efficientnet", out_indices=(2, 3)), num_classes=3
    ).eval()
    plain.load_state_dict(model.attention_net.state_dict())  # the same keys
    pixels = torch.rand(2, 3, 300, 300)
    own = model.attention_net.trunk.pretrained_cfg
    assert own["mean"] != model.pretrained_cfg["mean"]
    features = model.attention_net(normalized(pixels, model.pretrained_cfg))
    expected = plain(normalized(pixels, own))
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(plain(normalized(pixels, model.pretrained_cfg)), expected, atol=1e-3)


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(backbone="test_byobnet"),  # the same mean and std
        dict(attention_net="tiny", attention_backbone=None, attention_args=None),  # no weights
        dict(in_chans=1),
        dict(pretrained_cfg_overlay=dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))),
    ],
)
def test_it_costs_nothing_where_nothing_changes(kwargs):
    model = create(**kwargs)
    assert model.attention_net.input_affine is None and model._model_args["attention_affine"] is None


def test_it_is_saved_with_the_model(tmp_path):
    model = create()
    folder = tmp_path / "best"
    save_folder(model, folder, label_names=["ant", "bee", "cat"], data_config={})
    config = json.loads((folder / "config.json").read_text())
    assert config["model_args"]["attention_affine"][0] == pytest.approx([0.5 / 0.229, 0.5 / 0.224, 0.5 / 0.225])
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    image = torch.rand(2, 3, 96, 96)
    assert torch.equal(loaded(image), model(image))
    # A model that was saved before this was there keeps its logits.
    del config["model_args"]["attention_affine"]
    (folder / "config.json").write_text(json.dumps(config))
    older = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    model.attention_net.input_affine = None
    assert torch.equal(older(image), model(image))


def test_a_bare_checkpoint_needs_no_more_than_the_same_arguments(tmp_path):
    model = create()
    torch.save(model.state_dict(), tmp_path / "model.pth")
    image = torch.rand(2, 3, 96, 96)
    assert torch.equal(create(1, checkpoint_path=tmp_path / "model.pth")(image), model(image))


def test_it_follows_the_images_dtype():
    assert create().to(torch.bfloat16)(torch.rand(2, 3, 96, 96).bfloat16()).dtype == torch.bfloat16
