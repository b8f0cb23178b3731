"""Threads that copy many tensors side by side, from host memory to host memory.

One thread copies 5 to 10 GB/s, and PyTorch's own team is woken anew for each tensor. On one H200's host 512
tensors of 75 KiB took 8 to 11 ms, with four helpers 2.0 and with six 1.7; 64 of 256 KiB 1.5, 0.76 and 0.65.
"""

import itertools
import threading
from bisect import bisect_left
from queue import SimpleQueue
from typing import NamedTuple

import torch

from torchfast._bytes import MIB
from torchfast._loader.cpus import compute_with
from torchfast._loader.plan import Group
from torchfast._loader.unwaited import start_unwaited

MAX_HELPERS = 6
"""More of them copy hardly faster, and each wakes in the middle of the loop."""

MIN_HELPERS = 3
"""Fewer save less than their waking costs the loop: of 4 MiB, 0.1 ms, for up to 0.2 in loops with `item`."""

SHARE_BYTES = 2 * MIB
"""As much is worth a helper."""

_ours = threading.local()


def helped_thread() -> int:
    """Return the number of the thread that waits for the calling one; 0 unless that is a helper."""
    return getattr(_ours, "helped", 0)


class Helpers:
    """Helps the thread that makes it, and no other, with copies: by threads started when first worth it."""

    def __init__(self, n_threads: int, /, *, usual_threads: int) -> None:
        self._n_threads = min(MAX_HELPERS, n_threads)
        self._usual_threads = usual_threads
        self._helped = threading.get_ident()
        self._shares: SimpleQueue[Share | None] = SimpleQueue()
        self._n_running = 0

    def copy(self, targets: list[torch.Tensor], sources: list[torch.Tensor], group: Group, /) -> None:
        """Copy the tensors of a group, by as many helpers as they are worth."""
        n_shares = min(self._n_threads, group.n_bytes // SHARE_BYTES)
        if n_shares < MIN_HELPERS or not self._are_running():
            torch._foreach_copy_(targets, sources)
            return
        starts_bytes = [group.n_bytes * number // n_shares for number in range(n_shares)]
        # None is empty: a share is of 2 MiB at least, a small tensor below one.
        cuts = [*(bisect_left(group.offsets_bytes, start) for start in starts_bytes), len(sources)]
        outcomes: SimpleQueue[BaseException | None] = SimpleQueue()
        for start, stop in itertools.pairwise(cuts):
            self._shares.put(Share(targets[start:stop], sources[start:stop], outcomes))
        error = next(filter(None, [outcomes.get() for _ in range(n_shares)]), None)
        if error is not None:
            try:
                raise error
            finally:
                del error  # whose traceback holds this frame

    def close(self) -> None:
        """Let the threads end. They are not waited for."""
        for _ in range(self._n_running):
            self._shares.put(None)
        self._n_threads = self._n_running = 0

    def _are_running(self) -> bool:
        if not self._n_running:
            self._n_running = sum(start_unwaited(self._help) for _ in range(self._n_threads))
        # Of two, one is out of the collector, and does all the work if need be.
        return self._n_running > 1

    def _help(self) -> None:
        _ours.helped = self._helped
        compute_with(1)
        start_unwaited(torch.set_num_threads, self._usual_threads)  # puts the default of new threads back
        while self._help_once():
            pass

    def _help_once(self) -> bool:
        share = self._shares.get()
        if share is None:
            return False
        outcomes, told = share.outcomes, [share.copied()]
        # Before it is told: nothing of a batch should go in a thread that the pass does not wait for. Nor is
        # the error kept, whose traceback will hold the batch.
        del share
        outcomes.put(told.pop())
        return True


class Share(NamedTuple):
    """What one helper copies, and where it tells that it has."""

    targets: list[torch.Tensor]
    sources: list[torch.Tensor]
    outcomes: "SimpleQueue[BaseException | None]"

    def copied(self) -> BaseException | None:
        """Copy, and return the error if there was one."""
        try:
            torch._foreach_copy_(self.targets, self.sources)
        except BaseException as error:  # noqa: BLE001 - it is raised in the thread that is helped
            return error.with_traceback(None)  # whose frames hold the tensors
        return None
