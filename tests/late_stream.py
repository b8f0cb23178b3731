"""A device for tests without a GPU: one stream, which gets to what was enqueued when it is told to."""

import ctypes
from collections import deque
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from torchfast._loader import shipment
from torchfast._loader.shipment import Shipment


class LateStream:
    """A stream whose copies are made when it is told to, or somebody waits for them."""

    cuda_stream = 0

    def __init__(self) -> None:
        self._copies = deque[tuple[int, int, int]]()
        self.n_enqueued = self.n_done = 0

    def enqueue(self, targets: list[int], sources: list[int], sizes_bytes: list[int], _: int) -> bool:
        """Take copies as the driver does."""
        self._copies += zip(targets, sources, sizes_bytes, strict=True)
        self.n_enqueued += len(targets)
        return True

    def event(self, **_: object) -> "LateEvent":
        """Return an event of this stream."""
        return LateEvent(self)

    def mark(self, _: object = None) -> "LateEvent":
        """Return an event behind what was enqueued so far."""
        event = self.event()
        event.record(self)
        return event

    def wait_event(self, _: object) -> None:
        """Wait for another stream, which here is never behind."""

    def shipment(self) -> Any:
        """Return a shipment of copies on this stream."""
        one: Any = Shipment  # which is given a stream of the imagination
        return one(self, self.mark)

    def replace_the_device(self, patch: pytest.MonkeyPatch) -> None:
        """Let all that is enqueued and recorded be so on this stream."""
        patch.setattr(torch.cuda, "Event", self.event)
        patch.setattr(torch.cuda, "stream", lambda _: nullcontext())
        patch.setattr(shipment, "_being_read", type(shipment._being_read)())
        patch.setattr(shipment, "batched_copy", lambda: self.enqueue)

    def go_on_to(self, n_done: int) -> None:
        """Make copies until so many have been made in all."""
        while self.n_done < min(n_done, self.n_enqueued):
            ctypes.memmove(*self._copies.popleft())
            self.n_done += 1


class LateEvent:
    """A point in such a stream."""

    def __init__(self, stream: LateStream) -> None:
        self._stream, self._at = stream, 0

    def record(self, _: object) -> None:
        """Take what was enqueued so far."""
        self._at = self._stream.n_enqueued

    def query(self) -> bool:
        """Say whether the stream got there."""
        return self._stream.n_done >= self._at

    def synchronize(self) -> None:
        """Let the stream get there."""
        self._stream.go_on_to(self._at)

    def elapsed_time(self, _: object) -> float:
        """Return no time at all."""
        return 0.0
