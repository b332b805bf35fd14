"""The network as a whole: wiring, gradients, heads, and what timm expects of a model."""

import pytest
import timm
import torch
from torch.nn import functional as F

from tasn_timm import TASN, TASNLoss, TASNOutput, hub
from tasn_timm.attention_sampler import SAMPLERS, AttentionSampler, attention_sample
from tasn_timm.heads import HEADS
from tasn_timm.trilinear_attention import NORMALIZATIONS, trilinear_attention

TINY = dict(backbone="test_resnet", num_classes=5, sample_size=32, attention_net="tiny")
VARIANTS = {
    "master_only": dict(part_net=False),
    "part_only": dict(master_net=False),
    "two_parts": dict(parts=2),
    "two_parts_alone": dict(parts=2, master_net=False),
    "shared": dict(parts=3, heads="shared"),
    "saliency": dict(sampler="saliency", sigma=0.1),
    "uniform": dict(sampler="uniform", threshold=1.2),
    "isqrt_cov": dict(sample_size=64, global_pool="isqrt_cov", pool_args=dict(channels=8)),
    "ranked": dict(selection="ranked", reduction="mean_all", marginal="sum"),
}


def tiny(**kwargs) -> TASN:
    torch.manual_seed(0)
    return TASN(**TINY | kwargs)


def images(batch: int = 3, height: int = 64, width: int = 64) -> torch.Tensor:
    """Smooth random images, in which a fraction of a pixel makes little difference."""
    coarse = torch.randn(batch, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    return F.interpolate(coarse, size=(height, width), mode="bicubic")


def structure_images(model: TASN, image: torch.Tensor) -> torch.Tensor:
    """Fig. 2 up to (d) from the public functions, with every map built and resized to the image."""
    features = model.attention_net(image).detach()
    maps = trilinear_attention(features)
    means = []
    for channels, image_maps in zip(features, maps):
        alike = [c for c, x in enumerate(channels) if x.max() == x.min()]  # one and the same map, counted once
        means.append(image_maps[[c for c in range(len(channels)) if c not in alike[1:]]].mean(0))
    attention = F.interpolate(torch.stack(means).square()[:, None], size=image.shape[-2:], mode="bilinear")[:, 0]
    return attention_sample(image, attention, model.sample_size)


def test_evaluation_classifies_the_structure_image_with_the_shared_classifier():
    model, image = tiny().eval(), images()
    expected = model.heads.shared(model.backbone(structure_images(model, image)))
    # The sampler takes the map's rows themselves where a resize to 64 pixels misses them by up to half a pixel.
    torch.testing.assert_close(model.sample(image), structure_images(model, image), atol=0.2, rtol=0)
    torch.testing.assert_close(model(image), expected, atol=0.02, rtol=0)


def normalized(pixels: torch.Tensor, model: TASN) -> torch.Tensor:
    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    return (pixels / 255 - mean) / std


def pixels(size: int) -> torch.Tensor:
    return (255 * (images(2, size, size) / 6 + 0.5).clamp(0, 1)).byte()


@pytest.mark.parametrize("size", [96, 160, 250])  # that of the attention net's input, below and beyond twice of it
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_pixels_of_uint8_are_normalized_after_sampling(size, sampler):
    torch.manual_seed(0)
    model = timm.create_model("tasn", **TINY, sampler=sampler).eval()
    sampled, expected = model.sample(pixels(size)), model.sample(normalized(pixels(size), model))
    # Resized pixels are rounded, which moves the map a little, but not where nothing is resized.
    torch.testing.assert_close(sampled, expected, atol=1e-4 if size == 96 else 0.05, rtol=0)
    torch.testing.assert_close(model(pixels(size)), model.forward_head(model.forward_features(pixels(size))))
    assert torch.equal(model(pixels(size)), model.heads(model.embed(sampled)))


def test_pixels_of_uint8_train_a_model_as_normalized_ones():
    model = timm.create_model("tasn", **TINY)
    outputs = []
    for image in (pixels(96), normalized(pixels(96), model)):
        torch.manual_seed(1)  # of the drawn details
        outputs.append(model(image))
    torch.testing.assert_close(*outputs, atol=1e-4, rtol=0)


def test_pixels_of_uint8_fit_a_model_in_bfloat16():
    model = timm.create_model("tasn", **TINY).eval().bfloat16()
    logits = model(pixels(160))
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()
    assert model.sample(pixels(160)).dtype == torch.bfloat16


def test_pixels_of_uint8_have_the_channels_of_the_mean():
    model = timm.create_model("tasn", **TINY, in_chans=1).eval()
    with pytest.raises(ValueError, match="an image of uint8 has 1 channels, but .* mean and std of 3: normalise"):
        model(pixels(96)[:, :1])


def test_pixels_of_uint8_need_a_mean_and_std():
    with pytest.raises(ValueError, match=r"an image of uint8 is normalised with the mean and std .* timm.create_model"):
        tiny().eval()(pixels(64))


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


def watch(model: TASN) -> dict[str, list]:
    """What comes by in training: details (B, parts, h, w), the backbone's images, their pooled features."""
    seen = dict(details=[], images=[], pooled=[])
    model.trilinear_attention.register_forward_hook(lambda _, args, maps: seen["details"].append(maps[1]))
    model.backbone.register_forward_hook(lambda _, args, output: seen["images"].append(args[0]))
    model.backbone.register_forward_hook(lambda _, args, output: seen["pooled"].append(output))
    model.train().set_distilled_training(True)
    return seen


def test_the_part_net_alone_sees_details_and_is_evaluated_on_the_structure_image():
    model, image = tiny(master_net=False, detail_shape="square"), images()
    seen = watch(model)
    output = model(image)
    assert [len(x) for x in seen["images"]] == [3]
    expected = AttentionSampler(32, "square")(image, seen["details"][0][:, 0])
    torch.testing.assert_close(seen["images"][0], expected, rtol=0, atol=0)
    assert not torch.allclose(seen["images"][0], model.sample(image), atol=1e-2)
    assert output.logits is None and output.master is None and output.shared_part is None
    torch.testing.assert_close(output.part, model.heads.shared(seen["pooled"][0]))
    model.eval()
    torch.testing.assert_close(model(image), model.heads.shared(model.backbone(model.sample(image))))


def test_the_master_net_alone_sees_structure_images_and_draws_no_random_number():
    model, image = tiny(part_net=False), images()
    seen = watch(model)
    before = torch.get_rng_state()
    output = model(image)
    assert torch.equal(before, torch.get_rng_state())
    assert [len(x) for x in seen["images"]] == [3]
    torch.testing.assert_close(seen["images"][0], model.sample(image), atol=1e-5, rtol=0)
    assert output.part is None and output.shared_part is None and output.master is None
    torch.testing.assert_close(output.logits, model.heads.shared(seen["pooled"][0]))
    model.eval()
    torch.testing.assert_close(model(image), model.heads.shared(model.backbone(model.sample(image))))


@pytest.mark.parametrize("master_net", [True, False])
@pytest.mark.parametrize("parts", [2, 3])
def test_several_parts_follow_each_other_in_the_batch(parts, master_net):
    model, image = tiny(parts=parts, master_net=master_net), images()
    seen = watch(model)
    output = model(image)
    (batch,), (pooled,), (details,) = seen["images"], seen["pooled"], seen["details"]
    first = 3 * master_net
    assert len(batch) == first + 3 * parts
    assert output.part.shape == (3 * parts, 5)
    classifier = model.heads.part if master_net else model.heads.shared
    for p in range(parts):
        rows = slice(3 * p, 3 * p + 3)
        expected = AttentionSampler(32, "none")(image, details[:, p])
        torch.testing.assert_close(batch[first:][rows], expected, rtol=0, atol=0)
        torch.testing.assert_close(output.part[rows], classifier(pooled[first:][rows]))
        if master_net:
            torch.testing.assert_close(output.shared_part[rows], model.heads.shared(pooled[first:][rows]))
    if master_net:
        torch.testing.assert_close(batch[:3], model.sample(image), atol=1e-5, rtol=0)
        torch.testing.assert_close(output.logits, model.heads.shared(pooled[:3]))
        torch.testing.assert_close(output.master, model.heads.master(pooled[:3]))


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(parts=3),
        dict(parts=2, heads="separate"),
        dict(parts=2, heads="shared"),
        dict(parts=2, master_net=False),
        dict(part_net=False),
    ],
    ids=str,
)
def test_plain_training_takes_the_mean_of_an_images_details_as_one_classifier(kwargs):
    model, image = tiny(**kwargs), images()
    torch.manual_seed(3)
    mean = model(image)
    model.set_distilled_training(True)
    torch.manual_seed(3)
    output = model(image)
    for b in range(3):
        logits = [output.attention[b]]
        for structure in (output.logits, output.master):
            logits += [] if structure is None else [structure[b]]
        for detail in (output.part, output.shared_part):
            logits += [] if detail is None else [sum(detail[b::3]) / len(detail[b::3])]
        torch.testing.assert_close(mean[b], sum(logits) / len(logits))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("structure_shape", ["square", "none"])
def test_the_structure_image_is_the_samplers(sampler, structure_shape):
    model = tiny(sampler=sampler, structure_shape=structure_shape, reduction="mean_all").eval()
    image = images()
    maps = trilinear_attention(model.attention_net(image).detach())
    expected = AttentionSampler(32, structure_shape, sampler=sampler)(image, maps.mean(1))
    torch.testing.assert_close(model.sample(image), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(model(image), model.heads.shared(model.backbone(expected)), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("sample_size", [224, 280, 336, 392, (224, 392)])
@pytest.mark.parametrize("size", [(512, 512), (448, 640)])
def test_the_sizes_of_table_4(size, sample_size):
    model, image = tiny(sample_size=sample_size).eval(), images(1, *size)
    sampled = model.sample(image)
    assert sampled.shape[-2:] == model.sample_size
    torch.testing.assert_close(sampled, structure_images(model, image), atol=0.02, rtol=0)


@pytest.mark.parametrize("heads", HEADS)
def test_heads_have_the_classifiers_of_their_kind(heads):
    model = tiny(heads=heads)
    assert {name.split(".")[0] for name in model.heads.state_dict()} == set(HEADS[heads])
    model.set_distilled_training(True)
    output = model(images())
    missing = {"master", "shared_part"} if heads != "both" else set()
    assert {name for name, logits in output._asdict().items() if logits is None} == missing
    assert all(logits.shape == (3, 5) for logits in output if logits is not None)
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


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("distilled", [True, False])
def test_every_parameter_of_every_variant_gets_a_gradient(name, distilled):
    model = tiny(**VARIANTS[name])
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.set_distilled_training(distilled)
    target = torch.tensor([0, 1, 2])
    output = model(images(3, 96, 96))
    loss = TASNLoss(heads=model.heads.heads)(output, target)["loss"] if distilled else F.cross_entropy(output, target)
    loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("name", VARIANTS)
def test_every_saved_variant_gives_the_same_logits(name, tmp_path):
    torch.manual_seed(0)
    model, image = timm.create_model("tasn", **TINY | VARIANTS[name]).eval(), images(2, 96, 96)
    data_config = timm.data.resolve_model_data_config(model)
    hub.save_folder(model, tmp_path / "model", label_names=list("abcde"), data_config=data_config)
    loaded = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True)
    torch.testing.assert_close(loaded.eval()(image), model(image), rtol=0, atol=0)
    for each in (model, loaded):
        each.train().set_distilled_training(True)
    torch.manual_seed(1)
    output = model(image)
    torch.manual_seed(1)
    for got, expected in zip(loaded(image), output):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_a_step_with_any_formula_of_table_2_lowers_the_loss(normalization):
    model, image, target = tiny(normalization=normalization), images(), torch.tensor([0, 1, 2])
    model.set_distilled_training(True)
    optimizer, losses = torch.optim.SGD(model.parameters(), 0.01), []
    for _ in range(2):
        torch.manual_seed(2)  # the same details
        losses.append(TASNLoss()(model(image), target)["loss"])
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[1] < losses[0]


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
        (dict(attention_args=dict(backbone="test_vit"), attention_net="published"), "no stage 2"),
        (dict(master_net=False, part_net=False), "master_net=False and part_net=False"),
        (dict(parts=0), "parts must be at least 1, got 0: .* part_net=False"),
        (dict(heads="both", part_net=False), "heads='both' has no effect with part_net=False"),
        (dict(heads="separate", master_net=False), "heads='separate' has no effect with master_net=False"),
        (dict(parts=2, part_net=False), "parts=2 has no effect with part_net=False"),
        (dict(selection="ranked", part_net=False), "selection='ranked' has no effect with part_net=False"),
        (dict(detail_shape="square", part_net=False), "detail_shape='square' has no effect with part_net=False"),
        (dict(max_zoom=2.0, sampler="saliency"), "max_zoom=2.0 has no effect with sampler='saliency'"),
        (dict(iterations=3, sampler="uniform"), "iterations=3 has no effect with sampler='uniform'"),
        (dict(marginal="sum", sampler="uniform"), "marginal='sum' has no effect with sampler='uniform'"),
        (dict(sigma=0.3), "sigma=0.3 has no effect with sampler='attention'"),
        (dict(threshold=2.0, sampler="saliency"), "threshold=2.0 has no effect with sampler='saliency'"),
        (dict(spatial_scale=3.0, normalization="relation"), "spatial_scale=3.0 has no effect with normalization='rel"),
        (dict(relation_scale=3.0, normalization="spatial"), "relation_scale=3.0 has no effect with normalization='sp"),
        (dict(reduction="sum"), "reduction='sum' has no effect"),
        (dict(sampler="crop"), "unknown sampler 'crop'"),
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


def test_every_parameter_has_a_layer_and_those_beside_the_backbone_are_in_the_last():
    model = tiny()
    layers = timm.models.group_parameters(model, model.group_matcher())
    names = {name for group in layers.values() for name in group}
    assert names == {name for name, _ in model.named_parameters()}
    assert {n for n in names if not n.startswith("backbone.")} <= set(layers[max(layers)])
    assert all(n.startswith("backbone.") for layer, group in layers.items() if layer < max(layers) for n in group)
    assert len(layers) > 3


def test_no_weight_decay_names_exist():
    model = TASN(**TINY | dict(backbone="test_vit", attention_backbone="test_vit", sample_size=160))
    names = {name for name, _ in model.named_parameters()}
    both = {f"{net}.{name}" for net in ("backbone", "attention_net.trunk.model") for name in ("pos_embed", "cls_token")}
    assert model.no_weight_decay() & names == both
    assert not any(name.startswith("attention_net") for name in tiny().no_weight_decay())


def test_gradient_checkpointing_changes_nothing():
    model, image = tiny().eval(), images()
    expected = model(image)
    model.set_grad_checkpointing()
    torch.testing.assert_close(model(image), expected)


def test_an_attention_net_without_gradient_checkpointing_is_named():
    model = TASN(**TINY | dict(attention_backbone="hrnet_w18_small", attention_net="lite"))
    with pytest.raises(
        ValueError, match="the attention net's backbone does not take gradient checkpointing .*not supp"
    ):
        model.set_grad_checkpointing()
    assert not model.backbone.grad_checkpointing


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


def test_more_parts_than_maps_are_refused():
    with pytest.raises(ValueError, match="parts is 25, but there are 24 maps"):
        tiny(parts=25)(images())
