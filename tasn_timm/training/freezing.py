"""Which parts of a model are not trained in which epochs."""

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..errors import UserError, unknown


class FreezeSchedule:
    """Freezes parts of a model for some epochs, for example all but the attention net for the first ones.

    A frozen part has no gradient, no weight decay and no momentum; its BatchNorm statistics and dropout are those of
    evaluation.

    Args:
        model: Whose parameters have names.
        epochs_of: How a part's parameters begin ("backbone", "attention_net.trunk") -> the number of epochs for which
            it is frozen, or [from, before]. The first epoch is 0.
        epochs: Of the run.

    Raises:
        UserError: No parameter has such a name, epochs that make no sense, or an epoch that trains nothing.
    """

    def __init__(self, model: nn.Module, epochs_of: Mapping[str, Any], epochs: int) -> None:
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        for part in epochs_of:
            if not any(_belongs(name, part) for name in names):
                prefixes = {name.rsplit(".", depth)[0] for name in names for depth in range(1, 4)}
                raise unknown("part of the model in freeze:", part, prefixes)
        self.model = model
        self.trained = names
        self.spans = {part: _span(part, value) for part, value in epochs_of.items()}
        for part, (start, _) in self.spans.items():
            if start >= epochs:
                raise UserError(
                    f"freeze: {part} from epoch {start} on has no effect with epochs={epochs}: leave it out."
                )
        changes = {0, *(end for span in self.spans.values() for end in span if end < epochs)}
        for epoch in sorted(changes):
            if all(self._is_frozen(name, epoch) for name in names):
                raise UserError(
                    f"freeze {dict(epochs_of)} leaves nothing to train in epoch {int(epoch)} (of 0 to "
                    f"{epochs - 1}): leave out a part."
                )

    def __bool__(self) -> bool:
        return bool(self.spans)

    def begin_epoch(self, epoch: int) -> None:
        """Freeze what belongs to an epoch, and nothing else; after the model was put into training mode."""
        if not self:
            return
        for name in self.trained:
            self.model.get_parameter(name).requires_grad_(not self._is_frozen(name, epoch))
        for name, module in self.model.named_modules():
            if self._is_frozen(name, epoch):
                module.eval()

    def _is_frozen(self, name: str, epoch: float) -> bool:
        return any(_belongs(name, part) and start <= epoch < end for part, (start, end) in self.spans.items())


def _belongs(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.")


def _span(part: str, value: Any) -> tuple[float, float]:
    start, end = value if isinstance(value, (list, tuple)) and len(value) == 2 else (0, value)
    numbers = all(isinstance(number, int) and not isinstance(number, bool) for number in (start, end))
    if not numbers or not 0 <= start < end < math.inf:
        raise UserError(
            f"freeze: {part} must have a number of epochs, such as 5, or [from, before], such as [2, 10]; got "
            f"{value!r}."
        )
    return start, end
