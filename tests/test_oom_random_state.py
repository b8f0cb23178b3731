"""The state of all sources of random numbers, noted and restored."""

import random
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchfast._oom import random_state
from torchfast._oom.random_state import RandomState

numpy_random: Any = np.random  # its stubs leave out the choice of a bit generator
DRAWS = {
    "torch": lambda: torch.rand(1).item(),
    "python": random.random,
    "python normal": lambda: random.gauss(0, 1),
    "numpy": np.random.rand,
    "numpy normal": np.random.randn,
}


@given(st.lists(st.sampled_from(list(DRAWS)), max_size=8), st.lists(st.sampled_from(list(DRAWS)), max_size=8))
def test_draws_repeat(before: list[str], step: list[str]) -> None:
    """Whatever was drawn before, and whatever a step draws, it draws the same once more after a restore."""
    state = RandomState(())
    state.note()
    for draws in (before, step):
        for name in draws:
            DRAWS[name]()
        state.note()
        first = [DRAWS[name]() for name in step]
        state.restore()
        assert [DRAWS[name]() for name in step] == first


def test_generators_of_the_user() -> None:
    """A generator that was given comes back too."""
    generator = torch.Generator().manual_seed(3)
    state = RandomState((generator,))
    state.note()
    first = torch.rand(2, generator=generator)
    state.restore()
    assert torch.equal(torch.rand(2, generator=generator), first)


def test_numpy_is_read_only_when_it_was_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its state, slow to read, is read again only where the words have changed."""
    np.random.seed(0)  # noqa: NPY002 -- the global state is what this is about
    n_reads = 0
    get_state = numpy_random.get_state

    def counted(*, legacy: bool) -> object:
        nonlocal n_reads
        n_reads += 1
        return get_state(legacy=legacy)

    monkeypatch.setattr(np.random, "get_state", counted)
    state = RandomState(())
    for _ in range(3):
        state.note()
    np.random.rand()  # noqa: NPY002 -- as above
    for _ in range(3):
        state.note()
    assert n_reads == 2


def test_words_are_where_numpy_says() -> None:
    """The words read from memory are those of NumPy's own reading."""
    np.random.seed(7)  # noqa: NPY002 -- as above
    np.random.rand()  # noqa: NPY002 -- as above
    words = random_state._words(np.random)
    state = numpy_random.get_state(legacy=False)["state"]
    assert words == state["key"].tobytes() + np.int32(state["pos"]).tobytes()


def test_other_generators_of_numpy() -> None:
    """Another generator in place of NumPy's default one is read every time, and comes back."""
    bit_generator = numpy_random.get_bit_generator()
    numpy_random.set_bit_generator(np.random.PCG64(3))
    try:
        assert random_state._words(np.random) is None
        state = RandomState(())
        state.note()
        first = np.random.rand()  # noqa: NPY002 -- as above
        state.restore()
        assert np.random.rand() == first  # noqa: NPY002 -- as above
    finally:
        numpy_random.set_bit_generator(bit_generator)


def test_numpy_is_not_imported_for_this(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody has loaded NumPy's generators, there is nothing to note of them."""
    monkeypatch.delitem(sys.modules, "numpy.random")
    state = RandomState(())
    state.note()
    assert len(state._states) == 2 + len(torch.cuda.default_generators)
