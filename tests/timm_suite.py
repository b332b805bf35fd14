"""timm's own tests/test_models.py, unmodified, on our models: python tests/timm_suite.py [pytest's arguments].

The tests are those of the installed timm, from its source distribution, which pip downloads. This file is also the
pytest plugin that makes them see our models instead of timm's: they are parametrised by `timm.list_models` when they
are collected.

Not run, for these reasons:
- timm's tests of single models of its own
- torch.jit.script, which PyTorch has deprecated, of what holds trilinear attention or a sampler (see
  `BackboneClassifier`); torch.jit.trace, torch.compile, torch.export and ONNX are in test_compile.py
- models that differ from another one as do two others
- downloads of weights; those that lie in the package are loaded
"""

import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest
import timm

STOCK = set(timm.list_models())

import tasn_timm  # noqa: E402, F401 - registers

OURS = set(timm.list_models()) - STOCK
# To tasn_lite_resnet50 they are what the published ones are to theirs.
ALIKE = {"tasn_lite_resnet101", "tasn_lite_convnext_tiny"}
list_all = timm.list_models


def list_ours(filter="", module="", *args, **kwargs) -> list[str]:
    """`timm.list_models` of our models alone. The tests' modules are those with forward_intermediates, as ours."""
    return [name for name in list_all(filter, "", *args, **kwargs) if name.split(".")[0] in OURS]


def reason_to_leave_out(test: str, name: str) -> str | None:
    """Why a test is not run on a model; None where it is."""
    architecture = name.split(".")[0]
    if architecture not in OURS:
        return "of timm's own models"
    if architecture in ALIKE:
        return "of models like another one"
    if "torchscript" in test and architecture != "resnet6s":
        return "torch.jit.script"
    if "pretrained" in test and not timm.models.get_pretrained_cfg(architecture).file:
        return "downloads"
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept, left_out = [], {}
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        reason = reason_to_leave_out(item.originalname, str(parameters.get("model_name", "")))
        (kept if reason is None else left_out.setdefault(reason, [])).append(item)
    for deselected in left_out.values():
        config.hook.pytest_deselected(items=deselected)
    items[:] = kept
    config.stash[COUNTS] = {reason: len(deselected) for reason, deselected in left_out.items()}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    counts = ", ".join(f"{count} {reason}" for reason, count in config.stash[COUNTS].items())
    terminalreporter.write_line(f"timm {timm.__version__} on {', '.join(sorted(OURS))}; not run: {counts}")


COUNTS = pytest.StashKey[dict[str, int]]()


def main(arguments: list[str]) -> int:
    """Download timm's tests and run them; returns pytest's exit code."""
    with tempfile.TemporaryDirectory() as folder:
        source = ["--no-deps", "--no-binary", "timm", f"timm=={timm.__version__}"]
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "-d", folder, *source], check=True)
        (archive,) = Path(folder).glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            # Python has it since 3.11.4.
            tar.extractall(folder, **(dict(filter="data") if hasattr(tarfile, "data_filter") else {}))
        root = archive.with_name(archive.name.removesuffix(".tar.gz"))
        command = [sys.executable, "-m", "pytest", "-p", "timm_suite", "-W", "ignore", "tests/test_models.py"]
        paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        # Beside timm's tests lie its sources, which must not take the place of the installed ones.
        (root / "timm").rename(root / "timm_sources")
        return subprocess.run([*command, *arguments], cwd=root, env=os.environ | dict(PYTHONPATH=paths)).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
else:
    timm.list_models = list_ours
