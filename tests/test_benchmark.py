"""`python -m tasn_timm benchmark`: what it counts agrees with formulas, what it times is timed in turns."""

import json
import sys
from statistics import median

import pytest
import timm
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from tasn_timm import cli, cost_plot
from tasn_timm.benchmark import (
    _PRODUCTS,
    MODES,
    WARM_UP,
    Cell,
    Inference,
    Machine,
    Training,
    Work,
    clocked_parts,
    find_device,
    measure,
    summaries,
    turns,
)
from tasn_timm.classifier import BackboneClassifier
from tasn_timm.commands.benchmark import cost_table, timings_table
from tasn_timm.contenders import PARTS, Contender, _plain, _plain_name, create_contenders, fixed_cost
from tasn_timm.errors import UserError

CPU = Machine(torch.device("cpu"), rounds=2)


class Small(nn.Module):
    """One convolution, and a classifier of the pooled map."""

    in_chans, num_classes = 3, 5

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(4) if norm else nn.Identity()
        self.head = nn.Linear(4, 5)

    def forward(self, image):
        return self.head(self.norm(self.conv(image)).mean((2, 3)))


def small(name: str = "small", model: nn.Module | None = None, side: int = 8, reference: str = "small") -> Contender:
    return Contender(name, model or Small(), (side, side), reference)


@pytest.fixture(scope="module")
def tiny() -> list[Contender]:
    return create_contenders("tasn_tiny")[0]


# What is counted.


def test_flops_and_parameters_are_those_of_the_formulas():
    cost = fixed_cost(small())
    assert cost["flops"] == 2 * (3 * 3 * 3) * 4 * (4 * 4) + 2 * 4 * 5  # kernel x channels x positions; then the head
    assert cost["parameters"] == (27 * 4 + 4) + (4 * 5 + 5)
    assert cost["parts"] == {}


def test_flops_of_a_tasn_by_part_are_those_of_its_layers(tiny):
    tasn = tiny[0].model.eval()
    counted = {"attention_net": 0, "backbone": 0, "heads": 0}

    def count(name):
        def hook(module, _, output):
            positions = output.shape[2:].numel() if isinstance(module, nn.Conv2d) else 1
            counted[name.split(".")[0]] += 2 * module.weight.numel() * positions

        return hook

    layers = [(name, each) for name, each in tasn.named_modules() if isinstance(each, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(count(name)) for name, layer in layers]
    tasn(torch.zeros(1, 3, *tiny[0].image_size))
    for hook in hooks:
        hook.remove()
    cost = fixed_cost(tiny[0])
    channels, positions = 24, 12 * 12
    assert {part: each["flops"] for part, each in cost["parts"].items()} == {
        "attention net": counted["attention_net"],
        # N(X) X^T, its mean row, and that times X
        "trilinear attention": 2 * channels**2 * positions + 2 * channels**2 + 2 * channels * positions,
        "sampler": 0,
        "backbone and heads": counted["backbone"] + counted["heads"],
    }


def test_the_parts_of_a_tasn_add_up(tiny):
    cost = fixed_cost(tiny[0])
    assert list(cost["parts"]) == list(PARTS)
    for key in ("flops", "parameters"):
        assert sum(part[key] for part in cost["parts"].values()) == cost[key]
    assert cost["parameters"] == sum(p.numel() for p in tiny[0].model.parameters())


def test_peak_memory_is_what_tensors_take_at_the_busiest_moment():
    class Doubling(nn.Module):
        in_chans = 3

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1000))

        def forward(self, image):
            return torch.cat([image, image]).mean()

    contender = small(model=Doubling(), side=64)
    (result,) = measure([(contender, Work("inference", "fp32", 2))], CPU)
    pixels = 2 * 3 * 64 * 64
    least = 4 * 1000 + pixels + 4 * pixels + 2 * 4 * pixels  # weight, uint8, normalised, doubled
    assert least <= result["peak_bytes"] <= least + 1000  # and a few scalars


@pytest.mark.parametrize(
    "name, is_product",
    [
        *[(name, True) for name in ("mkldnn_convolution", "convolution_backward", "cudnn_convolution", "addmm", "bmm")],
        *[(name, True) for name in ("mm", "mv", "baddbmm", "_scaled_dot_product_flash_attention_for_cpu")],
        *[
            (name, False)
            for name in ("copy_", "mul", "softmax", "relu_", "convert", "grid_sampler_2d", "batch_norm", "amax")
        ],
    ],
)
def test_convolutions_and_matrix_products_are_told_apart(name, is_product):
    assert bool(_PRODUCTS.fullmatch(f"aten::{name}")) == is_product


def test_products_take_time_where_there_are_some():
    class Mean(nn.Module):
        in_chans = 3

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, image):
            return (image * self.weight).mean()

    pairs = [(each, Work("inference", "fp32", 1)) for each in (small(), small("mean", Mean()))]
    with_products, without = measure(pairs, CPU)
    assert with_products["products_seconds"] > 0
    assert without["products_seconds"] == 0


# What is compared.


def test_a_tasn_is_compared_with_its_backbone_at_the_sampled_size_and_twice_that():
    contenders, left_out = create_contenders("tasn_resnet18")
    assert [each.name for each in contenders] == ["tasn_resnet18 @ 512", "resnet18 @ 224", "resnet18 @ 448"]
    assert {each.reference for each in contenders} == {"resnet18 @ 224"}
    assert not left_out
    plain = timm.create_model("resnet18")
    assert fixed_cost(contenders[1])["parameters"] == sum(p.numel() for p in plain.parameters())


def test_a_backbone_with_arguments_of_its_own_keeps_them(tiny):
    assert [each.name for each in tiny] == [
        "tasn_tiny @ 192",
        "backbone of tasn_tiny @ 48",
        "backbone of tasn_tiny @ 96",
    ]
    twin = tiny[1].model
    twin.load_state_dict({key: x for key, x in tiny[0].model.state_dict().items() if key in twin.state_dict()})
    views = torch.randn(2, 3, 48, 48)
    assert torch.equal(twin.eval().embed(views), tiny[0].model.eval().embed(views))


def test_pictures_grow_with_the_sampled_size():
    contenders, _ = create_contenders("tasn_tiny", 96)
    assert contenders[0].model.sample_size == (96, 96)
    assert [each.image_size[0] for each in contenders] == [384, 96, 192]


def test_a_plain_model_is_compared_with_itself_at_twice_its_size():
    contenders, _ = create_contenders("test_resnet.r160_in1k")
    assert [each.name for each in contenders] == ["test_resnet @ 160", "test_resnet @ 320"]
    assert all(type(each.model) is BackboneClassifier for each in contenders)


def test_second_order_pooling_is_kept():
    model = BackboneClassifier("test_resnet", 5, global_pool="isqrt_cov", pool_args=dict(channels=8), img_size=(64, 64))
    plain = _plain(model, (96, 96))
    plain.load_state_dict(model.state_dict())
    image = torch.randn(1, 3, 96, 96)
    assert torch.equal(plain.eval()(image), model.eval()(image))
    assert _plain_name(model, "mine") == "backbone of mine"


def test_a_size_that_cannot_be_is_told(monkeypatch):
    def refuse(model, size):
        if size == (320, 320):
            raise UserError("too large.")
        return model

    monkeypatch.setattr("tasn_timm.contenders._plain", refuse)
    contenders, left_out = create_contenders("test_resnet")
    assert [each.name for each in contenders] == ["test_resnet @ 160"]
    assert left_out == ["test_resnet @ 320 is left out: too large."]


# What is timed, and in which order.


def test_every_contender_is_first_second_and_last_alike():
    orders = turns(3, 6)
    assert orders[:4] == [[0, 1, 2], [1, 2, 0], [2, 0, 1], [0, 1, 2]]
    for place in range(3):
        assert sorted(order[place] for order in orders) == [0, 0, 1, 1, 2, 2]


def test_contenders_take_turns_after_a_warm_up(monkeypatch):
    called = []

    class Recording(Inference):
        def __call__(self):
            called.append(names[self.model])
            super().__call__()

    contenders = [small(name) for name in ("small", "b", "c")]
    names = {each.model: each.name for each in contenders}
    monkeypatch.setitem(MODES, "inference", Recording)
    work = Work("inference", "fp32", 1)
    results = measure([(each, work) for each in contenders], CPU._replace(rounds=3), details=False)
    warm_up = [name for name in ("small", "b", "c") for _ in range(WARM_UP)]
    assert called == [*warm_up, "small", "b", "c", "b", "c", "small", "c", "small", "b"]
    assert [len(each["seconds"]) for each in results] == [3, 3, 3]


def test_there_is_one_round_however_little_time_there_is():
    (result,) = measure([(small(), Work("inference", "fp32", 1))], CPU._replace(rounds=50, max_seconds=1e-9))
    assert len(result["seconds"]) == 1
    assert result["peak_bytes"] > 0


def test_ratios_are_those_of_the_medians_and_their_extremes_those_of_the_rounds():
    work = Work("inference", "fp32", 4)
    plain = Cell(small(), work, seconds=[1.0, 2.0, 4.0])
    other = Cell(small("other"), work, seconds=[6.0, 3.0, 5.0], part_seconds=[{"a": 1.0}, {"a": 3.0}, {"a": 2.0}])
    first, second = summaries([plain, other])
    assert (first["ratio"], first["ratio_low"], first["ratio_high"]) == (1, 1, 1)
    assert second["ratio"] == 5 / 2
    assert (second["ratio_low"], second["ratio_high"]) == (5 / 4, 6 / 1)
    assert second["images_per_second"] == 4 / 5
    assert second["part_seconds"] == {"a": 2.0}


def test_references_are_those_of_the_same_work():
    one, two = (Work("inference", "fp32", size) for size in (1, 2))
    other, plain = small("other"), small()
    measured = [(other, one, 2.0), (other, two, 3.0), (plain, one, 4.0), (plain, two, 5.0)]
    cells = [Cell(contender, work, seconds=[seconds]) for contender, work, seconds in measured]
    assert [each["ratio"] for each in summaries(cells)] == [2 / 4, 3 / 5, 1, 1]


def test_parts_of_a_tasn_are_clocked_and_left_as_they_were(tiny):
    repeat = Inference(tiny[0], Work("inference", "fp32", 1), CPU)
    with clocked_parts(repeat, CPU) as seconds:
        repeat()
    assert list(seconds) == list(PARTS)
    assert all(value > 0 for value in seconds.values())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in repeat.predict.modules())


def test_inference_normalises_uint8_pictures():
    repeat = Inference(small(), Work("inference", "fp32", 2), CPU)
    assert repeat.pictures.dtype == torch.uint8
    wanted = repeat.model(2 * (repeat.pictures.double() / 255).float() - 1)
    torch.testing.assert_close(repeat.predict([repeat.pictures]), wanted)


def test_a_training_step_of_a_plain_model_is_cross_entropy_and_sgd():
    repeat = Training(small(), Work("training", "fp32", 2), CPU)
    images = 2 * (repeat.pictures.double() / 255).float() - 1
    loss = F.cross_entropy(repeat.model(images), repeat.labels)
    gradients = torch.autograd.grad(loss, list(repeat.model.parameters()))
    wanted = [p.detach() - 1e-4 * gradient for p, gradient in zip(repeat.model.parameters(), gradients)]
    repeat()
    torch.testing.assert_close(list(repeat.model.parameters()), wanted)


def test_a_training_step_of_a_tasn_has_its_own_loss_and_reaches_every_parameter(tiny):
    repeat = Training(tiny[0], Work("training", "bf16", 2), CPU._replace(channels_last=True))
    assert repeat.model.distilled_training
    assert repeat.pictures.is_contiguous(memory_format=torch.channels_last)
    repeat()
    assert len(repeat.optimizer.state) == sum(p.requires_grad for p in repeat.model.parameters())


# What goes wrong.


class Greedy(Small):
    """Runs out of memory with more than one picture."""

    def forward(self, image):
        if len(image) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(image)


def test_out_of_memory_is_told_and_the_others_go_on():
    greedy = small("greedy", Greedy())
    pairs = [(each, Work("inference", "fp32", size)) for size in (1, 2) for each in (small(), greedy)]
    results = measure(pairs, CPU)
    assert [each["failure"] for each in results] == [None, None, None, "out of memory"]
    assert len(results[2]["seconds"]) == 2
    assert "seconds" not in results[3]
    assert timings_table([results[2:]]).endswith("out of memory")


def test_without_a_reference_there_is_no_ratio():
    pairs = [(each, Work("inference", "fp32", 2)) for each in (small(model=Greedy()), small("other"))]
    results = measure(pairs, CPU)
    assert "ratio" not in results[1]
    assert timings_table([results]).endswith("-")


def test_a_batch_too_small_for_batchnorm_is_told():
    contender = small(model=Small(norm=True), side=2)  # one position is left of it
    results = [measure([(contender, Work("training", "fp32", size))], CPU)[0] for size in (1, 2)]
    assert [each["failure"] for each in results] == ["batch too small for BatchNorm", None]


def test_other_errors_are_not_hidden():
    class Broken(Small):
        def forward(self, image):
            raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        measure([(small(model=Broken()), Work("inference", "fp32", 1))], CPU)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("resnet_50", "unknown timm model 'resnet_50': did you mean 'resnet50'"),
        ("tasn_tiny --batch-size 4 0", "--batch-size: must be a whole number, 1 or more, got '0'"),
        ("tasn_tiny --rounds 0", "--rounds: must be a whole number, 1 or more, got '0'"),
        ("tasn_tiny --threads 0", "--threads: must be a whole number, 1 or more, got '0'"),
        ("tasn_tiny --max-seconds nan", "--max-seconds must be more than 0, got nan"),
        ("tasn_tiny --device tpu", "--device must be cpu, cuda or cuda:N, got 'tpu'"),
        ("tasn_tiny --device cuda:99", "--device cuda:99 is not there"),
        ("tasn_tiny --device cpu --precision fp32 fp16", "fp16 is for GPUs: use bf16 on a CPU"),
        ("tasn_tiny --json nowhere/cost.json", "cannot be written"),
        ("tasn_tiny --plot cost.jpg", "does not end in .png"),
        ("tasn_tiny --plot nowhere/cost.png", "cannot be written"),
        ("tasn_tiny --plot cost.png --batch-size 2", "--batch-size has no effect with --plot"),
        ("tasn_tiny tasn_resnet18 --plot cost.png", "--plot draws one MODEL, got tasn_tiny tasn_resnet18"),
        ("tasn_tiny --plot cost.png --precision fp32 bf16", "--plot draws one --precision"),
        ("test_resnet --plot cost.png", "test_resnet samples nothing: give a TASN"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        cli.main(["benchmark", *arguments.split()])
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install 'tasn_timm\[plot\]'"):
        cost_plot.check_plot(tmp_path / "cost.png")


def test_the_gpu_is_taken_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [str(find_device(name)) for name in (None, "cuda:1", "cpu")] == ["cuda:0", "cuda:1", "cpu"]
    with pytest.raises(UserError, match="cuda:2 is not there"):
        find_device("cuda:2")


# The command.


def test_the_command_prints_what_it_writes(tmp_path, capsys):
    path = tmp_path / "cost.json"
    arguments = "tasn_tiny tasn_tiny --device cpu --batch-size 2 1 2 --rounds 2 --threads 1 --json"
    cli.main(["benchmark", *arguments.split(), str(path)])
    output = capsys.readouterr().out
    assert max(map(len, output.splitlines())) <= 100
    result = json.loads(path.read_text())
    assert result["machine"]["threads"] == 1
    assert cost_table(result["models"]) in output
    for mode in MODES:
        timed = [cell for cell in result["timings"] if cell["mode"] == mode]
        cells = [[cell for cell in timed if cell["batch_size"] == size] for size in (2, 1)]
        names = ["tasn_tiny @ 192", "backbone of tasn_tiny @ 48", "backbone of tasn_tiny @ 96"]
        assert [[cell["name"] for cell in batch] for batch in cells] == [names, names]
        assert timings_table(cells) in output
    for cell in result["timings"]:
        assert cell["median_seconds"] == median(cell["seconds"])
        assert cell["images_per_second"] == cell["batch_size"] / cell["median_seconds"]


@pytest.fixture
def short_sweep(monkeypatch):
    monkeypatch.setattr(cost_plot, "BATCHES", (1, 2))
    monkeypatch.setattr(cost_plot, "SIDES", (32, 64))
    monkeypatch.setattr(cost_plot, "SIDES_BATCH", 1)


def test_a_sweep_is_measured_and_drawn(short_sweep, tmp_path, capsys):
    path = tmp_path / "cost.png"
    files = ["--plot", str(path), "--json", str(tmp_path / "cost.json")]
    cli.main(["benchmark", "tasn_tiny", "--device", "cpu", "--rounds", "1", *files])
    points = json.loads((tmp_path / "cost.json").read_text())["points"]
    settings = [("batch", 48, 1), ("batch", 48, 2), ("size", 32, 1), ("size", 64, 1)]
    found = [(point["over"], point["sample_size"], point["batch_size"]) for point in points]
    assert found == [setting for setting in settings for _ in range(2)]
    assert points[2]["flops"] == 2 * points[0]["flops"]
    assert points[0]["flops"] == fixed_cost(create_contenders("tasn_tiny")[0][0])["flops"]
    with Image.open(path) as picture:
        assert picture.size == (2000, 1520)
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 100
    assert f"{path} written" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", ["--mode inference --batch-size 1", "--plot cost.png"])
def test_json_on_standard_output_is_alone_there(short_sweep, tmp_path, capsys, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    cli.main(["benchmark", "tasn_tiny", "--device", "cpu", "--rounds", "1", "--json", "-", *arguments.split()])
    assert set(json.loads(capsys.readouterr().out)) > {"machine", "left_out"}
    assert not (tmp_path / "-").exists()


def test_what_could_not_be_measured_is_a_gap_in_the_plot(tmp_path):
    shared = dict(series="tasn", sample_size=48, flops=10, median_seconds=1.0)
    points = [
        shared | dict(series=series, over=over, batch_size=size, failure="out of memory" if size == 4 else None)
        for over in ("batch", "size")
        for size in (1, 4)
        for series in ("tasn", "plain")
    ]
    cost_plot.draw(points, "no $x_$ formula", "nor $x_$ here", tmp_path / "cost.png")
    assert [path.name for path in tmp_path.iterdir()] == ["cost.png"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_compiled_models_are_measured(mode, tiny):
    pairs = [(each, Work(mode, "fp32", 2)) for each in tiny[:2]]
    results = measure(pairs, CPU._replace(compile=True))
    assert all(each["failure"] is None and each["part_seconds"] == {} for each in results)
