"""Second-order pooling: against NumPy, loops and eigenvalues, its gradients and precision, and as a model's pooling."""

import math

import numpy as np
import pytest
import timm
import torch
from torch.func import functional_call

from tasn_timm import hub
from tasn_timm.heads import SecondOrderPool, covariance, matrix_sqrt

POOL = dict(global_pool="isqrt_cov", pool_args=dict(channels=8))
SIZES = {"isqrt_cov": dict(img_size=(64, 64)), "tasn": dict(sample_size=64, attention_net="tiny")}
SWIN = dict(img_size=64, embed_dim=12, depths=(1, 1), num_heads=(1, 2), window_size=4)


def features(batch=2, channels=6, positions=20, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, positions, generator=generator, dtype=torch.float64).to(dtype)


def trained_pool(in_features=6, channels=4, seed=0, **kwargs) -> SecondOrderPool:
    """With statistics in its BatchNorm as after training."""
    torch.manual_seed(seed)
    pool = SecondOrderPool(in_features, channels, **kwargs)
    norm = pool.reduce[1]
    for tensor in (norm.weight.data, norm.running_var):
        tensor.uniform_(0.5, 2)
    for tensor in (norm.bias.data, norm.running_mean):
        tensor.normal_(0.5)
    return pool


def product(a, b):
    return [[math.fsum(x * y for x, y in zip(row, column)) for column in zip(*b)] for row in a]


def newton_schulz(matrix, iterations):
    """The iSQRT-COV paper's iteration in loops: from Y = A / tr(A), Z = I; in the end Y times the trace's root."""
    size, trace = len(matrix), sum(matrix[i][i] for i in range(len(matrix)))
    y = [[value / trace for value in row] for row in matrix]
    z = [[float(i == j) for j in range(size)] for i in range(size)]
    for _ in range(iterations):
        zy = product(z, y)
        step = [[(3 * (i == j) - zy[i][j]) / 2 for j in range(size)] for i in range(size)]
        y, z = product(y, step), product(step, z)
    return [[value * math.sqrt(trace) for value in row] for row in y]


def reference_pool(pool: SecondOrderPool, x) -> torch.Tensor:
    """What a pool in evaluation mode gives for features (B, C, N), image by image in NumPy and loops."""
    conv, norm = pool.reduce[0].weight.detach().double().numpy()[:, :, 0], pool.reduce[1]
    mean, var, weight, bias = (
        t.detach().double().numpy()[:, None] for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    rows = []
    for image in x.detach().double().numpy():
        reduced = ((conv @ image - mean) / np.sqrt(var + norm.eps) * weight + bias).clip(min=0)
        root = newton_schulz(np.cov(reduced, bias=True).tolist(), pool.iterations)
        rows.append([root[i][j] for i in range(len(root)) for j in range(i, len(root))])
    return torch.tensor(rows, dtype=torch.float64)


def relative_error(got, expected):
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def test_covariance_equals_numpys():
    x = features() + 3
    expected = np.stack([np.cov(image, bias=True) for image in x.numpy()])
    np.testing.assert_allclose(covariance(x).numpy(), expected, rtol=1e-12, atol=1e-14)
    assert covariance(x.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("iterations", [5, 3, 2])
def test_the_root_equals_the_newton_schulz_iteration_in_loops(iterations):
    matrix = covariance(features())
    expected = torch.tensor([newton_schulz(image, iterations) for image in matrix.tolist()], dtype=torch.float64)
    root = matrix_sqrt(matrix, iterations)
    torch.testing.assert_close(root, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(root, root.mT, rtol=0, atol=1e-14)


def test_many_iterations_give_the_root_of_the_eigenvalues():
    matrix = covariance(features(positions=40))
    values, vectors = torch.linalg.eigh(matrix)
    expected = vectors * values.sqrt()[:, None, :] @ vectors.mT
    root = matrix_sqrt(matrix, 20)
    torch.testing.assert_close(root, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(root @ root, matrix, rtol=1e-10, atol=1e-12)
    assert (torch.linalg.eigvalsh(matrix_sqrt(matrix)) <= values.sqrt() + 1e-12).all(), (
        "few steps leave roots too small"
    )


@pytest.mark.parametrize("factor", [4.0, 1e-4, 1e6, 7.3])
def test_the_root_scales_with_the_root_of_the_matrix(factor):
    matrix = covariance(features())
    torch.testing.assert_close(matrix_sqrt(factor * matrix), math.sqrt(factor) * matrix_sqrt(matrix))


def test_gradients_of_covariance_and_root():
    row, column = torch.triu_indices(4, 4)
    x = features(channels=4, positions=7).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: matrix_sqrt(covariance(x))[:, row, column], x)


def test_gradients_of_the_pool():
    pool = trained_pool().double().eval()
    weights = {name: p.detach().clone().requires_grad_() for name, p in pool.named_parameters()}

    def pooled(x, *values):
        return functional_call(pool, dict(zip(weights, values)), x[..., None])

    assert torch.autograd.gradcheck(pooled, (features(positions=9).requires_grad_(), *weights.values()))


@pytest.mark.parametrize("iterations", [5, 3])
def test_the_pool_is_the_upper_triangle_of_the_root(iterations):
    pool = trained_pool(iterations=iterations).double().eval()
    x = features()
    torch.testing.assert_close(pool(x[..., None]), reference_pool(pool, x), rtol=1e-10, atol=1e-12)


def test_the_order_of_positions_does_not_matter():
    pool, x = trained_pool().double().train(), features()
    torch.testing.assert_close(pool(x[..., torch.randperm(20), None]), pool(x[..., None]), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("channels", "width"), [(256, 32896), (128, 8256)])
def test_the_papers_32k_and_8k_features(channels, width):
    pool = SecondOrderPool(16, channels, device="meta")
    assert pool.num_features == width
    assert pool(torch.empty(2, 16, 7, 7, device="meta")).shape == (2, width)


@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("positions", [2, 49])
def test_features_that_do_not_vary_give_zeros_and_finite_gradients(positions, mode):
    pool = trained_pool().train(mode)
    x = features(3, positions=1, dtype=torch.float32).expand(-1, -1, positions).clone().requires_grad_()
    pooled = pool(x[..., None])
    torch.testing.assert_close(pooled, torch.zeros_like(pooled), rtol=0, atol=1e-6)
    pooled.sum().backward()
    assert all(tensor.grad.isfinite().all() for tensor in (x, *pool.parameters()))


def test_a_matrix_of_zeros_has_a_root_of_zeros():
    matrix = torch.zeros(2, 3, 3, requires_grad=True)
    root = matrix_sqrt(matrix)
    root.sum().backward()
    assert not root.any()
    assert matrix.grad.isfinite().all()


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e-3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_close_to_full_precision(dtype, scale):
    torch.manual_seed(0)
    pool = SecondOrderPool(16, 8)
    x = scale * features(4, 16, 49, dtype=torch.float32)
    target = features(4, pool.num_features, 1, seed=1, dtype=torch.float32)[..., 0]
    results = []
    for enabled in (False, True):
        pool.zero_grad()
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            pooled = pool(x[..., None])
        (pooled * target).sum().backward()
        results.append([pooled.detach(), *(p.grad.clone() for p in pool.parameters())])
    # The reduction is in half precision, and where it is near 0 its ReLU may fall on the other side.
    tolerance = {torch.bfloat16: 0.2, torch.float16: 0.005}[dtype]
    pooled, *gradients = (relative_error(got, expected) for expected, got in zip(*results))
    assert pooled < 0.01 and max(gradients) < tolerance


@pytest.mark.parametrize("iterations", [1, 0, -3])
def test_fewer_than_two_iterations_are_refused(iterations):
    message = f"at least 2 iterations, got {iterations}: 5 is"
    with pytest.raises(ValueError, match=message):
        SecondOrderPool(4, iterations=iterations)
    with pytest.raises(ValueError, match=message):
        matrix_sqrt(torch.eye(2)[None], iterations)


# As a model's pooling. The backbones' features become (B, C, N) here by what is known of each.

BACKBONES = {
    "test_resnet": (dict(), lambda model, x: x.flatten(2)),  # NCHW
    "test_vit": (dict(), lambda model, x: x[:, 1:].mT),  # a class token first
    "test_vit_registers": (dict(reg_tokens=2), lambda model, x: x[:, 3:].mT),
    "test_convnext": (dict(), lambda model, x: model.backbone.head.norm(x).flatten(2)),
    "vgg11": (dict(), lambda model, x: x.flatten(2)),  # without the two convolutions of its head
    "swin_tiny_patch4_window7_224": (SWIN, lambda model, x: x.flatten(1, 2).mT),  # NHWC
}


def model_of(backbone, architecture="isqrt_cov", **kwargs):
    torch.manual_seed(0)
    arguments = POOL | SIZES[architecture] | dict(backbone_args=BACKBONES[backbone][0], num_classes=5) | kwargs
    model = timm.create_model(architecture, backbone=backbone.removesuffix("_registers"), **arguments)
    with torch.no_grad():
        model.train()(pictures(architecture, 4))  # so that the BatchNorm statistics are not those of the start
    return model.eval()


def pictures(architecture="isqrt_cov", batch=2):
    size = 96 if architecture == "tasn" else 64
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def save_and_load(model, folder):
    names = [str(k) for k in range(model.num_classes)]
    hub.save_folder(model, folder, label_names=names, data_config=timm.data.resolve_model_data_config(model))
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


@pytest.mark.parametrize("architecture", SIZES)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_model_pools_what_its_backbone_gives(backbone, architecture):
    model, image = model_of(backbone, architecture), pictures(architecture)
    x = model.backbone.forward_features(model.sample(image))
    pooled = reference_pool(model.pool, BACKBONES[backbone][1](model, x)).float()
    torch.testing.assert_close(model.forward_head(x, pre_logits=True), pooled, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model(image), model.heads.shared(pooled), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.forward_head(model.forward_features(image)), model(image))
    assert model.head_hidden_size == model.heads.shared.in_features == 36
    assert model.global_pool == "isqrt_cov"


@pytest.mark.parametrize("architecture", SIZES)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_parameter_has_a_layer_and_a_gradient(backbone, architecture):
    model = model_of(backbone, architecture).train()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)  # timm starts some weights at zero
    layers = timm.models.group_parameters(model, model.group_matcher())
    assert {name for group in layers.values() for name in group} == {name for name, _ in model.named_parameters()}
    assert {"pool.reduce.0.weight", "heads.shared.weight"} <= set(layers[max(layers)])
    model(pictures(architecture)).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("architecture", SIZES)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_saved_model_gives_the_same_logits(backbone, architecture, tmp_path):
    model, image = model_of(backbone, architecture), pictures(architecture)
    loaded = save_and_load(model, tmp_path / "model")
    torch.testing.assert_close(loaded(image), model(image), rtol=0, atol=0)


@pytest.mark.parametrize("architecture", SIZES)
@pytest.mark.parametrize(
    ("backbone", "own"),
    [
        ("test_resnet", "avg"),
        ("test_vit", "token"),
        ("test_vit", "avg"),
        ("test_convnext", "avg"),
    ],
)
def test_reset_classifier_changes_the_pooling_there_and_back(backbone, own, architecture, tmp_path):
    model, image = model_of(backbone, architecture, global_pool=own, pool_args=None), pictures(architecture)
    average = model.forward_head(model.forward_features(image), pre_logits=True)
    model.reset_classifier(4, "isqrt_cov")
    assert model(image).shape == (2, 4)
    assert model.pool.num_features == 32896
    assert not any(module.training for module in model.modules())
    torch.testing.assert_close(save_and_load(model, tmp_path / "model")(image), model(image), rtol=0, atol=0)
    model.reset_classifier(3, own)
    again = model.forward_head(model.forward_features(image), pre_logits=True)
    torch.testing.assert_close(again, average, rtol=0, atol=0)
    torch.testing.assert_close(model(image), model.heads.shared(average))
    torch.testing.assert_close(save_and_load(model, tmp_path / "model")(image), model(image), rtol=0, atol=0)


def test_a_head_that_mixes_features_is_not_there_again():
    with torch.device("meta"):
        model = timm.create_model("isqrt_cov", backbone="mobilenetv3_small_050", num_classes=5)
        assert model(torch.empty(2, 3, 96, 96)).shape == (2, 5)
        with pytest.raises(ValueError, match="'avg' cannot take the place of 'isqrt_cov'.*mobilenetv3_small_050"):
            model.reset_classifier(5, "avg")
        model.reset_classifier(3)
        assert model(torch.empty(2, 3, 96, 96)).shape == (2, 3)


def test_one_position_has_no_covariance():
    model = timm.create_model("isqrt_cov", backbone="pit_ti_224", num_classes=5, **POOL).eval()  # its class token alone
    with pytest.raises(ValueError, match="features at several positions, got 1"):
        model(torch.rand(1, 3, 224, 224))


@pytest.mark.parametrize("heads", ["both", "separate"])
def test_a_plain_classifier_has_no_heads_to_choose(heads):
    with pytest.raises(ValueError, match=f"heads='{heads}' has no effect with isqrt_cov"):
        timm.create_model("isqrt_cov", backbone="test_resnet", heads=heads)


@pytest.mark.parametrize("architecture", SIZES)
@pytest.mark.parametrize("pools", [["avg"], ["avg", "isqrt_cov"]])
def test_a_model_that_left_second_order_pooling_can_be_saved(architecture, pools, tmp_path):
    model, image = model_of("test_resnet", architecture), pictures(architecture)
    for pool in pools:
        model.reset_classifier(4, pool)
    torch.testing.assert_close(save_and_load(model, tmp_path / "model")(image), model(image), rtol=0, atol=0)


def test_reset_classifier_keeps_the_pool_arguments_mode_and_dtype():
    model = model_of("test_resnet").double()
    model.reset_classifier(4, "avg")
    model.reset_classifier(4, "isqrt_cov")
    assert model.pool.num_features == 36
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert not any(module.training for module in model.modules())
    model.reset_classifier(0)
    assert model(pictures().double()).shape == (2, 36)


def test_the_data_config_is_what_the_backbone_takes():
    with torch.device("meta"):
        model = timm.create_model("isqrt_cov", backbone="vit_tiny_patch16_384", num_classes=5, **POOL).eval()
        size = timm.data.resolve_model_data_config(model)["input_size"]
        assert model(torch.empty(1, *size)).shape == (1, 5)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(global_pool="avg"), r"pool_args=\{'channels': 8\} has no effect with global_pool='avg'"),
        (dict(drop_rate=0.1), r"drop_rate=0.1 has no effect with global_pool='isqrt_cov'"),
        (dict(pool_args=dict(iterations=1)), r"at least 2 iterations, got 1"),
        (dict(pool_args=dict(channels=0)), r"at least 1 channel, got 0"),
        (dict(pool_args=dict(chanels=8)), r"pool_args=\{'chanels': 8\}.*has channels, iterations"),
    ],
)
@pytest.mark.parametrize("architecture", SIZES)
def test_what_second_order_pooling_cannot_do_is_refused(architecture, kwargs, message):
    arguments = dict(backbone="test_resnet", num_classes=5) | POOL | SIZES[architecture] | kwargs
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        timm.create_model(architecture, **arguments)
