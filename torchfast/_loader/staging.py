"""How pageable memory travels: through a ring of pinned buffers, which a team of threads fills."""

import threading

import torch

from torchfast._bytes import MIB
from torchfast._loader.cpus import chosen_threads, compute_with, cpu_share
from torchfast._loader.helpers import Helpers
from torchfast._loader.host_memory import bytes_on, memory_of
from torchfast._loader.pinned_ring import Part, PinnedRing
from torchfast._loader.plan import CHUNK_BYTES, Group, aligned
from torchfast._loader.shared_memory import Dropper, mapped_again
from torchfast._loader.shipment import Shipment

MAX_TEAM = 16
"""Threads of one host copy. On one H200's host: 4 threads 23 GB/s, 8 40, 16 60, for a link of 55."""

PAGE_BYTES = 4096


class OfThread(threading.local):
    """What each thread has for itself: only one that enters has helpers, and reads memory of workers.

    The loop's own has none: an interrupt could end its waiting while others write.
    """

    helpers = Helpers(0, usual_threads=1)
    dropper = Dropper()


class Staging:
    """Copies what is not pinned into pinned buffers, and adds these to a shipment."""

    def __init__(self, depth: int, n_workers: int) -> None:
        self._ring = PinnedRing(max(8, depth + 2))
        self._max_team = team_size(n_workers)
        self._team = self._usual_threads = 1
        self._has_workers = n_workers > 0
        self._of_thread = OfThread()

    @property
    def waited_s(self) -> float:
        """How long it has waited for buffers in all."""
        return self._ring.waited_s

    def begin(self) -> None:
        """Begin a pass, in the consumer's thread."""
        self._usual_threads = torch.get_num_threads()
        # Without workers the copying thread runs the loader's own code too, with no more threads than bare.
        n_threads = chosen_threads() if self._has_workers else self._usual_threads
        self._team = min(self._max_team, n_threads)

    def enter_thread(self) -> None:
        """Give the copying thread its team and its helpers."""
        compute_with(self._team)
        self._of_thread.helpers = Helpers(self._team, usual_threads=self._usual_threads)
        self._of_thread.dropper = Dropper()

    def leave_thread(self) -> None:
        """Let go of what the copying thread has beside it."""
        self._of_thread.helpers.close()
        self._of_thread.dropper.close()

    def settle(self) -> None:
        """Give back the memory of workers that was read, and that nobody else holds any more."""
        self._of_thread.dropper.drop()

    def pack(
        self, group: Group, sources: list[torch.Tensor], target: torch.Tensor, shipment: Shipment
    ) -> None:
        """Copy small tensors side by side into one buffer, and from there into the packed ones, `target`."""
        staged = self._ring.take(group.n_bytes)
        self._of_thread.helpers.copy(staged.packed(group), sources, group)
        shipment.add_staged(Part(target, group.offset_bytes, group.n_bytes, staged, 0))
        if group.n_bytes >= MIB:
            shipment.enqueue()  # it flies while the next is staged

    def stage(self, pairs: list[tuple[torch.Tensor, torch.Tensor]], shipment: Shipment) -> None:
        """Copy the large tensors of a batch piece by piece, one flying while the next is staged."""
        if not pairs:
            return
        n_bytes = sum(aligned(target.nbytes) for _, target in pairs)
        pieces = Pieces(self._ring, min(n_bytes, CHUNK_BYTES), self._team, shipment, self._of_thread.dropper)
        for source, target in pairs:
            again = mapped_again(source) if self._has_workers else None
            if again is None:
                pieces.add(memory_of(source), target)
            else:
                pieces.add_mapped(again, target)
        pieces.send()


class Pieces:
    """Fills pinned buffers with tensors, or parts of them, side by side: copied and sent in one call each.

    Each call gives up the GIL, and gets it back late from a loop that launches kernels: sent one by one, each
    tensor took 0.1 ms more, as long as copying 1.2 MB.
    """

    def __init__(
        self, ring: PinnedRing, n_bytes: int, team: int, shipment: Shipment, dropper: Dropper
    ) -> None:
        self._ring = ring
        self._n_bytes = n_bytes
        self._even_bytes = team * PAGE_BYTES
        self._shipment = shipment
        self._dropper = dropper
        self._take_buffer()
        self._staged: list[torch.Tensor] = []
        self._sources: list[torch.Tensor] = []
        self._parts: list[Part] = []
        self._mapped: list[memoryview] = []

    def add(self, memory: memoryview, target: torch.Tensor) -> None:
        """Add memory to the piece at hand, and to as many further ones as it needs."""
        max_bytes = CHUNK_BYTES // self._even_bytes * self._even_bytes
        for start_bytes in range(0, memory.nbytes, max_bytes):
            self._add_part(memory, target, start_bytes, min(max_bytes, memory.nbytes - start_bytes))

    def add_mapped(self, memory: memoryview, target: torch.Tensor) -> None:
        """Add memory that is dropped as soon as it has been copied."""
        self.add(memory, target)
        self._mapped.append(memory)

    def send(self) -> None:
        """Copy what was added, and enqueue its transfer."""
        if not self._parts:
            return
        torch._foreach_copy_(self._staged, self._sources)
        for part in self._parts:
            self._shipment.add_staged(part)
        self._shipment.enqueue()
        self._staged, self._sources, self._parts = [], [], []
        if self._mapped:
            self._dropper.take(self._read())

    def _read(self) -> list[memoryview]:
        """Return the memory that has been read, which nobody else holds then."""
        read, self._mapped = self._mapped, []
        return read

    def _take_buffer(self) -> None:
        self._buffer = self._ring.take(self._n_bytes)
        self._filled_bytes = 0

    def _add_part(self, memory: memoryview, target: torch.Tensor, start_bytes: int, n_bytes: int) -> None:
        if self._filled_bytes + n_bytes > self._n_bytes:
            self.send()
            self._take_buffer()
        # Of a team, a member that begins amid a cache line is 1.6 times as slow: the rest is copied after it.
        rest_bytes = n_bytes % self._even_bytes
        even_bytes = n_bytes - rest_bytes
        for offset_bytes, size_bytes in ((0, even_bytes), (even_bytes, rest_bytes)):
            if size_bytes:
                first_bytes = self._filled_bytes + offset_bytes
                self._staged.append(self._buffer.memory[first_bytes : first_bytes + size_bytes])
                self._sources.append(bytes_on(memory, start_bytes + offset_bytes, size_bytes))
        self._parts.append(Part(target, start_bytes, n_bytes, self._buffer, self._filled_bytes))
        self._filled_bytes += aligned(n_bytes)


def team_size(n_workers: int, /) -> int:
    """Return how many threads one host copy may use: of this process's CPUs what its workers leave over.

    Two more are left to the loop and the driver: a member that has to wait for its CPU keeps all waiting.
    """
    return max(1, min(MAX_TEAM, cpu_share() - n_workers - 2))
