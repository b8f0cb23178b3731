"""Reading memory: PyTorch's allocator, the driver, and the ledger of PyTorch's one peak register.

PyTorch keeps one peak register a device: `torch.cuda.max_memory_allocated` is the highest value since the
last `torch.cuda.reset_peak_memory_stats`, whoever called it. Whoever wants the peak of a phase must reset it,
and so spoils the peak of everybody else. Within torchfast nobody touches the register but the ledger here:
it folds the register into every open scope before it resets it, so that scopes may be nested, may overlap,
may belong to different threads, and each still gets its own exact peak.
"""

import os
import threading
from collections.abc import Callable, Mapping
from functools import partial
from operator import call, lt
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, cast

import torch


class AllocatorStats(NamedTuple):
    """What PyTorch's caching allocator says of one device, in bytes and counts.

    `active` is `allocated` plus blocks that were freed while another stream may still use them.
    `inactive_split` is free but cannot be given back: the rest of its segment is in use. The five peaks are
    those of PyTorch's register, that is, since its last reset by anybody: `peak_scope` measures a scope.
    `ever_allocated_bytes` is the sum of all allocations so far, freed or not.
    """

    allocated_bytes: int
    reserved_bytes: int
    active_bytes: int
    requested_bytes: int
    inactive_split_bytes: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    peak_active_bytes: int
    peak_requested_bytes: int
    peak_inactive_split_bytes: int
    n_alloc_retries: int
    n_ooms: int
    ever_allocated_bytes: int

    @property
    def peaks(self) -> tuple[int, ...]:
        """Return the peaks, none of which ever falls except by a reset of the register."""
        return self[5:10]

    @property
    def cached_bytes(self) -> int:
        """Return what PyTorch holds for nobody: whole segments, which it hands out or gives back."""
        return self.reserved_bytes - self.active_bytes - self.inactive_split_bytes


class DriverMemory(NamedTuple):
    """What the driver says of one device: all processes together."""

    free_bytes: int
    total_bytes: int


def allocator_stats(device: torch.device, /) -> AllocatorStats | None:
    """Return what the allocator holds on `device`; None on a CPU, and before CUDA is initialised.

    Initialises nothing. Takes 12 µs back to back and 66 µs with cold caches on an H200, a third of
    `torch.cuda.memory_stats()`, which flattens and sorts all 123 counters.
    """
    if device.type != "cuda" or not torch.cuda.is_initialized():
        return None
    return _parse(_READ(device.index))


def driver_memory(device: torch.device, /) -> DriverMemory | None:
    """Return the device's free and total memory; None where this process has no context on it.

    Asking the driver about a device that the process has not used would create a context there, of several
    hundred MiB: nobody who only wants to look should pay that. Takes 6 to 8 µs back to back.
    """
    if device.type != "cuda" or not torch.cuda.is_initialized() or not _has_context(device):
        return None
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    return DriverMemory(free_bytes, total_bytes)


class Room(NamedTuple):
    """What this process may have of one device, within what `set_per_process_memory_fraction` allows it."""

    limit_bytes: int
    held_bytes: int
    """What PyTorch holds already, in use or cached."""
    untaken_bytes: int
    """What it may still take from the driver."""

    @property
    def usable_bytes(self) -> int:
        """Return what tensors could have, if there were none by now."""
        return self.held_bytes + self.untaken_bytes


def room_on(device: torch.device, /) -> Room | None:
    """Return what this process may have of `device`; None where that is not known, as on a CPU."""
    stats, memory = allocator_stats(device), driver_memory(device)
    if stats is None or memory is None:
        return None
    limit_bytes = int(torch.cuda.get_per_process_memory_fraction(device) * memory.total_bytes)
    untaken_bytes = max(0, min(memory.free_bytes, limit_bytes - stats.reserved_bytes))
    return Room(limit_bytes, stats.reserved_bytes, untaken_bytes)


class HostMemory(NamedTuple):
    """The machine's own memory, and what this process has of it in RAM."""

    process_bytes: int
    free_bytes: int
    total_bytes: int


def host_memory() -> HostMemory | None:
    """Return this process's resident memory and the machine's, available and in all; None without /proc.

    It is the machine's memory that is told: the limit of a container is not looked at.
    """
    try:
        n_pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except (OSError, IndexError, ValueError):
        return None
    kib = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    if "MemAvailable" not in kib:
        return None
    page_bytes = os.sysconf("SC_PAGE_SIZE")
    return HostMemory(n_pages * page_bytes, kib["MemAvailable"] * 1024, kib["MemTotal"] * 1024)


def peak_scope(device: torch.device, /) -> "PeakScope":
    """Return a scope that measures the peak of a block.

    Scopes may be nested and may overlap, in any number of threads. Opening one reads the allocator once or
    twice, closing it once; neither waits for the GPU. Opening resets PyTorch's register: afterwards
    `torch.cuda.max_memory_allocated()` counts from there.

    Example:
        >>> import torch
        >>> from torchfast._memory import peak_scope
        >>> with peak_scope(torch.device("cpu")) as scope:
        ...     _ = torch.zeros(1000)
        >>> scope.peak_allocated_bytes is None  # there is no such register for a CPU
        True
    """
    return PeakScope(ledger_of(device))


class PeakScope:
    """The peaks between the opening and the closing of a scope; while it is open, so far.

    A peak is None on a CPU and as long as CUDA is not initialised. `is_lower_bound` says that the true peak
    may be higher: somebody else was seen to reset the register, or memory was being taken without the
    interpreter's lock at the very moment when another scope opened. `start` and `end` are the allocator's
    state as the scope was opened and closed.
    """

    def __init__(self, ledger: "PeakLedger") -> None:
        self._ledger = ledger
        self._peaks: tuple[int, ...] | None = None
        self.is_lower_bound = False
        self.start: AllocatorStats | None = None
        self.end: AllocatorStats | None = None

    def __enter__(self) -> Self:
        self._ledger._open(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ledger._close(self)

    @property
    def peak_allocated_bytes(self) -> int | None:
        """The highest `torch.cuda.memory_allocated` within the scope."""
        return self._peak(0)

    @property
    def peak_reserved_bytes(self) -> int | None:
        """The highest `torch.cuda.memory_reserved` within the scope."""
        return self._peak(1)

    @property
    def peak_requested_bytes(self) -> int | None:
        """The highest sum of the sizes that the program asked for within the scope."""
        return self._peak(3)

    def peaks(self) -> tuple[int, ...] | None:
        """Return all peaks by one reading, in the order of `AllocatorStats.peaks`."""
        if self in self._ledger._scopes:
            self._ledger.read()
        return self._peaks

    def _peak(self, index: int) -> int | None:
        peaks = self.peaks()
        return None if peaks is None else peaks[index]

    def _fold(self, peaks: tuple[int, ...]) -> None:
        self._peaks = peaks if self._peaks is None else tuple(map(max, self._peaks, peaks))


class PeakLedger:
    """Everybody's peaks from the one register of one device.

    The register only grows between resets, so a value below the last one read betrays a foreign reset. A
    foreign reset after which memory grows past everything read before it cannot be noticed; the more often
    the register is read (a monitor's every sample does), the less can be lost to one.
    """

    def __init__(
        self, read: Callable[[], AllocatorStats | None], read_and_reset: Callable[[], AllocatorStats | None]
    ) -> None:
        self._read, self._read_and_reset = read, read_and_reset
        # Re-entrant, and the list is never changed in place: the garbage collector may close the scope of a
        # dropped monitor in the midst of a reading, in the same thread.
        self._lock = threading.RLock()
        self._scopes: list[PeakScope] = []
        self._last: tuple[int, ...] | None = None

    def read(self) -> AllocatorStats | None:
        """Read the allocator, and fold its peaks into every open scope on the way."""
        with self._lock:
            return self._fold(self._read())

    def _open(self, scope: PeakScope) -> None:
        with self._lock:
            scope.start = self._fold(self._read_and_reset())
            self._last = None
            if scope.start is not None and self._scopes:
                self._check_nothing_was_missed(scope.start)
            self._scopes = [*self._scopes, scope]

    def _close(self, scope: PeakScope) -> None:
        with self._lock:
            if scope in self._scopes:
                scope.end = self._fold(self._read())
                self._scopes = [other for other in self._scopes if other is not scope]

    def _fold(self, stats: AllocatorStats | None) -> AllocatorStats | None:
        if stats is None:
            return None
        peaks = stats.peaks
        foreign = self._last is not None and any(map(lt, peaks, self._last))
        self._last = peaks
        # Every open scope began before the last reset of ours, so the register's whole window lies inside it.
        for scope in self._scopes:
            scope._fold(peaks)
            scope.is_lower_bound |= foreign
        return stats

    def _check_nothing_was_missed(self, before: AllocatorStats) -> None:
        """Note for the open scopes what may have come and gone between the reading and the reset.

        PyTorch has no call that reads and resets at once. What was allocated in between, freed or not, is at
        most what all allocations since the reading add up to.
        """
        after = self._fold(self._read())
        if after is None or after.ever_allocated_bytes == before.ever_allocated_bytes:
            return
        n_bytes = before.allocated_bytes + after.ever_allocated_bytes - before.ever_allocated_bytes
        for scope in self._scopes:
            scope.is_lower_bound |= scope._peaks is None or n_bytes > scope._peaks[0]


_ledgers: dict[torch.device, PeakLedger] = {}


def ledger_of(device: torch.device, /) -> PeakLedger:
    """Return the one ledger that this process keeps for `device`."""
    ledger = _ledgers.get(device)
    if ledger is None:
        # setdefault is atomic: two threads that come first get the same ledger.
        ledger = _ledgers.setdefault(
            device,
            PeakLedger(lambda: allocator_stats(device), lambda: _read_and_reset(device)),
        )
    return ledger


def _after_fork() -> None:
    # Another thread may have held a lock at the moment of the fork; in the child it would stay locked.
    for ledger in _ledgers.values():
        ledger._lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _read_and_reset(device: torch.device) -> AllocatorStats | None:
    if device.type != "cuda" or not torch.cuda.is_initialized():
        return None
    # Both calls are made from C: between two lines of Python another thread could be given its turn, and
    # allocate and free for milliseconds what neither the reading nor the register would show.
    both = (partial(_READ, device.index), partial(_RESET, device.index))
    answers = list(map(cast(Any, call), both))  # mypy cannot type operator.call over a tuple
    return _parse(answers[0])


def _parse(stats: Mapping[str, Any]) -> AllocatorStats | None:
    if not stats:
        return None
    allocated, reserved, active = (
        stats[f"{name}_bytes"]["all"] for name in ("allocated", "reserved", "active")
    )
    requested, split = stats["requested_bytes"]["all"], stats["inactive_split_bytes"]["all"]
    return AllocatorStats(
        allocated["current"],
        reserved["current"],
        active["current"],
        requested["current"],
        split["current"],
        allocated["peak"],
        reserved["peak"],
        active["peak"],
        requested["peak"],
        split["peak"],
        stats["num_alloc_retries"],
        stats["num_ooms"],
        allocated["allocated"],
    )


# The public functions do the same by way of Python; a CPU build has only them.
_READ: Callable[[int], Mapping[str, Any]] = getattr(
    torch._C, "_cuda_memoryStats", torch.cuda.memory_stats_as_nested_dict
)
_RESET: Callable[[int], object] = getattr(
    torch._C, "_cuda_resetPeakMemoryStats", torch.cuda.reset_peak_memory_stats
)


def _has_context(device: torch.device) -> bool:
    private = getattr(torch._C, "_cuda_hasPrimaryContext", None)
    if private is not None:
        return bool(private(device.index))
    if device.index == torch.cuda.current_device():
        return True
    stats = allocator_stats(device)
    return stats is not None and stats.reserved_bytes > 0
