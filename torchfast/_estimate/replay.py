"""Replays a stream of allocations and frees, and keeps what the memory was at every event."""

from array import array
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from torchfast._estimate.allocator import Block, CachingAllocator, OutOfSegmentsError
from torchfast._estimate.events import Event
from torchfast._estimate.settings import AllocatorSettings


@dataclass(frozen=True, slots=True)
class Replay:
    """What the caching allocator did with a stream of events; one entry of each series an event."""

    requested_bytes: "array[int]"
    allocated_bytes: "array[int]"
    reserved_bytes: "array[int]"
    addresses: "array[int]"  # of the block that the event allocated or freed
    segment_log: list[tuple[int, str, int, int]]  # (events before it, action, address, size)
    n_retries: int
    failed_at: int | None  # index of the event that found no memory under the limit, and where it stopped

    @property
    def peak_requested_bytes(self) -> int:
        """The most that the program asked for at once."""
        return max(self.requested_bytes, default=0)

    @property
    def peak_allocated_bytes(self) -> int:
        """The most that the blocks handed out took at once."""
        return max(self.allocated_bytes, default=0)

    @property
    def peak_reserved_bytes(self) -> int:
        """The most that was held from the driver at once."""
        return max(self.reserved_bytes, default=0)

    @property
    def peak_event(self) -> int:
        """The index of the first event at which the allocated bytes are at their peak."""
        return self.allocated_bytes.index(self.peak_allocated_bytes)


def replay(
    events: Iterable[Event],
    settings: AllocatorSettings | None = None,
    *,
    limit_bytes: int | None = None,
    optional: Collection[int] = (),
    new_address: Callable[[int], int] | None = None,
) -> Replay:
    """Replay `events` through the caching allocator, up to the end or to the first that finds no memory.

    Blocks in `optional` are done without where there is none. Takes about 2 µs an event.
    """
    allocator = CachingAllocator(settings, limit_bytes=limit_bytes, new_address=new_address)
    live: dict[int, tuple[Block, int]] = {}
    requested, allocated, reserved, addresses = array("q"), array("q"), array("q"), array("q")
    total, failed_at = 0, None
    for number, size, _ in events:
        if size:
            try:
                block = allocator.allocate(size)
            except OutOfSegmentsError:
                if number not in optional:
                    failed_at = len(requested)
                    break
                addresses.append(0)
            else:
                live[number] = block, size
                addresses.append(block.address)
                total += size
        elif number in live:
            block, freed = live.pop(number)
            addresses.append(block.address)
            allocator.free(block)
            total -= freed
        else:  # it was done without
            addresses.append(0)
        requested.append(total)
        allocated.append(allocator.allocated_bytes)
        reserved.append(allocator.reserved_bytes)
    return Replay(
        requested, allocated, reserved, addresses, allocator.segment_log, allocator.n_retries, failed_at
    )


def fits_in(
    events: Iterable[Event],
    settings: AllocatorSettings | None,
    limit_bytes: int,
    optional: Collection[int] = (),
) -> bool:
    """Say whether the stream runs through under a memory limit; the same as `replay`, without the series."""
    allocator = CachingAllocator(settings, limit_bytes=limit_bytes)
    live: dict[int, Block] = {}
    for number, size, _ in events:
        if size:
            try:
                live[number] = allocator.allocate(size)
            except OutOfSegmentsError:
                if number not in optional:
                    return False
        elif number in live:
            allocator.free(live.pop(number))
    return True


def peak_reserved_bytes(events: Iterable[Event], settings: AllocatorSettings | None) -> int:
    """Return the most that is held from the driver at once; the same as `replay`, without the series."""
    allocator = CachingAllocator(settings)
    live: dict[int, Block] = {}
    peak = 0
    for number, size, _ in events:
        if size:
            live[number] = allocator.allocate(size)
            peak = max(peak, allocator.reserved_bytes)
        else:
            allocator.free(live.pop(number))
    return peak
