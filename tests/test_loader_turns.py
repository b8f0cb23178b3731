"""Batches that the consumer's thread sends itself, in turn with the copying thread, and who decides."""

import itertools
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.loader_transport import open_feed, until
from torchfast._loader.feed import ThreadedFeed
from torchfast._loader.turns import Turns, trials

N_TRIED = sum(trial.n_batches for trial in trials(2)) + 1
"""After so many batches it is decided who sends."""


def until_one_waits(feed: ThreadedFeed, depth: int = 2) -> None:
    """Wait until as many batches are ready as may be, and one more waits for a permit."""
    until(lambda: len(feed._work.ready) == depth and len(feed._work.loaded) == 1)


@given(st.lists(st.booleans(), min_size=1), st.integers(1, 4), st.integers(0, 12))
def test_whoever_sends_batches_come_once_and_in_order(turns: list[bool], depth: int, n_batches: int) -> None:
    """However the two threads take turns, each batch is sent once, and handed out in its place."""
    epoch, transport, _ = open_feed(range(n_batches), depth, turns=itertools.cycle(turns))
    assert list(epoch) == list(range(n_batches))
    assert transport.n_sent == n_batches


def test_the_consumer_sends_what_waits_for_its_permit() -> None:
    """Where the consumer offers to, it sends all further batches itself, and no more of them ahead."""
    epoch, transport, feed = open_feed(range(9), turns=itertools.repeat(True))
    until_one_waits(feed)
    for number in range(6):
        assert next(epoch) == number
        assert transport.n_sent_here == number + 1
        assert transport.n_sent == number + 3
    assert list(epoch) == [6, 7, 8]
    assert transport.n_sent_here == 7


def test_a_loader_that_may_wait_is_left_to_the_thread() -> None:
    """Where the next batch may be long in coming, the consumer sends and loads nothing itself."""
    epoch, transport, feed = open_feed(range(9), turns=itertools.repeat(True))
    feed._is_instant = False
    assert list(epoch) == list(range(9))
    assert transport.n_sent_here == 0


def test_an_error_while_the_consumer_sends_comes_in_its_place() -> None:
    """A transfer that fails in the consumer's thread takes the place of its batch, not of the one at hand."""
    epoch, transport, feed = open_feed(range(6), turns=itertools.repeat(True))
    transport.sending_fails_at = 2
    until_one_waits(feed)
    assert [next(epoch), next(epoch)] == [0, 1]
    with pytest.raises(ConnectionError, match="transfer failed"):
        next(epoch)
    assert list(epoch) == [3, 4, 5]


def test_an_interrupt_while_the_consumer_sends_loses_no_batch() -> None:
    """Neither the batch at hand nor the one being sent is lost."""
    epoch, transport, feed = open_feed(range(6), turns=itertools.repeat(True))
    transport.sending_here_is_interrupted_once = True
    until_one_waits(feed)
    with pytest.raises(KeyboardInterrupt):
        next(epoch)
    assert list(epoch) == list(range(6))


def test_a_batch_that_the_consumer_cannot_send_goes_to_the_thread() -> None:
    """What only the copying thread may send, it sends."""
    epoch, transport, feed = open_feed(range(6), turns=itertools.repeat(True))
    transport.takes_here = False
    until_one_waits(feed)
    assert list(epoch) == list(range(6))
    assert transport.n_sent_here == 0


def test_memory_may_be_released_between_turns() -> None:
    """Taking memory back leaves alone the word that a batch was sent, and the thread goes on."""
    epoch, _, feed = open_feed(range(20), turns=itertools.repeat(True))
    until_one_waits(feed)
    for number in range(20):
        assert next(epoch) == number
        epoch.release_memory()
    assert list(epoch) == []


def test_a_pass_that_another_thread_closes_while_the_consumer_sends_says_so() -> None:
    """The batch that was being sent is gone with the pass, which the consumer is told."""
    epoch, transport, feed = open_feed(range(9), turns=itertools.repeat(True))
    until_one_waits(feed)
    send_here = transport.send_here

    def close_meanwhile(batch: Any, blank: object) -> Any:
        closing = threading.Thread(target=feed.close)
        closing.start()
        closing.join()
        return send_here(batch, blank)

    transport.send_here = close_meanwhile  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="was closed"):
        next(epoch)
    assert not feed._thread.is_alive()


def test_a_pass_that_is_closed_between_turns_leaves_nothing() -> None:
    """Closing drops the batch that waits for a permit, and ends the thread."""
    for _ in range(50):
        epoch, _, feed = open_feed((object() for _ in range(9)), turns=itertools.repeat(True))
        until_one_waits(feed)
        next(epoch)
        epoch.close()
        assert not feed._work.loaded
        assert not feed._thread.is_alive()


# --- whose turn it is ------------------------------------------------------------------------------------


def decisions(step_s: Callable[[bool], float], n_batches: int) -> list[bool]:
    """Return what is decided for each of so many batches, whose steps take as long as `step_s` says."""
    turns, now_s, decided = Turns(2), 0.0, []
    for _ in range(n_batches):
        decided.append(turns.is_here(now_s))
        now_s += step_s(decided[-1])
    return decided


@pytest.mark.parametrize("step_s", [0.001, 1.0])
@pytest.mark.parametrize("saved_us", [200, 60, 40, 0, -200])
def test_the_consumer_sends_where_that_is_faster(saved_us: int, step_s: float) -> None:
    """Both ways are tried; the consumer's is kept if it saves more than 50 us a step, long or short."""
    decided = decisions(lambda is_here: step_s - saved_us / 1e6 * is_here, 300)
    assert {True, False} == set(decided[:N_TRIED])
    assert set(decided[N_TRIED:]) == {saved_us > 50}


@pytest.mark.parametrize("is_better", [True, False])
@pytest.mark.parametrize("depth", [1, 2, 3, 8, 12, 32])
def test_what_a_turn_costs_later_is_put_down_to_it(depth: int, *, is_better: bool) -> None:
    """A batch that is put off costs the loop once it is handed out, which is as many batches later."""
    turns, now_s, decided = Turns(depth), 0.0, list[bool]()
    thread_s, late_s = (200e-6, 100e-6) if is_better else (100e-6, 200e-6)
    for number in range(2500):
        decided.append(turns.is_here(now_s))
        was_put_off = number >= depth and decided[number - depth]
        now_s += 1e-3 + thread_s * (not decided[-1]) + late_s * was_put_off
    n_tried = sum(trial.n_batches for trial in trials(depth)) + 1
    assert set(decided[n_tried : n_tried + 1000]) == {is_better}
    assert sum(decided) / 2500 == pytest.approx(float(is_better), abs=0.1)


def test_noise_is_no_saving() -> None:
    """Where steps scatter by more than what is saved, the copying thread goes on."""
    chance = random.Random(0)  # noqa: S311 -- noise
    found = [decisions(lambda _: chance.gauss(0.1, 0.01), N_TRIED + 1)[-1] for _ in range(200)]
    assert sum(found) < 20


def test_what_noise_hides_is_found_later() -> None:
    """Where noise may have hidden a saving, another trial comes soon: few batches are sent the slower way."""
    chance = random.Random(0)  # noqa: S311 -- noise
    decided = decisions(lambda is_here: chance.gauss(1e-3, 2e-4) - 3e-4 * is_here, 1000)
    assert sum(decided) > 800


@pytest.mark.parametrize("later_us", [-10, -5, 5, 10])
def test_a_loop_that_gets_faster_or_slower_is_no_saving(later_us: float) -> None:
    """A drift from batch to batch speaks for neither way."""
    chance = random.Random(0)  # noqa: S311 -- noise

    def decided() -> bool:
        steps_s = (chance.gauss(2e-3 + number * later_us / 1e6, 5e-5) for number in itertools.count())
        return decisions(lambda _: next(steps_s), N_TRIED + 1)[-1]

    assert sum(decided() for _ in range(200)) < 10


@pytest.mark.parametrize("n_batches", [3, 7, 50, 99])
def test_short_passes_are_tried_as_often(n_batches: int) -> None:
    """A decision ends after so many batches, in however many passes: a loop that changes is found out."""
    turns, now_s, decided = Turns(2), 0.0, list[bool]()
    for number in range(9000):
        if number % n_batches == 0:
            turns.begin()
        decided.append(turns.is_here(now_s))
        now_s += 1e-3 - 3e-4 * (decided[-1] is (number < 1500))
    assert sum(decided[300:1500]) > 1000
    assert sum(decided[5000:]) < 400


def test_a_decision_is_tested_anew() -> None:
    """A loop that changes is found out."""
    decided = decisions(lambda is_here: 0.5 if is_here else 1.0, N_TRIED + 1000 + 30)
    assert all(decided[N_TRIED : N_TRIED + 985])
    assert not all(decided[N_TRIED + 985 :])


def test_time_between_passes_is_no_step() -> None:
    """A pause before a pass or its first batch, however long and often, speaks against neither way."""
    turns, now_s, decided = Turns(2), 0.0, list[bool]()
    for number in range(200):
        if number % 5 == 0:
            turns.begin()
            now_s += 1000.0 * turns._trial.is_here  # where it would mislead most
        elif number % 5 == 1:
            now_s += 1000.0 * turns._trial.is_here  # the first batch of a pass is long in coming
        decided.append(turns.is_here(now_s))
        now_s += 0.5 if decided[-1] else 1.0
    assert all(decided[100:])


def test_the_thread_loads_nothing_while_the_consumer_sends() -> None:
    """A permit that comes meanwhile is kept for later: batches would else be loaded out of order."""
    epoch, transport, feed = open_feed(range(9), turns=itertools.repeat(True))
    until_one_waits(feed)
    send_here = transport.send_here

    def send_while_the_thread_looks(batch: Any, blank: object) -> Any:
        permits = feed._work.permits
        permits.lay_down(None)
        permits.hurry()
        until(lambda: bool(feed._work._spare) and permits._is_listening)
        return send_here(batch, blank)

    transport.send_here = send_while_the_thread_looks  # type: ignore[method-assign]
    assert next(epoch) == 0
    transport.send_here = send_here  # type: ignore[method-assign]
    assert list(epoch) == list(range(1, 9))


def test_the_thread_sleeps_on_while_the_consumer_sends() -> None:
    """Whoever sends a batch itself has nothing to wake the other thread for, until the loader ends."""
    epoch, _, feed = open_feed(range(9), turns=itertools.repeat(True))
    until_one_waits(feed)
    until(lambda: feed._work.permits._is_listening)
    assert [next(epoch) for _ in range(6)] == list(range(6))
    assert feed._work.permits._words.empty()
    assert feed._work.permits._is_listening
    assert list(epoch) == [6, 7, 8]


@pytest.mark.parametrize("error", [KeyboardInterrupt, TimeoutError])
def test_what_was_being_sent_here_is_fenced(error: type[BaseException]) -> None:
    """An interrupt, or an error of a signal's handler, may come once the copies are enqueued."""
    epoch, transport, feed = open_feed(range(6), turns=itertools.repeat(True))
    until_one_waits(feed)
    send_here = transport.send_here

    def be_interrupted(*_: object) -> Any:
        transport.send_here = send_here  # type: ignore[method-assign]
        raise error

    transport.send_here = be_interrupted  # type: ignore[assignment, method-assign]

    def taken() -> Any:
        try:
            return next(epoch)
        except (KeyboardInterrupt, TimeoutError):
            return error

    arrives = [error, 0, 1, 2, 3, 4, 5] if error is KeyboardInterrupt else [0, 1, error, 3, 4, 5]
    first = taken()
    assert transport.n_fences == 1
    assert [first, *(taken() for _ in arrives[1:])] == arrives
    assert list(epoch) == []
