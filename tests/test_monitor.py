"""VRAMMonitor on a GPU of the imagination, whose every number is known."""

import asyncio
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest

from tests.fake_gpu import FakeGPU
from torchfast import VRAMMonitor, VRAMSample
from torchfast._memory import AllocatorStats


def test_status_is_json_and_current() -> None:
    """The status of a running training carries the VRAM of now, the peak, and the phases, as plain JSON."""
    gpu = FakeGPU()
    with gpu.monitor() as vram:
        with vram.phase("forward"):
            gpu.allocate(1000)
        gpu.allocate(-400)
        status = json.loads(json.dumps(vram.status()))
    assert status["tensors_bytes"] == 600
    assert status["used_bytes"] == 2000
    assert status["peak"]["allocated_bytes"] == 1000
    assert status["phases"]["forward"]["kept_bytes"] == 1000
    assert status["is_running"] is True
    assert status["errors"] == []


def test_nested_phases_have_exact_peaks_and_full_names() -> None:
    """A phase within another has its own peak; the run's peak is the true one all the while."""
    gpu = FakeGPU()
    gpu.allocate(100)
    with gpu.monitor() as vram:
        with vram.phase("step"):
            gpu.allocate(500)
            gpu.allocate(-500)
            with vram.phase("forward") as forward:
                gpu.allocate(50)
                assert forward.peak_allocated_bytes == 150
                assert vram.sample().phase == "step/forward"
            assert vram.peak.allocated_bytes == 600
        with vram.phase("step"):
            gpu.allocate(10)
    assert vram.sample().phase is None
    assert list(vram.phases) == ["step", "step/forward"]
    step, inner = vram.phases.values()
    assert (step.n_times, step.peak_allocated_bytes, step.kept_bytes) == (2, 600, 10)
    assert (inner.n_times, inner.peak_allocated_bytes, inner.kept_bytes) == (1, 150, 50)
    assert vram.peak.reserved_bytes == 1200


def test_phases_of_threads_do_not_nest_in_one_another() -> None:
    """A phase opened in another thread is not a part of this thread's phase."""
    gpu = FakeGPU()
    with gpu.monitor() as vram, vram.phase("main"):
        worker = threading.Thread(target=lambda: vram.phase("worker").__enter__().__exit__(None, None, None))
        worker.start()
        worker.join()
    assert list(vram.phases) == ["main", "worker"]


def test_phases_of_tasks_do_not_nest_in_one_another() -> None:
    """Of two asyncio tasks that take turns, each has its own phases, within what was open before both."""
    gpu = FakeGPU()

    async def work(name: str, turn: asyncio.Barrier) -> None:
        with vram.phase(name):
            await turn.wait()
            with vram.phase("inner"):
                await turn.wait()

    async def both() -> None:
        turn = asyncio.Barrier(2)
        with vram.phase("all"):
            await asyncio.gather(work("one", turn), work("two", turn))

    with gpu.monitor() as vram:
        asyncio.run(both())
    assert set(vram.phases) == {"all", "all/one", "all/one/inner", "all/two", "all/two/inner"}


def test_phases_of_two_monitors_do_not_nest_in_one_another() -> None:
    """A phase is a part of its own monitor's phases only."""
    gpu = FakeGPU()
    with gpu.monitor() as one, gpu.monitor() as two, one.phase("outer"), two.phase("inner"):
        pass
    assert (list(one.phases), list(two.phases)) == (["outer"], ["inner"])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # forking beside threads is the point
def test_a_fork_while_a_sample_is_taken_leaves_the_child_free() -> None:
    """A worker forked while the sampling thread holds the locks can sample, and open phases, itself."""
    gpu = FakeGPU()
    is_held, may_end = threading.Event(), threading.Event()

    def hold() -> None:
        assert vram._run is not None
        with vram._run._sample_lock, vram._run._phase_lock:
            is_held.set()
            may_end.wait()

    with gpu.monitor() as vram:
        thread = threading.Thread(target=hold)
        thread.start()
        is_held.wait()
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(5)  # what hangs is killed
            with vram.phase("child"):
                vram.sample()
            os._exit(7)
        may_end.set()
        thread.join()
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_an_exception_closes_phase_and_run() -> None:
    """An exception passes untouched, and afterwards everything is closed and readable."""
    gpu = FakeGPU()

    def fail() -> None:
        gpu.allocate(700)
        raise RuntimeError("boom")

    vram = gpu.monitor()
    with pytest.raises(RuntimeError, match="boom"), vram, vram.phase("forward"):
        fail()
    gpu.allocate(1000)
    assert not vram.is_running
    assert vram.phases["forward"].peak_allocated_bytes == vram.peak.allocated_bytes == 700
    assert gpu.ledger._scopes == []


def test_a_foreign_reset_is_said() -> None:
    """A reset by somebody else makes the peak a lower bound, in the record and in the report."""
    gpu = FakeGPU()
    with gpu.monitor() as vram:
        gpu.allocate(1000)
        gpu.allocate(-1000)
        vram.sample()
        gpu.reset()
    assert vram.peak.allocated_bytes == 1000
    assert vram.peak.is_lower_bound
    assert "or more: PyTorch's peak register was disturbed" in str(vram)
    assert "at least" in repr(vram.peak)
    assert "≥" in vram.line()


def test_two_monitors_and_a_guard_at_once() -> None:
    """Monitors that overlap share the register and each has its own true peak."""
    gpu = FakeGPU()
    one, two = gpu.monitor(), gpu.monitor()
    with one:
        gpu.allocate(900)
        gpu.allocate(-900)
        with two:
            gpu.allocate(100)
        gpu.allocate(200)
    assert (one.peak.allocated_bytes, two.peak.allocated_bytes) == (900, 100)
    assert not one.peak.is_lower_bound


def test_requested_bytes_that_the_allocator_does_not_count() -> None:
    """The cudaMallocAsync allocator says that 0 bytes were requested while it has handed out many."""
    gpu = FakeGPU()
    counted = gpu.read

    def read() -> AllocatorStats | None:
        stats = counted()
        return None if stats is None else stats._replace(requested_bytes=0, peak_requested_bytes=0)

    gpu.ledger._read = read
    with gpu.monitor() as vram:
        gpu.allocate(70)
    assert (vram.peak.allocated_bytes, vram.peak.requested_bytes) == (70, None)


def test_a_phase_adds_up_over_its_times() -> None:
    """Times, seconds and the doubt about a peak are summed over all the times a phase was open."""
    gpu = FakeGPU()
    with gpu.monitor() as vram:
        for is_disturbed in (True, False):
            with vram.phase("forward"):
                gpu.now_s += 2
                gpu.allocate(100)
                gpu.allocate(-100)
                vram.sample()
                if is_disturbed:
                    gpu.reset()
            assert vram.sample().phase is None
    assert vram.phases["forward"].total_s == 4
    assert vram.phases["forward"].n_times == 2
    assert vram.phases["forward"].is_lower_bound
    assert "≥ 100 B" in str(vram)


def test_a_second_run_starts_afresh() -> None:
    """A monitor can be entered again after it was left; the second run knows nothing of the first."""
    gpu = FakeGPU()
    vram = gpu.monitor()
    with vram, vram.phase("first"):
        gpu.allocate(900)
        gpu.allocate(-900)
    with vram, vram.phase("second"):
        gpu.allocate(100)
    assert vram.peak.allocated_bytes == 100
    assert list(vram.phases) == ["second"]


def test_errors_of_an_earlier_run_are_not_reported_again() -> None:
    """A run that went well says nothing of an earlier one's errors."""
    gpu = FakeGPU()
    gpu.driver_error = OSError("driver gone")
    vram = gpu.monitor().__enter__()
    with pytest.warns(RuntimeWarning, match="driver gone"):
        vram.__exit__(None, None, None)
    gpu.driver_error = None
    with vram:
        assert vram.errors == ()


def test_a_finished_run_stays_as_it_was() -> None:
    """Looking again after the block shows the memory of now, and leaves the run's history and peaks alone."""
    gpu = FakeGPU()
    with gpu.monitor() as vram:
        gpu.allocate(100)
    before = vram.history
    gpu.allocate(5000)
    assert vram.status()["tensors_bytes"] == 5100
    assert vram.history == before
    assert vram.peak.allocated_bytes == 100
    assert vram.latest is not None
    assert vram.latest.tensors_bytes == 100


def test_before_the_first_run() -> None:
    """A monitor that has not run knows no peak, and still samples when asked."""
    gpu = FakeGPU()
    gpu.allocate(5)
    vram = gpu.monitor()
    assert vram.peak.allocated_bytes is None
    assert (vram.latest, vram.history, dict(vram.phases)) == (None, (), {})
    assert vram.status()["tensors_bytes"] == 5
    assert "no sample yet" in str(vram)


def test_the_thread_samples_and_ends() -> None:
    """With an interval, samples arrive without anybody asking, and the thread is gone after the block."""
    gpu = FakeGPU()
    arrived = threading.Event()
    read = gpu.read

    def counting() -> Any:
        if threading.current_thread().name == "torchfast-vram-monitor":
            arrived.set()
        return read()

    gpu.ledger._read = counting
    with gpu.monitor(interval_s=0.001) as vram:
        assert arrived.wait(30)
    assert len(vram.history) >= 1
    assert "torchfast-vram-monitor" not in {thread.name for thread in threading.enumerate()}


def test_a_dropped_monitor_ends_its_thread() -> None:
    """A monitor that is dropped without being left is collected, and its thread and scope with it."""
    gpu = FakeGPU()
    vram = gpu.monitor(interval_s=0.001).__enter__()
    gone = weakref.ref(vram)
    del vram
    gc.collect()
    assert gone() is None
    assert "torchfast-vram-monitor" not in {thread.name for thread in threading.enumerate()}
    assert gpu.ledger._scopes == []


def test_the_interpreter_exits_cleanly_while_a_monitor_runs() -> None:
    """A program that ends inside the block, by any way, ends at once and quietly."""
    enter = "torchfast.VRAMMonitor('cpu', interval_s=0.001).__enter__()"
    program = f"import torchfast\nvram = {enter}\nraise SystemExit(3)"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (3, "", "")


def test_an_error_in_a_source_is_reported_and_the_rest_goes_on() -> None:
    """A driver that fails makes its numbers None with the reason; the end of the block warns about it."""
    gpu = FakeGPU()
    gpu.driver_error = OSError("driver gone")
    vram = gpu.monitor().__enter__()
    gpu.allocate(70)
    sample = vram.sample()
    with pytest.warns(RuntimeWarning, match="driver gone"):
        vram.__exit__(None, None, None)
    assert (sample.total_bytes, sample.tensors_bytes) == (None, 70)
    assert sample.sources["free"] == "not known: reading it failed with OSError: driver gone"
    assert vram.errors[-1] == "driver: OSError: driver gone"
    assert vram.peak.allocated_bytes == 70


def test_errors_of_the_monitor_do_not_hide_those_of_the_block() -> None:
    """Where warnings are errors, the block's own exception still is the one that comes out."""
    gpu = FakeGPU()
    gpu.driver_error = OSError("driver gone")
    with pytest.raises(KeyError, match="mine"), gpu.monitor():
        raise KeyError("mine")


def test_a_thread_that_dies_is_reported() -> None:
    """An error that is nobody's source ends the sampling, and the end of the block says so."""
    gpu = FakeGPU()
    vram = gpu.monitor(interval_s=0.001)
    died = threading.Event()

    def sample(*_: object, fresh: bool, **__: object) -> VRAMSample:
        if fresh:
            return real(vram._clock, 0.0, None, fresh=True)
        died.set()
        raise ArithmeticError("a bug")

    real = vram._probe.sample
    vram._probe.sample = sample  # type: ignore[method-assign]  # a bug is put in
    with pytest.warns(RuntimeWarning, match="ended with ArithmeticError: a bug"), vram:
        assert died.wait(30)


def test_a_driver_that_hangs_does_not_stop_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a reading hangs, phases go on; the end waits for it a bounded time, and reports it."""
    monkeypatch.setattr("torchfast._monitor.run._JOIN_S", 0.01)
    gpu = FakeGPU()
    hanging, released = threading.Event(), threading.Event()
    clock = gpu.clock

    def hang() -> float:
        if threading.current_thread().name == "torchfast-vram-monitor":
            hanging.set()
            assert released.wait(60)
        return clock()

    vram = gpu.monitor(interval_s=0.001, _clock=hang).__enter__()
    assert hanging.wait(30)
    with vram.phase("forward") as forward:
        gpu.allocate(100)
    with pytest.warns(RuntimeWarning, match="hangs in a reading"):
        vram.__exit__(None, None, None)
    released.set()
    assert forward.peak_allocated_bytes == vram.peak.allocated_bytes == 100


def test_a_monitor_that_is_collected_by_its_own_thread() -> None:
    """The garbage collector may drop a monitor while its thread runs: the thread does not wait for itself."""
    gpu = FakeGPU()
    closed = threading.Event()
    clock = gpu.clock

    def close_within() -> float:
        if threading.current_thread().name == "torchfast-vram-monitor" and not closed.is_set():
            assert vram._stop is not None
            vram._stop()
            closed.set()
        return clock()

    vram = gpu.monitor(interval_s=0.001, _clock=close_within)
    with vram:
        assert closed.wait(30)
    assert vram.errors == ()


def test_a_thread_that_cannot_start_leaves_nothing_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system has no thread left, entering fails as a whole, and the monitor can run again."""
    gpu = FakeGPU()
    vram = gpu.monitor(interval_s=60.0)

    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            vram.__enter__()
    assert not vram.is_running
    assert gpu.ledger._scopes == []
    with vram:
        gpu.allocate(100)
    assert vram.peak.allocated_bytes == 100


def test_a_phase_closed_by_another_thread() -> None:
    """A phase that one thread opened and another closed, as a generator's may be, is out of the way."""
    gpu = FakeGPU()
    with gpu.monitor() as vram:
        step = vram.phase("step").__enter__()
        closer = threading.Thread(target=step.__exit__, args=(None, None, None))
        closer.start()
        closer.join()
        with vram.phase("later"):
            assert vram.sample().phase == "later"
    assert list(vram.phases) == ["step", "later"]


def test_report_and_line_read_well() -> None:
    """The report shows the parts, the peaks and the phases; the line fits a progress bar."""
    gpu = FakeGPU()
    with gpu.monitor() as vram:
        with vram.phase("forward"):
            gpu.now_s = 1.5
            gpu.allocate(1000)
            gpu.allocate(-500)
        assert vram.line() == "VRAM 500 B, peak 1000 B, device 1.76 KiB of 9.77 KiB"
    assert str(vram).splitlines() == [
        "VRAMMonitor of cuda:0",
        "  now, 1.5 s after the start",
        "    tensors       500 B",
        "    cached        400 B",
        "    fragmented    100 B",
        "    outside       300 B",
        "    others        500 B",
        "    free          8.01 KiB",
        "    total         9.77 KiB",
        "    host process  7 B",
        "  peak of the run",
        "    allocated     1000 B",
        "    reserved      1.95 KiB",
        "    device used   1.76 KiB (highest sample)",
        "    host process  7 B (highest sample)",
        "  phase                     times  seconds        peak    reserved        kept",
        "  forward                       1     1.50      1000 B    1.95 KiB       500 B",
    ]
    assert repr(vram.latest) == (
        "VRAMSample(cuda:0 at 1.500 s: total 9.77 KiB, tensors 500 B, cached 400 B, fragmented 100 B, "
        "outside 300 B, others 500 B, free 8.01 KiB)"
    )


def test_columns_stay_in_line_under_long_names() -> None:
    """The report's table is as wide as its longest phase."""
    gpu = FakeGPU()
    with gpu.monitor() as vram, vram.phase("a phase with a long name"), vram.phase("and one within it"):
        pass
    table = [line for line in str(vram).splitlines() if "  a phase" in line or "  phase" in line]
    assert len(table) == 3
    assert len({len(line) for line in table}) == 1


RANK = """
import json, sys
import torch.distributed as dist
from tests.fake_gpu import FakeGPU

rank, path = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=3)
some = dist.new_group([1, 2])
gpu = FakeGPU()
with gpu.monitor() as vram:
    gpu.allocate((1000, 700, 900)[rank])
    gpu.allocate(-600)
    print(json.dumps([vram.across_ranks(), vram.across_ranks(some) if rank else None]))
dist.destroy_process_group()
"""


def test_the_highest_of_all_ranks_and_which_it_is(tmp_path: Path) -> None:
    """Ranks gather their peaks through the CPU, all or some: they learn the highest, and whose it is."""
    command = [sys.executable, "-c", RANK]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE, text=True)
        for rank in range(3)
    ]
    answers = [json.loads(rank.communicate(timeout=120)[0].splitlines()[-1]) for rank in ranks]
    assert [of_all["allocated_bytes"] for of_all, _ in answers] == [[1000, 0]] * 3
    assert [of_all["host_process_bytes"] for of_all, _ in answers] == [[7, 0]] * 3
    assert [of_some["allocated_bytes"] for _, of_some in answers[1:]] == [[900, 2]] * 2
    assert [of_some["host_process_bytes"] for _, of_some in answers[1:]] == [[7, 1]] * 2


def test_without_other_ranks_there_is_this_one() -> None:
    """Where nothing is distributed the one rank has the highest peaks; what it does not know, nobody has."""
    with VRAMMonitor("cpu", interval_s=None) as vram:
        ranks = vram.across_ranks()
    assert ranks["allocated_bytes"] == (None, None)
    assert ranks["host_process_bytes"].rank in (0, None)
