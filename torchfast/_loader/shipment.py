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
from torchfast._loader.pinned_ring import Part
from torchfast._loader.plan import Group, bytes_of

if TYPE_CHECKING:
    from torchfast._loader.stats import Span


class Read:
    """Host memory that the device may still be reading. Once it is not, the event is there for other uses."""

    __slots__ = ("ended", "memory", "stream")

    def __init__(
        self, ended: torch.cuda.Event, stream: torch.cuda.Stream, memory: list[torch.Tensor], /
    ) -> None:
        self.ended: torch.cuda.Event | None = ended
        """Behind the last copy, on the stream."""
        self.stream = stream
        self.memory = memory

    def is_over(self) -> bool:
        """Say whether the device is past it."""
        ended = self.ended  # another thread may let go at any moment
        return ended is None or ended.query()

    def wait(self) -> None:
        """Wait until the device is past it."""
        ended = self.ended
        if ended is not None:
            ended.synchronize()

    def let_go(self) -> None:
        """Drop the memory, and the event."""
        self.ended, self.memory = None, []


_being_read: deque[Read] = deque()


def hold_until_read(
    ended: torch.cuda.Event, stream: torch.cuda.Stream, memory: list[torch.Tensor], /
) -> Read:
    """Hold host memory until the device has passed an event, behind the last copy that reads it."""
    read = Read(ended, stream, memory)
    _being_read.append(read)
    return read


def let_go_of_what_was_read() -> None:
    """Drop the host memory that the device is past.

    A stream that is not past one copy is past none behind it: asking would be a call of the driver for each.
    """
    behind = set[int]()
    for read in list(_being_read):
        if id(read.stream) in behind:
            continue
        if not read.is_over():
            behind.add(id(read.stream))
            continue
        read.let_go()
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
        self._targets.append(target)
        self._sources.append(source)
        self._add(target.data_ptr(), source.data_ptr(), source.nbytes)
        self.reads_directly = True

    def add_group(
        self, targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor], group: Group
    ) -> None:
        """Add copies from pinned memory of the loader's to the places of a group's leaves."""
        first = targets[0].data_ptr()
        self._targets += targets
        self._sources += sources
        # Asking hundreds of targets takes longer than adding up.
        self._to += [first + offset_bytes for offset_bytes in group.offsets_bytes]
        self._from += map(torch.Tensor.data_ptr, sources)
        self._sizes_bytes += group.sizes_bytes
        self.reads_directly = True

    def add_staged(self, part: Part) -> None:
        """Add a copy of what lies in a staging buffer."""
        target, start_bytes, n_bytes, buffer, staged_bytes = part
        self._parts.append(part)
        self._add(target.data_ptr() + start_bytes, buffer.memory.data_ptr() + staged_bytes, n_bytes)
        self.staged_bytes += n_bytes

    def _add(self, target: int, source: int, n_bytes: int) -> None:
        self._to.append(target)
        self._from.append(source)
        self._sizes_bytes.append(n_bytes)

    def enqueue(self) -> None:
        """Enqueue what was added since the last time."""
        if not self._sizes_bytes:
            return
        began = self._mark(self._stream)
        if not self._is_taken_by_the_driver():
            with torch.cuda.stream(self._stream):
                self._copy_by_pytorch()
        ended = self._mark(self._stream)
        buffers = {part.buffer for part in self._parts}
        memory = [*self._sources, *(buffer.memory for buffer in buffers)]
        read = hold_until_read(ended, self._stream, memory)
        self.spans.append((began, ended))
        for buffer in buffers:
            buffer.read = read
        self._begin()

    def _begin(self) -> None:
        self._targets: list[torch.Tensor] = []
        self._sources: list[torch.Tensor] = []
        self._parts: list[Part] = []
        self._to: list[int] = []
        """The addresses of all targets, of tensors and of parts."""
        self._from: list[int] = []
        self._sizes_bytes: list[int] = []

    def _is_taken_by_the_driver(self) -> bool:
        batched = batched_copy()
        return batched is not None and batched(
            self._to, self._from, self._sizes_bytes, self._stream.cuda_stream
        )

    def _copy_by_pytorch(self) -> None:
        targets = [
            bytes_of(target, start_bytes + n_bytes)[start_bytes:]
            for target, start_bytes, n_bytes, _, _ in self._parts
        ]
        sources = [
            buffer.memory[staged_bytes : staged_bytes + n_bytes]
            for _, _, n_bytes, buffer, staged_bytes in self._parts
        ]
        torch._foreach_copy_([*self._targets, *targets], [*self._sources, *sources], non_blocking=True)
