"""The ring of pinned buffers through which pageable memory travels, and the team that fills them."""

import time

import torch

from torchfast._bytes import MIB
from torchfast._loader.cpus import cpu_share
from torchfast._loader.plan import CHUNK_BYTES, Group

MAX_TEAM = 16
"""Threads of one host copy. On one H200's host: 4 threads 23 GB/s, 8 40, 16 60, for a link of 55."""

SMALL_TEAM = 2
"""Threads for tensors below 1 MiB: each of them wakes the whole team, and 16 take 1.5 times as long as 2."""


class PinnedBuffer:
    """A piece of pinned memory, the event after which it has been read, and the packed tensors on it."""

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8, device="cpu")
        self.read: torch.cuda.Event | None = None
        self._packed: dict[Group, list[torch.Tensor]] = {}

    def grow(self, n_bytes: int, /) -> None:
        """Make room for so many bytes, to a power of two since the pinning allocator rounds to one."""
        if self.memory.nbytes < n_bytes:
            n_bytes = 1 << (n_bytes - 1).bit_length()
            # On the CPU whatever the default device, which is the loop's business.
            self.memory = torch.empty(n_bytes, dtype=torch.uint8, device="cpu", pin_memory=True)
            self._packed.clear()

    def being_read(self, stream: torch.cuda.Stream, /) -> None:
        """Note that what was enqueued on `stream` so far reads this buffer."""
        if self.read is None:
            # Waiting must sleep: a GPU that lags behind would otherwise cost a core of spinning.
            self.read = torch.cuda.Event(blocking=True)
        self.read.record(stream)

    def packed(self, group: Group, /) -> list[torch.Tensor]:
        """Return the tensors of packed leaves, on this buffer; made once for each group."""
        tensors = self._packed.get(group)
        if tensors is None:
            if len(self._packed) >= 8:
                self._packed.clear()
            tensors = self._packed[group] = group.tensors_on(self.memory, 0)
        return tensors


class PinnedRing:
    """Pinned buffers in turn, each handed out again when its last copy has been read.

    Buffers grow to what is asked of them and then stay: pinning costs a millisecond a megabyte and stalls the
    driver for everybody.
    """

    def __init__(self, n_buffers: int, /) -> None:
        self._buffers = [PinnedBuffer() for _ in range(n_buffers)]
        self._turn = 0
        self.waited_s = 0.0

    def take(self, n_bytes: int, /) -> PinnedBuffer:
        """Return the next buffer, with room for so many bytes, after waiting for its turn without the GIL."""
        self._turn = (self._turn + 1) % len(self._buffers)
        buffer = self._buffers[self._turn]
        if buffer.read is not None and not buffer.read.query():
            began_s = time.perf_counter()
            buffer.read.synchronize()
            self.waited_s += time.perf_counter() - began_s
        buffer.grow(n_bytes)
        return buffer


def team_size(n_workers: int, /) -> int:
    """Return how many threads one host copy may use: of this process's CPUs what its workers leave over.

    Two more are left to the loop and the driver: a member that has to wait for its CPU keeps all waiting.
    """
    return max(1, min(MAX_TEAM, cpu_share() - n_workers - 2))


def piece_bytes(team: int, /) -> int:
    """Return the size of the pieces in which large pageable memory is staged: whole MiB for each of a team.

    A team whose parts begin in the middle of a cache line takes 1.6 times as long.
    """
    return team * max(1, CHUNK_BYTES // MIB // team) * MIB
