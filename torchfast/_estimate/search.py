"""Decisions from an estimate: does it fit, what is the largest batch, what would save how much."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torchfast._bytes import MIB, format_bytes
from torchfast._estimate.events import Event, Trace
from torchfast._estimate.gpus import GPU, resolve_gpu
from torchfast._estimate.replay import Replay, fits_in, peak_reserved_bytes, replay

if TYPE_CHECKING:
    import torch

    from torchfast._estimate.report import VRAMEstimate

# What can be changed about a step, each with what it stands for in the table.
SAVINGS = (
    "checkpointing",
    "bf16 autocast",
    "pure bf16",
    "fused optimizer",
    "channels_last",
    "SGD",
    "half the batch",
)
OPTIMIZERS = ("SGD", "SGD with momentum", "AdamW", "fused AdamW", "Adafactor")
_MAX_BATCH = 2**22
# What the driver keeps of a GPU for itself as soon as a process uses it, seen on an H200 with driver 580.
_DRIVER_BYTES = 9 * MIB
_MAX_TRACES = 8


@dataclass(frozen=True, slots=True, repr=False)
class Fit:
    """Whether a step runs on a GPU; true in a condition where it does."""

    gpu: GPU
    fits: bool
    limit_bytes: int  # what PyTorch may reserve: the GPU's memory less the context
    peak_reserved_bytes: int  # under that limit
    n_retries: int  # how often cached memory had to be given back: each costs a synchronisation
    where: str  # where it ran out, if it did
    wanted_bytes: int  # what was asked for there

    def __bool__(self) -> bool:
        return self.fits

    def __repr__(self) -> str:
        return f"<Fit: {self}>"

    def __str__(self) -> str:
        if not self.fits:
            return (
                f"does not fit on {self.gpu.name}: {format_bytes(self.wanted_bytes)} more is asked for in "
                f"{self.where}, and PyTorch may reserve {format_bytes(self.limit_bytes)}"
            )
        if self.n_retries:
            return f"fits on {self.gpu.name}, tightly: cached memory is given back {self.n_retries} times"
        spare = format_bytes(self.limit_bytes - self.peak_reserved_bytes)
        return f"fits on {self.gpu.name} with {spare} to spare"


@dataclass(frozen=True, slots=True, repr=False)
class BatchSize:
    """The largest batch found to fit."""

    batch_size: int  # 0: not even one sample fits
    limit_bytes: int
    n_traces: int  # how often the step was traced to find it
    tried: tuple[tuple[int, bool], ...]  # every batch size that was traced, and whether it fits

    def __int__(self) -> int:
        return self.batch_size

    def __repr__(self) -> str:
        return f"<BatchSize: {self}>"

    def __str__(self) -> str:
        return f"batch size {self.batch_size} under {format_bytes(self.limit_bytes)}"


@dataclass(frozen=True, slots=True)
class WhatIf:
    """One change and what it does to the peak of the process."""

    change: str
    peak_process_bytes: int
    saves_bytes: int  # negative: it costs


@dataclass(frozen=True, slots=True, repr=False)
class WhatIfTable:
    """The rows of `VRAMEstimate.what_if`, largest saving first; iterates over them and prints as a table."""

    rows: tuple[WhatIf, ...]
    left_out: tuple[str, ...]  # changes that the step could not be traced with, each with the reason

    def __iter__(self) -> Iterator[WhatIf]:
        return iter(self.rows)

    def __repr__(self) -> str:
        return str(self)  # what a notebook shows of it

    def __str__(self) -> str:
        lines = [f"  {'instead':<22}{'process':>11}{'saves':>11}"]
        lines += [
            f"  {row.change:<22}{format_bytes(row.peak_process_bytes):>11}{format_bytes(row.saves_bytes):>11}"
            for row in self.rows
        ]
        return "\n".join([*lines, *(f"  not traced: {reason}" for reason in self.left_out)])


# --- does it fit -------------------------------------------------------------------------------------------


def fits(
    estimate: "VRAMEstimate",
    gpu: "GPU | str | int | torch.device | None" = None,
    limit_bytes: int | None = None,
) -> Fit:
    """Replay the step under the memory of `gpu`; see `VRAMEstimate.fits`."""
    _check_limit(limit_bytes)
    on = estimate.gpu if gpu is None else resolve_gpu(gpu)
    trace = trace_for(estimate, on)
    limit = room(trace, on) if limit_bytes is None else limit_bytes
    done = replay(trace.events, estimate.settings, limit_bytes=limit, optional=trace.optional)
    if done.failed_at is None:
        return Fit(on, True, limit, done.peak_reserved_bytes, done.n_retries, "", 0)
    event = trace.events[done.failed_at]
    note = trace.notes[event.note]
    where = ", ".join(part for part in (note.phase, note.module, note.operator) if part)
    return Fit(on, False, limit, done.peak_reserved_bytes, done.n_retries, where, event.size_bytes)


def _check_limit(limit_bytes: object) -> None:
    if limit_bytes is not None and not (isinstance(limit_bytes, (int, float)) and limit_bytes > 0):
        raise ValueError(
            f"limit_bytes={limit_bytes!r} was given, which is no amount of memory. Give what PyTorch may "
            "reserve in bytes (8 * 2**30 for 8 GiB), or leave it out for all that the GPU has."
        )


def room(trace: Trace, gpu: GPU) -> int:
    """Return what PyTorch may reserve on a GPU that nobody else uses."""
    context = gpu.context(note.operator for note in trace.notes)
    return gpu.total_bytes - _DRIVER_BYTES - context.expected_bytes


def trace_for(estimate: "VRAMEstimate", gpu: GPU) -> Trace:
    """Return the estimate's trace, traced again where `gpu` would run other kernels."""
    mine = estimate.gpu
    if (gpu.capability, gpu.n_multiprocessors) == (mine.capability, mine.n_multiprocessors):
        return estimate._trace
    trace = again(estimate, gpu=gpu)
    assert trace is not None  # noqa: S101 -- only variants may make no sense
    return trace


def again(
    estimate: "VRAMEstimate",
    *,
    batch_size: int | None = None,
    gpu: GPU | None = None,
    variant: str | None = None,
) -> Trace | None:
    """Trace the step once more with one thing changed; None where the change makes no sense for it."""
    if estimate._retrace is None:
        raise ValueError(
            "This estimate was pickled or copied, and what was asked for needs the step to be traced again, "
            "with the model. Ask the estimate that estimate_vram returned, in the process that has the model."
        )
    return estimate._retrace(batch_size=batch_size, gpu=gpu or estimate.gpu, variant=variant)


# --- the largest batch -------------------------------------------------------------------------------------


def max_batch_size(
    estimate: "VRAMEstimate",
    gpu: "GPU | str | int | torch.device | None" = None,
    limit_bytes: int | None = None,
) -> BatchSize:
    """Find the largest batch that fits; see `VRAMEstimate.max_batch_size`."""
    _check_limit(limit_bytes)
    on = estimate.gpu if gpu is None else resolve_gpu(gpu)
    given = estimate.batch_size
    if given is None:
        raise ValueError(
            "max_batch_size() was asked for, but this estimate does not know which dimension of the batch "
            "counts samples, so no other batch size can be traced. Give a batch whose tensors share their "
            "first dimension."
        )
    first = trace_for(estimate, on)
    limit = room(first, on) if limit_bytes is None else limit_bytes
    traces = {given: first}

    def traced(batch_size: int) -> Trace:
        if batch_size not in traces:
            trace = again(estimate, batch_size=batch_size, gpu=on)
            assert trace is not None  # noqa: S101 -- only variants may make no sense
            traces[batch_size] = trace
        return traces[batch_size]

    def runs(events: list[Event], optional: frozenset[int]) -> bool:
        return fits_in(events, estimate.settings, limit, optional)

    def peak(trace: Trace) -> int:
        return peak_reserved_bytes(trace.events, estimate.settings)

    search = _Search(traced, runs, lambda size: (peak(traced(size)) - limit) / limit)
    best = search.run(given)
    tried = tuple(sorted(search.known.items()))
    return BatchSize(best, limit, len(traces), tried)


class _Search:
    """Narrows the largest batch down with traces; in between, replays sizes fitted over the nearest two."""

    def __init__(
        self,
        traced: Callable[[int], Trace],
        runs: Callable[[list[Event], frozenset[int]], bool],
        excess: Callable[[int], float],
    ) -> None:
        self._traced = traced
        self._runs = runs
        self._excess = excess  # by how much a batch's own peak is above the limit
        self.known: dict[int, bool] = {}  # batch size: does it fit, by a trace of its own

    def run(self, given: int) -> int:
        self._confirm(given)
        other = given * 2 if self.known[given] else max(given // 2, 1)
        self._confirm(other)
        while len(self.known) < _MAX_TRACES:
            candidate = self._predict()
            if candidate == 0 or candidate in self.known or self._is_settled():
                break
            self._confirm(candidate)
        return self._largest_fitting()

    def _confirm(self, batch_size: int) -> None:
        if batch_size not in self.known:
            trace = self._traced(batch_size)
            self.known[batch_size] = self._runs(trace.events, trace.optional)

    def _largest_fitting(self) -> int:
        return max((size for size, fit in self.known.items() if fit), default=0)

    def _is_settled(self) -> bool:
        """Whether a larger batch that is known not to fit is within one percent."""
        best = self._largest_fitting()
        above = min((size for size, fit in self.known.items() if not fit and size > best), default=None)
        return above is not None and above <= best + max(best // 100, 1)

    def _predict(self) -> int:
        """Return the largest batch whose fitted stream fits, between the known bounds."""
        low = self._largest_fitting()
        high = min((size for size, fit in self.known.items() if not fit and size > low), default=None)
        a, b = self._two_nearest(low, high)
        fitted = Fitted.over(a, self._traced(a), b, self._traced(b))
        if fitted is None:  # the stream itself changes with the batch
            return self._by_line(low, high, a, b)
        if high is None:
            high = max(2 * low, 2)
            while high < _MAX_BATCH and self._runs(fitted.events(high), fitted.optional):
                low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            if self._runs(fitted.events(middle), fitted.optional):
                low = middle
            else:
                high = middle
        return low

    def _by_line(self, low: int, high: int | None, a: int, b: int) -> int:
        """Return where the line through two peaks meets the limit, well inside the known bounds."""
        slope = (self._excess(b) - self._excess(a)) / (b - a)
        meets = low * 2 if slope <= 0 else int(b - self._excess(b) / slope)
        if high is None:
            return min(max(meets, low + 1 + low // 8), low * 4)
        margin = (high - low) // 8
        return min(max(meets, low + margin), high - margin)

    def _two_nearest(self, low: int, high: int | None) -> tuple[int, int]:
        """Return the two traced sizes that the answer lies between, or next to."""
        sizes = sorted(self.known)
        if high is not None and low in self.known:
            return low, high
        return (sizes[0], sizes[1]) if high is not None else (sizes[-2], sizes[-1])


@dataclass(frozen=True, slots=True)
class Fitted:
    """A stream whose sizes are affine in the batch size: each block a constant and so much a sample.

    Workspaces of libraries are not part of the fit, as kernels change with the batch: they are those of the
    larger traced batch, in proportion.
    """

    batch_size: int
    base: list[Event]
    slopes: dict[int, float]  # bytes a sample, by block
    optional: frozenset[int]

    @classmethod
    def over(cls, size_a: int, a: Trace, size_b: int, b: Trace) -> "Fitted | None":
        """Fit two traces, the second of the larger batch; None where their streams are not the same.

        Kernels split their work by its size, so scratch comes and goes with the batch: where the streams
        differ, they are compared without it.
        """
        for without, of_b in ((a.optional, b.optional), (_scratch(a), _scratch(b))):
            ours = [event for event in a.events if event.block not in without]
            fitted = cls._matched(size_a, ours, size_b, b, of_b)
            if fitted is not None:
                return fitted
        return None

    @classmethod
    def _matched(
        cls, size_a: int, ours: list[Event], size_b: int, b: Trace, without: frozenset[int]
    ) -> "Fitted | None":
        theirs = [event for event in b.events if event.block not in without]
        if len(ours) != len(theirs):
            return None
        twins: dict[int, int] = {}
        slopes = {e.block: e.size_bytes / size_b for e in b.events if e.size_bytes and e.block in without}
        for one, other in zip(ours, theirs, strict=True):
            if bool(one.size_bytes) != bool(other.size_bytes):
                return None
            if one.size_bytes:
                twins[one.block] = other.block
                slopes[other.block] = (other.size_bytes - one.size_bytes) / (size_b - size_a)
            elif twins[one.block] != other.block:
                return None
        return cls(size_b, b.events, slopes, b.optional)

    def events(self, batch_size: int) -> list[Event]:
        """Return the stream at another batch size."""
        more = batch_size - self.batch_size
        return [
            Event(event.block, max(round(event.size_bytes + self.slopes[event.block] * more), 1), event.note)
            if event.size_bytes
            else event
            for event in self.base
        ]


def _scratch(trace: Trace) -> frozenset[int]:
    """Return the blocks that kernels take and give back: workspaces but for those that libraries keep."""
    freed = {event.block for event in trace.events if not event.size_bytes}
    workspaces = {e.block for e in trace.events if trace.notes[e.note].category == "workspace"}
    return trace.optional | (workspaces & freed)


# --- what if -----------------------------------------------------------------------------------------------


def what_if(estimate: "VRAMEstimate") -> WhatIfTable:
    """Trace each change that makes sense for the step; see `VRAMEstimate.what_if`."""
    changes = SAVINGS if estimate.subject.optimizer else tuple(dict.fromkeys((*OPTIMIZERS, *SAVINGS)))
    rows, left_out = [], []
    for change in changes:
        try:
            trace = _with_change(estimate, change)
        except ValueError as error:  # one change that cannot be traced must not take the other rows with it
            left_out.append(f"{change} ({str(error).splitlines()[0][:200]})")
            continue
        if trace is not None:
            rows.append(_row(estimate, change, trace, replay(trace.events, estimate.settings)))
    return WhatIfTable(tuple(sorted(rows, key=lambda row: -row.saves_bytes)), tuple(left_out))


def _with_change(estimate: "VRAMEstimate", change: str) -> Trace | None:
    if change != "half the batch":
        return again(estimate, variant=change)
    half = (estimate.batch_size or 0) // 2
    return again(estimate, batch_size=half) if half else None


def _row(estimate: "VRAMEstimate", change: str, trace: Trace, done: Replay) -> WhatIf:
    context = estimate.gpu.context(note.operator for note in trace.notes)
    peak = done.peak_reserved_bytes + context.expected_bytes
    return WhatIf(change, peak, estimate.peak_process_bytes - peak)
