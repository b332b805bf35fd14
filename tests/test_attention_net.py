"""Attention net: its own layers against plain convolutions, the published layout against a ResNet-18 written out."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from tasn_timm.attention_net import PRESETS, AttentionNet, MultiRateConv

RATES = [(1,), (1, 2), (1, 2, 3), (2, 5)]


def preset(name, **changes):
    torch.manual_seed(0)
    return AttentionNet(**{**PRESETS[name], "num_classes": 7, **changes})


def randomize_norms(model):
    """Give every BatchNorm statistics and weights that are not those of the identity."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean):
                torch.nn.init.normal_(tensor, 0.3, 0.3)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    return model


def random_image(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def flops(model, image):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image)
    return counter.get_total_flops()


def loop_resnet18(state, image, strides, batch_norm_eps=1e-5):
    """ResNet-18 up to its last stage, from a state dict; `strides` are those of the first blocks of the four stages."""

    def conv(x, name, stride, padding):
        return F.conv2d(x, state[f"{name}.weight"], stride=stride, padding=padding)

    def norm(x, name):
        mean, var, weight, bias = (
            state[f"{name}.{key}"][:, None, None] for key in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + batch_norm_eps).sqrt() * weight + bias

    x = norm(conv(image, "conv1", 2, 3), "bn1").relu()
    x = F.max_pool2d(x, 3, stride=2, padding=1)
    for stage, first_stride in enumerate(strides, start=1):
        for block in range(2):
            name, stride = f"layer{stage}.{block}", first_stride if block == 0 else 1
            y = norm(conv(x, f"{name}.conv1", stride, 1), f"{name}.bn1").relu()
            y = norm(conv(y, f"{name}.conv2", 1, 1), f"{name}.bn2")
            if f"{name}.downsample.0.weight" in state:
                x = norm(conv(x, f"{name}.downsample.0", stride, 0), f"{name}.downsample.1")
            x = (x + y).relu()
    return x


@pytest.mark.parametrize("rates", RATES, ids=str)
def test_multi_rate_conv_is_a_sum_of_dilated_convolutions_with_one_weight(rates):
    layer = MultiRateConv(6, rates).double()
    x = random_image(2, 6, 9, 7).double()
    expected = torch.zeros_like(x)
    for rate in rates:
        expected += F.conv2d(x, layer.conv.weight, layer.conv.bias, padding=rate, dilation=rate).clamp(min=0)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    assert sum(p.numel() for p in layer.parameters()) == 6 * 6 * 9 + 6  # whatever the number of rates


@pytest.mark.parametrize("rates", RATES, ids=str)
def test_separable_multi_rate_conv_filters_each_channel_then_mixes_them(rates):
    layer = MultiRateConv(4, rates, separable=True).double()
    x = random_image(2, 4, 9, 7).double()
    filtered = torch.zeros_like(x)
    for channel in range(4):
        kernel, bias = layer.conv.weight[channel : channel + 1], layer.conv.bias[channel : channel + 1]
        for rate in rates:
            one = F.conv2d(x[:, channel : channel + 1], kernel, bias, padding=rate, dilation=rate)
            filtered[:, channel] += one[:, 0].clamp(min=0)
    mixed = torch.einsum("oc,bchw->bohw", layer.pointwise.weight[:, :, 0, 0], filtered)
    expected = (mixed + layer.pointwise.bias[:, None, None]).clamp(min=0)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    assert sum(p.numel() for p in layer.parameters()) == 4 * 9 + 4 + 4 * 4 + 4


def test_published_features_are_28_by_28_by_512():
    net = preset("published", device="meta")
    assert net(torch.empty(2, 3, 512, 512, device="meta")).shape == (2, 512, 28, 28)
    assert net.num_features == 512
    assert [layer.rates for layer in net.tail] == [(1, 2), (1, 2, 3)]


def test_published_costs_39_gigaflops():
    net = preset("published", num_classes=0, device="meta")
    assert flops(net, torch.empty(1, 3, 224, 224, device="meta")) == 39_387_758_592


def test_published_trunk_loads_the_weights_of_timms_resnet18_strictly():
    resnet = timm.create_model("resnet18", features_only=True, out_indices=(4,))
    trunk = preset("published", device="meta").trunk
    ours = {name: tensor.shape for name, tensor in trunk.state_dict().items()}
    assert ours == {name: tensor.shape for name, tensor in resnet.state_dict().items()}
    trunk.load_state_dict(resnet.state_dict(), strict=True, assign=True)

    whole = timm.create_model("resnet18", num_classes=0).state_dict()  # as a checkpoint has them
    assert ours == {name: tensor.shape for name, tensor in whole.items()}


@pytest.mark.parametrize("stages, strides", [((2, 4), (1, 1, 2, 1)), ((), (1, 2, 2, 2)), ((3,), (1, 2, 1, 2))])
def test_the_trunk_is_a_resnet18_without_the_strides_of_these_stages(stages, strides):
    net = randomize_norms(preset("published", input_size=64, unit_stride_stages=stages, tail_rates=())).double().eval()
    image = random_image(1, 3, 64, 64).double()
    expected = loop_resnet18(net.trunk.state_dict(), image, strides)
    with torch.no_grad():
        torch.testing.assert_close(net(image), expected, rtol=1e-9, atol=1e-9)
    assert expected.shape[-1] == 64 // 4 // math.prod(strides)


def test_published_features_are_the_trunks_through_both_sets_of_dilated_convolutions():
    net = preset("published", input_size=32).eval()
    image = random_image(1, 3, 32, 32)
    with torch.no_grad():
        features = net(image)
        x = net.trunk(image)[-1]
        for layer, rates in zip(net.tail, [(1, 2), (1, 2, 3)]):
            x = sum(F.conv2d(x, layer.conv.weight, layer.conv.bias, padding=r, dilation=r).relu() for r in rates)
    torch.testing.assert_close(features, x)
    assert len(net.tail) == 2
    assert features.min() == 0


@pytest.mark.parametrize(("height", "width", "antialias"), [(192, 120, False), (300, 120, True), (60, 50, False)])
def test_any_image_is_resized_to_the_input_size_first_and_no_pixel_skipped(height, width, antialias):
    net = preset("tiny").eval()
    image = random_image(1, 3, height, width)
    resized = F.interpolate(image, size=(96, 96), mode="bilinear", antialias=antialias)
    with torch.no_grad():
        torch.testing.assert_close(net(image), net(resized), rtol=1e-5, atol=1e-5)


def test_lite_merges_two_stages_on_the_grid_of_the_finer():
    net = randomize_norms(preset("lite", input_size=(64, 96))).eval()
    image = random_image(2, 3, 64, 96)
    with torch.no_grad():
        features = net(image)
        fine, coarse = net.trunk(image)
        assert fine.shape[-2:] == (8, 12)
        assert coarse.shape[-2:] == (4, 6)

        reduced = []
        for stage, conv in zip((fine, coarse), net.reduce):
            mixed = torch.einsum("oc,bchw->bohw", conv.weight[:, :, 0, 0], stage) + conv.bias[:, None, None]
            reduced.append(mixed)
        nearest = reduced[1].repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        expected = net.tail((reduced[0] + nearest).relu())
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    assert features.shape == (2, 256, 8, 12)
    assert [layer.rates for layer in net.tail] == [(1,), (1, 2)]
    assert all(layer.pointwise is not None for layer in net.tail)


def test_lite_features_are_14_by_14_by_256():
    assert preset("lite", device="meta")(torch.empty(2, 3, 512, 512, device="meta")).shape == (2, 256, 14, 14)


def test_tiny_features_are_12_by_12_by_24_at_1_41_million_multiplications():
    net = preset("tiny", num_classes=0).eval()
    image = random_image(1, 3, 96, 96)
    assert net(image).shape == (1, 24, 12, 12)
    assert net(image).min() >= 0
    assert flops(net, image) == 2_813_184  # 2 per multiply-accumulate


@pytest.mark.parametrize("input_size", [48, 96], ids=["height_unlike_channels", "height_like_channels"])
def test_features_are_channels_first_where_the_backbone_is_channels_last(input_size):
    swin = dict(embed_dim=24, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), window_size=6)
    name = "swin_tiny_patch4_window7_224"
    net = AttentionNet(name, input_size, out_indices=(0,), num_classes=0, backbone_args=swin).eval()
    image = random_image(1, 3, input_size, input_size)
    with torch.no_grad():
        expected = net.trunk(image)[0].permute(0, 3, 1, 2)  # Swin's own layout is (B, h, w, C)
        assert expected.shape == (1, 24, input_size // 4, input_size // 4)
        torch.testing.assert_close(net(image), expected)


def test_classifier_is_norm_relu_mean_and_linear():
    net = randomize_norms(preset("tiny")).double().eval()
    features = random_image(2, 24, 5, 4).double()
    norm, linear = net.norm, net.classifier
    expected = torch.zeros(2, 7, dtype=torch.float64)
    for image in range(2):
        pooled = []
        for c in range(24):
            scaled = (features[image, c] - norm.running_mean[c]) / (norm.running_var[c] + norm.eps).sqrt()
            pooled.append((scaled * norm.weight[c] + norm.bias[c]).clamp(min=0).sum() / 20)
        for k in range(7):
            expected[image, k] = sum(linear.weight[k, c] * pooled[c] for c in range(24)) + linear.bias[k]
    torch.testing.assert_close(net.classify(features), expected, rtol=1e-10, atol=1e-12)


def test_a_reset_classifier_has_the_new_classes_and_none_gives_pooled_features():
    net = preset("tiny").eval()
    features = random_image(2, 24, 5, 4)
    net.reset_classifier(11)
    assert net.classify(features).shape == (2, 11)
    net.reset_classifier(0)
    torch.testing.assert_close(net.classify(features), net.norm(features).relu().mean((2, 3)))
    assert preset("tiny", num_classes=0).classify(features).shape == (2, 24)


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_and_buffers_are_on_the_device_and_of_the_dtype(name):
    net = preset(name, device="meta", dtype=torch.bfloat16)
    net.reset_classifier(9)
    tensors = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    assert {str(tensor.device) for tensor in tensors.values()} == {"meta"}
    counters = {n for n in tensors if n.endswith("num_batches_tracked")}  # integers in any case
    assert {tensor.dtype for n, tensor in tensors.items() if n not in counters} == {torch.bfloat16}
    assert net.classifier.out_features == 9


def test_a_bfloat16_net_computes_in_bfloat16():
    net = preset("tiny", dtype=torch.bfloat16).eval()
    features = net(random_image(1, 3, 96, 96).bfloat16())
    assert features.dtype == torch.bfloat16
    expected = preset("tiny").eval().requires_grad_(False)
    expected.load_state_dict(net.state_dict())
    torch.testing.assert_close(features.float(), expected(random_image(1, 3, 96, 96)), rtol=0.1, atol=0.1)


def test_other_image_channels_reach_the_stem():
    net = preset("tiny", in_chans=4)
    assert net(random_image(1, 4, 96, 96)).shape == (1, 24, 12, 12)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(backbone="resnet_18"), "unknown timm model 'resnet_18'.*did you mean 'resnet18'"),
        (dict(backbone="resnet18.a1_in2k"), "'resnet18.a1_in2k'.*did you mean 'resnet18.a1_in1k'"),
        (dict(backbone="resnet50", unit_stride_stages=(2,)), "unit_stride_stages=2.*resnet50.*basic blocks"),
        (dict(backbone="vgg11", unit_stride_stages=(2,)), "unit_stride_stages=2.*vgg11"),
        (dict(backbone="resnet18", out_indices=(2,), unit_stride_stages=(4,)), "no stage 4"),
        (dict(backbone="resnet18", out_indices=(2, 3)), r"out_indices=\(2, 3\).*channels"),
    ],
    ids=["model", "tag", "bottlenecks", "no_resnet", "stage_not_built", "merge_without_channels"],
)
def test_mistakes_are_told(arguments, message):
    with pytest.raises(ValueError, match=message):
        AttentionNet(**arguments, device="meta")


@pytest.mark.parametrize(
    "arguments",
    [dict(backbone="resnet18", out_indices=(7,)), dict(backbone="repvit_m0_9", out_indices=(2,), output_stride=8)],
    ids=["stage_that_does_not_exist", "output_stride_that_does_not_exist"],
)
def test_what_a_backbone_does_not_have_is_told(arguments):
    with pytest.raises(ValueError, match=arguments["backbone"]):
        AttentionNet(**arguments, device="meta")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(unit_stride_stages=(1,)), "the first stage of a ResNet has no stride"),
        (dict(tail_rates=((1, 2), ())), "tail_rates has an empty set"),
    ],
)
def test_arguments_without_an_effect_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        AttentionNet("resnet18", **arguments)
