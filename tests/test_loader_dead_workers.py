"""A loader whose worker is killed: an error, at once, and never a hang."""

import multiprocessing
import os
import queue
import signal
import struct
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset, _utils

from tests.loader_transport import copying_threads, open_feed, threaded
from torchfast import DeviceLoader
from torchfast._loader import dead_workers, wrapped
from torchfast._loader.dead_workers import survive_dead_workers

pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"  # PyTorch's signal handler raises its error anywhere
)


TOLD = (RuntimeError, ConnectionError, EOFError)
"""By which of them depends on what the worker was doing; PyTorch's signal handler raises one anywhere."""


def close(loader: DeviceLoader[Any]) -> None:
    """Close it, also where the signal handler interrupts that."""
    for _ in range(2):
        with suppress(RuntimeError):
            loader.close()


class Deadly(Dataset[int]):
    """Its worker dies at one index."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> int:
        if index == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        return index


@pytest.mark.parametrize("is_persistent", [False, True])
def test_a_killed_worker_is_an_error_not_a_hang(*, is_persistent: bool) -> None:
    """A worker that is killed ends the pass with PyTorch's own error, and no thread stays behind."""
    loader = threaded(DataLoader(Deadly(), num_workers=2, persistent_workers=is_persistent))
    batches = iter(loader)
    with suppress(RuntimeError), pytest.raises(TOLD):
        deque(batches, maxlen=0)
    close(loader)
    assert copying_threads() == 0


class Halting(Deadly):
    """Its worker dies in the middle of what it sends."""

    def __getitem__(self, index: int) -> int:
        if index == 20:
            Connection._send = _send_half_and_die  # type: ignore[attr-defined]
        return index


def _send_half_and_die(connection: Any, message: bytes) -> None:
    os.write(connection.fileno(), message[: len(message) // 2])
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.timeout(60)
@pytest.mark.filterwarnings("ignore:this loader ends its")
@pytest.mark.parametrize("dataset", [Deadly(), Halting()], ids=["between messages", "within one"])
@pytest.mark.parametrize("make", [threaded, DeviceLoader], ids=["by the thread", "inline"])
@pytest.mark.parametrize("is_persistent", [False, True])
def test_who_is_told_of_a_dead_worker_does_not_wait(
    dataset: Dataset[int], make: Callable[[Any], DeviceLoader[Any]], *, is_persistent: bool
) -> None:
    """The loop is left, and the next pass tells again or begins, long before the loader's own `timeout`."""
    loader = make(DataLoader(dataset, num_workers=2, timeout=600, persistent_workers=is_persistent))
    for _ in range(2):
        with pytest.raises(TOLD):
            deque(loader, maxlen=0)
    close(loader)
    assert copying_threads() == 0


@pytest.mark.parametrize("make", [threaded, DeviceLoader], ids=["by the thread", "inline"])
@pytest.mark.parametrize("is_persistent", [False, True])
@pytest.mark.parametrize("lock", ["_workers_done_event", "_worker_result_queue"])
def test_a_worker_that_dies_with_a_lock_is_no_hang_either(
    lock: str,
    make: Callable[[Any], DeviceLoader[Any]],
    *,
    is_persistent: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed as it looks whether it is to end, or as it writes, it keeps a lock that others wait for."""
    monkeypatch.setattr(_utils, "MP_STATUS_CHECK_INTERVAL", 0.5)
    monkeypatch.setattr(dead_workers, "PATIENCE_S", 0.2)
    made = list[Any]()

    def survive(inner: Any) -> None:
        survive_dead_workers(inner)
        made.append(inner)

    monkeypatch.setattr(wrapped, "survive_dead_workers", survive)
    dataset = TensorDataset(torch.zeros(64))
    loader = make(DataLoader(dataset, num_workers=2, persistent_workers=is_persistent))
    batches = iter(loader)
    next(batches)
    inner = made.pop()
    assert isinstance(inner._workers_done_event, dead_workers.DoneEvent)
    assert isinstance(inner._data_queue._reader, dead_workers.Results)
    taken = (
        inner._workers_done_event._event._cond
        if lock == "_workers_done_event"
        else inner._worker_result_queue._wlock
    )
    assert taken.acquire(timeout=60)  # by whom does not matter: nobody gives it back
    os.kill(inner._workers[0].pid, signal.SIGKILL)
    del inner, taken
    n_errors = 0
    for _ in range(64):
        try:
            next(batches)
        except StopIteration:
            break
        except TOLD:
            n_errors += 1
    assert n_errors > 0
    close(loader)
    del loader, batches
    assert copying_threads() == 0


@pytest.mark.parametrize("exitcode", [None, 0, 1, -9])
@pytest.mark.parametrize("is_held", [False, True])
def test_workers_are_told_of_their_end(
    *, is_held: bool, exitcode: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever holds the lock; one that is alive gives it back itself, and that of a dead one is free then."""
    monkeypatch.setattr(dead_workers, "PATIENCE_S", 0.01)
    event: Any = multiprocessing.get_context("spawn").Event()
    workers = [SimpleNamespace(exitcode=None), SimpleNamespace(exitcode=exitcode)]
    inner = SimpleNamespace(_workers_done_event=event, _workers=workers)
    stand_in = dead_workers.DoneEvent(inner)
    assert not stand_in.is_set()
    if is_held:
        event._cond.acquire()
    stand_in.set()
    stand_in.set()
    assert stand_in.is_set()
    if is_held and not exitcode:
        event._cond.release()
    assert event.is_set()
    event.clear()
    assert not event.is_set()


class Worker:
    """A process that ends once it was looked at so many times more; it may have closed its files already."""

    def __init__(self, n_looks: int, exitcode: int = -9, *, lets_go: bool = True) -> None:
        self._sentinel, self._held = multiprocessing.Pipe(duplex=False)
        self._n_looks, self._exitcode = n_looks, exitcode
        if lets_go:
            self._held.close()

    @property
    def sentinel(self) -> int:
        """A pipe whose other end the process holds, and whoever was forked meanwhile."""
        return self._sentinel.fileno()

    @property
    def exitcode(self) -> int | None:
        """Look once."""
        self._n_looks -= 1
        return None if self._n_looks >= 0 else self._exitcode


class Iterator:
    """What is read of PyTorch's iterator. The first worker has sent all that it was asked for."""

    def __init__(self, *workers: Worker, are_at_work: bool = True) -> None:
        self.queue: Any = multiprocessing.get_context("fork").Queue()
        self._data_queue, self._workers = self.queue, workers
        self._workers_status = [are_at_work] * len(workers)
        self._task_info: dict[int, tuple[Any, ...]] = {0: (1,), 1: (0, "a batch"), 2: (len(workers),)}
        survive_dead_workers(self)

    def write(self, n_bytes: int) -> None:
        """Write so many bytes of a message of ten, as a worker does."""
        message = struct.pack("!i", 6) + b"result"
        os.write(self.queue._writer.fileno(), message[:n_bytes])


def write_late(inner: Iterator, patch: pytest.MonkeyPatch) -> None:
    """Have a message come where it is waited for."""
    looks = dead_workers._ready
    message = [10]

    def comes_late(files: list[int], seconds: float) -> list[int]:
        if seconds > 0 and message:
            inner.write(message.pop())
        return looks(files, seconds)

    patch.setattr(dead_workers, "_ready", comes_late)


def test_workers_are_not_looked_at_for_a_result_that_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look gives up the interpreter, and there would be some for each batch."""
    inner = Iterator(Worker(0, lets_go=False))
    write_late(inner, monkeypatch)
    assert inner.queue._reader.poll(600)
    assert inner._workers[0]._n_looks == 0


@pytest.mark.parametrize("lets_go", [True, False], ids=["by its files", "though others hold them"])
def test_a_dead_worker_is_as_if_time_was_up(monkeypatch: pytest.MonkeyPatch, *, lets_go: bool) -> None:
    """Who waits for a result gets those that are there, and is told once the worker has ended."""
    monkeypatch.setattr(dead_workers, "LOOK_EVERY_S", 0.01)
    inner = Iterator(Worker(3, lets_go=lets_go), Worker(10**9, lets_go=False))
    inner.queue.put("a result")
    assert inner.queue.get(timeout=600) == "a result"
    with pytest.raises(queue.Empty):
        inner.queue.get(timeout=600)


@pytest.mark.parametrize("timeout_s", [0, 0.02])
@pytest.mark.parametrize(
    "make",
    [
        lambda: Iterator(Worker(0), are_at_work=False),
        lambda: Iterator(Worker(10**9)),
        lambda: Iterator(Worker(0, exitcode=0), Worker(10**9)),
    ],
    ids=["told to end", "without its files", "gone by itself"],
)
def test_other_workers_that_end_change_nothing(
    make: Callable[[], Iterator], timeout_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever did not fail leaves the time that a result is waited for."""
    inner = make()
    with pytest.raises(queue.Empty):
        inner.queue.get(timeout=timeout_s)
    write_late(inner, monkeypatch)
    assert inner.queue._reader.poll(600)
    assert inner.queue._reader.recv_bytes() == b"result"


def test_a_worker_that_is_gone_is_missed_where_all_are_told_of_the_next_pass() -> None:
    """It owes no batch then, but its word that it goes on."""
    inner = Iterator(Worker(0, exitcode=0), Worker(10**9, lets_go=False))
    inner._task_info.clear()
    with pytest.raises(queue.Empty):
        inner.queue.get(timeout=600)


@pytest.mark.parametrize("exitcode", [-9, 0])
@pytest.mark.parametrize("n_bytes", [0, 1, 4, 5])
def test_half_a_message_of_a_dead_worker_is_the_end_of_the_pipe(
    n_bytes: int, exitcode: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever would read on after it would take the next message for its rest."""
    monkeypatch.setattr(dead_workers, "LOOK_EVERY_S", 0.01)
    inner = Iterator(Worker(0, exitcode))
    inner._task_info[3] = (0,)
    inner.write(n_bytes)
    with pytest.raises(EOFError if n_bytes else queue.Empty):
        inner.queue.get(timeout=600)
    if n_bytes:
        with pytest.raises(OSError, match="closed"):
            inner.queue.get(timeout=600)


def test_the_iterator_is_not_kept_by_its_pipe() -> None:
    """A pass that is dropped ends its workers at once, without the collector."""
    inner = Iterator()
    is_alive = weakref.ref(inner)
    pipe = inner.queue
    del inner
    assert is_alive() is None
    assert type(pipe._reader) is dead_workers.Results


@pytest.mark.parametrize("is_dropped", [False, True], ids=["closed", "dropped"])
def test_a_dead_worker_that_interrupts_a_close_does_not_end_it(
    monkeypatch: pytest.MonkeyPatch, *, is_dropped: bool
) -> None:
    """PyTorch tells of a dead worker by an error in the loop's thread: a close still comes to its end."""
    epoch, _, feed = open_feed(range(9))
    next(epoch)
    errors, wait = [RuntimeError("DataLoader worker is killed")] * 2, feed._work.left.wait

    def interrupted(timeout_s: float | None = None) -> bool:
        if errors:
            raise errors.pop()
        return wait(timeout_s)

    monkeypatch.setattr(feed._work.left, "wait", interrupted)
    if not is_dropped:
        with pytest.raises(RuntimeError, match="is killed"):
            epoch.close()
    del epoch
    assert not errors
    assert copying_threads() == 0
