"""The copies of one batch: gathered, and enqueued in as few calls as can be, each between two events.

The driver is asked without PyTorch knowing, whose allocator of pinned memory would hand out again what the
device is still to read. So all that a call reads is held here, in one place for all loaders, until the event
behind it has passed: whatever becomes of the batch, the pass and the loader. A pass that ends lets go of
what was read by then, and does not wait for the rest: a device that never gets there, as when another rank
died, would hang it. The next pass of any loader lets go of that.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from torchfast._loader.driver import batched_copy
from torchfast._loader.staging import PinnedBuffer

if TYPE_CHECKING:
    from torchfast._loader.stats import Span

_being_read: deque[tuple[torch.cuda.Event, list[torch.Tensor]]] = deque()


def let_go_of_what_was_read() -> None:
    """Drop the host memory that the device is past."""
    for read in list(_being_read):
        if read[0].query():
            with contextlib.suppress(ValueError):  # another thread has done the same
                _being_read.remove(read)


class Shipment:
    """Copies to the device on one stream."""

    def __init__(
        self, stream: torch.cuda.Stream, mark: Callable[[torch.cuda.Stream], torch.cuda.Event]
    ) -> None:
        self._stream = stream
        self._mark = mark
        self._targets: list[torch.Tensor] = []
        self._sources: list[torch.Tensor] = []
        self._staged: list[PinnedBuffer] = []
        self.spans: list[Span] = []
        self.reads_directly = False
        """Whether the loader's own memory is read once the device gets there."""
        self.staged_bytes = 0

    def add(self, targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
        """Add copies from pinned memory of the loader's."""
        self._targets.extend(targets)
        self._sources.extend(sources)
        self.reads_directly = True

    def add_staged(self, target: torch.Tensor, buffer: PinnedBuffer) -> None:
        """Add a copy of as many bytes as the target has, from the beginning of a staging buffer."""
        self._targets.append(target)
        self._sources.append(buffer.memory[: target.nbytes])
        self._staged.append(buffer)
        self.staged_bytes += target.nbytes

    def enqueue(self) -> None:
        """Enqueue what was added since the last time."""
        targets, sources = self._targets, self._sources
        if not targets:
            return
        began = self._mark(self._stream)
        batched = batched_copy()
        if batched is None or not batched(targets, sources, self._stream.cuda_stream):
            with torch.cuda.stream(self._stream):
                torch._foreach_copy_(targets, sources, non_blocking=True)
        ended = torch.cuda.Event(enable_timing=True)
        ended.record(self._stream)
        _being_read.append((ended, sources))
        self.spans.append((began, ended))
        for buffer in self._staged:
            buffer.being_read(self._stream)
        self._targets, self._sources, self._staged = [], [], []
