"""Ways out of PyTorch: a model as an ONNX or torch.export file, checked against the model itself."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from .errors import NumericalError, UserError
from .files import completing

INPUTS, TOLERANCE = 20, 1e-4
OPSET = 20  # grid_sample has been in ONNX since 16, bilinear with antialiasing since 18


def export(model: nn.Module, path: Path) -> float:
    """Write a classifier to a file that takes batches of any size, and compare the file's logits with the model's.

    The file appears only when it has passed. It knows how to prepare pictures: its metadata (ONNX) or "config.json"
    (torch.export) has input_size, mean, std, interpolation, crop_pct and, where the model has them, label_names.

    Args:
        model: timm model in evaluation mode, on the CPU. Its input size is that of its pretrained_cfg.
        path: Ends in ".onnx", or in ".pt2" for torch.export.

    Returns:
        Largest difference of a logit, relative to the largest logit where that is above 1, over 20 random inputs,
        smooth as pictures are, in batches of 1 to 3.

    Raises:
        UserError: Another ending, a place that cannot be written to, or the packages of the extra "export" are missing.
        NumericalError: The difference is more than 1e-4.
    """
    if path.suffix not in _FORMATS:
        raise UserError(f"{str(path)!r} does not end in {' or '.join(_FORMATS)}: the ending says what to write.")
    if not path.parent.is_dir():
        raise UserError(f"there is no folder {str(path.parent)!r} to write {path.name!r} to: make it first.")
    config = resolve_model_data_config(model)
    if model.pretrained_cfg.get("label_names"):
        config["label_names"] = model.pretrained_cfg["label_names"]
    with completing(path, "FILE") as aside:
        predict = _FORMATS[path.suffix](model, config, aside)
        difference = _largest_difference(model, predict, config["input_size"])
        if not difference <= TOLERANCE:
            raise NumericalError(
                f"the exported model's logits differ by {difference:.2g} from the model's, more than {TOLERANCE:.0e}: "
                f"{path} was not written."
            )
    return difference


def _write_onnx(model: nn.Module, config: dict, path: Path) -> Callable[[Tensor], Tensor]:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 - what torch.onnx needs
    except ImportError as error:
        raise UserError(f"ONNX needs {error.name}: pip install 'tasn_timm[export]'.") from error
    program = torch.onnx.export(
        model,
        (_pictures(2, config["input_size"]),),
        dynamo=True,
        dynamic_shapes=(_BATCHES,),
        input_names=["image"],
        output_names=["logits"],
        opset_version=OPSET,
        verbose=False,
    )
    program.model.metadata_props.update({key: json.dumps(value) for key, value in config.items()})
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"image": images.numpy()})[0])


def _write_program(model: nn.Module, config: dict, path: Path) -> Callable[[Tensor], Tensor]:
    program = torch.export.export(model, (_pictures(2, config["input_size"]),), dynamic_shapes=(_BATCHES,))
    torch.export.save(program, path, extra_files={"config.json": json.dumps(config)})
    return torch.export.load(path).module()


_BATCHES = {0: torch.export.Dim("batch", min=1)}
_FORMATS = {".onnx": _write_onnx, ".pt2": _write_program}


def _pictures(count: int, input_size: tuple[int, int, int], seed: int = 0) -> Tensor:
    """Random and smooth, (count, *input_size), about as normalised photographs.

    Not white noise: there a sampler's logits are no better known in float32 than to 6e-4 (`tasn_tiny` against its
    float64 self), as the next pixel has nothing to do with this one. Of these they are known to 3e-5.
    """
    channels, height, width = input_size
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, channels, max(2, height // 16), max(2, width // 16), generator=generator)
    return F.interpolate(coarse, (height, width), mode="bicubic")


@torch.no_grad()
def _largest_difference(
    model: nn.Module, predict: Callable[[Tensor], Tensor], input_size: tuple[int, int, int]
) -> float:
    hidden = not sys.stderr.isatty()
    differences = []
    for seed in tqdm(range(INPUTS), desc="comparing", unit="input", disable=hidden, leave=False):
        images = _pictures(1 + seed % 3, input_size, seed)
        logits = model(images)
        differences.append((predict(images) - logits).abs().max() / logits.abs().max().clamp(min=1))
    return float(torch.stack(differences).max())
