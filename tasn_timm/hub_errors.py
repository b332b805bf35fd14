"""What goes wrong with the Hugging Face Hub, in one line and without anybody's token."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from .errors import UserError

LOG_IN = "log in with hf auth login, or set HF_TOKEN"
UNKNOWN_TOKEN = f"the Hub does not know the token of this machine: {LOG_IN}."


class Unreachable(Exception):
    """The Hub does not answer, or was not asked because of HF_HUB_OFFLINE."""


@contextmanager
def telling(kind: Literal["model", "dataset"], repo: str, *also: type[Exception]) -> Iterator[None]:
    """Turn errors of the Hub's clients into `problem`.

    Args:
        kind: Of the repository.
        repo: "user/name".
        *also: Further kinds of errors to turn.

    Raises:
        UserError: The repository may not be read, is not there, or something else.
        Unreachable: No network.
    """
    try:
        yield
    except UserError:
        raise
    except (OSError, HTTPError, RuntimeError, ValueError, *also) as error:
        raise problem(kind, repo, error) from error


def problem(kind: Literal["model", "dataset"], repo: str, error: Exception) -> UserError | Unreachable:
    """Describe an error of the Hub's clients, for the caller to raise."""
    reason = reason_of(error)
    if caused(error, OfflineModeIsEnabled):
        return Unreachable("HF_HUB_OFFLINE is set")
    if caused(error, ConnectionError) or (caused(error, HTTPError) and not caused(error, HfHubHTTPError)):
        return Unreachable(f"the Hub cannot be reached ({reason})")
    if caused(error, LocalEntryNotFoundError):
        return Unreachable("HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the Hub cannot be reached")
    if caused(error, GatedRepoError):
        page = f"{constants.ENDPOINT}/{'datasets/' * (kind == 'dataset')}{repo}"
        return UserError(f"{kind} {repo!r} is gated: accept its terms at {page}, then {LOG_IN}.")
    if caused(error, RepositoryNotFoundError):
        here = "neither a folder here nor on the Hub" if kind == "dataset" else "not on the Hub"
        return UserError(f"{kind} {repo!r} is {here}, or it is private: check the name, or {LOG_IN}.")
    if caused(error, UnicodeEncodeError) or 401 in map(status_of, causes(error)):
        return UserError(UNKNOWN_TOKEN)
    return UserError(f"{kind} {repo!r} cannot be loaded: {reason}")


def status_of(error: BaseException) -> int | None:
    """Status of the Hub's answer, where it has answered."""
    answer = error.response if isinstance(error, HfHubHTTPError) else None
    return None if answer is None else answer.status_code


def caused(error: BaseException | None, *kinds: type) -> bool:
    """Whether an error is of these kinds, or was caused by one that is."""
    return any(isinstance(cause, kinds) for cause in causes(error))


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def reason_of(error: Exception) -> str:
    """What an error says, in one line; some quote the request's headers, and with them the token."""
    root = error.__cause__ or error
    reason = " ".join(str(root).split()) or type(root).__name__
    return reason.replace(get_token() or "\n", "***")
