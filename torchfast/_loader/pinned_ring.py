"""Pinned memory through which pageable batches travel."""

import time
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

import torch

from torchfast._bytes import MIB
from torchfast._loader.plan import Group

if TYPE_CHECKING:
    from torchfast._loader.shipment import Read

LARGE_BYTES = 16 * MIB
N_LARGE = 4
"""Pinned buffers for more than that: 256 MiB at most, beside 128 of small ones."""


class PinnedRing:
    """Pinned buffers in turn, each handed out again when its last copy has been read.

    Buffers grow to what is asked of them and then stay: pinning costs a millisecond a megabyte and stalls the
    driver for everybody. Many small ones let the loop run ahead of the device; of large ones there are few.
    """

    def __init__(self, n_small: int, /) -> None:
        self._small = deque(PinnedBuffer() for _ in range(n_small))
        self._large = deque(PinnedBuffer() for _ in range(N_LARGE))
        self.waited_s = 0.0

    def take(self, n_bytes: int, /) -> "PinnedBuffer":
        """Return the next buffer, with room for so many bytes, after waiting for its turn without the GIL."""
        buffers = self._large if n_bytes > LARGE_BYTES else self._small
        buffers.rotate(-1)
        buffer, read = buffers[0], buffers[0].read
        if read is not None and not read.is_over():
            began_s = time.perf_counter()
            read.wait()
            self.waited_s += time.perf_counter() - began_s
        buffer.grow(n_bytes)
        return buffer


class PinnedBuffer:
    """A piece of pinned memory, the last copy that reads it, and the packed tensors on it."""

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8, device="cpu")
        self.read: Read | None = None
        self._packed: dict[Group, list[torch.Tensor]] = {}

    def grow(self, n_bytes: int, /) -> None:
        """Make room for so many bytes, to a power of two since the pinning allocator rounds to one."""
        if self.memory.nbytes < n_bytes:
            n_bytes = 1 << (n_bytes - 1).bit_length()
            # On the CPU whatever the default device, which is the loop's business.
            self.memory = torch.empty(n_bytes, dtype=torch.uint8, device="cpu", pin_memory=True)
            self._packed.clear()

    def packed(self, group: Group, /) -> list[torch.Tensor]:
        """Return the tensors of packed leaves, on this buffer; made once for each group."""
        tensors = self._packed.get(group)
        if tensors is None:
            if len(self._packed) >= 8:
                self._packed.clear()
            tensors = self._packed[group] = group.tensors_on(self.memory, 0)
        return tensors


class Part(NamedTuple):
    """Bytes of a tensor on the device, and those of a staging buffer that go there."""

    target: torch.Tensor
    start_bytes: int
    n_bytes: int
    buffer: PinnedBuffer
    staged_bytes: int
    """Where in the buffer they begin."""
