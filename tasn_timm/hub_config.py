"""The files of hub_configs/: what is known of each checkpoint, whether somebody has published its weights or not."""

import dataclasses
import json
import re
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm.models import PretrainedCfg

from .errors import KINDS, UserError, unknown

# Where an installed package keeps them, else the checkout's top level.
HUB_CONFIGS = next(
    folder
    for folder in (Path(__file__).parent / "hub_configs", Path(__file__).parents[1] / "hub_configs")
    if folder.is_dir()
)

# Of pretrained_cfg: what says how a picture is made ready, which has to be there; and what is said elsewhere.
PICTURE = dict(input_size=list, crop_pct=float, interpolation=str, mean=list, std=list)
ELSEWHERE = {"architecture", "tag", "num_classes", "source", "file", "state_dict"}

FORMATS = {
    "commit": (r"[0-9a-f]{40}", "40 hex digits"),
    "sha256": (r"[0-9a-f]{64}", "64 hex digits"),
    "repo_id": (r"[\w.-]+/[\w.-]+", "USER/NAME"),
}


@dataclass
class Training:
    """The "tasn" block: how a checkpoint was or would be trained, and where its weights are. None: not known (yet).

    Weights without a `repo_id` ship with the package or do not exist.
    """

    recipe: str | None = None  # None: a starting point, the backbones' own weights
    dataset: str | None = None  # what `load_splits` takes
    dataset_revision: str | None = None
    paper_top1: float | None = None  # per cent, of a single model
    measured_top1: float | None = None  # per cent
    repo_id: str | None = None  # on the Hub
    commit: str | None = None  # of the repository
    sha256: str | None = None  # of model.safetensors


@dataclass
class HubConfig:
    """A checkpoint: timm's config.json, a tag, and the "tasn" block. Its file is "<architecture>.<tag>.json"."""

    architecture: str
    tag: str
    num_classes: int
    model_args: dict  # what timm.create_model takes besides the architecture
    pretrained_cfg: dict  # timm's, without architecture, tag and num_classes
    tasn: Training

    @property
    def name(self) -> str:
        """What timm.create_model takes: "<architecture>.<tag>"."""
        return f"{self.architecture}.{self.tag}"

    @property
    def shipped(self) -> Path | None:
        """The weights that ship with the package, if they do."""
        path = HUB_CONFIGS / f"{self.name}.safetensors"
        return path if path.is_file() else None

    @classmethod
    def read(cls, path: Path) -> "HubConfig":
        """Read a file, strictly.

        Raises:
            UserError: It cannot be read, has too many or too few keys, or a value that is not allowed.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path.name} cannot be read: {' '.join(str(error).split())}.") from error
        _check(content, path)
        return cls(**content | dict(tasn=Training(**content["tasn"])))

    def write(self, path: Path) -> None:
        """Write a file that `read` reads, its keys in the order of the fields.

        Raises:
            UserError: `read` would refuse it.
        """
        text = json.dumps(dataclasses.asdict(self), indent=2) + "\n"
        _check(json.loads(text), path)
        path.write_text(text, encoding="utf-8")


def _check(content: Any, path: Path) -> None:
    """Refuse what is no `HubConfig` of this file name."""
    _check_keys(content, _fields(HubConfig) | dict(tasn=dict), path.name)
    if f"{content['architecture']}.{content['tag']}" != path.stem:
        raise UserError(
            f"{path.name}: architecture {content['architecture']!r} and tag {content['tag']!r} must be those of the "
            f"file name, which is ARCHITECTURE.TAG.json."
        )
    if content["num_classes"] < 1:
        raise UserError(f"{path.name}: num_classes must be at least 1, got {content['num_classes']}.")
    _check_training(content["tasn"], f"tasn block of {path.name}")
    _check_pretrained_cfg(content, f"pretrained_cfg of {path.name}")


def _check_training(block: dict, where: str) -> None:
    _check_keys(block, _fields(Training), where)
    for key, (pattern, allowed) in FORMATS.items():
        if block[key] is not None and not re.fullmatch(pattern, block[key]):
            raise UserError(f"{where}: {key} must be {allowed} or null, got {block[key]!r}.")
    for key in ("paper_top1", "measured_top1"):
        if block[key] is not None and not 0 <= block[key] <= 100:
            raise UserError(f"{where}: {key} must be per cent, 0 to 100, or null, got {block[key]}.")
    published = {key: block[key] is not None for key in ("repo_id", "commit", "sha256")}
    if published["repo_id"] and not all(published.values()):
        missing = " and ".join(key for key, given in published.items() if not given)
        raise UserError(f"{where}: repo_id needs {missing}, too: give all three, or null for what is not published.")
    if published["commit"] and not published["repo_id"]:
        raise UserError(f"{where}: commit is one of repo_id's, which is null: give both or neither.")


def _check_pretrained_cfg(content: dict, where: str) -> None:
    cfg = content["pretrained_cfg"]
    _check_keys(cfg, PICTURE, where, optional=_fields(PretrainedCfg).keys() - ELSEWHERE)
    names = cfg.get("label_names")
    if names is not None and (not isinstance(names, list) or len(names) != content["num_classes"]):
        raise UserError(
            f"{where}: label_names must be a list of as many names as num_classes ({content['num_classes']}), or null."
        )
    given = [key for key in ("url", "hf_hub_id", "hf_hub_filename") if cfg.get(key)]
    if given and content["tasn"]["repo_id"]:
        raise UserError(f"{where}: {given[0]} has no effect with repo_id in the tasn block: leave out one of them.")


def _check_keys(content: Any, kinds: Mapping[str, Any], where: str, optional: Collection[str] = ()) -> None:
    """Refuse keys that are missing or unknown, and values of other types than `kinds` says."""
    if not isinstance(content, dict):
        raise UserError(f"{where} must be {KINDS[dict]}, got {content!r}.")
    for key in content:
        if key not in kinds and key not in optional:
            raise unknown(f"key in {where}:", key, {*kinds, *optional})
    for key, kind in kinds.items():
        if key not in content:
            raise UserError(f"{where} has no {key!r}: it needs {', '.join(kinds)}.")
        allowed = typing.get_args(kind) or (kind,)  # of str | None
        if not _is_one_of(content[key], allowed):
            names = " or ".join(KINDS[one] for one in allowed)
            raise UserError(f"{where}: {key} must be {names}, got {content[key]!r}.")


def _is_one_of(value: Any, kinds: tuple[type, ...]) -> bool:
    if isinstance(value, bool):  # which Python takes for a number
        return False
    return isinstance(value, kinds) or (float in kinds and isinstance(value, int))


def _fields(cls: type) -> dict[str, Any]:
    return {field.name: field.type for field in dataclasses.fields(cls)}
