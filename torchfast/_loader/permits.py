"""What lets the copying thread send: a permit for each batch, laid down without waking it if there is time.

A thread that wakes while the loop launches kernels takes the interpreter from it again and again, 100 us a
step in all. Half a step later the loop mostly waits for the device, as in `.item()`, and nobody is disturbed.
So a permit that is in no hurry is only laid down, and the thread looks for it then, by the pace of the loop;
earlier where it takes longer, so that it is done before the loop launches again.

Permits lie in one place until the thread takes them; beside them go words that only wake it. An interrupt in
the loop's thread thus loses a word at most, and each further batch brings another.
"""

import contextlib
import time
from collections import deque
from queue import Empty, SimpleQueue
from typing import Any

LONGER_AT_TIMES = 1.25
"""How much longer than the last time sending may take."""

AFTER_SENDING_S = 100e-6
"""The thread then lets go of what it sent, and asks the loader for the next batch."""


class Permits:
    """Hands permits from the loop's thread to the copying thread, and loses none."""

    def __init__(self) -> None:
        self._lying: deque[Any] = deque()
        self.lay_down = self._lying.append
        """Hand over a permit, waking nobody. In C: an interrupt comes before it or after it."""
        self.take_back = self._lying.popleft
        """Return one that nobody has got yet, waking nobody; `IndexError` if there is none."""
        self.let_go = self._lying.clear
        """Drop all that nobody has got yet."""
        self._words: SimpleQueue[None] = SimpleQueue()
        self._is_listening = False
        """Whether the thread sleeps until it is woken, however long that may be."""
        self.load_s = 0.0
        """How long the loader took for its last batch: by so much the thread is up earlier."""
        self.send_s = 0.0
        """How long sending one took, less waiting: the thread is to be done with another as the step ends."""
        self._taken_s = self._step_s = self._last_step_s = 0.0

    # In the loop's thread.

    def keep_pace(self, now_s: float, /) -> None:
        """Note that the loop comes for a batch. A step is the shorter of the last two: a pause is none."""
        last_step_s = now_s - self._taken_s if self._taken_s else 0.0
        self._step_s = min(last_step_s, self._last_step_s)
        self._taken_s, self._last_step_s = now_s, last_step_s

    def call(self) -> None:
        """Wake the thread if there is something for it, and it does not wake by itself."""
        if self._lying and self._is_listening:
            self._words.put(None)

    def hurry(self) -> None:
        """If there is something for the thread, wake it, or keep it from going to sleep once."""
        if self._lying:
            self._words.put(None)

    # In the copying thread.

    def get(self) -> Any:
        """Return the next permit, after waiting for it without the GIL."""
        pause_s = self._pause_s()
        if pause_s > 0:
            with contextlib.suppress(Empty):
                self._words.get(timeout=pause_s)
        # First say that it listens, then look: whoever lays something down does it the other way round.
        self._is_listening = True
        try:
            self._forget_words()
            while True:
                with contextlib.suppress(IndexError):  # what lies there may be taken back at any moment
                    return self._lying.popleft()
                self._words.get()
        finally:
            self._is_listening = False

    def _forget_words(self) -> None:
        with contextlib.suppress(Empty):
            while True:
                self._words.get_nowait()

    def _pause_s(self) -> float:
        """Return how long the thread may sleep: to the middle of a step, less what it needs more time for.

        Of the next step, if nothing was laid down in this one; not at all where two permits lie there.
        """
        if len(self._lying) > 1:
            return 0.0
        step_s = self._step_s
        begun_s = self._taken_s if self._lying else self._taken_s + step_s
        busy_s = LONGER_AT_TIMES * self.send_s + AFTER_SENDING_S
        return begun_s + min(0.5 * step_s, step_s - busy_s) - self.load_s - time.perf_counter()
