"""CUDA events that are recorded again once nobody needs them: making one takes as long as recording two."""

from collections.abc import Iterable

import torch


class Events:
    """Those that are idle, of one loader, for its thread and the loop's."""

    def __init__(self) -> None:
        self._idle: list[torch.cuda.Event] = []

    def mark(self, stream: torch.cuda.Stream, /) -> torch.cuda.Event:
        """Record an idle one, or a new one."""
        try:
            event = self._idle.pop()
        except IndexError:
            # Waiting for one must sleep: a GPU that lags behind would otherwise cost a core of spinning.
            event = torch.cuda.Event(enable_timing=True, blocking=True)
        event.record(stream)
        return event

    def give_back(self, events: Iterable[torch.cuda.Event], /) -> None:
        """Take some that the device has passed, and that nobody asks, reads or waits for any more."""
        self._idle += events


class Gate:
    """An event behind all earlier use of memory that was set aside, which is free once it is passed.

    The loop asks for a batch just there, so the record of the pass reads it too.
    """

    __slots__ = ("event", "is_needed")

    def __init__(self, event: torch.cuda.Event, *, is_needed: bool) -> None:
        self.event = event
        self.is_needed = is_needed
        """Whether a copy that is yet to be enqueued may wait for it; else it may be recorded again."""
