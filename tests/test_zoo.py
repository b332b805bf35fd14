"""Named models: what timm's registry shows, what hub_configs/ says, and where ImageNet weights go."""

import json
import subprocess
import sys

import pytest
import timm
import torch

from tasn_timm.training.evaluation import count_flops
from tasn_timm.zoo import CONFIGS, HUB_CONFIGS, default_cfgs, starting_cfg

NAMED = ["resnet18", "resnet50", "resnet101", "vgg19", "vgg19_bn", "convnext_tiny"]
LITE = ["lite_resnet50", "lite_resnet101", "lite_convnext_tiny"]
GENERIC = dict(
    backbone="test_resnet", sample_size=32, attention_backbone="test_resnet", attention_net="lite", num_classes=7
)

SECOND_ORDER = dict(backbone="test_resnet", num_classes=7, pool_args=dict(channels=8))


def test_the_registry_lists_the_models():
    assert set(timm.list_models("tasn*")) == {"tasn", "tasn_tiny", *(f"tasn_{name}" for name in NAMED + LITE)}
    assert timm.list_models("isqrt*") == ["isqrt_cov"]
    assert {f"tasn_{name}.in1k" for name in NAMED + LITE} <= set(timm.list_models("tasn*", pretrained=True))
    assert timm.models.list_modules().count("zoo") == 1


@pytest.mark.parametrize("name", CONFIGS)
def test_every_hub_config_describes_the_model_it_builds(name):
    config = CONFIGS[name]
    with torch.device("meta"):
        model = timm.create_model(name).eval()
        maps = model.backbone.forward_features(torch.empty(1, 3, *model.sample_size))
    cfg = model.pretrained_cfg
    names = dict(model.named_modules())
    assert (cfg["architecture"], cfg["tag"]) == (config.architecture, config.tag)
    assert model.num_classes == config.num_classes == cfg["num_classes"]
    assert cfg["first_conv"] == model._traits["first_conv"]
    assert all(names[name].weight.shape[1] == 3 for name in cfg["first_conv"])
    assert [names[name].out_features for name in cfg["classifier"]] == [model.num_classes] * 4
    assert cfg["min_input_size"][1:] == model.sample_size
    assert cfg["pool_size"] == tuple(maps.shape[2:])


@pytest.mark.parametrize("name", NAMED + LITE)
def test_starting_points_are_their_backbones_own_weights(name):
    cfg = json.loads((HUB_CONFIGS / f"tasn_{name}.in1k.json").read_text())["pretrained_cfg"]
    with torch.device("meta"):
        backbone = timm.create_model(f"tasn_{name}").backbone.pretrained_cfg
    plain = name.removeprefix("lite_")
    expected = json.loads(json.dumps(starting_cfg(f"{plain}.{backbone['tag']}")))
    assert cfg.pop("first_conv")
    assert cfg == expected
    assert cfg["hf_hub_id"] == f"timm/{plain}.{backbone['tag']}"
    assert default_cfgs[f"tasn_{name}"].default.has_weights


def test_importing_the_package_costs_timms_import_only():
    code = "import sys, tasn_timm; print(*{'accelerate', 'datasets', 'matplotlib', 'gradio'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (result.stdout.strip(), result.returncode) == ("", 0), result.stderr


@pytest.mark.parametrize("name", LITE)
def test_a_lite_model_costs_at_most_a_tenth_more_than_its_backbone_at_the_sampled_size(name):
    with torch.device("meta"):
        model = timm.create_model(f"tasn_{name}", num_classes=200)
        plain = timm.create_model(name.removeprefix("lite_"), num_classes=200)
    cost, of_backbone = count_flops(model, (3, 512, 512)), count_flops(plain, (3, 224, 224))
    assert cost <= 1.10 * of_backbone
    assert name != "lite_resnet50" or cost <= 9.0e9


def test_published_sizes():
    with torch.device("meta"):
        model = timm.create_model("tasn_resnet50", num_classes=200)
    assert model.pretrained_cfg["input_size"] == (3, 512, 512)
    assert model.sample_size == (224, 224)
    assert model.structure_sampler.shape == "square"
    assert model.detail_sampler.shape == "none"
    assert model.trilinear_attention.normalization == "spatial_relation"
    assert model.trilinear_attention.spatial_scale == 7
    assert model.heads.heads == "both"


@pytest.mark.parametrize(("sample", "image"), [(224, 512), (280, 640), (336, 768), (392, 896)])
def test_the_input_grows_with_the_sample(sample, image):
    assert starting_cfg("resnet50", sample)["input_size"] == (3, image, image)
    assert starting_cfg("resnet50", (sample, 224))["input_size"] == (3, image, 512)


def test_the_generic_entry_takes_any_backbone():
    model = timm.create_model(
        "tasn", backbone="test_convnext", num_classes=7, sample_size=32, attention_net="tiny"
    ).eval()
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 7)
    assert model.pretrained_cfg["architecture"] == "tasn"
    assert model.pretrained_cfg["mean"] == model.backbone.pretrained_cfg["mean"]


@pytest.mark.parametrize(("name", "arguments"), [("tasn", GENERIC), ("isqrt_cov", SECOND_ORDER)])
def test_the_generic_entries_refuse_tags_and_take_a_cfg(name, arguments):
    with pytest.raises(ValueError, match=f"{name} has no tag 'nonsense'"):
        timm.create_model(f"{name}.nonsense", **arguments)
    cfg = timm.models.PretrainedCfg(mean=(0.1, 0.2, 0.3), num_classes=7)
    assert timm.create_model(name, pretrained_cfg=cfg, **arguments).pretrained_cfg["mean"] == (0.1, 0.2, 0.3)


def test_a_vit_as_attention_net_is_adapted_to_other_channels(tmp_path):
    arguments = GENERIC | dict(attention_backbone="test_vit", attention_args=dict(out_indices=(1,), channels=None))
    source = timm.create_model("tasn", **arguments)
    assert source._traits["first_conv"] == ("attention_net.trunk.model.patch_embed.proj", "backbone.conv1.0")
    overlay = dict(state_dict=source.state_dict(), num_classes=7)
    model = timm.create_model("tasn", pretrained=True, pretrained_cfg_overlay=overlay, in_chans=1, **arguments)
    expected = source.backbone.conv1[0].weight.sum(1, keepdim=True)
    torch.testing.assert_close(model.backbone.conv1[0].weight, expected)


def test_a_named_model_has_its_own_backbone():
    with pytest.raises(TypeError, match="backbone"):
        timm.create_model("tasn_resnet18", backbone="resnet50")


def test_features_only_gives_every_level():
    model = timm.create_model("tasn_tiny", features_only=True).eval()
    levels = model(torch.randn(2, 3, 192, 192))
    assert [x.shape[1:] for x in levels] == [(24, 24, 24), (24, 12, 12), (48, 6, 6), (72, 3, 3), (96, 2, 2)]
    assert [x.shape[1] for x in levels] == model.feature_info.channels()
    assert not any(p.requires_grad for name, p in model.named_parameters() if "attention_net" in name)


@pytest.mark.parametrize("in_chans", [3, 1])
def test_pretrained_takes_both_backbones_from_their_own_repositories(hub_cache, no_network, in_chans):
    torch.manual_seed(0)
    source = timm.create_model("test_resnet")
    cache = hub_cache("test_resnet.r160_in1k", source)
    model = timm.create_model("tasn", pretrained=True, cache_dir=cache, in_chans=in_chans, **GENERIC)
    trunk = model.attention_net.trunk
    for part in (model.backbone, trunk):
        torch.testing.assert_close(part.layer2[0].conv1.weight, source.layer2[0].conv1.weight, rtol=0, atol=0)
        stem = part.conv1 if hasattr(part, "conv1") else part.conv1_0
        expected = source.conv1[0].weight if isinstance(source.conv1, torch.nn.Sequential) else source.conv1.weight
        first = stem[0] if isinstance(stem, torch.nn.Sequential) else stem
        if in_chans == 1:
            expected = expected.sum(1, keepdim=True)
        torch.testing.assert_close(first.weight, expected)
    assert model.heads.shared.out_features == model.attention_net.classifier.out_features == 7


@pytest.mark.parametrize("in_chans", [3, 1])
def test_pretrained_second_order_pooling_starts_from_its_backbone(hub_cache, no_network, in_chans):
    torch.manual_seed(0)
    source = timm.create_model("test_resnet")
    cache = hub_cache("test_resnet.r160_in1k", source)
    model = timm.create_model("isqrt_cov", pretrained=True, cache_dir=cache, in_chans=in_chans, **SECOND_ORDER).eval()
    image = torch.randn(2, in_chans, 64, 64)
    expected = source.eval().forward_features(image.expand(-1, 3, -1, -1))  # one channel: the stem's are summed
    torch.testing.assert_close(model.forward_features(image), expected, atol=1e-4, rtol=1e-4)
    assert model(image).shape == (2, 7)
    assert model._traits["first_conv"] == ("backbone.conv1.0",)


def test_pretrained_fails_clearly_where_the_attention_net_has_no_weights(hub_cache):
    cache = hub_cache("test_resnet.r160_in1k", timm.create_model("test_resnet"))
    arguments = dict(backbone="test_resnet", sample_size=32, attention_net="tiny")
    with pytest.raises(ValueError, match=r"no pretrained weights for resnet6s.*published, lite"):
        timm.create_model("tasn", pretrained=True, cache_dir=cache, **arguments)


def test_own_weights_are_loaded_as_they_are(tmp_path):
    torch.manual_seed(0)
    source = timm.create_model("tasn", **GENERIC)
    overlay = dict(state_dict=source.state_dict(), num_classes=7)
    model = timm.create_model("tasn", pretrained=True, pretrained_cfg_overlay=overlay, **GENERIC)
    for name, value in source.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("backbone", "sample_size", "pool_size"), [("test_resnet", 96, (3, 3)), ("test_vit", 160, None)]
)
def test_a_generic_entry_describes_the_model_that_it_makes(backbone, sample_size, pool_size):
    model = timm.create_model("tasn", backbone=backbone, sample_size=sample_size, attention_net="tiny", num_classes=5)
    state, cfg = model.state_dict(), model.default_cfg
    assert {f"{name}.weight" for name in (*cfg["first_conv"], *cfg["classifier"])} <= state.keys()
    assert len(cfg["first_conv"]) == 2
    if pool_size:
        assert cfg["pool_size"] == pool_size == tuple(model.forward_features(torch.rand(1, 3, 224, 224)).shape[2:])
