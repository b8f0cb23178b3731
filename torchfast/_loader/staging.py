"""What travels together, and the ring of pinned buffers through which pageable memory travels.

A batch is sorted into *small* leaves, packed into one transfer, and *large* ones, which travel one by one.
Small leaves share one allocation on the device. Large ones have their own: who keeps the labels of every
batch must not keep its images too.
"""

import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from torchfast._bytes import MIB
from torchfast._loader.cpus import cpu_share

PACK_BELOW_BYTES = MIB
"""Leaves smaller than this share one allocation on the device, and one transfer if they are staged."""

STAGE_BELOW_BYTES = 16 * 2**10
"""Pinned leaves smaller than this are staged too: the host copies 16 KiB in the time of enqueueing them."""

CHUNK_BYTES = 16 * MIB
"""Pageable memory is staged in pieces of this size: 53 of 55 GB/s, one flying while the next is read."""

_TENSOR, _STRIDED = torch.Tensor, torch.strided  # asked for each leaf of each batch, in the thread's own time

ALIGNMENT_BYTES = 512
"""The caching allocator's own alignment: what vectorised kernels may expect of any tensor they are given."""

MAX_TEAM = 16
"""Threads of one host copy. On one H200's host: 1 thread 5 GB/s, 4 17, 8 31, 16 48, for a link of 55."""


class Run(NamedTuple):
    """Packed leaves of one type and shape, side by side."""

    indexes: list[int]
    offset_bytes: int
    step_bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Plan:
    """How the leaves of batches that are built alike travel."""

    __slots__ = ("large", "middling", "n_late", "n_tiny", "runs", "sizes_bytes", "small", "tiny_bytes")

    def __init__(self, layouts: "Layouts") -> None:
        sizes = {
            index: math.prod(layout[1]) * layout[0].itemsize
            for index, layout in enumerate(layouts)
            if layout is not None
        }
        tiny = [index for index, n_bytes in sizes.items() if n_bytes < STAGE_BELOW_BYTES]
        middling = [i for i, n_bytes in sizes.items() if STAGE_BELOW_BYTES <= n_bytes < PACK_BELOW_BYTES]
        self.small = tiny + middling
        """Indexes of the leaves that are packed, in the order in which they lie."""
        self.large = [index for index, n_bytes in sizes.items() if n_bytes >= PACK_BELOW_BYTES]
        """Indexes of the leaves that travel by themselves."""
        self.n_late = layouts.count(None)
        """How many leaves move by their own `.to`, once they are asked for."""
        self.n_tiny = len(tiny)
        tiny_runs, self.tiny_bytes = _runs(tiny, layouts, 0)
        self.middling, packed_bytes = _runs(middling, layouts, self.tiny_bytes)
        self.runs = tiny_runs + self.middling
        packed = (packed_bytes,) if self.small else ()
        self.sizes_bytes = (*packed, *(sizes[index] for index in self.large))
        """The device buffers needed: the packed one, if any, then one for each large leaf."""


def _runs(indexes: list[int], layouts: "Layouts", offset_bytes: int) -> tuple[list[Run], int]:
    """Lay leaves side by side from an offset on; return their runs and where they end."""
    runs: list[Run] = []
    for index in indexes:
        layout = layouts[index]
        if layout is None:
            continue
        dtype, shape, stride = layout
        step_bytes = _aligned(math.prod(shape) * dtype.itemsize)
        if not runs or (runs[-1].dtype, runs[-1].shape, runs[-1].stride) != layout:
            runs.append(Run([], offset_bytes, step_bytes, dtype, shape, stride))
        runs[-1].indexes.append(index)
        offset_bytes += step_bytes
    return runs, offset_bytes


def _aligned(n_bytes: int) -> int:
    return -(-n_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


Layouts = tuple[tuple[torch.dtype, tuple[int, ...], tuple[int, ...]] | None, ...]


class Plans:
    """The plans of the batches seen so far: most loaders build all their batches alike."""

    def __init__(self) -> None:
        self._plans: dict[Any, Plan] = {}

    def plan(self, leaves: Sequence[Any], /) -> Plan:
        """Return the plan for these leaves."""
        key = tuple([(leaf.dtype, leaf.shape, leaf.stride()) if is_plain(leaf) else None for leaf in leaves])
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= 64:  # shapes without end: remembering them would be a leak
                self._plans.clear()
            plan = self._plans[key] = Plan(tuple(layout and _arrival_layout(*layout) for layout in key))
        return plan


def _arrival_layout(
    dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...]
) -> tuple[torch.dtype, tuple[int, ...], tuple[int, ...]]:
    """Keep the strides of dense tensors, as `.to` does; others become contiguous."""
    if is_dense(shape, stride):
        return dtype, shape, stride
    return dtype, shape, torch.empty(shape, device="meta").stride()


def is_plain(leaf: Any, /) -> bool:
    """Say whether a leaf is an ordinary host tensor: bytes and strides, and nothing else to it.

    Everything else (subclasses, sparse, nested and quantized tensors, tensors in an autograd graph) moves by
    its own `.to`, which alone knows how.
    """
    return (
        type(leaf) is _TENSOR
        and leaf.is_cpu
        and leaf.layout is _STRIDED
        and not (leaf.requires_grad or leaf.is_nested or leaf.is_quantized or leaf.is_conj() or leaf.is_neg())
    )


def is_dense(shape: Sequence[int], stride: Sequence[int], /) -> bool:
    """Say whether elements so laid out fill one stretch of memory, in whatever order of dimensions."""
    expected = 1
    for step, size in sorted(zip(stride, shape, strict=True)):
        if size == 1:
            continue
        if step != expected:
            return False
        expected *= size
    return True


def tensors_of(run: Run, buffer: torch.Tensor, /) -> list[torch.Tensor]:
    """Return the tensors of a run, on the bytes of the packed buffer.

    Not views, hence `.data`: views share one version counter, and changing the images in place would then
    spoil a graph that saved the labels. All at once, since a Python call for each is what costs.
    """
    n_bytes_each = run.dtype.itemsize
    stacked = torch.empty(0, dtype=run.dtype, device=buffer.device).set_(
        buffer.untyped_storage(),
        run.offset_bytes // n_bytes_each,
        (len(run.indexes), *run.shape),
        (run.step_bytes // n_bytes_each, *run.stride),
    )
    return [tensor.data for tensor in stacked.unbind()]


def tensor_on(buffer: torch.Tensor, like: torch.Tensor, /) -> torch.Tensor:
    """Return a tensor of the shape, strides and type of `like` on the first bytes of `buffer`."""
    empty = torch.empty(0, dtype=like.dtype, device=buffer.device)
    return empty.set_(buffer.untyped_storage(), 0, like.size(), like.stride())


def bytes_of(tensor: torch.Tensor, /) -> torch.Tensor:
    """Return the memory of a dense tensor as bytes."""
    offset_bytes = tensor.storage_offset() * tensor.element_size()
    flat = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return flat.set_(tensor.untyped_storage(), offset_bytes, (tensor.nbytes,), (1,))


class PinnedBuffer:
    """A piece of pinned memory, the event after which it has been read, and the packed tensors on it."""

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)
        self.read: torch.cuda.Event | None = None
        self._packed: dict[Plan, list[torch.Tensor]] = {}

    def grow(self, n_bytes: int, /) -> None:
        """Make room for so many bytes, to a power of two since the pinning allocator rounds to one."""
        if self.memory.nbytes < n_bytes:
            self.memory = torch.empty(1 << (n_bytes - 1).bit_length(), dtype=torch.uint8, pin_memory=True)
            self._packed.clear()

    def packed(self, plan: Plan, /) -> list[torch.Tensor]:
        """Return the tensors of the packed leaves of a plan, on this buffer; made once for each plan."""
        tensors = self._packed.get(plan)
        if tensors is None:
            if len(self._packed) >= 8:
                self._packed.clear()
            tensors = [tensor for run in plan.runs for tensor in tensors_of(run, self.memory)]
            self._packed[plan] = tensors
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

    def being_read(self, stream: torch.cuda.Stream, /) -> None:
        """Note that what was enqueued on `stream` so far reads the buffer taken last."""
        buffer = self._buffers[self._turn]
        if buffer.read is None:
            # Waiting must sleep: a GPU that lags behind would otherwise cost a core of spinning.
            buffer.read = torch.cuda.Event(blocking=True)
        buffer.read.record(stream)


def team_size(n_workers: int, /) -> int:
    """Return how many threads one host copy may use: what the workers leave over of this process's CPUs.

    A power of two, which divides a piece into whole pages: 16 threads take 3.0 ms for 154 MB, 15 take 4.3.
    """
    n_spare = min(MAX_TEAM, cpu_share() - n_workers)
    return 1 << (max(1, n_spare).bit_length() - 1)
