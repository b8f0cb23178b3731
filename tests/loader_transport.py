"""A transport for tests, which hands batches over as they are, and passes that a thread feeds through it."""

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from torchfast import DeviceLoader
from torchfast._loader.epoch import Epoch
from torchfast._loader.feed import ThreadedFeed
from torchfast._loader.pinned_ring import PinnedBuffer
from torchfast._loader.stats import Tally
from torchfast._loader.thread import no_state


class HostTransport:
    """Moves nothing; keeps count of what it was asked to do."""

    def __init__(self) -> None:
        self.n_sent = 0
        self.n_delivered = 0
        self.n_evicted = 0
        self.sending_fails_at: int | None = None
        self.n_fences = 0
        self.delivery_fails_once = False
        self.delivery_is_interrupted_once = False
        self.delivery_breaks_once = False
        self.sends_here: Iterator[bool] = itertools.repeat(False)
        self.sending_here_is_interrupted_once = False
        self.takes_here = True
        self.n_sent_here = 0
        self.n_left = 0
        self.came_at_once = list[bool]()

    def begin(self, tally: Tally) -> None:
        """Begin a pass."""

    def follow(self, now_s: float) -> None:
        """Nothing to follow."""

    def blank(self) -> None:
        """Nothing to allocate."""

    def enter_thread(self) -> None:
        """Nothing to set."""

    def leave_thread(self) -> None:
        """Count."""
        self.n_left += 1

    def settle(self) -> None:
        """Nothing to wait for."""

    def send(self, batch: Any, blank: object) -> Any:
        """Send a batch, or fail."""
        assert blank is None
        if self.n_sent == self.sending_fails_at:
            self.n_sent += 1
            raise ConnectionError("the transfer failed")
        self.n_sent += 1
        return [batch]

    def is_sent_here(self) -> bool:
        """Say what the test wants."""
        return next(self.sends_here)

    def send_here(self, batch: Any, blank: object) -> Any:
        """Send a batch from the consumer's thread, or be interrupted, or leave it to the other thread."""
        if self.sending_here_is_interrupted_once:
            self.sending_here_is_interrupted_once = False
            raise KeyboardInterrupt
        if not self.takes_here:
            return None
        self.n_sent_here += 1
        return self.send(batch, blank)

    def deliver(self, parcel: Any, *, came_at_once: bool) -> Any:
        """Hand the batch over, or run out of memory."""
        self.came_at_once.append(came_at_once)
        if self.delivery_fails_once:
            self.delivery_fails_once = False
            raise torch.OutOfMemoryError
        if self.delivery_is_interrupted_once:
            self.delivery_is_interrupted_once = False
            raise KeyboardInterrupt
        if self.delivery_breaks_once:
            self.delivery_breaks_once = False
            raise ConnectionError("cannot be moved")
        self.n_delivered += 1
        return parcel[0]

    def evict(self, parcel: Any) -> None:
        """Count."""
        assert parcel
        self.n_evicted += 1

    def fence(self) -> None:
        """Count."""
        self.n_fences += 1


def grow_unpinned(buffer: PinnedBuffer, n_bytes: int) -> None:
    """Make room in a staging buffer without a GPU."""
    if buffer.memory.nbytes < n_bytes:
        buffer.memory = torch.empty(n_bytes, dtype=torch.uint8)
        buffer._packed.clear()


def open_feed(
    source: Any, depth: int = 2, *, turns: Iterator[bool] | None = None
) -> tuple[Epoch[Any], HostTransport, ThreadedFeed]:
    """Open a pass that is fed by a thread; the consumer offers to send a batch whenever `turns` says so."""
    transport = HostTransport()
    if turns is not None:
        transport.sends_here = turns
    feed = ThreadedFeed(
        iter(source),
        transport,
        Tally(),
        depth=depth,
        snapshot=no_state,
        is_instant=turns is not None,
    )
    return Epoch(feed, None, owner=None), transport, feed


def until(condition: Callable[[], bool]) -> None:
    """Wait for another thread to get somewhere; a hang is ended by the test's timeout."""
    while not condition():
        threading.Event().wait(0.001)


def number_of_a_new_thread() -> int:
    """Return with how many threads one that is begun now computes."""
    found = list[int]()
    one = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    one.start()
    one.join()
    return found[0]


@contextlib.contextmanager
def computing_with(n_threads: int) -> Iterator[None]:
    """Compute with so many threads for a while."""
    usual = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        yield
    finally:
        torch.set_num_threads(usual)


def copying_threads() -> int:
    """Count the threads that are copying."""
    return sum(thread.name == "torchfast-loader" for thread in threading.enumerate())


def threaded(loader: Any, **options: Any) -> DeviceLoader[Any]:
    """Return a DeviceLoader that works as on a GPU, with a transport that hands batches over."""
    device_loader: DeviceLoader[Any] = DeviceLoader(loader, "cpu", **options)
    vars(device_loader).update(device=torch.device("cuda", 0), _transport=HostTransport())
    return device_loader
