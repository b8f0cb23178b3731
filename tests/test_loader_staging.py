"""Large pageable tensors on their way through pinned buffers: whole, side by side, in few calls."""

import itertools
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.late_stream import LateStream
from tests.loader_transport import computing_with, grow_unpinned
from torchfast._loader import pinned_ring, staging
from torchfast._loader.host_memory import memory_of
from torchfast._loader.pinned_ring import PinnedBuffer, PinnedRing
from torchfast._loader.plan import ALIGNMENT_BYTES, CHUNK_BYTES, Plan, empty
from torchfast._loader.shared_memory import Dropper, mapped_again
from torchfast._loader.shipment import Shipment
from torchfast._loader.staging import PAGE_BYTES, Staging

KIB = 1024
PIECE_BYTES = 64 * KIB
DTYPES = (torch.uint8, torch.float32, torch.int64)


class Sent(Shipment):
    """A shipment that makes its copies at once, from host to host, and counts the calls for them."""

    def __init__(self) -> None:
        super().__init__(None, lambda _: None)  # type: ignore[arg-type, return-value]  # on no stream
        self.n_copies: list[int] = []

    def enqueue(self) -> None:
        """Copy what was added since the last time."""
        if self._sizes_bytes:
            assert all(self._to)
            assert all(self._from)
            self._copy_by_pytorch()
            self.n_copies.append(len(self._sizes_bytes))
            self._begin()


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let pieces be of 64 KiB, buffers beyond 32 large, for a team of three, in memory that is not pinned."""
    monkeypatch.setattr(staging, "CHUNK_BYTES", PIECE_BYTES)
    monkeypatch.setattr(pinned_ring, "LARGE_BYTES", 32 * KIB)
    monkeypatch.setattr(staging, "PAGE_BYTES", 512)
    monkeypatch.setattr(staging, "team_size", lambda _: 3)
    monkeypatch.setattr(PinnedBuffer, "grow", grow_unpinned)
    with computing_with(3):
        yield


def staged(sources: Sequence[torch.Tensor], by: Staging | None = None) -> tuple[list[torch.Tensor], Sent]:
    """Stage some tensors; return what arrived."""
    sent = Sent()
    targets = [torch.full_like(source, 77) for source in sources]
    by = by or Staging(2, 0)
    by.begin()
    by.stage([*zip(sources, targets, strict=True)], sent)
    return targets, sent


def tensors(sizes_bytes: Sequence[int]) -> list[torch.Tensor]:
    """Return random bytes."""
    numbers = torch.Generator().manual_seed(sum(sizes_bytes))
    return [
        torch.randint(0, 256, (n_bytes,), dtype=torch.uint8, generator=numbers) for n_bytes in sizes_bytes
    ]


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes_bytes=st.lists(st.integers(1, 3 * PIECE_BYTES), max_size=8))
def test_every_byte_arrives(sizes_bytes: list[int]) -> None:
    """However many tensors of whatever sizes there are, each is in its own place afterwards."""
    sources = tensors(sizes_bytes)
    by = Staging(2, 0)
    for _ in range(2):
        targets, sent = staged(sources, by)
        assert all(map(torch.equal, targets, sources))
        assert sent.staged_bytes == sum(sizes_bytes)


@given(sizes=st.lists(st.integers(0, 3000), min_size=1, max_size=8), dtype=st.sampled_from(DTYPES))
@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_packed_tensors_arrive_where_the_driver_is_not_asked(sizes: list[int], dtype: torch.dtype) -> None:
    """Small tensors that are staged side by side are whole on the other side, empty ones among them."""
    sources = [torch.arange(size).to(dtype) for size in sizes]
    plan = Plan(sources)
    (layout,) = plan.buffer_layouts
    sent, by = Sent(), Staging(2, 0)
    packed = empty(layout, torch.device("cpu")).fill_(77)
    for group, copies in zip(plan.groups, plan.packed_on(packed), strict=True):
        originals = [sources[index] for index in group.indexes]
        if group.n_bytes:
            by.pack(group, originals, packed, sent)
            sent.enqueue()
        assert all(map(torch.equal, copies, originals))


@pytest.mark.parametrize(
    ("kib", "n_copies"),
    [
        ([10] * 6, [6]),
        ([20] * 8, [3, 3, 2]),
        ([60, 60, 4], [1, 2]),
        ([20, 150], [1, 1, 1, 1]),
        ([150, 20], [1, 1, 2]),
        ([64] * 3, [2, 2, 2]),
    ],
    ids=["one piece", "some in each", "a gap", "a large one last", "a large one first", "full"],
)
def test_what_fits_a_piece_travels_together(
    kib: list[int], n_copies: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each piece is one copy on the host and one call to the driver, however many tensors are in it."""
    calls, copy = itertools.count(), torch._foreach_copy_
    sources = tensors([n * KIB for n in kib])
    monkeypatch.setattr(torch, "_foreach_copy_", lambda to, of, **_: (next(calls), copy(to, of)))
    _, sent = staged(sources)
    assert sent.n_copies == n_copies
    assert next(calls) == 2 * len(n_copies)  # of which the shipment here makes one each


def test_tensors_in_a_piece_begin_where_a_member_of_the_team_may() -> None:
    """Each begins at a multiple of 512 bytes, and what a team of three copies is a multiple of its pages."""
    sources = tensors([10_001, 20_000, 5, 1_536])
    sent = Sent()
    pieces = staging.Pieces(PinnedRing(2), PIECE_BYTES, 3, sent, Dropper())
    for source in sources:
        pieces.add(memory_of(source), torch.empty_like(source))
    assert [part.staged_bytes % ALIGNMENT_BYTES for part in pieces._parts] == [0] * 4
    assert [staged.nbytes for staged in pieces._staged] == [9_216, 785, 19_968, 32, 5, 1_536]


@pytest.mark.parametrize(("kib", "buffer_kib"), [([10], 10), ([10, 20], 30), ([20] * 8, 64)])
def test_buffers_are_no_larger_than_needed(kib: list[int], buffer_kib: int) -> None:
    """A batch of a few MiB does not pin 64 for each buffer of the ring."""
    by = Staging(2, 0)
    staged(tensors([n * KIB for n in kib]), by)
    ring = by._ring
    assert max(buffer.memory.nbytes for buffer in [*ring._small, *ring._large]) == buffer_kib * KIB


def test_large_buffers_are_few() -> None:
    """What needs much room gets one of four in turn, what needs little one of as many as asked for."""
    ring = PinnedRing(9)
    for n_bytes, n_buffers in ((40 * KIB, 4), (32 * KIB, 9)):
        taken = [ring.take(n_bytes) for _ in range(2 * n_buffers)]
        assert taken[:n_buffers] == taken[n_buffers:]
        assert len(set(taken)) == n_buffers
        assert {buffer.memory.nbytes for buffer in taken} == {n_bytes}


def test_mapped_memory_is_dropped_once_it_has_been_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not when it is added, nor with the batch: as soon as the last piece that it is in has been copied.

    Nothing else holds it then: the last reference is the dropper's.
    """
    dropped = list[tuple[list[int], int]]()
    n_references = set[int]()
    sent = Sent()

    def take(_: Dropper, memory: list[memoryview]) -> None:
        dropped.append(([view[0] for view in memory], len(sent.n_copies)))
        n_references.update([sys.getrefcount(memory), sys.getrefcount(memory[0])])

    monkeypatch.setattr(Dropper, "take", take)
    pieces = staging.Pieces(PinnedRing(8), PIECE_BYTES, 3, sent, Dropper())
    targets = [torch.empty(n * KIB, dtype=torch.uint8) for n in (20, 100, 1)]
    for number, target in enumerate(targets, 1):
        pieces.add_mapped(memoryview(bytearray([number]) * target.nbytes), target)
    assert dropped == [([1], 1)]
    pieces.send()
    assert dropped == [([1], 1), ([2, 3], 3)]
    assert n_references == {references_of_an_argument()}
    assert [int(target.unique()) for target in targets] == [1, 2, 3]


def references_of_an_argument() -> int:
    """Return how many references there are to what a function is given, and nobody else holds."""

    def take(_: None, memory: list[memoryview]) -> int:
        return sys.getrefcount(memory)

    return take(None, list[memoryview]())


def test_threads_that_drop_end_with_the_copying_thread() -> None:
    """And only those of its own: an earlier one may not be done yet."""
    sources = [source.share_memory_() for source in tensors([20 * KIB])]

    def n_running() -> list[int]:
        by = Staging(2, 1)
        by.enter_thread()
        staged(sources, by)
        dropper = by._of_thread.dropper
        counts = [dropper._n_running]
        by.settle()
        counts.append(dropper._n_running)
        by.leave_thread()
        return [*counts, dropper._n_running, Staging(2, 1)._of_thread.dropper._n_running]

    with computing_with(torch.get_num_threads()), ThreadPoolExecutor(1) as copying:
        assert copying.submit(n_running).result() == [0, 1, 0, 0]


def test_memory_of_workers_is_mapped_again_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of workers is read through a second mapping; without workers nothing is worth one."""
    mapped = itertools.count()
    monkeypatch.setattr(staging, "mapped_again", lambda tensor: (next(mapped), mapped_again(tensor))[1])
    sources = [source.share_memory_() for source in tensors([20 * KIB, 70 * KIB])]
    for n_workers in (0, 1):
        by = Staging(2, n_workers)
        targets, _ = staged(sources, by)
        by.leave_thread()
        assert all(map(torch.equal, targets, sources))
    assert next(mapped) == 2


@pytest.mark.parametrize("team", [*range(1, 17), 64])
def test_pieces_of_any_team_are_as_long_as_buffers_allow(team: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor a little beyond a piece takes two, whatever number of threads has to divide them."""
    monkeypatch.setattr(staging, "CHUNK_BYTES", CHUNK_BYTES)
    monkeypatch.setattr(staging, "PAGE_BYTES", PAGE_BYTES)
    source, sent = torch.arange(CHUNK_BYTES // 4 + 300_000, dtype=torch.int32), Sent()
    target = torch.zeros_like(source)
    pieces = staging.Pieces(PinnedRing(2), CHUNK_BYTES, team, sent, Dropper())
    pieces.add(memory_of(source), target)
    pieces.send()
    assert sent.n_copies == [1, 1]
    assert torch.equal(target, source)


def test_a_copy_that_fails_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """What could not be staged does not reach the device, and the next batch is whole."""
    by, sent = Staging(2, 0), Sent()
    sources = tensors([30 * KIB] * 3)
    targets = [torch.full_like(source, 77) for source in sources]

    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(torch, "_foreach_copy_", fail)
        with pytest.raises(MemoryError):
            by.stage([*zip(sources, targets, strict=True)], sent)
    assert sent.n_copies == []
    assert all(bool((target == 77).all()) for target in targets)
    assert all(map(torch.equal, staged(sources, by)[0], sources))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(batches=[([PIECE_BYTES], 0)] * 20)
@example(batches=[([20 * KIB] * 7, 1)] * 9)
@given(
    batches=st.lists(
        st.tuples(st.lists(st.integers(1, 2 * PIECE_BYTES), max_size=5), st.integers(0, 5)), max_size=12
    )
)
def test_however_late_the_device_is_it_reads_what_was_staged(batches: list[tuple[list[int], int]]) -> None:
    """No buffer is filled anew before its last copy has been read, though the loader's memory is at once."""
    stream, by = LateStream(), Staging(2, 0)
    arrived = list[tuple[torch.Tensor, torch.Tensor]]()
    with pytest.MonkeyPatch.context() as patch:
        stream.replace_the_device(patch)
        for sizes_bytes, n_done in batches:
            sources = tensors(sizes_bytes)
            targets = [torch.empty_like(source) for source in sources]
            one = stream.shipment()
            by.stage([*zip(sources, targets, strict=True)], one)
            arrived += [(target, source.clone()) for target, source in zip(targets, sources, strict=True)]
            for source in sources:
                source.fill_(77)
            stream.go_on_to(stream.n_done + n_done)
        stream.go_on_to(stream.n_enqueued)
    assert all(torch.equal(target, source) for target, source in arrived)
