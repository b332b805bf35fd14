"""Datasets of the Hugging Face Hub, at a commit that is known; from the cache where the Hub cannot be reached."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError, unknown
from ..hub_errors import Unreachable, caused, causes, telling
from .split_names import find_split, load_each

if TYPE_CHECKING:
    import datasets

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@.+)?")
COMMIT = re.compile(r"[0-9a-f]{40}")


def load_from_hub(name: str, *, only: Collection[str] | None = None, streaming: bool = False) -> dict:
    """Load a dataset of the Hub as it is at one commit, which `commit_of` tells.

    `datasets` alone would take whatever commit it loaded last when the Hub cannot be reached, also for another
    revision.

    Args:
        name: "user/name" or "user/name@revision": a branch, a tag or a commit.
        only: Splits that are needed, others may be there, too; of parquet files no others are fetched.
        streaming: Fetch nothing but what is read.

    Returns:
        `datasets.DatasetDict`, or `datasets.IterableDatasetDict` when streaming.

    Raises:
        UserError: It is not there, may not be read, is no data, or the Hub is out of reach and it is not in the cache.
    """
    repo, _, revision = name.partition("@")
    try:
        commit = _ask_for_commit(repo, revision)
        splits = _fetch(repo, commit, only, streaming)
    except Unreachable as error:
        commit = _cached_commit(repo, revision)
        splits = commit and _from_cache(commit, only, streaming)
        if not splits:
            raise _not_cached(name, error) from error
        if str(error) != "HF_HUB_OFFLINE is set":
            logging.getLogger(__name__).warning("%s: %s; taken from the cache, commit %s", name, error, commit)
    for split in splits.values():
        split.info.download_checksums = {f"hf://datasets/{repo}@{commit}": {}}
    return splits


def check_streams(builder: datasets.DatasetBuilder, data: str) -> None:
    """Check that a dataset is of the one kind of files that streams hand over undecoded.

    Args:
        builder: Of the dataset.
        data: Its name, for the message.

    Raises:
        UserError: It is not of parquet files.
    """
    if builder.name != "parquet":
        raise UserError(f"dataset {data!r} is of kind {builder.name}, and parquet is streamed: leave out --streaming.")


def commit_of(name: str, split: datasets.Dataset | datasets.IterableDataset) -> str | None:
    """Commit of the Hub that a split of `load_from_hub` was loaded from; None for others."""
    start = f"hf://datasets/{name.partition('@')[0]}@"
    found = [url.removeprefix(start) for url in split.info.download_checksums or {} if url.startswith(start)]
    return found[0] if found and COMMIT.fullmatch(found[0]) else None


def _ask_for_commit(repo: str, revision: str) -> str:
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError

    with _telling(repo):
        try:
            commit = HfApi().dataset_info(repo, revision=revision or None).sha
            if revision != commit:  # the client then notes which commit the name stood for, for days without a network
                hf_hub_download(repo, "README.md", repo_type="dataset", revision=revision or None)
        except EntryNotFoundError:
            pass
        except RevisionNotFoundError as error:
            refs = HfApi().list_repo_refs(repo, repo_type="dataset")
            names = [ref.name for ref in (*refs.branches, *refs.tags)]
            raise unknown(f"revision of dataset {repo!r}", revision, names) from error
    return commit


def _fetch(repo: str, commit: str, only: Collection[str] | None, streaming: bool) -> dict:
    from datasets import load_dataset, load_dataset_builder

    with _telling(repo):
        builder = load_dataset_builder(repo, revision=commit)
        if streaming:
            check_streams(builder, repo)
            return builder.as_streaming_dataset()
        if only is None or builder.name != "parquet":
            return load_dataset(repo, revision=commit)
        features = builder.info.features  # of README.md; the files may not know the classes

        def load(files: dict) -> datasets.DatasetDict:
            return load_dataset(repo, revision=commit, data_files=files, features=features)

        return load_each(builder, only, load, repo)


@contextmanager
def _telling(repo: str) -> Iterator[None]:
    """Turn what goes wrong with the Hub, or with what `datasets` finds there, into one line."""
    from datasets.data_files import EmptyDatasetError
    from datasets.exceptions import DataFilesNotFoundError, DatasetsError

    with telling("dataset", repo, DatasetsError):
        try:
            yield
        except (OSError, RuntimeError, ValueError, DatasetsError) as error:
            if any("Dataset scripts are no longer supported" in str(cause) for cause in causes(error)):
                what = "is a script, which datasets no longer runs: use a dataset of parquet files or images."
            elif "Config name is missing" in str(error):
                what = "has several configurations, of which none can be chosen here: use a dataset with one."
            elif caused(error, EmptyDatasetError, DataFilesNotFoundError):
                what = "has no files that datasets reads: use a dataset of parquet files or images."
            else:
                raise
            raise UserError(f"dataset {repo!r} {what}") from error


def _cached_commit(repo: str, revision: str) -> str | None:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    if COMMIT.fullmatch(revision):
        return revision
    folder = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repo, repo_type="dataset"))
    ref = folder / "refs" / (revision or "main")
    return ref.read_text().strip() if ref.is_file() else None


def _from_cache(commit: str, only: Collection[str] | None, streaming: bool) -> dict:
    """What `datasets` has converted of a commit: all splits at once, or each in a folder of its own."""
    from datasets import DatasetDict, DatasetInfo, IterableDatasetDict, config
    from datasets.packaged_modules.cache.cache import Cache

    splits = {}
    for folder in sorted(Path(config.HF_DATASETS_CACHE).glob(f"*___*/*/*/{commit}")):
        info = DatasetInfo.from_directory(str(folder))
        whole = info.config_name == folder.parts[-3]  # otherwise some of the files were asked for
        if whole or only is not None:
            place = dict(config_name=folder.parts[-3], version=folder.parts[-2], hash=commit)
            builder = Cache(dataset_name=info.dataset_name, repo_id="/".join(folder.parts[-4].split("___")), **place)
            splits |= builder.as_streaming_dataset() if streaming else builder.as_dataset()
    if only is not None and not all(find_split(splits, split) for split in only):
        return {}
    return (IterableDatasetDict if streaming else DatasetDict)(splits)


def _not_cached(name: str, error: Unreachable) -> UserError:
    from datasets import config

    what = "unset it" if "HF_HUB_OFFLINE" in str(error) else "connect to it"
    return UserError(
        f"dataset {name!r} is not in the cache {str(config.HF_DATASETS_CACHE)!r}, and {error}: {what} to load the data "
        f"once, or give a folder."
    )
