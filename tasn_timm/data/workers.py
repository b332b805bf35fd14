"""Loading processes that a signal to the whole group does not kill."""

import os
import signal
import threading
from multiprocessing import parent_process
from multiprocessing.process import BaseProcess

WATCH = 5  # seconds between looks at the parent


def outlive_signals(worker: int) -> None:
    """Make a DataLoader's worker leave SIGTERM and SIGINT to the process that trains; its worker_init_fn.

    A launcher's SIGTERM and a terminal's Ctrl-C reach the workers, too, and without them the training process could not
    go on to the end of its step and save. Merely ignoring the signals would keep persistent workers alive for ever,
    since Python ends them by SIGTERM: a worker therefore ends when its parent is the sender.

    Linux only: where the sender cannot be known (macOS, Windows) workers are left as they are, and a signal to the
    group ends the run as a kill would.
    """
    if not hasattr(signal, "sigtimedwait"):
        return
    signals = (signal.SIGTERM, signal.SIGINT)
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    threading.Thread(target=_end_with, args=(parent_process(), signals), daemon=True).start()


def _end_with(parent: BaseProcess, signals: tuple[signal.Signals, ...]) -> None:
    while True:
        info = signal.sigtimedwait(signals, WATCH)
        # torch's workers see that their parent was killed by another one, which a fork server does not let them have.
        if info.si_pid == parent.pid if info else not parent.is_alive():
            os._exit(0)  # as torch's own handler: an orderly end, which no error is told of
