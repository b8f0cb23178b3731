"""The consumer's side of a thread that loads and copies ahead."""

import contextlib
import contextvars
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from torchfast._loader import epoch
from torchfast._loader.stats import Tally
from torchfast._loader.thread import Arrival, Sent, Stop, Transport, Work, served_threads


class ThreadedFeed:
    """Batches that a thread loads and copies ahead, at most `depth` of them beyond the one handed out."""

    def __init__(  # noqa: PLR0913 - what a pass consists of, most of it by name
        self,
        source: Iterator[Any],
        transport: Transport,
        tally: Tally,
        *,
        depth: int,
        snapshot: Callable[[], Any],
        begin_again: Callable[[], Iterator[Any]] | None = None,
        is_instant: bool = False,
    ) -> None:
        self._transport = transport
        self._tally = tally
        self._is_instant = is_instant
        self.goes_on = begin_again is not None
        """Whether the thread loads the next pass when this one is over."""
        self.is_between_passes = False
        """Whether a pass is over and the next has not been begun, though it may be loading."""
        self.state = snapshot()
        """The loader's state as of the batch handed out last."""
        transport.begin(tally)
        self._work = Work(source, transport, tally, snapshot, begin_again)
        self._n_in_time = max(1, depth - 1)
        """Batches that must be ready beside the one at hand, for there to be time."""
        self._process = os.getpid()
        for _ in range(depth):
            self._work.permits.lay_down(None)
        # Closing at exit ends it in good order; daemonic, so that an exit never waits for a loader for ever.
        self._thread = threading.Thread(
            target=contextvars.copy_context().run,
            args=(self._work.run,),
            name="torchfast-loader",
            daemon=True,
        )
        self._is_closed = False
        try:
            self._start()
        except BaseException:  # an interrupt: the thread would go on, with nobody to take its batches
            self._end(epoch.PATIENCE_S)  # it may have broken the start: `Thread` has an Event
            self._is_closed = True
            raise

    def _start(self) -> None:
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
        work = self._work
        work.consumer = threading.get_ident()
        now_s = time.perf_counter()
        work.permits.keep_pace(now_s)
        self._transport.follow(now_s)
        try:
            if work.here:
                work.go_on_here()  # where an interrupt came
            asks = work.n_owed > 0
            # First of all: nothing that this step enqueues should delay the copy that goes there.
            blank = self._transport.blank() if asks else None
            # Before the delivery: an interrupt then loses nothing.
            is_sent_here = self._may_send_here() and work.send_here(blank)
            if not is_sent_here:
                self._grant(blank)
        except IndexError:
            if not work.stopped:
                raise
            # Closed by another thread, which has taken what was to be sent here.
            raise epoch.closed_error() from None
        if not work.ready:
            work.permits.hurry()  # the last take may have been cut short before it woke the thread
        waited_s = work.wait_for_arrival()
        return self._delivered(waited_s, came_at_once=asks and not is_sent_here and not waited_s)

    @property
    def is_loading(self) -> bool:
        """Whether the thread has more to load."""
        return self._thread.is_alive()

    def begin_pass(self, tally: Tally) -> None:
        """Begin the pass whose batches are already being loaded."""
        self.is_between_passes = False
        self._tally = self._work.tally = tally
        self._transport.begin(tally)

    def _may_send_here(self) -> bool:
        is_ready = self._work.n_owed > 0 and len(self._work.ready) > 0
        return is_ready and self._is_instant and self._transport.is_sent_here()

    def _grant(self, blank: Any) -> None:
        """Let the thread send one more batch for each that was taken."""
        while self._work.n_owed:
            self._work.n_owed -= 1
            self._work.permits.lay_down(blank)
            blank = None

    def _wake_thread(self) -> None:
        """Wake the thread for what was laid down: at once if too few batches are ready, else if it listens.

        Not before the delivery: a thread that is awake takes the interpreter as soon as the loop lets go of
        it, and behind the delivery that is in the launch of a kernel, which the device then has.
        """
        if len(self._work.ready) <= self._n_in_time:
            self._work.permits.hurry()
        else:
            self._work.permits.call()

    def _delivered(self, waited_s: float, *, came_at_once: bool) -> Any:
        """Hand out what arrived first; it leaves the line last of all, so that an interrupt loses nothing."""
        arrival = self._first()
        if arrival.parcel is None:
            self._wake_thread()  # first: behind an end no call comes, so no interrupt does
        if arrival.is_end:
            if arrival.state is not None:
                self.state = arrival.state
            self.is_between_passes = self.goes_on = arrival.goes_on
            if arrival.goes_on:
                del self._work.ready[0]  # the last end stays: whoever asks again is told again
            raise StopIteration
        if arrival.error is not None:
            self._pass_on(arrival)
            try:
                raise arrival.error
            finally:
                del arrival  # the error's traceback holds this frame
        try:
            batch = self._transport.deliver(arrival.parcel, came_at_once=came_at_once)
        except torch.OutOfMemoryError:
            raise  # once there is room, the same batch again
        except Exception as error:
            self._transport.fence()
            self._wake_thread()
            self._pass_on(arrival)
            if isinstance(error, StopIteration):
                raise epoch.stopped_by("moving a batch") from error
            raise
        self._wake_thread()
        self._tally.taken(waited_s)
        self._pass_on(arrival)
        return batch

    def _first(self) -> Arrival:
        try:
            return self._work.ready[0]
        except IndexError:  # closed by another thread, which has emptied the line
            raise epoch.closed_error() from None

    def _pass_on(self, arrival: Arrival) -> None:
        """Let the first leave the line. No call comes between here and the loop, so no interrupt does."""
        ready = self._work.ready
        self._work.n_owed += 1
        if arrival.state is not None:
            self.state = arrival.state
        if ready and ready[0] is arrival:  # close() in another thread may have emptied the line
            del ready[0]

    def release_memory(self) -> None:
        """Bring what is ready back to the host, and take back the memory set aside for what is not.

        In the consumer's thread: anywhere else it does nothing.
        """
        if os.getpid() != self._process or threading.get_ident() != self._work.consumer:
            return  # memory ran out elsewhere, and the batch at the head may be on its way to the consumer
        self._transport.fence()
        for arrival in [*self._work.here, *self._work.ready]:
            if isinstance(arrival, Arrival) and arrival.parcel is not None:
                self._transport.evict(arrival.parcel)
        with contextlib.suppress(IndexError):
            while not self._work.stopped:
                self._take_back_permit()

    def _take_back_permit(self) -> None:
        """Owe a permit that was laid down: it is laid down again when the next batch is taken."""
        self._work.n_owed += 1  # first: an interrupt then loses none
        try:
            permit = self._work.permits.take_back()
        except IndexError:
            self._work.n_owed -= 1
            raise
        if permit is Sent:  # word that any further permit brings as well
            self._work.n_owed -= 1
        elif permit is Stop:  # of a close in another thread, which waits for the thread to get it
            self._work.n_owed -= 1
            self._tell_to_stop()

    def close(self) -> None:
        """End the thread, wait for it, and let go of everything. Where it cannot, the next close does."""
        self._end(patience_s=None)

    def abandon(self) -> None:
        """Do the same where the last reference has gone; but in another thread than the loop's do not hang.

        The collector runs in any, and the copying thread may be waiting for just that one.
        """
        is_here = threading.get_ident() == self._work.consumer
        self._end(patience_s=None if is_here else epoch.PATIENCE_S)

    def _end(self, patience_s: float | None) -> None:
        if self._is_closed or os.getpid() != self._process:
            return
        self.is_between_passes = has_waited = False
        try:
            self._tell_to_stop()
            has_waited = self._wait_for_thread(patience_s)
        finally:
            # Also where an interrupt ended the waiting: the thread then ends later.
            try:
                self._transport.fence()
            finally:  # a device that failed has no more to write
                self._work.ready.clear()
                self._work.here.clear()
                self._work.loaded.clear()
                self._work.permits.let_go()
                self._tell_to_stop()
                # For a take() that another thread waits in.
                self._work.arrive(Arrival(error=epoch.closed_error()))
        self._is_closed = has_waited

    def __del__(self) -> None:
        # The loader is gone while its next pass loads; or an interrupt came before anybody held this.
        if not getattr(self, "_is_closed", True):
            self.abandon()

    def _tell_to_stop(self) -> None:
        self._work.stopped = True
        self._work.permits.lay_down(Stop)
        self._work.permits.hurry()

    def _wait_for_thread(self, patience_s: float | None) -> bool:
        """Wait for the thread to leave; False if it has not, or may be waiting for the calling one itself."""
        if self._thread.ident is None:
            return True
        if self._thread.ident in served_threads():
            return False
        is_exiting, has_left, told = epoch.exiting.is_set(), False, list[RuntimeError]()
        while True:
            try:
                # Not join: before Python 3.13 one that is interrupted takes the thread for ended.
                has_left = self._work.left.wait(epoch.PATIENCE_S if is_exiting else patience_s)
                if has_left:
                    # All that it still does is to leave `threading`, whose lock the collector may run under.
                    self._thread.join(epoch.PATIENCE_S)
                break
            except RuntimeError as error:
                told.append(error)  # PyTorch's signal handler tells of a dead worker wherever it interrupts
        if told:
            raise told.pop()
        return has_left or is_exiting
