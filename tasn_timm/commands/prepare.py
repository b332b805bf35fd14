"""Turn the official archives of a dataset of the paper into parquet files for training, and check them on the way.

Archives are read once and not unpacked; images stay as they are. Needed are, of
  cub200     CUB_200_2011.tgz
  cars196    cars_train.tgz, cars_test.tgz, car_devkit.tgz and cars_test_annos_withlabels.mat
  inat2017   train_val_images.tar.gz and train_val2017.zip
or folders that they were unpacked to.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import UserError

SUMMARY = "turn official archives of a dataset into parquet files"
EXAMPLES = """examples:
  python -m tasn_timm prepare cub200 --archive CUB_200_2011.tgz
  python -m tasn_timm prepare cars196 --archive downloads/*.tgz cars_test_annos_withlabels.mat --out /data/cars
  python -m tasn_timm prepare inat2017 --archive train_val2017.zip train_val_images/ --push me/inat2017"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add = parser.add_argument
    add("dataset", metavar="DATASET", help="cub200, cars196 or inat2017")
    add("--archive", nargs="+", action="extend", type=Path, metavar="FILE", help="official archives, or folders")
    add("--out", type=Path, metavar="DIR", help="folder to write (default: data/DATASET)")
    add(
        "--push",
        metavar="USER/NAME",
        help="also upload to this dataset repository of the Hub; without --archive, what is in DIR already",
    )
    add(
        "--public",
        action="store_true",
        help="let everybody see a new repository (default: private; the datasets' terms mostly forbid to pass them on)",
    )


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    from ..data.prepare import PREPARED, is_prepared, prepare
    from ..errors import unknown

    if options.dataset not in PREPARED:
        raise unknown("dataset", options.dataset, PREPARED)
    official = PREPARED[options.dataset]
    out = options.out or Path("data", official.name)
    if options.public and not options.push:
        raise UserError("--public has no effect without --push USER/NAME: leave it out.")
    if not options.archive and not (options.push and is_prepared(official, out)):
        names = " ".join(archive.name for archive in official.archives)
        folder = f"; {str(out)!r} holds nothing to push" if options.push else ""
        raise UserError(f"prepare {official.name} needs its archives{folder}: give --archive {names}.")
    if options.push:
        _log_in(options.push, options.public)
    if options.archive:
        prepare(official, options.archive, out)
        counts = " and ".join(f"{count} {split}" for split, count in official.images.items())
        print(f"{out}: {official.title}, {counts} images of {official.classes} classes")
    if options.push:
        commit = _upload(out, options.push, options.public, official.title)
        print(f"pushed: --data {options.push}@{commit}")
    print(f"train with: accelerate launch train_accelerate.py --recipe {official.recipe} --data {out}")


def _log_in(repo: str, public: bool) -> None:
    from ..hub_write import check_login, check_repo

    check_repo(repo, "--push")
    private = check_login("dataset", repo)
    if private is not None and private == public:
        is_now, do = ("private", "leave out --public") if private else ("public", "add --public")
        raise UserError(f"dataset {repo} exists and is {is_now}: {do}, or push to another name.")


def _upload(folder: Path, repo: str, public: bool, title: str) -> str:
    """Upload a prepared folder and return the commit; after an interruption, what is there already is left out."""
    from huggingface_hub import HfApi

    from ..hub_write import writing

    api = HfApi()
    with writing("dataset", repo, "uploaded"):
        api.create_repo(repo, repo_type="dataset", private=not public, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo,
            repo_type="dataset",
            folder_path=folder,
            commit_message=f"Add {title}",
            delete_patterns="data/*.parquet",  # of an earlier upload with other shards
        )
    return commit.oid
