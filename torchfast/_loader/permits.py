"""What lets the copying thread send: a permit for each batch, handed over without waking it if there is time.

A thread that wakes while the loop launches kernels takes the interpreter from it again and again, 100 us a
step in all. Half a step later the loop mostly waits for the device, as in `.item()`, and nobody is disturbed.
So a permit that is in no hurry is only laid down, and the thread looks for it then, by the pace of the loop.
In which order permits arrive is of no importance: any of them lets any batch be sent.
"""

import time
from collections import deque
from queue import Empty, SimpleQueue
from typing import Any


class Permits:
    """Hands permits from the loop's thread to the copying thread, and loses none."""

    def __init__(self) -> None:
        self._urgent: SimpleQueue[Any] = SimpleQueue()
        self._laid_down: deque[Any] = deque()
        self._is_listening = False
        """Whether the thread sleeps until it is woken: laying something down is then not enough."""
        self._taken_s = 0.0
        self._step_s = self._last_step_s = 0.0

    # In the loop's thread.

    def keep_pace(self, now_s: float, /) -> None:
        """Note that the loop comes for a batch. A step is the shorter of the last two: a pause is none."""
        last_step_s = now_s - self._taken_s
        self._step_s = min(last_step_s, self._last_step_s)
        self._taken_s, self._last_step_s = now_s, last_step_s

    def put(self, permit: Any, /) -> None:
        """Hand over a permit now, and all that was laid down before it."""
        self.hurry()
        self._urgent.put(permit)

    def lay_down(self, permit: Any, /) -> None:
        """Hand over a permit in the middle of the step; now, if the thread is waiting for it already."""
        self._laid_down.append(permit)
        if self._is_listening:
            self.hurry()

    def hurry(self) -> None:
        """Hand over now what was laid down."""
        try:
            while True:
                self._urgent.put(self._laid_down.popleft())
        except IndexError:  # also where the thread was quicker
            return

    # In the copying thread.

    def get(self) -> Any:
        """Return the next permit, after waiting for it without the GIL."""
        pause_s = self._until_mid_step_s()
        if pause_s > 0:
            try:
                return self._urgent.get(timeout=pause_s)
            except Empty:
                pass
        # First say that it listens, then look: whoever lays something down does it the other way round.
        self._is_listening = True
        try:
            return self._laid_down.popleft()
        except IndexError:
            return self._urgent.get()
        finally:
            self._is_listening = False

    def _until_mid_step_s(self) -> float:
        """Return the time to the middle of this step, or of the next if nothing was laid down in this one."""
        steps = 0.5 if self._laid_down else 1.5
        return self._taken_s + steps * self._step_s - time.perf_counter()

    # In either.

    def drain(self) -> list[Any]:
        """Take back all that nobody has got yet."""
        self.hurry()
        permits = []
        try:
            while True:
                permits.append(self._urgent.get_nowait())
        except Empty:
            return permits
