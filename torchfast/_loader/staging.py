"""What travels together, and the ring of pinned buffers through which pageable memory travels.

A batch is sorted into *small* leaves, packed into one transfer, and *large* ones, which travel one by one.
Small leaves share one allocation on the device. Large ones have their own: who keeps the labels of every
batch must not keep its images too.
"""

import os
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from torchfast._bytes import MIB

PACK_BELOW_BYTES = MIB
"""Leaves smaller than this are packed. A pinned copy of 256 KiB runs at 15 GB/s, one of 1 MiB at 37."""

CHUNK_BYTES = 16 * MIB
"""Pageable memory is staged in pieces of this size: 53 of 55 GB/s, one flying while the next is read."""

ALIGNMENT_BYTES = 512
"""The caching allocator's own alignment: what vectorised kernels may expect of any tensor they are given."""

MAX_TEAM = 4
"""Threads of one host copy: two to four saturate a PCIe 5 link, more take cores from the workers."""


class Load(NamedTuple):
    """The plain leaves of one batch, sorted by how they travel."""

    small: list[int]
    """Indexes of the leaves that are packed."""

    offsets_bytes: list[int]
    """Where each of them lies in the packed buffer."""

    large: list[int]
    """Indexes of the leaves that travel by themselves."""

    sizes_bytes: tuple[int, ...]
    """The device buffers needed: the packed one, if any, then one for each large leaf."""


def sort_leaves(leaves: Sequence[Any], /) -> Load:
    """Decide how each leaf travels; leaves that are not plain host tensors are left out."""
    small, offsets_bytes, large, sizes_bytes, packed_bytes = [], [], [], [], 0
    for index, leaf in enumerate(leaves):
        if not is_plain(leaf):
            continue
        if leaf.nbytes < PACK_BELOW_BYTES:
            small.append(index)
            offsets_bytes.append(packed_bytes)
            packed_bytes += -(-leaf.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        else:
            large.append(index)
            sizes_bytes.append(leaf.nbytes)
    packed = (packed_bytes,) if small else ()
    return Load(small, offsets_bytes, large, (*packed, *sizes_bytes))


def is_plain(leaf: Any, /) -> bool:
    """Say whether a leaf is an ordinary host tensor: bytes and strides, and nothing else to it.

    Everything else (subclasses, sparse, nested and quantized tensors, tensors in an autograd graph) moves by
    its own `.to`, which alone knows how.
    """
    return (
        type(leaf) is torch.Tensor
        and leaf.device.type == "cpu"
        and leaf.layout is torch.strided
        and not leaf.requires_grad
        and not leaf.is_nested
        and not leaf.is_quantized
        and not leaf.is_conj()
        and not leaf.is_neg()
    )


def is_dense(tensor: torch.Tensor, /) -> bool:
    """Say whether the tensor's elements fill one stretch of memory, in whatever order of dimensions."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def tensor_at(buffer: torch.Tensor, offset_bytes: int, like: torch.Tensor, /) -> torch.Tensor:
    """Return a tensor of the shape, strides and type of `like` on the bytes of `buffer`.

    Not a view: views share one version counter, and changing the images in place would then spoil a graph
    that saved the labels.
    """
    empty = torch.empty(0, dtype=like.dtype, device=buffer.device)
    return empty.set_(
        buffer.untyped_storage(), offset_bytes // like.element_size(), like.size(), like.stride()
    )


def bytes_of(tensor: torch.Tensor, /) -> torch.Tensor:
    """Return the memory of a dense tensor as bytes."""
    offset_bytes = tensor.storage_offset() * tensor.element_size()
    flat = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return flat.set_(tensor.untyped_storage(), offset_bytes, (tensor.nbytes,), (1,))


class PinnedRing:
    """Pinned buffers in turn, each handed out again when its last copy has been read.

    Buffers grow to what was asked of them, to a power of two since the pinning allocator rounds to one, and
    then stay: pinning costs a millisecond a megabyte and stalls the driver for everybody.
    """

    def __init__(self, n_buffers: int, /) -> None:
        self._buffers = [torch.empty(0, dtype=torch.uint8)] * n_buffers
        self._read: list[torch.cuda.Event | None] = [None] * n_buffers
        self._turn = 0
        self.waited_s = 0.0

    def take(self, n_bytes: int, /) -> torch.Tensor:
        """Return the next buffer's first `n_bytes`, after waiting (asleep, without the GIL) for its turn."""
        self._turn = (self._turn + 1) % len(self._buffers)
        read = self._read[self._turn]
        if read is not None:
            began_s = time.perf_counter()
            read.synchronize()
            self.waited_s += time.perf_counter() - began_s
        if self._buffers[self._turn].nbytes < n_bytes:
            rounded_bytes = 1 << (n_bytes - 1).bit_length()
            self._buffers[self._turn] = torch.empty(rounded_bytes, dtype=torch.uint8, pin_memory=True)
        return self._buffers[self._turn][:n_bytes]

    def being_read(self, stream: torch.cuda.Stream, /) -> None:
        """Note that what was enqueued on `stream` so far reads the buffer taken last."""
        read = self._read[self._turn]
        if read is None:
            # Waiting must sleep: a GPU that lags behind would otherwise cost a core of spinning.
            read = self._read[self._turn] = torch.cuda.Event(blocking=True)
        read.record(stream)


def team_size() -> int:
    """Return how many threads one host copy of this process may use."""
    n_cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    n_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(MAX_TEAM, n_cpus // (2 * n_processes)))
