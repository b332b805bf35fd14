"""Run a script, such as timm's train.py, validate.py, inference.py, benchmark.py or onnx_export.py, with these models.

train.py trains a TASN with its own loss.
"""

import argparse
import runpy
import sys
from pathlib import Path

from ..errors import UserError

SUMMARY = "run one of timm's scripts with these models"
EXAMPLES = """example:
  python -m tasn_timm run validate.py photos/ --model tasn_tiny --pretrained"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("script", metavar="SCRIPT", type=Path, help="a Python file")
    parser.add_argument("arguments", metavar="ARGUMENTS", nargs=argparse.REMAINDER, help="the script's own")


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    import timm.task

    from ..task import create_task

    if not options.script.is_file():
        raise UserError(
            f"there is no script {str(options.script)!r}: give the path of a Python file; "
            f"timm's scripts are in its repository, not in its package."
        )
    timm.task.ClassificationTask = create_task  # what train.py imports by name
    sys.argv = [str(options.script), *options.arguments]
    sys.path[0] = str(options.script.resolve().parent)  # as Python does for a script
    runpy.run_path(str(options.script), run_name="__main__")
