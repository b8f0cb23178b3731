"""Where a sample's numbers come from: the sources, each with its own pace."""

import os
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from torchfast._memory import (
    AllocatorStats,
    DriverMemory,
    HostMemory,
    driver_memory,
    host_memory,
    ledger_of,
)
from torchfast._monitor.sample import VRAMSample
from torchfast._nvml import Nvml, Unknown, shares

T = TypeVar("T")
Clock = Callable[[], float]

# No source takes more than this part of the time: one that needs 8 ms (seen of cudaMemGetInfo in a container)
# is asked at most every 0.8 s, whatever interval was wanted.
_SHARE = 0.01
# The list of processes and the host's memory change slowly and cost more than the rest together.
_SLOW_S = 1.0
_N_ERRORS_KEPT = 20


class Rest(NamedTuple):
    """What a device holds that is not PyTorch's: of this process, of the others, and both together."""

    not_pytorch_bytes: int
    outside_bytes: int | None
    others_bytes: int | None
    why: str


class Source(Generic[T]):
    """Something to be read, not more often than `every_s` and than its own cost allows.

    A reading that raises `Unknown` says why the number cannot be known. Any other exception is an error: it
    is kept for the report, and the source is asked again later and later.
    """

    def __init__(self, label: str, read: Callable[[], T], *, every_s: float = 0.0) -> None:
        self.label, self._read, self._every_s = label, read, every_s
        self.value: T | None = None
        self.reason = "not read yet"
        self.errors: deque[str] = deque(maxlen=_N_ERRORS_KEPT)
        self.n_errors = 0
        self._n_failed = 0
        self._read_s = self._due_s = float("-inf")

    def get(self, clock: Clock, *, fresh: bool) -> T | None:
        """Return the value, read anew where it is due or where `fresh` demands it."""
        start_s = clock()
        if fresh or start_s >= self._due_s:
            self._ask()
            self._read_s = start_s
            cost_s = clock() - start_s
            again_s = min(2**self._n_failed, 64) if self._n_failed else 0
            self._due_s = start_s + max(self._every_s, cost_s / _SHARE, again_s)
        return self.value

    def origin(self, now_s: float) -> str:
        """Say where the value is from, or why there is none."""
        if self.value is None:
            return f"not known: {self.reason}"
        age_s = now_s - self._read_s
        return self.label if age_s < 1e-3 else f"{self.label}, read {age_s:.2g} s before"

    def _ask(self) -> None:
        try:
            self.value = self._read()
            self._n_failed = 0
        except Unknown as unknown:
            self.value, self.reason = None, str(unknown)
            self._n_failed = 0
        except Exception as error:  # noqa: BLE001 - whatever a source raises, the training it watches goes on
            self.value, self.reason = None, f"reading it failed with {type(error).__name__}: {error}"
            self.errors.append(f"{self.label}: {type(error).__name__}: {error}")
            self.n_errors += 1
            self._n_failed += 1


class Probe:
    """All the sources of one device, and the sample that they make together."""

    def __init__(
        self,
        device: torch.device,
        allocator: Source[AllocatorStats],
        driver: Source[DriverMemory],
        rest: Source[Rest],
        host: Source[HostMemory],
    ) -> None:
        self.device = device
        self._allocator, self._driver, self._rest, self._host = allocator, driver, rest, host
        self._counts_splits, self._why_no_splits = _counts_splits()

    def errors(self) -> list[str]:
        """Return what went wrong in the sources, the last few of each."""
        return [error for source in self._all() for error in source.errors]

    def n_errors(self) -> int:
        """Return how often a source failed."""
        return sum(source.n_errors for source in self._all())

    def forget_errors(self) -> None:
        """Begin anew: what went wrong in an earlier run is not this one's."""
        for source in self._all():
            source.errors.clear()
            source.n_errors = 0

    def sample(self, clock: Clock, start_s: float, phase: str | None, *, fresh: bool) -> VRAMSample:
        """Read what is due, or everything if `fresh`, and put it together."""
        stats = self._allocator.get(clock, fresh=fresh)
        driver = self._driver.get(clock, fresh=fresh)
        rest = self._rest.get(clock, fresh=fresh)
        host = self._host.get(clock, fresh=fresh)
        now_s = clock()
        split = stats.inactive_split_bytes if stats and self._counts_splits else None
        return VRAMSample(
            time_s=now_s - start_s,
            device=str(self.device),
            phase=phase,
            total_bytes=driver and driver.total_bytes,
            free_bytes=driver and driver.free_bytes,
            tensors_bytes=stats and stats.allocated_bytes,
            cached_bytes=stats and stats.reserved_bytes - stats.allocated_bytes - (split or 0),
            fragmented_bytes=split,
            outside_bytes=rest and rest.outside_bytes,
            others_bytes=rest and rest.others_bytes,
            not_pytorch_bytes=rest and rest.not_pytorch_bytes,
            host_process_bytes=host and host.process_bytes,
            host_free_bytes=host and host.free_bytes,
            host_total_bytes=host and host.total_bytes,
            n_alloc_retries=stats and stats.n_alloc_retries,
            n_ooms=stats and stats.n_ooms,
            sources=self._origins(now_s),
        )

    def _origins(self, now_s: float) -> dict[str, str]:
        allocator, driver = self._allocator.origin(now_s), self._driver.origin(now_s)
        rest, host = self._rest.origin(now_s), self._host.origin(now_s)
        splits = allocator if self._counts_splits else f"not known: {self._why_no_splits}"
        outside = others = rest
        if self._rest.value is not None and self._rest.value.why:
            others = f"not known: {self._rest.value.why}"
            outside = others if self._rest.value.outside_bytes is None else rest
        return {
            "total": driver,
            "free": driver,
            "tensors": allocator,
            "cached": allocator,
            "fragmented": splits,
            "outside": outside,
            "others": others,
            "not_pytorch": rest,
            "host": host,
        }

    def _all(self) -> tuple[Source[Any], ...]:
        return (self._allocator, self._driver, self._rest, self._host)


def probe_of(device: torch.device) -> Probe:
    """Return the sources of a real device."""
    ledger = ledger_of(device)

    def allocator() -> AllocatorStats:
        stats = ledger.read()
        if stats is None:
            raise Unknown(_why_unread(device))
        return stats

    def driver() -> DriverMemory:
        memory = driver_memory(device)
        if memory is None:
            raise Unknown(_why_unread(device))
        return memory

    def host() -> HostMemory:
        memory = host_memory()
        if memory is None:
            raise Unknown("this system has no /proc")
        return memory

    return Probe(
        device,
        Source("PyTorch's allocator", allocator),
        Source("the CUDA driver", driver),
        Source("the CUDA driver and NVML", _RestReader(device, allocator, driver).read, every_s=_SLOW_S),
        Source("/proc", host, every_s=0.0 if device.type == "cpu" else _SLOW_S),
    )


class _RestReader:
    """Reads what is not PyTorch's; opens NVML when it is first needed, in the thread that needs it."""

    def __init__(
        self,
        device: torch.device,
        allocator: Callable[[], AllocatorStats],
        driver: Callable[[], DriverMemory],
    ) -> None:
        self._device, self._allocator, self._driver = device, allocator, driver
        self._nvml: Nvml | None = None

    def read(self) -> Rest:
        """Read driver and NVML between two readings of the allocator that agree.

        The training goes on meanwhile: a segment taken from the driver between two readings would look like
        somebody else's memory.
        """
        reserved_bytes = self._allocator().reserved_bytes
        for _ in range(3):
            driver = self._driver()
            used_bytes = driver.total_bytes - driver.free_bytes
            outside_bytes, others_bytes, why = self._apart(used_bytes, reserved_bytes)
            before_bytes, reserved_bytes = reserved_bytes, self._allocator().reserved_bytes
            if reserved_bytes == before_bytes:
                return Rest(max(0, used_bytes - reserved_bytes), outside_bytes, others_bytes, why)
        raise Unknown("PyTorch took or gave back memory each time while it was read")

    def _apart(self, used_bytes: int, reserved_bytes: int) -> tuple[int | None, int | None, str]:
        try:
            if self._nvml is None:
                self._nvml = Nvml(self._device)
            own = shares(self._nvml.used_by_process(), used_bytes, reserved_bytes)
        except Unknown as unknown:
            return None, None, str(unknown)
        return own.own_bytes - reserved_bytes, own.others_bytes, own.why


def _why_unread(device: torch.device) -> str:
    if device.type != "cuda":
        return f"device {device} has no CUDA allocator"
    if not torch.cuda.is_initialized():
        return "CUDA is not initialised in this process"
    return f"this process has not used {device} yet"


def _counts_splits() -> tuple[bool, str]:
    """Return whether PyTorch's allocator counts the free parts of segments in use, and if not, why."""
    if torch.version.cuda is None and torch.version.hip is None:
        return True, ""
    if torch.cuda.get_allocator_backend() != "native":
        return False, f"the {torch.cuda.get_allocator_backend()} allocator does not count it"
    # PYTORCH_ALLOC_CONF is the name since 2.9; the others still work.
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
    if any("expandable_segments:true" in os.environ.get(name, "").lower().replace(" ", "") for name in names):
        return False, "with expandable_segments the allocator does not count it"
    return True, ""
