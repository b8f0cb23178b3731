"""What keeps a loop from hanging once a worker of its `DataLoader` was killed at the wrong moment.

For each batch a worker looks at the event by which it will be told to end, under a lock between processes,
and writes under another. One that is killed meanwhile keeps its lock. PyTorch finds the worker dead, looks at
the same event, and waits for ever: five of eight series of up to 150 kills hung a bare loop so. Or it raises
an error, and waits for ever when it is asked for another batch, since the others wait for the lock.
"""

from contextlib import suppress
from typing import Any

PATIENCE_S = 1.0
"""How long the lock is waited for where a worker died: the others hold it for microseconds."""


class DoneEvent:
    """Stands in for that event in the process that sets it, which needs no lock to know whether it did.

    It is asked once a worker has ended, and set when all are to: then the lock of a dead one is given back.
    """

    def __init__(self, batches: Any) -> None:
        self._event = batches._workers_done_event
        self._workers = batches._workers
        self._is_set = False

    def is_set(self) -> bool:
        """Say whether the workers were told to end."""
        self._give_back_lock()
        return self._is_set

    def set(self) -> None:
        """Tell the workers to end, without the lock, which is for those who wait: nobody does."""
        if not self._is_set:
            self._event._flag.release()
            self._is_set = True
        self._give_back_lock()

    def _give_back_lock(self) -> None:
        if not any(worker.exitcode for worker in self._workers):
            return
        # In vain if its holder is dead; any process may give it back.
        self._event._cond.acquire(timeout=PATIENCE_S)
        with suppress(ValueError):  # its holder was only late
            self._event._cond.release()


def survive_dead_workers(batches: Any, /) -> None:
    """Put the stand-in into PyTorch's own iterator, if it has workers. Private: once gone, as bare."""
    event = getattr(batches, "_workers_done_event", None)
    if hasattr(event, "_cond") and hasattr(event, "_flag") and hasattr(batches, "_workers"):
        batches._workers_done_event = DoneEvent(batches)


def tells_of_dead_worker(error: BaseException | None, /) -> bool:
    """Say whether the pass is over with this error, PyTorch's own: it is raised once, then the loop may hang.

    With any other, whatever became of the workers, it goes on as bare, and comes to that one.
    """
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid")
