"""What the monitor tells: one sample, the peaks of a run, the peaks of a phase."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torchfast._bytes import format_bytes

# The parts of a GPU's memory, in the order in which they are drawn.
PARTS = ("tensors", "cached", "fragmented", "outside", "others", "free")


@dataclasses.dataclass(frozen=True, slots=True)
class VRAMSample:
    """Who held the memory of a device at one moment, in bytes; None where that cannot be known.

    `tensors`, `cached` and `fragmented` are PyTorch's: handed out; kept for new tensors; kept, and stuck in
    segments that are partly in use. `outside` is the rest of this process (CUDA context, kernels, libraries),
    `others` all other processes. `not_pytorch` is `outside` and `others` together, which is known more often
    and more recently than each. The host's memory comes with it: this process's resident part, what is
    available, and the total.

    `sources` names where each number is from, or why it is not known. `time_s` counts from the start of the
    monitor, and `phase` is the phase that was open.

    Example:
        >>> from torchfast import VRAMMonitor
        >>> sample = VRAMMonitor("cpu").sample()
        >>> sample.device, sample.tensors_bytes is None, "tensors" in sample.sources
        ('cpu', True, True)
    """

    time_s: float
    device: str
    phase: str | None
    total_bytes: int | None
    free_bytes: int | None
    tensors_bytes: int | None
    cached_bytes: int | None
    fragmented_bytes: int | None
    outside_bytes: int | None
    others_bytes: int | None
    not_pytorch_bytes: int | None
    host_process_bytes: int | None
    host_free_bytes: int | None
    host_total_bytes: int | None
    n_alloc_retries: int | None
    n_ooms: int | None
    sources: Mapping[str, str]

    @property
    def used_bytes(self) -> int | None:
        """What all processes use together: total less free."""
        if self.total_bytes is None or self.free_bytes is None:
            return None
        return self.total_bytes - self.free_bytes

    @property
    def reserved_bytes(self) -> int | None:
        """What PyTorch took from the driver: tensors, cached and fragmented."""
        if self.tensors_bytes is None or self.cached_bytes is None:
            return None
        return self.tensors_bytes + self.cached_bytes + (self.fragmented_bytes or 0)

    def to_dict(self) -> dict[str, float | int | str | None]:
        """Return the numbers as plain values, fit for JSON."""
        numbers = {name: getattr(self, name) for name in _FIELDS if name != "sources"}
        return {**numbers, "used_bytes": self.used_bytes, "reserved_bytes": self.reserved_bytes}

    def __repr__(self) -> str:
        shown = [("total", self.total_bytes), *((name, getattr(self, f"{name}_bytes")) for name in PARTS)]
        if self.outside_bytes is None:
            shown.append(("not PyTorch", self.not_pytorch_bytes))
        if self.total_bytes is None:
            shown = [("host process", self.host_process_bytes), ("host free", self.host_free_bytes)]
        numbers = ", ".join(f"{name} {size(n_bytes)}" for name, n_bytes in shown)
        return f"VRAMSample({self.device} at {self.time_s:.3f} s: {numbers})"


_FIELDS = tuple(field.name for field in dataclasses.fields(VRAMSample))


@dataclasses.dataclass(frozen=True, slots=True)
class VRAMPeak:
    """The highest values of a run, so far.

    `allocated`, `reserved` and `requested` are exact, from PyTorch's register; with `is_lower_bound` somebody
    else reset it, or memory was taken just as it was read, and the true peak may be higher. `used`, of all
    processes together, and `host_process` are the highest of the samples: what rose and fell between two of
    them is missing.

    Example:
        >>> from torchfast import VRAMMonitor
        >>> with VRAMMonitor("cpu") as vram:
        ...     pass
        >>> vram.peak.allocated_bytes is None, vram.peak.is_lower_bound
        (True, False)
    """

    allocated_bytes: int | None
    reserved_bytes: int | None
    requested_bytes: int | None
    is_lower_bound: bool
    used_bytes: int | None
    host_process_bytes: int | None

    def __repr__(self) -> str:
        if self.allocated_bytes is None:
            return f"VRAMPeak(host process {size(self.host_process_bytes)})"
        at_least = "at least " if self.is_lower_bound else ""
        return (
            f"VRAMPeak({at_least}allocated {size(self.allocated_bytes)}, "
            f"reserved {size(self.reserved_bytes)}, device used {size(self.used_bytes)})"
        )


@dataclasses.dataclass(frozen=True, slots=True)
class VRAMPhase:
    """One phase, over all the times it was closed: `n_times` of them, `total_s` seconds of the host together.

    The peaks are the highest of them all. `kept_bytes` is how much more was allocated when it was last closed
    than when it was opened: what a forward keeps for the backward.

    Example:
        >>> from torchfast import VRAMMonitor
        >>> with VRAMMonitor("cpu") as vram:
        ...     for _ in range(3):
        ...         with vram.phase("step"):
        ...             pass
        >>> vram.phases["step"].n_times
        3
    """

    name: str
    n_times: int
    total_s: float
    peak_allocated_bytes: int | None
    peak_reserved_bytes: int | None
    kept_bytes: int | None
    is_lower_bound: bool


class RankPeak(NamedTuple):
    """A peak of all ranks: the highest one, and the (global) rank that has it; None where no rank knows it.

    Example:
        >>> from torchfast import VRAMMonitor
        >>> with VRAMMonitor("cpu") as vram:
        ...     peaks = vram.across_ranks()
        >>> peaks["host_process_bytes"].rank
        0
    """

    highest_bytes: int | None
    rank: int | None


def size(n_bytes: int | None) -> str:
    """Write a size that may be unknown."""
    return "unknown" if n_bytes is None else format_bytes(n_bytes)


def highest(values: Iterable[int | None]) -> int | None:
    """Return the largest known value, None if none is known."""
    return max((value for value in values if value is not None), default=None)
