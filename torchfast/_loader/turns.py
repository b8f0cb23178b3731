"""Whose turn it is to send a batch that takes little work: found by trying both.

A loop that launches kernels shares one interpreter with the copying thread, and a wake-up of that costs it
more than the work would, unless the device is behind anyway. Whether it is cannot be seen from outside, so
the time from batch to batch decides.
"""

import itertools
import statistics
from typing import NamedTuple


class Trial(NamedTuple):
    """So many batches in a row sent by one of the two, timed or not."""

    is_here: bool
    n_batches: int
    is_timed: bool


TRIALS = (Trial(False, 4, False), Trial(False, 6, True), Trial(True, 2, False), Trial(True, 6, True))
"""Each way once, after a few batches in which the pipeline gets used to it."""

N_BATCHES_DECIDED = 1000
"""Batches for which a decision holds before it is tested anew."""

WORTH_IT_S = 50e-6
"""The consumer sends if that saves so much a batch, beyond noise: `next` is the longer for it."""


class Turns:
    """Decides, batch by batch, whether the consumer's thread sends it."""

    def __init__(self) -> None:
        self._trials = iter(TRIALS)
        self._trial = next(self._trials)
        self._found_s: list[tuple[float, float]] = []
        self.begin()

    def begin(self) -> None:
        """Begin a pass: the time since the last batch means nothing, and a trial under way begins again."""
        self._times_s: list[float] = []

    def is_here(self, now_s: float, /) -> bool:
        """Say whether the consumer's thread sends the batch of this moment."""
        self._times_s.append(now_s)
        if len(self._times_s) > self._trial.n_batches:
            self._conclude()
        return self._trial.is_here

    def _conclude(self) -> None:
        if self._trial.is_timed:
            self._found_s.append(_middle([later - then for then, later in itertools.pairwise(self._times_s)]))
        last_s = self._times_s[-1]
        trial = next(self._trials, None)
        if trial is None and self._found_s:
            (there_s, noise_there_s), (here_s, noise_here_s) = self._found_s
            is_here = there_s - here_s > max(WORTH_IT_S, noise_there_s + noise_here_s)
            trial = Trial(is_here, N_BATCHES_DECIDED, is_timed=False)
            self._found_s = []
        elif trial is None:
            self._trials = iter(TRIALS)
            trial = next(self._trials)
        self._trial, self._times_s = trial, [last_s]


def _middle(steps_s: list[float]) -> tuple[float, float]:
    """Return the median, and how far from it half of the steps are at least."""
    median_s = statistics.median(steps_s)
    return median_s, statistics.median(abs(step_s - median_s) for step_s in steps_s)
