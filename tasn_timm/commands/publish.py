"""Publish the best model of a finished run on the Hugging Face Hub, in one commit with its card, and tag it.

The repository gets config.json, model.safetensors, README.md (the card), recipe.yaml and eval_results.json. Publishing
again updates them and counts the version up; nothing changed, nothing is done.
"""

import argparse
import tempfile
from pathlib import Path

from ..errors import UserError

SUMMARY = "publish the model of a run on the Hugging Face Hub"
EXAMPLES = """examples:
  python -m tasn_timm publish runs/mine --repo me/birds --private --example bird.jpg
  python -m tasn_timm publish runs/cub200_resnet50_224 --repo me/tasn-cub --write-config   # in a checkout"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add = parser.add_argument
    add("run_dir", metavar="RUN_DIR", type=Path, help="folder of a run that has ended with its test, such as runs/mine")
    add("--repo", required=True, metavar="USER/NAME", help="repository on the Hub; created if it is not there")
    add("--private", action="store_true", help="create it as one that only its owner sees")
    add(
        "--license",
        metavar="ID",
        help="of the weights, such as mit (default: that of those it started from, where they have one)",
    )
    add("--example", type=Path, metavar="PICTURE", help="picture for the card's figure, which everybody will see")
    add("--dry-run", action="store_true", help="write the repository to a temporary folder, show it, send nothing")
    add("--write-config", action="store_true", help="apply the change to hub_configs/, for models of the paper")


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    from .. import publish
    from ..finished_run import read_run
    from ..hub_config import HUB_CONFIGS
    from ..hub_write import check_login, check_repo

    check_repo(options.repo, "--repo")
    publish.check_license(options.license)
    if not options.dry_run and check_login("model", options.repo) is False and options.private:
        raise UserError(f"{options.repo} exists and is public: leave out --private, or publish to another repository.")
    finished = read_run(options.run_dir)
    config = publish.config_of(finished)
    if options.write_config and config is None:
        but = f", except: {', '.join(finished.differences)}. Leave" if finished.differences else ": leave"
        raise UserError(
            f"--write-config: no file in hub_configs/ is for weights of recipe {finished.name!r}{but} it out."
        )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, options.repo.replace("/", "--"))
        publish.build_repository(finished, folder, options.repo, options.license, options.example)
        if options.dry_run:
            return _show(folder, options.repo)
        title = f"{finished.name}: top-1 {finished.test['top1']:.2f} %"
        published = publish.upload(folder, options.repo, options.private, title)
    what = "published" if published.is_new else "nothing has changed since"
    print(f"{what} {published.tag} (commit {published.commit}): {published.url}")
    print(f'load it:  import timm, tasn_timm; model = timm.create_model("{published.source}", pretrained=True).eval()')
    if config is None:
        return
    after = publish.updated(config, finished, published, options.license)
    if options.write_config:
        after.write(HUB_CONFIGS / f"{config.name}.json")
        print(f"written: hub_configs/{config.name}.json")
    else:
        print(f"\nto make it {config.name} of this package (or add --write-config):\n\n{publish.patch(config, after)}")


def _show(folder: Path, repo: str) -> None:
    print(f"{repo} would be:\n")
    for path in sorted(folder.iterdir()):
        print(f"{path.stat().st_size:12,}  {path.name}")
    print(f"\nREADME.md:\n\n{(folder / 'README.md').read_text(encoding='utf-8')}")
    print("dry run: nothing was sent")
