"""A GPU of the imagination: an allocator with its peak register, a driver, other processes, and a clock."""

from typing import Any

import torch

from torchfast import VRAMMonitor
from torchfast._memory import AllocatorStats, DriverMemory, HostMemory, PeakLedger
from torchfast._monitor.probe import Probe, Rest, Source


class FakeAllocator:
    """One device's allocator: a current value, and a register of its peak since the last reset."""

    def __init__(self) -> None:
        self.current = self.peak = 0
        self.ever = 0
        self.is_initialized = True
        self.n_resets = 0

    def allocate(self, n_bytes: int) -> None:
        """Take `n_bytes`, or give them back where negative."""
        self.current = max(0, self.current + n_bytes)
        self.ever += max(0, n_bytes)
        self.peak = max(self.peak, self.current)

    def read(self) -> AllocatorStats | None:
        """Return what PyTorch would: twice as much reserved, a tenth of it in splits."""
        if not self.is_initialized:
            return None
        now, peak = self.current, self.peak
        return AllocatorStats(
            now, 2 * now, now, now, now // 5, peak, 2 * peak, peak, peak, peak // 5, 0, 0, self.ever
        )

    def reset(self) -> None:
        """Begin a new peak, as `torch.cuda.reset_peak_memory_stats` does."""
        self.peak = self.current
        self.n_resets += 1

    def read_and_reset(self) -> AllocatorStats | None:
        """Do both, as the ledger does to open a scope."""
        stats = self.read()
        if stats is not None:
            self.reset()
        return stats


class FakeGPU(FakeAllocator):
    """A GPU of 10,000 bytes, of which this process holds 300 outside PyTorch and others `others_bytes`."""

    total_bytes = 10_000
    outside_bytes = 300

    def __init__(self) -> None:
        super().__init__()
        self.others_bytes = 500
        self.now_s = 0.0
        self.driver_cost_s = 0.0
        self.driver_error: Exception | None = None
        self.n_driver_reads = 0
        self.ledger = PeakLedger(self.read, self.read_and_reset)

    def clock(self) -> float:
        """Return the time, which passes only when something says so."""
        return self.now_s

    def monitor(self, **options: Any) -> VRAMMonitor:
        """Return a monitor of this GPU, by default without a thread."""
        probe = Probe(
            torch.device("cuda", 0),
            Source("allocator", self._stats),
            Source("driver", self._driver),
            Source("rest", self._rest, every_s=1.0),
            Source("host", lambda: HostMemory(7, 8, 9), every_s=1.0),
        )
        options = {"interval_s": None, "_clock": self.clock, **options}
        return VRAMMonitor(_probe=probe, _ledger=self.ledger, **options)

    def _stats(self) -> AllocatorStats:
        stats = self.ledger.read()
        assert stats is not None
        return stats

    def _driver(self) -> DriverMemory:
        self.n_driver_reads += 1
        self.now_s += self.driver_cost_s
        if self.driver_error is not None:
            raise self.driver_error
        used_bytes = 2 * self.current + self.outside_bytes + self.others_bytes
        return DriverMemory(self.total_bytes - used_bytes, self.total_bytes)

    def _rest(self) -> Rest:
        return Rest(self.outside_bytes + self.others_bytes, self.outside_bytes, self.others_bytes, "")
