"""The state of all sources of random numbers that a step draws from."""

import ctypes
import random
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

_MT19937_BYTES = 4 * 624 + 4  # the state of NumPy's default generator: its words, and how many are used up


class RandomState:
    """Notes the state of PyTorch's, Python's and NumPy's generators, and the user's own, and restores it."""

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        self._generators = generators
        self._numpy = _NumpyState()
        self._states: list[tuple[Callable[[Any], Any], Any]] = []

    def note(self) -> None:
        """Note the states of now."""
        self._states = [
            (torch.set_rng_state, torch.get_rng_state()),
            (random.setstate, random.getstate()),
            *self._numpy.noted(),
        ]
        generators = [*self._generators]
        if torch.cuda.is_initialized():
            generators += torch.cuda.default_generators
        self._states += [(generator.set_state, generator.get_state()) for generator in generators]

    def restore(self) -> None:
        """Restore what was noted."""
        for restore, state in self._states:
            restore(state)


class _NumpyState:
    """NumPy's global generator, read only when it has been used.

    NumPy makes Python objects of all 624 words, which takes 40 µs; comparing them where they lie takes one.
    """

    def __init__(self) -> None:
        self._words: bytes | None = None
        self._state: Any = None

    def noted(self) -> list[tuple[Callable[[Any], Any], Any]]:
        """Return the function that restores the state, and the state, if NumPy's generators are loaded."""
        numpy_random = sys.modules.get("numpy.random")
        if numpy_random is None:
            return []
        words = _words(numpy_random)
        # Half of a pair of normal numbers may be kept for later, which the words do not tell.
        if words is None or words != self._words or self._state["has_gauss"]:
            self._state = numpy_random.get_state(legacy=False)
            self._words = words
        return [(numpy_random.set_state, self._state)]


def _words(numpy_random: Any) -> bytes | None:
    """Return the words of NumPy's default generator; None if another one has been put in its place."""
    if not hasattr(numpy_random, "get_bit_generator"):  # before NumPy 1.24
        return None
    generator = numpy_random.get_bit_generator()
    if type(generator).__name__ != "MT19937":
        return None
    return ctypes.string_at(generator.ctypes.state_address, _MT19937_BYTES)
