"""Errors in a pass that a thread feeds: nothing is kept alive by them, and none is taken for the end."""

import functools
import gc
import inspect
import threading
import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from typing import Any

import pytest
from torch.utils.data import DataLoader

from tests.loader_sources import Fragile, failing
from tests.loader_transport import HostTransport, open_feed, threaded, until
from torchfast import DeviceLoader
from torchfast._loader import epoch as epochs
from torchfast._loader.epoch import Epoch
from torchfast._loader.feed import ThreadedFeed
from torchfast._loader.stats import Tally
from torchfast._loader.thread import Work, no_state


class BrokenError(Exception):
    """An error that can be watched."""


class Renaming(Iterator[Any]):
    """Raises other errors from those of a loader."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._batches = iter(loader)

    def __next__(self) -> Any:
        try:
            return next(self._batches)
        except LookupError as error:
            raise ArithmeticError from error


@pytest.fixture(autouse=True)
def _no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


SOURCES: dict[str, Callable[[], Any]] = {
    "raised": lambda: DataLoader(Fragile(LookupError("sample 7 is broken")), num_workers=1),
    "an end": lambda: DataLoader(Fragile(StopIteration()), num_workers=1),
    "raised from": lambda: Renaming(DataLoader(Fragile(LookupError()), num_workers=1)),
}


@pytest.mark.parametrize("source", SOURCES)
def test_an_error_of_a_worker_keeps_nothing_alive(source: str) -> None:
    """Once its error is handled and forgotten, a pass is gone at once, without the collector."""
    epoch, transport, feed = open_feed(SOURCES[source]())
    with suppress(LookupError, ArithmeticError):
        assert len(list(epoch)) == 7
    gone = weakref.ref(transport)
    del epoch, transport, feed
    assert gone() is None


def test_an_error_that_nobody_took_keeps_nothing_alive() -> None:
    """A pass that is closed while an error waits for its turn is gone at once."""
    batches = failing(1)
    epoch, transport, feed = open_feed(batches, depth=1)
    until(functools.partial(waits_with_an_error, feed._work, batches))
    epoch.close()
    gone = weakref.ref(transport)
    del epoch, transport, feed
    assert gone() is None


def waits_with_an_error(work: Work, batches: Generator[int, None, None]) -> bool:
    """Say whether the loader has failed and its error waits for a permit."""
    return work.permits._is_listening and inspect.getgeneratorstate(batches) == inspect.GEN_CLOSED


def test_an_error_that_comes_too_late_keeps_nothing_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does one that comes after a pass was dropped in another thread, which waited for some time."""
    is_sending, may_fail = threading.Event(), threading.Event()

    def send(_: HostTransport, batch: Any, __: object) -> Any:
        is_sending.set()
        may_fail.wait()
        raise ConnectionError(batch)

    monkeypatch.setattr(HostTransport, "send", send)
    monkeypatch.setattr(epochs, "PATIENCE_S", 0.05)
    epoch, transport, feed = open_feed(range(5))
    is_sending.wait()
    thread, gone = feed._thread, weakref.ref(transport)
    held = [epoch]
    del epoch, transport, feed
    dropping = threading.Thread(target=held.clear)
    dropping.start()
    dropping.join()
    may_fail.set()
    thread.join()
    assert gone() is None


def test_an_error_of_a_new_pass_is_not_held_by_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the loop has been given, and drops, is gone, wherever the thread is by then."""
    is_told, may_go_on = threading.Event(), threading.Event()
    tell = Work._tell_consumer

    def tell_and_wait(work: Work) -> None:
        tell(work)
        if work.ready and work.ready[-1].error is not None:
            is_told.set()
            may_go_on.wait()

    def begin_again() -> Iterator[int]:
        raise BrokenError

    monkeypatch.setattr(Work, "_tell_consumer", tell_and_wait)
    feed = ThreadedFeed(
        iter([1]), HostTransport(), Tally(), depth=1, snapshot=no_state, begin_again=begin_again
    )
    assert feed.take() == 1
    with pytest.raises(StopIteration):
        feed.take()
    is_told.wait()
    try:
        feed.take()
    except BrokenError as error:
        gone = weakref.ref(error)
    is_gone = gone() is None
    may_go_on.set()
    feed.close()
    assert is_gone


class Told(Iterator[Any]):
    """Goes on after errors, as a DataLoader does whose worker has died; to ask once more would hang."""

    def __init__(self, *outcomes: Any) -> None:
        self._outcomes = list(outcomes)

    def __next__(self) -> Any:
        outcome = self._outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


@pytest.mark.parametrize("open_pass", [threaded, lambda loader: DeviceLoader(loader, "cpu")])
def test_only_the_error_of_a_dead_worker_is_the_last(open_pass: Callable[[Any], DeviceLoader[Any]]) -> None:
    """After any other the loop goes on as bare, and comes to that one, whenever the worker died."""
    batches = iter(
        open_pass(
            Told(
                0,
                ValueError("a sample is broken"),
                2,
                ConnectionError("while a batch was opened"),
                RuntimeError("Caught RuntimeError in DataLoader worker process 0."),
                5,
                RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"),
            )
        )
    )
    assert [outcome(batches) for _ in range(8)] == [
        0,
        "ValueError",
        2,
        "ConnectionError",
        "RuntimeError",
        5,
        "RuntimeError",
        "StopIteration",
    ]


def outcome(batches: Iterator[Any]) -> Any:
    """Return the next batch, or the name of the error that came in its place."""
    try:
        return next(batches)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is compared
        return type(error).__name__


class Stopping:
    """A batch that cannot be moved, and says so by the wrong error."""

    def to(self, _: Any) -> "Stopping":
        """Move, or not."""
        return next(iter(()))


def stops(*_: Any, **__: Any) -> Any:
    """Stop instead of doing whatever it is."""
    raise StopIteration


@pytest.mark.parametrize("moment", ["send", "deliver"])
def test_a_stop_iteration_of_the_transfer_is_no_end(moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is an error in the place of its batch."""
    monkeypatch.setattr(HostTransport, moment, stops)
    with pytest.raises(RuntimeError, match="moving a batch raised StopIteration") as caught:
        list(open_feed([1])[0])
    assert isinstance(caught.value.__cause__, StopIteration)


def test_a_stop_iteration_of_a_batch_is_no_end() -> None:
    """Nor where batches are moved in the loop's own thread."""
    with pytest.raises(RuntimeError, match="moving a batch raised StopIteration"):
        list(DeviceLoader([Stopping()], "cpu"))


def test_a_stop_iteration_of_a_new_pass_is_no_end() -> None:
    """Nor that of a loader that is asked for the next pass."""
    feed = ThreadedFeed(iter([1]), HostTransport(), Tally(), depth=1, snapshot=no_state, begin_again=stops)
    epoch: Epoch[int] = Epoch(feed, None, owner=None)
    assert list(epoch) == [1]
    with pytest.raises(RuntimeError, match="loading or moving a batch raised StopIteration"):
        feed.take()
    feed.close()
