"""Where full precision is needed whatever autocast says."""

from contextlib import AbstractContextManager, nullcontext

import torch


def no_autocast(device: torch.device) -> AbstractContextManager:
    """Switch autocast off: it would do matrix products in bf16 whatever the dtype of their inputs."""
    if device.type == "meta":  # on which timm builds models to look at them; it has no autocast
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
