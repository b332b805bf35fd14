"""A model that starts from the pretrained weights of its backbones: they keep theirs, all else is new."""

from collections.abc import Iterable
from pathlib import Path

import timm
from torch import Tensor, nn

from .attention_net import PRESETS
from .classifier import BackboneClassifier
from .errors import UserError
from .tasn import TASN, structure_norm


def weights_source(cfg: dict) -> dict:
    """Where the weights of a cfg are, and whether they need a loader of their own."""
    keys = ("state_dict", "file", "hf_hub_id", "hf_hub_filename", "url", "custom_load")
    return {key: cfg[key] for key in keys if cfg.get(key)}


def weights_filter(
    state_dict: dict[str, Tensor], model: BackboneClassifier, cache_dir: str | Path | None
) -> dict[str, Tensor]:
    """Weights of one of our models as they are; weights of its backbone alone become a starting point."""
    if any(key.startswith("backbone.") for key in state_dict):
        return state_dict
    return starting_state(model, dict(state_dict=state_dict), cache_dir)


def starting_state(model: BackboneClassifier, source: dict, cache_dir: str | Path | None) -> dict[str, Tensor]:
    """State of a model whose backbones have their pretrained weights, and all else is new.

    New are the classifiers, the dilated convolutions and the second-order pooling. The weights of the attention net's
    backbone come from its own repository; where their licence is another one, the model's pretrained_cfg has none.

    Args:
        model: As created, without weights.
        source: What `weights_source` says of the backbone's weights; empty for those of its own repository.
        cache_dir: For downloads.
    """
    parts = {"backbone.": (model.backbone, source)}
    if isinstance(model, TASN):
        parts["attention_net.trunk."] = (model.attention_net.trunk, {})
    for part, given in parts.values():  # before any download
        if not (given or weights_source(part.pretrained_cfg)):
            presets = ", ".join(key for key in PRESETS if key != "tiny")
            role = "backbone" if part is model.backbone else "backbone of the attention net"
            instead = "a backbone" if part is model.backbone else f"an attention_net ({presets})"
            raise UserError(
                f"there are no pretrained weights for {_name(part)}, the {role}: use pretrained=False, or {instead} "
                f"with weights."
            )
    model.pretrained_cfg["license"] = _license(model)
    start = model.state_dict()
    for prefix, (part, given) in parts.items():
        pretrained = _pretrained_state(part, given, cache_dir)
        # Without a head that was removed; the details' own norms of split_bn start as those of the structure image.
        start |= {prefix + key: pretrained[structure_norm(key)] for key in part.state_dict()}
    return start


def _license(model: BackboneClassifier) -> str | None:
    parts = [model, model.attention_net.trunk] if isinstance(model, TASN) else [model]
    return common_license(part.pretrained_cfg.get("license") for part in parts)


def common_license(licenses: Iterable[str | None]) -> str | None:
    """Licence of a model that starts from weights under these; None without any, where one is not known, or of two."""
    different = set(licenses)
    return different.pop() if len(different) == 1 else None


def _pretrained_state(part: nn.Module, source: dict, cache_dir: str | Path | None) -> dict[str, Tensor]:
    """What timm makes of a backbone's weights: resized, renamed and adapted for its arguments."""
    try:
        twin = timm.create_model(
            _name(part), pretrained=True, pretrained_cfg_overlay=source, cache_dir=cache_dir, **part._model_args
        )
    except OSError as error:  # no such file, repository or network
        reason = " ".join(str(error).split())
        raise UserError(f"the pretrained weights of {_name(part)} cannot be read: {reason}") from error
    return twin.state_dict()


def _name(part: nn.Module) -> str:
    cfg = part.pretrained_cfg
    return f"{cfg['architecture']}.{cfg['tag']}" if cfg.get("tag") else cfg["architecture"]
