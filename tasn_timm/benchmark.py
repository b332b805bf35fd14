"""What models cost in time and memory. Several are timed in turns, for the sake of ratios.

What is timed is what a user waits for: inference from uint8 pictures on the device to logits, normalisation included,
and a training step from uint8 pictures to updated weights, a TASN's with its own loss.
"""

import os
import platform
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import NamedTuple

import timm
import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.profiler import ProfilerActivity

from .contenders import PARTS, Contender
from .data.transforms import Normalize
from .errors import UserError
from .memory import lacks_memory
from .task import create_task
from .tasn import TASN

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WARM_UP = 2  # untimed repetitions: the first compiles and chooses algorithms, the next still fills caches
PROFILED = 3  # repetitions; both at most, if the time lasts

# Operators that convolve or multiply matrices, as the profiler calls them; on a GPU with the kernels that they launch.
_PRODUCTS = re.compile(r"aten::(.*conv(?!ert).*|b?(add)?b?m[mv]|.*linear.*|.*attention.*)")


class Machine(NamedTuple):
    """Where and how models run.

    Args:
        device: "cpu" or "cuda", maybe with an index.
        channels_last: Memory format of weights and pictures.
        compile: Whether with torch.compile, each batch size for itself.
        rounds: How often each contender is timed, if `max_seconds` lasts.
        max_seconds: After so many seconds of rounds for each contender there is no further one; one there always is.
    """

    device: torch.device
    channels_last: bool = False
    compile: bool = False
    rounds: int = 11
    max_seconds: float = 10.0

    @property
    def memory_format(self) -> torch.memory_format:
        """Of weights and pictures."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def synchronize(self) -> None:
        """Wait for what a GPU was given to do; a CPU has done it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def describe(self) -> dict:
        """What timings depend on."""
        cuda = self.device.type == "cuda"
        cpu = f"{platform.machine()} CPU, {torch.backends.cpu.get_cpu_capability()}"
        return dict(
            device=str(self.device),
            device_name=torch.cuda.get_device_name(self.device) if cuda else cpu,
            threads=torch.get_num_threads(),
            torch=torch.__version__,
            cuda=torch.version.cuda if cuda else None,
            timm=timm.__version__,
            channels_last=self.channels_last,
            compile=self.compile,
        )


class Work(NamedTuple):
    """What is timed.

    Args:
        mode: A key of `MODES`: "inference" or "training".
        precision: A key of `PRECISIONS`; other than "fp32" it is autocast's, and fp16 trains with a scaled loss.
        batch_size: Pictures of a repetition.
    """

    mode: str
    precision: str
    batch_size: int


def find_device(name: str | None) -> torch.device:
    """The device of that name; None for the GPU where there is one, else the CPU.

    Raises:
        UserError: It is neither a CPU nor a GPU of CUDA's, or it is not there.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name is None:
        return torch.device("cuda", 0) if gpus else torch.device("cpu")
    found = re.fullmatch(r"cpu|cuda(?::(\d+))?", name)
    if not found:
        raise UserError(f"--device must be cpu, cuda or cuda:N, got {name!r}.")
    if name != "cpu" and int(found[1] or 0) >= gpus:
        raise UserError(f"--device {name} is not there (GPUs that PyTorch {torch.__version__} sees: {gpus}): use cpu.")
    return torch.device("cpu") if name == "cpu" else torch.device("cuda", int(found[1] or 0))


class Inference:
    """Called once, it makes logits of a batch of uint8 pictures on the device."""

    def __init__(self, contender: Contender, work: Work, machine: Machine) -> None:
        self.model = contender.model.eval().to(machine.device, memory_format=machine.memory_format)
        self.pictures = _pictures(contender, work, machine)
        self.normalize = _normalize(self.model).to(machine.device)
        self.autocast = _autocast(work, machine)
        self.predict = nn.Sequential(self.normalize, self.model)
        if machine.compile:
            self.predict = torch.compile(self.predict, dynamic=False)

    @torch.inference_mode()
    def __call__(self) -> None:
        with self.autocast():
            self.predict([self.pictures])

    def tensors(self) -> list[Tensor]:
        """What there is before and after a repetition."""
        return [self.pictures, *self.model.parameters(), *self.model.buffers()]


class Training:
    """Called once, it makes a step of SGD with momentum on a batch of uint8 pictures on the device.

    A TASN has its own loss (`TASNTask`), any other model cross-entropy.
    """

    def __init__(self, contender: Contender, work: Work, machine: Machine) -> None:
        self.model = contender.model.train().to(machine.device, memory_format=machine.memory_format)
        self.pictures = _pictures(contender, work, machine)
        self.labels = torch.randint(self.model.num_classes, (work.batch_size,), device=machine.device)
        self.normalize = _normalize(self.model).to(machine.device)
        self.autocast = _autocast(work, machine)
        self.scaler = torch.amp.GradScaler(machine.device.type, enabled=work.precision == "fp16")
        self.task = create_task(self.model, criterion=nn.CrossEntropyLoss())
        if machine.compile:
            self.task.compile(dynamic=False)
        # A rate that leaves random weights finite for as long as this takes.
        self.optimizer = create_optimizer_v2(self.model, "momentum", lr=1e-4, momentum=0.9)

    def __call__(self) -> None:
        with self.autocast():
            loss = self.task(self.normalize([self.pictures]), self.labels)["loss"]
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()  # at the end: a profiler on a CPU does not see what it frees of an earlier step

    def tensors(self) -> list[Tensor]:
        """What there is before and after a repetition: weights, the optimizer's state, the batch."""
        state = [x for values in self.optimizer.state.values() for x in values.values() if isinstance(x, Tensor)]
        return [self.pictures, self.labels, *self.model.parameters(), *self.model.buffers(), *state]


MODES = {"inference": Inference, "training": Training}


def _pictures(contender: Contender, work: Work, machine: Machine) -> Tensor:
    shape = (work.batch_size, contender.model.in_chans, *contender.image_size)
    pictures = torch.randint(256, shape, dtype=torch.uint8, device=machine.device)
    return pictures.contiguous(memory_format=machine.memory_format)


def _normalize(model: nn.Module) -> Normalize:
    channels = [0.5] * model.in_chans  # any mean and standard deviation take the same time
    return Normalize(channels, channels, keep_pixels=isinstance(model, TASN))


def _autocast(work: Work, machine: Machine) -> Callable[[], AbstractContextManager]:
    dtype = PRECISIONS[work.precision]
    return partial(torch.autocast, machine.device.type, dtype, enabled=dtype != torch.float32)


@dataclass
class Cell:
    """What was measured of a contender at some work."""

    contender: Contender
    work: Work
    repeat: Inference | Training | None = None
    seconds: list[float] = field(default_factory=list)  # of each round
    part_seconds: list[dict[str, float]] = field(default_factory=list)
    products: list[float] = field(default_factory=list)  # seconds of each profiled repetition
    peak_bytes: int | None = None
    failure: str | None = None  # why there are no figures

    def attempt(self, action: Callable[..., None], *arguments) -> None:
        """Do action(cell, *arguments); where the batch does not allow it, note why, and let go what the cell holds."""
        if self.failure:
            return
        try:
            action(self, *arguments)
        except (MemoryError, RuntimeError, ValueError) as error:
            self.failure = _failure(error)
        if self.failure:
            self.repeat = None
            self.contender.model.zero_grad()
            torch.cuda.empty_cache()


def _failure(error: Exception) -> str:
    if lacks_memory(error):
        return "out of memory"
    if "more than 1 value per channel" in str(error):  # one position left of one picture
        return "batch too small for BatchNorm"
    raise error


def measure(
    pairs: Sequence[tuple[Contender, Work]],
    machine: Machine,
    details: bool = True,
    progress: Callable[[Iterable[list[int]]], Iterable[list[int]]] = iter,
) -> list[dict]:
    """Time contenders in turns: every round each of them once, beginning with another one than the round before.

    What disturbs the machine for a while thus disturbs all of them. A repetition is waited for before and after it, and
    never inside. Each has been done before, untimed.

    Args:
        pairs: Models and what each does; the references are among them, at the same work. All of one mode.
        machine: Where and how.
        details: Whether to find part_seconds, products_seconds and peak_bytes, too, which takes more repetitions.
        progress: Wraps the rounds.

    Returns:
        A dict for each pair: the contender's "name" and "reference", `Work`'s fields, and

        - "seconds", of each round, their "median_seconds", and "images_per_second", which follows from that;
        - "ratio" to the reference, of the two medians, and "ratio_low" and "ratio_high", the extremes of the rounds;
        - "part_seconds", medians of the parts of a TASN's inference, each timed by itself in the same rounds; empty if
          it is compiled, as the parts then run into one another;
        - "products_seconds", convolutions and matrix products alone in the fastest of a few profiled repetitions: what
          no arrangement of the rest goes below;
        - "peak_bytes" of tensors at the busiest moment (on a CPU without what oneDNN takes for itself);
        - "failure", why there are no figures, or None.
    """
    if machine.compile:
        torch.compiler.reset()  # else some batch size meets a limit of recompilations, and is not compiled
    cells = [Cell(contender, work) for contender, work in pairs]
    for cell in cells:
        cell.attempt(_prepare, machine)
    end = time.perf_counter() + machine.max_seconds * len(cells)
    for order in progress(turns(len(cells), machine.rounds)):
        for index in order:
            cells[index].attempt(_time, machine, details)
        if time.perf_counter() > end:
            break
    for _ in range(min(PROFILED, machine.rounds) if details else 0):
        for cell in cells:
            cell.attempt(_profile, machine)
        if time.perf_counter() > end:
            break
    return summaries(cells)


def turns(count: int, rounds: int) -> list[list[int]]:
    """The order of so many contenders in each round: every round begins with the next one."""
    return [[(start + place) % count for place in range(count)] for start in range(rounds)]


def summaries(cells: Sequence[Cell]) -> list[dict]:
    """What `measure` returns, of what was measured."""
    found = {(cell.contender.name, cell.work): cell for cell in cells}
    return [_summary(cell, found[cell.contender.reference, cell.work]) for cell in cells]


def _summary(cell: Cell, reference: Cell) -> dict:
    contender = cell.contender
    result = dict(name=contender.name, reference=contender.reference, **cell.work._asdict(), failure=cell.failure)
    if cell.failure:
        return result
    seconds = median(cell.seconds)
    parts = {part: median(each[part] for each in cell.part_seconds) for part in (cell.part_seconds or [{}])[0]}
    result |= dict(
        seconds=cell.seconds,
        median_seconds=seconds,
        images_per_second=cell.work.batch_size / seconds,
        part_seconds=parts,
        products_seconds=min(cell.products, default=None),
        peak_bytes=cell.peak_bytes,
    )
    if not reference.failure:
        ratios = [one / other for one, other in zip(cell.seconds, reference.seconds)]
        result |= dict(ratio=seconds / median(reference.seconds), ratio_low=min(ratios), ratio_high=max(ratios))
    return result


def _prepare(cell: Cell, machine: Machine) -> None:
    cell.repeat = MODES[cell.work.mode](cell.contender, cell.work, machine)
    start = time.perf_counter()
    for _ in range(WARM_UP):
        cell.repeat()
        machine.synchronize()
        if time.perf_counter() - start > machine.max_seconds:
            break


def _time(cell: Cell, machine: Machine, details: bool) -> None:
    machine.synchronize()
    start = time.perf_counter()
    cell.repeat()
    machine.synchronize()
    cell.seconds.append(time.perf_counter() - start)
    has_parts = cell.work.mode == "inference" and isinstance(cell.contender.model, TASN) and not machine.compile
    if details and has_parts:
        with clocked_parts(cell.repeat, machine) as seconds:
            cell.repeat()
        cell.part_seconds.append(seconds)


@contextmanager
def clocked_parts(repeat: Inference, machine: Machine) -> Iterator[dict[str, float]]:
    """Time the parts of a TASN's forward passes inside, on a GPU by its own clock, without waiting for it.

    Yields:
        Seconds of each of `PARTS`, filled in at the end. Between them are resizing for the attention net and the
        normalisation of what was resized and sampled.
    """
    parts = {part: [getattr(repeat.model, name) for name in names] for part, names in PARTS.items()}
    marks: dict[str, list] = {part: [] for part in parts}  # when each module began and ended
    hooks = []
    for part, modules in parts.items():
        mark = partial(_mark, marks[part], machine)
        for module in modules:
            hooks += [module.register_forward_pre_hook(mark), module.register_forward_hook(mark)]
    seconds: dict[str, float] = {}
    try:
        yield seconds
    finally:
        for hook in hooks:
            hook.remove()
    machine.synchronize()
    passed = _passed_on_gpu if machine.device.type == "cuda" else _passed
    seconds |= {part: sum(map(passed, found[::2], found[1::2])) for part, found in marks.items()}


def _mark(marks: list, machine: Machine, *_) -> None:
    if machine.device.type == "cuda":
        marks.append(torch.cuda.Event(enable_timing=True))
        marks[-1].record()
    else:
        marks.append(time.perf_counter())


def _passed(begin: float, end: float) -> float:
    return end - begin


def _passed_on_gpu(begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
    return begin.elapsed_time(end) / 1000


def _profile(cell: Cell, machine: Machine) -> None:
    """Note the time of convolutions and products of a repetition, and its peak of memory."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else the profiler tells that it begins, and that it ends
    cuda = machine.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    machine.synchronize()
    kept = _bytes(cell.repeat.tensors())
    if cuda:
        torch.cuda.reset_peak_memory_stats(machine.device)
        before = torch.cuda.memory_allocated(machine.device)
    with torch.profiler.profile(activities=activities, profile_memory=not cuda) as profiler:
        cell.repeat()
        machine.synchronize()
    extra = torch.cuda.max_memory_allocated(machine.device) - before if cuda else peak_of_changes(profiler)
    cell.peak_bytes = kept + extra
    clock = "self_device_time_total" if cuda else "self_cpu_time_total"
    products = (getattr(event, clock) for event in profiler.key_averages() if _PRODUCTS.fullmatch(event.key))
    cell.products.append(sum(products) / 1e6)


def _bytes(tensors: Sequence[Tensor]) -> int:
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def peak_of_changes(profiler: torch.profiler.profile) -> int:
    """The most bytes that the CPU's allocator had given out beyond those at the start."""
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    taken = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        taken += event.nbytes()
        peak = max(peak, taken)
    return peak
