"""A step that ran out of memory at any of its operators and was tried again is the step that did not fail."""

import os

import pytest
import torch

from tests import oom_faults as faults
from torchfast import OutOfMemoryError, inject_oom

pytestmark = pytest.mark.usefixtures("quick_collections")
# One operator in so many, in the default run; benchmarks/oom_guard.py runs them all.
STRIDE = int(os.environ.get("TORCHFAST_FAULT_STRIDE", "17"))


@pytest.mark.parametrize("name", faults.TRAININGS)
def test_guard_alone_changes_nothing(name: str) -> None:
    """Without a fault, a training under a retry is bit for bit the bare one."""
    assert faults.differences(faults.run_guarded(name, inject_oom(times=0)), faults.run_bare(name)) == 0


@pytest.mark.parametrize("name", faults.TRAININGS)
def test_fault_at_any_operator_is_undone(name: str) -> None:
    """With a copy, a fault anywhere in the step, its optimizer's included, leaves no trace."""
    expected = faults.run_bare(name)
    for at in range(hash_of(name) % STRIDE, faults.n_operators(name), STRIDE):
        injection = inject_oom(at)
        assert faults.differences(faults.run_guarded(name, injection), expected) == 0, at
        assert injection.n_failures == 1


@pytest.mark.parametrize("phase", ["forward", "backward"])
@pytest.mark.parametrize("name", faults.TRAININGS)
def test_fault_before_the_optimizer_needs_no_copy(name: str, phase: str) -> None:
    """Without a copy, a fault in the forward or the backward pass leaves no trace."""
    expected = faults.run_bare(name)
    for at in range(0, faults.n_operators(name, phase=phase), 2 * STRIDE):
        injection = inject_oom(at, phase=phase)  # type: ignore[arg-type]  # the parameters of the test
        assert faults.differences(faults.run_guarded(name, injection, copy=False), expected) == 0, at
        assert injection.n_failures == 1


@pytest.mark.parametrize("name", faults.TRAININGS)
def test_fault_in_the_optimizer_without_a_copy(name: str) -> None:
    """Without a copy, a fault in the optimizer's step either leaves no trace or is an error that says why."""
    expected = faults.run_bare(name)
    for at in range(0, faults.n_operators(name, phase="optimizer"), max(STRIDE // 4, 1)):
        try:
            state = faults.run_guarded(name, inject_oom(at, phase="optimizer"), copy=False)
        except OutOfMemoryError as error:
            assert "the optimizer had begun to change parameters" in str(error)  # noqa: PT017 -- either may happen
        else:
            assert faults.differences(state, expected) == 0, at


@pytest.mark.parametrize("name", faults.SPLITTABLE)
def test_fault_at_any_operator_of_a_large_part(name: str) -> None:
    """Where parts of more than 4 samples always fail, wherever they do, the training comes out the same."""
    counting = inject_oom(times=0, above=4)
    expected = faults.run_split(name, counting)
    for at in range(hash_of(name) % STRIDE, counting.n_operators // faults.N_STEPS, STRIDE):
        injection = inject_oom(at, above=4, times=None)
        for one, other in zip(faults.run_split(name, injection), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)
        assert injection.n_failures == 2  # whole, and whole again


def hash_of(name: str) -> int:
    """Return a number that differs from name to name, and stays the same from run to run."""
    return sum(map(ord, name))
