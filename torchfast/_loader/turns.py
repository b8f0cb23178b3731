"""Whose turn it is to bring a batch that takes little work: found by trying both.

A loop that launches kernels shares one interpreter with the copying thread, and a wake-up of that costs it
more than the work would, unless the device is behind anyway. Whether it is cannot be seen from outside, so
the time from batch to batch decides.

In the loop's turn it sends batches of many tensors itself, and copies small ones as they are handed out; in
the thread's turn the thread sends all of them ahead.
"""

import itertools
import math
import statistics
from typing import NamedTuple


class Trial(NamedTuple):
    """So many batches in a row in the turn of one of the two, timed or not."""

    is_here: bool
    n_batches: int
    is_timed: bool


def trials(depth: int, /) -> tuple[Trial, ...]:
    """Return what is tried: after a few batches to get used to, one way in the midst of the other.

    A loop that gets faster or slower all the while then speaks for neither. Behind each change as many steps
    are not timed as there are batches on their way, which the other brings.
    """
    n_on_their_way = max(2, depth)
    return (
        Trial(False, max(4, depth), False),
        Trial(False, 6, True),
        Trial(True, n_on_their_way, False),
        Trial(True, 12, True),
        Trial(False, n_on_their_way, False),
        Trial(False, 6, True),
    )


N_BATCHES_DECIDED = 1000
"""Batches for which a decision holds before it is tested anew."""

N_BATCHES_IN_DOUBT = 100
"""Those for which it holds where noise may hide what is to be saved."""

WORTH_IT_S = 50e-6
"""The loop has the turn if that saves so much a batch, beyond noise: `next` is the longer for it."""


class Turns:
    """Decides, batch by batch, whether the loop has the turn."""

    def __init__(self, depth: int) -> None:
        self._trials = trials(depth)
        self._n_trials = 0
        self._trial = self._trials[0]
        self._found_s: dict[int, list[float]] = {}
        """The steps of each of the trials that were timed, by its place among them."""
        self._steps_s: list[float] = []
        """Those of the trial under way."""
        self._last_s: float | None = None
        self._n_on_their_way = max(2, depth)
        self._n_untimed = 1

    def begin(self) -> None:
        """Begin a pass: no step is the time since the last one, nor that in which the first batch is made."""
        self._last_s, self._n_untimed = None, 1

    def pause(self) -> None:
        """Go on behind a batch of another kind: no step is timed in which it may be handed out."""
        self._last_s, self._n_untimed = None, self._n_on_their_way

    def is_here(self, now_s: float, /) -> bool:
        """Say whether the loop, which comes for a batch at this moment, has the turn."""
        if self._last_s is not None:
            if self._n_untimed:
                self._n_untimed -= 1
            else:
                self._steps_s.append(now_s - self._last_s)
        self._last_s = now_s
        if len(self._steps_s) >= self._trial.n_batches:
            self._conclude()
        return self._trial.is_here

    def _conclude(self) -> None:
        """Note what was found and go on to the next trial; the same again after an interrupt."""
        if self._trial.is_timed:
            self._found_s[self._n_trials] = self._steps_s
        n_trials = (self._n_trials + 1) % (len(self._trials) + 1)
        trial = self._trials[n_trials] if n_trials < len(self._trials) else self._decision()
        self._n_trials, self._trial, self._steps_s = n_trials, trial, []

    def _decision(self) -> Trial:
        there_s, doubt_there_s = _middle(self._found(is_here=False))
        here_s, doubt_here_s = _middle(self._found(is_here=True))
        saved_s, doubt_s = there_s - here_s, math.hypot(doubt_there_s, doubt_here_s)
        is_here = saved_s > max(WORTH_IT_S, doubt_s)
        is_sure = is_here or saved_s + doubt_s <= WORTH_IT_S
        return Trial(is_here, N_BATCHES_DECIDED if is_sure else N_BATCHES_IN_DOUBT, is_timed=False)

    def _found(self, *, is_here: bool) -> list[float]:
        found_s = [
            steps for number, steps in self._found_s.items() if self._trials[number].is_here is is_here
        ]
        return [*itertools.chain.from_iterable(found_s)]


def _middle(steps_s: list[float]) -> tuple[float, float]:
    """Return the median, and two standard errors of it, taken from how far half of the steps are from it.

    Of normal noise: 1.25 sigma / sqrt(n), and sigma is 1.48 times that distance.
    """
    median_s = statistics.median(steps_s)
    distance_s = statistics.median(abs(step_s - median_s) for step_s in steps_s)
    return median_s, 2 * 1.25 * 1.48 * distance_s / math.sqrt(len(steps_s))
