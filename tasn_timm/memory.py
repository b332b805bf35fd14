"""What commands say when memory runs out."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .errors import UserError


def lacks_memory(error: Exception) -> bool:
    """Whether an error means that memory ran out, on whatever device."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or "DefaultCPUAllocator" in str(error)  # torch has no class of its own for a CPU


@contextmanager
def smaller_batches(batch_size: int, device: torch.device) -> Iterator[None]:
    """Within it, a command that runs out of memory says to use a smaller --batch-size.

    Raises:
        UserError: Out of memory.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        advice = "use a smaller --batch-size" if batch_size > 1 else "use another machine"
        raise UserError(f"out of memory with --batch-size {batch_size} on {device}: {advice}.") from error
