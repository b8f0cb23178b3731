"""What of a batch travels together, and the tensors that it becomes.

A batch is sorted into *small* leaves, which share one allocation on the device, and *large* ones, which have
their own: who keeps the labels of every batch must not keep its images too.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch

from torchfast._bytes import MIB

PACK_BELOW_BYTES = MIB
"""Leaves smaller than this share one allocation on the device, and one transfer if they are staged."""

STAGE_BELOW_BYTES = 16 * 2**10
"""Pinned leaves smaller than this are staged too: the host copies 16 KiB in the time of enqueueing them."""

LATE_LEAVES, LATE_BYTES = 4, 256 * 2**10
"""Batches of no more than that may be copied when they are handed out, as by `.to`: each tensor then takes
10 us of the loop's thread and up to 8 of the device, which may be less than another thread costs the loop."""

CHUNK_BYTES = 64 * MIB
"""Pageable memory is staged in pieces of at most this size: each takes the interpreter from the loop."""

ALIGNMENT_BYTES = 512
"""The caching allocator's own alignment: what vectorised kernels may expect of any tensor they are given."""

UNCOPIED = frozenset(
    getattr(torch, f"{sign}int{n_bits}", None) for sign in ("", "u") for n_bits in range(1, 8)
)
"""Types of less than a byte, which PyTorch moves to a device but has no copy for on the host."""

_TENSOR, _STRIDED = torch.Tensor, torch.strided  # asked for each leaf of each batch, in the thread's own time


class Layout(NamedTuple):
    """What a dense tensor is made of."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    n_bytes: int


class Run(NamedTuple):
    """Packed leaves of one layout, side by side."""

    n_leaves: int
    offset_bytes: int
    step_bytes: int
    layout: Layout

    @property
    def end_bytes(self) -> int:
        """Where the next leaf may begin."""
        return self.offset_bytes + self.n_leaves * self.step_bytes


class Group:
    """Packed leaves that travel together: in one transfer if they are staged, else in one call."""

    def __init__(
        self, indexes: list[int], layouts: dict[int, Layout], offset_bytes: int, *, may_go_straight: bool
    ) -> None:
        self.indexes = indexes
        self.offset_bytes = offset_bytes
        self.may_go_straight = may_go_straight
        """Whether its leaves are copied straight into their places if they are pinned."""
        self.runs = runs_of(layouts[index] for index in indexes)
        self.offsets_bytes = [
            run.offset_bytes + number * run.step_bytes for run in self.runs for number in range(run.n_leaves)
        ]
        """Where each of its leaves lies, counted from the first; ascending."""
        self.sizes_bytes = [layouts[index].n_bytes for index in indexes]
        self.n_bytes = self.runs[-1].end_bytes
        self.probes = _firsts(indexes, layouts.__getitem__)
        """The first leaf of each run: whether it is pinned decides for all of them."""

    @property
    def rows(self) -> Layout | None:
        """The tensor whose rows its leaves are, where all are alike and none is followed by a gap."""
        n_leaves, _, step_bytes, (dtype, shape, stride, n_bytes) = self.runs[0]
        if len(self.runs) > 1 or not n_bytes or n_bytes != step_bytes:
            return None
        return Layout(dtype, (n_leaves, *shape), (step_bytes // dtype.itemsize, *stride), self.n_bytes)

    def tensors_on(self, buffer: torch.Tensor, offset_bytes: int) -> list[torch.Tensor]:
        """Return the tensors of the group, on the bytes of a buffer from an offset on."""
        return tensors_on(self.runs, buffer, offset_bytes)


class Plan:
    """How the leaves of batches that are built alike travel."""

    __slots__ = (
        "_is_uniform",
        "buffer_layouts",
        "groups",
        "is_small",
        "large",
        "loose",
        "n_bytes",
        "n_late",
        "n_leaves",
        "probes",
    )

    def __init__(self, leaves: Sequence[Any]) -> None:
        layouts = {index: arrival(leaf) for index, leaf in enumerate(leaves) if is_plain(leaf)}
        small = [index for index, layout in layouts.items() if layout.n_bytes < PACK_BELOW_BYTES]
        straight = [i for i in small if layouts[i].n_bytes >= STAGE_BELOW_BYTES and _is_dense(leaves[i])]
        staged = sorted(set(small).difference(straight))
        self.groups: list[Group] = []
        """The leaves that are packed, in the order in which they lie."""
        self.large = [index for index, layout in layouts.items() if layout.n_bytes >= PACK_BELOW_BYTES]
        """Indexes of the leaves that travel by themselves."""
        self.loose = {index for index in self.large if not _is_dense(leaves[index])}
        """Those of them that must be made dense first."""
        self.probes = set(_firsts(self.large, lambda index: index if index in self.loose else layouts[index]))
        """Those that are asked whether they are pinned; the ones behind each are alike, and as it is."""
        self.n_leaves = len(leaves)
        self.n_late = len(leaves) - len(layouts)
        """How many leaves move by their own `.to`, once they are asked for."""
        self.n_bytes = sum(layout.n_bytes for layout in layouts.values())
        self.is_small = not self.n_late and 0 < self.n_leaves <= LATE_LEAVES and self.n_bytes <= LATE_BYTES
        """Whether the batch may be copied as it is handed out, as a whole, instead of ahead."""
        packed_bytes = self._pack(staged, layouts, 0, may_go_straight=False)
        packed_bytes = self._pack(straight, layouts, packed_bytes, may_go_straight=True)
        rows = self.groups[0].rows if len(self.groups) == 1 else None
        self._is_uniform = rows is not None
        packed = rows or Layout(torch.uint8, (packed_bytes,), (1,), packed_bytes)
        large = [layouts[index] for index in self.large]
        self.buffer_layouts: tuple[Layout, ...] = (packed, *large) if small else (*large,)
        """What is needed on the device: one for the packed leaves, if any, then one for each large leaf."""

    def packed_on(self, buffer: torch.Tensor, /) -> list[Sequence[torch.Tensor]]:
        """Return the tensors of each group, on a tensor of the first of `buffer_layouts`."""
        if self._is_uniform:
            return [separated(buffer)]
        return [group.tensors_on(buffer, group.offset_bytes) for group in self.groups]

    def _pack(
        self, indexes: list[int], layouts: dict[int, Layout], offset_bytes: int, *, may_go_straight: bool
    ) -> int:
        """Group leaves into pieces that fit the ring of pinned buffers; return where the last one ends."""
        start = end_bytes = 0
        ends_bytes = list(itertools.accumulate(aligned(layouts[index].n_bytes) for index in indexes))
        for stop, after_bytes in enumerate(ends_bytes, 1):
            is_last = stop == len(indexes)
            if is_last or ends_bytes[stop] - end_bytes > CHUNK_BYTES:
                self.groups.append(
                    Group(
                        indexes[start:stop],
                        layouts,
                        offset_bytes + end_bytes,
                        may_go_straight=may_go_straight,
                    )
                )
                start, end_bytes = stop, after_bytes
        return offset_bytes + end_bytes


def runs_of(layouts: Iterable[Layout]) -> list[Run]:
    """Return the runs in which leaves of such layouts lie, one behind the other from the first byte on."""
    runs: list[Run] = []
    end_bytes = 0
    for layout, alike in itertools.groupby(layouts):
        runs.append(Run(sum(1 for _ in alike), end_bytes, aligned(layout.n_bytes), layout))
        end_bytes = runs[-1].end_bytes
    return runs


def tensors_on(runs: Sequence[Run], buffer: torch.Tensor, offset_bytes: int) -> list[torch.Tensor]:
    """Return tensors that lie in runs, on the bytes of a buffer from an offset on.

    A run at once, since a Python call for each is what costs.
    """
    tensors: list[torch.Tensor] = []
    storage = buffer.untyped_storage()
    for n_leaves, start_bytes, step_bytes, (dtype, shape, stride, _) in runs:
        stacked = torch.empty(0, dtype=dtype, device=buffer.device).set_(
            storage,
            (offset_bytes + start_bytes) // dtype.itemsize,
            (n_leaves, *shape),
            (step_bytes // dtype.itemsize, *stride),
        )
        tensors += separated(stacked)
    return tensors


def aligned(n_bytes: int, /) -> int:
    """Return so many bytes rounded up to where the next tensor may begin."""
    return -(-n_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def _firsts(indexes: Sequence[int], key: Callable[[int], Any]) -> list[int]:
    """Return the first of each run of leaves that have the same key."""
    return [next(run) for _, run in itertools.groupby(indexes, key)]


def is_plain(leaf: Any, /) -> bool:
    """Say whether a leaf is an ordinary host tensor: bytes and strides, and nothing else to it.

    Everything else (subclasses, sparse, nested and quantized tensors, types of less than a byte, tensors in
    an autograd graph, its zeros without memory) moves by its own `.to`, which alone knows how.
    """
    return (
        type(leaf) is _TENSOR
        and leaf.is_cpu
        and leaf.layout is _STRIDED
        and leaf.dtype not in UNCOPIED
        and not (leaf.requires_grad or leaf.is_nested or leaf.is_quantized)
        and not (leaf.is_conj() or leaf.is_neg() or leaf._is_zerotensor())
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


def _is_dense(leaf: torch.Tensor) -> bool:
    return is_dense(leaf.shape, leaf.stride())


def arrival(leaf: torch.Tensor) -> Layout:
    """Keep the strides of dense tensors; others become dense as by `.to`, which keeps channels last."""
    stride = leaf.stride() if _is_dense(leaf) else leaf.to("meta").stride()
    return Layout(leaf.dtype, leaf.shape, stride, leaf.numel() * leaf.element_size())


def separated(stacked: torch.Tensor, /) -> Sequence[torch.Tensor]:
    """Return the rows of a tensor, as tensors of their own on its memory.

    Not views: these share one version counter, and changing the images in place would then spoil a graph that
    saved the labels. Below autograd `unbind` makes none; private, and half the price of `.data` for each.
    """
    below_autograd = getattr(torch._C, "_AutoDispatchBelowADInplaceOrView", None)
    if below_autograd is None:
        return [row.data for row in stacked.unbind()]
    with below_autograd():
        return stacked.unbind()


def empty(layout: Layout, device: torch.device, /) -> torch.Tensor:
    """Return memory of a layout, with nothing in it."""
    dtype, shape, stride, n_bytes = layout
    if not torch.are_deterministic_algorithms_enabled():
        return torch.empty_strided(shape, stride, dtype=dtype, device=device)
    # PyTorch would fill it: a kernel for memory that the copy fills anyway.
    storage = torch.UntypedStorage(n_bytes, device=device)
    return torch.empty(0, dtype=dtype, device=device).set_(storage, 0, shape, stride)


def tensor_on(buffer: torch.Tensor, layout: Layout, /) -> torch.Tensor:
    """Return a tensor of a layout on the first bytes of `buffer`."""
    unset = torch.empty(0, dtype=layout.dtype, device=buffer.device)
    return unset.set_(buffer.untyped_storage(), 0, layout.shape, layout.stride)


def bytes_of(tensor: torch.Tensor, n_bytes: int | None = None, /) -> torch.Tensor:
    """Return the memory of a dense tensor as bytes, or so many from where it begins."""
    offset_bytes = tensor.storage_offset() * tensor.element_size()
    flat = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    size = (tensor.nbytes if n_bytes is None else n_bytes,)
    return flat.set_(tensor.untyped_storage(), offset_bytes, size, (1,))
