"""What steps needed: memory of the steps that worked, and the batch size that follows from it."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol, Self, TypeVar

import torch

from torchfast._bytes import format_bytes
from torchfast._memory import AllocatorStats, allocator_stats, peak_scope, room_on
from torchfast._oom import work
from torchfast._oom.thrash import Thrash

T = TypeVar("T")

# Allocations are not all alike: leave room for fragmentation and for the kernels' own needs.
_USABLE = 0.95
_MAX_SIZES = 64


class Monitor(Protocol):
    """What a monitor must be able to do to be given to `oom_guard`; `VRAMMonitor` is one."""

    def phase(self, name: str, /) -> AbstractContextManager[Any]:
        """Return a context that measures a phase."""

    def status(self) -> Mapping[str, Any]:
        """Return the present state of memory, for the report."""


class Suggestion(NamedTuple):
    """A batch size to try, and why; without a size, why none will do."""

    batch_size: int | None
    reason: str


class Situation(NamedTuple):
    """Memory as it was when the block failed, before anything was let go."""

    allocated_bytes: int | None
    usable_bytes: int | None
    """What this process's tensors could have had, within the limit set."""


def situation(device: torch.device, /) -> Situation:
    """Read what there is and what there could be; all None on a CPU, and where the driver has no answer."""
    try:
        stats, room = allocator_stats(device), room_on(device)
    except RuntimeError:  # after some failures every call to CUDA fails
        return Situation(None, None)
    if stats is None or room is None:
        return Situation(None, None)
    return Situation(stats.allocated_bytes, room.usable_bytes)


class StepLog:
    """Sizes and peaks of the steps of a loop, and which step is running."""

    def __init__(self) -> None:
        self.batch_size: int | None = None
        self.start: AllocatorStats | None = None
        self.first_start_bytes: int | None = None
        self.n_steps = 0
        self.is_plain = True
        """Whether the step was one pass over its batch: else its peak is not that of so many samples."""
        self.thrash = Thrash()
        self._needs: dict[int, tuple[int, int]] = {}  # batch size: base and peak, the largest of each

    def step(self, n_samples: int | None, device: torch.device, /) -> "_Step":
        """Return a context around one step with a batch of `n_samples`."""
        return _Step(self, n_samples, device)

    def worked(self, n_samples: int, base_bytes: int, peak_bytes: int, /) -> None:
        """Note that a step of `n_samples` began at `base_bytes` and got by with `peak_bytes`."""
        base, peak = self._needs.get(n_samples, (0, 0))
        if len(self._needs) < _MAX_SIZES or n_samples in self._needs:
            self._needs[n_samples] = max(base, base_bytes), max(peak, peak_bytes)

    def fit(self) -> tuple[float, float] | None:
        """Return base and bytes per sample of the steps that worked: peak = base + bytes_per_sample * n.

        With one batch size, the base is what was allocated before the step. With several, it is the least
        squares line through the peaks.
        """
        needs = [(n, base, peak) for n, (base, peak) in self._needs.items() if n > 0]
        if not needs:
            return None
        mean_n = sum(n for n, _, _ in needs) / len(needs)
        mean_peak = sum(peak for _, _, peak in needs) / len(needs)
        spread = sum((n - mean_n) ** 2 for n, _, _ in needs)
        if spread:
            slope = sum((n - mean_n) * (peak - mean_peak) for n, _, peak in needs) / spread
            return mean_peak - slope * mean_n, slope
        n, base, peak = needs[0]
        return float(base), (peak - base) / n

    @property
    def growth_bytes(self) -> int:
        """How much more is allocated at the start of the step than was at the start of the second."""
        if self.start is None or self.first_start_bytes is None:
            return 0
        return self.start.allocated_bytes - self.first_start_bytes


class _Step(AbstractContextManager["_Step", None]):
    """One step: while it runs the log knows its size; when it ends well the log keeps its peak."""

    def __init__(self, log: StepLog, n_samples: int | None, device: torch.device) -> None:
        self._log, self._n_samples, self._device = log, n_samples, device
        self._scope = peak_scope(device)

    def __enter__(self) -> Self:
        log = self._log
        self._scope.__enter__()
        log.batch_size, log.start = self._n_samples, self._scope.start
        work.now.n_samples = self._n_samples
        log.is_plain = True
        log.n_steps += 1
        if log.n_steps == 2 and log.start is not None:  # the first step makes the optimizer's state
            log.first_start_bytes = log.start.allocated_bytes
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self._scope.__exit__(None, None, None)
        work.now.n_samples = None
        peak, start = self._scope.peak_allocated_bytes, self._scope.start
        is_known = error is None and self._log.is_plain
        if is_known and peak is not None and start is not None and self._n_samples:
            self._log.worked(self._n_samples, start.allocated_bytes, peak)
        if self._scope.end is not None:
            self._log.thrash.has_risen(self._scope.end.n_alloc_retries, self._device)


def suggest(
    log: StepLog, n_samples: int | None, base_bytes: int | None, now: Situation, requested_bytes: int | None
) -> Suggestion:
    """Return the batch size to try after a step of `n_samples` failed.

    From steps that worked: the largest n with base + bytes_per_sample * n within 95 % of what is usable. With
    none: the failed step had come to `allocated + requested`, so at most n * (usable - base) / (that - base)
    fits, and half of n is tried where that is less. Always below n; rounded down to a multiple of 8 from 8
    on, of 32 from 256 on.
    """
    if n_samples is None:
        return Suggestion(None, "Try a smaller batch.")
    if n_samples <= 1:
        return Suggestion(None, "The batch cannot get smaller.")
    line, usable = log.fit(), now.usable_bytes
    if line is not None and usable is not None and line[1] > 0:
        return _from_steps(n_samples, line, usable)
    if now.allocated_bytes is not None and usable is not None and base_bytes is not None:
        return _from_failure(n_samples, base_bytes, now.allocated_bytes + (requested_bytes or 0), usable)
    return Suggestion(
        round_down(n_samples // 2), f"half of {n_samples}, since what a sample needs was not measured."
    )


def _from_steps(n_samples: int, line: tuple[float, float], usable_bytes: int) -> Suggestion:
    base, per_sample = line
    fits = int((_USABLE * usable_bytes - base) / per_sample)
    if fits < 1:
        return Suggestion(
            None, f"Not one sample fits beside the {format_bytes(int(base))} held between steps."
        )
    if fits < n_samples:
        needed = f"{format_bytes(int(base))} + {format_bytes(int(per_sample))} a sample"
        reason = f"the steps that worked needed {needed}, and {format_bytes(usable_bytes)} can be used."
        return Suggestion(round_down(fits), reason)
    reason = f"by the steps that worked {n_samples} should fit, so something else took the memory."
    return Suggestion(round_down(n_samples * 3 // 4), reason)


def _from_failure(n_samples: int, base_bytes: int, reached_bytes: int, usable_bytes: int) -> Suggestion:
    fits = int(n_samples * (_USABLE * usable_bytes - base_bytes) / max(reached_bytes - base_bytes, 1))
    if fits < 1:
        held = format_bytes(base_bytes)
        return Suggestion(None, f"Not one sample fits beside the {held} that were held before the step.")
    if fits >= n_samples // 2:
        return Suggestion(round_down(n_samples // 2), f"half of {n_samples}, as no step has worked yet.")
    reason = (
        f"the step had come to {format_bytes(reached_bytes)}, and {format_bytes(usable_bytes)} can be used."
    )
    return Suggestion(round_down(fits), reason)


def round_down(n_samples: int) -> int:
    """Return a batch size of round numbers that is not larger."""
    step = 32 if n_samples >= 256 else 8 if n_samples >= 8 else 1
    return max(n_samples // step * step, 1)


def logged_steps(
    log: StepLog,
    batches: Iterable[T],
    device: torch.device,
    size_of: Callable[[T], int | None],
    monitor: Monitor | None,
) -> Iterator[T]:
    """Yield the batches, logging each as a step; holds no batch while it is in use."""
    for held in map(_boxed, batches):  # a loop variable bound to the batch would keep it alive
        phase = nullcontext() if monitor is None else monitor.phase("step")
        with phase, log.step(size_of(held[0]), device):
            yield held.pop()
    log.batch_size = None


def _boxed(batch: T) -> list[T]:
    return [batch]
