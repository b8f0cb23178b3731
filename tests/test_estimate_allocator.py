"""The replayed caching allocator: equal to recorded runs, and lawful on random ones."""

import gzip
import hashlib
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchfast._bytes import GIB, KIB, MIB
from torchfast._estimate.allocator import Block, CachingAllocator, OutOfSegmentsError
from torchfast._estimate.events import Event
from torchfast._estimate.replay import fits_in, replay
from torchfast._estimate.settings import AllocatorSettings

DATA = Path(__file__).parent / "data"
RECORDED = sorted((DATA / "allocator").glob("*.json.gz"))
PROGRAMS_UNDER_SETTINGS = sorted((DATA / "allocator_settings").glob("*.json.gz"))


def load(path: Path) -> Any:
    """Read a recorded run."""
    return json.loads(gzip.decompress(path.read_bytes()))


def driver(segments: list[list[int]]) -> Callable[[int], int]:
    """Hand out the recorded addresses, and insist that the recorded sizes are asked for."""
    recorded = iter(segments)

    def new_address(size: int) -> int:
        _, address, recorded_size = next(recorded)
        assert size == recorded_size
        return address

    return new_address


def reserved_after(run: Any) -> list[int]:
    """Return what was reserved after each event of a run that never gave a segment back."""
    taken = [0] * (len(run["events"]) + 1)
    for n_before, _, size in run["segments"]:
        taken[n_before] += size
    return [sum(taken[: i + 1]) for i in range(len(run["events"]))]


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.name.removesuffix(".json.gz"))
def test_recorded_runs_are_replayed_exactly(path: Path) -> None:
    """Told where the driver put its segments, the replay gives every block of a real run its real address."""
    run = load(path)
    events = [Event(block, size, 0) for block, size, _ in run["events"]]
    replayed = replay(events, new_address=driver(run["segments"]))
    assert list(replayed.addresses) == [address for _, _, address in run["events"]]
    assert list(replayed.reserved_bytes) == reserved_after(run)
    assert replayed.peak_allocated_bytes == run["peak_allocated_bytes"]
    assert replayed.peak_reserved_bytes == run["peak_reserved_bytes"]


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.name.removesuffix(".json.gz"))
def test_unknown_addresses_cost_next_to_nothing(path: Path) -> None:
    """With segments at descending addresses the peaks stay within 0.1 % of the recorded ones."""
    run = load(path)
    replayed = replay(Event(block, size, 0) for block, size, _ in run["events"])
    assert replayed.peak_allocated_bytes == pytest.approx(run["peak_allocated_bytes"], rel=1e-3)
    assert replayed.peak_reserved_bytes == pytest.approx(run["peak_reserved_bytes"], rel=1e-3)


@pytest.mark.parametrize("path", PROGRAMS_UNDER_SETTINGS, ids=lambda path: path.name.removesuffix(".json.gz"))
def test_settings_and_limits_do_what_pytorchs_do(path: Path) -> None:
    """Random calls recorded on a GPU under each setting leave the same bytes, retries and failures here."""
    run = load(path)
    allocator = CachingAllocator(AllocatorSettings.parse(run["settings"]), limit_bytes=run["limit_bytes"])
    live: dict[int, Block] = {}
    allocated = []
    for i, (block, size) in enumerate(run["calls"]):
        if size > 0:
            live[block] = allocator.allocate(size)
        elif size == 0:
            allocator.free(live.pop(block))
        else:  # the GPU ran out of memory here
            with pytest.raises(OutOfSegmentsError):
                allocator.allocate(-size)
        assert (allocator.reserved_bytes, allocator.n_retries) == (
            run["reserved_bytes"][i],
            run["n_retries"][i],
        )
        allocated.append(allocator.allocated_bytes)
    assert hashlib.sha256(json.dumps(allocated).encode()).hexdigest() == run["allocated_sha256"]


# --- laws --------------------------------------------------------------------------------------------------

SIZES = st.one_of(
    st.integers(1, 4 * KIB),
    st.integers(4 * KIB, 2 * MIB),
    st.integers(1 * MIB, 40 * MIB),
    st.sampled_from([512, MIB, MIB + 1, 10 * MIB - 1, 10 * MIB, 20 * MIB, 64 * MIB]),
)
# A positive number allocates so many bytes, a negative one frees one of the blocks that are live.
PROGRAMS = st.lists(SIZES | st.integers(-50, -1), max_size=120)
SETTINGS = st.sampled_from(
    [
        "",
        "expandable_segments:True",
        "max_split_size_mb:24",
        "roundup_power2_divisions:4",
        "garbage_collection_threshold:0.5",
        "expandable_segments:True,roundup_power2_divisions:[1:4,64:2,>:8]",
        "max_split_size_mb:30,garbage_collection_threshold:0.3",
    ]
)


def check_laws(allocator: CachingAllocator, live: list[Block]) -> None:
    """Assert what holds for the allocator at every moment."""
    pools = (allocator._small, allocator._large)
    free = [block for pool in pools for _, _, block in pool.free]
    mapped = sorted([*live, *free], key=lambda block: block.address)
    for block, following in pairwise(mapped):
        assert block.address + block.size <= following.address, "blocks overlap"
    assert sum(block.size for block in live) == allocator.allocated_bytes
    assert sum(block.size for block in mapped) == allocator.reserved_bytes <= allocator.limit_bytes
    for block in mapped:
        neighbour = block.next
        assert neighbour is None or neighbour.previous is block
        assert neighbour is None or neighbour.address == block.address + block.size
        assert not (block.is_free and neighbour is not None and neighbour.is_free), "free neighbours unmerged"
    for pool in pools:
        assert pool.free == sorted(pool.free, key=lambda entry: entry[:2])
        assert all(entry[:2] == (entry[2].size, entry[2].address) for entry in pool.free)


@given(program=PROGRAMS, setting=SETTINGS, limit=st.sampled_from([None, 200 * MIB, 90 * MIB]))
def test_laws_of_the_allocator(program: list[int], setting: str, limit: int | None) -> None:
    """Blocks never overlap, sizes add up, free neighbours are merged, the limit holds: after every call."""
    allocator = CachingAllocator(AllocatorSettings.parse(setting), limit_bytes=limit)
    live: list[Block] = []
    for number in program:
        if number > 0:
            try:
                block = allocator.allocate(number)
            except OutOfSegmentsError:
                assert limit is not None
            else:
                assert block.size >= number
                live.append(block)
        elif live:
            allocator.free(live.pop(number % len(live)))
        check_laws(allocator, live)
    for block in live:
        allocator.free(block)
    check_laws(allocator, [])
    assert allocator.allocated_bytes == 0


@given(program=PROGRAMS, setting=SETTINGS)
def test_everything_freed_can_be_given_back(program: list[int], setting: str) -> None:
    """When nothing is live, giving back what is cached leaves nothing reserved."""
    allocator = CachingAllocator(AllocatorSettings.parse(setting))
    live = [allocator.allocate(number) for number in program if number > 0]
    for block in live:
        allocator.free(block)
    allocator._release_cached()
    assert allocator.reserved_bytes == 0


@given(program=PROGRAMS, setting=SETTINGS, limit=st.integers(20 * MIB, 300 * MIB))
def test_the_short_replay_agrees_with_the_long_one(program: list[int], setting: str, limit: int) -> None:
    """`fits_in` is true exactly where `replay` under the same limit runs to the end."""
    settings = AllocatorSettings.parse(setting)
    events, live = [], []
    for i, number in enumerate(program):
        if number > 0:
            events.append(Event(i, number, 0))
            live.append(i)
        elif live:
            events.append(Event(live.pop(number % len(live)), 0, 0))
    done = replay(events, settings, limit_bytes=limit)
    assert fits_in(events, settings, limit) == (done.failed_at is None)
    assert len(done.reserved_bytes) == (len(events) if done.failed_at is None else done.failed_at)


# --- single rules ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "request_bytes", "block_bytes"),
    [
        ("", 1, 512),
        ("", 513, 1024),
        ("", 3 * MIB + 1, 3 * MIB + 512),
        (
            "roundup_power2_divisions:4",
            1200 * MIB,
            1280 * MIB,
        ),  # PyTorch's own example: 1024, 1280, 1536, ...
        ("roundup_power2_divisions:4", 1024 * MIB, 1024 * MIB),
        ("roundup_power2_divisions:8", 700, 1024),  # too small to divide: whole 512 B
        ("roundup_power2_divisions:[256:1,512:2,1024:4,>:8]", 600 * MIB, 768 * MIB),
        ("roundup_power2_divisions:[256:1,512:2,1024:4,>:8]", 100 * MIB + 1, 100 * MIB + 512),
        ("roundup_power2_divisions:[256:1,512:2,1024:4,>:8]", 5 * GIB, 5 * GIB),
        ("roundup_power2_divisions:[256:1,512:2,1024:4,>:8]", 5 * GIB + 1, 5 * GIB + 512 * MIB),
    ],
)
def test_rounding(setting: str, request_bytes: int, block_bytes: int) -> None:
    """Requests are rounded to 512 B, or to a part of the next power of two where that is set."""
    assert CachingAllocator(AllocatorSettings.parse(setting)).round(request_bytes) == block_bytes


@pytest.mark.parametrize(
    ("request_bytes", "segment_bytes"),
    [
        (1, 2 * MIB),
        (MIB, 2 * MIB),
        (MIB + 1, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB),
        (10 * MIB + 1, 12 * MIB),
    ],
)
def test_segments(request_bytes: int, segment_bytes: int) -> None:
    """Small requests share segments of 2 MiB, middle ones of 20 MiB, large ones get their own."""
    allocator = CachingAllocator()
    allocator.allocate(request_bytes)
    assert allocator.reserved_bytes == segment_bytes


def test_a_rest_of_up_to_one_mib_stays_in_a_large_block() -> None:
    """What is left of a large segment is split off only above 1 MiB; the rest counts as allocated."""
    allocator = CachingAllocator()
    assert allocator.allocate(19 * MIB).size == 20 * MIB
    assert allocator.allocate(19 * MIB - 512).size == 19 * MIB - 512


def test_cached_segments_are_given_back_at_the_limit() -> None:
    """A request that the limit forbids succeeds once the unused segments are returned, and counts a retry."""
    events = [Event(0, 60 * MIB, 0), Event(0, 0, 0), Event(1, 80 * MIB, 0)]
    assert replay(events).peak_reserved_bytes == 140 * MIB
    tight = replay(events, limit_bytes=100 * MIB)
    assert (tight.failed_at, tight.n_retries, tight.reserved_bytes[-1]) == (None, 1, 80 * MIB)
    assert replay(events, limit_bytes=70 * MIB).failed_at == 2


def test_expandable_segments_grow_where_plain_ones_cannot() -> None:
    """A block that grows step by step reuses the space of the last one when segments can expand."""
    sizes = [30 * MIB, 40 * MIB, 50 * MIB, 60 * MIB]
    events = [event for i, size in enumerate(sizes) for event in (Event(i, size, 0), Event(i, 0, 0))]
    assert replay(events).peak_reserved_bytes == sum(sizes)
    assert replay(events, AllocatorSettings(expandable_segments=True)).peak_reserved_bytes == 60 * MIB


def test_options_that_change_no_size_are_passed_over() -> None:
    """Other options of PYTORCH_CUDA_ALLOC_CONF may stand beside those that matter."""
    text = "backend:native,pinned_use_background_threads:True,max_split_size_mb:128"
    assert AllocatorSettings.parse(text) == AllocatorSettings(max_split_size_bytes=128 * MIB)
