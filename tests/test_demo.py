"""The page in the browser: what it answers, over HTTP as well, and in a real Chromium (slow)."""

import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import PIPE

import gradio as gr
import numpy as np
import pytest
import timm
import torch
from gradio_client import Client, handle_file
from PIL import Image

from tasn_timm import cli, demo
from tasn_timm.data.synthbirds import draw
from tasn_timm.errors import UserError, run_command
from tasn_timm.gaze import look
from tasn_timm.visualize import panels, to_picture

BIRD = "russet hook-beak eye-ring one-bar edge-tail"  # 4 of synthbirds' test split
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ARGUMENTS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking".split()
ARGUMENTS += "--disable-component-update --disable-sync".split()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[int, Path]:
    """Birds by their index."""
    folder = tmp_path_factory.mktemp("birds")
    for index in (4, 14):
        Image.fromarray(draw("test", index)).save(folder / f"{index}.png")
    return {index: folder / f"{index}.png" for index in (4, 14)}


@pytest.fixture(scope="module")
def url():
    """Address of a page that is being served."""
    page = demo.launch("tasn_tiny", block=False)
    yield page.local_url
    page.close(verbose=False)


def a_png_of(width: int, height: int) -> bytes:
    """A file that says that it has so many pixels, and has none."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@torch.inference_mode()
def test_the_answer_is_the_models(model, files):
    found = demo.answer(model, files[4])
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), use_prefetcher=True)
    probabilities = model(transform(Image.open(files[4]))[None]).softmax(1)[0]
    np.testing.assert_allclose(list(found.probabilities.values()), probabilities, rtol=1e-5)
    assert list(found.probabilities) == list(model.pretrained_cfg["label_names"])
    assert max(found.probabilities, key=found.probabilities.get) == BIRD
    gaze = look(model, Image.open(files[4]), details=8)
    _, attention, structure = (to_picture(tensor, demo.SIDE) for tensor in panels(gaze))
    assert (found.attention, found.structure) == (attention, structure)
    assert [caption for _, caption in found.details] == [f"part {number} of 8" for number in range(1, 9)]
    for (picture, _), view in zip(found.details, gaze.details):
        assert picture.crop((picture.width - demo.SIDE, 0, *picture.size)) == to_picture(view.pixels, demo.SIDE)


def test_the_frame_is_where_the_part_is(model, files):
    gaze = look(model, Image.open(files[4]), details=1)
    picture = np.array(demo.answer(model, files[4]).details[0][0].crop((0, 0, demo.SIDE, demo.SIDE))).astype(int)
    yellow = np.abs(picture - (255, 212, 59)).sum(2) == 0
    columns, rows = yellow.any(0).nonzero()[0], yellow.any(1).nonzero()[0]
    expected = gaze.outline(gaze.details[0]) * demo.SIDE / 192
    found = [columns[0], columns[-1], rows[0], rows[-1]]
    x, y = expected.T
    np.testing.assert_allclose(found, [x.min(), x.max(), y.min(), y.max()], atol=3)


def test_the_cap_changes_the_answer_and_not_the_model(model, files):
    found = {cap: demo.answer(model, files[14], cap) for cap in (None, 4.0, 1.0, 0.0)}
    assert found[None].probabilities == found[4.0].probabilities
    assert found[None].probabilities != found[1.0].probabilities
    twin = timm.create_model("tasn_tiny", pretrained=True, max_zoom=1.0).eval()
    assert demo.answer(twin, files[14]).probabilities == found[1.0].probabilities


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no picture", "the picture cannot be read .not an image.*give another one"),
        (b"", "the file is empty"),
        (a_png_of(8000, 6000), "has 8000 x 6000 pixels: make it smaller, at most 40 megapixels and 20 MB"),
        (a_png_of(100_000, 100_000), "the picture cannot be read .*give another one"),
        (a_png_of(20, 10), "the picture cannot be read"),
    ],
    ids=["text", "empty", "48 megapixels", "a bomb", "damaged"],
)
def test_what_is_too_large_or_no_picture_is_refused(model, tmp_path, content, message):
    (tmp_path / "file.png").write_bytes(content)
    with pytest.raises(UserError, match=message):
        demo.answer(model, tmp_path / "file.png")


def test_a_file_of_too_many_bytes_is_refused_unread(model, files, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "read", lambda image: pytest.fail("20 MB may be 20 GB"))
    (tmp_path / "padded.png").write_bytes(files[4].read_bytes() + bytes(demo.MAX_BYTES))
    with pytest.raises(UserError, match="has 20.1 MB: make it smaller, at most 40 megapixels and 20 MB"):
        demo.answer(model, tmp_path / "padded.png")


def controls(model: torch.nn.Module) -> dict[str, gr.Radio | gr.Slider | gr.Column]:
    blocks = demo.build_page(model, "mine").blocks.values()
    return {block.label: block for block in blocks if isinstance(block, gr.Radio | gr.Slider)}


def test_the_control_of_the_cap_fits_the_model(model):
    small = dict(backbone="test_resnet", sample_size=24, attention_net="tiny", num_classes=5)
    cap = controls(model)["Zoom at most"]
    assert cap.value == 4 and ("4 (as trained)", 4.0) in cap.choices and ("none", 0.0) in cap.choices and cap.visible
    other = timm.create_model("tasn", **small, max_zoom=2.5)
    cap = controls(other)["Zoom at most"]
    assert cap.value == 2.5 and cap.choices[2:4] == [("2", 2.0), ("2.5 (as trained)", 2.5)]
    other.structure_sampler.max_zoom = None
    cap = controls(other)["Zoom at most"]
    assert cap.value == 0 and cap.choices[-1] == ("none (as trained)", 0.0)
    assert not controls(timm.create_model("tasn", **small, sampler="saliency"))["Zoom at most"].visible


def test_models_that_cannot_be_shown_are_refused():
    with pytest.raises(UserError, match="test_resnet has no attention to show"):
        demo.build_page(timm.create_model("test_resnet"), "mine")


@pytest.mark.parametrize("names", [["a", "b"], ["a", "b", "c", "d", "d"]])
def test_no_class_is_dropped_for_lack_of_a_name(files, names):
    small = dict(backbone="test_resnet", sample_size=24, attention_net="tiny", num_classes=5)
    model = timm.create_model("tasn", **small).eval()
    model.pretrained_cfg = model.pretrained_cfg | dict(label_names=names)
    with pytest.raises(UserError, match=f"has 5 classes, but {len(set(names))} different label_names"):
        demo.answer(model, files[4])
    with pytest.raises(UserError, match="label_names"):
        demo.build_page(model, "mine")


def probabilities_of(label: dict) -> dict[str, float]:
    return {one["label"]: one["confidence"] for one in label["confidences"]}


def test_over_http_two_people_with_two_caps_get_their_own_answers(url, model, files):
    """Four requests at once, which differ in picture and cap."""
    clients = [Client(url, verbose=False), Client(url, verbose=False)]
    asked = [(index, cap) for cap in (1.0, 4.0) for index in (4, 14)]

    def ask(number: int) -> dict[str, float]:
        index, cap = asked[number]
        classes, *_ = clients[number % 2].predict(handle_file(files[index]), cap, api_name="/look")
        return probabilities_of(classes)

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask, range(len(asked))))
    for (index, cap), found in zip(asked, answers):
        expected = demo.answer(model, files[index], cap).probabilities
        assert len(found) == 5
        for name, probability in found.items():
            assert abs(expected[name] - probability) < 1e-5


def test_over_http_mistakes_are_told(url, files, tmp_path):
    client = Client(url, verbose=False)
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(Exception, match="the picture cannot be read .not an image"):
        client.predict(handle_file(tmp_path / "text.png"), 4.0, api_name="/look")
    with pytest.raises(Exception, match="3.7 .* is not in the list of choices"):
        client.predict(handle_file(files[4]), 3.7, api_name="/look")
    (tmp_path / "large.png").write_bytes(files[4].read_bytes() + bytes(demo.MAX_BYTES))
    with pytest.raises(Exception, match="413|exceed"):
        client.predict(handle_file(tmp_path / "large.png"), 4.0, api_name="/look")


def test_over_http_what_is_returned_has_names(url):
    (endpoint,) = Client(url, verbose=False).view_api(return_format="dict")["named_endpoints"].values()
    names = ["Most likely classes", "Where it looks", "What it sees", "Part", "Details"]
    assert [each["label"] for each in endpoint["returns"]] == names


def test_without_a_picture_nothing_is_shown(url):
    classes, *_ = Client(url, verbose=False).predict(None, 4.0, api_name="/look")
    assert not classes


def test_the_page_is_for_this_machine_alone_and_sends_nothing_away(url):
    assert url.startswith("http://127.0.0.1:")
    page = demo.build_page(timm.create_model("tasn_tiny", pretrained=True), "mine")
    assert page.analytics_enabled is False


@pytest.fixture
def command(capsys):
    def start(*arguments: str) -> tuple[int, str, str]:
        code = run_command(lambda: cli.main(["demo", *arguments]))
        return code, *capsys.readouterr()

    return start


def test_the_environment_says_where_to_listen_as_on_spaces(command, monkeypatch):
    """launch() is asked for nothing, so that Gradio reads GRADIO_SERVER_NAME and GRADIO_SERVER_PORT."""
    asked = {}
    monkeypatch.setattr(gr.Blocks, "launch", lambda self, **options: asked.update(options))
    monkeypatch.setattr(demo, "_wait", lambda page: None)
    assert command()[0] == 0
    assert (asked["server_name"], asked["server_port"], asked["share"]) == (None, None, False)
    assert command("--host", "0.0.0.0", "--port", "80", "--share")[0] == 0
    assert (asked["server_name"], asked["server_port"], asked["share"]) == ("0.0.0.0", 80, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("tasn_tinny", "did you mean 'tasn_tiny'"),
        ("tasn_tiny --examples missing.png", "'missing.png': the picture cannot be read (the file does not exist)"),
        (
            "tasn_tiny --port PORT",
            "--port PORT, which is taken or not this machine's: choose another --host or --port.\n",
        ),
        ("tasn_tiny --port 99999", "--port must be 1 to 65535, got 99999"),
    ],
)
def test_mistakes_get_one_line(command, url, arguments, message):
    port = url.rstrip("/").rpartition(":")[2]
    code, _, err = command(*arguments.replace("PORT", port).split())
    assert code == 2
    (line,) = [line for line in err.splitlines(keepends=True) if line.startswith("error: ")]
    assert message.replace("PORT", port) in line and "Traceback" not in err


def test_without_gradio_the_extra_is_named(command, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    code, _, err = command()
    assert code == 2 and "demo needs gradio: pip install 'tasn_timm[demo]'." in err


APP = """
from tasn_timm.demo import launch

launch("tasn_tiny")
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["command", "app.py"])
def test_as_a_process_it_listens_where_the_environment_says_and_ends_with_ctrl_c(how, tmp_path, files):
    (tmp_path / "app.py").write_text(APP)  # of the README, for Spaces
    with socket.socket() as free:
        free.bind(("127.0.0.2", 0))
        port = free.getsockname()[1]
    environment = os.environ | dict(GRADIO_SERVER_NAME="127.0.0.2", GRADIO_SERVER_PORT=str(port))
    start = ["-m", "tasn_timm", "demo"] if how == "command" else ["app.py"]
    process = subprocess.Popen(
        [sys.executable, *start], cwd=tmp_path, env=environment, text=True, stdout=PIPE, stderr=PIPE
    )
    assert process.stdout.readline() == f"tasn_tiny: http://127.0.0.2:{port}/\n"
    classes, *_ = Client(f"http://127.0.0.2:{port}", verbose=False).predict(
        handle_file(files[4]), 4.0, api_name="/look"
    )
    assert classes["label"] == BIRD
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert out == ""
    if how == "command":
        assert (process.returncode, err) == (130, "interrupted\n")


@pytest.fixture
def browser():
    if BROWSER is None:
        pytest.skip("no Chromium is installed: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=ARGUMENTS)
        yield browser
        browser.close()


def open_page(browser, url: str, width: int = 1200, height: int = 1000):
    """A page of somebody new; `page.elsewhere` is what it asked of anybody but the server."""
    page = browser.new_context(viewport=dict(width=width, height=height)).new_page()
    page.set_default_timeout(60_000)
    page.elsewhere = []
    ours = (url, "data:", "blob:")
    page.on("request", lambda asked: None if asked.url.startswith(ours) else page.elsewhere.append(asked.url))
    page.goto(url)
    page.wait_for_selector("input[type=file]", state="attached")
    return page


def first_class(page) -> str:
    """The most likely class that the page shows, when all of it is there."""
    page.wait_for_selector("text=part 1 of 8")
    return page.locator("dt").first.inner_text().strip()


@pytest.mark.slow
def test_in_chromium_two_people_upload_and_choose(browser, url, model, files, tmp_path):
    one, other = open_page(browser, url), open_page(browser, url, 390, 844)
    one.set_input_files("input[type=file]", files[4])
    other.set_input_files("input[type=file]", files[14])
    assert first_class(one) == BIRD
    expected = demo.answer(model, files[14]).probabilities
    assert first_class(other) == max(expected, key=expected.get)

    # The other's cap is the other's alone.
    expected = demo.answer(model, files[14], 1.0).probabilities
    best = max(expected, key=expected.get)
    other.get_by_label("1", exact=True).check()
    other.wait_for_function(f"document.querySelector('dd').innerText.includes('{round(100 * expected[best])}%')")
    assert first_class(other) == best
    assert one.get_by_label("4 (as trained)").is_checked() and first_class(one) == BIRD

    one.get_by_label("number input for Part").fill("3")
    one.get_by_label("number input for Part").press("Enter")
    one.wait_for_selector("text=part 3 of 8")
    for name, page in (("wide", one), ("phone", other)):
        page.screenshot(path=tmp_path / f"{name}.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "nothing beyond the side"
        assert not page.elsewhere
        colours = Image.open(tmp_path / f"{name}.png").convert("RGB").getcolors(1 << 24)
        assert len(colours) > 1000, "photographs are there"


@pytest.mark.slow
def test_in_chromium_mistakes_are_told_and_examples_work(browser, url, files, tmp_path):
    page = open_page(browser, url)
    (tmp_path / "bird.png").write_bytes(a_png_of(8000, 6000))
    page.set_input_files("input[type=file]", tmp_path / "bird.png")
    page.wait_for_selector("text=make it smaller, at most 40 megapixels and 20 MB")
    page = open_page(browser, url)
    (tmp_path / "large.png").write_bytes(files[4].read_bytes() + bytes(demo.MAX_BYTES))
    page.set_input_files("input[type=file]", tmp_path / "large.png")
    page.wait_for_selector("text=/exceed/i")
    page = open_page(browser, url)
    page.locator(".gallery-item").nth(1).click()
    assert first_class(page) == BIRD
