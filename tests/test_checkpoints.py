"""Checkpoint folders: complete or not at all, whenever the process that writes them dies; signals before that."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
from accelerate import Accelerator
from torch.utils.data import DataLoader

from tasn_timm.data.workers import outlive_signals
from tasn_timm.errors import Interrupted
from tasn_timm.training.checkpoints import Checkpoints, link_or_copy
from tasn_timm.training.stopping import StopRequest


def save(checkpoints: Checkpoints, number: int) -> Path:
    def write(folder: Path) -> None:
        (folder / "a.bin").write_bytes(bytes([number]) * 1000)
        (folder / "b.txt").write_text(f"text {number}")

    return checkpoints.save(f"epoch-{number:04}", write, dict(number=number))


@pytest.fixture
def checkpoints(tmp_path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", keep=2)


def test_the_newest_is_found_with_what_it_was_saved_with(checkpoints):
    assert checkpoints.newest() == (None, [])
    for number in (1, 2):
        folder = save(checkpoints, number)
    newest, broken = checkpoints.newest()
    assert (newest.folder, newest.about, broken) == (folder, dict(number=2), [])
    assert (folder / "a.bin").read_bytes() == b"\2" * 1000


def test_old_ones_go_once_the_new_one_is_there(checkpoints):
    for number in range(5):
        save(checkpoints, number)
    assert checkpoints.names() == ["epoch-0003", "epoch-0004"]
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == checkpoints.names(), "and nothing else stays"


def spoil_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text((folder / "manifest.json").read_text()[:-20])


def flip_a_bit(folder: Path) -> None:
    data = bytearray((folder / "a.bin").read_bytes())
    data[500] ^= 1
    (folder / "a.bin").write_bytes(data)


DAMAGES = {
    "has no manifest.json": lambda folder: (folder / "manifest.json").unlink(),
    "manifest.json is damaged": spoil_manifest,
    "b.txt is missing": lambda folder: (folder / "b.txt").unlink(),
    "a.bin has 10 bytes instead of 1000": lambda folder: (folder / "a.bin").write_bytes(b"\2" * 10),
    "a.bin is damaged": flip_a_bit,
    "'files'": lambda folder: (folder / "manifest.json").write_text("{}"),
}


@pytest.mark.parametrize("reason", DAMAGES)
def test_a_damaged_one_is_passed_over_with_the_reason(checkpoints, reason):
    first, second = save(checkpoints, 1), save(checkpoints, 2)
    DAMAGES[reason](second)
    newest, (message,) = checkpoints.newest()
    assert newest.folder == first
    assert str(second) in message and reason in message


def test_damaged_ones_are_set_aside_and_do_not_push_out_whole_ones(checkpoints):
    save(checkpoints, 1)
    for number in (8, 9):
        (save(checkpoints, number) / "a.bin").unlink()
    checkpoints.set_aside("epoch-0001")
    save(checkpoints, 2)
    assert checkpoints.newest()[0].about == dict(number=2)
    names = {path.name for path in checkpoints.folder.iterdir()}
    assert names == {"epoch-0002", "broken-epoch-0008", "broken-epoch-0009"} | set(checkpoints.names())


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_while_writing_leaves_the_others_and_nothing_of_its_own(checkpoints, error):
    first = save(checkpoints, 1)

    def write(folder: Path) -> None:
        (folder / "a.bin").write_bytes(b"half")
        raise error

    with pytest.raises(type(error)):
        checkpoints.save("epoch-0002", write, {})
    assert [path.name for path in checkpoints.folder.iterdir()] == ["epoch-0001"]
    assert checkpoints.newest()[0].folder == first


def test_one_of_the_same_name_is_replaced(checkpoints):
    save(checkpoints, 1)
    checkpoints.save("epoch-0001", lambda folder: (folder / "c").write_text("new"), dict(number=7))
    newest, broken = checkpoints.newest()
    assert newest.about == dict(number=7) and not broken
    assert sorted(path.name for path in newest.folder.iterdir()) == ["c", "manifest.json"]


def save_and_die(checkpoints: Checkpoints, moment: int) -> None:
    """Save two in a process that kills itself at the N-th call that changes the disk or waits for it."""
    calls = count(1)

    def dying(function: Callable) -> Callable:
        def call(*arguments, **options):
            if next(calls) == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    for module, names in (
        (os, "mkdir open fsync rename unlink rmdir replace"),
        (shutil, "rmtree"),
        (Path, "write_text write_bytes rename mkdir"),
    ):
        for name in names.split():
            setattr(module, name, dying(getattr(module, name)))
    for number in (2, 3):
        save(checkpoints, number)


def test_killed_at_every_moment_there_is_always_a_whole_one(tmp_path):
    found = []
    for moment in range(1, 200):
        checkpoints = Checkpoints(tmp_path / f"run-{moment}", keep=1)
        save(checkpoints, 1)
        process = multiprocessing.get_context("fork").Process(target=save_and_die, args=(checkpoints, moment))
        process.start()
        process.join()
        newest, broken = checkpoints.newest()
        assert newest is not None and not broken, f"killed at call {moment}"
        found.append(newest.about["number"])
        save(checkpoints, 4)  # a restart finds its way
        assert [path.name for path in checkpoints.folder.iterdir()] == ["epoch-0004"]
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert found == sorted(found) and set(found) == {1, 2, 3} and len(found) > 30


def test_a_file_is_linked_or_copied(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("model")
    link_or_copy(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a").samefile(tmp_path / "b")

    def refuse(*_):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    link_or_copy(tmp_path / "a", tmp_path / "c")
    assert (tmp_path / "c").read_text() == "model" and not (tmp_path / "a").samefile(tmp_path / "c")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_and_the_handlers_come_back(number, capsys):
    before = signal.getsignal(number)
    with StopRequest(Accelerator(cpu=True)) as stop:
        stop.check()
        os.kill(os.getpid(), number)
        with pytest.raises(Interrupted) as caught:
            stop.check()
    assert caught.value.number == number and number.name in str(caught.value)
    assert "saving after this step" in capsys.readouterr().err
    assert signal.getsignal(number) is before


def test_while_suspended_processes_are_forked_that_sigterm_ends():
    with StopRequest(Accelerator(cpu=True)) as stop:
        with stop.suspended():  # as of a pool of `datasets`, which waits for their end
            process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
            process.start()
            process.terminate()
            process.join(20)
        assert process.exitcode == -signal.SIGTERM
        assert stop.agreed() == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agreed() == signal.SIGTERM


def test_a_second_ctrl_c_interrupts_at_once():
    with pytest.raises(KeyboardInterrupt), StopRequest(Accelerator(cpu=True)):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def loader_of(workers: int) -> DataLoader:
    return DataLoader(range(100), num_workers=workers, worker_init_fn=outlive_signals, persistent_workers=True)


@pytest.mark.skipif(not hasattr(signal, "sigtimedwait"), reason="the sender of a signal cannot be known here")
def test_workers_outlive_signals_of_others_and_end_with_their_parent():
    loader = loader_of(2)
    batches = iter(loader)
    for _ in range(4):  # of both workers, which are then ready
        next(batches)
    workers = [worker.pid for worker in batches._workers]
    # From a process that is not their parent, as a launcher or the kernel (Ctrl-C) is not.
    kill = f"import os; [os.kill(pid, number) for pid in {workers} for number in (2, 15)]"
    subprocess.run([sys.executable, "-c", kill], check=True)
    assert len(list(batches)) == 96, "they load on"
    assert all(Path(f"/proc/{pid}").exists() for pid in workers) or sys.platform == "darwin"
    os.kill(workers[0], signal.SIGTERM)  # from their parent, as torch ends them
    batches._workers[0].join(10)
    assert batches._workers[0].exitcode == 0, "torch would call anything else a failure"


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "sigtimedwait"), reason="the sender of a signal cannot be known here")
@pytest.mark.parametrize("context", ["fork", "forkserver"])
@pytest.mark.parametrize("end", ["pass", "import sys; sys.exit(3)", "raise ValueError", "os.kill(os.getpid(), 9)"])
def test_no_end_of_the_training_process_hangs_or_leaves_workers_behind(tmp_path, end, context):
    script = tmp_path / "script.py"
    script.write_text(f"""
import os, json
from torch.utils.data import DataLoader
from tasn_timm.data.workers import outlive_signals
if __name__ == "__main__":
    options = dict(worker_init_fn=outlive_signals, persistent_workers=True, multiprocessing_context={context!r})
    batches = iter(DataLoader(range(100), num_workers=2, **options))
    next(batches)
    print(json.dumps([worker.pid for worker in batches._workers]), flush=True)
    {end}
""")
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    workers = json.loads(result.stdout)
    deadline = time.monotonic() + 20  # torch's workers look for their parent every 5 seconds
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
