"""How pageable memory travels: through a ring of pinned buffers, which a team of threads fills."""

import threading
import time
from typing import TYPE_CHECKING

import torch

from torchfast._bytes import MIB
from torchfast._loader.cpus import chosen_threads, compute_with, cpu_share
from torchfast._loader.helpers import Helpers
from torchfast._loader.plan import CHUNK_BYTES, Group, bytes_of
from torchfast._loader.shared_memory import Dropper, mapped_again

if TYPE_CHECKING:
    from torchfast._loader.shipment import Shipment

MAX_TEAM = 16
"""Threads of one host copy. On one H200's host: 4 threads 23 GB/s, 8 40, 16 60, for a link of 55."""

SMALL_TEAM = 2
"""Threads for tensors below 1 MiB: each of them wakes the whole team, and 16 take 1.5 times as long as 2."""


class OfThread(threading.local):
    """What each thread has for itself: only one that enters has helpers.

    The loop's own has none: an interrupt could end its waiting while others write.
    """

    helpers = Helpers(0, usual_threads=1)


class Staging:
    """Copies what is not pinned into pinned buffers, and adds these to a shipment."""

    def __init__(self, depth: int, n_workers: int) -> None:
        self._ring = PinnedRing(max(8, depth + 2))
        self._team_size = team_size(n_workers)
        self._n_threads = self._usual_threads = 1
        self._has_workers = n_workers > 0
        self._has_staged_large = True
        self._dropper = Dropper()
        self._of_thread = OfThread()

    @property
    def waited_s(self) -> float:
        """How long it has waited for buffers in all."""
        return self._ring.waited_s

    def begin(self) -> None:
        """Begin a pass, in the consumer's thread."""
        self._usual_threads = torch.get_num_threads()
        # Without workers the copying thread runs the loader's own code too, with no more threads than bare.
        self._n_threads = chosen_threads() if self._has_workers else self._usual_threads

    def enter_thread(self) -> None:
        """Give the copying thread its team and its helpers."""
        team = self._team_size if self._has_staged_large else min(SMALL_TEAM, self._team_size)
        compute_with(min(team, self._n_threads))
        n_helpers = min(self._team_size, self._n_threads)
        self._of_thread.helpers = Helpers(n_helpers, usual_threads=self._usual_threads)

    def leave_thread(self) -> None:
        """Let go of what the copying thread has beside it."""
        self._of_thread.helpers.close()
        self._dropper.close()

    def pack(
        self, group: Group, sources: list[torch.Tensor], target: torch.Tensor, shipment: "Shipment"
    ) -> None:
        """Copy small tensors side by side into one buffer; `target` is where the first of them goes."""
        staged = self._ring.take(group.n_bytes)
        self._of_thread.helpers.copy(staged.packed(group), sources, group)
        shipment.add_staged(bytes_of(target, group.n_bytes), staged)
        if group.n_bytes >= MIB:
            shipment.enqueue()  # it flies while the next is staged

    def stage(self, pairs: list[tuple[torch.Tensor, torch.Tensor]], shipment: "Shipment") -> None:
        """Copy the large tensors of a batch piece by piece, one flying while the next is staged."""
        self._has_staged_large = bool(pairs)
        for source, target in pairs:
            again = mapped_again(source) if self._has_workers else None
            if again is None:
                self._stage_bytes(bytes_of(source), bytes_of(target), shipment)
            else:
                self._stage_bytes(torch.frombuffer(again, dtype=torch.uint8), bytes_of(target), shipment)
                self._dropper.take(again)

    def _stage_bytes(self, source: torch.Tensor, target: torch.Tensor, shipment: "Shipment") -> None:
        n_bytes = piece_bytes(self._team_size)
        for piece, there in zip(source.split(n_bytes), target.split(n_bytes), strict=True):
            staged = self._ring.take(piece.nbytes)
            staged.memory[: piece.nbytes].copy_(piece)
            shipment.add_staged(there, staged)
            shipment.enqueue()


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
