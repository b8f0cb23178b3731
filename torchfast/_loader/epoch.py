"""One pass over the loader, and the two ways to feed it: in line, or by a thread that copies ahead.

A feed is a source of finished batches with `take`, `close` and `release_memory`. The thread of a
`ThreadedFeed` holds no reference to the feed or the epoch, so an epoch that nobody holds any more is
collected, closes its feed, and with it ends the thread.
"""

import atexit
import contextvars
import functools
import os
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from queue import Empty, SimpleQueue
from typing import Any, Protocol, TypeVar, cast
from weakref import WeakSet

import torch

from torchfast._tree import flatten

T = TypeVar("T")


class Feed(Protocol):
    """A source of finished batches."""

    def take(self) -> Any:
        """Return the next batch; raise `StopIteration` after the last, the loader's errors in their place."""

    def close(self) -> None:
        """Stop, and let go of everything; once is enough, more does no harm."""

    def release_memory(self) -> None:
        """Let go of device memory that is held ahead of use, without losing a batch."""


class Transport(Protocol):
    """What `ThreadedFeed` needs to know about moving batches; see `CudaTransport`."""

    def follow(self) -> None: ...
    def blank(self) -> Any: ...
    def deliver(self, parcel: Any) -> Any: ...
    def evict(self, parcel: Any) -> None: ...
    def discard(self, parcel: Any) -> None: ...
    def enter_thread(self) -> None: ...
    def settle(self) -> None: ...
    def send(self, batch: Any, blank: Any) -> Any: ...


class Epoch(Iterator[T]):
    """One pass over the loader: what `iter(DeviceLoader(...))` returns."""

    def __init__(self, feed: Feed, finish: Callable[[Any], Any] | None, owner: object) -> None:
        self._feed = feed
        self._finish = finish
        self._owner = owner  # lives as long as its epoch: it is what oom_guard asks to let go of memory
        self._state = "open"
        self._has_failed = False
        _close_at_exit().add(self)

    @property
    def is_under_way(self) -> bool:
        """Whether more batches were to come, and nothing has gone wrong."""
        return self._state == "open" and not self._has_failed

    def __next__(self) -> T:
        if self._state == "over":
            raise StopIteration
        if self._state == "closed":
            raise _closed()
        try:
            batch: T = self._feed.take()
        except StopIteration:
            self._state = "over"
            self._feed.close()
            raise
        except BaseException:
            self._has_failed = True
            raise
        return batch if self._finish is None else cast(T, _finished(self._finish, batch))

    def close(self) -> None:
        """Stop loading and let go of everything; batches already handed out are the user's and stay."""
        if self._state == "open":
            self._state = "closed"
        self._feed.close()

    def release_memory(self) -> None:
        """Let go of device memory that is held ahead of use, without losing a batch."""
        self._feed.release_memory()

    def __del__(self) -> None:
        # A constructor that failed leaves no feed behind.
        if hasattr(self, "_feed"):
            self._feed.close()


@functools.cache
def _close_at_exit() -> WeakSet[Epoch[Any]]:
    # Registered with the first epoch, hence after multiprocessing's own exit function, hence run before it:
    # the thread must be out of the loader before the workers are ended.
    epochs: WeakSet[Epoch[Any]] = WeakSet()

    def close_all() -> None:
        for epoch in list(epochs):
            epoch.close()

    atexit.register(close_all)
    return epochs


def _closed() -> RuntimeError:
    return RuntimeError(
        "this pass over a DeviceLoader was closed, by close() or because another pass over the same loader "
        "was begun: two at a time would share workers and steal each other's batches. "
        "Use one DeviceLoader for each loop that runs at the same time."
    )


def _finished(finish: Callable[[Any], Any], batch: Any) -> Any:
    try:
        return finish(batch)
    except StopIteration as error:
        raise RuntimeError(
            "transform= raised StopIteration, which would have ended the epoch silently"
        ) from error


class InlineFeed:
    """Batches as they come, in the caller's thread: for the CPU, and for accelerators other than CUDA."""

    def __init__(self, source: Iterator[Any], device: torch.device) -> None:
        self._source: Iterator[Any] | None = source
        self._device = device

    def take(self) -> Any:
        """Return the next batch, on the device."""
        if self._source is None:
            raise StopIteration
        batch = next(self._source)
        leaves, structure = flatten(batch)
        return structure.rebuild([leaf.to(self._device) for leaf in leaves])

    def close(self) -> None:
        """Let go of the loader's iterator, and so of its workers."""
        self._source = None

    def release_memory(self) -> None:
        """Nothing is held ahead of use."""


class _Stop:
    """The permit that ends the thread."""


class _Work:
    """What the thread needs, and nothing that leads back to the feed."""

    def __init__(self, source: Iterator[Any], transport: Transport) -> None:
        self.source = source
        self.transport = transport
        self.ready: SimpleQueue[Any] = SimpleQueue()
        self.permits: SimpleQueue[Any] = SimpleQueue()
        self.entered = threading.Event()
        self.stopped = False
        self.grad_enabled = torch.is_grad_enabled()
        self.inference = torch.is_inference_mode_enabled()

    def run(self) -> None:
        """Load and send until told to stop, or until the loader ends."""
        try:
            self.transport.enter_thread()
            self.entered.set()
            while not self.stopped and self.step():
                pass
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is raised where the batch is taken
            self.ready.put(_Failure(error))
        finally:
            self.entered.set()
            del self.source

    def step(self) -> bool:
        """Bring one batch, or the error that came in its place, on its way; say whether more may come."""
        self.transport.settle()
        try:
            with torch.inference_mode(self.inference), torch.set_grad_enabled(self.grad_enabled):
                batch = next(self.source)
        except StopIteration:
            self.ready.put(_End())
            return False
        except BaseException as error:  # noqa: BLE001 - as above
            return self._send(_Failure(error))
        return self._send(batch)

    def _send(self, batch: Any) -> bool:
        permit = self.permits.get()
        if self.stopped or permit is _Stop:
            return False
        try:
            parcel = batch if isinstance(batch, _Failure) else self.transport.send(batch, permit)
        except BaseException as error:  # noqa: BLE001 - as above
            parcel = _Failure(error)
        self.ready.put(parcel)
        return True


class _End:
    """What the thread says after the last batch."""


class _Failure:
    """What the thread says in place of a batch that failed."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


class ThreadedFeed:
    """Batches that a thread loads and copies ahead, at most `depth` of them beyond the one handed out."""

    def __init__(self, source: Iterator[Any], transport: Transport, *, depth: int) -> None:
        self._transport = transport
        self._work = _Work(source, transport)
        self._waiting: deque[Any] = deque()
        self._owes_permit = True
        self._process = os.getpid()
        for _ in range(depth):
            self._work.permits.put(None)
        # Daemonic, so that an exit never waits for a loader: closing at exit ends it in good order.
        self._thread = threading.Thread(
            target=contextvars.copy_context().run,
            args=(self._work.run,),
            name="torchfast-loader",
            daemon=True,
        )
        n_threads = torch.get_num_threads()
        self._thread.start()
        # The copying thread caps its own team. PyTorch also takes that as the default of threads yet to be
        # started; saying our own number again puts the default back.
        self._work.entered.wait()
        torch.set_num_threads(n_threads)

    def take(self) -> Any:
        """Return the next batch, on the device, as soon as its copy is enqueued."""
        if os.getpid() != self._process:
            raise RuntimeError(
                "this pass over a DeviceLoader was begun in another process, and its thread did not survive "
                "the fork. Begin a new pass in this process."
            )
        self._transport.follow()
        if self._owes_permit:
            # Before waiting for this batch: its memory is free now, and the copy of a later one may start.
            self._work.permits.put(self._transport.blank())
            self._owes_permit = False
        parcel = self._waiting.popleft() if self._waiting else self._work.ready.get()
        try:
            return self._delivered(parcel)
        finally:
            del parcel  # an error's traceback must not keep the batch

    def _delivered(self, parcel: Any) -> Any:
        if isinstance(parcel, _End):
            raise StopIteration
        if isinstance(parcel, _Failure):
            self._owes_permit = True
            try:
                raise parcel.error
            finally:
                del parcel  # the error's traceback holds this frame
        try:
            batch = self._transport.deliver(parcel)
        except torch.OutOfMemoryError:
            self._waiting.appendleft(parcel)  # once there is room, the same batch again
            raise
        self._owes_permit = True
        return batch

    def release_memory(self) -> None:
        """Bring what is ready back to the host, and take back the memory set aside for what is not."""
        self._waiting.extend(_drain(self._work.ready))
        for parcel in self._waiting:
            if not isinstance(parcel, (_End, _Failure)):
                self._transport.evict(parcel)
        for _ in _drain(self._work.permits):
            self._work.permits.put(None)

    def close(self) -> None:
        """End the thread, wait for it, and let go of everything."""
        if os.getpid() != self._process:
            return
        self._work.stopped = True
        self._work.permits.put(_Stop)
        # The collector may run this in the very thread that it ends, which cannot wait for itself.
        if self._thread is not threading.current_thread():
            self._thread.join()
        self._waiting.extend(_drain(self._work.ready))
        for parcel in self._waiting:
            if not isinstance(parcel, (_End, _Failure)):
                self._transport.discard(parcel)
        self._waiting.clear()
        _drain(self._work.permits)
        self._work.ready.put(_Failure(_closed()))  # for a take() that another thread is waiting in


def _drain(queue: SimpleQueue[Any]) -> list[Any]:
    items = []
    try:
        while True:
            items.append(queue.get_nowait())
    except Empty:
        return items


def warn_of_open_epoch(stacklevel: int) -> None:
    """Say that a pass was closed because another was begun."""
    warnings.warn(
        "a new pass over this DeviceLoader was begun before the last one was finished or dropped, so the "
        "last one was closed: two passes at a time would share workers and steal each other's batches. "
        "Call close() on the first, or use one DeviceLoader for each loop that runs at the same time.",
        RuntimeWarning,
        stacklevel=stacklevel,
    )
