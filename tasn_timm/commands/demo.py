"""Serve a page in the browser where pictures are classified, and one sees where the model looks.

It listens on this machine alone; --host 0.0.0.0 lets others of the network in. Ctrl-C ends it.
"""

import argparse
from pathlib import Path

from ..errors import UserError

SUMMARY = "try a model on your pictures in the browser"
EXAMPLES = """examples:
  python -m tasn_timm demo                                  # the birds that ship with the package
  python -m tasn_timm demo runs/cub --examples a.jpg b.jpg

Hugging Face Space (Gradio): requirements.txt with tasn_timm[demo], and app.py with
  from tasn_timm.demo import launch
  launch("hf-hub:me/my-birds")"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add = parser.add_argument
    add("model", metavar="MODEL", nargs="?", default="tasn_tiny", help="as of evaluate (default: %(default)s)")
    add(
        "--examples",
        nargs="+",
        type=Path,
        metavar="PICTURE",
        help="to try (default: birds, for a model that knows them)",
    )
    add("--host", metavar="ADDRESS", help="where to listen (default: GRADIO_SERVER_NAME, else 127.0.0.1)")
    add("--port", type=int, help="(default: GRADIO_SERVER_PORT, else the first free one from 7860)")
    add("--share", action="store_true", help="make a public link, through the servers of Gradio")


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise UserError(f"demo needs {error.name}: pip install 'tasn_timm[demo]'.") from error
    from ..demo import launch

    launch(options.model, examples=options.examples, host=options.host, port=options.port, share=options.share)
