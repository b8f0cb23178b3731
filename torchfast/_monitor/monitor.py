"""VRAMMonitor: what happens to the memory of a device while something runs."""

import dataclasses
import math
import threading
import time
import warnings
import weakref
from collections.abc import Mapping
from numbers import Real
from types import TracebackType
from typing import Any, Self

import torch

from torchfast._device import resolve_device
from torchfast._memory import PeakLedger, ledger_of
from torchfast._monitor.history import History, VRAMSpan
from torchfast._monitor.probe import Clock, Probe, probe_of
from torchfast._monitor.run import Phase, Run
from torchfast._monitor.sample import RankPeak, VRAMPeak, VRAMPhase, VRAMSample


class VRAMMonitor:
    """Watch the memory of a device while the block runs: samples, exact peaks, and what each phase needs.

    Guarantees: `peak` and the peaks of phases are exact, nested phases and several monitors included, because
    everything in torchfast shares PyTorch's one peak register through a ledger. A number that cannot be known
    is None, with the reason in `sample().sources`. Watching never fails the block: an error in a source is
    kept in `errors` and reported as a warning at the end. No process is forked, no CUDA context created: on
    a machine without a GPU the host's memory is watched instead.

    Costs: about 0.1 ms a sample, in a thread of its own, and up to 0.2 ms a phase; the GPU is never waited
    for. A source that turns out slow is asked less often, so that none takes more than 1 % of the time. The
    history is bounded: it gets coarser, and keeps every extreme.

    Example:
        >>> import torch
        >>> from torchfast import VRAMMonitor
        >>> model = torch.nn.Linear(8, 1)
        >>> with VRAMMonitor("cpu") as vram:
        ...     with vram.phase("forward"):
        ...         loss = model(torch.ones(4, 8)).sum()
        ...     with vram.phase("backward"):
        ...         loss.backward()
        >>> list(vram.phases)
        ['forward', 'backward']
        >>> vram.status()["device"]
        'cpu'

    Args:
        device: the device to watch; None is the current accelerator, else the CPU.
        interval_s: seconds between two samples of the background thread; None starts no thread, and only
            `sample()` and `status()` read.
        max_history: how many spans of time the history keeps.

    Raises:
        ValueError: no such device, an interval that is not positive, or a history of fewer than 2 spans.

    It does not see what somebody else's `torch.cuda.reset_peak_memory_stats()` hides between two readings;
    one that it notices makes the peak a lower bound, and it says so.
    """

    def __init__(
        self,
        device: torch.device | str | int | None = None,
        /,
        *,
        interval_s: float | None = 0.1,
        max_history: int = 1024,
        _probe: Probe | None = None,
        _ledger: PeakLedger | None = None,
        _clock: Clock = time.perf_counter,
    ) -> None:
        if interval_s is not None and not (_is_number(interval_s) and 0 < interval_s < math.inf):
            raise ValueError(
                f"interval_s={interval_s!r} is not a time between two samples. "
                "Give seconds above zero, such as 0.1, or None to sample only when you ask."
            )
        if not hasattr(max_history, "__index__") or max_history < 2:
            raise ValueError(
                f"max_history={max_history!r} is no length of a history. "
                "Give a whole number of spans, 2 or more."
            )
        self.device = resolve_device(device) if _probe is None else _probe.device
        # No longer than a thread can wait, and nothing but a float, which fractions are not.
        self.interval_s = None if interval_s is None else min(float(interval_s), threading.TIMEOUT_MAX)
        self._max_history, self._clock = max_history, _clock
        self._probe = probe_of(self.device) if _probe is None else _probe
        self._ledger = ledger_of(self.device) if _ledger is None else _ledger
        self._run: Run | None = None
        self._stop: weakref.finalize[[], VRAMMonitor] | None = None

    def __enter__(self) -> Self:
        """Begin a run: what an earlier run of the same monitor saw is forgotten."""
        if self.is_running:
            raise RuntimeError(
                f"this VRAMMonitor of {self.device} is running already, and has one run at a time. "
                "Use phase() for a part of the run, or a second VRAMMonitor: their peaks stay exact."
            )
        self._probe.forget_errors()
        run = Run(self._probe, self._ledger, History(self._max_history), self._clock)
        # Stops the thread also when the monitor is dropped without being left, and at the interpreter's exit.
        # Neither the thread nor this refers to the monitor, which would keep it alive.
        self._run, self._stop = run, weakref.finalize(self, run.close)
        try:
            run.open(self.interval_s)
        except BaseException:  # no thread to be had, or an interrupt: nobody will leave what was not entered
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._run is not None and self._stop is not None:
            try:
                self._run.stop_thread()
                if not self._run.hangs:
                    self._run.sample(fresh=True)
            finally:  # an interrupt, too
                self._stop()
        # An error on its way out matters more than ours; where warnings are errors, ours would replace it.
        if error is None and self.errors:
            warnings.warn(self._say_errors(), RuntimeWarning, stacklevel=2)

    @property
    def is_running(self) -> bool:
        """Whether the block that the monitor watches is being run."""
        return self._stop is not None and self._stop.alive

    def phase(self, name: str, /) -> Phase:
        """Measure a part of the run: `with vram.phase("forward"): ...`.

        The peaks are exact, whatever other phases are open. A phase within another is listed under both
        names, as in `"step/forward"`; "within" is meant of the same thread, or the same asyncio task. Returns
        a context manager that has the peaks of this one time.

        Raises:
            TypeError: the name is not a string.
            RuntimeError: the monitor is not running.
        """
        if not isinstance(name, str):
            raise TypeError(
                f"phase({name!r}) was asked of a VRAMMonitor: the name under which a phase is listed must be "
                'a string, such as phase("forward").'
            )
        if self._run is None or not self.is_running:
            raise RuntimeError(
                f"phase({name!r}) was asked of a VRAMMonitor that is not running: it has nothing to measure. "
                "Open it inside `with monitor:`."
            )
        return Phase(self._run, name)

    def sample(self) -> VRAMSample:
        """Read every source now, in the calling thread; while running, keep the sample in the history."""
        if self._run is None or not self.is_running:
            start_s = self._clock() if self._run is None else self._run.start_s
            return self._probe.sample(self._clock, start_s, None, fresh=True)
        return self._run.sample(fresh=True)

    @property
    def latest(self) -> VRAMSample | None:
        """The latest sample, without reading anything; None before the first."""
        return None if self._run is None else self._run.latest

    @property
    def peak(self) -> VRAMPeak:
        """The highest values of the run: up to now while it runs, for good afterwards."""
        if self._run is None:
            return VRAMPeak(None, None, None, is_lower_bound=False, used_bytes=None, host_process_bytes=None)
        return self._run.peak()

    @property
    def phases(self) -> Mapping[str, VRAMPhase]:
        """The phases by name, in the order in which they were first opened."""
        return {} if self._run is None else self._run.phases()

    @property
    def history(self) -> tuple[VRAMSpan, ...]:
        """The run so far, oldest first, in at most `max_history` spans."""
        return () if self._run is None else self._run.spans()

    @property
    def errors(self) -> tuple[str, ...]:
        """What went wrong while sampling: the last few errors of each source."""
        return tuple(self._probe.errors() + ([] if self._run is None else self._run.errors))

    def status(self) -> dict[str, Any]:
        """Return what a training UI shows, as plain values fit for JSON: the VRAM now, peaks and phases.

        It reads every source first, the list of processes too (up to 1 ms): what it tells is current.
        """
        return self._status(self.sample())

    def _status(self, sample: VRAMSample) -> dict[str, Any]:
        peak = self.peak
        return {
            **sample.to_dict(),
            "is_running": self.is_running,
            "peak": {field.name: getattr(peak, field.name) for field in dataclasses.fields(peak)},
            "phases": {name: dataclasses.asdict(phase) for name, phase in self.phases.items()},
            "sources": dict(sample.sources),
            "errors": list(self.errors),
        }

    def across_ranks(self, group: Any = None) -> dict[str, RankPeak]:
        """Return the highest peaks of all ranks, and on which rank each is.

        Every rank of the group has to call it, at the same point of its loop: it is a collective. It goes
        through the CPU, since gathering over NCCL would take the memory that is being measured. Without
        `torch.distributed` there is one rank, this one.

        Args:
            group: a process group with a CPU backend, such as `dist.new_group(backend="gloo")`; None is the
                default group.

        Raises:
            ValueError: the group has no CPU backend.
        """
        from torchfast._monitor.ranks import across_ranks

        return across_ranks(self.peak, group)

    def line(self) -> str:
        """Return the memory now and the peak in a few words, as for a progress bar."""
        from torchfast._monitor.text import line

        return line(self.sample(), self.peak)

    def __repr__(self) -> str:
        state = "running" if self.is_running else "not running"
        return f"VRAMMonitor({self.device}, {state}, {self.peak!r})"

    def __str__(self) -> str:
        from torchfast._monitor.text import report

        return report(self)

    def _repr_html_(self) -> str:
        from torchfast._monitor.html import page

        # A notebook shows a finished run as it was at its end.
        done = None if self.is_running else self.latest
        return page(self, self._status(done or self.sample()))

    def _say_errors(self) -> str:
        n_errors = self._probe.n_errors() + (0 if self._run is None else len(self._run.errors))
        return (
            f"VRAMMonitor of {self.device} could not read everything: {n_errors} error(s) while sampling, "
            f"the last one {self.errors[-1]!r}. Its samples lack what those sources would have told; "
            "peaks are not affected. All kept errors are in .errors."
        )


def _is_number(given: object) -> bool:
    return isinstance(given, Real)
