"""How a user's mistake is told: one line with what we got, what is allowed and what to do."""

import inspect
import os
import signal
import sys
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches


class UserError(ValueError):
    """Something that the user can put right. Commands print it as one line, without a traceback, and exit with 2."""


class NumericalError(ArithmeticError):
    """A computation went wrong. Commands print it as one line, without a traceback, and exit with 3."""


class Interrupted(Exception):
    """A signal ended the work in good order. Commands print it as one line and exit with 128 + its number."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


def unknown(what: str, got: object, allowed: Iterable[str]) -> UserError:
    """Build the error for a name that is not in a fixed set.

    Args:
        what: What the name stands for, e.g. "normalization".
        got: The name that was given.
        allowed: The names that exist. More than 30 are not listed, only the closest ones named.

    Returns:
        The error, for the caller to raise: "unknown normalization 'spatail': did you mean 'spatial'? Choose from ...".
    """
    allowed = sorted(allowed)
    close = get_close_matches(str(got), allowed, n=3, cutoff=0.6)
    hint = f": did you mean {' or '.join(map(repr, close))}?" if close else "."
    choice = f" Choose from {', '.join(allowed)}." if len(allowed) <= 30 else ""
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
        0; after one line 2 for a `UserError`, 3 for a `NumericalError`, 128 + the signal's number where one ended it.
    """
    try:
        main()
    except (UserError, NumericalError) as error:
        rank = os.environ.get("RANK", "0")
        where = "" if rank == "0" else f"process {rank}: "  # an unreadable image, say, is met by one process only
        if rank == "0" or isinstance(error, UserError):  # all processes agree on numbers
            # A DataLoader's worker hands its error over with its traceback, the message last.
            print(f"{where}error: {str(error).rsplit('UserError: ', 1)[-1].strip()}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 3
    except Interrupted as stop:
        if os.environ.get("RANK", "0") == "0":
            print(stop, file=sys.stderr)
        return 128 + stop.number
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0
