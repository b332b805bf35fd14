"""Ways out of eager PyTorch: compile, export, ONNX and trace give the model's own numbers at any batch size."""

import json
import sys

import pytest
import timm
import torch
from torch._dynamo.utils import counters

import tasn_timm  # noqa: F401
from tasn_timm import TASNLoss, cli, export
from tasn_timm.attention_sampler import _count_up_to, _quantile
from tasn_timm.errors import NumericalError, run_command

SMALL = dict(backbone="test_resnet", sample_size=64, attention_net="tiny", num_classes=5)
# What takes another way between image and logits than the default.
VARIANTS = {
    "attention": dict(structure_shape="flat_top"),
    "saliency": dict(sampler="saliency"),
    "uniform": dict(sampler="uniform"),
    "second_order": dict(global_pool="isqrt_cov", pool_args=dict(channels=8)),
    "self_attention": dict(normalization="self_attention", marginal="sum"),
    "output": dict(normalization="output", iterations=0),
    "vit": dict(backbone="test_vit", sample_size=160),
    "lite": dict(attention_net="lite", max_zoom=0),
}


def small(**kwargs):
    torch.manual_seed(0)
    return timm.create_model("tasn", **SMALL | kwargs).eval()


def pictures(batch=2, size=192, seed=0):
    return export._pictures(batch, (3, size, size), seed)


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def check_compiled(backend):
    """Evaluation and training step in one graph each, at several batch sizes."""
    model = small(structure_shape="flat_top")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad():
        for batch in (3, 2, 5):
            torch.testing.assert_close(compiled(pictures(batch)), model(pictures(batch)), rtol=1e-4, atol=1e-5)

    model.train().set_distilled_training(True)
    loss = TASNLoss()

    def step(image, target):
        return loss(model(image), target)

    compiled, steps = torch.compile(step, fullgraph=True, dynamic=True, backend=backend), []
    for batch in (4, 6):
        # One step after the other of the same random numbers: compiled, then eager from the same BatchNorm statistics.
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        for run in (compiled, step):
            model.load_state_dict(state)
            model.zero_grad()
            torch.manual_seed(1)
            losses = run(pictures(batch), torch.arange(batch) % 5)
            losses["loss"].backward()
            steps.append({name: p.grad.clone() for name, p in model.named_parameters()})
        assert all(gradient.isfinite().all() for gradient in steps[-2].values())
    assert not counters["graph_break"]
    return steps


@pytest.mark.slow
def test_evaluation_and_training_step_compile_to_one_graph_for_any_batch(fresh_dynamo):
    steps = check_compiled("aot_eager")
    for compiled, eager in (steps[:2], steps[2:]):
        for name in eager:
            torch.testing.assert_close(compiled[name], eager[name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.slow
def test_inductor_compiles_them_too(fresh_dynamo):
    check_compiled("inductor")


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # sizes are constants of a trace, batches are not
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_exported_program_and_a_trace_give_the_same_logits(variant):
    model, image = small(**VARIANTS[variant]), pictures()
    program = torch.export.export(model, (image,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)).module()
    with torch.no_grad():
        traced = torch.jit.trace(model, image)
        for batch in (1, 3):
            expected = model(pictures(batch, seed=batch))
            torch.testing.assert_close(program(pictures(batch, seed=batch)), expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(traced(pictures(batch, seed=batch)), expected, rtol=1e-5, atol=1e-5)


def test_what_stands_in_for_search_and_quantile_in_export_equals_them(monkeypatch):
    values = torch.rand(20, 145).cumsum(1).round(decimals=1)  # with ties
    limits = torch.cat([values[:, ::7], torch.rand(20, 30) * 80], dim=1).sort(1).values
    expected = _count_up_to(values, limits)
    quantiles = {fraction: values.quantile(fraction, dim=1, keepdim=True) for fraction in (0.0, 0.3, 0.7, 1.0)}
    monkeypatch.setattr("torch.compiler.is_exporting", lambda: True)
    assert torch.equal(_count_up_to(values, limits), expected)
    for fraction, expected in quantiles.items():
        torch.testing.assert_close(_quantile(values.flip(1), fraction), expected)


@pytest.mark.parametrize("architecture", ["tasn", "isqrt_cov"])
def test_scripting_is_refused_with_what_to_use(architecture):
    model = timm.create_model(architecture, backbone="test_resnet", num_classes=5)
    with pytest.raises(ValueError, match=r"torch.jit.script does not take this model: use torch.compile"):
        torch.jit.script(model)


def test_channels_last_gives_the_same_logits():
    model, image = small(), pictures()
    expected = model(image)
    model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(image.contiguous(memory_format=torch.channels_last)), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close(dtype):
    model, image = timm.create_model("tasn_tiny", pretrained=True).eval(), pictures(4)
    expected = model(image)
    with torch.autocast("cpu", dtype=dtype):
        autocast = model(image).float()
    error = {torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
    assert (autocast - expected).norm() / expected.norm() < error
    converted = model.to(dtype)(image.to(dtype))
    assert converted.dtype == dtype
    assert (converted.float() - expected).norm() / expected.norm() < error


@pytest.fixture
def command(capsys):
    def run(*arguments):
        return run_command(lambda: cli.main([str(argument) for argument in arguments])), *capsys.readouterr()

    return run


def test_a_program_is_written_with_how_to_prepare_pictures(command, tmp_path):
    path = tmp_path / "tiny.pt2"
    code, out, err = command("export", "tasn_tiny", path)
    assert (code, err) == (0, "") and out.startswith(f"{path}: logits within ") and "on 20 random inputs" in out
    files = {"config.json": ""}
    program = torch.export.load(path, extra_files=files).module()
    model = timm.create_model("tasn_tiny", pretrained=True).eval()
    torch.testing.assert_close(program(pictures(7)), model(pictures(7)), rtol=1e-4, atol=1e-4)
    config = json.loads(files["config.json"])
    assert config["input_size"] == [3, 192, 192] and config["crop_pct"] == 1.0
    assert config["label_names"] == list(model.pretrained_cfg["label_names"])
    assert [file.name for file in tmp_path.iterdir()] == ["tiny.pt2"]


@pytest.mark.slow
def test_onnxruntime_gives_the_models_logits(command, tmp_path):
    import onnxruntime

    path = tmp_path / "tiny.onnx"
    code, out, _ = command("export", "tasn_tiny", path)
    assert code == 0 and out.startswith(f"{path}: logits within ")
    session = onnxruntime.InferenceSession(path)
    model = timm.create_model("tasn_tiny", pretrained=True).eval()
    image = pictures(7, seed=99)
    (logits,) = session.run(["logits"], {"image": image.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), model(image), rtol=1e-4, atol=1e-4)
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["input_size"]) == [3, 192, 192]
    assert json.loads(about["label_names"]) == list(model.pretrained_cfg["label_names"])


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_onnxruntime_agrees_on_every_variant(variant, tmp_path):
    model = small(**VARIANTS[variant])
    model.pretrained_cfg.update(input_size=(3, 192, 192))
    assert export.export(model, tmp_path / "small.onnx") <= 1e-4


def test_a_file_that_differs_is_not_left_behind(command, tmp_path, monkeypatch):
    def write(model, config, path):
        path.write_text("x")
        return lambda image: 2 * model(image)

    monkeypatch.setitem(export._FORMATS, ".pt2", write)
    path = tmp_path / "tiny.pt2"
    path.write_text("an older one")
    code, out, err = command("export", "tasn_tiny", path)
    assert code == 3 and out == "" and err.startswith("error: the exported model's logits differ by ")
    assert path.read_text() == "an older one" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(NumericalError):
        export.export(small().eval(), path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tasn_tiny", "tiny.pth"], "'tiny.pth' does not end in .onnx or .pt2"),
        (["tasn_tiny", "nowhere/tiny.onnx"], "there is no folder 'nowhere'"),
        (["tasn_resnet50", "tiny.onnx"], "'tasn_resnet50' has no trained classifier"),
        (["tasn_tiny"], "the following arguments are required: FILE"),
        (["tasn_tiny", "/proc/tiny.onnx"], "FILE '/proc/tiny.onnx' cannot be written"),
    ],
)
def test_mistakes_get_one_line_and_exit_code_2(command, arguments, message):
    code, out, err = command("export", *arguments)
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("error: ") and message in line


def test_missing_packages_are_named(command, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    code, _, err = command("export", "tasn_tiny", tmp_path / "tiny.onnx")
    assert code == 2 and "ONNX needs onnxscript: pip install 'tasn_timm[export]'" in err
