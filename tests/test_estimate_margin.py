"""The safe bound: never below the estimate, and wider where less is known."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.traces import Builder, training
from torchfast._bytes import MIB
from torchfast._estimate.events import Trace
from torchfast._estimate.gpus import Context, resolve_gpu
from torchfast._estimate.margin import safe_bytes
from torchfast._estimate.replay import peak_reserved_bytes, replay
from torchfast._estimate.report import Subject, estimate_of
from torchfast._estimate.settings import AllocatorSettings

NOTHING = Context(0, 0, "none")
SETTINGS = AllocatorSettings()


def convolutions(*sizes_mib: int, operator: str = "aten.convolution", optional: bool = True) -> Trace:
    """Return a run that keeps an output after each of some workspaces, for two steps."""
    b = Builder()
    workspaces = []
    for step in (1, 2):
        outputs = []
        for i, size_mib in enumerate(sizes_mib):
            workspaces.append(b.take(size_mib * MIB, f"step {step} forward", "workspace", f"{i}", operator))
            b.give(workspaces[-1], f"step {step} forward")
            outputs.append(b.take(30 * MIB, f"step {step} forward", "activations", f"{i}", operator))
        for output in outputs:
            b.give(output, f"step {step} backward")
    return Trace(b.events, b.notes, optional=frozenset(workspaces if optional else ()))


def bound(trace: Trace) -> int:
    """Return the bound of a run in a process without a context."""
    return safe_bytes(trace, peak_reserved_bytes(trace.events, SETTINGS), NOTHING, SETTINGS)


@given(sizes_mib=st.lists(st.integers(1, 400), min_size=1, max_size=8), optional=st.booleans())
def test_the_bound_is_never_below_the_estimate(sizes_mib: list[int], *, optional: bool) -> None:
    """Whatever the workspaces are, the bound is above what the process is expected to hold."""
    trace = convolutions(*sizes_mib, optional=optional)
    estimate = estimate_of(trace, gpu=resolve_gpu("H200"), subject=Subject("Made"))
    assert estimate.safe_bytes >= estimate.peak_process_bytes + estimate.context.spread_bytes
    assert estimate.safe_bytes >= estimate.peak_reserved_bytes * 106 // 100


@given(st.lists(st.integers(1, 400), min_size=1, max_size=8))
def test_fitted_workspaces_widen_it(sizes_mib: list[int]) -> None:
    """The same run is bounded no lower where its workspaces are known only by fit."""
    assert bound(convolutions(*sizes_mib)) >= bound(convolutions(*sizes_mib, optional=False))


def test_a_workspace_that_decides_what_is_reserved_counts_by_what_it_may_become() -> None:
    """One large fitted workspace may be nearly twice as large; one that is known may not."""
    known, fitted = bound(convolutions(400, optional=False)), bound(convolutions(400))
    assert known == 400 * MIB * 106 // 100  # the output fits into what the workspace left
    assert 1.5 * known < fitted < 2.1 * known


def test_workspaces_of_recurrent_networks_are_fitted_too() -> None:
    """CuDNN's recurrent kernels tell their workspaces no more than its convolutions do."""
    recurrent = convolutions(400, operator="aten._cudnn_rnn", optional=False)
    assert bound(recurrent) == bound(convolutions(400))


def test_nothing_fitted_leaves_the_floor() -> None:
    """A run that follows rules alone is bounded by six percent of what it reserves."""
    trace = replace(training(), unmodelled=())
    reserved = peak_reserved_bytes(trace.events, SETTINGS)
    assert safe_bytes(trace, reserved, NOTHING, SETTINGS) == reserved + reserved * 6 // 100


def test_operators_that_are_not_modelled_widen_it() -> None:
    """Where an operator ran whose scratch nobody knows, the floor is twice as high."""
    trace = replace(training(), unmodelled=())
    reserved = peak_reserved_bytes(trace.events, SETTINGS)
    unknown = replace(trace, unmodelled=("aten.strange",))
    assert safe_bytes(unknown, reserved, NOTHING, SETTINGS) == reserved + reserved * 12 // 100


@pytest.mark.parametrize(("measured", "ruled"), [("H200", "H100"), ("H100", "A100-80")])
def test_a_context_that_nobody_measured_widens_it(measured: str, ruled: str) -> None:
    """What the context may be more is part of the bound, and more on a GPU that is known less."""
    spare = []
    for name in (measured, ruled):
        estimate = estimate_of(training(), gpu=resolve_gpu(name), subject=Subject("Made"))
        spare.append(estimate.safe_bytes - estimate.peak_process_bytes)
    assert spare[0] < spare[1]


def test_the_same_run_has_the_same_bound() -> None:
    """What is drawn is drawn from fixed seeds."""
    trace = convolutions(100, 50, 200, 25)
    assert bound(trace) == bound(trace)


@given(st.integers(1, 64), st.integers(1, 3))
def test_the_short_replay_agrees_with_the_long_one(batch_size: int, n_steps: int) -> None:
    """The peak alone is that of the series."""
    events = training(batch_size, n_steps=n_steps).events
    assert peak_reserved_bytes(events, SETTINGS) == replay(events, SETTINGS).peak_reserved_bytes
