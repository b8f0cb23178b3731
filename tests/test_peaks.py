"""The ledger over PyTorch's one peak register, against a simulated allocator that knows every true peak."""

import os
import signal
import threading
from typing import TypedDict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.fake_gpu import FakeAllocator
from torchfast._memory import AllocatorStats, PeakLedger, PeakScope, ledger_of, peak_scope

CPU = torch.device("cpu")


def new() -> tuple[FakeAllocator, PeakLedger]:
    """Return an allocator and the ledger over its register."""
    fake = FakeAllocator()
    return fake, PeakLedger(fake.read, fake.read_and_reset)


def test_nested_scopes_have_their_own_exact_peaks() -> None:
    """An inner scope's reset costs the outer one nothing, and what went before counts for neither."""
    fake, ledger = new()
    fake.allocate(1000)
    fake.allocate(-900)
    with PeakScope(ledger) as outer:
        fake.allocate(400)
        fake.allocate(-400)
        with PeakScope(ledger) as inner:
            fake.allocate(50)
        assert inner.peak_allocated_bytes == 150
        assert outer.peak_allocated_bytes == 500
        fake.allocate(600)
    assert inner.peak_allocated_bytes == 150
    assert outer.peak_allocated_bytes == 750
    assert outer.peak_reserved_bytes == 1500
    assert outer.peak_requested_bytes == 750
    assert not outer.is_lower_bound


class Step(TypedDict):
    """One thing that happens: memory changes, a scope is opened, or the open one at an index is closed."""

    kind: str
    number: int


steps = st.lists(
    st.one_of(
        st.builds(Step, kind=st.just("allocate"), number=st.integers(-500, 500)),
        st.builds(Step, kind=st.sampled_from(["open", "close", "read"]), number=st.integers(0, 5)),
    ),
    max_size=60,
)


@given(steps)
def test_any_interleaving_of_scopes_is_exact(history: list[Step]) -> None:
    """However scopes open, close and overlap, each one's peak is the highest value within it, so far too."""
    fake, ledger = new()
    open_scopes: list[tuple[PeakScope, list[int]]] = []
    for step in history:
        if step["kind"] == "allocate":
            fake.allocate(step["number"])
        elif step["kind"] == "open":
            open_scopes.append((PeakScope(ledger).__enter__(), []))
        elif step["kind"] == "read":
            ledger.read()
        elif open_scopes:
            scope, seen = open_scopes.pop(step["number"] % len(open_scopes))
            scope.__exit__(None, None, None)
            assert scope.peak_allocated_bytes == max([*seen, fake.current])
        for _, seen in open_scopes:
            seen.append(fake.current)
    for scope, seen in open_scopes:
        assert scope.peak_allocated_bytes == max([*seen, fake.current])
        assert not scope.is_lower_bound


def test_register_is_left_alone_while_no_scope_is_open() -> None:
    """Reading resets nothing; one opening resets once, closing never."""
    fake, ledger = new()
    ledger.read()
    assert fake.n_resets == 0
    with PeakScope(ledger), PeakScope(ledger):
        pass
    assert fake.n_resets == 2


def test_foreign_reset_makes_the_peak_a_lower_bound() -> None:
    """A register that fell was reset by somebody else: what was read before counts, and the scope says so."""
    fake, ledger = new()
    with PeakScope(ledger) as scope:
        fake.allocate(300)
        fake.allocate(-300)
        ledger.read()
        fake.reset()
        fake.allocate(100)
    assert scope.peak_allocated_bytes == 300
    assert scope.is_lower_bound
    with PeakScope(ledger) as later:
        fake.allocate(10)
    assert not later.is_lower_bound


def test_a_reset_that_only_another_peak_betrays() -> None:
    """A reset after which the allocated bytes rise past their peak still shows in a peak that fell."""
    fake, ledger = new()
    with PeakScope(ledger) as scope:
        stats = fake.read()
        assert stats is not None
        ledger._read = lambda: stats._replace(peak_allocated_bytes=10, peak_inactive_split_bytes=9)
        ledger.read()
        ledger._read = lambda: stats._replace(peak_allocated_bytes=20, peak_inactive_split_bytes=8)
    assert scope.is_lower_bound
    assert scope.peak_allocated_bytes == 20


def test_what_comes_and_goes_while_a_scope_opens_is_not_missed_silently() -> None:
    """What is taken and returned between reading and resetting may be the peak: the open scopes say so."""
    fake, ledger = new()
    read = fake.read

    def read_late() -> AllocatorStats | None:
        stats = read()
        fake.allocate(taken)
        fake.allocate(-taken)
        fake.reset()
        return stats

    ledger._read_and_reset = read_late
    taken = 0
    with PeakScope(ledger) as outer:
        fake.allocate(500)
        fake.allocate(-500)
        taken = 100
        with PeakScope(ledger) as harmless:
            pass
        was_lower_bound = outer.is_lower_bound
        taken = 900
        with PeakScope(ledger) as inner:
            fake.allocate(10)
    assert (was_lower_bound, outer.is_lower_bound) == (False, True)
    assert outer.peak_allocated_bytes == 500
    assert not inner.is_lower_bound
    assert not harmless.is_lower_bound
    assert inner.peak_allocated_bytes == 10


def test_foreign_reset_that_cannot_be_noticed() -> None:
    """A foreign reset between two readings, after which memory grows past the last one, goes unnoticed."""
    fake, ledger = new()
    with PeakScope(ledger) as scope:
        fake.allocate(300)
        fake.allocate(-300)
        fake.reset()
        fake.allocate(100)
    assert scope.peak_allocated_bytes == 100
    assert not scope.is_lower_bound


def test_own_resets_are_not_taken_for_foreign_ones() -> None:
    """A scope that opens after memory fell resets the register to a lower value: that is no foreign reset."""
    fake, ledger = new()
    with PeakScope(ledger) as outer:
        fake.allocate(300)
        ledger.read()
        fake.allocate(-300)
        with PeakScope(ledger):
            pass
    assert not outer.is_lower_bound


def test_scope_opened_before_cuda_is_initialised() -> None:
    """The register is empty until CUDA is initialised: the scope needs no reset and is exact."""
    fake, ledger = new()
    fake.is_initialized = False
    with PeakScope(ledger) as scope:
        before = scope.peak_allocated_bytes
        fake.is_initialized = True
        fake.allocate(70)
        fake.allocate(-70)
    assert (before, scope.peak_allocated_bytes) == (None, 70)
    assert fake.n_resets == 0


def test_a_scope_that_fails_is_closed() -> None:
    """An exception in the block closes the scope, and its peak stays readable."""
    fake, ledger = new()

    def fail() -> None:
        fake.allocate(5)
        raise RuntimeError("boom")

    scope = PeakScope(ledger)
    with pytest.raises(RuntimeError, match="boom"), scope:
        fail()
    fake.allocate(100)
    assert scope.peak_allocated_bytes == 5
    assert ledger._scopes == []


def test_scopes_of_many_threads() -> None:
    """Scopes opened and closed by several threads at once leave the ledger clean and each at its own peak."""
    fake, ledger = new()
    fake.allocate(10)
    peaks: list[int | None] = []

    def work() -> None:
        for _ in range(200):
            with PeakScope(ledger) as scope:
                ledger.read()
            peaks.append(scope.peak_allocated_bytes)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert peaks == [10] * 800
    assert ledger._scopes == []


def test_one_ledger_a_device() -> None:
    """Everybody who asks for a device's ledger gets the same one."""
    assert ledger_of(CPU) is ledger_of(CPU)


def test_a_cpu_has_no_register() -> None:
    """On a CPU a scope opens and closes, and its peaks are None, not zero."""
    with peak_scope(CPU) as scope:
        pass
    assert (scope.peak_allocated_bytes, scope.peak_reserved_bytes) == (None, None)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # forking beside threads is the point
def test_a_fork_while_the_ledger_is_read_leaves_the_child_free() -> None:
    """A DataLoader worker forked while another thread holds the ledger's lock can use the ledger."""
    ledger = ledger_of(CPU)
    is_held, may_end = threading.Event(), threading.Event()

    def hold() -> None:
        with ledger._lock:
            is_held.set()
            may_end.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    is_held.wait()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(5)  # what hangs is killed
        ledger.read()
        os._exit(7)
    may_end.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
