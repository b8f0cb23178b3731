"""How pageable memory travels: through a ring of pinned buffers, which a team of threads fills."""

import threading
import time
from collections import deque
from typing import TYPE_CHECKING

import torch

from torchfast._bytes import MIB
from torchfast._loader.cpus import chosen_threads, compute_with, cpu_share
from torchfast._loader.helpers import Helpers
from torchfast._loader.plan import CHUNK_BYTES, Group, aligned, bytes_of
from torchfast._loader.shared_memory import Dropper, mapped_again

if TYPE_CHECKING:
    from torchfast._loader.shipment import Shipment

MAX_TEAM = 16
"""Threads of one host copy. On one H200's host: 4 threads 23 GB/s, 8 40, 16 60, for a link of 55."""

PAGE_BYTES = 4096


class OfThread(threading.local):
    """What each thread has for itself: only one that enters has helpers.

    The loop's own has none: an interrupt could end its waiting while others write.
    """

    helpers = Helpers(0, usual_threads=1)


class Staging:
    """Copies what is not pinned into pinned buffers, and adds these to a shipment."""

    def __init__(self, depth: int, n_workers: int) -> None:
        self._ring = PinnedRing(max(8, depth + 2))
        self._max_team = team_size(n_workers)
        self._team = self._usual_threads = 1
        self._has_workers = n_workers > 0
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
        n_threads = chosen_threads() if self._has_workers else self._usual_threads
        self._team = min(self._max_team, n_threads)

    def enter_thread(self) -> None:
        """Give the copying thread its team and its helpers."""
        compute_with(self._team)
        self._of_thread.helpers = Helpers(self._team, usual_threads=self._usual_threads)

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
        shipment.add_staged(bytes_of(target, group.n_bytes), staged.memory[: group.n_bytes], staged)
        if group.n_bytes >= MIB:
            shipment.enqueue()  # it flies while the next is staged

    def stage(self, pairs: list[tuple[torch.Tensor, torch.Tensor]], shipment: "Shipment") -> None:
        """Copy the large tensors of a batch piece by piece, one flying while the next is staged."""
        if not pairs:
            return
        n_bytes = sum(aligned(target.nbytes) for _, target in pairs)
        pieces = Pieces(self._ring, min(n_bytes, CHUNK_BYTES), self._team, shipment, self._dropper)
        for source, target in pairs:
            again = mapped_again(source) if self._has_workers else None
            if again is None:
                pieces.add(bytes_of(source), bytes_of(target))
            else:
                pieces.add_mapped(again, bytes_of(target))
        pieces.send()


class Pieces:
    """Fills pinned buffers with tensors, or parts of them, side by side: copied and sent in one call each.

    PyTorch gives up the GIL in each call, and gets it back late from a loop that launches kernels. Sending
    tensors one by one took 0.1 ms more for each, as long as copying 1.2 MB.
    """

    def __init__(
        self, ring: "PinnedRing", n_bytes: int, team: int, shipment: "Shipment", dropper: Dropper
    ) -> None:
        self._ring = ring
        self._n_bytes = n_bytes
        self._even_bytes = team * PAGE_BYTES
        self._shipment = shipment
        self._dropper = dropper
        self._buffer = ring.take(n_bytes)
        self._filled_bytes = 0
        self._staged: list[torch.Tensor] = []
        self._sources: list[torch.Tensor] = []
        self._parts: list[tuple[torch.Tensor, torch.Tensor]] = []
        """The bytes on the device, and those of the buffer that go there."""
        self._mapped: deque[memoryview] = deque()

    def add(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Add bytes to the piece at hand, and as many further ones as they need."""
        max_bytes = CHUNK_BYTES // self._even_bytes * self._even_bytes
        if source.nbytes <= max_bytes:
            self._add_part(source, target)
            return
        for part, there in zip(source.split(max_bytes), target.split(max_bytes), strict=True):
            self._add_part(part, there)

    def add_mapped(self, memory: memoryview, target: torch.Tensor) -> None:
        """Add bytes that are dropped as soon as they have been copied."""
        self.add(torch.frombuffer(memory, dtype=torch.uint8), target)
        self._mapped.append(memory)

    def send(self) -> None:
        """Copy what was added, and enqueue its transfer."""
        if not self._parts:
            return
        torch._foreach_copy_(self._staged, self._sources)
        for target, staged in self._parts:
            self._shipment.add_staged(target, staged, self._buffer)
        self._shipment.enqueue()
        self._staged, self._sources, self._parts = [], [], []
        while self._mapped:
            self._dropper.take(self._mapped.popleft())

    def _add_part(self, source: torch.Tensor, target: torch.Tensor) -> None:
        n_bytes = source.nbytes
        if self._filled_bytes + n_bytes > self._n_bytes:
            self.send()
            self._buffer = self._ring.take(self._n_bytes)
            self._filled_bytes = 0
        staged = self._buffer.memory[self._filled_bytes : self._filled_bytes + n_bytes]
        # Of a team, a member that begins amid a cache line is 1.6 times as slow: the rest is copied after it.
        rest_bytes = n_bytes % self._even_bytes
        sizes_bytes = [n_bytes - rest_bytes, rest_bytes]
        self._staged += staged.split(sizes_bytes) if rest_bytes else [staged]
        self._sources += source.split(sizes_bytes) if rest_bytes else [source]
        self._parts.append((target, staged))
        self._filled_bytes += aligned(n_bytes)


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
