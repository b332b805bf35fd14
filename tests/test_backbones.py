"""Any timm backbone, as main backbone and as attention net. tests/benchmarks/backbones.py does it with every family."""

import sys
from pathlib import Path

import pytest
import timm
import torch

import tasn_timm  # noqa: F401
from tasn_timm.attention_net import PRESETS, AttentionNet, attention_layout
from tasn_timm.backbone import create_backbone

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
import backbones

SWIN = dict(embed_dim=24, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1))
REGISTERS = dict(embed_dim=48, depth=3, num_heads=2)
HYBRID = dict(embed_dim=48, depth=3, num_heads=2)
KINDS = {
    "conv": ("test_convnext", {}),
    "swin_channels_last": ("swin_tiny_patch4_window7_224", SWIN),
    "vit_class_token": ("test_vit", {}),
    "vit_registers_patch_14": ("vit_small_patch14_reg4_dinov2", REGISTERS),
    "hybrid": ("vit_tiny_r_s16_p8_224", HYBRID),
    "conv_and_attention_fixed_size": ("test_maxvit", {}),
    "two_branches": ("crossvit_tiny_240", {}),
    "head_wider_than_the_features": ("mobilenetv3_small_050", {}),
}


def create(**arguments):
    torch.manual_seed(0)
    return timm.create_model("tasn", num_classes=backbones.NUM_CLASSES, **arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_a_backbone_of_every_kind_trains_and_evaluates(kind):
    name, arguments = KINDS[kind]
    size = {"vit_small_patch14_reg4_dinov2": 56, "crossvit_tiny_240": 240}.get(name, 64)
    model = create(backbone=name, sample_size=size, attention_net="tiny", backbone_args=arguments)
    backbones.train_and_evaluate(model, (size, size))
    assert model.embed(torch.zeros(1, 3, size, size)).shape == (1, model.backbone.head_hidden_size)


@pytest.mark.parametrize(
    ("kind", "grid"),
    [
        ("conv", 12),
        ("swin_channels_last", 12),
        ("vit_class_token", 6),
        ("vit_registers_patch_14", 7),
        ("hybrid", 3),
        ("conv_and_attention_fixed_size", 12),
        ("two_branches", 10),  # from 120 pixels
        ("head_wider_than_the_features", 12),
    ],
)
def test_an_attention_net_of_every_kind_trains_and_evaluates(kind, grid):
    name, arguments = KINDS[kind]
    model = create(
        backbone="test_resnet",
        sample_size=32,
        attention_net="tiny",
        attention_backbone=name,
        attention_args=dict(backbone_args=arguments),
    )
    backbones.train_and_evaluate(model, (64, 64))
    features = model.attention_net(torch.randn(1, 3, 64, 64))
    assert features.shape == (1, 24, grid, grid)
    assert features.min() >= 0


@pytest.mark.parametrize(
    ("backbone", "out_indices"),
    [("resnet50", (2, 3, 4)), ("test_convnext", (1, 2, 3)), ("test_vit", (5,))],
)
def test_the_published_layout_merges_the_deepest_stages_from_an_eighth_on(backbone, out_indices):
    layout = attention_layout("published", backbone)
    assert layout["out_indices"] == out_indices
    assert layout["input_size"] == (224, 224)
    net = AttentionNet(**layout, device="meta")
    side = 14 if "vit" in backbone else 28
    assert net(torch.empty(1, 3, 300, 300, device="meta")).shape == (1, 512, side, side)
    assert [layer.rates for layer in net.tail] == [(1, 2), (1, 2, 3)]


def test_stages_that_timm_builds_without_need_are_frozen():
    net = AttentionNet(**attention_layout("tiny", "mobilenetv3_small_050"), num_classes=5)
    net.classify(net(torch.randn(2, 3, 96, 96))).sum().backward()
    frozen = {name for name, parameter in net.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, parameter in net.named_parameters() if parameter.grad is None}
    assert all(name.startswith(tuple(f"trunk.blocks.{stage}." for stage in range(2, 6))) for name in frozen)
    assert any("blocks.5" in name for name in frozen)


def test_the_published_layout_is_itself_on_resnets_of_basic_blocks():
    assert attention_layout("published", "resnet34") == PRESETS["published"] | dict(backbone="resnet34")


@pytest.mark.parametrize("preset", PRESETS)
def test_a_layout_on_its_own_backbone_is_the_preset_with_the_arguments(preset):
    assert attention_layout(preset) == PRESETS[preset]
    assert attention_layout(preset, arguments=dict(input_size=32)) == PRESETS[preset] | dict(input_size=32)


def test_dilation_in_place_of_stride_leaves_one_grid():
    layout = attention_layout("published", "resnet50", dict(output_stride=8))
    assert layout["out_indices"] == (4,)
    net = AttentionNet(**layout, device="meta")
    assert net(torch.empty(1, 3, 224, 224, device="meta")).shape == (1, 512, 28, 28)


@pytest.mark.parametrize(
    ("preset", "backbone", "pixels"),
    [
        ("published", "vit_small_patch14_dinov2", 224),
        ("lite", "vit_small_patch14_dinov2", 112),
        ("tiny", "vit_small_patch14_dinov2", 98),  # the next multiple of 14
        ("tiny", "convmixer_768_32", 98),  # patches of 7
        ("published", "crossvit_tiny_240", 240),  # not 228
    ],
)
def test_the_input_size_is_one_that_the_backbone_takes(preset, backbone, pixels):
    assert attention_layout(preset, backbone)["input_size"] == (pixels, pixels)


def test_an_input_size_that_was_given_is_kept_and_tried():
    layout = attention_layout("published", "crossvit_tiny_240", dict(input_size=128))
    assert layout["input_size"] == 128
    with pytest.raises(ValueError, match=r"crossvit_tiny_240 does not take images of 128 x 128 pixels"):
        AttentionNet(**layout, device="meta")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(backbone="efficientformer_l1", sample_size=96), "efficientformer_l1 .* 96 x 96 .* own size is 224 x 224"),
        (dict(backbone="halonet_h1", sample_size=96), "halonet_h1 .* 96 x 96 pixels: AssertionError.* 256 x 256"),
        (dict(backbone="crossvit_tiny_240", sample_size=96), "crossvit_tiny_240 .* 96 x 96 .* 240 x 240"),
        (dict(backbone="qwen3_vit_88m_enc", sample_size=96), "qwen3_vit_88m_enc does not pool .*global_pool"),
        (dict(attention_backbone="resnet_50"), "unknown timm model 'resnet_50'.*did you mean 'resnet50'"),
        (dict(attention_backbone="test_vit", attention_args=dict(input_size=90)), "test_vit .* 90 x 90 pixels"),
        (dict(attention_backbone="test_vit", attention_args=dict(output_stride=8)), "test_vit cannot .*output_stride"),
        (dict(attention_backbone="test_vit", attention_args=dict(backbone="resnet18")), "leave out one of them"),
        (
            dict(backbone_args=dict(checkpoint_path="x.pth")),
            "checkpoint_path does not belong into backbone_args",
        ),
        (
            dict(attention_args=dict(backbone_args=dict(pretrained_cfg_overlay=dict(file="x.pth")))),
            "pretrained_cfg_overlay does not belong into backbone_args",
        ),
    ],
)
def test_what_does_not_work_is_told_at_construction_on_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as told:
        timm.create_model("tasn", **dict(backbone="test_resnet") | arguments, device="meta")
    assert "\n" not in str(told.value)


def test_trying_an_image_leaves_the_random_numbers_alone():
    torch.manual_seed(0)
    expected = timm.create_model("efficientnet_b0", num_classes=0)
    torch.manual_seed(0)
    model = create_backbone("efficientnet_b0", (64, 64), num_classes=0)
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=0)


def test_a_model_can_be_made_in_inference_mode():
    with torch.inference_mode():
        net = AttentionNet(**PRESETS["tiny"])
        assert net(torch.randn(1, 3, 96, 96)).shape == (1, 24, 12, 12)


def test_the_table_has_every_family():
    members = backbones.families()
    ours = {"attention_net", "zoo"}
    assert set(members) == set(timm.list_modules()) - ours
    stock = {name for names in members.values() for name in names}
    assert stock == {n for n in timm.list_models() if "tasn_timm" not in timm.models.model_entrypoint(n).__module__}


def test_a_family_is_represented_by_its_smallest_member():
    parameters, name = backbones.smallest(["resnet18", "test_resnet", "resnet50"])
    assert (parameters, name) == (373_367, "test_resnet")


def test_resnet6s_has_a_map_for_every_feature_that_it_lists():
    model = timm.create_model("resnet6s", num_classes=0).eval()
    image = torch.randn(1, 3, 64, 64)
    maps = model.forward_intermediates(image, intermediates_only=True)
    features = timm.create_model("resnet6s", features_only=True).eval()(image)
    listed = [(info["num_chs"], 64 // info["reduction"]) for info in model.feature_info]
    assert listed == [x.shape[1:3] for x in maps] == [x.shape[1:3] for x in features] == [(8, 32), (16, 8), (24, 8)]
