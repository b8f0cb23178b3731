"""The memory in which a batch of a worker lies, read in a way that lets it go without holding the GIL.

It exists for this one batch. To free it takes the kernel 0.14 ms a MB, longer than a team takes to copy it,
and PyTorch holds the GIL meanwhile: with a batch of 154 MB the loop can launch nothing for 20 ms. So it is
read through a second mapping of the same memory. PyTorch's own, which nobody has touched, goes in no time,
and a thread gives back the second.
"""

import contextlib
import ctypes
import functools
import mmap
import sys
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Any

import torch

from torchfast._loader.plan import bytes_of
from torchfast._loader.thread import HelperThread


class SharedMemoryReader:
    """Reads the memory of workers, and has it given back by a thread, from the first one to `close`."""

    def __init__(self) -> None:
        self._read: SimpleQueue[SecondMapping | None] = SimpleQueue()
        self._thread: HelperThread | None = None

    @contextlib.contextmanager
    def reading(self, tensor: torch.Tensor, /) -> Iterator[torch.Tensor]:
        """Lend the bytes of a dense tensor."""
        mapping = second_mapping(tensor)
        if mapping is None:
            yield bytes_of(tensor)
            return
        try:
            yield mapping.memory
        finally:
            if self._read.empty() and self._is_running():
                self._read.put(mapping)
            else:  # the thread does not keep up, and shared memory may be scarce
                mapping.unmap()

    def close(self) -> None:
        """Wait until everything is given back, and end the thread."""
        if self._thread is not None:
            self._read.put(None)
            self._thread.join()
            self._thread = None

    def _is_running(self) -> bool:
        if self._thread is None:
            thread = HelperThread(target=_unmap, args=(self._read,), name="torchfast-unmap", daemon=True)
            with contextlib.suppress(RuntimeError):  # at the end of the interpreter no thread can be started
                thread.start()
                self._thread = thread
        return self._thread is not None


class SecondMapping:
    """The memory of a tensor at another address, until `unmap`, whatever becomes of the tensor."""

    def __init__(self, start: int, n_bytes: int, offset_bytes: int) -> None:
        self._start, self._n_bytes = start, n_bytes
        span = _span(n_bytes - offset_bytes).from_address(start + offset_bytes)
        self.memory = torch.frombuffer(span, dtype=torch.uint8)
        """The bytes of the tensor."""

    def unmap(self) -> None:
        """Give the memory back to the kernel, without holding the GIL."""
        del self.memory
        _libc().munmap(self._start, self._n_bytes)


def second_mapping(tensor: torch.Tensor, /) -> SecondMapping | None:
    """Map the memory of a dense tensor once more; None where that cannot be, as where it is not shared."""
    if sys.platform != "linux" or not tensor.is_shared():
        return None
    offset_bytes = tensor.data_ptr() % mmap.PAGESIZE
    n_bytes = offset_bytes + tensor.nbytes
    # A length of 0 asks for a second mapping. For memory of one process alone the kernel refuses it.
    start = _libc().mremap(tensor.data_ptr() - offset_bytes, 0, n_bytes, _MAY_MOVE)
    if start == _FAILED:
        return None
    _libc().madvise(start, n_bytes, _DONT_FORK)
    return SecondMapping(start, n_bytes, offset_bytes)


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


@functools.lru_cache(maxsize=64)  # a class for each length, which only the collector could take
def _span(n_bytes: int) -> Any:
    return ctypes.c_uint8 * n_bytes


def _unmap(read: "SimpleQueue[SecondMapping | None]") -> None:
    while (mapping := read.get()) is not None:
        mapping.unmap()
