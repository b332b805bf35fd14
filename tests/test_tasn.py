"""The network as a whole: wiring, gradients, heads, and what timm expects of a model."""

import pytest
import timm
import torch
from torch.nn import functional as F

from tasn_timm import TASN, TASNLoss, TASNOutput
from tasn_timm.attention_sampler import attention_sample
from tasn_timm.heads import HEADS
from tasn_timm.trilinear_attention import trilinear_attention

TINY = dict(backbone="test_resnet", num_classes=5, sample_size=32, attention_net="tiny")


def tiny(**kwargs) -> TASN:
    torch.manual_seed(0)
    return TASN(**TINY | kwargs)


def images(batch: int = 3, height: int = 64, width: int = 64) -> torch.Tensor:
    """Smooth random images, in which a fraction of a pixel makes little difference."""
    coarse = torch.randn(batch, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    return F.interpolate(coarse, size=(height, width), mode="bicubic")


def structure_images(model: TASN, image: torch.Tensor) -> torch.Tensor:
    """Fig. 2 up to (d) from the public functions, with every map built and resized to the image."""
    maps = trilinear_attention(model.attention_net(image).detach())
    assert (maps.flatten(2).std(-1) > 0).all(), "distinct maps only, or the plain mean would count dead channels"
    attention = F.interpolate(maps.mean(1).square()[:, None], size=image.shape[-2:], mode="bilinear")[:, 0]
    return attention_sample(image, attention, model.sample_size)


def test_evaluation_classifies_the_structure_image_with_the_shared_classifier():
    model, image = tiny().eval(), images()
    expected = model.heads.shared(model.backbone(structure_images(model, image)))
    # The sampler takes the map's rows themselves where a resize to 64 pixels misses them by up to half a pixel.
    torch.testing.assert_close(model.sample(image), structure_images(model, image), atol=0.2, rtol=0)
    torch.testing.assert_close(model(image), expected, atol=0.02, rtol=0)


def test_training_sends_both_views_through_the_backbone_as_one_batch():
    model, image = tiny(), images()
    model.set_distilled_training(True)
    seen = []
    model.backbone.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.train()(image)
    assert [len(x) for x in seen] == [6]
    structure, detail = seen[0].chunk(2)
    torch.testing.assert_close(structure, model.sample(image), atol=1e-5, rtol=0)
    assert not torch.allclose(structure, detail, atol=1e-2)


def test_training_output_pairs_every_classifier_with_its_view():
    model, image = tiny(), images()
    model.set_distilled_training(True)
    pooled = []
    model.backbone.register_forward_hook(lambda _, args, output: pooled.append(output))
    output = model(image)
    structure, detail = pooled[0].chunk(2)
    assert isinstance(output, TASNOutput)
    torch.testing.assert_close(output.logits, model.heads.shared(structure))
    torch.testing.assert_close(output.master, model.heads.master(structure))
    torch.testing.assert_close(output.part, model.heads.part(detail))
    torch.testing.assert_close(output.shared_part, model.heads.shared(detail))
    assert output.attention.shape == (3, 5)


@pytest.mark.parametrize("heads", HEADS)
def test_heads_have_the_classifiers_of_their_kind(heads):
    model = tiny(heads=heads)
    assert {name.split(".")[0] for name in model.heads.state_dict()} == set(HEADS[heads])
    model.set_distilled_training(True)
    output = model(images())
    assert all(logits.shape == (3, 5) for logits in output)
    if heads != "both":
        torch.testing.assert_close(output.logits, output.master, rtol=0, atol=0)
        torch.testing.assert_close(output.part, output.shared_part, rtol=0, atol=0)
    first = getattr(model.heads, HEADS[heads][0])
    assert model.get_classifier() is first


@pytest.mark.parametrize("heads", HEADS)
def test_plain_training_mode_returns_the_mean_of_the_classifiers(heads):
    model, image = tiny(heads=heads), images()
    torch.manual_seed(3)
    mean = model(image)
    model.set_distilled_training(True)
    torch.manual_seed(3)
    output = model(image)
    distinct = output if heads == "both" else (output.logits, output.part, output.attention)
    torch.testing.assert_close(mean, sum(distinct) / len(distinct))


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("distilled", [True, False])
def test_every_parameter_gets_a_gradient(heads, distilled):
    model = tiny(heads=heads)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)  # timm starts some BatchNorm weights at zero
    model.set_distilled_training(distilled)
    target = torch.tensor([0, 1, 2])
    output = model(images())
    loss = TASNLoss(heads=heads)(output, target)["loss"] if distilled else F.cross_entropy(output, target)
    loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_the_attention_net_learns_from_its_own_classifier_alone():
    model = tiny()
    model.set_distilled_training(True)
    loss = TASNLoss(attention_weight=0.0)(model(images()), torch.tensor([0, 1, 2]))["loss"]
    loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.attention_net.parameters())
    assert all(p.grad is not None for p in model.backbone.parameters())


def test_only_the_attention_loss_leaves_the_backbone_alone():
    model = tiny()
    model.set_distilled_training(True)
    F.cross_entropy(model(images()).attention, torch.tensor([0, 1, 2])).backward()
    assert all(p.grad is None for p in model.backbone.parameters())
    assert model.attention_net.classifier.weight.grad.any()


def test_the_image_gets_a_gradient_through_the_sampler():
    model, image = tiny().eval(), images().requires_grad_()
    model(image).sum().backward()
    assert image.grad.abs().sum() > 0


def test_the_choice_of_details_follows_the_seed():
    model, image = tiny(), images()
    model.set_distilled_training(True)
    parts = []
    for seed in (0, 0, 1, 2, 3):
        torch.manual_seed(seed)
        parts.append(model(image).part)
    torch.testing.assert_close(parts[0], parts[1], rtol=0, atol=0)
    assert any(not torch.equal(parts[0], other) for other in parts[2:])


def test_evaluation_draws_no_random_numbers():
    model, image = tiny().eval(), images()
    before = torch.get_rng_state()
    torch.testing.assert_close(model(image), model(image), rtol=0, atol=0)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("size", [(64, 96), (96, 64), (33, 65)])
def test_images_and_samples_of_any_shape(size):
    model = tiny(sample_size=(32, 24)).eval()
    assert model.sample(images(2, *size)).shape == (2, 3, 32, 24)
    assert model(images(2, *size)).shape == (2, 5)


def test_an_image_smaller_than_the_sample_is_refused():
    with pytest.raises(ValueError, match=r"31 x 64 pixels, fewer than the 32 x 32"):
        tiny().eval()(images(1, 31, 64))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(backbone="resnt50"), "did you mean 'resnet50'"),
        (dict(backbone="resnet50.a9_in1k"), "unknown weights of resnet50"),
        (dict(attention_net="litte"), "did you mean 'lite'"),
        (dict(heads="seperate"), "did you mean 'separate'"),
        (dict(normalization="spatail"), "did you mean 'spatial'"),
        (dict(structure_shape="flat"), "flat_top"),
        (dict(detail_shape="cube"), "unknown map shape 'cube'"),
        (dict(max_zoom=0.5), "max_zoom must be at least 1"),
        (dict(attention_backbone="test_vit", attention_net="published"), "no stage 2"),
    ],
)
def test_bad_arguments_fail_at_construction(kwargs, message):
    with pytest.raises(ValueError, match=message):
        TASN(**TINY | kwargs)


def test_unknown_arguments_raise_as_in_timm():
    with pytest.raises(TypeError):
        timm.create_model("tasn_tiny", no_such_argument=1)


def test_zero_classes_give_pooled_features():
    model = tiny(num_classes=0)
    assert model.eval()(images()).shape == (3, model.head_hidden_size)
    assert model.train()(images()).shape == (3, model.head_hidden_size)


def test_reset_classifier_replaces_all_classifiers_and_keeps_mode_and_dtype():
    model = tiny().to(torch.float64).eval()
    model.reset_classifier(7)
    assert model(images().double()).shape == (3, 7)
    assert model.attention_net.classifier.out_features == 7
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert not any(module.training for module in model.modules())
    model.reset_classifier(4, "catavgmax")
    assert model(images().double()).shape == (3, 4)
    model.reset_classifier(0, "")
    assert model(images().double()).ndim == 4


def test_forward_is_head_after_features():
    model, image = tiny().eval(), images()
    features = model.forward_features(image)
    torch.testing.assert_close(model.forward_head(features), model(image))
    assert model.forward_head(features, pre_logits=True).shape == (3, model.head_hidden_size)
    final, levels = model.forward_intermediates(image)
    torch.testing.assert_close(final, features)
    assert [x.shape[1] for x in levels] == [info["num_chs"] for info in model.feature_info]


def test_every_parameter_has_a_layer_and_the_attention_net_comes_first():
    model = tiny()
    layers = timm.models.group_parameters(model, model.group_matcher())
    names = {name for group in layers.values() for name in group}
    assert names == {name for name, _ in model.named_parameters()}
    assert all(name.startswith("attention_net") for name in layers[min(layers)])
    assert any(name.startswith("heads") for name in layers[max(layers)])
    assert len(layers) > 3


def test_no_weight_decay_names_exist():
    model = TASN(**TINY | dict(backbone="test_vit", sample_size=160))
    names = {name for name, _ in model.named_parameters()}
    assert model.no_weight_decay() & names == {"backbone.pos_embed", "backbone.cls_token"}


def test_gradient_checkpointing_changes_nothing():
    model, image = tiny().eval(), images()
    expected = model(image)
    model.set_grad_checkpointing()
    torch.testing.assert_close(model(image), expected)


@pytest.mark.parametrize("factory", [dict(device="meta"), dict(dtype=torch.bfloat16)])
def test_device_and_dtype_reach_every_tensor(factory):
    model = TASN(**TINY, **factory)
    model.reset_classifier(6)
    tensors = [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]
    for tensor in tensors:
        assert tensor.device.type == factory.get("device", "cpu")
        assert tensor.dtype == factory.get("dtype", torch.float32)


def test_a_bfloat16_model_samples_in_full_precision():
    model, image = tiny().eval(), images()
    expected = model(image)
    logits = model.bfloat16()(image.bfloat16())
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), expected, atol=0.1, rtol=0.1)


def test_autocast_leaves_attention_and_sampling_alone():
    model, image = tiny().eval(), images()
    features = model.attention_net(image)
    expected, _ = model.trilinear_attention(features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        attention, _ = model.trilinear_attention(features)
        grid = model.structure_sampler.grid(attention, (64, 64))
    torch.testing.assert_close(attention, expected, rtol=0, atol=0)
    torch.testing.assert_close(grid, model.structure_sampler.grid(expected, (64, 64)), rtol=0, atol=0)
