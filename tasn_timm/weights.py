"""The file with a trained model's weights: in a folder or on the Hub, safetensors, checked before a model is built."""

import json
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RevisionNotFoundError
from safetensors import SafetensorError, safe_open

from .errors import UserError, unknown
from .files import digest
from .hub_errors import Unreachable, telling

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def weights_in(folder: Path) -> Path:
    """Find and check the weights in a model's folder.

    Raises:
        UserError: There are none as safetensors, they are damaged, or not those that config.json describes.
    """
    file = folder / WEIGHTS
    if not file.is_file():
        raise _no_weights(f"model folder {str(folder)!r}", [path.name for path in folder.glob("*")])
    check(file, expected_digest(folder / CONFIG))
    return file


def weights_on_hub(name: str, sha256: str | None = None, cache_dir: str | Path | None = None) -> Path:
    """Download a model's weights, or find them in the cache, and check them.

    Args:
        name: "user/name" or "user/name@revision".
        sha256: Of the weights; None: what config.json of the same commit says.
        cache_dir: For downloads; None: the Hub's own.

    Raises:
        UserError: There is no such repository, it may not be read, it has no safetensors, they are damaged or not those
            that were published, or there is neither a network nor a copy in the cache.
    """
    config = download(name, CONFIG, cache_dir)
    repo, commit = name.partition("@")[0], config.parent.name  # both files of one commit, whatever is pushed meanwhile
    file = download(f"{repo}@{commit}", WEIGHTS, cache_dir)
    check(file, sha256 or expected_digest(config))
    return file


def download(name: str, file: str, cache_dir: str | Path | None = None) -> Path:
    """Download a file of a model's repository, or find it in the cache.

    Args:
        name: "user/name" or "user/name@revision".
        file: Its name there.
        cache_dir: For downloads; None: the Hub's own.

    Raises:
        UserError: As `weights_on_hub`.
    """
    repo, _, revision = name.partition("@")
    try:
        with telling("model", repo):
            try:
                return Path(hf_hub_download(repo, file, revision=revision or None, cache_dir=cache_dir))
            except LocalEntryNotFoundError:
                raise
            except RevisionNotFoundError as error:
                refs = HfApi().list_repo_refs(repo)
                names = [ref.name for ref in (*refs.branches, *refs.tags)]
                raise unknown(f"revision of model {repo!r}", revision, names) from error
            except EntryNotFoundError as error:
                files = HfApi().list_repo_files(repo, revision=revision or None)
                if file == WEIGHTS:
                    raise _no_weights(f"model {repo!r}", files) from error
                raise UserError(f"model {repo!r} has no {file}, only {', '.join(files) or 'nothing'}.") from error
    except Unreachable as error:
        what = "unset it" if "HF_HUB_OFFLINE" in str(error) else "connect to it"
        raise UserError(
            f"model {name!r} is not in the cache {str(cache_dir or constants.HF_HUB_CACHE)!r}, and {error}: {what} to "
            f"load it once, or give a folder."
        ) from error


def expected_digest(config: Path) -> str | None:
    """SHA-256 of the weights for which a config.json was written; None where it does not say.

    transformers, which can load and train our models, keeps what it does not know of a config.json, the digest among
    it, when it saves weights of its own.
    """
    try:
        described = json.loads(config.read_text())
        return None if "transformers_version" in described else (described.get("tasn") or {}).get("sha256")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{str(config)!r} is damaged: {error}. Take it from where the model comes from.") from error


def check(file: Path, sha256: str | None) -> None:
    """Check that a file has this SHA-256, or, where that is not known, that it is whole.

    Raises:
        UserError: It has not, or is not.
    """
    try:
        with safe_open(file, "pt"):  # its header and length
            pass
    except (SafetensorError, OSError) as error:
        raise UserError(f"{_name(file)} is damaged: {error}. {_remedy(file)}") from error
    found = digest(file)
    if sha256 and found != sha256:
        raise UserError(
            f"{_name(file)} has other weights than its description says (SHA-256 {found}, not {sha256}): damaged, or "
            f"of another model. {_remedy(file)}"
        )


def _name(file: Path) -> str:
    return repr(str(file.resolve()))  # in the Hub's cache, where a deleted link would find its old content again


def _remedy(file: Path) -> str:
    downloaded = file.parent.parent.name == "snapshots"
    return "Delete it, and it is downloaded again." if downloaded else "Take it from where the model comes from."


def _no_weights(where: str, files: list[str]) -> UserError:
    return UserError(
        f"{where} has no {WEIGHTS}, only {', '.join(sorted(files)) or 'nothing'}: other formats, such as pickles, are "
        f"not loaded."
    )
