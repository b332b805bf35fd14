"""A finished run as a repository of the Hugging Face Hub: what goes there, and the way there."""

import difflib
import json
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import CommitInfo, HfApi, constants
from PIL import Image
from torch import nn

from .card import LICENSE_PAGE, LICENSES, Context, Measured, model_card
from .data.decoding import UnreadableImage
from .data.synthbirds import draw
from .errors import UserError, unknown
from .finished_run import FinishedRun
from .hub import load_model
from .hub_config import HUB_CONFIGS, PICTURE, HubConfig, Training
from .hub_write import REPO, writing
from .predict import load_picture
from .recipe import save_recipe
from .tasn import TASN
from .visualize import attention_panels
from .weights import CONFIG, WEIGHTS

FIGURE = "attention.png"


def build_repository(
    run: FinishedRun, target: Path, repo: str, license: str | None = None, example: Path | None = None
) -> None:
    """Write what is published into a new folder: weights, config.json, card, recipe, results and a figure.

    Args:
        run: From `finished_run.read_run`.
        target: The folder.
        repo: "user/name", for the card.
        license: Of the weights; None: that of those from which it started, if any.
        example: Picture for the card's figure; None: a drawn bird where the model knows these, else no figure, since
            the pictures that a model was trained on may not be for everybody.

    Raises:
        UserError: The example cannot be read.
    """
    from .training.evaluation import count_flops

    model = load_model(str(run.folder / "best"))
    dataset, revision, shown = run.dataset
    target.mkdir(parents=True)
    shutil.copyfile(run.folder / "best" / WEIGHTS, target / WEIGHTS)
    license = license or run.license
    training = run.config["tasn"] | dict(dataset=dataset, dataset_revision=revision)
    cfg = run.config["pretrained_cfg"] | dict(license=license)
    _write_json(target / CONFIG, run.config | dict(tasn=training, pretrained_cfg=cfg))
    save_recipe(run.public_recipe, target / "recipe.yaml")
    measured = Measured(
        dataset=shown,
        split=run.recipe.test_split,
        images=run.test["images"],
        top1=run.test["top1"],
        top5=run.test.get("top5"),
        recipe=run.name,
        command="accelerate launch train_accelerate.py --recipe recipe.yaml",
        gflops=count_flops(model, model.pretrained_cfg["input_size"]) / 1e9,
    )
    figure = _draw(model, run, example, target)
    context = Context(
        title=repo.partition("/")[2],
        source=f"hf-hub:{repo}",
        dataset_id=dataset if dataset and REPO.fullmatch(dataset) else None,
        revision=revision,
        license=license,
        figure=figure,
        differences=run.differences,
        paper=run.paper,
    )
    (target / "README.md").write_text(model_card(model, measured, context), encoding="utf-8")
    _write_json(target / "eval_results.json", asdict(measured) | dict(differences=run.differences))


class Published(NamedTuple):
    """Where a model is."""

    repo: str
    commit: str
    tag: str
    is_new: bool  # False: it had been there already, to the last byte

    @property
    def url(self) -> str:
        """Its page."""
        return f"{constants.ENDPOINT}/{self.repo}"

    @property
    def source(self) -> str:
        """What timm.create_model takes."""
        return f"hf-hub:{self.repo}@{self.tag}"


def check_license(license: str | None) -> None:
    """Check a licence; None for that of the weights from which a model started.

    Raises:
        UserError: The Hub does not know it.
    """
    if license is not None and license not in LICENSES:
        raise UserError(f"{unknown('license', license, LICENSES)} Take one of {LICENSE_PAGE}, or other.")


def upload(folder: Path, repo: str, private: bool, title: str) -> Published:
    """Upload a folder in one commit and tag it with the next version, v1, v2 and so on.

    The same content again makes neither a commit nor a tag, so this can be repeated after any failure. A figure of
    before that is no longer there is deleted.

    Args:
        folder: From `build_repository`.
        repo: "user/name"; created where it is not there.
        private: Whether to create it as one that only its owner sees.
        title: Of the commit.

    Raises:
        UserError: The Hub refuses, does not answer, or somebody else has made a commit meanwhile.
    """
    api = HfApi()
    with writing("model", repo, "published"):
        api.create_repo(repo, private=private, exist_ok=True)
        before = api.model_info(repo).sha
        commit: CommitInfo = api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message=title, parent_commit=before, delete_patterns=FIGURE
        )
        versions = {
            ref.name: ref.target_commit for ref in api.list_repo_refs(repo).tags if re.fullmatch(r"v\d+", ref.name)
        }
        tag = next((name for name, target in versions.items() if target == commit.oid), None)
        if tag is None:
            tag = f"v{max((int(name[1:]) for name in versions), default=0) + 1}"
            api.create_tag(repo, tag=tag, revision=commit.oid)
    return Published(repo, commit.oid, tag, commit.oid != before)


def config_of(run: FinishedRun) -> HubConfig | None:
    """The file of hub_configs/ that a run's model is for; None where there is none, or the run was not its recipe's.

    What ships with the package is no run's: it loads without a network.
    """
    configs = (HubConfig.read(path) for path in sorted(HUB_CONFIGS.glob("*.json")))
    found = [config for config in configs if config.tasn.recipe == run.name and not config.shipped]
    return found[0] if found and not run.differences else None


def updated(config: HubConfig, run: FinishedRun, published: Published, license: str | None = None) -> HubConfig:
    """A file of hub_configs/ with what is known once its model is published, `license` as for `build_repository`."""
    saved = run.config
    dataset, revision, _ = run.dataset
    tasn = asdict(config.tasn) | dict(
        dataset=dataset,
        dataset_revision=revision,
        measured_top1=round(run.test["top1"], 2),
        repo_id=published.repo,
        commit=published.commit,
        sha256=saved["tasn"]["sha256"],
    )
    cfg = {key: saved["pretrained_cfg"][key] for key in PICTURE}
    cfg |= dict(label_names=saved["label_names"], license=license or run.license)
    return replace(
        config,
        num_classes=saved["num_classes"],
        model_args=saved["model_args"] | config.model_args,
        pretrained_cfg=config.pretrained_cfg | cfg,
        tasn=Training(**tasn),
    )


def patch(before: HubConfig, after: HubConfig) -> str:
    """What changes in a file of hub_configs/, as `git apply` and `patch -p1` take it."""
    path = f"hub_configs/{before.name}.json"
    lines = [(json.dumps(asdict(config), indent=2) + "\n").splitlines(keepends=True) for config in (before, after)]
    return "".join(difflib.unified_diff(*lines, f"a/{path}", f"b/{path}"))


def _draw(model: nn.Module, run: FinishedRun, example: Path | None, target: Path) -> str | None:
    if not isinstance(model, TASN):
        if example is not None:
            name = model.pretrained_cfg["architecture"]
            raise UserError(f"--example has no effect: {name} has no attention to show; leave it out.")
        return None
    if example is None and run.recipe.data != "synthbirds":
        return None
    try:
        picture = load_picture(example) if example else Image.fromarray(draw("test", 0))
    except UnreadableImage as error:
        raise UserError(f"--example {str(example)!r} cannot be read as a picture: {error}.") from error
    attention_panels(model, picture).save(target / FIGURE, optimize=True)
    return FIGURE


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
