"""How a user's mistake is told: one line with what we got, what is allowed and what to do."""

import argparse
import contextlib
import errno
import inspect
import os
import select
import signal
import sys
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import NoReturn, TextIO

# Of whatever file: nothing that a traceback would help to put right.
ADVICE = {
    errno.EACCES: "give yourself access, or choose another place",
    errno.EPERM: "give yourself access, or choose another place",
    errno.EROFS: "choose another place",
    errno.ENOSPC: "free some space, or choose another place",
    errno.EDQUOT: "free some space, or choose another place",
}
# Kinds of values, in words.
KINDS = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list [...]",
    dict: "{key: value}",
    type(None): "null",
}
SIGPIPE = 13  # signal.SIGPIPE, which Windows does not have, nor BrokenPipeErrors of its standard output


class UserError(ValueError):
    """Something that the user can put right. Commands print it as one line, without a traceback, and exit with 2."""


class NumericalError(ArithmeticError):
    """A computation went wrong. Commands print it as one line, without a traceback, and exit with 3."""


class Interrupted(Exception):
    """A signal ended the work in good order. Commands print it as one line and exit with 128 + its number."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


class Parser(argparse.ArgumentParser):
    """Tells mistakes in one line."""

    def error(self, message: str) -> NoReturn:
        """Raise a UserError, where argparse would print its usage and exit."""
        raise UserError(f"{message}: see {self.prog} --help.")


def unknown(what: str, got: object, allowed: Iterable[str], see: str = "") -> UserError:
    """Build the error for a name that is not in a fixed set.

    Args:
        what: What the name stands for, e.g. "normalization".
        got: The name that was given.
        allowed: The names that exist. More than 30 are not listed, only the closest ones named.
        see: What says all of them where none is close, e.g. "timm.list_models()".

    Returns:
        The error, for the caller to raise: "unknown normalization 'spatail': did you mean 'spatial'? Choose from ...".
    """
    allowed = sorted(allowed)
    close = get_close_matches(str(got), allowed, n=3, cutoff=0.6)
    hint = f": did you mean {' or '.join(map(repr, close))}?" if close else "."
    choice = f" Choose from {', '.join(allowed)}." if len(allowed) <= 30 else ""
    if see and not (close or choice):
        choice = f" See {see}."
    return UserError(f"unknown {what} {got!r}{hint}{choice}")


def no_effect(
    function: Callable, settings: Mapping[str, object], because: str, *, except_for: Iterable[str] = ()
) -> None:
    """Refuse settings that somebody chose, but that change nothing.

    Args:
        function: Has the settings as arguments; a setting that is not the default was chosen.
        settings: Names and values.
        because: The setting that rules them out, e.g. "part_net=False".
        except_for: Names that do have an effect.

    Raises:
        UserError: "selection='ranked' has no effect with part_net=False: leave out one of them."
    """
    defaults = {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}
    for name, value in settings.items():
        if name not in except_for and value != defaults[name]:
            raise UserError(
                f"{name}={value!r} has no effect with {because}: leave out one of them (the default is "
                f"{name}={defaults[name]!r})."
            )


def run_command(main: Callable[[], None]) -> int:
    """Run a command and return its exit code.

    Returns:
        0; after one line 2 for a `UserError` and for a place without access or space, 3 for a `NumericalError`, 128 +
        the signal's number where one ended it; without a line 141 (SIGPIPE's) where nobody reads on, as in
        `... | head -1`.
    """
    try:
        main()
        print(end="", flush=True)  # here, where errors of standard output can be told
    except (UserError, NumericalError) as error:
        rank = os.environ.get("RANK", "0")
        where = "" if rank == "0" else f"process {rank}: "  # an unreadable image, say, is met by one process only
        if rank == "0" or isinstance(error, UserError):  # all processes agree on numbers
            # A DataLoader's worker hands its error over with its traceback, the message last.
            _tell(f"{where}error: {str(error).rsplit('UserError: ', 1)[-1].strip()}")
        return 2 if isinstance(error, UserError) else 3
    except Interrupted as stop:
        if os.environ.get("RANK", "0") == "0":
            _tell(str(stop))
        return 128 + stop.number
    except KeyboardInterrupt:
        _tell("interrupted")
        return 128 + signal.SIGINT
    except BrokenPipeError:
        if not _is_closed(sys.stdout):
            raise
        _forget(sys.stdout)
        return 128 + SIGPIPE
    except OSError as error:
        if error.errno not in ADVICE:
            raise
        what = repr(error.filename) if error.filename else "what was to be written"
        _tell(f"error: {what}: {error.strerror}: {ADVICE[error.errno]}.")
        return 2
    return 0


def _tell(line: str) -> None:
    """Write a line to standard error, after all that went to standard output before."""
    try:
        print(end="", flush=True)
    except OSError:
        _forget(sys.stdout)
    print(line, file=sys.stderr)


def _is_closed(stream: TextIO) -> bool:
    """Whether a stream is a pipe from which nobody reads any more."""
    poll = select.poll()
    poll.register(stream, 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def _forget(stream: TextIO | None) -> None:
    """Let what could not be written go, or Python would complain of it at its end."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # ValueError: a closed one; AttributeError: none
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
