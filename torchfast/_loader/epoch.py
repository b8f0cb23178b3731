"""One pass over the loader, and the simple way to feed it: batch by batch, in the caller's thread."""

import atexit
import contextlib
import functools
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, TypeVar
from weakref import WeakSet

import torch

from torchfast._loader.dead_workers import tells_of_dead_worker
from torchfast._loader.stats import Tally
from torchfast._tree import flatten

T = TypeVar("T")


class Feed(Protocol):
    """A source of finished batches."""

    state: Any
    """The loader's state as of the batch handed out last; whoever puts that back puts this back too."""

    @property
    def goes_on(self) -> bool:
        """Whether the next pass is already being loaded when this one is over."""

    def take(self) -> Any:
        """Return the next batch; raise `StopIteration` after the last, the loader's errors in their place."""

    def close(self) -> None:
        """Stop, and let go of everything; once is enough, more does no harm."""

    def abandon(self) -> None:
        """Do the same in whatever thread the last reference has gone, without a hang."""

    def release_memory(self) -> None:
        """Let go of device memory that is held ahead of use, without losing a batch."""


class Inside(threading.local):
    """What the `transform=` under way in a thread has taken by itself; None where none is."""

    taken: list[tuple[Any, Any]] | None = None


class Epoch(Iterator[T]):
    """One pass over the loader: what `iter(DeviceLoader(...))` returns."""

    def __init__(self, feed: Feed, finish: Callable[[Any], Any] | None, owner: object) -> None:
        self._feed = feed
        self._finish = finish
        self._owner = owner  # lives as long as its epoch: it is what oom_guard asks to let go of memory
        self._state = "open"
        self._has_failed = False
        self._unfinished: list[tuple[T, Any]] = []
        """Batches that `transform` is to be given once more, each with the loader's state behind it."""
        self._state_at_end: Any = None
        """The loader's, where a transform had come to the end before it was to be called again."""
        self._inside = Inside()
        to_close_at_exit().add(self)

    @property
    def is_under_way(self) -> bool:
        """Whether more batches were to come, and nothing has gone wrong."""
        return self._state == "open" and not self._has_failed

    def __next__(self) -> T:
        self._raise_if_over()
        if self._finish is None:
            return self._taken()
        state = self._feed.state
        if self._unfinished:
            batch, self._feed.state = self._unfinished[0]
            del self._unfinished[0]  # no call, which an interrupt could follow
        else:
            batch = self._taken()
        taken = (batch, self._feed.state)
        # From here on, but for the transform itself, no call, which an interrupt could follow.
        outer = self._inside.taken
        inside = self._inside.taken = []
        is_done = is_lost = False
        try:
            finished: T = self._finish(batch)
            is_done = True
            if outer is not None:
                outer += [taken, *inside]
        except torch.OutOfMemoryError:
            raise
        except StopIteration as error:
            is_lost = True
            raise stopped_by("transform=") from error
        except Exception:
            is_lost = True
            raise
        finally:
            self._inside.taken = outer
            if not (is_done or is_lost):  # the same batch again, and then those that were taken
                self._unfinished[:0] = [taken, *inside]
                if self._state == "over" and self._state_at_end is None:
                    self._state_at_end = self._feed.state
                self._feed.state = state
            self._has_failed = self._has_failed or not is_done
        return finished

    def _raise_if_over(self) -> None:
        if self._state == "closed":
            raise closed_error()
        if self._state == "over" and not self._unfinished:
            if self._state_at_end is not None:
                self._feed.state, self._state_at_end = self._state_at_end, None
            raise StopIteration

    def _taken(self) -> T:
        try:
            batch: T = self._feed.take()
        except StopIteration:
            self._state = "over"
            if not self._feed.goes_on:
                self._feed.close()
            raise
        except BaseException:
            self._has_failed = True
            raise
        return batch

    def close(self) -> None:
        """Stop loading and let go of everything; batches already handed out are the user's and stay."""
        self._unfinished.clear()
        if self._state != "over":
            self._state = "closed"
            self._feed.close()

    def release_memory(self) -> None:
        """Let go of device memory that is held ahead of use, without losing a batch."""
        self._feed.release_memory()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise uncopyable("a pass over a DeviceLoader", "its batches can be taken once only.")

    def __del__(self) -> None:
        # A constructor that failed leaves no state behind; what is over or closed may outlive the driver.
        if getattr(self, "_state", "over") != "over":
            try:
                self._feed.abandon()
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):  # one that died is told of where its batch is taken
                    raise


class Closable(Protocol):
    """What must be closed before the interpreter ends."""

    def close(self) -> None:
        """End the thread, if there is one."""


PATIENCE_S = 5.0
"""How long a thread is waited for where that could be for ever, as at exit: longer than most batches take."""

exiting = threading.Event()
"""Set once the interpreter ends."""


@functools.cache
def to_close_at_exit() -> WeakSet[Closable]:
    """Return the set of what will be closed when the interpreter ends, before workers are ended.

    Exit functions run in reverse order, and this one is registered with the first pass, hence after
    multiprocessing's own: the thread must be out of the loader before that ends the workers.
    """
    open_ones: WeakSet[Closable] = WeakSet()
    atexit.register(close_all, open_ones)
    return open_ones


def close_all(open_ones: Iterable[Closable], /) -> None:
    """Close them as the interpreter ends, each whatever becomes of the others."""
    exiting.set()
    with contextlib.ExitStack() as stack:
        for one in list(open_ones):
            stack.callback(one.close)


def uncopyable(what: str, why: str) -> TypeError:
    return TypeError(f"{what} cannot be copied or pickled: {why}")


def stopped_by(what: str) -> RuntimeError:
    return RuntimeError(
        f"{what} raised StopIteration, which would have ended the epoch without a word. "
        "Raise another error, or end the loop from its body."
    )


def closed_error() -> RuntimeError:
    return RuntimeError(
        "this pass over a DeviceLoader was closed, by close() or because another pass over the same loader "
        "was begun: two at a time would share workers and steal each other's batches. "
        "Use one DeviceLoader, around a loader of its own, for each loop that runs at the same time."
    )


class InlineFeed:
    """Batches as they come, in the caller's thread: for the CPU, and for accelerators other than CUDA."""

    def __init__(
        self, source: Iterator[Any], device: torch.device, tally: Tally, snapshot: Callable[[], Any]
    ) -> None:
        self._source = source
        self._snapshot = snapshot
        self._tally = tally
        self._device = device
        self._is_closed = False
        self._state: Any = None
        """The loader's, where it was read since the last batch, or put back."""
        self._waiting: list[Any] = []
        """A batch for which there was no room."""

    def take(self) -> Any:
        """Return the next batch, on the device: where there was no room for one, that."""
        # Once a batch is loaded it is too late; and on the CPU reading it for each would be for nothing.
        state = None if self._device.type == "cpu" else self.state
        began_s = time.perf_counter()
        try:
            batch = self._waiting.pop() if self._waiting else self._loaded()
        finally:
            self._state = None
        waited_s = time.perf_counter() - began_s
        self._tally.load_s += waited_s
        leaves, structure = flatten(batch)
        try:
            moved = structure.rebuild([leaf.to(self._device) for leaf in leaves])
        except torch.OutOfMemoryError:
            self._waiting, self._state = [batch], state
            raise
        except StopIteration as error:
            raise stopped_by("moving a batch") from error
        self._tally.taken(waited_s)
        return moved

    def _loaded(self) -> Any:
        try:
            return next(self._source)
        except StopIteration:
            if self._is_closed:  # by another thread: this is not the end
                raise closed_error() from None
            raise
        except Exception as error:
            if tells_of_dead_worker(error):
                self._source = iter(())
            raise

    goes_on = False

    @property
    def state(self) -> Any:
        """The loader's state: nothing is loaded ahead, but a transform may be given its last batch again."""
        if self._state is None:
            self._state = self._snapshot()
        return self._state

    @state.setter
    def state(self, state: Any) -> None:
        self._state = state

    def close(self) -> None:
        """Let go of the loader's iterator, and so of its workers."""
        self._is_closed = True  # first: another thread may be asking for a batch
        self._source = iter(())
        self._waiting.clear()

    abandon = close

    def release_memory(self) -> None:
        """Nothing is held ahead of use."""


def warn_of_open_epoch(stacklevel: int) -> None:
    """Say that a pass was closed because another was begun."""
    warnings.warn(
        "a new pass over this DeviceLoader, or over the workers of its loader, was begun before the last one "
        "was finished or dropped, so the last one was closed: two passes at a time would share workers and "
        "steal each other's batches. Call close() on the first, or use one DeviceLoader, around a loader of "
        "its own, for each loop that runs at the same time.",
        RuntimeWarning,
        stacklevel=stacklevel,
    )
