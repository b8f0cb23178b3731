"""Device memory set aside for batches to come.

It is allocated on the consumer's stream, and in its thread, before the batch is there: by the layout of the
recent ones. For the first, and for what does not fit, that is done in the copying thread.
"""

from collections import deque
from typing import NamedTuple

import torch

from torchfast._loader.events import Events, Gate
from torchfast._loader.modes import outside_inference_mode
from torchfast._loader.plan import Layout, Plan, bytes_of, empty


class Blank(NamedTuple):
    """Device memory for a batch to come, free as soon as the gate is passed."""

    layouts: tuple[Layout, ...]
    buffers: list[torch.Tensor]
    stream: torch.cuda.Stream
    gate: Gate


class Blanks:
    """Sets memory aside, and finds out how much."""

    def __init__(self, device: torch.device, events: Events) -> None:
        self._device = device
        self._events = events
        self._recent: deque[Plan] = deque(maxlen=8)
        self._expected: tuple[Layout, ...] = ()
        self._resting: deque[Blank] = deque()

    def set_aside(self, stream: torch.cuda.Stream, /) -> Blank:
        """Return memory for a batch like the recent ones; none where there is no telling, or no room."""
        try:
            return self._allocate(self._expected, stream)
        except torch.OutOfMemoryError:
            # Not the step's business: the batch will ask for its memory itself, and fail for itself.
            return self._allocate((), stream)

    def rested(self, blank: Blank, copy_stream: torch.cuda.Stream, /) -> Blank | None:
        """Poison memory once its last use is over, and return what was poisoned two batches ago."""
        copy_stream.wait_event(blank.gate.event)
        with torch.cuda.stream(copy_stream):
            for buffer in blank.buffers:
                bytes_of(buffer).fill_(0xFF)
        gate = Gate(self._events.mark(copy_stream), is_needed=True)
        self._resting.append(blank._replace(gate=gate))
        rested = self._resting.popleft() if len(self._resting) > 2 else None
        if rested is None or not rested.buffers:
            return None
        # A batch that does not fit drops it unused: who gets it next must not get it before it is poisoned.
        rested.stream.wait_event(rested.gate.event)
        return rested

    def fitting(self, blank: Blank | None, plan: Plan, stream: torch.cuda.Stream, /) -> Blank:
        """Return memory for a batch: what was set aside, if it fits. The next is expected to be like it."""
        self._expect(plan)
        wanted = plan.buffer_layouts
        if blank is not None and len(blank.layouts) == len(wanted):
            pairs = zip(blank.layouts, wanted, strict=True)
            if blank.layouts is wanted or all(layout.n_bytes >= want.n_bytes for layout, want in pairs):
                return blank
        with torch.cuda.stream(stream):
            return self._allocate(wanted, stream)

    def expect_none(self) -> None:
        """Expect that the next batch needs no memory set aside."""
        self._expected = ()

    def _expect(self, plan: Plan) -> None:
        """Expect, buffer by buffer, the largest of the recent batches that are built like this one."""
        recent = self._recent
        recent.append(plan)
        if recent.count(plan) == len(recent):
            self._expected = plan.buffer_layouts
            return
        alike = [
            other.buffer_layouts for other in recent if len(other.buffer_layouts) == len(plan.buffer_layouts)
        ]
        self._expected = tuple(
            max(layouts, key=lambda layout: layout.n_bytes) for layouts in zip(*alike, strict=True)
        )

    def _allocate(self, layouts: tuple[Layout, ...], stream: torch.cuda.Stream) -> Blank:
        """Allocate on a stream, which is current, and set the gate there."""
        with outside_inference_mode():
            buffers = [empty(layout, self._device) for layout in layouts]
        gate = Gate(self._events.mark(stream), is_needed=bool(layouts))
        return Blank(layouts, buffers, stream, gate)
