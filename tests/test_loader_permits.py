"""Permits to send: looked for in the middle of a step if there is time, at once if not, and never lost."""

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.loader_transport import open_feed, until
from torchfast._loader.permits import Permits

HOUR_S = 3600.0


class Receiver:
    """A thread that gets permits until it gets None."""

    def __init__(self, permits: Permits) -> None:
        self.got: list[Any] = []
        self._permits = permits
        self._thread = threading.Thread(target=self._receive, daemon=True)
        self._thread.start()

    def _receive(self) -> None:
        while (permit := self._permits.get()) is not None:
            self.got.append(permit)

    def all(self) -> list[Any]:
        """End the thread and return what it got."""
        self._permits.lay_down(None)
        while self._thread.is_alive():
            self._permits.hurry()
            self._thread.join(0.01)
        return self.got


def at_a_step_of(step_s: float, *, share: float = 0.0) -> Permits:
    """Return permits of a loop whose steps take so long, and which is so far into one."""
    permits = Permits()
    permits._step_s, permits._taken_s = step_s, time.perf_counter() - share * step_s
    return permits


@given(
    st.lists(st.sampled_from(["lay_down", "call", "hurry"]), max_size=40), st.sampled_from([0, 1e-4, HOUR_S])
)
def test_every_permit_arrives_once_and_in_order(ways: list[str], step_s: float) -> None:
    """However permits are handed over, and at whatever pace, the thread gets each once, in their order."""
    permits = at_a_step_of(step_s)
    receiver = Receiver(permits)
    laid_down = []
    for number, way in enumerate(ways):
        if way == "lay_down":
            permits.lay_down(number)
            laid_down.append(number)
        else:
            getattr(permits, way)()
    assert receiver.all() == laid_down


def test_a_permit_that_is_in_no_hurry_waits_for_the_middle_of_the_step() -> None:
    """What is laid down early in a step wakes nobody until then; in a hurry it is taken at once."""
    permits = at_a_step_of(HOUR_S)
    permits.lay_down("permit")
    permits.call()
    assert permits._words.empty()
    assert 0.4 * HOUR_S < permits._pause_s() <= 0.5 * HOUR_S
    permits.hurry()
    assert permits.get() == "permit"


def test_what_the_loader_takes_is_taken_into_account() -> None:
    """The thread of a loader that takes half a step is up at once, and not late with the next batch."""
    permits = at_a_step_of(HOUR_S)
    permits.load_s = 0.5 * HOUR_S
    permits.lay_down("permit")
    assert permits.get() == "permit"


def test_a_thread_that_takes_long_to_send_is_done_before_the_step_ends() -> None:
    """Early enough for a quarter more than it took for the last batch, and never later than the middle."""
    for send_s, latest in ((0.3, 0.5), (0.6, 0.25)):
        permits = at_a_step_of(HOUR_S)
        permits.send_s = send_s * HOUR_S
        permits.lay_down("permit")
        assert (latest - 0.1) * HOUR_S < permits._pause_s() <= latest * HOUR_S


def test_a_thread_that_is_behind_does_not_wait() -> None:
    """Of two permits the first is taken at once."""
    permits = at_a_step_of(HOUR_S)
    permits.lay_down(1)
    permits.lay_down(2)
    assert permits.get() == 1


def test_in_the_second_half_of_a_step_a_permit_is_taken_at_once() -> None:
    """The thread that comes later than the middle of the step takes what lies there."""
    permits = at_a_step_of(HOUR_S, share=0.6)
    permits.lay_down("permit")
    assert permits.get() == "permit"


def test_a_thread_that_has_its_permits_sleeps_to_the_middle_of_the_next_step() -> None:
    """With nothing laid down in this step, the next permit is due in the next."""
    assert HOUR_S < at_a_step_of(HOUR_S, share=0.3)._pause_s() <= 1.2 * HOUR_S


def test_a_thread_that_listens_is_woken() -> None:
    """Where the loop is slower than it was, the thread waits for word of a permit."""
    permits = at_a_step_of(1e-6)
    receiver = Receiver(permits)
    until(lambda: permits._is_listening)
    permits.lay_down("permit")
    permits.call()
    until(lambda: receiver.got == ["permit"])
    assert receiver.all() == ["permit"]


def test_without_a_permit_nobody_is_woken() -> None:
    """The thread would take the interpreter only to find that there is nothing for it."""
    permits = Permits()
    permits._is_listening = True
    permits.call()
    permits.hurry()
    assert permits._words.empty()


class Watched(deque[Any]):
    """A deque that lets something happen right before the thread looks into it, or after it has."""

    def __init__(self, *, before: Callable[[], None] | None = None, after: Callable[[], None]) -> None:
        super().__init__()
        self.before, self._after = before, after

    def popleft(self) -> Any:
        """Let it happen."""
        if self.before is not None:
            self.before()
        try:
            return super().popleft()
        except IndexError:
            self._after()
            raise


def test_a_permit_that_comes_right_after_the_thread_has_looked_is_not_overlooked() -> None:
    """The thread says that it listens before it looks, so what is laid down after that brings a word."""
    permits = Permits()

    def lay_down() -> None:
        watched.append("permit")
        permits.call()

    watched = permits._lying = Watched(after=lay_down)
    assert permits.get() == "permit"


def test_a_permit_may_be_taken_back_while_the_thread_looks() -> None:
    """The thread that finds none goes on waiting, for the next."""
    permits = Permits()

    def take_back() -> None:
        watched.before = None
        assert watched.pop() == "taken back"

    def lay_down() -> None:
        watched.append("permit")
        permits.call()

    watched = permits._lying = Watched(before=take_back, after=lay_down)
    watched.append("taken back")
    assert permits.get() == "permit"


@pytest.mark.parametrize(
    ("times_s", "step_s"), [([5], 0), ([5, 6], 0), ([5, 6, 9], 1), ([5, 6, 9, 12], 3), ([5, 6, 7, 90, 91], 1)]
)
def test_a_pause_is_no_step(times_s: list[float], step_s: float) -> None:
    """A step is the shorter of the last two, so that a validation in between does not count."""
    permits = Permits()
    for now_s in times_s:
        permits.keep_pace(now_s)
    assert permits._step_s == step_s


def test_taking_permits_back_wakes_nobody() -> None:
    """All that lies there is returned, and the thread, which sleeps, does not notice."""
    permits = at_a_step_of(HOUR_S)
    permits.lay_down(1)
    permits.lay_down(2)
    assert [permits.take_back(), permits.take_back()] == [1, 2]
    with pytest.raises(IndexError):
        permits.take_back()
    assert permits._words.empty()


# --- in a pass -------------------------------------------------------------------------------------------


@given(st.integers(1, 4), st.integers(0, 12))
def test_no_pace_starves_the_loop(depth: int, n_batches: int) -> None:
    """A thread that would sleep for an hour is woken before the loop runs out of batches."""
    epoch, _, feed = open_feed(range(n_batches), depth)
    feed._work.permits._pause_s = lambda: HOUR_S  # type: ignore[method-assign]
    assert list(epoch) == list(range(n_batches))


def test_the_thread_is_woken_behind_the_delivery() -> None:
    """The delivery lets go of the interpreter as it asks the driver: a thread that is awake takes it."""
    epoch, transport, feed = open_feed(range(3), depth=1)
    until(lambda: len(feed._work.ready) == 1 and feed._work.permits._is_listening)
    deliver, is_awake = transport.deliver, list[bool]()

    def deliver_and_look(parcel: Any, *, came_at_once: bool) -> Any:
        permits = feed._work.permits
        is_awake.append(not (permits._is_listening and permits._lying and permits._words.empty()))
        return deliver(parcel, came_at_once=came_at_once)

    transport.deliver = deliver_and_look  # type: ignore[method-assign]
    assert next(epoch) == 0
    assert is_awake == [False]
    assert list(epoch) == [1, 2]


def test_a_thread_is_woken_at_once_where_nothing_is_ready_but_the_batch_at_hand() -> None:
    """However early in the step it is: the loop might come for the next before the middle of this one."""
    epoch, transport, feed = open_feed(range(6))
    until(lambda: len(feed._work.ready) == 2 and feed._work.permits._is_listening)
    feed._work.permits._pause_s = lambda: HOUR_S  # type: ignore[method-assign]
    assert next(epoch) == 0
    until(lambda: len(feed._work.ready) == 2)
    assert next(epoch) == 1
    assert transport.n_sent == 3
    assert next(epoch) == 2
    until(lambda: transport.n_sent > 3)
    assert list(epoch) == [3, 4, 5]


def test_the_thread_is_woken_before_the_loop_waits() -> None:
    """After a delivery that failed it has not been, and a loop that waits for a batch wakes nobody."""
    epoch, transport, feed = open_feed(range(3), depth=1)
    until(lambda: len(feed._work.ready) == 1 and feed._work.permits._is_listening)
    transport.delivery_fails_once = True
    with pytest.raises(torch.OutOfMemoryError):
        next(epoch)
    assert feed._work.permits._lying == deque([None])
    del feed._work.ready[0]
    assert list(epoch) == [1, 2]


def test_after_a_release_nothing_is_sent_until_a_batch_is_taken() -> None:
    """Memory that was given back is not taken again while the step is retried, and no batch is lost by it."""
    epoch, transport, feed = open_feed(range(9), depth=4)
    until(lambda: len(feed._work.ready) == 4)
    feed._work.permits._pause_s = lambda: HOUR_S  # type: ignore[method-assign]
    assert [next(epoch), next(epoch)] == [0, 1]
    until(lambda: feed._work.permits._is_listening or not feed._work.permits._lying)
    epoch.release_memory()
    assert feed._work.n_owed >= 1
    assert not feed._work.permits._lying
    assert list(epoch) == list(range(2, 9))
    assert transport.n_sent == 9


def test_the_loop_sets_the_pace() -> None:
    """Each batch that is taken tells that a step has begun."""
    epoch, _, feed = open_feed(range(4))
    seen = [feed._work.permits._taken_s for _ in epoch]
    assert seen == sorted(set(seen))


def test_asking_again_after_the_end_is_answered() -> None:
    """The last end stays in line, for a loop in which an interrupt took the place of the first answer."""
    epoch, _, feed = open_feed(range(2))
    assert [feed.take(), feed.take()] == [0, 1]
    for _ in range(3):
        with pytest.raises(StopIteration):
            feed.take()
    epoch.close()
