"""PyTorch's caching allocator for CUDA, replayed in plain Python: which blocks and segments a run would hold.

The rules are those of c10/cuda/CUDACachingAllocator.cpp in torch 2.10 to 2.13, for one device and one stream.
What the driver decides and nobody can know beforehand is the addresses of new segments, by which best fit
breaks ties; see docs/decisions/0035-descending-segments.md.
"""

from bisect import bisect_left, insort
from collections.abc import Callable

from torchfast._bytes import MIB, format_bytes
from torchfast._estimate.settings import NO_LIMIT, AllocatorSettings

_MIN_BLOCK = 512
_SMALL = MIB  # requests up to here come from segments of 2 MiB
_SMALL_SEGMENT = 2 * MIB
_LARGE_SEGMENT = 20 * MIB
_MIN_OWN_SEGMENT = 10 * MIB  # from here on a request gets a segment of its own, in whole 2 MiB
_OWN_SEGMENT_STEP = 2 * MIB
# PyTorch takes 9/8 of the device's memory in addresses for each expandable segment: never the bottleneck.
_ADDRESS_SPACE = _LARGE_SEGMENT * 2**16
_FIRST_ADDRESS = _ADDRESS_SPACE * 2**6  # whole pages of every size, so that pages are found by division


class OutOfSegmentsError(Exception):
    """The limit is reached, also after everything cached was given back. Internal to the replay."""


class Block:
    """A piece of a segment: handed out, free, or (in expandable segments) address space without memory."""

    __slots__ = ("address", "gc_base", "is_free", "is_mapped", "next", "pool", "previous", "size")

    def __init__(self, pool: "_Pool", address: int, size: int) -> None:
        self.pool = pool
        self.address = address
        self.size = size
        self.is_free = False
        self.is_mapped = True
        self.previous: Block | None = None
        self.next: Block | None = None
        self.gc_base = 0

    @property
    def is_whole_segment(self) -> bool:
        return self.previous is None and self.next is None


class _Pool:
    """The free blocks of one size class, ordered as best fit looks for them: by size, then by address."""

    __slots__ = ("free", "is_small", "n_lookups", "unmapped")

    def __init__(self, *, is_small: bool) -> None:
        self.is_small = is_small
        self.free: list[tuple[int, int, Block]] = []
        self.unmapped: list[tuple[int, Block]] = []  # expandable segments: address space, by address
        self.n_lookups = 0

    def put(self, block: Block) -> None:
        block.is_free = True
        block.gc_base = self.n_lookups
        insort(self.free, (block.size, block.address, block))

    def take(self, block: Block) -> None:
        block.is_free = False
        del self.free[bisect_left(self.free, (block.size, block.address))]


class CachingAllocator:
    """The allocator of one device, used from one stream.

    `limit_bytes` is what `torch.cuda.set_per_process_memory_fraction` would allow, or what the GPU has left.
    `new_address(size)` stands for the driver; the default hands out descending addresses.
    """

    def __init__(
        self,
        settings: AllocatorSettings | None = None,
        *,
        limit_bytes: int | None = None,
        new_address: Callable[[int], int] | None = None,
    ) -> None:
        self.settings = settings or AllocatorSettings()
        self.limit_bytes = NO_LIMIT if limit_bytes is None else limit_bytes
        self.allocated_bytes = 0
        self.reserved_bytes = 0
        self.n_retries = 0
        self.segments: dict[int, int] = {}  # address: size, of what was taken from the driver
        # (calls before it, "segment_alloc" or "segment_free", address, size), for memory snapshots
        self.segment_log: list[tuple[int, str, int, int]] = []
        self.n_calls = 0
        self._small = _Pool(is_small=True)
        self._large = _Pool(is_small=False)
        self._next_address = _FIRST_ADDRESS
        self._new_address = new_address or self._descending
        self._collects = self.settings.garbage_collection_threshold > 0 and limit_bytes is not None
        self._rounds_to_512 = not any(d > 1 for d in self.settings.roundup_power2_divisions)

    def _descending(self, size: int) -> int:
        self._next_address -= size
        return self._next_address

    # --- the two calls -----------------------------------------------------------------------------------

    def allocate(self, n_bytes: int, /) -> Block:
        """Hand out a block for a request.

        Raises:
            OutOfSegmentsError: the limit does not allow it, with every unused segment given back.
        """
        self.n_calls += 1
        size = -(-n_bytes // _MIN_BLOCK) * _MIN_BLOCK if self._rounds_to_512 else self.round(n_bytes)
        pool = self._small if size <= _SMALL else self._large
        block = self._best_fit(pool, size) or self._from_driver(pool, size)
        remainder = block.size - size
        if remainder and self._splits(pool, size, remainder):
            self._split(block, size)
        self.allocated_bytes += block.size
        return block

    def free(self, block: Block, /) -> None:
        """Take a block back and merge it with its free neighbours; the segment stays reserved."""
        self.n_calls += 1
        self.allocated_bytes -= block.size
        pool = block.pool
        before, after = block.previous, block.next
        if before is not None and before.is_free:
            pool.take(before)
            block.address = before.address
            block.size += before.size
            _link(before.previous, block)
        if after is not None and after.is_free:
            pool.take(after)
            block.size += after.size
            _link(block, after.next)
        pool.put(block)

    def round(self, n_bytes: int, /) -> int:
        """Return the size of the block that a request needs."""
        if n_bytes < _MIN_BLOCK:
            return _MIN_BLOCK
        index = min(max(n_bytes.bit_length() - 21, 0), 15)
        divisions = self.settings.roundup_power2_divisions[index]
        if divisions <= 1 or n_bytes <= _MIN_BLOCK * divisions:
            return -(-n_bytes // _MIN_BLOCK) * _MIN_BLOCK
        floor = 1 << (n_bytes.bit_length() - 1)
        step = floor >> (divisions.bit_length() - 1)
        return -(-n_bytes // step) * step

    # --- finding a block ---------------------------------------------------------------------------------

    def _best_fit(self, pool: _Pool, size: int) -> Block | None:
        if self._collects:
            pool.n_lookups += 1
        free = pool.free
        i = bisect_left(free, (size,))
        if i == len(free):
            return None
        if self.settings.expandable_segments:
            # A block that can still grow ranks by the size it can grow to.
            while i + 1 < len(free) and _room(free[i + 1][2]) < _room(free[i][2]):
                i += 1
        block = free[i][2]
        unsplittable = self.settings.max_split_size_bytes
        if size < unsplittable <= block.size:
            return None
        if unsplittable <= size and block.size >= size + self.settings.max_non_split_rounding_bytes:
            return None
        del free[i]
        block.is_free = False
        return block

    def _splits(self, pool: _Pool, size: int, remainder: int) -> bool:
        if pool.is_small or self.settings.expandable_segments:
            return remainder >= _MIN_BLOCK
        return size < self.settings.max_split_size_bytes and remainder > _SMALL

    @staticmethod
    def _split(block: Block, size: int) -> None:
        rest = Block(block.pool, block.address + size, block.size - size)
        _link(rest, block.next)
        _link(block, rest)
        block.size = size
        block.pool.put(rest)

    # --- segments ----------------------------------------------------------------------------------------

    def _from_driver(self, pool: _Pool, size: int) -> Block:
        segment = _segment_size(size)
        if self._collects:
            self._collect_garbage()
        block = self._try_segment(pool, size, segment)
        if block is None and self._release_oversize(pool, size):
            block = self._try_segment(pool, size, segment)
        if block is None:
            self._release_cached()
            self.n_retries += 1
            block = self._try_segment(pool, size, segment)
        if block is None:
            raise OutOfSegmentsError(
                f"{format_bytes(size)} more, {format_bytes(self.reserved_bytes)} reserved, "
                f"limit {format_bytes(self.limit_bytes)}"
            )
        return block

    def _try_segment(self, pool: _Pool, size: int, segment: int) -> Block | None:
        # PyTorch checks the whole segment, also where an expandable one would map less.
        if self.reserved_bytes + segment > self.limit_bytes:
            return None
        if self.settings.expandable_segments:
            return self._expand(pool, size)
        address = self._new_address(segment)
        self._took("segment_alloc", address, segment)
        self.segments[address] = segment
        return Block(pool, address, segment)

    def _took(self, action: str, address: int, size: int) -> None:
        self.reserved_bytes += size if action in ("segment_alloc", "segment_map") else -size
        self.segment_log.append((self.n_calls, action, address, size))

    def _release(self, block: Block) -> None:
        block.pool.take(block)
        del self.segments[block.address]
        self._took("segment_free", block.address, block.size)

    def _release_cached(self) -> None:
        for pool in (self._large, self._small):
            for _, _, block in pool.free[:]:
                if self.settings.expandable_segments:
                    self._unmap(block)
                elif block.is_whole_segment:
                    self._release(block)

    def _release_oversize(self, pool: _Pool, size: int) -> bool:
        """Give back enough cached segments of `max_split_size` and more; tried before giving back all."""
        oversize = self.settings.max_split_size_bytes
        if oversize == NO_LIMIT or self.settings.expandable_segments:
            return False
        wanted = max(size, oversize)
        i = bisect_left(pool.free, (wanted,))
        if i < len(pool.free):
            self._release(pool.free[i][2])
            return True
        released = 0
        while released < wanted and pool.free and pool.free[-1][0] >= oversize:
            released += pool.free[-1][0]
            self._release(pool.free[-1][2])
        return released >= wanted

    def _collect_garbage(self) -> None:
        """Above the threshold, give back the large segments that went unused for longer than average."""
        threshold = self.settings.garbage_collection_threshold * self.limit_bytes
        excess = self.reserved_bytes - int(threshold)
        if excess <= 0:
            return
        pool = self._large
        idle = [block for _, _, block in pool.free if block.is_whole_segment]
        released, found = 0, True
        while released < excess and found and idle:
            average = sum(pool.n_lookups - block.gc_base for block in idle) / len(idle)
            found = False
            for block in idle[:]:
                if pool.n_lookups - block.gc_base >= average:
                    found = True
                    released += block.size
                    idle.remove(block)
                    self._release(block)

    # --- expandable segments -----------------------------------------------------------------------------

    def _expand(self, pool: _Pool, size: int) -> Block:
        block = _address_space_for(pool, size)
        if block is None:
            block = Block(pool, self._descending(_ADDRESS_SPACE), _ADDRESS_SPACE)
            block.is_mapped = False
            insort(pool.unmapped, (block.address, block))
        if not block.is_mapped:
            block = self._map(block, min(block.size, size))
        while block.size < size:
            following = block.next
            assert following is not None  # noqa: S101 -- _address_space_for has counted the room
            block = self._map(following, min(size - block.size, following.size))
        pool.take(block)
        return block

    def _map(self, block: Block, size: int) -> Block:
        """Put memory behind the front of a piece of address space; returns it merged with its neighbours."""
        pool = block.pool
        page = _SMALL_SEGMENT if pool.is_small else _LARGE_SEGMENT
        mapped = min(-(-size // page) * page, block.size)
        del pool.unmapped[bisect_left(pool.unmapped, (block.address,))]
        if mapped < block.size:
            rest = Block(pool, block.address + mapped, block.size - mapped)
            rest.is_mapped = False
            _link(rest, block.next)
            _link(block, rest)
            block.size = mapped
            insort(pool.unmapped, (rest.address, rest))
        block.is_mapped = True
        self._took("segment_map", block.address, mapped)
        before, after = block.previous, block.next
        if before is not None and before.is_free:
            pool.take(before)
            block.address, block.size = before.address, before.size + block.size
            _link(before.previous, block)
        if after is not None and after.is_free:
            pool.take(after)
            block.size += after.size
            _link(block, after.next)
        pool.put(block)
        return block

    def _unmap(self, block: Block) -> None:
        """Give back the whole pages inside a free block."""
        pool = block.pool
        page = _SMALL_SEGMENT if pool.is_small else _LARGE_SEGMENT
        start = -(-block.address // page) * page
        end = (block.address + block.size) // page * page
        if end <= start:
            return
        pool.take(block)
        if start > block.address:
            self._cut_free(block.previous, block, block.address, start - block.address)
        if end < block.address + block.size:
            self._cut_free(block, block.next, end, block.address + block.size - end)
        block.address, block.size, block.is_mapped = start, end - start, False
        self._took("segment_unmap", start, end - start)
        _merge_unmapped(block)

    @staticmethod
    def _cut_free(before: Block | None, after: Block | None, address: int, size: int) -> None:
        pool = (before or after).pool  # type: ignore[union-attr] # one of the two is the block that is cut
        piece = Block(pool, address, size)
        _link(before, piece)
        _link(piece, after)
        pool.put(piece)


def _segment_size(size: int) -> int:
    if size <= _SMALL:
        return _SMALL_SEGMENT
    if size < _MIN_OWN_SEGMENT:
        return _LARGE_SEGMENT
    return -(-size // _OWN_SEGMENT_STEP) * _OWN_SEGMENT_STEP


def _link(before: Block | None, after: Block | None) -> None:
    if before is not None:
        before.next = after
    if after is not None:
        after.previous = before


def _room(block: Block) -> int:
    following = block.next
    return block.size + (following.size if following is not None and not following.is_mapped else 0)


def _address_space_for(pool: _Pool, size: int) -> Block | None:
    """Return the lowest free or unmapped block from which on `size` bytes are not handed out."""
    for _, unmapped in pool.unmapped:
        first = unmapped.previous if unmapped.previous is not None and unmapped.previous.is_free else unmapped
        room = 0
        block: Block | None = first
        while room < size and block is not None and (block.is_free or not block.is_mapped):
            room += block.size
            block = block.next
        if room >= size:
            return first
    return None


def _merge_unmapped(block: Block) -> None:
    """Join a piece of address space that lost its memory with the pieces beside it."""
    unmapped = block.pool.unmapped
    before, after = block.previous, block.next
    if before is not None and not before.is_mapped:
        del unmapped[bisect_left(unmapped, (before.address,))]
        block.address, block.size = before.address, before.size + block.size
        _link(before.previous, block)
    if after is not None and not after.is_mapped:
        del unmapped[bisect_left(unmapped, (after.address,))]
        block.size += after.size
        _link(block, after.next)
    insort(unmapped, (block.address, block))
