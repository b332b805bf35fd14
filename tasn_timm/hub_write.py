"""Writing to the Hugging Face Hub: what a repository may be called, who may write to it, and what goes wrong."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, HTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from .errors import UserError
from .hub_errors import LOG_IN, UNKNOWN_TOKEN, Unreachable, problem, reason_of, status_of

REPO = re.compile(r"[\w.-]+/[\w.-]+")


def check_repo(repo: str, option: str) -> None:
    """Check the name of a repository without asking the Hub.

    Raises:
        UserError: It is none that the Hub would take; `option` is what it was given as, for the message.
    """
    if not REPO.fullmatch(repo):
        raise UserError(f"{option} must be USER/NAME, got {repo!r}.")
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"{option} must be USER/NAME, got {repo!r}: {error}") from error


def check_login(kind: Literal["model", "dataset"], repo: str) -> bool | None:
    """Check, before hours of work, that somebody is logged in who may write to a repository.

    Returns:
        Whether it is private; None where it is not there yet.

    Raises:
        UserError: Nobody is, it would be somebody else's, or the token may only read.
    """
    api = HfApi()
    with writing(kind, repo, "checked"):
        try:
            user = api.whoami()
        except LocalTokenNotFoundError as error:
            raise UserError(f"nobody is logged in to the Hub: {LOG_IN}.") from error
        owners = [user["name"], *(organisation["name"] for organisation in user.get("orgs", []))]
        if repo.partition("/")[0] not in owners:
            raise UserError(
                f"the Hub does not let you write to {repo}: you are logged in as {user['name']}, so give a repository "
                f"of {' or '.join(owners)}."
            )
        if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise UserError(
                f"the Hub does not let you write to {repo}: your token may only read, so log in with one that may "
                f"write (hf auth login)."
            )
        return api.repo_info(repo, repo_type=kind).private if api.repo_exists(repo, repo_type=kind) else None


@contextmanager
def writing(kind: Literal["model", "dataset"], repo: str, done: str) -> Iterator[None]:
    """Tell in one line what the Hub refuses, and what failed and may work when it is tried again.

    Args:
        kind: Of the repository.
        repo: "user/name".
        done: What would have been done to it, such as "published".

    Raises:
        UserError: In place of what the Hub's client raises.
    """
    try:
        yield
    except UserError:
        raise
    except (OSError, HTTPError, ValueError, RuntimeError) as error:
        raise _refusal(repo, done, error) or _failure(kind, repo, done, error) from error


def _refusal(repo: str, done: str, error: Exception) -> UserError | None:
    status = status_of(error)
    if status == 401 or isinstance(error, UnicodeEncodeError):  # which no token of the Hub would cause
        return UserError(UNKNOWN_TOKEN)
    if status == 403:
        return UserError(
            f"the Hub does not let you write to {repo}: use a repository of your own, and a token that may write."
        )
    if status in (400, 404, 409, 413, 422):
        return UserError(f"{repo} could not be {done}: {reason_of(error)}")
    if isinstance(error, ValueError):  # of the client, which has checked what it was given, the card with the Hub
        return UserError(f"{repo} could not be {done}: {' '.join(str(error).split())}")
    return None


def _failure(kind: Literal["model", "dataset"], repo: str, done: str, error: Exception) -> UserError:
    told = problem(kind, repo, error)
    reason = told if isinstance(told, Unreachable) else reason_of(error)
    return UserError(f"{repo} could not be {done}: {reason}. Run the same command again.")
