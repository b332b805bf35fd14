"""Where full precision is needed whatever autocast says."""

from contextlib import AbstractContextManager, nullcontext

import torch


def no_autocast(device: torch.device) -> AbstractContextManager:
    """Switch autocast off: it would do matrix products in bf16 whatever the dtype of their inputs."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()  # the meta device, on which timm builds models to look at them
