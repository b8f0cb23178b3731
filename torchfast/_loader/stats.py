"""Where the time of a pass went: what is counted while it runs, and the record that is made of it."""

import itertools
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import torch

from torchfast._bytes import format_bytes
from torchfast._loader.events import Gate

STALL_SHARE = 0.05
"""A pass whose device waited for batches for less of its time than this is bound by its own work."""

READ_EVERY = 8
"""Batches whose events are read together."""


@dataclass(frozen=True, slots=True, repr=False)
class LoaderStats:
    """Where the time of a pass over a `DeviceLoader` went, from its first batch to the latest.

    Times are sums over the pass, in seconds. They overlap: that is what the loader is for.

    Example:
        >>> import torch
        >>> from torchfast import DeviceLoader
        >>> loader = DeviceLoader([torch.zeros(2)] * 4, "cpu")
        >>> for batch in loader:
        ...     pass
        >>> loader.stats.n_batches
        4
    """

    n_batches: int
    """Batches handed out; on a GPU, those whose arrival it has passed."""

    n_bytes: int
    """Bytes that were copied to the device for all of them but the first, from which the times count."""

    elapsed_s: float
    """From the first batch to the latest, on the device's own clock where it has one."""

    load_s: float
    """In the wrapped loader, waiting for its batches."""

    stage_s: float
    """Preparing transfers: copying into pinned memory, enqueueing."""

    copy_s: float
    """The link to the device was busy."""

    stall_s: float
    """The device had nothing to do because a batch was not there yet."""

    stall_copy_s: float
    """Of that, while the batch was being copied; the rest of it, the device waited for the host."""

    wait_s: float
    """The loop's thread stood in `next`. Harmless where the device is behind anyway."""

    @property
    def step_ms(self) -> float:
        """Time from batch to batch."""
        return self.elapsed_s * 1e3 / max(1, self.n_batches - 1)

    @property
    def bytes_per_s(self) -> float:
        """Speed of the link while it was busy; 0.0 if nothing was copied."""
        return self.n_bytes / self.copy_s if self.copy_s else 0.0

    @property
    def overlap_efficiency(self) -> float:
        """Share of the hideable time that was hidden: 1.0 is max(work, copy, host) a step, 0.0 their sum."""
        work_s = max(0.0, self.elapsed_s - self.stall_s)
        parts = (work_s, self.copy_s, self.load_s + self.stage_s)
        serial_s, ideal_s = sum(parts), max(parts)
        hideable_s = serial_s - ideal_s
        if hideable_s <= 0.01 * serial_s:
            return 1.0
        return min(1.0, max(0.0, (serial_s - self.elapsed_s) / hideable_s))

    @property
    def verdict(self) -> str:
        """What bounds the pass: "compute-bound", "transfer-bound", "host-bound"; "unknown" at first."""
        if self.n_batches < 2 or self.elapsed_s <= 0:
            return "unknown"
        if self.stall_s < STALL_SHARE * self.elapsed_s:
            return "compute-bound"
        return "transfer-bound" if self.copy_s > self.load_s + self.stage_s else "host-bound"

    @property
    def advice(self) -> str:
        """What to change, given the verdict."""
        return {
            "compute-bound": "The loader hides behind the work: nothing to gain here.",
            "transfer-bound": "Move fewer bytes: images as uint8, made float by normalize= on the device.",
            "host-bound": "Load faster: more workers, persistent_workers=True, less work for each sample.",
        }.get(self.verdict, "Too few batches to tell.")

    def __repr__(self) -> str:
        """Tell the verdict first, then the times it rests on."""
        if self.verdict == "unknown":
            return f"LoaderStats({self.n_batches} batches: {self.advice})"
        shares = ", ".join(
            f"{name} {seconds / self.elapsed_s:.0%}"
            for name, seconds in (
                ("stalled", self.stall_s),
                ("link busy", self.copy_s),
                ("loading", self.load_s),
                ("staging", self.stage_s),
            )
        )
        if self.copy_s:  # else nothing runs beside anything, as on the CPU
            speed = format_bytes(int(self.bytes_per_s))
            shares = f"{shares}, {speed}/s; overlap {self.overlap_efficiency:.2f}"
        return (
            f"LoaderStats({self.verdict}: {self.n_batches} batches, {self.step_ms:.3g} ms a step; "
            f"{shares}. {self.advice})"
        )


Span = tuple[torch.cuda.Event, torch.cuda.Event]
"""A copy, or some in a row, began and ended."""


class Moment(NamedTuple):
    """Events of one batch that lie on the device's timeline."""

    asked: Gate
    """The loop asked for the batch and all earlier work was done."""

    there: torch.cuda.Event
    """The batch was there: the event of `asked` itself if it was by then."""

    spans: list[Span]
    """Its copies."""

    n_bytes: int

    def is_over(self) -> bool:
        """Say whether the device has passed its events. The loop may have changed its stream between two."""
        return self.there.query() and (self.there is self.asked.event or self.asked.event.query())

    def reusable(self) -> set[torch.cuda.Event]:
        """Return them all, but for a gate that a copy may yet wait for."""
        events = {self.asked.event, self.there, *itertools.chain.from_iterable(self.spans)}
        return events - {self.asked.event} if self.asked.is_needed else events


class Tally:
    """What one pass counts as it goes; the loop's thread and the copying thread never write at one time."""

    def __init__(self) -> None:
        self.n_batches = 0
        self.load_s = 0.0
        self.stage_s = 0.0
        self.wait_s = 0.0
        self.n_bytes = 0
        self._copy_s = 0.0
        self._stall_s = self._stall_copy_s = 0.0
        self._elapsed_s = 0.0
        self._n_read = 0
        self.moments: deque[Moment] = deque()
        """Events of batches, to be read once the device has passed them."""
        self._counted: deque[Moment] = deque()
        """Those that nobody here will read again."""
        self._reading = threading.Lock()
        self._first_there: torch.cuda.Event | None = None
        self._latest: Moment | None = None
        """The one whose arrival tells how long the pass has taken, until that was read."""
        self._began_s = 0.0
        self._before_first = (0.0, 0.0)
        self._at_end: tuple[float, float] | None = None
        """What was loaded and staged by the end, if that has come."""

    def taken(self, waited_s: float) -> None:
        """Count a batch that was handed out after the loop's thread waited so long for it."""
        self.n_batches += 1
        now_s = time.perf_counter()
        if self.n_batches == 1:
            # Starting workers and filling the pipeline are not what a step costs.
            self._began_s = now_s
            self._before_first = (self.load_s, self.stage_s)
            return
        self.wait_s += waited_s
        if not self._is_read_on_device():
            self._elapsed_s = now_s - self._began_s
            self._stall_s = self.wait_s

    def end(self) -> None:
        """Count no more loading and staging: what the thread does from now on is for the next pass."""
        self._at_end = self._at_end or (self.load_s, self.stage_s)  # it may end that, too, before it is begun

    def read_in_turn(self) -> None:
        """Read now and then: a few calls of the driver for each batch would hold up the loop each time."""
        if len(self.moments) >= READ_EVERY:
            self.read()

    def read(self, *, patience_s: float = 0.0) -> None:
        """Read the events that the device has passed, without waiting for any.

        Who reads them already is waited for with patience at most: the collector may run in its midst, and
        end a pass, which waits for the thread that asks here.
        """
        if not self._reading.acquire(timeout=patience_s):
            return
        try:
            while self.moments and self.moments[0].is_over():
                self._add(self.moments.popleft())
            self._measure()
        finally:
            self._reading.release()

    def take_counted(self) -> list[Moment]:
        """Return those whose events, which the device has passed, may be recorded again."""
        return [self._counted.popleft() for _ in range(len(self._counted))]

    def stats(self) -> LoaderStats:
        """Make a record of what is known by now, without waiting for the device."""
        self.read(patience_s=1.0)
        load_s, stage_s = self._at_end or (self.load_s, self.stage_s)
        return LoaderStats(
            n_batches=self._n_read if self._is_read_on_device() else self.n_batches,
            n_bytes=self.n_bytes,
            elapsed_s=self._elapsed_s,
            load_s=load_s - self._before_first[0],
            stage_s=stage_s - self._before_first[1],
            copy_s=self._copy_s,
            stall_s=self._stall_s,
            stall_copy_s=self._stall_copy_s,
            wait_s=self.wait_s,
        )

    def _is_read_on_device(self) -> bool:
        return self._n_read > 0 or len(self.moments) > 0

    def _measure(self) -> None:
        """Read how long the pass has taken: once for all that were added, by a call of the driver."""
        latest = self._latest
        if latest is None or self._first_there is None:
            return
        self._elapsed_s = self._first_there.elapsed_time(latest.there) / 1e3
        self._latest = None
        self._counted.append(latest)

    def _add(self, moment: Moment) -> None:
        self._n_read += 1
        if self._first_there is None:
            self._first_there = moment.there
            return
        latest = self._latest
        self._latest = (
            moment  # before the other goes: an interrupt then loses its events, and none is in twice
        )
        if latest is not None:
            self._counted.append(latest)
        asked, there = moment.asked.event, moment.there
        stall_s = 0.0 if there is asked else asked.elapsed_time(there) / 1e3
        self._stall_s += stall_s
        for began, ended in moment.spans:
            copy_s = began.elapsed_time(ended) / 1e3
            self._copy_s += copy_s
            if stall_s:
                since_asked_s = asked.elapsed_time(began) / 1e3
                self._stall_copy_s += max(0.0, min(since_asked_s + copy_s, stall_s) - max(since_asked_s, 0.0))
        self.n_bytes += moment.n_bytes
