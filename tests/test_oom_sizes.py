"""How many samples at a time: sizes shrink while steps fail, are kept, and grow back."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from torchfast import inject_oom, oom_guard
from torchfast._memory import AllocatorStats
from torchfast._oom.sizes import Sizes
from torchfast._oom.thrash import Thrash

pytestmark = pytest.mark.usefixtures("quick_collections")


def sizes_tried(n_samples: int, above: int, retry: Any) -> list[int]:
    """Return the sizes of all attempts at a step that fails above a size."""
    tried = []
    with inject_oom(above=above, times=None):
        for attempt in retry.attempts(torch.zeros(n_samples)):
            tried.append(attempt.size)
            with attempt:
                for part, _ in attempt:
                    part + 1
    return tried


def test_same_size_first_then_ever_smaller() -> None:
    """After a failure the same size is tried once more, then halves; what fitted is kept."""
    retry = oom_guard().retry(model=nn.Linear(1, 1))
    assert sizes_tried(20, 4, retry) == [20, 20, 10, 5, 3]
    assert retry.micro_batch_size == 3
    assert sizes_tried(20, 4, retry) == [3]
    assert sizes_tried(2, 4, retry) == [2]


def test_a_fault_that_passes_costs_no_size() -> None:
    """A failure that does not come again at the same size leaves the size as it was."""
    retry, batch = oom_guard().retry(model=nn.Linear(1, 1)), torch.zeros(8)
    with inject_oom(times=1):
        tried = []
        for attempt in retry.attempts(batch):
            tried.append(attempt.size)
            with attempt:
                for part, _ in attempt:
                    part + 1
    assert (tried, retry.micro_batch_size) == ([8, 8], None)


def test_size_grows_back_after_quiet_steps() -> None:
    """After so many steps without a failure, twice the size is tried, up to the whole batch."""
    retry = oom_guard().retry(model=nn.Linear(1, 1), grow_after=2)
    assert sizes_tried(8, 2, retry) == [8, 8, 4, 2]
    assert [sizes_tried(8, 100, retry)[0] for _ in range(6)] == [2, 4, 4, 8, 8, 8]
    assert retry.micro_batch_size is None


def test_size_that_never_fits_is_tried_ever_less_often() -> None:
    """Each trial of a larger size that fails doubles the quiet steps until the next, and fails only once."""
    retry = oom_guard().retry(model=nn.Linear(1, 1), grow_after=2)
    sizes_tried(8, 2, retry)
    history = [sizes_tried(8, 2, retry) for _ in range(12)]
    trials = [index for index, tried in enumerate(history) if tried == [4, 2]]
    assert trials == [1, 5]
    assert all(tried in ([2], [4, 2]) for tried in history)


def test_small_batch_does_not_end_a_trial() -> None:
    """The last batch of an epoch, smaller than the size on trial, neither confirms that size nor counts."""
    retry = oom_guard().retry(model=nn.Linear(1, 1), grow_after=1)
    assert sizes_tried(8, 2, retry) == [8, 8, 4, 2]
    assert retry.micro_batch_size == 4  # on trial
    assert sizes_tried(1, 2, retry) == [1]
    assert sizes_tried(8, 2, retry) == [4, 2]  # fails once, as a trial does
    assert sizes_tried(1, 2, retry) == [1]
    assert [sizes_tried(8, 2, retry) for _ in range(3)] == [[2], [4, 2], [2]]


def test_small_batch_during_a_trial_is_tried_again_whole() -> None:
    """A batch that is smaller than the size before the trial has the right to a second try at its size."""
    retry = oom_guard().retry(model=nn.Linear(1, 1), grow_after=1)
    sizes_tried(8, 4, retry)
    assert retry.micro_batch_size == 8
    assert sizes_tried(3, 2, retry) == [3, 3, 2]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 64)), max_size=200), st.integers(1, 5))
def test_sizes_stay_within_bounds(steps: list[tuple[int, int]], grow_after: int) -> None:
    """Whatever fails, a size is at least 1 and at most the batch, and going down strictly decreases it."""
    sizes = Sizes(grow_after)
    for what, n_samples in steps:
        size = sizes.of(n_samples)
        assert 1 <= size <= n_samples
        if what == 0:
            assert sizes.shrink(size) == (size > 1)
        elif what == 1:
            assert sizes.add_a_part(n_samples) == (size > 1)
        else:
            sizes.worked(size)
            continue
        assert size == 1 or sizes.of(n_samples) < size


@given(st.integers(2, 1000), st.integers(1, 1000))
def test_thrash_costs_one_part_more(n_samples: int, limit: int) -> None:
    """Going down for thrash takes one part more where that makes parts smaller, else one sample less."""
    sizes = Sizes(1)
    sizes.of(n_samples)
    sizes.limit = limit
    size = sizes.of(n_samples)
    n_parts = math.ceil(n_samples / size)
    if sizes.add_a_part(n_samples):
        assert sizes.of(n_samples) == min(math.ceil(n_samples / (n_parts + 1)), size - 1)


# --- close to the limit ------------------------------------------------------------------------------------


def test_thrash_goes_down_a_size_before_the_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the allocator flushes its cache in two steps running, the guard says so and works in parts."""
    n_flushes = iter([0, 1, 2, 2, 2])
    blank = AllocatorStats(*[0] * len(AllocatorStats._fields))
    monkeypatch.setattr(
        "torchfast._oom.retry.allocator_stats", lambda _: blank._replace(n_alloc_retries=next(n_flushes))
    )
    retry = oom_guard().retry(model=nn.Linear(1, 1))
    assert sizes_tried(8, 100, retry) == [8]
    assert sizes_tried(8, 100, retry) == [8]
    with pytest.warns(UserWarning, match="in 2 steps running"):
        assert sizes_tried(8, 100, retry) == [8]
    assert sizes_tried(8, 100, retry) == [4]


def test_thrash_in_parts_goes_down_by_one_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight samples in two parts that thrash are worked on in three, not in four; the patience doubles."""
    n_flushes = iter([0, 0, 0, 1, *[2] * 6])
    blank = AllocatorStats(*[0] * len(AllocatorStats._fields))
    monkeypatch.setattr(
        "torchfast._oom.retry.allocator_stats", lambda _: blank._replace(n_alloc_retries=next(n_flushes))
    )
    retry = oom_guard().retry(model=nn.Linear(1, 1), grow_after=3)
    sizes_tried(8, 2, retry)
    assert [sizes_tried(8, 100, retry) for _ in range(3)] == [[2], [2], [4]]
    with pytest.warns(UserWarning, match="in 2 steps running"):
        assert sizes_tried(8, 100, retry) == [4]
    assert [sizes_tried(8, 100, retry) for _ in range(5)] == [[3]] * 5


def test_steps_tell_of_thrash_once() -> None:
    """A count that rises in two steps running is told once, a single rise or an old count is not."""
    thrash, device = Thrash(), torch.device("cuda", 0)
    assert [thrash.has_risen(n, device) for n in (7, 7, 8, 8, 9)] == [False] * 5
    with pytest.warns(UserWarning, match="cuda:0 is so full") as warned:
        assert [thrash.has_risen(n, device) for n in (10, 11, 12)] == [True, False, True]
    assert len(warned) == 1
