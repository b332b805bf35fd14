"""timm's utilities on our models: optimizers, averages, freezing, checkpoints, hooks and feature extractors."""

import copy

import pytest
import timm
import torch
from timm.data import resolve_model_data_config
from timm.layers import FrozenBatchNormAct2d, convert_sync_batchnorm, set_fused_attn
from timm.models import model_parameters, resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import (
    AttentionExtract,
    CheckpointSaver,
    ModelEmaV2,
    ModelEmaV3,
    dispatch_clip_grad,
    freeze,
    reparameterize_model,
    unfreeze,
)
from timm.utils.model import avg_ch_var, extract_spp_stats
from torch import Tensor, nn
from torch.nn import functional as F

from tasn_timm import TASNLoss
from tasn_timm.hub import save_folder

RESNET = dict(backbone="test_resnet", sample_size=32)
VIT = dict(backbone="test_vit", sample_size=160)
SECOND_ORDER = dict(backbone="test_resnet", img_size=(64, 64), pool_args=dict(channels=8))


def create(name: str = "tasn", seed: int = 0, **kwargs) -> nn.Module:
    torch.manual_seed(seed)
    defaults = dict(tasn=dict(attention_net="tiny", **RESNET), isqrt_cov=SECOND_ORDER).get(name, {})
    return timm.create_model(name, **dict(num_classes=5) | defaults | kwargs)


def images(size: int = 64, batch: int = 3, seed: int = 1) -> Tensor:
    coarse = torch.randn(batch, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, size=(size, size), mode="bicubic")


def distilled_loss(model: nn.Module, seed: int = 2) -> Tensor:
    model.train().set_distilled_training(True)
    torch.manual_seed(seed)  # the details
    return TASNLoss(heads=model.heads.heads)(model(images(seed=seed)), torch.tensor([0, 1, 2]))["loss"]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 2) -> None:
    """One update; the first does not reach all of a residual block, whose last BatchNorm weight timm starts at zero."""
    optimizer.zero_grad()
    distilled_loss(model, seed).backward()
    optimizer.step()


def momentum(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05, momentum=0.9)


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def optimizer_settings(model: nn.Module) -> dict[str, tuple[float, float]]:
    """Learning rate after one epoch of a schedule, and weight decay, of every parameter."""
    optimizer = create_optimizer_v2(model, "sgd", lr=1.0, weight_decay=0.05, layer_decay=0.5)
    scheduler, _ = create_scheduler_v2(optimizer, "step", num_epochs=2, decay_epochs=1, decay_rate=0.1)
    scheduler.step(1)
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[p]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize("name", ["tasn", "isqrt_cov"])
@pytest.mark.parametrize("backbone", [RESNET, VIT], ids=lambda backbone: backbone["backbone"])
def test_layer_decay_is_the_backbones_own_and_all_else_learns_at_the_full_rate(name, backbone):
    if name == "isqrt_cov":
        size = backbone["sample_size"]
        backbone = dict(backbone=backbone["backbone"], img_size=(size, size))
    model, plain = create(name, **backbone), create(backbone["backbone"])
    settings, expected = optimizer_settings(model), optimizer_settings(plain)
    assert set(settings) == {name for name, _ in model.named_parameters()}
    inner = {name: value for name, value in settings.items() if name.startswith("backbone.")}
    classifier = {"fc.weight", "fc.bias", "head.weight", "head.bias"}
    assert inner == {f"backbone.{name}": value for name, value in expected.items() if name not in classifier}
    assert min(lr for lr, _ in inner.values()) < 0.1 * 0.5**4
    for name in settings.keys() - inner.keys():
        assert settings[name] == (0.1, 0.05 if model.get_parameter(name).ndim > 1 else 0.0), name


def test_tokens_and_position_embeddings_of_a_vit_are_not_decayed():
    settings = optimizer_settings(create(**VIT))
    kept = {name for name, (_, weight_decay) in settings.items() if not weight_decay}
    model = create(**VIT)
    assert {name for name in kept if model.get_parameter(name).ndim > 1} == {"backbone.pos_embed", "backbone.cls_token"}


@pytest.mark.parametrize("average", [ModelEmaV2, ModelEmaV3])
def test_moving_averages_hold_every_parameter_and_statistic(average):
    model = create()
    optimizer, states = momentum(model), [copy.deepcopy(model.state_dict())]
    ema = average(model, decay=0.75)
    for seed in (2, 3):
        step(model, optimizer, seed)
        ema.update(model)
        states.append(copy.deepcopy(model.state_dict()))
    expected = {
        name: 0.75**2 * value + 0.75 * 0.25 * states[1][name] + 0.25 * states[2][name]
        for name, value in states[0].items()
        if value.is_floating_point()
    }
    averaged = ema.module.state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(averaged[name], value, msg=name)
    twin = create(seed=1)
    twin.load_state_dict(averaged)
    torch.testing.assert_close(ema(images()), twin.eval()(images()), rtol=0, atol=0)
    assert not any(torch.equal(value, states[2][name]) for name, value in expected.items() if "backbone" in name)


def test_a_frozen_attention_net_stays_as_it_is_while_the_rest_learns():
    model = create()
    freeze(model, ["attention_net"])
    before = copy.deepcopy(model.state_dict())
    for seed in (2, 3):
        step(model, momentum(model), seed)
    assert changed(model, before) == {name for name in before if not name.startswith("attention_net.")}
    assert any(isinstance(module, FrozenBatchNormAct2d) for module in model.attention_net.modules())

    unfreeze(model, ["attention_net"])
    before = copy.deepcopy(model.state_dict())
    for seed in (2, 3):
        step(model, momentum(model), seed)
    assert changed(model, before) == set(model.state_dict())


def test_a_frozen_stage_of_the_backbone_stays_as_it_is():
    model = create()
    freeze(model, ["backbone.conv1", "backbone.bn1", "backbone.layer1"])
    before = copy.deepcopy(model.state_dict())
    for seed in (2, 3):
        step(model, momentum(model), seed)
    stages = ("backbone.conv1.", "backbone.bn1.", "backbone.layer1.")
    assert changed(model, before) == {name for name in before if not name.startswith(stages)}


@pytest.mark.parametrize("method", ["fx", "hook"])
def test_attention_extract_finds_the_attention_of_a_vit_backbone(method):
    set_fused_attn(False)  # the fused kernel never has the matrix
    try:
        model = create(**VIT).eval()
    finally:
        set_fused_attn(True)
    entered = []
    attention = model.backbone.blocks[1].attn
    attention.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    x = images(192, batch=2)
    model(x)
    query, key, _ = attention.qkv(entered[0]).unflatten(-1, (3, attention.num_heads, -1)).unbind(2)  # (B, N, heads, d)
    logits = torch.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
    extracted = AttentionExtract(model, method=method)(x)
    kind = "softmax" if method == "fx" else "attn_drop"
    assert set(extracted) == {f"backbone.blocks.{block}.attn.{kind}" for block in range(len(model.backbone.blocks))}
    torch.testing.assert_close(extracted[f"backbone.blocks.1.attn.{kind}"], logits.softmax(-1))


def test_activation_statistics_are_those_of_the_sampled_image():
    model = create().eval()
    shape = [3, 3, 64, 64]
    torch.manual_seed(0)
    stats = list(extract_spp_stats(model, ["backbone.layer?"], [avg_ch_var], shape)["avg_ch_var"])
    torch.manual_seed(0)
    levels = model.forward_intermediates(torch.normal(0.0, 1.0, shape), intermediates_only=True)
    expected = [level.var((0, 2, 3)).mean().item() for level in levels[1:]]  # the first is the stem
    assert stats == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("feature_cls", ["getter", "fx", "hook"])
@pytest.mark.parametrize("name", ["tasn", "isqrt_cov", "tasn_tiny"])
def test_features_only_gives_the_backbones_maps_of_the_sampled_image(name, feature_cls):
    x = images(192)
    model = create(name).eval()
    stages = [f"layer{stage}" for stage in (2, 3, 4)]
    expected = {}
    for stage in stages:
        keep = lambda module, args, output, stage=stage: expected.update({stage: output})  # noqa: E731
        model.backbone.get_submodule(stage).register_forward_hook(keep)
    model(x)
    extractor = create(name, features_only=True, feature_cls=feature_cls, out_indices=(2, 3, 4)).eval()
    assert extractor.feature_info.channels() == [expected[stage].shape[1] for stage in stages]
    assert extractor.feature_info.module_name() == [f"backbone.{stage}" for stage in stages]
    for level, stage in zip(extractor(x), stages):
        torch.testing.assert_close(level, expected[stage], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "kwargs", "size", "mean"),
    [
        ("tasn_resnet50", dict(device="meta"), 512, (0.485, 0.456, 0.406)),
        ("tasn_tiny", {}, 192, (0.485, 0.456, 0.406)),
        ("tasn", RESNET, 73, (0.5, 0.5, 0.5)),  # 32 * 512 / 224
        ("tasn", VIT, 366, (0.5, 0.5, 0.5)),
        ("isqrt_cov", {}, 160, (0.5, 0.5, 0.5)),  # the backbone's own
    ],
    ids=str,
)
def test_the_data_config_is_the_models_input_and_the_backbones_statistics(name, kwargs, size, mean):
    config = resolve_model_data_config(create(name, **kwargs))
    assert config["input_size"] == (3, size, size)
    assert tuple(config["mean"]) == mean
    assert config["interpolation"] in ("bicubic", "bilinear")


def test_the_data_config_of_a_saved_model_is_what_it_was_saved_with(tmp_path):
    data = dict(input_size=(3, 96, 80), mean=[0.4, 0.5, 0.6], std=[0.2, 0.2, 0.3], crop_pct=0.9)
    save_folder(create().eval(), tmp_path / "best", label_names=list("abcde"), data_config=data)
    config = resolve_model_data_config(timm.create_model(f"local-dir:{tmp_path / 'best'}", pretrained=True))
    assert {key: config[key] if key in ("input_size", "crop_pct") else list(config[key]) for key in data} == data


def test_a_resumed_checkpoint_goes_on_as_if_nothing_had_happened(tmp_path):
    model = create()
    optimizer = momentum(model)
    step(model, optimizer)
    saver = CheckpointSaver(model, optimizer, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(epoch=0, metric=50.0)
    resumed = create(seed=1)
    resumed_optimizer = momentum(resumed)
    resume_checkpoint(resumed, str(tmp_path / "last.pth.tar"), resumed_optimizer, log_info=False)
    loaded = create(seed=1, checkpoint_path=str(tmp_path / "model_best.pth.tar"))
    torch.testing.assert_close(loaded.eval()(images()), model.eval()(images()), rtol=0, atol=0)
    step(model, optimizer, seed=3)
    step(resumed, resumed_optimizer, seed=3)
    assert changed(resumed, model.state_dict()) == set()


@pytest.mark.parametrize("name", ["tasn", "isqrt_cov"])
def test_the_average_in_a_checkpoint_is_what_timm_prefers(name, tmp_path):
    model, average = create(name), ModelEmaV3(create(name, seed=1))
    saver = CheckpointSaver(model, momentum(model), model_ema=average, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(epoch=0, metric=50.0)
    loaded = create(name, seed=2, checkpoint_path=str(tmp_path / "last.pth.tar"))
    torch.testing.assert_close(loaded.eval()(images()), average(images()), rtol=0, atol=0)


def test_adaptive_clipping_bounds_every_unit_but_the_last_classifiers():
    model = create()
    (10 * distilled_loss(model)).backward()
    before = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    dispatch_clip_grad(model_parameters(model, exclude_head=True), 0.02, mode="agc")
    clipped = set()
    for name, parameter in model.named_parameters():
        if name.startswith("heads.part."):  # model_parameters takes the last two parameters for the head
            assert torch.equal(parameter.grad, before[name])
            continue
        rows = parameter.shape[0] if parameter.ndim > 1 else 1
        weight, old, new = (x.detach().reshape(rows, -1) for x in (parameter, before[name], parameter.grad))
        for unit, gradient, limited in zip(weight, old, new):
            limit = 0.02 * max(float(unit.norm()), 1e-3)
            factor = min(1.0, limit / max(float(gradient.norm()), 1e-6))
            torch.testing.assert_close(limited, gradient * factor, msg=name)
            clipped |= {name} if factor < 1 else set()
    assert len(clipped) > 10


def test_a_reparameterized_backbone_gives_the_same_logits():
    model = create(backbone="repvgg_a0")
    distilled_loss(model)  # statistics that are not the initial ones
    expected = model.eval()(images())
    fused = reparameterize_model(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.backbone.modules())
    torch.testing.assert_close(fused(images()), expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "backbone", [RESNET, VIT, RESNET | dict(attention_backbone="test_vit")], ids=["resnet", "vit", "vit_attention"]
)
def test_gradient_checkpointing_leaves_every_gradient_as_it_is(backbone):
    gradients = []
    for enable in (False, True):
        model = create(**backbone)
        model.set_grad_checkpointing(enable)
        x = images(160)
        model.set_distilled_training(True)
        torch.manual_seed(2)
        TASNLoss()(model.train()(x), torch.tensor([0, 1, 2]))["loss"].backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    trunk = model.attention_net.trunk
    assert model.backbone.grad_checkpointing and getattr(trunk, "model", trunk).grad_checkpointing
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, atol=1e-6, rtol=1e-4, msg=name)


def test_synchronized_batchnorm_takes_the_place_of_every_batchnorm():
    model = create(global_pool="isqrt_cov", sample_size=64, pool_args=dict(channels=8))
    distilled_loss(model)
    expected, state = model.eval()(images(96)), model.state_dict()
    count = sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    converted = convert_sync_batchnorm(model)
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in converted.modules()) == count
    assert set(converted.state_dict()) == set(state)
    torch.testing.assert_close(converted.eval()(images(96)), expected)


def test_features_of_a_graph_with_a_merged_and_renormalized_attention_net():
    """The backbone's pictures are normalised otherwise than the attention net's, which has two stages."""
    arguments = dict(backbone="test_vit", sample_size=160, attention_net="lite")
    model, x = create(**arguments).eval(), images(192)
    expected = model.forward_intermediates(x, indices=[3], intermediates_only=True, output_fmt="NLC")
    extractor = create(**arguments, features_only=True, feature_cls="fx", out_indices=(3,)).eval()
    # A graph's level is what leaves the block, class token first.
    torch.testing.assert_close(extractor(x)[0][:, model.backbone.num_prefix_tokens :], expected[0])
    assert model.attention_net.input_affine is not None
