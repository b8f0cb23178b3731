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
        self._n_trials = 0
        self._trial = TRIALS[0]
        self._found_s: dict[bool, tuple[float, float]] = {}
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
        """Note what was found and go on to the next trial; the same again after an interrupt."""
        trial, times_s = self._trial, self._times_s
        if trial.is_timed:
            steps_s = [later - then for then, later in itertools.pairwise(times_s)]
            self._found_s[trial.is_here] = _middle(steps_s)
        n_trials = (self._n_trials + 1) % (len(TRIALS) + 1)
        trial = TRIALS[n_trials] if n_trials < len(TRIALS) else self._decision()
        self._n_trials, self._trial, self._times_s = n_trials, trial, times_s[-1:]

    def _decision(self) -> Trial:
        there_s, noise_there_s = self._found_s[False]
        here_s, noise_here_s = self._found_s[True]
        is_here = there_s - here_s > max(WORTH_IT_S, noise_there_s + noise_here_s)
        return Trial(is_here, N_BATCHES_DECIDED, is_timed=False)


def _middle(steps_s: list[float]) -> tuple[float, float]:
    """Return the median, and how far from it half of the steps are at least."""
    median_s = statistics.median(steps_s)
    return median_s, statistics.median(abs(step_s - median_s) for step_s in steps_s)
