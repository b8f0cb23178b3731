"""The thread that loads and copies ahead, and the consumer's side of it.

The thread holds no reference to the feed, nor to the epoch: an epoch that nobody holds any more is collected,
closes its feed, and that ends the thread.
"""

import contextvars
import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from queue import Empty, SimpleQueue
from typing import Any, Protocol

import torch

from torchfast._loader.epoch import closed_error
from torchfast._loader.stats import Tally


class Transport(Protocol):
    """What a feed needs to know about moving batches; `CudaTransport` explains each."""

    def begin(self, tally: Tally) -> None: ...
    def follow(self) -> None: ...
    def blank(self) -> Any: ...
    def deliver(self, parcel: Any) -> Any: ...
    def evict(self, parcel: Any) -> None: ...
    def discard(self, parcel: Any) -> None: ...
    def enter_thread(self) -> None: ...
    def settle(self) -> None: ...
    def send(self, batch: Any, blank: Any) -> Any: ...


class ThreadedFeed:
    """Batches that a thread loads and copies ahead, at most `depth` of them beyond the one handed out."""

    def __init__(self, source: Iterator[Any], transport: Transport, tally: Tally, *, depth: int) -> None:
        self._transport = transport
        self._tally = tally
        transport.begin(tally)
        self._work = _Work(source, transport, tally)
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
        owes_permit, self._owes_permit = self._owes_permit, False
        # First of all: nothing that this step enqueues should delay the copy that goes there.
        blank = self._transport.blank() if owes_permit else None
        try:
            if owes_permit and not self._waiting and self._work.ready.empty():
                owes_permit = False
                self._work.permits.put(blank)
            began_s = time.perf_counter()
            parcel = self._waiting.popleft() if self._waiting else self._work.ready.get()
            waited_s = time.perf_counter() - began_s
            batch = self._delivered(parcel)
        finally:
            parcel = None  # an error's traceback must not keep the batch
            if owes_permit:
                # Last of all: it wakes the thread, which would take the GIL from us in between.
                self._work.permits.put(blank)
        self._tally.taken(waited_s)
        return batch

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
        self._work.ready.put(_Failure(closed_error()))  # for a take() that another thread is waiting in


def _drain(queue: SimpleQueue[Any]) -> list[Any]:
    items = []
    try:
        while True:
            items.append(queue.get_nowait())
    except Empty:
        return items


class _Stop:
    """The permit that ends the thread."""


class _Work:
    """What the thread needs, and nothing that leads back to the feed."""

    def __init__(self, source: Iterator[Any], transport: Transport, tally: Tally) -> None:
        self.source = source
        self.tally = tally
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
        began_s = time.perf_counter()
        try:
            with torch.inference_mode(self.inference), torch.set_grad_enabled(self.grad_enabled):
                batch = next(self.source)
        except StopIteration:
            self.ready.put(_End())
            return False
        except BaseException as error:  # noqa: BLE001 - as above
            return self._send(_Failure(error))
        self.tally.load_s += time.perf_counter() - began_s
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
