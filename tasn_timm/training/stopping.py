"""SIGTERM and Ctrl-C as a wish to stop after a step, on which all processes agree."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

import torch
from accelerate import Accelerator
from torch import distributed

from ..errors import Interrupted


class StopRequest:
    """Within it, SIGTERM and Ctrl-C only leave a note, which `agreed` finds; a second Ctrl-C interrupts at once.

    Args:
        accelerator: Of the run.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.signal = 0
        several = accelerator.num_processes > 1
        # Of its own, on the hosts: a note travels while the devices compute, and nobody waits for a device.
        self.group = distributed.new_group(backend="gloo") if several else None
        self.note = torch.zeros(1, dtype=torch.int64)
        self.sent: distributed.Work | None = None

    def __enter__(self) -> "StopRequest":
        self._listen()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._restore()
        if error is None and self.sent is not None:
            self.sent.wait()

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """While there is nothing to save, signals do what they did before.

        `datasets` draws and converts in processes that it forks and ends by SIGTERM, which these would only note, too.
        """
        self._restore()
        try:
            yield
        finally:
            self._listen()

    def agreed(self) -> int:
        """Number of the signal that a process has got; 0 for none. All have to ask, and all get the same answer.

        With several processes it is the one of the call before, so that an answer never has to be waited for.
        """
        if self.group is None:
            return self.signal
        if self.sent is not None:
            self.sent.wait()
        answer = int(self.note)
        self.note = torch.tensor([self.signal])
        self.sent = distributed.all_reduce(self.note, distributed.ReduceOp.MAX, self.group, async_op=True)
        return answer

    def check(self) -> None:
        """Raise `Interrupted` when they agree on a signal."""
        number = self.agreed()
        if number:
            raise Interrupted(f"stopped by {signal.Signals(number).name}", number)

    def _listen(self) -> None:
        self.before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}

    def _restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.accelerator.is_main_process:
            name = signal.Signals(number).name
            print(f"{name}: saving after this step; Ctrl-C to stop at once", file=sys.stderr, flush=True)
