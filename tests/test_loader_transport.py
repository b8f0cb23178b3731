"""The transport as a whole, on a device of the imagination that lags: every byte of every batch arrives."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.late_stream import LateEvent, LateStream
from tests.loader_transport import computing_with, grow_unpinned
from tests.strategies import Sample
from torchfast._loader import pinned_ring, plan, shipment, staging, transport
from torchfast._loader.events import Events
from torchfast._loader.pinned_ring import PinnedBuffer
from torchfast._loader.plan import bytes_of
from torchfast._loader.stats import READ_EVERY, Tally
from torchfast._loader.transport import CudaTransport

KIB = 1024
DTYPES = (torch.uint8, torch.bool, torch.bfloat16, torch.int64, torch.complex128)
LAYOUTS = {
    "dense": lambda memory, n: memory[:n],
    "from an offset on": lambda memory, n: memory[3:][:n],
    "transposed": lambda memory, n: memory[: n // 6 * 6].view(n // 6, 3, 2).permute(2, 0, 1),
    "every other": lambda memory, n: memory[: 2 * n : 2],
    "expanded": lambda memory, n: memory[:1].expand(n),
}
SIZES_BYTES = st.one_of(
    st.sampled_from([0, 1, 100, 1023, KIB, 3000, 16 * KIB, 64 * KIB, 64 * KIB + 1, 128 * KIB]),
    st.integers(1, 200 * KIB),
)


class Kind(NamedTuple):
    """What a leaf is like."""

    n_bytes: int
    dtype: torch.dtype = torch.uint8
    layout: str = "dense"
    is_pinned: bool = False

    def leaf(self, seed: int) -> torch.Tensor:
        """Return a leaf of random numbers."""
        n = self.n_bytes // self.dtype.itemsize
        numbers = torch.Generator().manual_seed(seed)
        memory = torch.randint(0, 2, ((2 * n + 3) * self.dtype.itemsize,), generator=numbers)
        leaf: torch.Tensor = LAYOUTS[self.layout](memory.to(torch.uint8).view(self.dtype), n)
        return leaf


KINDS = st.builds(Kind, SIZES_BYTES, st.sampled_from(DTYPES), st.sampled_from([*LAYOUTS]), st.booleans())


class Consumer:
    """A stream that reads each batch as soon as it may."""

    cuda_stream = 0

    def wait_event(self, event: LateEvent) -> None:
        """Wait for what comes before an event."""
        event.synchronize()

    def record_event(self) -> LateEvent:
        """Return where it is: never behind."""
        return LateEvent(LateStream())

    def wait_stream(self, stream: LateStream) -> None:
        """Wait for all that is enqueued."""
        stream.go_on_to(stream.n_enqueued)


@contextmanager
def lagging(
    pinned: set[int], *, is_batched: bool, team: int, n_workers: int
) -> Iterator[tuple[LateStream, CudaTransport]]:
    """Return a device that lags, and a transport to it, for which all is large that is beyond some KiB."""
    late, consumer = LateStream(), Consumer()
    with pytest.MonkeyPatch.context() as patch, computing_with(team):
        late.replace_the_device(patch)
        if not is_batched:
            patch.setattr(shipment, "batched_copy", lambda: None)
        patch.setattr(torch.cuda, "Stream", lambda _: late)
        patch.setattr(torch.cuda, "current_stream", lambda _: consumer)
        patch.setattr(torch.cuda, "set_device", lambda _: None)
        patch.setattr(torch.cuda, "set_stream", lambda _: None)
        patch.setattr(transport, "current_raw_stream", lambda _: 0)
        patch.setattr(torch.Tensor, "is_pinned", lambda leaf: leaf.untyped_storage().data_ptr() in pinned)
        patch.setattr(PinnedBuffer, "grow", grow_unpinned)
        patch.setattr(staging, "team_size", lambda _: team)
        patch.setattr(staging, "CHUNK_BYTES", 64 * KIB)
        patch.setattr(pinned_ring, "LARGE_BYTES", 16 * KIB)
        patch.setattr(staging, "PAGE_BYTES", 64)
        patch.setattr(plan, "CHUNK_BYTES", 64 * KIB)
        patch.setattr(plan, "PACK_BELOW_BYTES", KIB)
        patch.setattr(plan, "STAGE_BELOW_BYTES", 64)
        device = torch.device("cpu")
        to_device = CudaTransport(
            device, 2, streams=(), borrows=True, pins=False, n_workers=n_workers, poison=False
        )
        to_device.begin(Tally())
        to_device.enter_thread()
        yield late, to_device
        to_device.leave_thread()


@settings(max_examples=100)
@example(likes=[[Kind(0), Kind(100)]], schedule=[(0, 0)] * 4, is_batched=True, team=3, way="thread")
@example(
    likes=[[Kind(64 * KIB)], [Kind(30 * KIB)] * 5],
    schedule=[(0, 1), (1, 0)] * 8,
    is_batched=True,
    team=3,
    way="thread",
)
@given(
    likes=st.lists(st.lists(KINDS, min_size=1, max_size=8), min_size=1, max_size=3),
    schedule=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 4)), max_size=16),
    is_batched=st.booleans(),
    team=st.sampled_from([1, 3, 16]),
    way=st.sampled_from(["thread", "here", "workers"]),
)
def test_every_byte_arrives(
    likes: list[list[Kind]], schedule: list[tuple[int, int]], *, is_batched: bool, team: int, way: str
) -> None:
    """Whatever batches there are, whoever sends them, though the loader uses its memory again at once."""
    send_and_check(likes, schedule, is_batched=is_batched, team=team, way=way)


@pytest.mark.parametrize("way", ["thread", "here", "workers"])
@given(
    likes=st.lists(st.lists(KINDS, min_size=1, max_size=4), min_size=1, max_size=3),
    schedule=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 4)), max_size=16),
)
def test_every_byte_of_small_batches_arrives_late(
    likes: list[list[Kind]], schedule: list[tuple[int, int]], way: str
) -> None:
    """In the loop's turn as well: then small batches are put off, out of the loader's reach too."""
    small = [kinds for kinds in likes if sum(kind.n_bytes for kind in kinds) <= 256 * KIB]
    n_put_off = send_and_check(likes, schedule, is_batched=True, team=3, way=way, is_loops_turn=True)
    sent = [likes[which % len(likes)] for which, _ in [*schedule, (0, 0), (0, 0)]]
    assert n_put_off == sum(kinds in small for kinds in sent)


def send_and_check(  # noqa: PLR0913 - what a test is about
    likes: list[list[Kind]],
    schedule: list[tuple[int, int]],
    *,
    is_batched: bool,
    team: int,
    way: str,
    is_loops_turn: bool = False,
) -> int:
    """Send batches, overwrite their memory, and check what arrives; return how many were put off."""
    pinned = set[int]()
    sent = list[tuple[Any, list[torch.Tensor]]]()
    n_workers, n_put_off = int(way == "workers"), 0
    with lagging(pinned, is_batched=is_batched, team=team, n_workers=n_workers) as (late, to_device):
        send = to_device.send_here if way == "here" else to_device.send
        to_device._is_loops_turn = is_loops_turn
        for number, (which, n_done) in enumerate([*schedule, (0, 0), (0, 0)]):
            kinds = likes[which % len(likes)]
            batch = [kind.leaf(number + place) for place, kind in enumerate(kinds)]
            if n_workers:
                batch = [leaf.share_memory_() for leaf in batch]
            pinned |= {
                leaf.untyped_storage().data_ptr()
                for leaf, kind in zip(batch, kinds, strict=True)
                if kind.is_pinned
            }
            expected = [leaf.clone() for leaf in batch]
            parcel = send(batch, to_device.blank())
            if parcel is None:  # too much for the loop's thread
                parcel = to_device.send(batch, to_device.blank())
            n_put_off += parcel.is_put_off
            sent.append((parcel, expected))
            late.go_on_to(late.n_done + n_done)
            to_device.settle()
            spoil(batch)
            if len(sent) > 2:
                check(to_device, *sent.pop(0))
        for parcel, expected in sent:
            check(to_device, parcel, expected)
    return n_put_off


def spoil(batch: Sequence[torch.Tensor]) -> None:
    """Overwrite the memory of a batch, as a loader does that uses it again."""
    for leaf in batch:
        whole = leaf.untyped_storage()
        torch.empty(0, dtype=torch.uint8).set_(whole, 0, (whole.nbytes(),), (1,)).fill_(77)


def check(to_device: CudaTransport, parcel: Any, expected: Sequence[torch.Tensor]) -> None:
    """Hold a batch to what it should be, bit by bit."""
    for leaf, should_be in zip(to_device.deliver(parcel, came_at_once=True), expected, strict=True):
        assert (leaf.dtype, leaf.shape) == (should_be.dtype, should_be.shape)
        assert torch.equal(bytes_of(leaf.contiguous()), bytes_of(should_be.contiguous()))


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.parametrize("unusual", [torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr])
def test_a_batch_with_tensors_that_have_no_storage_can_be_brought_back(
    unusual: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Sparse ones, which have not been moved by then: the others go back to the host."""
    with lagging(set(), is_batched=True, team=1, n_workers=0) as (_, to_device):
        parcel = to_device.send([torch.arange(10), unusual(torch.eye(3))], to_device.blank())
        to_device.evict(parcel)
        assert parcel.blank is None
        assert parcel.batch[0].tolist() == [*range(10)]
        assert torch.equal(parcel.batch[1].to_dense(), torch.eye(3))


class Named(NamedTuple):
    """What a loader yields beside a tensor."""

    ids: Any


@pytest.mark.parametrize(
    "beside",
    [Named, lambda ids: (1, ids), lambda ids: [Named((ids,))], lambda ids: {3: ids}],
)
def test_arrays_beside_tensors_are_kept_from_the_loader(beside: Callable[[Any], Any]) -> None:
    """Whatever holds them: it may write over them before the batch is handed out."""
    numpy = pytest.importorskip("numpy")
    ids = numpy.zeros(2)
    with lagging(set(), is_batched=True, team=1, n_workers=0) as (_, to_device):
        parcel = to_device.send((torch.zeros(3), beside(ids)), None)
        ids.fill(7)
        _, found = to_device.deliver(parcel, came_at_once=True)
    assert repr(found) == repr(beside(numpy.zeros(2)))
    assert type(found) is type(beside(ids))


def test_memory_of_workers_goes_back_once_a_batch_is_settled() -> None:
    """The second mapping, through which it was read, stays until PyTorch's own may be gone."""
    with lagging(set(), is_batched=True, team=1, n_workers=1) as (_, to_device):
        parcel = to_device.send([torch.zeros(2**20).share_memory_()], to_device.blank())
        dropper = to_device._staging._of_thread.dropper
        assert len(dropper._taken) == 1
        to_device.settle()
        assert not dropper._taken
        dropper.close()
        assert int(to_device.deliver(parcel, came_at_once=True)[0].sum()) == 0


SMALL = [torch.zeros(100), torch.zeros(3, dtype=torch.uint8)]
"""A batch that either thread may copy, at either end of its way."""


@pytest.mark.parametrize("way", ["send", "send_here"])
def test_only_small_batches_are_copied_late(way: str) -> None:
    """In the loop's turn others are copied ahead all the same; by the thread, unless of many leaves."""
    batches: dict[str, list[Any]] = {
        "small": SMALL,
        "as much as may be": [torch.zeros(16 * KIB) for _ in range(4)],
        "a byte more": [*SMALL[1:], torch.zeros(64 * KIB)],
        "a leaf more": [torch.zeros(3) for _ in range(5)],
        "many": [torch.zeros(3) for _ in range(16)],
        "of another kind": [*SMALL, torch.zeros(2).to_sparse()],
        "empty": ["no tensors"],
    }
    found, parcels = dict[str, str](), list[Any]()
    with lagging(set(), is_batched=True, team=1, n_workers=0) as (_, to_device):
        to_device._is_loops_turn = True
        for name, batch in batches.items():
            parcels.append(parcel := getattr(to_device, way)(batch, None))
            found[name] = "left" if parcel is None else "late" if parcel.is_put_off else "ahead"
    others = dict.fromkeys(batches, "ahead" if way == "send" else "left")
    assert found == others | {"small": "late", "as much as may be": "late", "many": "ahead"}


def test_what_is_put_off_is_for_named_streams_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Like what was copied ahead: they may use it after the loop dropped it."""
    named, used = object(), list[tuple[torch.Tensor, object]]()
    monkeypatch.setattr(transport, "record_use", lambda leaf, stream: used.append((leaf, stream)))
    with lagging(set(), is_batched=True, team=1, n_workers=0) as (_, to_device):
        to_device._is_loops_turn, to_device._streams = True, (named,)  # type: ignore[assignment]
        batch = to_device.deliver(to_device.send(SMALL, None), came_at_once=True)
    assert [(id(leaf), stream) for leaf, stream in used] == [(id(leaf), named) for leaf in batch]


def test_pinned_memory_of_what_is_put_off_is_held_until_it_was_read() -> None:
    """PyTorch does that for memory that it pinned; for that of others nobody else would."""
    batch = [torch.zeros(100)]
    with lagging({batch[0].data_ptr()}, is_batched=True, team=1, n_workers=0) as (late, to_device):
        to_device._is_loops_turn, to_device._borrows = True, False
        to_device._consumer.record_event = late.mark  # type: ignore[assignment, method-assign]
        to_device.deliver(to_device.send(batch, None), came_at_once=True)
        late.enqueue([0], [0], [0], 0)
        to_device.deliver(to_device.send(batch, None), came_at_once=True)
        held = [read.memory for read in shipment._being_read]
        assert {read.stream for read in shipment._being_read} == {to_device._consumer}
        assert [leaf is batch[0] for memory in held for leaf in memory] == [True, True]
        to_device._tally.read()
        assert not {read.ended for read in shipment._being_read} & {*to_device._events._idle}
        to_device.settle()
        assert len(shipment._being_read) == 1
        late.go_on_to(1)
        to_device.settle()
        assert not shipment._being_read


def test_the_turn_decides_when_a_small_batch_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ahead in the thread's turn; late in the loop's, and then no memory is set aside."""
    turns = itertools.cycle([False, False, True, True, True])
    with lagging(set(), is_batched=True, team=1, n_workers=0) as (_, to_device):
        monkeypatch.setattr(to_device._turns, "is_here", lambda _: next(turns))
        found = []
        for _ in range(11):
            to_device.follow(0.0)
            blank = to_device.blank()
            parcel = to_device.send(SMALL, blank)
            found.append((blank is not None, parcel.blank is not None))
            assert parcel.n_bytes == 403
            to_device.deliver(parcel, came_at_once=True)
    ahead, first_ahead, late, first_late = (True, True), (False, True), (False, False), (True, False)
    later_turns = [ahead, ahead, first_late, late, late]
    assert found == [first_ahead, *later_turns, first_ahead, *later_turns[1:]]


def test_only_steps_of_the_loop_are_timed() -> None:
    """Neither what is between two passes, nor the time until the first batch, nor what others take."""
    large = [torch.zeros(80 * KIB)]
    with lagging(set(), is_batched=True, team=1, n_workers=0) as (_, to_device):
        to_device.deliver(to_device.send(SMALL, None), came_at_once=True)
        for begun_s in (0.0, 100.0):
            to_device.begin(Tally())
            for taken_s in (1, 10, 11):  # the first is long in coming
                to_device.follow(begun_s + taken_s)
        assert to_device._turns._steps_s == [1.0, 1.0]
        for number in range(8):
            to_device.blank()
            to_device.deliver(to_device.send(SMALL if number % 4 else large, None), came_at_once=True)
            to_device.follow(200.0 + number)
        assert to_device._turns._steps_s == [1.0, 1.0]
        assert to_device._tally.stats().n_batches == 8


@pytest.mark.parametrize("came_at_once", [True, False])
@pytest.mark.parametrize("is_over", [True, False])
@pytest.mark.parametrize("is_evicted", [True, False])
def test_what_was_there_is_neither_waited_for_nor_marked(
    *, is_evicted: bool, is_over: bool, came_at_once: bool
) -> None:
    """Only there did the device stand still for nothing: else it is asked when the batch came."""
    batch, waited = [torch.zeros(80 * KIB)], list[object]()
    with lagging({batch[0].data_ptr()}, is_batched=True, team=1, n_workers=0) as (late, to_device):
        to_device._consumer.wait_event = waited.append  # type: ignore[assignment, method-assign]
        to_device.blank()
        parcel = to_device.send(batch, None)
        late.go_on_to(late.n_enqueued if is_over else 0)
        if is_evicted:  # then it moves as it is handed out
            to_device.evict(parcel)
        to_device.deliver(parcel, came_at_once=came_at_once)
        (moment,) = to_device._tally.moments
    was_there = is_over and came_at_once and not is_evicted
    assert (moment.there is moment.asked.event) is was_there
    assert waited == ([] if was_there else parcel.ready)


def test_a_batch_is_noted_once() -> None:
    """Also where it comes again, after an interrupt, and the loop asked anew."""
    with lagging(set(), is_batched=True, team=1, n_workers=0) as (_, to_device):
        to_device.blank()
        parcel = to_device.send([torch.zeros(80 * KIB)], None)
        for _ in range(2):
            to_device.deliver(parcel, came_at_once=False)
        to_device.blank()
        to_device.deliver(parcel, came_at_once=False)
        (moment,) = to_device._tally.moments
    assert moment.spans
    assert moment.n_bytes == 320 * KIB


@pytest.mark.parametrize("settles_every", [1, 10])
@pytest.mark.parametrize("is_pinned", [True, False])
@pytest.mark.parametrize("is_loops_turn", [True, False])
@pytest.mark.parametrize("n_leaves", [1, 20])
def test_in_the_long_run_no_event_is_made(
    monkeypatch: pytest.MonkeyPatch,
    *,
    n_leaves: int,
    is_loops_turn: bool,
    is_pinned: bool,
    settles_every: int,
) -> None:
    """Making one takes as long as recording two. Those that are recorded again are nowhere else."""
    batch = [torch.zeros(100) for _ in range(n_leaves)]
    pinned = {leaf.data_ptr() for leaf in batch} if is_pinned else set[int]()
    made, n_made = list[LateEvent](), 0
    with lagging(pinned, is_batched=True, team=1, n_workers=0) as (late, to_device):
        to_device._is_loops_turn, to_device._borrows = is_loops_turn, False
        watch_what_is_given_back(monkeypatch, to_device)

        def new_event(**_: object) -> LateEvent:
            made.append(late.event())
            return made[-1]

        monkeypatch.setattr(torch.cuda, "Event", new_event)
        for number in range(120):
            n_enqueued = late.n_enqueued
            parcel = to_device.send(batch, to_device.blank())
            late.go_on_to(n_enqueued)
            to_device.deliver(parcel, came_at_once=True)
            if number % settles_every == 0:
                to_device.settle()
            n_made = len(made) if number == 60 else n_made
    assert 0 < n_made == len(made)


@pytest.mark.parametrize("n_batches", [1, READ_EVERY, 40])
def test_memory_that_was_read_goes_at_the_next_batch(n_batches: int) -> None:
    """However long passes are: nothing may pile up where one begins before the last has been read."""
    n_held = list[int]()
    leaves = [[torch.zeros(2 * KIB)] for _ in range(40)]
    with lagging({leaf.data_ptr() for (leaf,) in leaves}, is_batched=True, team=1, n_workers=0) as (late, it):
        it._borrows = False
        for number, batch in enumerate(leaves):
            if number % n_batches == 0:
                it.begin(Tally())
            it.deliver(it.send(batch, it.blank()), came_at_once=False)
            n_held.append(len(shipment._being_read))
            late.go_on_to(late.n_enqueued)
            it.settle()
    assert set(n_held) == {1}
    assert not shipment._being_read


def test_what_another_thread_counts_meanwhile_is_given_back_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks for the record just behind the letting go: the memory of those batches is still held."""
    with lagging(set(), is_batched=True, team=1, n_workers=0) as (late, to_device):
        given_back = watch_what_is_given_back(monkeypatch, to_device)

        def let_go_and_read() -> None:
            shipment.let_go_of_what_was_read()
            late.go_on_to(late.n_enqueued)
            to_device._tally.read()

        monkeypatch.setattr(transport, "let_go_of_what_was_read", let_go_and_read)
        waited = list[object]()
        to_device._consumer.wait_event = waited.append  # type: ignore[assignment, method-assign]
        batches = list[Any]()
        for number in range(40):
            parcel = to_device.send([torch.zeros(100)] * 20, to_device.blank())
            batches.append(to_device.deliver(parcel, came_at_once=False))
            if number % 10 == 9:
                to_device.settle()
    assert waited
    assert given_back


def watch_what_is_given_back(patch: pytest.MonkeyPatch, to_device: CudaTransport) -> list[Any]:
    """Hold every event that is to be recorded again to being idle; return what will have been given back."""
    given_back = list[Any]()
    give_back = Events.give_back

    def watched(events: Events, some: Iterable[Any]) -> None:
        some = [*some]
        assert len({*some, *events._idle}) == len(some) + len(events._idle)
        assert not busy_events(to_device) & {*some}
        given_back.extend(some)
        give_back(events, some)

    patch.setattr(Events, "give_back", watched)
    return given_back


def busy_events(to_device: CudaTransport) -> set[Any]:
    """Return the events of batches that are to be counted, and those that guard host memory."""
    tally, ring = to_device._tally, to_device._staging._ring
    moments = [*tally.moments, *filter(None, [tally._latest])]
    counted = {event for moment in moments for event in moment.reusable()}
    reads = {buffer.read for buffer in (*ring._small, *ring._large)} | {*shipment._being_read}
    guarding = {read.ended for read in reads if read}
    return (counted | guarding | {tally._first_there, to_device._borrowed}) - {None}


def test_where_memory_is_poisoned_nothing_is_copied_late() -> None:
    """Memory that is not the loader's own cannot show a late read."""
    with lagging(set(), is_batched=True, team=1, n_workers=0) as (_, to_device):
        to_device._is_loops_turn = to_device._poison = True
        assert to_device.send(SMALL, None).blank is not None


def test_what_is_copied_late_is_fit_for_a_backward() -> None:
    """Also where the loop is in inference mode: as is what was copied ahead."""
    with lagging(set(), is_batched=True, team=1, n_workers=0) as (_, to_device):
        to_device._is_loops_turn = True
        to_device._device = torch.device("meta")  # where a copy is one
        parcel = to_device.send(SMALL, None)
        with torch.inference_mode():
            arrived = to_device.deliver(parcel, came_at_once=True)
    assert [leaf.is_meta for leaf in arrived] == [True, True]
    assert not any(leaf.is_inference() for leaf in arrived)


@pytest.mark.parametrize("is_pinned", [False, True])
@pytest.mark.parametrize("size", [4, 60])
def test_what_is_cropped_stays_channels_last(size: int, *, is_pinned: bool) -> None:
    """Tensors with gaps become dense as by `.to`, small ones and large ones."""
    images = torch.arange(2 * 3 * 64 * 64.0).view(2, 3, 64, 64).to(memory_format=torch.channels_last)
    cropped = images[:, :, :size, :size]
    pinned = {images.untyped_storage().data_ptr()} if is_pinned else set[int]()
    with lagging(pinned, is_batched=True, team=3, n_workers=0) as (_, to_device):
        (arrived,) = to_device.deliver(to_device.send([cropped], to_device.blank()), came_at_once=True)
    assert torch.equal(arrived, cropped)
    assert arrived.stride() == (3 * size * size, 1, 3 * size, 3)


def test_a_batch_without_room_is_out_of_the_loaders_reach_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory, a batch waits on the host in copies of its tensors and of its plain data."""

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("full")

    numbers, names = torch.zeros(3), ["a"]
    with lagging(set(), is_batched=True, team=1, n_workers=0) as (_, to_device):
        monkeypatch.setattr(to_device._blanks, "_allocate", full)
        parcel = to_device.send({"numbers": numbers, "names": names}, None)
        to_device.settle()
        numbers.fill_(7)
        names[0] = "b"
        batch = to_device.deliver(parcel, came_at_once=True)
    assert (batch["numbers"].tolist(), batch["names"]) == ([0, 0, 0], ["a"])


class Fresh(Mapping[str, Any]):
    """A mapping that makes its values when it is asked for them, and keeps none."""

    def __init__(self, **made: Any) -> None:
        self._made = made

    def __getitem__(self, key: str) -> Any:
        made = self._made[key]
        return made if isinstance(made, torch.Tensor) else [made]

    def __iter__(self) -> Iterator[str]:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)

    def __setitem__(self, key: str, value: Any) -> None:
        self._made[key] = value


def test_data_that_goes_at_once_is_not_taken_for_what_comes_in_its_place() -> None:
    """A list that nobody else holds may be followed by another at the same address."""
    batch = Fresh(numbers=torch.zeros(3), **{str(number): number for number in range(50)})
    with lagging(set(), is_batched=True, team=1, n_workers=0) as (_, to_device):
        arrived = to_device.deliver(to_device.send(batch, None), came_at_once=True)
    assert [arrived[str(number)] for number in range(50)] == [[[number]] for number in range(50)]


def test_plain_data_is_out_of_the_loaders_reach_too() -> None:
    """Arrays, lists, dicts and sets that the loader writes over arrive as they were, other objects whole."""
    numpy = pytest.importorskip("numpy")
    numbers, names, notes, seen, other = torch.zeros(3), ["a"], {"n": [1]}, {1}, Sample(["a"])
    ids = numpy.zeros(2)
    pair = (ids, torch.eye(2).to_sparse())
    file = numpy.zeros(2).view(type("memmap", (numpy.ndarray,), {}))
    whole = {"numbers": numbers, "ids": ids, "names": names, "notes": notes, "seen": seen, "other": other}
    whole |= {"again": names, "file": file}
    with lagging(set(), is_batched=True, team=1, n_workers=0) as (_, to_device):
        parcels = [to_device.send(batch, None) for batch in (whole, ids, notes, pair)]
        to_device.settle()
        numbers.fill_(7)
        ids.fill(7)
        names[0], notes["n"][0] = "b", 7
        seen.add(2)
        first, array, noted, (in_pair, _) = (
            to_device.deliver(parcel, came_at_once=True) for parcel in parcels
        )
    assert first.pop("again") is first["names"]
    assert first.pop("file") is file
    assert first.pop("numbers").tolist() == [0, 0, 0]
    assert first.pop("ids").tolist() == array.tolist() == in_pair.tolist() == [0, 0]
    assert first.pop("other") is other
    assert first == {"names": ["a"], "notes": {"n": [1]}, "seen": {1}}
    assert noted == {"n": [1]}
