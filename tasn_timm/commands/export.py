"""Write a trained model to a file that takes batches of any size, and compare the two on random inputs.

The file's metadata says how to prepare pictures, and names the classes.
"""

import argparse
from pathlib import Path

from ..export import INPUTS, export

SUMMARY = "write a trained model as an ONNX or torch.export file"
EXAMPLES = """example:
  python -m tasn_timm export runs/cub cub.onnx"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("model", metavar="MODEL", help="as of evaluate")
    parser.add_argument("file", metavar="FILE", type=Path, help="ends in .onnx, or in .pt2 for torch.export")


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    from ..hub import load_model

    difference = export(load_model(options.model), options.file)
    print(f"{options.file}: logits within {difference:.1e} of {options.model} on {INPUTS} random inputs")
