"""The thread that loads and copies ahead.

It holds no reference to the feed, nor to the epoch: an epoch that nobody holds any more is collected, closes
its feed, and that ends the thread.
"""

import contextlib
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any, NamedTuple, Protocol, cast

from torchfast._loader.dead_workers import tells_of_dead_worker
from torchfast._loader.epoch import stopped_by
from torchfast._loader.flag import Flag
from torchfast._loader.forks import spare_imports
from torchfast._loader.helpers import helped_thread
from torchfast._loader.modes import Modes
from torchfast._loader.permits import Permits
from torchfast._loader.stats import Tally


class Transport(Protocol):
    """What a feed needs to know about moving batches; `CudaTransport` explains each."""

    def begin(self, tally: Tally) -> None: ...
    def follow(self, now_s: float, /) -> None: ...
    def blank(self) -> Any: ...
    def deliver(self, parcel: Any, *, came_at_once: bool) -> Any: ...
    def evict(self, parcel: Any) -> None: ...
    def fence(self) -> None: ...
    def enter_thread(self) -> None: ...
    def leave_thread(self) -> None: ...
    def settle(self) -> None: ...
    def send(self, batch: Any, blank: Any) -> Any: ...
    def is_sent_here(self) -> bool: ...
    def send_here(self, batch: Any, blank: Any) -> Any: ...


class Stop:
    """The permit that ends the thread."""


class Sent:
    """Not a permit: word that the consumer has sent the batch that waited for one."""


class Arrival(NamedTuple):
    """What the thread says of one batch: it is on its way, it failed, or there are no more."""

    parcel: Any = None
    error: BaseException | None = None
    is_end: bool = False
    goes_on: bool = False
    """Whether the thread loads the next pass after this end."""
    state: Any = None
    """The loader's state after this batch, for a loader that has one."""


class Work:
    """What the thread needs, and nothing that leads back to the feed."""

    def __init__(
        self,
        source: Iterator[Any],
        transport: Transport,
        tally: Tally,
        snapshot: Callable[[], Any],
        begin_again: Callable[[], Iterator[Any]] | None,
    ) -> None:
        self.source = source
        self.begin_again = begin_again
        self.tally = tally
        self.transport = transport
        self.snapshot = snapshot
        self.ready: deque[Arrival] = deque()
        self._arrivals: SimpleQueue[None] = SimpleQueue()
        self._is_awaited = False
        """Whether the consumer sleeps until something is in line."""
        self.permits = Permits()
        self.loaded: deque[tuple[Any, Any]] = deque()
        """The batch that waits for a permit, and its state: whoever takes it from here sends it."""
        self.here: deque[tuple[Any, Any] | Arrival] = deque()
        """The batch that the consumer's thread is sending or has just sent, and behind it the next."""
        self._spare: list[Any] = []
        """Permits that came while the consumer's thread sent the batch that waited for one."""
        self.entered = Flag()
        self.left = Flag()
        self.stopped = False
        self.n_owed = 1
        """Batches for which the consumer has yet to lay down a permit, or to send one itself."""
        self._is_empty = True
        """Whether the loader has not had a batch in this pass."""
        self.modes = Modes()
        self.consumer = threading.get_ident()
        """The thread that took the last batch."""

    def run(self) -> None:
        """Load and send until told to stop, or until the loader ends."""
        _at_work[threading.get_ident()] = self
        failed: deque[Arrival] = deque()
        try:
            self.modes.enter_thread()
            self.transport.enter_thread()
            self.entered.set()
            while not self.stopped and self.step():
                pass
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is raised where the batch is taken
            failed.append(failure(error))
        finally:
            self.entered.set()
            try:
                if failed:
                    self._put_in_line(failed)
                    self.arrive(Arrival(is_end=True))
                self.loaded.clear()
                self._spare.clear()
                del self.source
                self.transport.leave_thread()
                if self.stopped:
                    # By somebody who did not wait: what was sent since has nobody to wait for it.
                    with contextlib.suppress(RuntimeError):  # a device that failed says so to the consumer
                        self.transport.fence()
                    self._let_go_of_what_came_late()
            finally:
                del _at_work[threading.get_ident()]
                self.left.set()

    def _let_go_of_what_came_late(self) -> None:
        for arrival in list(self.ready):
            # By its traceback an error of this thread, which would hold this line, and not that of a close.
            if arrival.parcel is not None or (arrival.error is not None and arrival.error.__traceback__):
                with contextlib.suppress(ValueError):  # whoever closes the pass has done the same
                    self.ready.remove(arrival)

    def arrive(self, arrival: Arrival) -> None:
        """Put something in line for the consumer."""
        self.ready.append(arrival)
        self._tell_consumer()

    def _tell_consumer(self) -> None:
        if self._is_awaited:
            self._arrivals.put(None)

    def wait_for_arrival(self) -> float:
        """Sleep until something is in line; return for how long, 0.0 where something was."""
        if self.ready:
            return 0.0
        began_s = time.perf_counter()
        # First say that it is awaited, then look: who arrives does it the other way round.
        self._is_awaited = True
        try:
            while not self.ready:
                self._arrivals.get()
        finally:
            self._is_awaited = False
        return time.perf_counter() - began_s

    def step(self) -> bool:
        """Bring one batch, or the error that came in its place, on its way; say whether more may come."""
        self.transport.settle()
        began_s = time.perf_counter()
        is_over, failed = False, deque[Arrival]()
        try:
            with self.modes.around():
                batch = next(self.source)
            state = self.snapshot()
        except StopIteration as error:
            unknot(error)  # it may be that of a worker
            is_over = True
        except BaseException as error:  # noqa: BLE001 - as above
            failed.append(failure(error))
        if is_over:
            return self._ended()
        if failed:
            return self._pass_on_failure(failed)
        self._is_empty = False
        self.permits.load_s = time.perf_counter() - began_s
        self.tally.load_s += self.permits.load_s
        self.loaded.append((batch, state))
        del batch, state
        return self._send_or_leave()

    def _send_or_leave(self) -> bool:
        """Send the loaded batch by the next permit, unless the consumer does; say whether more may come."""
        permit = self._permit()
        while permit is not Stop:
            if permit is not Sent:
                try:
                    batch, state = self.loaded.popleft()
                except IndexError:  # the consumer is sending it: the permit is for the next one
                    self._spare.append(permit)
                else:
                    batch_and_permit = [batch, permit]
                    del batch, permit
                    return self._send(batch_and_permit, state)
            # One call in C sees both: in between, the consumer could move the batch from one to the other.
            if not any((self.loaded, self.here)):
                return True
            permit = self._next_permit()
        return False

    def _ended(self) -> bool:
        # Empty passes need no permits: over a loader that is used up there would be no end of them.
        begin_again = None if self._is_empty else self.begin_again
        self._is_empty = True
        self.tally.end()
        self.arrive(Arrival(is_end=True, goes_on=begin_again is not None, state=self.snapshot()))
        if begin_again is None:
            return False
        with self.modes.around():
            self.source = begin_again()
        return True

    def _send(self, batch_and_permit: list[Any], state: Any) -> bool:
        """Send a batch, by its permit. Once it is in line nothing in this thread holds it, nor its memory.

        The consumer may be done with it before this thread gets on, and would then need memory for one more.
        """
        tally = self.tally
        staged_s = tally.stage_s
        sent: deque[Arrival] = deque()
        try:
            sent.append(Arrival(self.transport.send(*batch_and_permit), state=state))
            self.permits.send_s = tally.stage_s - staged_s
        except BaseException as error:  # noqa: BLE001 - as above
            sent.append(failure(error))
        batch_and_permit.clear()
        self._put_in_line(sent)
        return True

    def _pass_on_failure(self, failed: "deque[Arrival]") -> bool:
        """Put an error of the loader in line: it takes the place, and so the permit, of its batch."""
        while (permit := self._permit()) is Sent:
            pass
        if permit is Stop:
            failed.clear()  # the error's traceback holds the frame that holds this
            return False
        is_last = tells_of_dead_worker(failed[0].error)
        self._put_in_line(failed)
        if is_last:
            self.arrive(Arrival(is_end=True))
        return not is_last

    def _put_in_line(self, arrivals: "deque[Arrival]") -> None:
        """Do as `arrive` does, leaving nothing behind: what an error holds goes where the loop drops it."""
        _move_first(arrivals, self.ready)
        self._tell_consumer()

    # In the consumer's thread, for a loader that never keeps it waiting.

    def send_here(self, permit: Any) -> bool:
        """Send the batch that waits for a permit, and load the next; say whether there was one to send.

        The other thread loads nothing meanwhile. An interrupt leaves each batch in one place, `go_on_here`
        does the rest.
        """
        with contextlib.suppress(IndexError):
            _move_first(self.loaded, self.here)
        if not self.here:
            return False
        is_sent = self._sent_here(permit)
        if is_sent:
            self.transport.settle()
            # No snapshot: a loader that never keeps one waiting has no state.
            self.here.extend(zip(itertools.islice(self.source, 1), itertools.repeat(None)))
        self.go_on_here()
        return is_sent

    def go_on_here(self) -> None:
        """Put what was sent here in line, and leave the next batch to whoever sends it."""
        if isinstance(self.here[0], Arrival):
            self.n_owed -= 1  # from here to `del` no call, which an interrupt could follow
            self.ready += (self.here[0],)
            del self.here[0]
        if self.here:
            _move_first(self.here, self.loaded)
        else:
            # The other thread is told to see for itself that there is no next batch.
            self.permits.lay_down(Sent)
            self.permits.hurry()

    def _sent_here(self, permit: Any) -> bool:
        batch, state = cast("tuple[Any, Any]", self.here[0])
        try:
            parcel = self.transport.send_here(batch, permit)
            if parcel is None:
                return False
            self.here[0] = Arrival(parcel, state=state)
        except BaseException as error:
            self.transport.fence()  # it may have come after the copies were enqueued
            if not isinstance(error, Exception):
                raise  # an interrupt: the batch is sent again, to other memory
            self.here[0] = failure(error)  # raised where the batch is taken
        return True

    def _permit(self) -> Any:
        return self._spare.pop() if self._spare else self._next_permit()

    def _next_permit(self) -> Any:
        permit = self.permits.get()
        return Stop if self.stopped else permit


_at_work: dict[int, Work] = {}
"""What each copying thread works at."""

spare_imports(lambda: [*_at_work])


def served_threads() -> list[int]:
    """Return the calling thread and those that may wait for it.

    That is the thread that it helps, or that took its last batch, and where a loader is fed by another, the
    thread that took that one's.
    """
    served = [threading.get_ident()]
    if helped_thread():
        served.append(helped_thread())
    while (work := _at_work.get(served[-1])) is not None and work.consumer not in served:
        served.append(work.consumer)
    return served


def _move_first(source: "deque[Any]", target: "deque[Any]") -> None:
    """Move the first. In C as a whole: an interrupt, or another thread, comes before it or after it."""
    target.extend(itertools.islice(iter(source.popleft, None), 1))


def failure(error: BaseException, /) -> Arrival:
    """Return what arrives in the place of a batch."""
    unknot(error)
    if not isinstance(error, StopIteration):
        return Arrival(error=error)
    stopped = stopped_by("loading or moving a batch")
    stopped.__cause__ = error
    return Arrival(error=stopped)


def unknot(error: BaseException, /) -> None:
    """Break the cycle of an error of a worker: the frame of PyTorch's that raised it anew holds it.

    It would keep this pass, events and all, until the collector finds it; and where that happens in a worker
    forked since, a CUDA event that goes ends the worker.
    """
    tied, seen = [error], set[int]()
    while tied:
        one = tied.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        traceback = one.__traceback__
        while traceback is not None:
            if traceback.tb_frame.f_globals.get("__name__") == "torch._utils":
                traceback.tb_frame.clear()
            traceback = traceback.tb_next
        tied += [other for other in (one.__cause__, one.__context__) if other is not None]


def no_state() -> None:
    """Stand in for the state of a loader that has none."""
