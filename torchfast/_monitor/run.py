"""One run of a monitor: its thread, its samples, its phases."""

import os
import threading
import weakref
from contextvars import ContextVar
from types import TracebackType
from typing import Self

from torchfast._memory import PeakLedger, PeakScope
from torchfast._monitor.history import History, VRAMSpan
from torchfast._monitor.probe import Clock, Probe
from torchfast._monitor.sample import VRAMPeak, VRAMPhase, VRAMSample, highest

# A driver call that hangs must not hang the end of the program.
_JOIN_S = 5.0


class Run:
    """What happens while a monitor is open; the thread holds this, and not the monitor."""

    def __init__(self, probe: Probe, ledger: PeakLedger, history: History, clock: Clock) -> None:
        self.ledger, self.clock = ledger, clock
        self.latest: VRAMSample | None = None
        self.errors: list[str] = []
        self._highest_used: int | None = None
        self._highest_host: int | None = None
        self._probe, self._history = probe, history
        self._scope = PeakScope(ledger)
        self._phases: dict[str, _Total] = {}
        self._open_phases: list[Phase] = []
        self.renew_locks()
        _runs.add(self)
        self.hangs = False
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.start_s = 0.0

    def renew_locks(self) -> None:
        """Begin with locks that nobody holds."""
        # Re-entrant: the garbage collector may close a dropped monitor's run in the midst of anything. Two of
        # them: a driver call that hangs while sampling must not stop a training that opens a phase.
        self._sample_lock, self._phase_lock = threading.RLock(), threading.RLock()

    def open(self, interval_s: float | None) -> None:
        """Begin to measure; sample in the background unless `interval_s` is None."""
        self.start_s = self.clock()
        self._scope.__enter__()
        self.sample(fresh=True)
        if interval_s is None:
            return
        thread = threading.Thread(
            target=self._watch, args=(interval_s,), name="torchfast-vram-monitor", daemon=True
        )
        thread.start()
        self._thread = thread

    def close(self) -> None:
        """Stop the thread and close the run's scope; nothing is read any more but the register."""
        self.stop_thread()
        self._scope.__exit__(None, None, None)

    def stop_thread(self) -> None:
        """End the background samples; a thread that hangs in a source is left behind, and reported."""
        self._stop.set()
        if self._thread is None or self.hangs or self._thread is threading.current_thread():
            return
        self._thread.join(_JOIN_S)
        if self._thread.is_alive() and not self.hangs:
            self.hangs = True
            self.errors.append(f"the sampling thread hangs in a reading for more than {_JOIN_S:g} s")

    def sample(self, *, fresh: bool) -> VRAMSample:
        """Take a sample of what is due, or of everything if `fresh`."""
        open_phases = self._open_phases  # never changed in place
        phase = open_phases[-1].name if open_phases else None
        with self._sample_lock:
            sample = self._probe.sample(self.clock, self.start_s, phase, fresh=fresh)
            self._history.add(sample)
            self._highest_used = highest((self._highest_used, sample.used_bytes))
            self._highest_host = highest((self._highest_host, sample.host_process_bytes))
            self.latest = sample
            return sample

    def spans(self) -> tuple[VRAMSpan, ...]:
        """The history so far."""
        with self._sample_lock:
            return self._history.spans

    def peak(self) -> VRAMPeak:
        """The highest values so far."""
        allocated, reserved, _, requested, _ = self._scope.peaks() or (None,) * 5
        return VRAMPeak(
            allocated,
            reserved,
            requested or (None if allocated else requested),  # cudaMallocAsync does not count it, and says 0
            is_lower_bound=self._scope.is_lower_bound,
            used_bytes=self._highest_used,
            host_process_bytes=self._highest_host,
        )

    def phases(self) -> dict[str, VRAMPhase]:
        """The phases opened so far."""
        with self._phase_lock:
            return {name: total.finished(name) for name, total in self._phases.items()}

    def begin(self, phase: "Phase", name: str) -> str:
        """Note that a phase opens, and return its full name."""
        here = tuple(other for other in _open_here.get() if other.is_open)
        outer = [other.name for other in here if other.is_of(self)]
        full = f"{outer[-1]}/{name}" if outer else name
        _open_here.set((*here, phase))
        with self._phase_lock:
            self._open_phases = [*self._open_phases, phase]
            # The table lists phases in the order in which they were first opened.
            if full not in self._phases:
                self._phases[full] = _Total()
        return full

    def finish(self, phase: "Phase", seconds: float) -> None:
        """Note that a phase closes, and add this time to the others of its name."""
        with self._phase_lock:
            self._open_phases = [other for other in self._open_phases if other is not phase]
            self._phases[phase.name].add(phase, seconds)

    def _watch(self, interval_s: float) -> None:
        while not self._stop.wait(interval_s):
            try:
                self.sample(fresh=False)
            except Exception as error:  # noqa: BLE001 - reported at the end; the training goes on
                self.errors.append(f"the sampling thread ended with {type(error).__name__}: {error}")
                return


# A phase is a part of those that are open where it opens: in its thread, or its task.
_open_here: ContextVar[tuple["Phase", ...]] = ContextVar("phases", default=())
_runs: weakref.WeakSet[Run] = weakref.WeakSet()


def _after_fork() -> None:
    # Another thread may have held a lock at the moment of the fork; in the child it would stay locked.
    for run in _runs:
        run.renew_locks()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class Phase:
    """A part of a run and its own exact peaks: so far while it is open, for good afterwards."""

    def __init__(self, run: Run, name: str) -> None:
        self.name = name
        self._short_name, self._run = name, run
        self._scope = PeakScope(run.ledger)
        self._start_s = 0.0
        self.is_open = False

    def __enter__(self) -> Self:
        self.name, self.is_open = self._run.begin(self, self._short_name), True
        self._scope = PeakScope(self._run.ledger)
        self._start_s = self._run.clock()
        self._scope.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._scope.__exit__(kind, error, traceback)
        # A generator with an open phase may be closed by another thread than the one that began it, which
        # then finds the phase closed.
        self.is_open = False
        _open_here.set(tuple(other for other in _open_here.get() if other.is_open))
        self._run.finish(self, self._run.clock() - self._start_s)

    def is_of(self, run: Run) -> bool:
        """Say whether it is a part of this run."""
        return self._run is run

    @property
    def peak_allocated_bytes(self) -> int | None:
        """The highest `torch.cuda.memory_allocated` within the phase; None on a CPU."""
        return self._scope.peak_allocated_bytes

    @property
    def peak_reserved_bytes(self) -> int | None:
        """The highest `torch.cuda.memory_reserved` within the phase; None on a CPU."""
        return self._scope.peak_reserved_bytes

    @property
    def kept_bytes(self) -> int | None:
        """How much more was allocated at the end of the phase than at its start; None while it is open."""
        start, end = self._scope.start, self._scope.end
        return None if start is None or end is None else end.allocated_bytes - start.allocated_bytes

    @property
    def is_lower_bound(self) -> bool:
        """Whether somebody else was seen to reset PyTorch's register within the phase."""
        return self._scope.is_lower_bound


class _Total:
    """A phase over all its times, in the making: a record anew each time would cost more than the rest."""

    __slots__ = ("is_lower_bound", "kept_bytes", "n_times", "peak_allocated", "peak_reserved", "total_s")

    def __init__(self) -> None:
        self.n_times, self.total_s = 0, 0.0
        self.peak_allocated: int | None = None
        self.peak_reserved: int | None = None
        self.kept_bytes: int | None = None
        self.is_lower_bound = False

    def add(self, phase: Phase, seconds: float) -> None:
        """Add one time to the others."""
        self.n_times += 1
        self.total_s += seconds
        self.peak_allocated = highest((self.peak_allocated, phase.peak_allocated_bytes))
        self.peak_reserved = highest((self.peak_reserved, phase.peak_reserved_bytes))
        self.kept_bytes = phase.kept_bytes
        self.is_lower_bound |= phase.is_lower_bound

    def finished(self, name: str) -> VRAMPhase:
        """Return it as a record."""
        return VRAMPhase(
            name,
            self.n_times,
            self.total_s,
            self.peak_allocated,
            self.peak_reserved,
            self.kept_bytes,
            is_lower_bound=self.is_lower_bound,
        )
