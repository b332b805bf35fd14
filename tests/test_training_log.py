"""What a training tells: trackers, metrics, the sampler's zoom."""

import math
import resource
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from PIL import Image
from timm.optim import param_groups_layer_decay
from torch import nn
from training_runs import PLAIN, QUICK, lines, metrics, on_every_loss, the_error, train_accelerate

from tasn_timm.attention_sampler import attention_grid
from tasn_timm.back_projection import magnification
from tasn_timm.tasn import TASN
from tasn_timm.training import accelerator as accelerator_module
from tasn_timm.training import progress
from tasn_timm.training.gradients import clip_gradient
from tasn_timm.training.zoom import ZoomProbe

# trackers


class Recorder(GeneralTracker):
    """What accelerate's trackers are asked to do."""

    name = "recorder"
    requires_logging_directory = True
    made: list["Recorder"] = []  # noqa: RUF012, read by the tests

    def __init__(self, run_name: str, logging_dir: str) -> None:
        super().__init__()
        self.run_name, self.logging_dir = run_name, logging_dir
        self.logged: list[tuple[int, dict]] = []
        self.finished = 0
        self.made.append(self)

    @property
    def tracker(self) -> "Recorder":
        return self

    def store_init_configuration(self, values: dict) -> None:
        self.config = values

    def log(self, values: dict, step: int | None = None) -> None:
        assert not self.finished
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def recorders(monkeypatch) -> list[Recorder]:
    monkeypatch.setattr(Recorder, "made", [])
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "recorder", Recorder)
    monkeypatch.setitem(sys.modules, "recorder", module := ModuleType("recorder"))
    module.__spec__ = SimpleNamespace(name="recorder")  # installed
    return Recorder.made


def flat(values: dict, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Without lists, which are no numbers to draw."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}/")
        elif value is not None and not isinstance(value, list):
            yield prefix + name, value


def test_a_tracker_gets_every_line_of_the_metrics_at_its_step(train, tmp_path, recorders):
    code, _, err = train("--trackers", "[recorder]", "--log-interval", "2", "--seed", "7")
    assert code == 0, err
    (recorder,) = recorders
    every = metrics(tmp_path / "runs/small")
    assert [step for step, _ in recorder.logged] == [2, 3, 5, 6, 6], "a line, an epoch, a line, an epoch, the test"
    assert [dict(flat(line)) for line in every] == [dict(step=step) | values for step, values in recorder.logged]
    assert recorder.logged[0][1].keys() > {"train/loss", "train/grad_norm", "lr", "speed/data_wait"}
    assert recorder.logged[1][1].keys() > {"validation/top1", "zoom/x", "epoch"}
    assert recorder.logged[4][1].keys() == {"planned_steps", "test/top1", "test/images"}
    assert recorder.config["seed"] == 7 and recorder.config["freeze"] == "{}" and recorder.config["tf32"] == "None"
    assert recorder.logging_dir == str(tmp_path / "runs/small")
    assert recorder.finished


def test_a_tracker_is_finished_once(train, recorders):
    assert train(*QUICK, "--max-steps", "1", "--trackers", "[recorder]")[0] == 0
    assert [recorder.finished for recorder in recorders] == [1]


def test_a_tracker_is_finished_when_the_run_fails(train, recorders):
    assert train(*QUICK, "--opt", "sgd", "--lr", "1e30", "--trackers", "[recorder]")[0] == 3
    assert [recorder.finished for recorder in recorders] == [1]


def test_a_comparison_has_a_tracker_of_its_own(train, tmp_path, recorders):
    plain = tmp_path / "plain.yaml"
    plain.write_text("model: test_resnet\nimg_size: 24\nlr: 2.0e-3\n")
    code, _, err = train(*QUICK, "--epochs", "1", "--trackers", "[recorder]", "--compare", str(plain))
    assert code == 0, err
    first, second = recorders
    runs = tmp_path / "runs/small", tmp_path / "runs/small/plain"
    for recorder, run in zip((first, second), runs):
        assert recorder.logging_dir == str(run) and recorder.finished
        logged = [dict(step=step) | values for step, values in recorder.logged]
        assert [dict(flat(line)) for line in metrics(run)] == logged


def test_a_dry_run_tracks_nothing(train, recorders):
    code, _, err = train(*QUICK, "--dry-run", "--trackers", "[recorder]")
    assert code == 0, err
    assert not recorders


def test_unknown_and_missing_trackers_are_told(train, monkeypatch, tmp_path):
    code, _, err = train("--trackers", "[tensorbord]")
    assert code == 2 and "unknown tracker 'tensorbord': did you mean 'tensorboard'?" in the_error(err)
    monkeypatch.setattr(accelerator_module, "find_spec", lambda name: None)
    code, _, err = train("--trackers", "[wandb]")
    assert code == 2 and the_error(err) == "error: tracker wandb is not installed: pip install wandb."
    assert not (tmp_path / "runs").exists()


def test_tensorboard_shows_the_numbers_of_the_metrics(train, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    code, _, err = train("--trackers", "[tensorboard]")
    assert code == 0, err
    shown = {}
    for file in (tmp_path / "runs/small").rglob("events.out.tfevents.*"):
        events = EventAccumulator(str(file)).Reload()
        for tag in events.Tags()["scalars"]:
            for event in events.Scalars(tag):
                shown.setdefault((tag, event.step), []).append(event.value)
    expected = {}
    for line in metrics(tmp_path / "runs/small"):
        for tag, value in flat({name: value for name, value in line.items() if name != "step"}):
            expected.setdefault((tag, line["step"]), []).append(value)
    assert shown.keys() == expected.keys()
    for key, values in expected.items():
        assert shown[key] == pytest.approx(values, rel=1e-6), key


# metrics


def record(monkeypatch) -> tuple[list[tuple[dict, int]], list[float]]:
    """Fills with what the objective returned, and for how many images; and with the gradient's norms."""
    losses, norms = [], []

    def note(model, call, values, target, output):
        losses.append(({name: value.item() for name, value in values.items()}, len(target)))
        return values

    def clip(*arguments):
        norm = clip_gradient(*arguments)
        norms.append(norm.item())
        return norm

    on_every_loss(monkeypatch, note)
    monkeypatch.setattr(train_accelerate, "clip_gradient", clip)
    return losses, norms


def mean(losses: list[tuple[dict, int]]) -> dict[str, float]:
    images = sum(count for _, count in losses)
    return {name: sum(values[name] * count for values, count in losses) / images for name in losses[0][0]}


def test_lines_and_epochs_are_means_of_what_the_objective_returned(train, tmp_path, monkeypatch):
    losses, norms = record(monkeypatch)
    code, _, err = train(*"--batch-size 16 --grad-accum-steps 2 --log-interval 3 --lr 1e-3 --min-lr 1e-4".split())
    assert code == 0, err
    every = metrics(tmp_path / "runs/small")
    # 6 passes in 3 steps an epoch: the third pass is in the second step, the sixth in the third.
    told = [(2, None), (3, None), (3, 1), (5, None), (6, None), (6, 2)]
    assert [(line["step"], line.get("epoch")) for line in every[:-1]] == told
    expected = [(0, 4), (4, 6), (0, 6), (6, 10), (10, 12), (6, 12)]
    for line, (start, end) in zip(every, expected):
        wanted = mean(losses[start:end]) | dict(grad_norm=float(np.mean(norms[start // 2 : end // 2])))
        assert set(wanted) == {"loss", "structure", "detail", "soft", "attention", "grad_norm"}
        assert line["train"] == pytest.approx(wanted, rel=1e-5)
        cosine = (1 + math.cos(math.pi * line["step"] / 6)) / 2
        assert line["lr"] == pytest.approx(1e-4 + 9e-4 * cosine), "that of the next step"
        assert set(line["speed"]) == {"images_per_second", "data_wait", "memory_mb"}
        assert 0 <= line["speed"]["data_wait"] <= 1 and line["speed"]["images_per_second"] > 0
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000 * 1.024
        assert peak / 2 < line["speed"]["memory_mb"] <= peak + 1 or sys.platform == "darwin"
    assert every[0].keys() == {"step", "lr", "train", "speed"}
    assert every[2].keys() == {"step", "epoch", "lr", "train", "validation", "zoom", "speed"}
    assert [line["validation"]["images"] for line in every if "epoch" in line] == [15, 15]


def test_an_epoch_weighs_its_steps_by_their_images(train, tmp_path, monkeypatch):
    losses, norms = record(monkeypatch)
    code, _, err = train(*PLAIN, "--batch-size", "20", "--no-drop-last", "--epochs", "1")
    assert code == 0, err
    assert [count for _, count in losses] == [20, 20, 8]
    epoch = lines(tmp_path / "runs/small")[0]["train"]
    assert epoch["loss"] == pytest.approx(mean(losses)["loss"], rel=1e-6)
    assert epoch["loss"] != pytest.approx(np.mean([values["loss"] for values, _ in losses]), rel=1e-6)
    assert epoch["grad_norm"] == pytest.approx(np.mean(norms), rel=1e-6)


def test_speed_is_measured_between_the_lines(accelerator, monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def loader() -> Iterator[int]:
        for wait in (1.0, 1.0, 4.0):
            now[0] += wait
            yield 0

    tracked = progress.Progress(accelerator, "title", done=2, total=5)
    speeds = []
    for number in tracked.over(loader()):
        now[0] += 3.0
        tracked.add(dict(loss=torch.tensor(2.5)), 10)
        tracked.end_step(10)
        if now[0] in (108.0, 115.0):
            speeds.append(tracked.end_line()[1])
        assert number == 0
    device = torch.device("cpu")
    tracked.end()
    now[0] += 60.0  # evaluation, which is no training
    speeds.append(tracked.epoch.speed(device))
    assert [speed["images_per_second"] for speed in speeds] == [20 / 8, pytest.approx(10 / 7, abs=0.05), 30 / 15]
    assert [speed["data_wait"] for speed in speeds] == pytest.approx([2 / 8, 4 / 7, 6 / 15], abs=1e-4)
    assert tracked.step_ends == [104.0, 108.0, 115.0]
    assert "title  batch 4/5  loss 2.500" in capsys.readouterr().err


def test_layer_decay_logs_the_lowest_rate_as_well(train, tmp_path):
    code, _, err = train("--model", "test_resnet", "--layer-decay", "0.5", "--epochs", "1", "--log-interval", "1")
    assert code == 0, err
    groups = param_groups_layer_decay(timm.create_model("test_resnet"), layer_decay=0.5)
    scales = [group["lr_scale"] for group in groups]
    line = metrics(tmp_path / "runs/small")[0]
    assert max(scales) == 1 > min(scales)
    assert line["lr_lowest"] / line["lr"] == pytest.approx(min(scales))


# zoom


def test_magnification_is_how_far_apart_neighbours_look():
    """By loops: central differences, one-sided at the border, in steps of a plain resize."""
    torch.manual_seed(0)
    grid = attention_grid(torch.rand(2, 5, 6, dtype=torch.float64), (7, 9), size=(70, 90))
    got = magnification(grid)
    for image in range(2):
        for row in range(7):
            for column in range(9):
                left, right = max(column - 1, 0), min(column + 1, 8)
                up, down = max(row - 1, 0), min(row + 1, 6)
                x = (grid[image, row, right, 0] - grid[image, row, left, 0]) / (right - left) / (2 / 9)
                y = (grid[image, down, column, 1] - grid[image, up, column, 1]) / (down - up) / (2 / 7)
                assert got[image, row, column].tolist() == pytest.approx([1 / float(x), 1 / float(y)])
    assert got.std() > 0.1


def test_a_plain_resize_magnifies_nothing_and_a_crop_evenly():
    plain = attention_grid(torch.ones(1, 3, 3), (8, 5), size=(64, 40))
    torch.testing.assert_close(magnification(plain), torch.ones(1, 8, 5, 2), rtol=1e-4, atol=0)
    crop = plain * torch.tensor([0.5, 0.25]) + torch.tensor([0.1, -0.2])
    torch.testing.assert_close(magnification(crop), torch.tensor([2.0, 4.0]).expand(1, 8, 5, 2), rtol=1e-4, atol=0)


def zoom_of(grid: np.ndarray) -> dict[str, float]:
    """ZoomProbe's numbers of positions (B, H, W, 2), in NumPy."""
    height, width = grid.shape[1:3]
    steps_x = np.gradient(grid[..., 0], axis=2) * width / 2
    steps_y = np.gradient(grid[..., 1], axis=1) * height / 2
    halves = []
    for area in (steps_x * steps_y).reshape(len(grid), -1):
        smallest = sorted(area)[: area.size // 2]
        halves.append(sum(smallest) / sum(area))
    return dict(
        x=np.mean(1 / steps_x.min((1, 2))),
        y=np.mean(1 / steps_y.min((1, 2))),
        largest=1 / min(steps_x.min(), steps_y.min()),
        area_of_half=np.mean(halves),
    )


def probe_of(accelerator: Accelerator, model: nn.Module, pictures: int) -> ZoomProbe:
    """Of pictures, each of which shows its number."""
    dataset = [((torch.full((3, 32, 32), number),), 0) for number in range(pictures)]
    loader = SimpleNamespace(dataset=dataset)
    return ZoomProbe(model, loader, lambda images: images[0].float(), accelerator)


def small_tasn(**options) -> TASN:
    torch.manual_seed(0)
    kwargs = dict(backbone="test_resnet", sample_size=24, attention_net="tiny", num_classes=3)
    return timm.create_model("tasn", **kwargs | options)


def test_the_probe_measures_the_grids_of_pictures_from_all_over_the_split(accelerator, monkeypatch):
    model, seen = small_tasn(), []
    torch.manual_seed(1)
    grids = attention_grid(torch.rand(16, 4, 6) ** 3, 24, size=(32, 32), max_zoom=None, iterations=0)

    def sampling_grid(images):
        assert not model.training
        seen.extend(images[:, 0, 0, 0].tolist())
        return grids

    monkeypatch.setattr(model, "sampling_grid", sampling_grid)
    measured = probe_of(accelerator, model, 160).measure()
    assert seen == list(range(0, 160, 10))
    assert measured == pytest.approx(zoom_of(grids.double().numpy()), rel=1e-3)
    assert measured["largest"] > 1.2 * measured["x"] > 1.25 * measured["y"] > 1.8 and measured["area_of_half"] < 0.45


def test_flat_attention_zooms_nowhere(accelerator, monkeypatch):
    model = small_tasn()
    monkeypatch.setattr(model.trilinear_attention, "forward", lambda features: (torch.ones(len(features), 4, 4), None))
    measured = probe_of(accelerator, model, 5).measure()
    assert measured == pytest.approx(dict(x=1, y=1, largest=1, area_of_half=0.5), rel=1e-3)
    assert probe_of(accelerator, timm.create_model("test_resnet"), 5).measure() is None


def test_the_zoom_of_an_epoch_is_that_of_its_model_on_the_validation_images(train, tmp_path, image_folder):
    code, _, err = train("--epochs", "1")
    assert code == 0, err
    logged = lines(tmp_path / "runs/small")[0]["zoom"]
    model = timm.create_model(f"local-dir:{tmp_path / 'runs/small/last'}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    paths = sorted((image_folder / "validation").glob("*/*.png"))
    with torch.inference_mode():
        grid = model.sampling_grid(torch.stack([transform(Image.open(path)) for path in paths]))
    assert len(grid) == 15 and logged == pytest.approx(zoom_of(grid.double().numpy()), rel=1e-2)
