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
from torchfast._loader.plan import Group
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
        self._begin()
        self.spans: list[Span] = []
        self.reads_directly = False
        """Whether the loader's own memory is read once the device gets there."""
        self.staged_bytes = 0

    def add(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Add a copy from pinned memory of the loader's."""
        self._add(target, source)
        self.reads_directly = True

    def add_group(
        self, targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor], group: Group
    ) -> None:
        """Add copies from pinned memory of the loader's to the places of a group's leaves."""
        first = targets[0].data_ptr()
        self._targets += targets
        self._addresses += [first + offset_bytes for offset_bytes in group.offsets_bytes]
        self._sources += sources
        self._sizes_bytes += group.sizes_bytes
        self.reads_directly = True

    def add_staged(self, target: torch.Tensor, staged: torch.Tensor, buffer: PinnedBuffer) -> None:
        """Add a copy of bytes that lie in a staging buffer."""
        self._add(target, staged)
        self._staged.add(buffer)
        self.staged_bytes += staged.nbytes

    def _add(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self._targets.append(target)
        self._addresses.append(target.data_ptr())
        self._sources.append(source)
        self._sizes_bytes.append(source.nbytes)

    def enqueue(self) -> None:
        """Enqueue what was added since the last time."""
        targets, sources = self._targets, self._sources
        if not targets:
            return
        began = self._mark(self._stream)
        if not self._is_taken_by_the_driver():
            with torch.cuda.stream(self._stream):
                torch._foreach_copy_(targets, sources, non_blocking=True)
        ended = torch.cuda.Event(enable_timing=True)
        ended.record(self._stream)
        _being_read.append((ended, sources))
        self.spans.append((began, ended))
        for buffer in self._staged:
            buffer.being_read(self._stream)
        self._begin()

    def _begin(self) -> None:
        self._targets: list[torch.Tensor] = []
        self._addresses: list[int] = []
        """Where the targets are: asking hundreds of tensors takes longer than adding up."""
        self._sources: list[torch.Tensor] = []
        self._sizes_bytes: list[int] = []
        self._staged: set[PinnedBuffer] = set()

    def _is_taken_by_the_driver(self) -> bool:
        batched = batched_copy()
        if batched is None:
            return False
        sources = [*map(torch.Tensor.data_ptr, self._sources)]
        return batched(self._addresses, sources, self._sizes_bytes, self._stream.cuda_stream)
