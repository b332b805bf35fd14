"""A page in the browser that shows what a TASN sees of one's pictures, with Gradio (extra "demo").

Each request computes its own answer from the model, which is never changed, so any number of people can use the page at
once. Nothing is sent anywhere: no telemetry, no fonts or scripts from elsewhere.
"""

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import gradio as gr
import torch
from gradio.data_classes import ImageData
from PIL import Image, ImageOps

from .data import synthbirds
from .data.decoding import UnreadableImage, claimed_size, decode, read
from .errors import UserError
from .gaze import check, look
from .hub import load_model, trained_on
from .predict import label_names
from .tasn import TASN
from .visualize import framed, panels, side_by_side, to_picture

MAX_BYTES = 20 * 1024 * 1024  # of an upload
MAX_PIXELS = 40_000_000  # of a picture, which takes three bytes each once it is decoded
PARTS = 8  # detail images, at most
SIDE = 384  # height of the pictures on the page
CAPS = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)  # to choose from, beside the model's own and none
BIRDS = (1, 4, 11, 14, 19)  # of synthbirds' test split, as examples
AT_ONCE, WAITING = 2, 32  # requests
KEPT = 3600  # seconds that pictures stay on disk
PART_INFO = "The part net was trained on images like these. The frame shows where in your picture a part is enlarged."
CSS = ".gradio-container {max-width: 1100px !important; margin: auto} footer {font-size: 0.8rem}"


class Answer(NamedTuple):
    """What the page shows of a picture."""

    probabilities: dict[str, float]  # by class
    attention: Image.Image
    structure: Image.Image
    details: list[tuple[Image.Image, str]]  # the photo with a frame beside the detail image, and a caption


def answer(model: TASN, file: str | Path, max_zoom: float | None = None) -> Answer:
    """Let a model look at a picture's file.

    Args:
        model: In evaluation mode; not changed.
        file: Path of the picture.
        max_zoom: Cap of the magnification, 0 for none; None for the model's own.

    Raises:
        UserError: The picture is too large or cannot be read, or the cap is not allowed.
    """
    gaze = look(model, _photo(Path(file)), details=PARTS, max_zoom=max_zoom)
    _, attention, structure = (to_picture(tensor, SIDE) for tensor in panels(gaze))
    small = ImageOps.contain(gaze.photo, (2 * SIDE, SIDE))  # a panorama is less high
    scale = small.width / gaze.photo.width
    details = [
        side_by_side([framed(small, gaze.outline(view) * scale), to_picture(view.pixels, SIDE)])
        for view in gaze.details
    ]
    captions = [f"part {number} of {len(details)}" for number in range(1, len(details) + 1)]
    probabilities = dict(zip(label_names(model), gaze.probabilities.tolist()))
    return Answer(probabilities, attention, structure, list(zip(details, captions)))


def build_page(model: TASN, title: str, examples: Sequence[str | Path] = ()) -> gr.Blocks:
    """Make the page.

    Args:
        model: In evaluation mode.
        title: Name of the model.
        examples: Files of pictures to try.

    Raises:
        UserError: The model is no TASN, has other channels than a picture's three, or no name for each class.
    """
    check(model)
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(KEPT, KEPT)) as page:
        gr.Markdown(_introduction(model, title))
        with gr.Row():
            with gr.Column():
                photo = gr.Image(label="Your picture", type="filepath", sources=["upload", "clipboard"], height=320)
                photo.preprocess = _uploaded  # not in a subclass, for which Gradio would write a .pyi into our package
                if examples:
                    gr.Examples([str(path) for path in examples], photo, label="Or one of these")
            with gr.Column():
                classes = gr.Label(num_top_classes=5, label="Most likely classes", show_heading=False)
                with gr.Row():
                    attention, structure = (_picture(title) for title in ("Where it looks", "What it sees"))
        cap = gr.Radio(**_cap_choices(model), visible=model.structure_sampler.has_cap)
        with gr.Column(visible=False) as parts:
            part = gr.Slider(1, PARTS, value=1, step=1, label="Part", info=PART_INFO, interactive=True)
            details = gr.Gallery(
                label="Details",
                show_label=False,
                preview=True,
                object_fit="contain",
                height="min(460px, 80vw)",
                buttons=["download", "fullscreen"],
            )

        gr.on(
            [photo.change, cap.change],
            partial(_respond, model),
            [photo, cap],
            [classes, attention, structure, parts, part, details],
            trigger_mode="always_last",
            concurrency_limit=AT_ONCE,
            api_name="look",
        )
        part.change(_select, part, details, show_progress="hidden", queue=False, api_visibility="private")
    return page.queue(max_size=WAITING)


def _respond(model: TASN, file: str | None, max_zoom: float) -> tuple:
    """What becomes of the page: classes, attention, structure, all about parts, the slider of parts, details."""
    if file is None:
        return None, None, None, gr.Column(visible=False), gr.skip(), None
    try:
        found = answer(model, file, max_zoom if model.structure_sampler.has_cap else None)
    except UserError as error:
        raise gr.Error(str(error), duration=None, print_exception=False) from error
    count = len(found.details)
    slider = gr.Slider(maximum=max(count, 2), value=1, interactive=count > 1)  # which has two ends at least
    gallery = gr.Gallery(found.details, selected_index=0 if count else None)
    return found.probabilities, found.attention, found.structure, gr.Column(visible=count > 0), slider, gallery


def launch(
    source: str = "tasn_tiny",
    *,
    examples: Sequence[str | Path] | None = None,
    host: str | None = None,
    port: int | None = None,
    share: bool = False,
    block: bool = True,
) -> gr.Blocks:
    """Serve the page of a model.

    Args:
        source: The model, as `load_model` takes it.
        examples: Files of pictures to try. None: drawn birds, if the model was trained on them.
        host: Address to listen on. None: the environment's GRADIO_SERVER_NAME, which Spaces set, else this machine
            alone.
        port: None: GRADIO_SERVER_PORT, else the first free one from 7860.
        share: Make a public link, through Gradio's servers.
        block: Wait until the process is interrupted.

    Returns:
        The page, which `close()` ends.

    Raises:
        UserError: No such model, or one that cannot be shown; a picture of the examples cannot be read; or the port is
            taken.
    """
    if port is not None and not 1 <= port <= 65535:
        raise UserError(f"--port must be 1 to 65535, got {port}.")
    model = load_model(source).to(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    check(model)
    for path in examples or ():
        try:
            _photo(Path(path))
        except UserError as error:
            raise UserError(f"--examples {str(path)!r}: {error}") from error
    with tempfile.TemporaryDirectory() as folder:
        if examples is None:
            examples = _draw_birds(Path(folder)) if trained_on(source) == "synthbirds" else ()
        page = build_page(model, source, examples)
        try:
            page.launch(
                server_name=host,
                server_port=port,
                share=share,
                prevent_thread_lock=True,
                max_file_size=MAX_BYTES,
                quiet=True,
                theme=gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
                css=CSS,
                footer_links=["api", "gradio"],
                run_history=False,
                ssr_mode=False,
                pwa=False,
            )
        except OSError as error:
            asked = [f"--{name} {value}" for name, value in dict(host=host, port=port).items() if value is not None]
            raise UserError(
                f"the page cannot be served at {' '.join(asked) or 'its usual address'}, which is taken or not this "
                f"machine's: choose another --host or --port."
            ) from error
    print(f"{source}: {page.share_url or page.local_url}", flush=True)
    if block:
        _wait(page)
    return page


def _wait(page: gr.Blocks) -> None:
    """Serve until Ctrl-C, which Gradio's own waiting would take for a good end."""
    try:
        while page.server.thread.is_alive():
            page.server.thread.join(1)  # with a limit, or Windows would not hear of Ctrl-C
    finally:
        page.close(verbose=False)


def _uploaded(payload: ImageData | None) -> str | None:
    """The file as it was uploaded: `decode` is the one rule for reading pictures, and says what is wrong with them."""
    return payload.path if payload else None


def _photo(path: Path) -> Image.Image:
    limits = f"make it smaller, at most {MAX_PIXELS / 1e6:.0f} megapixels and {MAX_BYTES / 2**20:.0f} MB"
    if path.is_file() and (size := path.stat().st_size) > MAX_BYTES:
        raise UserError(f"the picture has {size / 2**20:.1f} MB: {limits}.")
    try:
        data = read(dict(bytes=None, path=str(path)))
        width, height = claimed_size(data)
        if width * height > MAX_PIXELS:
            raise UserError(f"the picture has {width} x {height} pixels: {limits}.")
        return decode(dict(bytes=data, path=None))
    except UnreadableImage as error:
        raise UserError(f"the picture cannot be read ({error}): give another one.") from error


def _introduction(model: TASN, title: str) -> str:
    large, small = (" x ".join(map(str, size)) for size in (model.pretrained_cfg["input_size"][1:], model.sample_size))
    return (
        f"# What does {title} look at?\n\nIt knows {len(label_names(model))} classes, and gives one of their names to "
        f"any picture. Of {large} pixels it samples {small} for its backbone, most of them where its attention is."
    )


def _cap_choices(model: TASN) -> dict:
    """Arguments of the control for the cap."""
    own = model.structure_sampler.max_zoom or 0.0
    choices = [(f"{cap:g}{' (as trained)' * (cap == own)}", cap) for cap in sorted({*CAPS, own} - {0.0})]
    choices.append((f"none{' (as trained)' * (own == 0)}", 0.0))
    return dict(choices=choices, value=own, label="Zoom at most", info="max_zoom: the sampler's largest magnification")


def _picture(title: str) -> gr.Image:
    """A place for a picture, its title above and not on it."""
    with gr.Column(min_width=140):
        gr.Markdown(f"**{title}**")
        hidden = dict(label=title, show_label=False)  # but over HTTP, where it is the name of the output
        return gr.Image(**hidden, interactive=False, format="png", buttons=["fullscreen"], alt_text=title)


def _select(part: int) -> gr.Gallery:
    return gr.Gallery(selected_index=int(part) - 1)


def _draw_birds(folder: Path) -> list[Path]:
    paths = [folder / f"bird-{index}.png" for index in BIRDS]
    for index, path in zip(BIRDS, paths):
        Image.fromarray(synthbirds.draw("test", index)).save(path)
    return paths
