"""What keeps a loop from hanging once a worker of its `DataLoader` was killed at the wrong moment.

For each batch a worker looks at the event by which it will be told to end, under a lock between processes,
and writes under another. One that is killed meanwhile keeps its lock. PyTorch finds the worker dead, looks at
the same event, and waits for ever: five of eight series of up to 150 kills hung a bare loop so. Or it raises
an error, and waits for ever when it is asked for another batch, since the others wait for the lock.

What is half written is waited for as well, and the dead are looked for every 5 s, or once the loader's
`timeout` is over. A signal tells the main thread at once; it is another that waits here.
"""

import math
import os
import select
import time
import weakref
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, cast

PATIENCE_S = 1.0
"""How long the lock is waited for where a worker died: the others hold it for microseconds."""

MOMENT_S = 0.001
"""How often one that has let go of its files is looked at until it has ended."""

LOOK_EVERY_S = 1.0
"""How often all are looked at: who was forked meanwhile holds the file by which one tells that it ended."""


def survive_dead_workers(batches: Any, /) -> None:
    """Put both stand-ins into PyTorch's own iterator, if it has workers. Private: once gone, as bare."""
    if not hasattr(batches, "_workers"):
        return
    event = getattr(batches, "_workers_done_event", None)
    if hasattr(event, "_cond") and hasattr(event, "_flag"):
        batches._workers_done_event = DoneEvent(batches)
    reader = getattr(getattr(batches, "_data_queue", None), "_reader", None)
    asked = (hasattr(batches, "_workers_status"), hasattr(batches, "_task_info"), hasattr(select, "poll"))
    if type(reader) is Connection and all(asked):
        reader.__class__ = Results
        cast("Results", reader).batches = weakref.proxy(batches)  # it holds this


def tells_of_dead_worker(error: BaseException | None, /) -> bool:
    """Say whether the pass is over with this error, PyTorch's own: it is raised once, then the loop may hang.

    With any other, whatever became of the workers, it goes on as bare, and comes to that one.
    """
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid")


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


class Results(Connection):
    """The reading end of the pipe of results: who waits for one stops waiting where a worker is dead.

    To PyTorch that is as if time was up, or the pipe broken: it looks for dead workers, and tells of them.
    A result that is there costs what it costs bare: 6 µs for a small one, with 2 or 16 workers.
    """

    batches: Any
    """PyTorch's iterator, held weakly, as it holds this."""

    def _poll(self, timeout: float | None) -> bool:
        return self._is_filled(timeout)

    def _recv(self, size: int) -> Any:
        return super()._recv(size, self._read)  # type: ignore[misc]

    def _read(self, handle: int, n_bytes: int) -> bytes:
        if not self._is_filled(None):
            self.close()  # the rest never comes: whoever read on would take what does for a length
            raise EOFError
        return os.read(handle, n_bytes)

    def _is_filled(self, timeout_s: float | None) -> bool:
        """Wait for something to read; say whether there is, or time is up, or a worker is lost."""
        if self._is_readable():
            return True
        until_s = math.inf if timeout_s is None else time.monotonic() + timeout_s
        watched = [worker.sentinel for _, worker in self._working()]
        while True:
            ready = _ready([self.fileno(), *watched], min(until_s - time.monotonic(), LOOK_EVERY_S))
            if self.fileno() in ready:
                return True
            # Not before: each look at a worker gives up the interpreter.
            if self._is_one_lost() or time.monotonic() > until_s:
                return self._is_readable()  # what was sent before that counts
            watched = [worker.sentinel for _, worker in self._working() if worker.exitcode is None]
            if ready:
                time.sleep(MOMENT_S)

    def _is_readable(self) -> bool:
        return bool(_ready([self.fileno()], 0))

    def _is_one_lost(self) -> bool:
        """Say whether one has failed, or left without an error, as on our signal, and owes something."""
        owing = {task[0] for task in self.batches._task_info.values() if len(task) == 1}
        # Where no batch is owed, it is awaited from all that they are ready for the next pass.
        return any(
            worker.exitcode or (worker.exitcode == 0 and (number in owing or not owing))
            for number, worker in self._working()
        )

    def _working(self) -> list[tuple[int, Any]]:
        """Return the workers that were not told to end, with their numbers."""
        batches = self.batches
        both = zip(batches._workers, batches._workers_status, strict=True)
        return [(number, worker) for number, (worker, works) in enumerate(both) if works]


def _ready(files: list[int], timeout_s: float) -> list[int]:
    poller = select.poll()
    for file in files:
        poller.register(file, select.POLLIN)
    return [file for file, _ in poller.poll(max(timeout_s, 0) * 1000)]
