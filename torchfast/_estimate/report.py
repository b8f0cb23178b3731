"""The answer: how much, of what, when, and how sure."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

from torchfast._bytes import format_bytes
from torchfast._estimate.events import Event, Trace
from torchfast._estimate.gpus import GPU, Context
from torchfast._estimate.margin import safe_bytes
from torchfast._estimate.picture import html
from torchfast._estimate.replay import Replay, replay
from torchfast._estimate.settings import AllocatorSettings
from torchfast._estimate.text import LINES, table

if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes

    from torchfast._estimate.search import BatchSize, Fit, WhatIfTable


class Retrace(Protocol):
    """Runs the estimated step on paper again, with one thing changed; holds the user's objects weakly."""

    def __call__(
        self, *, batch_size: int | None = None, gpu: GPU | None = None, variant: str | None = None
    ) -> Trace | None:
        """Return the new trace; None where the variant makes no sense for this step."""


@dataclass(frozen=True, slots=True)
class Subject:
    """What was estimated, for the headline and the log line."""

    model: str
    optimizer: str | None = None  # or what is done instead: inference, a step of the user's own
    precision: str = "fp32"
    batch_size: int | None = None
    teacher: str | None = None

    def __str__(self) -> str:
        batch = None if self.batch_size is None else f"batch {self.batch_size}"
        teacher = None if self.teacher is None else f"teacher {self.teacher}"
        optimizer = self.optimizer or "no optimizer"
        return ", ".join(part for part in (self.model, batch, optimizer, self.precision, teacher) if part)


@dataclass(frozen=True, slots=True)
class PhasePeak:
    """Memory over one phase of the run."""

    name: str
    n_events: int
    end_allocated_bytes: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int


@dataclass(frozen=True, slots=True)
class Moment:
    """One event of the timeline."""

    phase: str
    module: str
    operator: str
    requested_bytes: int
    allocated_bytes: int
    reserved_bytes: int


@dataclass(frozen=True, eq=False, repr=False)
class VRAMEstimate:
    """How much GPU memory a training step will need, of what, and when.

    All sizes are bytes. `requested <= allocated <= reserved <= process`: what the program asks for, what
    the caching allocator hands out for it, what it holds from the driver for that, and what `nvidia-smi`
    shows for the process. `safe_bytes` is what to have free: it adds what the parts known only by rule may
    be off by.

    Example:
        >>> import torch
        >>> from torchfast import estimate_vram
        >>> model = torch.nn.Linear(8, 2)
        >>> estimate = estimate_vram(model, torch.zeros(4, 8), gpu="T4")
        >>> sum(estimate.breakdown.values()) == estimate.peak_process_bytes
        True
        >>> estimate.fits("A100-80").fits
        True
    """

    subject: Subject
    gpu: GPU
    peak_requested_bytes: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    context: Context
    safe_bytes: int
    breakdown: Mapping[str, int]  # adds up to peak_process_bytes
    peak_phase: str
    peak_module: str
    peak_operator: str
    phases: tuple[PhasePeak, ...]
    unmodelled: tuple[str, ...]
    assumptions: tuple[str, ...]
    settings: AllocatorSettings = field(default_factory=AllocatorSettings)
    _trace: Trace = field(default_factory=lambda: Trace([], []))
    _replay: Replay | None = None
    _retrace: Retrace | None = None

    @property
    def context_bytes(self) -> int:
        """What the process holds outside PyTorch's allocator: the CUDA context, loaded kernels, handles."""
        return self.context.expected_bytes

    @property
    def peak_process_bytes(self) -> int:
        """What `nvidia-smi` will show for the process after its peak."""
        return self.peak_reserved_bytes + self.context_bytes

    @property
    def batch_size(self) -> int | None:
        """The batch size that was estimated, where there is one."""
        return self.subject.batch_size

    @property
    def timeline(self) -> list[Moment]:
        """Every allocation and free of the run, in order, with the memory after it."""
        assert self._replay is not None  # noqa: S101 -- estimate_of always gives one
        notes = self._trace.notes
        series = zip(
            self._trace.events,
            self._replay.requested_bytes,
            self._replay.allocated_bytes,
            self._replay.reserved_bytes,
            strict=True,
        )
        return [
            Moment(notes[event.note].phase, notes[event.note].module, notes[event.note].operator, *sizes)
            for event, *sizes in series
        ]

    def summary(self) -> str:
        """Return one line for the log of a training run."""
        return (
            f"VRAM estimate: {self.subject}: {format_bytes(self.peak_process_bytes)} "
            f"(allocated {format_bytes(self.peak_allocated_bytes)}, reserved "
            f"{format_bytes(self.peak_reserved_bytes)}, context {format_bytes(self.context_bytes)}; "
            f"safe bound {format_bytes(self.safe_bytes)}) of {format_bytes(self.gpu.total_bytes)} "
            f"on {self.gpu.name}"
        )

    def fits(
        self, gpu: "GPU | str | int | torch.device | None" = None, /, *, limit_bytes: int | None = None
    ) -> "Fit":
        """Decide whether the step runs on a GPU, by replaying it under that GPU's memory.

        Near the limit PyTorch gives cached memory back and tries again, so a step can run on a card that is
        smaller than its peak; comparing the peak with the card would say no. For a GPU that would run other
        kernels the step is traced again.

        Args:
            gpu: as in `estimate_vram`; the estimate's own by default.
            limit_bytes: what PyTorch may reserve, where it is not the GPU's memory less the context: under
                `torch.cuda.set_per_process_memory_fraction`, or where others share the GPU.

        Returns:
            A record that is true where the step fits, and otherwise says what ran out where.
        """
        from torchfast._estimate import search

        return search.fits(self, gpu, limit_bytes)

    def max_batch_size(
        self, gpu: "GPU | str | int | torch.device | None" = None, /, *, limit_bytes: int | None = None
    ) -> "BatchSize":
        """Find the largest batch that runs, by replay; each candidate is confirmed by a trace of its own.

        Between traces sizes are taken as affine in the batch size. Two to six traces, a second or two each.

        Args:
            gpu: as in `estimate_vram`; the estimate's own by default.
            limit_bytes: as in `fits`.

        Raises:
            ValueError: the estimate does not know which dimension is the batch.
            ReferenceError: the model no longer exists; an estimate holds it only weakly.
        """
        from torchfast._estimate import search

        return search.max_batch_size(self, gpu, limit_bytes)

    def what_if(self) -> "WhatIfTable":
        """Trace the step once for each common change, and tell what each would save.

        Checkpointing, bfloat16 autocast, pure bfloat16, a fused optimizer, channels_last, SGD, half the
        batch; the common optimizers where the estimate was made without one. A change that makes no sense
        for the step is left out. One trace a row.
        """
        from torchfast._estimate import search

        return search.what_if(self)

    def plot(self, axes: "Axes | None" = None, /) -> "Axes":
        """Draw the timeline with matplotlib, on `axes` or on a new figure, and return the axes.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from torchfast._estimate.plot import plot

        return plot(self, axes)

    def save_snapshot(self, path: str | Path, /) -> None:
        """Write the run as a memory snapshot, for pytorch.org/memory_viz and `torch.cuda._memory_viz`."""
        from torchfast._estimate.snapshot import save_snapshot

        save_snapshot(self, path)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy the answer; the way back to the model belongs to this process."""
        return {**vars(self), "breakdown": dict(self.breakdown), "_retrace": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "breakdown", MappingProxyType(state["breakdown"]))

    def __repr__(self) -> str:
        return f"<VRAMEstimate {self.summary().removeprefix('VRAM estimate: ')}>"

    def __str__(self) -> str:
        return table(self)

    def _repr_html_(self) -> str:
        return html(self)


def estimate_of(
    trace: Trace,
    *,
    gpu: GPU,
    subject: Subject,
    settings: AllocatorSettings | None = None,
    retrace: Retrace | None = None,
) -> VRAMEstimate:
    """Replay a trace and sum up what it needs on `gpu`."""
    settings = settings or AllocatorSettings()
    done = replay(trace.events, settings)
    context = gpu.context(note.operator for note in trace.notes)
    requested = _live_by_line(trace, done.peak_event) if trace.events else {}
    rounding = done.peak_allocated_bytes - sum(requested.values())
    breakdown = {line: requested[line] for line in LINES.values() if requested.get(line)}
    breakdown["rounding"] = rounding
    breakdown["fragmentation"] = done.peak_reserved_bytes - done.peak_allocated_bytes
    breakdown["context"] = context.expected_bytes
    at_peak = trace.notes[trace.events[done.peak_event].note] if trace.events else None
    return VRAMEstimate(
        subject=subject,
        gpu=gpu,
        peak_requested_bytes=done.peak_requested_bytes,
        peak_allocated_bytes=done.peak_allocated_bytes,
        peak_reserved_bytes=done.peak_reserved_bytes,
        context=context,
        safe_bytes=safe_bytes(trace, done.peak_reserved_bytes, context, settings),
        breakdown=MappingProxyType(breakdown),
        peak_phase=at_peak.phase if at_peak else "",
        peak_module=at_peak.module if at_peak else "",
        peak_operator=at_peak.operator if at_peak else "",
        phases=_phases(trace, done),
        unmodelled=(*trace.unmodelled, *_of_the_context(context)),
        assumptions=trace.assumptions,
        settings=settings,
        _trace=trace,
        _replay=done,
        _retrace=retrace,
    )


def _of_the_context(context: Context) -> tuple[str, ...]:
    """Say of a context that nobody measured by what it was guessed."""
    return (f"the context is {context.source}",) if context.source.startswith("not measured") else ()


def _live_by_line(trace: Trace, until: int) -> dict[str, int]:
    """Return the requested bytes of the blocks that are live after event `until`, by line of the table."""
    live: dict[int, Event] = {}
    for event in trace.events[: until + 1]:
        if event.size_bytes:
            live[event.block] = event
        else:
            del live[event.block]
    result = dict.fromkeys(LINES.values(), 0)
    for event in live.values():
        result[LINES[trace.category(event)]] += event.size_bytes
    return result


def _phases(trace: Trace, done: Replay) -> tuple[PhasePeak, ...]:
    phases: list[PhasePeak] = []
    start = 0
    names = [trace.notes[event.note].phase for event in trace.events]
    for i, name in enumerate(names):
        if i + 1 < len(names) and names[i + 1] == name:
            continue
        allocated, reserved = done.allocated_bytes[start : i + 1], done.reserved_bytes[start : i + 1]
        phases.append(PhasePeak(name, i + 1 - start, allocated[-1], max(allocated), max(reserved)))
        start = i + 1
    return tuple(phases)
