"""Progress of an epoch: averages, speed, a bar where somebody watches, a line now and then where it goes to a file."""

import sys
import time
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from ..data.loading import Batch
from .memory import peak_memory


class Means:
    """Weighted means of named scalars, which stay on their device until they are read."""

    def __init__(self) -> None:
        self.totals: dict[str, Tensor] = {}
        self.weights: dict[str, float] = {}

    def add(self, values: dict[str, Tensor], weight: float) -> None:
        """Count scalars."""
        for name, value in values.items():
            self.totals[name] = self.totals.get(name, 0) + value.detach().float() * weight
            self.weights[name] = self.weights.get(name, 0) + weight

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over all processes, which all have to ask; none where nothing was counted, which is so on all."""
        if not self.totals:
            return {}
        weights = torch.tensor(list(self.weights.values()), device=accelerator.device)
        sums = torch.stack([torch.stack(list(self.totals.values())), weights])
        totals, weights = accelerator.reduce(sums, "sum").tolist()
        return {name: total / weight for name, total, weight in zip(self.totals, totals, weights)}

    def state(self) -> dict[str, list[float]]:
        """JSON values that `restore` takes; nothing is rounded."""
        return {name: [total.item(), self.weights[name]] for name, total in self.totals.items()}

    def restore(self, state: dict[str, list[float]], device: torch.device) -> None:
        """Go on from a `state`."""
        self.totals = {name: torch.tensor(total, device=device) for name, (total, _) in state.items()}
        self.weights = {name: weight for name, (_, weight) in state.items()}


class Stretch:
    """A stretch of training: what was measured in it, and how fast it was."""

    def __init__(self) -> None:
        self.means = Means()
        self.images = 0  # of all processes
        self.waited = 0.0  # seconds, for data
        self.start = time.perf_counter()
        self.end: float | None = None  # None: it goes on

    def speed(self, device: torch.device) -> dict[str, float]:
        """Images per second, the share of the time that went into waiting for data, and the peak memory in MB."""
        seconds = (self.end or time.perf_counter()) - self.start
        return dict(
            images_per_second=round(self.images / seconds, 1),
            data_wait=round(self.waited / seconds, 4),
            memory_mb=round(peak_memory(device) / 1e6),
        )


class Progress:
    """Counts an epoch's batches, averages what is measured, and shows it on the main process.

    Args:
        accelerator: Tells the main process.
        title: Such as "tasn_tiny epoch 3/20".
        done: Batches of the epoch that are done already.
        total: Batches of the epoch, those included.
    """

    def __init__(self, accelerator: Accelerator, title: str, done: int, total: int) -> None:
        self.accelerator = accelerator
        self.title = title
        self.done = done
        self.total = total
        self.watched = accelerator.is_main_process and sys.stderr.isatty()
        self.epoch = Stretch()
        self.line = Stretch()  # since the last line
        self.step_ends: list[float] = []  # seconds, of a clock

    def over(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield those of the epoch, and leave the next one's."""
        self.bar = tqdm(
            desc=self.title,
            initial=self.done,
            total=self.total,
            unit="batch",
            disable=not self.watched,
            leave=False,
            dynamic_ncols=True,
        )
        with self.bar:
            while self.done < self.total:
                start = time.perf_counter()
                batch = next(batches)
                waited = time.perf_counter() - start
                for stretch in (self.epoch, self.line):
                    stretch.waited += waited
                self.done += 1
                yield batch
                self.bar.update()

    def add(self, values: dict[str, Tensor], weight: float = 1.0) -> None:
        """Count scalars of this process; they stay on the device."""
        for stretch in (self.epoch, self.line):
            stretch.means.add(values, weight)

    def end_step(self, images: int) -> None:
        """Count the images of an optimizer step, of all processes."""
        self.step_ends.append(time.perf_counter())
        for stretch in (self.epoch, self.line):
            stretch.images += images

    def end(self) -> None:
        """Stop the clock of the epoch: evaluation is no training."""
        self.epoch.end = time.perf_counter()

    def end_line(self) -> tuple[dict[str, float], dict[str, float]]:
        """Show what happened since the last line, on the main process; all have to call it.

        Returns:
            Means over all processes, and `Stretch.speed`.
        """
        means, speed = self.line.means.read(self.accelerator), self.line.speed(self.accelerator.device)
        self.line = Stretch()
        if self.watched:
            self.bar.set_postfix(loss=f"{means['loss']:.3f}")
        elif self.accelerator.is_main_process:
            values = "  ".join(f"{name} {mean:.3f}" for name, mean in means.items())
            print(f"{self.title}  batch {self.done}/{self.total}  {values}", file=sys.stderr, flush=True)
        return means, speed

    def state(self) -> dict:
        """JSON values that `restore` takes."""
        return dict(epoch=self.epoch.means.state(), line=self.line.means.state())

    def restore(self, state: dict) -> None:
        """Go on with the averages of a `state`."""
        for name in ("epoch", "line"):
            getattr(self, name).means.restore(state[name], self.accelerator.device)


def crosses(interval: int | None, before: int, after: int) -> bool:
    """Whether a count that went up has reached or passed a multiple of an interval."""
    return interval is not None and after // interval > before // interval
