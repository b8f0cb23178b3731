"""Passes that begin to load before the last one is over, and loaders that cannot begin again."""

import gc
import threading
from collections.abc import Iterator
from typing import ClassVar

import pytest
import torch

from tests.loader_transport import HostTransport, copying_threads, threaded, until
from torchfast._loader.feed import ThreadedFeed
from torchfast._loader.stats import Tally
from torchfast._loader.thread import no_state


class Counted:
    """A loader that says how many of its passes were begun, and makes three batches in each."""

    def __init__(self) -> None:
        self.n_begun = 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        self.n_begun += 1
        return iter([(self.n_begun, number) for number in range(3)])


def test_the_next_pass_is_loaded_while_the_last_batches_are_in_use() -> None:
    """Across epochs, on request, the next pass is begun before this one is over, and no batch is lost."""
    counted = Counted()
    loader = threaded(counted, across_epochs=True)
    batches = iter(loader)
    next(batches)
    until(lambda: counted.n_begun == 2)
    assert list(batches) == [(1, 1), (1, 2)]
    assert [list(loader), list(loader)] == [[(n, 0), (n, 1), (n, 2)] for n in (2, 3)]
    for batch in loader:
        assert batch == (4, 0)
        break
    assert next(iter(loader))[1] == 0
    del loader, batches
    gc.collect()
    assert copying_threads() == 0


def test_the_end_of_a_pass_lets_the_next_one_go_on() -> None:
    """The permit that is laid down as the loop finds the end is for a batch of the next pass."""
    transport = HostTransport()
    feed = ThreadedFeed(
        iter([0]), transport, Tally(), depth=1, snapshot=no_state, begin_again=lambda: iter(range(1, 9))
    )
    assert feed.take() == 0
    until(lambda: transport.n_sent == 2 and feed._work.permits._is_listening)
    with pytest.raises(StopIteration):
        feed.take()
    until(lambda: transport.n_sent == 3)
    feed.close()


def test_a_loader_that_cannot_begin_again_is_an_error_and_no_hang() -> None:
    """A next pass that cannot be begun says so in its place; the pass after it is begun anew."""

    class OnceMore(Counted):
        def __iter__(self) -> Iterator[tuple[int, int]]:
            batches = super().__iter__()
            if self.n_begun == 2:
                raise ConnectionError("the files are gone")
            return batches

    loader = threaded(OnceMore(), across_epochs=True)
    assert len(list(loader)) == 3
    batches = iter(loader)
    with pytest.raises(ConnectionError, match="files are gone"):
        next(batches)
    assert list(batches) == []
    assert list(loader) == [(3, number) for number in range(3)]


def test_every_pass_is_begun_under_the_modes_of_who_asked() -> None:
    """The iterators that the thread makes by itself too: inference mode, and the default device."""

    class Looking(Counted):
        found: ClassVar = list[tuple[bool, str]]()

        def __iter__(self) -> Iterator[tuple[int, int]]:
            self.found.append((torch.is_inference_mode_enabled(), torch.get_default_device().type))
            return super().__iter__()

    loader = threaded(Looking(), across_epochs=True)
    with torch.inference_mode(), torch.device("meta"):
        assert [len(list(loader)) for _ in range(3)] == [3] * 3
    loader.close()
    assert {*Looking.found} == {(True, "meta")}


def test_the_record_of_a_pass_that_is_over_stays_as_it_is() -> None:
    """Loading the next one is no part of it."""
    may_begin, is_begun = threading.Event(), threading.Event()

    class Slow(Counted):
        def __iter__(self) -> Iterator[tuple[int, int]]:
            if self.n_begun == 1:
                may_begin.wait()
            yield from super().__iter__()
            if self.n_begun == 2:
                is_begun.set()

    loader = threaded(Slow(), across_epochs=True, depth=4)
    assert len(list(loader)) == 3
    found = loader.stats
    may_begin.set()
    is_begun.wait()
    assert loader.stats == found
    loader.close()


def test_a_pass_is_not_begun_unasked() -> None:
    """Without the request no pass is begun but those that are iterated over."""
    counted = Counted()
    loader = threaded(counted)
    assert [len(list(loader)), len(list(loader)), counted.n_begun] == [3, 3, 2]


@pytest.mark.parametrize("n_passes", [0, 1, 2])
def test_a_loader_that_is_used_up_ends_across_epochs_too(n_passes: int) -> None:
    """Passes without a batch are not begun one after another for ever: each is an end, and the thread's."""

    class UsedUp(Counted):
        def __iter__(self) -> Iterator[tuple[int, int]]:
            batches = super().__iter__()
            return batches if self.n_begun <= n_passes else iter([])

    counted = UsedUp()
    loader = threaded(counted, across_epochs=True)
    assert [len(list(loader)) for _ in range(5)] == [3] * n_passes + [0] * (5 - n_passes)
    assert counted.n_begun <= 6
    loader.close()
    assert copying_threads() == 0


def test_a_loader_in_a_for_statement_may_load_across_epochs() -> None:
    """A loader that nobody holds after its pass takes the thread of the next pass with it."""
    assert len(list(threaded(Counted(), across_epochs=True))) == 3
    gc.collect()
    assert copying_threads() == 0
