"""The state of all sources of random numbers, noted and restored."""

import random
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchfast import _holders
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


@pytest.mark.parametrize(
    ("module", "name", "draw"),
    [(random, "getstate", random.random), (numpy_random, "get_state", np.random.rand)],
)
def test_slow_states_are_read_only_when_used(
    monkeypatch: pytest.MonkeyPatch, module: Any, name: str, draw: Callable[[], float]
) -> None:
    """What is slow to read is read again only where numbers were drawn."""
    module.seed(0)
    get_state = getattr(module, name)
    n_reads = 0

    def counted(**options: bool) -> Any:
        nonlocal n_reads
        n_reads += 1
        return get_state(**options)

    state = RandomState(())
    monkeypatch.setattr(module, name, counted)
    for _ in range(3):
        state.note()
    draw()
    for _ in range(3):
        state.note()
    assert n_reads == 2


def draw() -> float:
    """Draw from Python's generator."""
    return DRAWS["python"]()


def test_words_are_where_python_keeps_them() -> None:
    """CPython's generator lies in memory as expected, and what is read there changes with every number."""
    random_state._python_in_memory.cache_clear()
    assert random_state._python_in_memory() is not None
    mark = random_state._mark_of_python()
    draw()
    assert random_state._mark_of_python() != mark


def test_words_that_are_not_where_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the memory does not agree with Python's own answer, its state is read each time."""
    random_state._python_in_memory.cache_clear()
    monkeypatch.setattr(random_state, "_HEADER_BYTES", random_state._HEADER_BYTES - 4)
    try:
        assert random_state._python_in_memory() is None
        state = RandomState(())
        state.note()
        first = draw()
        state.restore()
        assert draw() == first
    finally:
        random_state._python_in_memory.cache_clear()


def test_words_are_where_numpy_says() -> None:
    """The words read from memory are those of NumPy's own reading."""
    numpy_random.seed(7)
    numpy_random.rand()
    mark = random_state._mark_of_numpy(numpy_random)
    state = numpy_random.get_state(legacy=False)["state"]
    assert mark == state["key"].tobytes() + np.int32(state["pos"]).tobytes()


def test_other_generators_of_numpy() -> None:
    """Another generator in place of NumPy's default one is read every time, and comes back."""
    bit_generator = numpy_random.get_bit_generator()
    numpy_random.set_bit_generator(np.random.PCG64(3))
    try:
        assert random_state._mark_of_numpy(numpy_random) is None
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


def test_numbers_that_a_loader_draws_are_drawn_once() -> None:
    """While a loader's thread draws from the process's generators, these are not put back; others are."""

    class Loader:
        draws_beside = True

        def release_memory(self) -> None:
            pass

    loader = Loader()
    _holders.register(loader)
    own = torch.Generator().manual_seed(1)
    state = RandomState((own,))
    for loader.draws_beside in (True, False):
        state.note()
        first = [*(DRAWS[name]() for name in DRAWS), torch.rand(1, generator=own).item()]
        state.restore()
        again = [*(DRAWS[name]() for name in DRAWS), torch.rand(1, generator=own).item()]
        same = [one == other for one, other in zip(first, again, strict=True)]
        assert same == [not loader.draws_beside] * len(DRAWS) + [True]
