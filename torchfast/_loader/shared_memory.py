"""The memory in which a batch of a worker lies, read in a way that lets it go without holding the GIL.

It exists for this one batch. To free it takes the kernel 0.14 ms a MB, longer than a team takes to copy it,
and PyTorch holds the GIL meanwhile: with a batch of 154 MB the loop can launch nothing for 20 ms. So it is
read through a second mapping of the same memory. PyTorch's own, which nobody has touched, goes in no time,
and threads give back the second.
"""

import ctypes
import functools
import mmap
import os
import sys
import weakref
from collections import deque
from queue import SimpleQueue

import torch

from torchfast._bytes import MIB
from torchfast._loader.host_memory import memory_at
from torchfast._loader.unwaited import start_unwaited

MAX_DROPPERS = 3
"""Threads that give memory back at the same time: on one H200's host 154 MB from eight workers took 20 ms a
batch with one, 16 with two and 15 with three, 38.5 MB 5.6, 4.4 and 3.8."""

UNMAPPED_BYTES = 8 * MIB
"""As much is unmapped in one call: nobody else in the process can map anything meanwhile. With less the
thread waits for the GIL more often, behind a loop that holds it for up to 5 ms."""


def mapped_again(tensor: torch.Tensor, /) -> memoryview | None:
    """Return the bytes of a dense tensor in shared memory at another address; None where that cannot be.

    They stay for as long as this very view is held, by `torch.frombuffer` too, whatever becomes of the
    tensor. Then they go back to the kernel, without the GIL. Let the view go last: an interpreter that ends
    while C++ destroys a tensor, and the GIL is away, aborts.
    """
    if sys.platform != "linux" or not tensor.is_shared():
        return None
    offset_bytes = tensor.data_ptr() % mmap.PAGESIZE
    n_bytes = offset_bytes + tensor.nbytes
    # A length of 0 asks for a second mapping. For memory of one process alone the kernel refuses it.
    start = _libc().mremap(tensor.data_ptr() - offset_bytes, 0, n_bytes, _MAY_MOVE)
    if start == _FAILED:
        return None
    view = memory_at(start + offset_bytes, tensor.nbytes)
    _unmap_with(view, start, n_bytes)
    _libc().madvise(start, n_bytes, _DONT_FORK)
    return view


class Dropper:
    """Drops memory, which takes long, in threads that it starts when needed and that end with `close`."""

    def __init__(self) -> None:
        self._taken: list[list[memoryview]] = []
        self._to_drop: SimpleQueue[list[memoryview] | None] = SimpleQueue()
        self._n_running = 0

    def take(self, memory: list[memoryview], /) -> None:
        """Hold memory until `drop`."""
        self._taken.append(memory)

    def drop(self) -> None:
        """Leave what was taken to threads. PyTorch's mapping must be gone: who goes last frees the memory.

        Where all of them lag behind it goes here and now: shared memory is scarce.
        """
        taken, self._taken = self._taken, []
        if not taken:
            return
        goes_to_threads = self._to_drop.empty()
        if self._n_running == 0 or (not goes_to_threads and self._n_running < MAX_DROPPERS):
            goes_to_threads = start_unwaited(_drop, self._to_drop)
            self._n_running += goes_to_threads
        while taken and goes_to_threads:
            self._to_drop.put(taken.pop())

    def close(self) -> None:
        """Let the threads end, once they have dropped what there is. They are not waited for."""
        self.drop()
        for _ in range(self._n_running):
            self._to_drop.put(None)
        self._to_drop, self._n_running = SimpleQueue(), 0


def _drop(to_drop: "SimpleQueue[list[memoryview] | None]") -> None:
    while to_drop.get() is not None:
        pass


_mappings: "dict[int, weakref.ref[memoryview]]" = {}
"""The views of second mappings, by address."""


def _unmap_with(view: memoryview, start: int, n_bytes: int) -> None:
    """Have a mapping go with its view.

    Not by `weakref.finalize`: as the interpreter ends that walks over all of its kind, the user's among them,
    and fails if a thread that drops memory changes their number meanwhile.
    """
    process = os.getpid()

    def unmap(_: object) -> None:
        del _mappings[start]
        _unmap(start, n_bytes, process)

    _mappings[start] = weakref.ref(view, unmap)


def _unmap(start: int, n_bytes: int, process: int) -> None:
    if os.getpid() != process:  # in a child other memory may be there
        return
    end = start + n_bytes
    starts = range(start, end, UNMAPPED_BYTES)
    sizes = [min(UNMAPPED_BYTES, end - first) for first in starts]
    # In C, so that no interrupt comes in between. None can fail: from the front a mapping only shrinks.
    deque(map(_libc().munmap, starts, sizes), maxlen=0)


_MAY_MOVE = 1  # MREMAP_MAYMOVE
_DONT_FORK = 10  # MADV_DONTFORK: a worker forked meanwhile would keep the memory for as long as it lives
_FAILED = ctypes.c_void_p(-1).value


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    address, size = ctypes.c_void_p, ctypes.c_size_t
    libc.mremap.argtypes, libc.mremap.restype = [address, size, size, ctypes.c_int], address
    libc.madvise.argtypes = [address, size, ctypes.c_int]
    libc.munmap.argtypes = [address, size]
    return libc
