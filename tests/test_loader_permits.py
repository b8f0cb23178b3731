"""Permits to send: handed over in the middle of a step if there is time, at once if not, and never lost."""

import threading
import time
from typing import Any

import pytest
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
        self._permits.put(None)
        self._thread.join()
        return self.got


def at_a_step_of(step_s: float, *, share: float = 0.0) -> Permits:
    """Return permits of a loop whose steps take so long, and which is so far into one."""
    permits = Permits()
    now_s = time.perf_counter() - share * step_s
    for n_steps in (2, 1, 0):
        permits.keep_pace(now_s - n_steps * step_s)
    return permits


WAYS = st.sampled_from(["put", "lay_down", "hurry"])


@given(st.lists(WAYS, max_size=40), st.sampled_from([0, 1e-4, HOUR_S]))
def test_every_permit_arrives_once(ways: list[str], step_s: float) -> None:
    """However permits are handed over, and at whatever pace, the thread gets each once."""
    permits = at_a_step_of(step_s)
    receiver = Receiver(permits)
    given_out = []
    for number, way in enumerate(ways):
        if way == "hurry":
            permits.hurry()
        else:
            getattr(permits, way)(number)
            given_out.append(number)
    assert sorted(receiver.all()) == given_out


def test_a_permit_that_is_in_no_hurry_waits_for_the_middle_of_the_step() -> None:
    """What is laid down early in a step wakes nobody until then, and is handed over when there is a hurry."""
    permits = at_a_step_of(HOUR_S)
    permits.lay_down("permit")
    assert permits._urgent.empty()
    assert 0.4 * HOUR_S < permits._until_mid_step_s() <= 0.5 * HOUR_S
    permits.hurry()
    assert permits.get() == "permit"


def test_in_the_second_half_of_a_step_a_permit_is_taken_at_once() -> None:
    """The thread that comes later than the middle of the step takes what lies there."""
    permits = at_a_step_of(HOUR_S, share=0.6)
    permits.lay_down("permit")
    assert permits.get() == "permit"


def test_a_thread_that_has_its_permits_sleeps_to_the_middle_of_the_next_step() -> None:
    """With nothing laid down in this step, the next permit is due in the next."""
    assert HOUR_S < at_a_step_of(HOUR_S, share=0.3)._until_mid_step_s() <= 1.2 * HOUR_S


def test_a_thread_that_listens_is_woken() -> None:
    """Where the loop is slower than it was, the thread waits for word, and a permit laid down is one."""
    permits = at_a_step_of(1e-6)
    receiver = Receiver(permits)
    until(lambda: permits._is_listening)
    permits.lay_down("permit")
    until(lambda: receiver.got == ["permit"])
    assert receiver.all() == ["permit"]


@pytest.mark.parametrize(
    ("times_s", "step_s"), [([5], 0), ([5, 6], 1), ([5, 6, 9], 1), ([5, 6, 9, 12], 3), ([5, 6, 90, 91], 1)]
)
def test_a_pause_is_no_step(times_s: list[float], step_s: float) -> None:
    """A step is the shorter of the last two, so that a validation in between does not count."""
    permits = Permits()
    for now_s in times_s:
        permits.keep_pace(now_s)
    assert permits._step_s == step_s


def test_what_is_taken_back_is_everything() -> None:
    """Laid down or handed over, nothing is left."""
    permits = at_a_step_of(HOUR_S)
    permits.put(1)
    permits.lay_down(2)
    assert permits.drain() == [1, 2]
    assert permits.drain() == []


@given(st.integers(1, 4), st.integers(0, 12))
def test_no_pace_starves_the_loop(depth: int, n_batches: int) -> None:
    """A thread that would sleep for an hour is woken before the loop runs out of batches."""
    epoch, _, feed = open_feed(range(n_batches), depth)
    feed._work.permits._until_mid_step_s = lambda: HOUR_S  # type: ignore[method-assign]
    assert list(epoch) == list(range(n_batches))
