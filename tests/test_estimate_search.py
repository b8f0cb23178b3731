"""Decisions: whether a step fits, the largest batch that does, what would save how much."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import traces
from torchfast._bytes import GIB, MIB
from torchfast._estimate.events import Event, Note, Trace
from torchfast._estimate.gpus import GPU, resolve_gpu
from torchfast._estimate.replay import fits_in
from torchfast._estimate.report import Subject, estimate_of
from torchfast._estimate.search import Fitted
from torchfast._estimate.settings import AllocatorSettings

PLAIN = AllocatorSettings()


def runs(batch_size: int, limit_bytes: int) -> bool:
    """Say whether the made-up step runs with that batch."""
    trace = traces.training(batch_size)
    return fits_in(trace.events, PLAIN, limit_bytes, trace.optional)


def up_to_the_first_failure(limit_bytes: int) -> int:
    """Return the last batch size before the first that does not fit; a larger one may fit again."""
    size = 0
    while runs(size + 1, limit_bytes):
        size += 1
    return size


@given(limit=st.integers(20 * MIB, 400 * MIB))
def test_the_largest_batch_is_the_largest(limit: int) -> None:
    """The search finds a size that fits, and no less than trying one size after the other does, or 1 %."""
    found = traces.estimate().max_batch_size(limit_bytes=limit)
    assert found.batch_size == 0 or runs(found.batch_size, limit)
    truth = up_to_the_first_failure(limit)
    assert found.batch_size >= truth - max(truth // 100, 1)
    assert found.n_traces <= 8


def test_a_batch_size_is_confirmed_by_a_trace_of_its_own() -> None:
    """The answer is among the sizes that were traced and found to fit."""
    found = traces.estimate().max_batch_size(limit_bytes=2 * GIB)
    assert (found.batch_size, True) in found.tried
    assert int(found) == found.batch_size
    assert repr(found) == f"<BatchSize: batch size {found.batch_size} under 2.00 GiB>"


def test_not_even_one_sample() -> None:
    """A limit below the weights gives zero, not an error."""
    assert traces.estimate().max_batch_size(limit_bytes=4 * MIB).batch_size == 0


def test_streams_that_change_with_the_batch_are_searched_by_traces() -> None:
    """Where another batch runs other operators nothing is fitted, and the search still ends within 3 %."""

    def retrace(
        *, batch_size: int | None = None, gpu: GPU | None = None, variant: str | None = None
    ) -> Trace:
        del gpu, variant
        trace = traces.training(batch_size or 8)
        extra = [Event(10**6 + i, MIB, 0) for i in range(batch_size or 8)]
        return dataclasses.replace(trace, events=[*extra, *trace.events], optional=frozenset())

    e = dataclasses.replace(traces.estimate(), _trace=retrace(), _retrace=retrace)
    found = e.max_batch_size(limit_bytes=600 * MIB)
    assert fits_in(retrace(batch_size=found.batch_size).events, PLAIN, 600 * MIB)
    fails = next(n for n in range(1, 600) if not fits_in(retrace(batch_size=n).events, PLAIN, 600 * MIB))
    assert found.batch_size >= 0.97 * (fails - 1)
    assert found.n_traces <= 8


def test_scratch_that_comes_with_the_batch_is_no_other_stream() -> None:
    """Kernels that split their work take scratch at some sizes only: the rest is fitted as ever."""

    def with_scratch(batch_size: int) -> Trace:
        trace = traces.training(batch_size)
        notes = [*trace.notes, Note("step 1 forward", "", "aten.sum", "workspace")]
        scratch = [Event(10**6, batch_size * MIB, len(trace.notes)), Event(10**6, 0, len(trace.notes))]
        return dataclasses.replace(trace, notes=notes, events=[*scratch, *trace.events])

    fitted = Fitted.over(8, traces.training(8), 16, with_scratch(16))
    assert fitted is not None
    assert fitted.events(24) == with_scratch(24).events


@given(a=st.integers(1, 40), b=st.integers(41, 80), wanted=st.integers(1, 200))
def test_sizes_between_traces_are_affine(a: int, b: int, wanted: int) -> None:
    """Two traces of a step whose sizes are affine in the batch give every other one exactly."""
    fitted = Fitted.over(a, traces.training(a), b, traces.training(b))
    assert fitted is not None
    assert fitted.events(wanted) == traces.training(wanted).events


def test_fits_is_decided_by_replay() -> None:
    """A step fits under a limit below its peak as long as giving back cached memory saves it."""
    growing = [Event(0, 60 * MIB, 0), Event(0, 0, 0), Event(1, 80 * MIB, 0)]
    e = estimate_of(
        Trace(growing, [Note("step 1 forward", "", "", "activations")]),
        gpu=resolve_gpu("T4"),
        subject=Subject("Made"),
    )
    roomy, tight = e.fits(), e.fits(limit_bytes=100 * MIB)
    assert e.peak_reserved_bytes == 140 * MIB
    assert roomy
    assert repr(roomy) == "<Fit: fits on T4 with 14.2 GiB to spare>"
    assert tight
    assert tight.n_retries > 0
    assert "cached memory is given back" in str(tight)


def test_cudnn_does_without_a_workspace_that_it_cannot_get() -> None:
    """A workspace for which there is no memory is left out; any other block is not."""
    note = Note("step 1 forward", "conv", "aten.convolution", "workspace")
    events = [Event(0, 40 * MIB, 0), Event(1, 90 * MIB, 0), Event(1, 0, 0), Event(2, 20 * MIB, 0)]
    subject, gpu = Subject("Made"), resolve_gpu("T4")
    strict = estimate_of(Trace(events, [note]), gpu=gpu, subject=subject)
    lenient = estimate_of(Trace(events, [note], optional=frozenset({1})), gpu=gpu, subject=subject)
    assert not strict.fits(limit_bytes=100 * MIB)
    assert lenient.fits(limit_bytes=100 * MIB)
    assert lenient.fits(limit_bytes=100 * MIB).peak_reserved_bytes == 60 * MIB
    assert fits_in(events, PLAIN, 100 * MIB, {1})
    assert not fits_in(events, PLAIN, 100 * MIB)


def test_what_does_not_fit_says_where() -> None:
    """A failed fit names the phase, the module and the bytes that were wanted."""
    no = traces.estimate(64).fits(limit_bytes=100 * MIB)
    assert not no
    assert no.where == "step 1 forward, layers.1, aten.addmm"
    assert no.wanted_bytes == 64 * 700 * 1024 + 64
    assert "does not fit on H200: 43.8 MiB more is asked for in step 1 forward" in str(no)


def test_another_gpu_is_traced_again() -> None:
    """Asked about a GPU that runs other kernels, the step is traced for that one."""
    asked: list[GPU | None] = []

    def retrace(
        *, batch_size: int | None = None, gpu: GPU | None = None, variant: str | None = None
    ) -> Trace:
        del batch_size, variant
        asked.append(gpu)
        return traces.training()

    e = dataclasses.replace(traces.estimate(), _retrace=retrace)
    assert e.fits("H200").gpu.name == "H200"
    assert asked == []
    assert e.fits("T4").gpu.name == "T4"
    assert [gpu.name for gpu in asked if gpu] == ["T4"]


def test_what_if() -> None:
    """Changes that make sense become rows with what they save; the others are left out."""
    e = traces.estimate()
    rows = {row.change: row for row in e.what_if()}
    assert set(rows) == {"pure bf16", "SGD", "half the batch"}
    assert rows["half the batch"].saves_bytes > 0
    assert (
        rows["half the batch"].peak_process_bytes == e.peak_process_bytes - rows["half the batch"].saves_bytes
    )
    assert rows["SGD"].saves_bytes == 0
    assert "half the batch" in repr(e.what_if()).splitlines()[1]


def test_no_batch_no_largest_batch() -> None:
    """An estimate that does not know what a sample is says so."""
    nameless = dataclasses.replace(
        traces.estimate(), subject=dataclasses.replace(traces.estimate().subject, batch_size=None)
    )
    with pytest.raises(ValueError, match="which dimension of the batch"):
        nameless.max_batch_size()
