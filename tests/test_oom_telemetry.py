"""The batch size that follows from what steps needed."""

from typing import Self

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchfast import inject_oom, oom_guard
from torchfast._bytes import GIB, MIB
from torchfast._memory import AllocatorStats
from torchfast._oom import telemetry
from torchfast._oom.telemetry import Situation, StepLog, round_down, suggest

FULL = Situation(allocated_bytes=15 * GIB, usable_bytes=16 * GIB)


def log_of(*steps: tuple[int, int, int]) -> StepLog:
    """Return the log of steps that worked: samples, bytes before, bytes at the peak."""
    log = StepLog()
    for n_samples, base_bytes, peak_bytes in steps:
        log.worked(n_samples, base_bytes, peak_bytes)
    return log


def test_one_size_gives_base_and_slope() -> None:
    """From one batch size the base is what was held before the step."""
    assert log_of((8, GIB, 3 * GIB)).fit() == (GIB, GIB / 4)


def test_several_sizes_give_the_line_through_their_peaks() -> None:
    """From several sizes the base includes what a step needs whatever its size."""
    base, per_sample = log_of((8, GIB, 3 * GIB), (16, GIB, 4 * GIB), (24, GIB, 5 * GIB)).fit() or (0, 0)
    assert (base, per_sample) == (2 * GIB, GIB / 8)


def test_suggestion_from_steps() -> None:
    """The suggestion is what fits into 95 % of what can be used, rounded down."""
    suggestion = suggest(log_of((8, GIB, 3 * GIB)), 128, GIB, FULL, GIB)
    assert suggestion.batch_size == 56  # (0.95 * 16 - 1) / 0.25 = 56.8
    assert suggestion.reason == (
        "the steps that worked needed 1.00 GiB + 256 MiB a sample, and 16.0 GiB can be used."
    )


def test_suggestion_without_steps() -> None:
    """Before any step has worked: what the failed one had come to bounds the size, and half is tried."""
    cramped = suggest(StepLog(), 64, GIB, Situation(4 * GIB, 5 * GIB), 12 * GIB)
    assert cramped.batch_size == 16  # 64 * (0.95 * 5 - 1) / (16 - 1)
    assert cramped.reason == "the step had come to 16.0 GiB, and 5.00 GiB can be used."
    nearly = suggest(StepLog(), 64, GIB, FULL, GIB)
    assert (nearly.batch_size, nearly.reason) == (32, "half of 64, as no step has worked yet.")


def test_no_size_will_do() -> None:
    """Where not one sample fits, or the batch is one sample, no size is suggested, with the reason."""
    heavy = suggest(log_of((2, 15 * GIB, 16 * GIB)), 4, None, Situation(15 * GIB, 15 * GIB), None)
    assert (heavy.batch_size, heavy.reason) == (
        None,
        "Not one sample fits beside the 15.0 GiB held between steps.",
    )
    assert suggest(StepLog(), 1, None, FULL, None).reason == "The batch cannot get smaller."
    assert suggest(StepLog(), None, None, FULL, None).reason == "Try a smaller batch."


def test_size_that_worked_before_is_not_trusted_again() -> None:
    """Where the steps say that the failed size fits, a quarter less is tried."""
    suggestion = suggest(log_of((32, GIB, 2 * GIB)), 32, GIB, FULL, GIB)
    assert suggestion.batch_size == 24
    assert "something else took the memory" in suggestion.reason


sizes = st.integers(0, 2**40)


@given(
    st.integers(2, 10**6),
    sizes,
    sizes,
    sizes,
    sizes,
    st.lists(st.tuples(st.integers(1, 10**6), sizes, sizes)),
)
def test_suggestion_is_always_smaller(  # noqa: PLR0913, PLR0917 -- what a situation is made of
    n_samples: int, held: int, allocated: int, usable: int, requested: int, steps: list[tuple[int, int, int]]
) -> None:
    """Whatever was observed, the suggestion is at least 1 and less than what failed, or there is none."""
    suggestion = suggest(log_of(*steps), n_samples, held, Situation(allocated, usable), requested)
    assert suggestion.batch_size is None or 1 <= suggestion.batch_size < n_samples


@pytest.mark.parametrize(
    ("n", "rounded"), [(1, 1), (7, 7), (8, 8), (13, 8), (255, 248), (256, 256), (300, 288)]
)
def test_rounding(n: int, rounded: int) -> None:
    """Sizes are rounded down to multiples of 8, large ones to multiples of 32."""
    assert round_down(n) == rounded


def test_log_is_bounded() -> None:
    """A loop with ever new batch sizes does not make the log grow for ever."""
    log = log_of(*[(n, 0, n * MIB) for n in range(1, 1000)])
    assert len(log._needs) == 64
    assert log.fit() == pytest.approx((0, MIB))


class Register:
    """A peak that is what was worked on at once."""

    n_samples = 0
    start = end = AllocatorStats(*[0] * len(AllocatorStats._fields))

    def __init__(self, _: torch.device) -> None:
        Register.n_samples = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to put back."""

    @property
    def peak_allocated_bytes(self) -> int:
        """A KiB for each sample."""
        return self.n_samples * 1024


def test_only_steps_that_were_one_pass_tell_what_a_batch_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peak of a try that failed, or of parts, is not that of so many samples."""
    told = list[tuple[int, int, int]]()
    monkeypatch.setattr(telemetry, "peak_scope", Register)
    monkeypatch.setattr(StepLog, "worked", lambda _, *step: told.append(step))
    model, guard = torch.nn.Linear(4, 1), oom_guard()
    retry = guard.retry(model=model)
    with guard, inject_oom(above=16, times=None):
        for batch in guard.steps([torch.ones(n, 4) for n in (8, 64, 64, 16)]):
            for attempt in retry.attempts(batch):
                with attempt:
                    for part, weight in attempt:
                        Register.n_samples = max(Register.n_samples, len(part))
                        (model(part).mean() * weight).backward()
    assert told == [(n, 0, n * 1024) for n in (8, 16)]


def test_steps_of_a_decorated_function_are_known() -> None:
    """It has the outer guard only, and loops over the steps of that."""
    guard = oom_guard(reraise=False)

    @guard
    def train() -> None:
        for batch in guard.steps([torch.zeros(64, 3)]):
            small = torch.zeros(7)
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate 2.00 GiB. {small} {batch}")

    train()
    assert guard.report is not None
    assert (guard.report.batch_size, guard.report.batch_size_source) == (64, "steps")


def test_steps_on_a_cpu_know_their_size_only() -> None:
    """Without an allocator to ask, a step is noted as running and leaves no peak behind."""
    log = StepLog()
    with log.step(12, torch.device("cpu")):
        assert log.batch_size == 12
    assert (log.fit(), log.growth_bytes) == (None, 0)
