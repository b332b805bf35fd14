"""The figures show the numbers that they say they show, and the command draws them for any model or says why not."""

import dataclasses
import errno
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from matplotlib.colors import same_color
from PIL import Image

from tasn_timm import cli
from tasn_timm.attention_sampler import axis_densities, balance_axes
from tasn_timm.curves import curves_figure
from tasn_timm.data.synthbirds import draw
from tasn_timm.errors import UserError, run_command
from tasn_timm.figures import _choose_channels, attention_figure, channels_figure, sampling_figure
from tasn_timm.finished_run import read_metrics
from tasn_timm.gaze import look
from tasn_timm.hub import load_model, save_folder
from tasn_timm.trilinear_attention import trilinear_attention
from tasn_timm.visualize import HIGH, LOW, overlaid

SMALL = dict(backbone="test_resnet", sample_size=(24, 32), attention_net="tiny", relation_scale=10.0, num_classes=5)


def create(**arguments) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("tasn", **SMALL | arguments).eval()


@pytest.fixture(scope="module")
def gaze(model):
    return look(model, Image.fromarray(draw("test", 4)), details=3)


@pytest.fixture
def bird(tmp_path) -> Path:
    Image.fromarray(draw("test", 4)).save(tmp_path / "bird.png")
    return tmp_path / "bird.png"


@pytest.fixture
def saved(tmp_path):
    """Save a model with other arguments as a folder."""

    def save(**arguments) -> Path:
        model = create(**arguments)
        config = timm.data.resolve_model_data_config(model)
        save_folder(model, tmp_path / "model", label_names=list("abcde"), data_config=config)
        return tmp_path / "model"

    return save


@pytest.fixture
def visualize(capsys, tmp_path, monkeypatch):
    """Run the command in an empty folder: exit code, standard output and error."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def start(*arguments: str | Path) -> tuple[int, str, str]:
        code = run_command(lambda: cli.main(["visualize", *map(str, arguments)]))
        return code, *capsys.readouterr()

    return start


def shown(axes) -> torch.Tensor:
    """The picture in axes, (3, H, W)."""
    return torch.from_numpy(np.asarray(axes.images[0].get_array())).movedim(2, 0)


def by_title(figure) -> dict:
    return {axes.get_title(): axes for axes in figure.axes}


def test_attention_is_laid_over_a_grey_picture():
    pixels = torch.rand(3, 8, 10)
    grey = pixels.mean(0)
    torch.testing.assert_close(overlaid(pixels, torch.zeros(4, 5)), 0.8 * grey.expand(3, -1, -1))
    torch.testing.assert_close(overlaid(pixels, torch.ones(4, 5)), HIGH.view(3, 1, 1) * (0.35 + 0.65 * grey))
    half = 0.5 * 0.8 * grey + 0.5 * (0.5 * (LOW + HIGH)).view(3, 1, 1) * (0.35 + 0.65 * grey)
    torch.testing.assert_close(overlaid(pixels, torch.full((4, 5), 0.5)), half)


def test_figure_2_has_the_views_and_frames_them_in_the_photo(gaze):
    figure = attention_figure([gaze], ["bird.png"])
    photo, attention, structure, plain, *details = figure.axes
    assert photo.get_xlabel() == "bird.png"
    torch.testing.assert_close(shown(photo).float() / 255, gaze.pixels, atol=1e-5, rtol=0)
    assert torch.equal(shown(attention), overlaid(gaze.pixels, gaze.structure.attention))
    assert torch.equal(shown(structure), gaze.structure.pixels)
    boxes = gaze.pixels.unflatten(1, (48, 4)).unflatten(3, (48, 4)).mean((2, 4))  # 192 to 48, a bit softer than that
    assert (shown(plain) - boxes).abs().mean() < 0.01
    assert len(details) == len(photo.lines) == len(gaze.details) == 3
    for axes, line, view in zip(details, photo.lines, gaze.details):
        assert torch.equal(shown(axes), view.pixels)
        np.testing.assert_array_equal(line.get_xydata(), gaze.outline(view).numpy())
        assert same_color(line.get_color(), axes.patches[0].get_edgecolor()), "which frame is which"


def test_rows_with_fewer_details_stay_empty(gaze):
    other = look(create(part_net=False), gaze.photo)
    figure = attention_figure([gaze, other], ["one", "two"])
    assert len(figure.axes) == 7 + 4


def test_what_the_input_cuts_off_is_dimmed(model):
    wide = Image.fromarray(np.concatenate([draw("test", 4), draw("test", 5)], 1))
    (photo, *_) = attention_figure([look(model, wide)], ["wide"]).axes
    dimmed = [patch.get_bbox().bounds for patch in photo.patches if patch.get_bbox().width * patch.get_bbox().height]
    assert dimmed == [(0, 0, 96, 192), (288, 0, 96, 192)]


def test_figure_4_shows_marginals_integrals_and_points(model, gaze):
    figure = sampling_figure(model, gaze)
    axes = by_title(figure)
    raw = axis_densities(gaze.structure.attention[None], (192, 192))
    balanced = balance_axes(*raw)
    for number, name in enumerate("xy"):
        marginal, integral = axes[f"(b{number + 1}) marginal over {name}"], axes[f"(c{number + 1}) its integral"]
        filled, outline = (patch.get_data().values for patch in marginal.patches)
        np.testing.assert_allclose(filled, balanced[number][0])
        np.testing.assert_allclose(outline, raw[number][0])
        np.testing.assert_allclose([filled.mean(), outline.mean()], 1, atol=1e-5)
        x, share = integral.lines[0].get_data()
        np.testing.assert_allclose(share, np.append(0, filled.cumsum()) / filled.sum(), atol=1e-5)
        assert len(integral.texts) == 2 * 10
        for text in integral.texts:  # arrows to the curve, and from there to the axis
            start, end = text.xyann, text.xy
            np.testing.assert_allclose(np.interp(max(start[0], end[0]), x, share), max(start[1], end[1]), atol=2e-3)
    points = axes["(d) sampling points"].collections[0].get_offsets()
    expected = (gaze.structure.grid[1::2, 1::2].flatten(0, 1) + 1) / 2 * 192
    np.testing.assert_allclose(points, expected, atol=1e-4)
    assert torch.equal(shown(axes["(e) sampled image"]), gaze.structure.pixels)


def test_figure_4_draws_the_cap_that_there_is(gaze):
    for iterations, expected in ((5, ["max_zoom 4"]), (0, [])):
        model = create(iterations=iterations)
        axes = by_title(sampling_figure(model, look(model, gaze.photo)))["(b1) marginal over x"]
        assert [text.get_text() for text in axes.texts] == expected


@pytest.mark.parametrize("sampler", ["saliency", "uniform"])
def test_samplers_without_marginals_have_the_rest_of_figure_4(sampler, gaze):
    model = create(sampler=sampler)
    figure = sampling_figure(model, look(model, gaze.photo))
    assert set(by_title(figure)) == {"(a) attention map", "image", "(d) sampling points", "(e) sampled image"}


def test_figure_5_compares_the_same_channels(model, gaze):
    figure = channels_figure(model, gaze)
    above, below = figure.axes[:9], figure.axes[9:]
    channels = [int(axes.get_title().removeprefix("channel ")) for axes in above]
    assert channels == sorted(set(channels)) and len(below) == 9
    maps = trilinear_attention(gaze.features[None], relation_scale=10.0)[0]
    for channel, feature, trilinear in zip(channels, above, below):
        x, m = gaze.features[channel], maps[channel]
        assert x.max() > 0
        torch.testing.assert_close(shown(feature), overlaid(gaze.pixels, x / x.max()))
        torch.testing.assert_close(shown(trilinear), overlaid(gaze.pixels, m / m.max()))
    assert _choose_channels(gaze.features, 0) == channels != _choose_channels(gaze.features, 1)


def test_channels_that_do_not_respond_are_left_out(model, gaze):
    features = torch.zeros_like(gaze.features)
    features[[2, 7]] = gaze.features[[15, 16]]
    figure = channels_figure(model, dataclasses.replace(gaze, features=features))
    assert [axes.get_title() for axes in figure.axes[:2]] == ["channel 2", "channel 7"] and len(figure.axes) == 4
    with pytest.raises(UserError, match="no channel of the attention net's features responds to this picture"):
        channels_figure(model, dataclasses.replace(gaze, features=torch.zeros_like(features)))


METRICS = [
    dict(step=10, lr=0.1, train=dict(loss=3.0, attention=1.0, grad_norm=2.0), speed={}),
    dict(step=20, lr=0.2, train=dict(loss=None, attention=0.9, grad_norm=None), speed={}),
    dict(step=20, lr=0.2, epoch=1, train=dict(loss=2.5, attention=0.95, grad_norm=1.5), speed={})
    | dict(validation=dict(top1=50.0, top5=90.0), zoom=dict(x=1.5, y=1.25, largest=3.0, area_of_half=0.4)),
    dict(step=30, lr=0.1, train=dict(loss=2.0, attention=0.5, grad_norm=1.0), speed={}),
    dict(step=40, lr=0.0, epoch=2, train=dict(loss=2.0, attention=0.5, grad_norm=1.0), speed={})
    | dict(validation=dict(top1=60.0, top5=95.0), zoom=dict(x=2.0, y=1.5, largest=3.5, area_of_half=0.3)),
    dict(step=40, test=dict(top1=58.0, top5=94.0, images=100)),
]


def write_metrics(folder: Path, lines: list[dict]) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def data(axes) -> list:
    return [np.nan_to_num(np.array(line.get_data(), float), nan=-1).tolist() for line in axes.lines]


def test_the_curves_are_what_was_logged(tmp_path):
    axes = by_title(curves_figure(read_metrics(write_metrics(tmp_path / "run", METRICS)), "run"))
    assert data(axes["loss and its parts"]) == [
        [[10, 20, 30], [3, -1, 2]],
        [[20, 40], [2.5, 2]],
        [[10, 20, 30], [1, 0.9, 0.5]],
        [[20, 40], [0.95, 0.5]],
    ]
    assert data(axes["accuracy"]) == [[[20, 40], [50, 60]], [[40], [58]], [[20, 40], [90, 95]], [[40], [94]]]
    assert data(axes["learning rate"]) == [[[10, 20, 20, 30, 40], [0.1, 0.2, 0.2, 0.1, 0]]]
    assert data(axes["zoom"]) == [[[20, 40], [1.5, 2]], [[20, 40], [1.25, 1.5]], [[20, 40], [3, 3.5]]]
    np.testing.assert_allclose(data(axes["area that half of the pixels see"])[0], [[20, 40], [40, 30]])
    assert data(axes["norm of the gradient"]) == [[[10, 20, 30], [2, -1, 1]]]


def test_curves_leave_out_what_a_run_does_not_have(tmp_path):
    lines = [{key: value for key, value in line.items() if key != "zoom"} for line in METRICS if "epoch" in line]
    lines = [line | dict(validation=None, lr_lowest=0.01) for line in lines]
    axes = by_title(curves_figure(read_metrics(write_metrics(tmp_path / "run", lines)), "run"))
    assert set(axes) == {"loss and its parts", "learning rate", "norm of the gradient"}
    assert data(axes["loss and its parts"])[0] == [[20, 40], [2.5, 2]], "the epochs', without others"
    assert data(axes["learning rate"])[1] == [[20, 40], [0.01, 0.01]]


def test_a_last_line_that_a_crash_has_torn_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train": {}}\n{"step": 2, "tr')
    assert read_metrics(tmp_path) == [dict(step=1, train={})]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (None, "has no metrics.jsonl: give the folder of a run"),
        ("", "has no line of training yet: wait for the first epoch"),
        ('{"step": 1, "tr\n{"step": 2, "train": {}}\n', "line 1 of .* is damaged: .* Remove it"),
    ],
)
def test_a_folder_without_curves_is_refused(tmp_path, lines, message):
    if lines is not None:
        (tmp_path / "metrics.jsonl").write_text(lines)
    with pytest.raises(UserError, match=message):
        curves_figure(read_metrics(tmp_path), "run")


BEGINNINGS = dict(png=b"\x89PNG", svg=b"<?xml", pdf=b"%PDF")


@pytest.mark.parametrize(
    ("figure", "ending"),
    [
        ("attention", "png"),
        pytest.param("sampling", "svg", marks=pytest.mark.slow),
        pytest.param("channels", "pdf", marks=pytest.mark.slow),
        ("curves", "PDF"),
    ],
)
def test_the_command_writes_each_figure(visualize, bird, tmp_path, figure, ending):
    run = write_metrics(tmp_path / "runs/mine", METRICS)
    arguments = [run] if figure == "curves" else ["tasn_tiny", bird]
    output = tmp_path / f"out.{ending}"
    code, out, err = visualize(*arguments, "--figure", figure, "--output", output)
    assert code == 0, err
    assert output.read_bytes().startswith(BEGINNINGS[ending.lower()])
    lines = [] if figure == "curves" else ["bird.png: russet hook-beak eye-ring one-bar edge-tail, 96.6 %"]
    assert out.splitlines() == [*lines, str(output)]
    assert not list(tmp_path.glob(".*")), "nothing is left beside it"


def test_without_output_the_file_has_the_figures_name(visualize, bird, tmp_path):
    Image.open(bird).convert("L").save(tmp_path / "grey.png")
    code, out, _ = visualize("tasn_tiny", bird, tmp_path / "grey.png", "--parts", "0")
    assert code == 0 and out.splitlines()[-1] == "attention.png"
    width, height = Image.open("attention.png").size
    assert width > 1.5 * height, "two rows of four"


@pytest.mark.parametrize("figure", ["attention", "curves"])
def test_dollars_in_names_are_no_formulas(visualize, bird, tmp_path, figure):
    name = "cost_$5_and_$6"
    if figure == "curves":
        arguments = [write_metrics(tmp_path / name, METRICS)]
    else:
        arguments = ["tasn_tiny", bird.rename(tmp_path / f"{name}.png"), "--parts", "0"]
    code, _, err = visualize(*arguments, "--figure", figure)
    assert code == 0, err


def test_what_a_model_does_not_have_is_said(visualize, bird, saved):
    folder = saved(part_net=False, sampler="saliency")
    code, out, _ = visualize(folder, bird)
    assert code == 0 and "without detail images of the model: it was trained without a part net" in out
    code, out, _ = visualize(folder, bird, "--figure", "sampling")
    assert code == 0 and "without (b) and (c): the saliency sampler has no marginals" in out
    code, _, err = visualize(folder, bird, "--parts", "2")
    assert code == 2 and "has no detail images: it was trained without a part net. Leave it out" in err


def test_a_missing_name_of_a_class_is_told(visualize, bird, saved, monkeypatch):
    folder = saved()
    model = load_model(str(folder))
    model.pretrained_cfg = model.pretrained_cfg | dict(label_names=["a"])
    monkeypatch.setattr("tasn_timm.hub.load_model", lambda source: model)
    code, _, err = visualize(folder, bird)
    assert code == 2 and "has 5 classes, but 1 different label_names: correct its config.json" in err


def test_self_attention_has_no_channels_to_compare(visualize, bird, saved):
    folder = saved(normalization="self_attention", relation_scale=1.0)
    assert visualize(folder, bird)[0] == 0
    code, _, err = visualize(folder, bird, "--figure", "channels")
    assert code == 2 and "self-attention has a map for each position, not for each channel" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("tasn_tiny", "--figure attention takes 1 to 20 pictures, got 0."),
        ("tasn_tiny BIRD BIRD --figure sampling", "--figure sampling takes one picture, got 2."),
        ("tasn_tiny BIRD --figure curves", "--figure curves takes no picture, only the folder of a run, got 1."),
        ("tasn_tiny BIRD --figure painting", "invalid choice: 'painting'"),
        ("tasn_tiny BIRD --output bird.jpg", "'bird.jpg' does not end in .png, .svg, .pdf"),
        ("tasn_tiny BIRD --output nowhere/bird.png", "'nowhere/bird.png' cannot be written"),
        ("tasn_tiny BIRD --output .", "does not end in"),
        ("tasn_tiny BIRD --figure sampling --parts 2", "--parts has no effect with --figure sampling"),
        ("tasn_tiny BIRD --seed 2", "--seed has no effect with --figure attention"),
        ("tasn_tiny BIRD --parts 9", "--parts must be 0 to 8, got 9."),
        ("tasn_tiny BIRD --figure channels --seed -1", "--seed: must be a whole number, 0 or more, got '-1'"),
        ("tasn_tiny missing.png", "picture 'missing.png' cannot be read (the file does not exist): give another one."),
        ("tasn_tiny TEXT", "cannot be read (not an image"),
        ("tasn_tinny BIRD", "did you mean 'tasn_tiny'"),
        ("nowhere --figure curves", "'nowhere' has no metrics.jsonl"),
    ],
)
def test_mistakes_get_one_line_and_leave_nothing(visualize, bird, tmp_path, arguments, message):
    (tmp_path / "text.jpg").write_text("no picture")
    arguments = arguments.replace("BIRD", str(bird)).replace("TEXT", str(tmp_path / "text.jpg")).split()
    code, out, err = visualize(*arguments)
    assert code == 2 and not out, err
    (line,) = err.splitlines()
    assert line.startswith("error: ") and message in line
    assert not list(Path.cwd().iterdir())


def test_an_interrupted_command_leaves_the_older_file(visualize, bird, monkeypatch):
    Path("attention.png").write_text("older")

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", interrupt)
    assert visualize("tasn_tiny", bird)[0] == 130
    assert [path.name for path in Path.cwd().iterdir()] == ["attention.png"]
    assert Path("attention.png").read_text() == "older"


def test_what_goes_wrong_before_the_file_is_not_laid_on_it(visualize, bird, monkeypatch):
    def fail(*arguments, **options):
        assert not list(Path.cwd().iterdir()), "a kill here would leave it"
        raise PermissionError(errno.EACCES, "Permission denied", "weights")

    monkeypatch.setattr("tasn_timm.hub.load_model", fail)
    code, _, err = visualize("tasn_tiny", bird)
    assert (code, "'weights': Permission denied" in err, "--output" in err) == (2, True, False)


def test_without_matplotlib_the_extra_is_named(visualize, bird, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = visualize("tasn_tiny", bird)
    assert code == 2 and "visualize needs matplotlib: pip install 'tasn_timm[plot]'." in err
