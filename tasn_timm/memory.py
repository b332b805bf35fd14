"""What commands say when memory runs out."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from .errors import UserError


def lacks_memory(error: Exception) -> bool:
    """Whether an error means that memory ran out, on whatever device."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or "DefaultCPUAllocator" in str(error)  # torch has no class of its own for a CPU


def lost_worker(error: Exception) -> str | None:
    """What torch says of a loading process that was killed, mostly for want of memory; None of other errors."""
    said = str(error)
    return said.splitlines()[0] if isinstance(error, RuntimeError) and said.startswith("DataLoader worker") else None


@contextmanager
def lack_of_memory(say: Callable[[], str]) -> Iterator[None]:
    """Within it, running out of memory is told, also that of a loading process.

    Args:
        say: Gives the message; called where it happened.

    Raises:
        UserError: Out of memory, or a loading process was killed.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if reason := lost_worker(error):
            raise UserError(
                f"a loading process ended ({reason}): free some memory, give fewer --workers, or more "
                f"shared memory (of Docker: --shm-size)."
            ) from error
        if not lacks_memory(error):
            raise
        raise UserError(say()) from error


def smaller_batches(batch_size: int, device: torch.device) -> AbstractContextManager[None]:
    """Make a context within which a command that runs out of memory says to use a smaller --batch-size.

    It raises a UserError when out of memory.
    """
    advice = "use a smaller --batch-size" if batch_size > 1 else "use another machine"
    return lack_of_memory(lambda: f"out of memory with --batch-size {batch_size} on {device}: {advice}.")
