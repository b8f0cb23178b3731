"""The state of all sources of random numbers that a step draws from.

Noted at every step, so it must be cheap. Python and NumPy make an object of each of the 624 words of their
states, which takes 7 and 40 µs, and several times that with the cold caches of a training loop. So the words
are compared where they lie, which takes less than one, and a state is read only when they have changed.
"""

import ctypes
import functools
import random
import struct
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from torchfast._holders import draw_beside

_N_WORDS = 624
_STATE_BYTES = 4 * _N_WORDS + 4  # the words of a Mersenne twister, and how many of them are used up
_HEADER_BYTES = object.__basicsize__

States = list[tuple[Callable[[Any], Any], Any]]


class RandomState:
    """Notes the states of PyTorch's, Python's and NumPy's generators and the user's, and restores them."""

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        self._own = generators
        self._python: tuple[object, Any] = None, None
        self._numpy: tuple[object, Any] = None, None
        self._states: States = []

    def note(self) -> None:
        """Note the states of now; of the host's own generators only where no thread beside draws from them.

        Put back, those would give a loader's dataset the numbers once more that it has had for other samples.
        """
        generators = [*self._own]
        if torch.cuda.is_initialized():
            generators += torch.cuda.default_generators
        is_alone = not draw_beside()
        if is_alone:
            generators.append(torch.default_generator)
        self._states = [(generator.set_state, generator.get_state()) for generator in generators]
        if is_alone:
            self._note_python()
            if "numpy.random" in sys.modules:  # else nobody has drawn from it
                self._note_numpy(sys.modules["numpy.random"])

    def restore(self) -> None:
        """Restore what was noted."""
        for restore, state in self._states:
            restore(state)

    def _note_python(self) -> None:
        mark = _mark_of_python()
        if mark is None or mark != self._python[0]:
            self._python = mark, random.getstate()
        self._states.append((random.setstate, self._python[1]))

    def _note_numpy(self, numpy_random: Any) -> None:
        mark = _mark_of_numpy(numpy_random)
        # Half of a pair of normal numbers may be kept for later, which the mark does not tell.
        if mark is None or mark != self._numpy[0] or self._numpy[1]["has_gauss"]:
            self._numpy = mark, numpy_random.get_state(legacy=False)
        self._states.append((numpy_random.set_state, self._numpy[1]))


def _mark_of_python() -> tuple[bytes, float | None] | None:
    """Return what changes with every number drawn from Python's generator; None if that cannot be read."""
    readable = _python_in_memory()
    return None if readable is None else (readable[1].raw, readable[0].gauss_next)


@functools.cache
def _python_in_memory() -> tuple[Any, Any] | None:
    """Return CPython's generator and its memory; None where that does not agree with its own answer."""
    generator = getattr(random, "_inst", None)
    size = getattr(type(generator), "__basicsize__", 0)
    if sys.implementation.name != "cpython" or size < _HEADER_BYTES + _STATE_BYTES:
        return None
    if not hasattr(generator, "gauss_next"):
        return None
    memory = _memory_at(id(generator) + _HEADER_BYTES)
    found = struct.unpack(f"{_N_WORDS + 1}I", memory.raw)
    return (generator, memory) if random.getstate()[1] == (*found[1:], found[0]) else None


def _mark_of_numpy(numpy_random: Any) -> bytes | None:
    """Return what changes with every number drawn from NumPy's global generator; None if it is another."""
    if not hasattr(numpy_random, "get_bit_generator"):  # before NumPy 1.24
        return None
    memory = _numpy_in_memory(numpy_random.get_bit_generator())
    return None if memory is None else bytes(memory.raw)


@functools.lru_cache(maxsize=1)
def _numpy_in_memory(generator: Any) -> Any:
    is_known = type(generator).__name__ == "MT19937"
    return _memory_at(generator.ctypes.state_address) if is_known else None


def _memory_at(address: int) -> Any:
    return (ctypes.c_char * _STATE_BYTES).from_address(address)
