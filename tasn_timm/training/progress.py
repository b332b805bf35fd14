"""Progress of an epoch: a bar where somebody watches, a line now and then where it goes to a file."""

import sys
import time
from collections.abc import Iterable, Iterator

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm


class Progress:
    """Iterates over an epoch's batches, averages its losses and shows both on the main process.

    Args:
        accelerator: Tells the main process.
        title: Such as "tasn_tiny epoch 3/20".
        interval: Batches between lines, and between updates of the bar's numbers.
    """

    def __init__(self, accelerator: Accelerator, title: str, interval: int) -> None:
        self.accelerator = accelerator
        self.title = title
        self.interval = interval
        self.watched = sys.stderr.isatty()
        self.sums: dict[str, Tensor] = {}
        self.batches = 0
        self.seconds = 0.0

    def over(self, loader: DataLoader) -> Iterator[Iterable[Tensor]]:
        """Yield the loader's batches."""
        start = time.perf_counter()
        hidden = not (self.accelerator.is_main_process and self.watched)
        with tqdm(loader, desc=self.title, unit="batch", disable=hidden, leave=False, dynamic_ncols=True) as bar:
            for batch in bar:
                yield batch
                if self.batches % self.interval == 0:
                    self._show(bar, len(loader))
        self.seconds = time.perf_counter() - start

    def add(self, losses: dict[str, Tensor]) -> None:
        """Count a batch's losses; they stay on the device until they are shown."""
        self.batches += 1
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()

    def means(self) -> dict[str, float]:
        """Losses averaged over the batches so far, on this process."""
        return {name: (total / self.batches).item() for name, total in self.sums.items()}

    def reduced_means(self) -> dict[str, float]:
        """Losses averaged over the batches so far, on all processes."""
        means = torch.stack([total / self.batches for total in self.sums.values()])
        return dict(zip(self.sums, self.accelerator.reduce(means, "mean").tolist()))

    def _show(self, bar: tqdm, total: int) -> None:
        if not self.accelerator.is_main_process:
            return
        if self.watched:
            bar.set_postfix({"loss": f"{self.means()['loss']:.3f}"})
        else:
            losses = "  ".join(f"{name} {mean:.3f}" for name, mean in self.means().items())
            print(f"{self.title}  batch {self.batches}/{total}  {losses}", file=sys.stderr, flush=True)
