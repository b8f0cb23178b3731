"""The thread that loads and copies ahead, shown on the CPU with a transport that only hands batches over."""

import contextlib
import gc
import itertools
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Any
from weakref import WeakSet

import pytest
import torch

from tests.loader_sources import failing
from tests.loader_transport import HostTransport, copying_threads, number_of_a_new_thread, open_feed, until
from torchfast._loader import epoch as epochs
from torchfast._loader import thread
from torchfast._loader.epoch import Epoch
from torchfast._loader.events import Gate
from torchfast._loader.feed import ThreadedFeed
from torchfast._loader.stats import READ_EVERY, Moment, Tally
from torchfast._loader.thread import Arrival, Stop, Work, no_state


@pytest.mark.parametrize("depth", [1, 2, 7])
def test_order_and_end(depth: int) -> None:
    """Batches come in order, the end comes once and stays, and the thread is gone."""
    epoch, _, _ = open_feed(range(20), depth)
    assert list(epoch) == list(range(20))
    assert list(epoch) == []
    assert copying_threads() == 0


def test_a_pass_that_its_own_thread_ended_is_waited_for_by_the_next_close() -> None:
    """The collector may end a pass in its thread, which cannot wait for itself: who closes it again does."""
    is_taken, has_closed, may_end = (threading.Event() for _ in range(3))

    def source() -> Iterator[int]:
        yield 0
        is_taken.wait()
        feed.close()
        has_closed.set()
        may_end.wait()

    epoch, _, feed = open_feed(source(), 1)
    assert next(epoch) == 0
    is_taken.set()
    has_closed.wait()
    waiting = threading.Thread(target=feed.close)
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()
    may_end.set()
    waiting.join()
    assert not feed._thread.is_alive()


@pytest.mark.parametrize("moment", ["enter_thread", "step", "leave_thread", "run"])
def test_the_collector_may_end_a_pass_in_any_thread(moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its last reference goes its thread is not waited for without end: it may be waiting for that one.

    Here a loader goes through a second one, and the first pass is dropped as the thread of the second starts,
    loads, and ends.
    """
    monkeypatch.setattr(epochs, "PATIENCE_S", 0.2)
    owner = Work if moment in ("step", "run") else HostTransport
    dropped_in, original = list[str](), getattr(owner, moment)

    def drop_first(self: Any) -> Any:
        if held and threading.current_thread() is not outer_feed._thread:
            held.clear()
            dropped_in.append(threading.current_thread().name)
        return original(self)

    is_held = threading.Event()

    def through_another() -> Iterator[int]:
        is_held.wait()
        inner, _, _ = open_feed(range(3))
        yield from inner

    outer, _, outer_feed = open_feed(through_another())
    held = [outer]
    del outer
    monkeypatch.setattr(owner, moment, drop_first)
    is_held.set()
    outer_feed._thread.join(30)
    assert not outer_feed._thread.is_alive()
    assert dropped_in == ["torchfast-loader"]
    until(lambda: copying_threads() == 0)


@pytest.mark.parametrize("is_in_time", [True, False])
def test_a_pass_that_is_dropped_in_another_thread_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, *, is_in_time: bool
) -> None:
    """For so long that the loader may be used again; whatever was sent too late stays nowhere."""
    is_sending, may_send = threading.Event(), threading.Event()

    def send(_: HostTransport, batch: Any, blank: object) -> Any:
        if batch == 1 and blank is None:
            is_sending.set()
            may_send.wait()
        return [batch]

    monkeypatch.setattr(HostTransport, "send", send)
    monkeypatch.setattr(epochs, "PATIENCE_S", 30.0 if is_in_time else 0.05)
    epoch, _, feed = open_feed(range(5))
    held = [epoch]
    taking = threading.Thread(target=next, args=(epoch,))
    del epoch
    taking.start()
    taking.join()
    del taking
    is_sending.wait()
    if is_in_time:
        threading.Timer(0.05, may_send.set).start()
    held.clear()
    assert feed._thread.is_alive() is not is_in_time
    may_send.set()
    feed.close()
    assert not feed._thread.is_alive()
    assert [arrival.parcel for arrival in feed._work.ready if arrival.parcel is not None] == []


def test_a_loaders_own_code_may_close_the_pass_that_it_feeds() -> None:
    """Where a loader is fed by another, the inner thread does not wait for the outer, which waits for it."""
    inner_may_go_on = threading.Event()
    feeds = list[ThreadedFeed]()

    def inner() -> Iterator[int]:
        yield 0
        inner_may_go_on.wait()
        feeds[1].close()
        yield 1

    first, _, inner_feed = open_feed(inner())
    outer, _, outer_feed = open_feed(batch for batch in first)
    feeds += [inner_feed, outer_feed]
    assert next(outer) == 0
    inner_may_go_on.set()
    for feed in feeds:
        feed._thread.join(30)
        assert not feed._thread.is_alive()


def test_a_loader_that_closes_its_own_pass_wakes_who_waits_for_its_batch() -> None:
    """The consumer is told that the pass was closed, and nothing is left of its thread."""
    is_taken = threading.Event()

    def source() -> Iterator[int]:
        yield 0
        is_taken.wait()
        until(lambda: feed._work._is_awaited)
        feed.close()
        yield 1

    epoch, _, feed = open_feed(source(), 1)
    assert next(epoch) == 0
    is_taken.set()
    with pytest.raises(RuntimeError, match="was closed"):
        next(epoch)
    feed.close()
    assert not feed._thread.is_alive()
    assert feed._thread.ident not in thread._at_work


def test_an_index_error_of_the_transport_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a pass that was closed says that it was."""
    epoch, transport, _ = open_feed(range(3))

    def fail() -> None:
        raise IndexError("mine")

    monkeypatch.setattr(transport, "blank", fail)
    with pytest.raises(IndexError, match="mine"):
        next(epoch)
    monkeypatch.undo()
    assert list(epoch) == [0, 1, 2]


class Memory:
    """Device memory, or a batch in it."""


class MemoryTransport(HostTransport):
    """Hands out batches in memory of the consumer's, and knows which of it is still held."""

    def __init__(self) -> None:
        super().__init__()
        self.held: WeakSet[Memory] = WeakSet()

    def blank(self) -> Any:
        """Set memory aside."""
        self.held.add(blank := Memory())
        return blank

    def send(self, batch: Any, blank: Any) -> Any:
        """Put a batch there."""
        return [(batch, blank)]


def test_a_batch_is_held_by_who_took_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a batch is in line the copying thread may stand still: its memory goes with its last user."""
    may_go_on, n_words = threading.Event(), itertools.count()

    class StandsStill(SimpleQueue[None]):
        def put(self, item: None, block: bool = True, timeout: float | None = None) -> None:  # noqa: FBT001, FBT002 -- as it is declared
            super().put(item, block, timeout)
            if next(n_words) == 3:
                may_go_on.wait()

    def source() -> Iterator[Memory]:
        is_made.wait()
        for _ in range(6):
            until(lambda: feed._work._is_awaited)
            yield Memory()

    monkeypatch.setattr("torchfast._loader.thread.SimpleQueue", StandsStill)
    is_made, transport = threading.Event(), MemoryTransport()
    feed = ThreadedFeed(source(), transport, Tally(), depth=1, snapshot=no_state)
    is_made.set()
    for _ in range(3):
        feed.take()
    batch, blank = feed.take()
    assert blank in transport.held
    gone = weakref.ref(batch), weakref.ref(blank)
    del batch, blank
    assert [one() for one in gone] == [None, None]
    may_go_on.set()
    feed.close()


def test_a_thread_holds_nothing_of_a_batch_as_it_goes_on() -> None:
    """When the transport may let go of the memory that it copied from, the loader's own tensors are gone."""

    class Copying(HostTransport):
        """Sends copies, and looks what is left of the batches."""

        def __init__(self) -> None:
            super().__init__()
            self.of_loader = WeakSet[torch.Tensor]()
            self.left = list[int]()

        def settle(self) -> None:
            self.left.append(len(self.of_loader))

        def send(self, batch: Any, blank: object) -> Any:
            self.of_loader.add(batch)
            return super().send(batch.clone(), blank)

    transport = Copying()
    source = map(torch.tensor, range(6))  # which holds no batch that it has given
    feed = ThreadedFeed(source, transport, Tally(), depth=1, snapshot=no_state)
    epoch: Epoch[torch.Tensor] = Epoch(feed, None, owner=None)
    assert [int(batch) for batch in epoch] == [*range(6)]
    assert transport.left == [0] * 7


@pytest.mark.parametrize("fails", [False, True])
def test_a_thread_lets_go_before_it_is_taken_for_ended(*, fails: bool) -> None:
    """Whether the pass ends well or badly, the transport is told once, and before anybody goes on."""
    may_end = threading.Event()

    def source() -> Iterator[int]:
        yield 0
        may_end.wait()
        if fails:
            raise SystemExit

    epoch, transport, feed = open_feed(source())
    seen, let_go = [], transport.leave_thread

    def watched() -> None:
        seen.append(feed._work.left.wait(0))
        let_go()

    transport.leave_thread = watched  # type: ignore[method-assign]
    may_end.set()
    with contextlib.suppress(SystemExit):
        list(epoch)
    epoch.close()
    assert seen == [False]
    assert transport.n_left == 1


def test_an_empty_source_ends_at_once() -> None:
    """A loader without batches yields none."""
    assert list(open_feed([])[0]) == []


@pytest.mark.parametrize("depth", [1, 3])
def test_no_more_than_depth_batches_are_sent_ahead(depth: int) -> None:
    """However fast the loader, depth batches are sent beyond the one in the consumer's hands."""
    epoch, transport, feed = open_feed(range(100), depth)
    until(lambda: len(feed._work.ready) == depth)
    for taken in range(1, 6):
        next(epoch)
        until(lambda: len(feed._work.ready) == depth)
        assert transport.n_sent == taken + depth


def test_a_slow_batch_does_not_delay_the_one_before_it() -> None:
    """Batch k is handed out while batch k + 1 is still being made."""
    may_go_on = threading.Event()

    def source() -> Iterator[int]:
        yield 0
        may_go_on.wait()
        yield 1

    epoch, _, _ = open_feed(source())
    assert next(epoch) == 0
    may_go_on.set()
    assert next(epoch) == 1


def test_an_error_of_the_loader_comes_in_its_place() -> None:
    """The batches before the error come first; then it is raised, with the frames of the loader's code."""
    epoch, _, _ = open_feed(failing(3))
    assert [next(epoch) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(LookupError, match="broken") as error:
        next(epoch)
    assert "failing" in [entry.name for entry in error.traceback]
    assert list(epoch) == []


def test_an_error_of_the_transfer_comes_in_its_place() -> None:
    """A transfer that fails takes the place of its batch, and the others arrive."""
    transport = HostTransport()
    transport.sending_fails_at = 2
    epoch: Epoch[int] = Epoch(
        ThreadedFeed(iter(range(5)), transport, Tally(), depth=2, snapshot=no_state), None, owner=None
    )
    assert [next(epoch), next(epoch)] == [0, 1]
    with pytest.raises(ConnectionError, match="transfer failed"):
        next(epoch)
    assert list(epoch) == [3, 4]


def test_a_batch_that_found_no_room_is_not_lost() -> None:
    """Out of memory at delivery leaves the batch first in line."""
    epoch, transport, _ = open_feed(range(3))
    transport.delivery_fails_once = True
    with pytest.raises(torch.OutOfMemoryError):
        next(epoch)
    assert list(epoch) == [0, 1, 2]


def test_a_batch_came_at_once_if_nothing_took_time_since_the_loop_asked() -> None:
    """Not where the loop sent another, nor where it takes what it had asked for before."""
    epoch, transport, feed = open_feed(range(20), turns=itertools.repeat(False))
    found = [next(epoch)]
    for sends_here in (False, True, False):
        until(lambda: len(feed._work.ready) > 0 and len(feed._work.loaded) > 0)
        transport.sends_here = itertools.repeat(sends_here)
        found.append(next(epoch))
    until(lambda: len(feed._work.ready) > 0)
    transport.delivery_fails_once = True
    with pytest.raises(torch.OutOfMemoryError):
        next(epoch)
    found.append(next(epoch))
    assert transport.came_at_once[1:] == [True, False, True, True, False]
    assert transport.n_sent_here == 1
    assert [*found, *epoch] == [*range(20)]


def test_no_memory_is_set_aside_for_a_batch_that_was_sent_before_an_interrupt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The loop has sent it, and owes no other: memory beyond `depth` batches would be taken for nothing."""
    epoch, transport, feed = open_feed(range(6), turns=itertools.repeat(True))
    found = [next(epoch)]
    until(lambda: len(feed._work.ready) > 0 and len(feed._work.loaded) > 0)
    go_on, n_set_aside = feed._work.go_on_here, itertools.count()

    def interrupted() -> None:
        monkeypatch.setattr(feed._work, "go_on_here", go_on)
        raise KeyboardInterrupt

    monkeypatch.setattr(feed._work, "go_on_here", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(epoch)
    assert isinstance(feed._work.here[0], Arrival)
    monkeypatch.setattr(transport, "blank", lambda: (next(n_set_aside), None)[1])
    found.append(next(epoch))
    assert next(n_set_aside) == 0
    assert [*found, *epoch] == [*range(6)]


def test_what_was_waited_for_did_not_come_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However short the wait was."""
    epoch, transport, feed = open_feed(range(2))
    wait = feed._work.wait_for_arrival
    monkeypatch.setattr(feed._work, "wait_for_arrival", lambda: wait() or 1e-9)
    assert list(epoch) == [0, 1]
    assert transport.came_at_once == [False, False]


def test_an_interrupt_loses_no_batch() -> None:
    """A keyboard interrupt while a batch is handed out leaves it in line, with its memory."""
    epoch, transport, _ = open_feed(range(3))
    transport.delivery_is_interrupted_once = True
    with pytest.raises(KeyboardInterrupt):
        next(epoch)
    assert list(epoch) == [0, 1, 2]


def test_a_batch_that_cannot_be_moved_is_passed_over_after_its_error() -> None:
    """An error of a batch's own `.to` is raised once, behind a fence, and the pass goes on."""
    epoch, transport, _ = open_feed(range(3))
    transport.delivery_breaks_once = True
    with pytest.raises(ConnectionError):
        next(epoch)
    assert transport.n_fences == 1
    assert list(epoch) == [1, 2]


def test_loading_goes_on_while_the_loop_handles_an_error() -> None:
    """The thread is woken for the next batch behind a delivery that failed too."""
    epoch, transport, feed = open_feed(range(9))
    until(lambda: len(feed._work.ready) == 2 and feed._work.permits._is_listening)
    transport.delivery_breaks_once = True
    with pytest.raises(ConnectionError):
        next(epoch)
    until(lambda: transport.n_sent == 3)
    assert list(epoch) == [*range(1, 9)]


def test_what_is_dropped_is_fenced_first() -> None:
    """Closing a pass with copies under way makes the owners of their memory wait for them."""
    epoch, transport, feed = open_feed(range(9))
    next(epoch)
    until(lambda: len(feed._work.ready) == 2)
    epoch.close()
    assert transport.n_fences >= 1
    assert copying_threads() == 0


class Blank:
    """Stands for memory that was set aside for a batch."""


@pytest.mark.parametrize("is_closed", [True, False])
def test_memory_set_aside_goes_with_the_pass(*, is_closed: bool) -> None:
    """What was laid down for batches that never came is let go of, though the loader still holds the feed."""
    transport, blanks = HostTransport(), WeakSet[Blank]()

    def blank() -> Blank:
        blanks.add(made := Blank())
        return made

    transport.blank = blank  # type: ignore[assignment, method-assign]
    transport.send = lambda batch, _: [batch]  # type: ignore[assignment, method-assign]
    feed = ThreadedFeed(iter(range(9)), transport, Tally(), depth=3, snapshot=no_state)
    epoch: Epoch[int] = Epoch(feed, None, owner=None)
    for _ in range(5 if is_closed else 9):
        next(epoch)
    epoch.close() if is_closed else list(epoch)
    assert feed._work.left.wait()
    assert not blanks


def test_released_batches_keep_their_order() -> None:
    """Batches that were brought back to the host are handed out in their turn."""
    epoch, transport, feed = open_feed(range(10), depth=3)
    assert next(epoch) == 0
    until(lambda: len(feed._work.ready) == 3)
    epoch.release_memory()
    assert transport.n_evicted == 3
    assert list(epoch) == list(range(1, 10))


def test_an_epoch_that_nobody_holds_ends_its_thread() -> None:
    """Dropping the iterator ends the thread, and with it the loader's own iterator, then and there."""
    closed = threading.Event()

    def source() -> Iterator[int]:
        try:
            while True:
                yield 0
        finally:
            closed.set()

    epoch, _, feed = open_feed(source())
    next(epoch)
    del feed
    del epoch
    assert closed.is_set()
    assert copying_threads() == 0


@pytest.mark.parametrize(
    ("text", "n_told"),
    [("DataLoader worker (pid 7) is killed by signal: Killed.", 0), ("CUDA error: illegal memory access", 1)],
)
def test_what_fails_while_a_dropped_pass_is_closed_is_told(
    text: str, n_told: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the end of a worker is kept quiet, whose batch has told of it; an error of the device is not."""
    told = list[object]()
    monkeypatch.setattr(sys, "unraisablehook", lambda failure: told.append(str(failure.exc_value)))
    epoch, _, feed = open_feed(iter([0, 1]))

    def close() -> None:
        raise RuntimeError(text)

    with monkeypatch.context() as patch:
        patch.setattr(feed, "abandon", close)
        del epoch
        gc.collect()
    feed.close()
    assert told == [text] * n_told


def test_an_epoch_in_a_cycle_is_collected() -> None:
    """The thread holds nothing that leads back to the epoch: a forgotten cycle is collected and closed."""
    holder: list[Any] = [open_feed(range(100))[0]]
    holder.append(holder)
    gone = weakref.ref(holder[0])
    del holder
    gc.collect()
    assert gone() is None
    assert copying_threads() == 0


def test_a_thousand_breaks() -> None:
    """A thousand passes left early leave no thread behind."""
    for _ in range(1000):
        epoch, _, feed = open_feed(range(5))
        assert next(epoch) == 0
        del feed, _
        del epoch
    assert copying_threads() == 0


def test_a_pass_closed_elsewhere_is_an_error_not_a_hang() -> None:
    """A consumer that waits for a batch while another thread closes the pass is told so."""
    may_go_on = threading.Event()

    def source() -> Iterator[int]:
        may_go_on.wait()
        yield 0

    epoch, _, _ = open_feed(source())
    errors: list[BaseException] = []

    def consume() -> None:
        try:
            next(epoch)
        except RuntimeError as error:
            errors.append(error)

    consumer = threading.Thread(target=consume)
    consumer.start()
    closer = threading.Thread(target=epoch.close)
    closer.start()
    until(lambda: epoch._state == "closed")
    may_go_on.set()
    consumer.join()
    closer.join()
    assert ["was closed" in str(error) for error in errors] == [True]


def test_a_forked_process_is_told_that_the_pass_is_not_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """In another process than the one that began it, a pass is refused, and left alone."""
    epoch, _, _ = open_feed(range(3))
    with monkeypatch.context() as forked:
        forked.setattr("os.getpid", lambda: -1)
        with pytest.raises(RuntimeError) as error:
            next(epoch)
        epoch._feed.close()
    assert str(error.value) == (
        "this pass over a DeviceLoader was begun in another process, and its thread did not survive the "
        "fork. Begin a new pass in this process."
    )
    assert list(epoch) == [0, 1, 2]


def said_by(script: str) -> tuple[str, str]:
    """Return what a script says, and what it complains of, in a process that ends well."""
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    return ended.stdout, ended.stderr


def test_an_exit_does_not_wait_for_a_loader_that_is_stuck() -> None:
    """The interpreter ends though the thread is inside a loader that never returns."""
    script = """
import threading
from tests.loader_transport import threaded
from torchfast._loader import epoch

def stuck():
    yield 1
    threading.Event().wait()

epoch.PATIENCE_S = 0.1
batches = iter(threaded(stuck()))
print(next(batches))
"""
    assert said_by(script) == ("1\n", "")


def test_what_cannot_be_closed_keeps_nothing_else_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that has failed a pass ends with that error, its thread all the same, and the others."""
    monkeypatch.setattr(epochs, "exiting", threading.Event())
    passes = [open_feed(itertools.repeat(number)) for number in range(3)]

    def fail() -> None:
        raise torch.AcceleratorError("device-side assert triggered")

    assert [next(one) for one, _, _ in passes] == [0, 1, 2]
    passes[1][1].fence = fail  # type: ignore[method-assign]
    with pytest.raises(torch.AcceleratorError):
        epochs.close_all([one for one, _, _ in passes])
    until(lambda: copying_threads() == 0)
    for _, _, feed in passes:
        work = feed._work
        assert not [*work.loaded, *work.here, *work.permits._lying][1:]
        assert not hasattr(work, "source")
        assert work.ready[0].error is not None
    passes[1][1].fence = list  # type: ignore[method-assign, assignment]


def test_the_record_is_not_waited_for_by_the_thread() -> None:
    """Who reads it may have to wait for the thread: the collector, in its midst, for one that ends a pass."""
    tally = Tally()
    event: Any = Passed()
    for _ in range(READ_EVERY):
        tally.moments.append(Moment(Gate(event, is_needed=True), event, [], 0))
    with tally._reading:
        tally.read_in_turn()
    assert len(tally.moments) == READ_EVERY
    assert tally.stats().n_batches == READ_EVERY


class Passed:
    """An event that the device has passed."""

    def query(self) -> bool:
        """Say so."""
        return True

    def elapsed_time(self, _: object) -> float:
        """Return no time at all."""
        return 0.0


def test_an_exit_after_a_pass_was_dropped_in_another_thread_is_clean() -> None:
    """Its thread has come out of PyTorch by then: one that is still in it would abort the process."""
    script = """
import threading
import torch
from tests.loader_transport import threaded

def busy():
    numbers = torch.rand(1_000_000)
    while True:
        yield numbers.sort()

batches = iter(threaded(busy()))
loop = threading.Thread(target=next, args=(batches,))
loop.start()
loop.join()
del loop, batches
print("gone")
"""
    assert said_by(script) == ("gone\n", "")


def test_memory_is_asked_of_the_consumer_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs out of memory in another thread or process leaves alone what he cannot touch safely."""
    epoch, transport, feed = open_feed(range(5))
    assert next(epoch) == 0
    until(lambda: len(feed._work.ready) == 2)
    other = threading.Thread(target=epoch.release_memory)
    other.start()
    other.join()
    with monkeypatch.context() as forked:
        forked.setattr("os.getpid", lambda: -1)
        epoch.release_memory()
    assert (transport.n_evicted, transport.n_fences) == (0, 0)
    epoch.release_memory()
    assert transport.n_evicted == 2
    assert list(epoch) == [1, 2, 3, 4]


def test_an_interrupt_of_a_close_leaves_nothing_either(monkeypatch: pytest.MonkeyPatch) -> None:
    """Closing that is interrupted lets go of all the same, and the thread ends by itself, behind a fence."""
    may_go_on = threading.Event()

    def source() -> Iterator[int]:
        yield 0
        may_go_on.wait()
        yield 1

    def interrupted(_: float | None) -> None:
        raise KeyboardInterrupt

    epoch, transport, feed = open_feed(source())
    next(epoch)
    with monkeypatch.context() as now:
        now.setattr(feed._work.left, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            epoch.close()
    n_fences = transport.n_fences
    may_go_on.set()
    feed._thread.join()
    assert n_fences == 1
    assert transport.n_fences == 2
    with pytest.raises(RuntimeError, match="was closed"):
        next(epoch)


def test_an_interrupt_while_the_thread_starts_leaves_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass whose beginning is interrupted does not go on without its consumer."""

    def interrupted(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "set_num_threads", interrupted)
    with pytest.raises(KeyboardInterrupt):
        open_feed(range(5))
    assert copying_threads() == 0


def test_the_thread_works_under_the_consumers_modes() -> None:
    """Gradient mode and context variables are those of the thread that began the pass."""

    def source() -> Iterator[bool]:
        yield torch.is_grad_enabled()
        yield torch.is_inference_mode_enabled()

    with torch.no_grad():
        assert list(open_feed(source())[0]) == [False, False]
    with torch.inference_mode():
        assert list(open_feed(source())[0]) == [False, True]


def test_the_thread_works_under_the_consumers_autocast_and_device() -> None:
    """Autocast and the default device are those of the thread that began the pass, and stay its own."""

    def source() -> Iterator[Any]:
        yield torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.zeros(1).device.type
        yield torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.zeros(1).device.type

    with torch.autocast("cpu", torch.float16), torch.device("meta"):
        epoch, _, _ = open_feed(source())
    assert list(epoch) == [(True, torch.float16, "meta")] * 2
    assert not torch.is_autocast_enabled("cpu")
    assert list(open_feed(source())[0]) == [(False, torch.bfloat16, "cpu")] * 2


def test_the_number_of_threads_is_left_alone() -> None:
    """The cap on the copying thread's team reaches neither the caller nor threads started later."""
    before = torch.get_num_threads()
    list(open_feed(range(3))[0])
    assert [torch.get_num_threads(), number_of_a_new_thread()] == [before, before]


def test_a_close_while_memory_is_released_comes_to_its_end() -> None:
    """The word that ends the thread is laid down again, should a release in another thread have taken it."""
    epoch, _, feed = open_feed(range(9), depth=4)
    next(epoch)
    permits = feed._work.permits
    permits._pause_s = lambda: 0.0  # type: ignore[method-assign]
    until(lambda: permits._is_listening)
    permits.lay_down(Stop)
    feed._take_back_permit()
    assert feed._work.left.wait(10)
    epoch.close()


def test_the_thread_remembers_how_long_sending_took(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the transport counts it, of the last batch."""
    tally = Tally()

    def send(*_: object) -> None:
        tally.stage_s += 5.0

    monkeypatch.setattr(HostTransport, "send", send)
    work = Work(iter(range(3)), HostTransport(), tally, no_state, None)
    for _ in range(2):
        work.permits.lay_down(None)
        assert work.step()
        assert work.permits.send_s == 5.0


def test_a_pass_is_closed_once() -> None:
    """Closing it again does nothing: what is collected late must not ask for a driver that is gone."""
    epoch, transport, _ = open_feed(range(9))
    next(epoch)
    epoch.close()
    n_fences = transport.n_fences
    epoch.close()
    del epoch
    assert transport.n_fences == n_fences


def test_the_consumers_own_batches_are_released_too() -> None:
    """A batch that an interrupt has left in the consumer's hands goes back to the host with the others."""
    epoch, transport, feed = open_feed(range(9), depth=2)
    next(epoch)
    until(lambda: len(feed._work.ready) == 2)
    feed._work.here.append(Arrival(["in hand"]))
    epoch.release_memory()
    assert transport.n_evicted == 3
    feed._work.here.clear()
    epoch.close()
