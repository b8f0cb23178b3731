"""Objects that can let go of device memory when somebody runs short of it.

A `DeviceLoader` with batches in flight registers itself here; `oom_guard` asks everybody registered to let
go, and whether they draw random numbers. So neither has to know the other.
"""

from contextlib import suppress
from typing import Protocol
from weakref import ref


class Holder(Protocol):
    """An object that keeps device memory which it can do without."""

    def release_memory(self) -> None:
        """Let go of whatever is not needed right now; called between steps, in the caller's thread."""


_holders: dict[int, ref[Holder]] = {}  # asked at every step: going over a WeakSet takes several calls


def register(holder: Holder, /) -> None:
    """Have `holder` asked to let go when memory runs out, for as long as it lives."""
    key = id(holder)
    _holders[key] = ref(holder, lambda _: _holders.pop(key, None))


def release_all() -> int:
    """Ask every registered holder to let go, and return how many were asked.

    One that fails keeps what it holds. Its error is dropped: it would stand in the way of the others, and in
    the place of the failure that made somebody ask.
    """
    holders = [holder for reference in list(_holders.values()) if (holder := reference()) is not None]
    for holder in holders:
        with suppress(Exception):
            holder.release_memory()
    return len(holders)


def draw_beside() -> bool:
    """Say whether a holder may be drawing random numbers in a thread beside the caller's.

    Who puts the generators back to an earlier state would then have those numbers drawn twice. A holder says
    so by an attribute `draws_beside`.
    """
    return any(getattr(reference(), "draws_beside", False) for reference in list(_holders.values()))
