"""VRAMMonitor on a GPU of the imagination, whose every number is known, and on this machine's CPU."""

import gc
import json
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.fake_gpu import FakeGPU
from torchfast import VRAMMonitor, VRAMSample
from torchfast._bytes import MIB
from torchfast._memory import AllocatorStats, host_memory
from torchfast._monitor import probe as probe_module
from torchfast._monitor.history import History
from torchfast._monitor.probe import Probe, Source, probe_of
from torchfast._nvml import Unknown, _pids_are_ours, shares


def test_a_sample_tells_all_parts_and_they_add_up() -> None:
    """Tensors, cached, fragmented, outside, others and free are the total, and each names its source."""
    gpu = FakeGPU()
    gpu.allocate(1000)
    sample = gpu.monitor().sample()
    parts = [
        sample.tensors_bytes,
        sample.cached_bytes,
        sample.fragmented_bytes,
        sample.outside_bytes,
        sample.others_bytes,
        sample.free_bytes,
    ]
    assert parts == [1000, 800, 200, 300, 500, 7200]
    assert sum(part or 0 for part in parts) == sample.total_bytes == 10_000
    assert (sample.used_bytes, sample.reserved_bytes, sample.not_pytorch_bytes) == (2800, 2000, 800)
    assert sample.sources == {
        "total": "driver",
        "free": "driver",
        "tensors": "allocator",
        "cached": "allocator",
        "fragmented": "allocator",
        "outside": "rest",
        "others": "rest",
        "not_pytorch": "rest",
        "host": "host",
    }


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


def test_a_slow_source_is_asked_less_often() -> None:
    """A driver call of 8 ms takes no more than 1 % of the time, however short the interval."""
    gpu = FakeGPU()
    gpu.driver_cost_s = 0.008
    with gpu.monitor() as vram:
        start_s, before = gpu.now_s, gpu.n_driver_reads
        assert vram._run is not None
        while gpu.now_s < start_s + 10:
            gpu.now_s += 0.01
            vram._run.sample(fresh=False)
        n_reads = gpu.n_driver_reads - before
        stale = vram._run.sample(fresh=False)
    assert 10 <= n_reads <= 13
    assert stale.sources["free"].startswith("driver, read ")


def test_a_source_that_recovers_is_trusted_again() -> None:
    """After a good reading the next failure begins anew with 2 s; while it fails, there is no value."""
    gpu = FakeGPU()
    asked: list[float] = []
    good = [False, True, False, True]

    def sometimes() -> int:
        asked.append(gpu.now_s)
        if not good[len(asked) - 1]:
            raise OSError("no")
        return 5

    source = Source("flickering", sometimes)
    values = []
    for second in (0, 1, 2, 3, 4, 5):
        gpu.now_s = second
        values.append(source.get(gpu.clock, fresh=False))
    assert asked == [0, 2, 3, 5]
    assert values == [None, None, 5, None, None, 5]


def test_a_failing_source_is_asked_less_and_less() -> None:
    """A source that fails every time is asked again after 2, 4, 8 s, and at last once a minute."""
    gpu = FakeGPU()
    asked: list[float] = []

    def fail() -> int:
        asked.append(gpu.now_s)
        raise OSError("no")

    source = Source("broken", fail)
    for second in range(300):
        gpu.now_s = second
        source.get(gpu.clock, fresh=False)
    assert asked == [0, 2, 6, 14, 30, 62, 126, 190, 254]
    assert source.n_errors == 9


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=300), st.integers(2, 20))
def test_history_is_bounded_and_keeps_the_extremes(values: list[int], max_spans: int) -> None:
    """However many samples come, the spans stay few, in order, and lose neither lowest nor highest value."""
    gpu = FakeGPU()
    gpu.total_bytes = 10**7
    history = History(max_spans)
    with gpu.monitor() as vram:
        for value in values:
            gpu.now_s += 1
            gpu.allocate(value - gpu.current)
            history.add(vram.sample())
    spans = history.spans
    assert len(spans) <= max_spans
    assert sum(span.n_samples for span in spans) == len(values)
    *full, last = [span.n_samples for span in spans]
    assert len(set(full)) <= 1  # the resolution is the same all along
    assert last <= (full[0] if full else max_spans)
    assert max(span.high.tensors_bytes or 0 for span in spans) == max(values)
    assert min(span.low.tensors_bytes or 0 for span in spans) == min(values)
    assert max(span.high.free_bytes or 0 for span in spans) == 10**7 - 800 - 2 * min(values)
    edges = [edge for span in spans for edge in (span.start_s, span.end_s)]
    assert edges == sorted(edges)
    assert (edges[0], edges[-1]) == (1.0, len(values))


def test_a_merged_span_tells_the_phase_of_its_most_tensors() -> None:
    """When samples become one span, its phase is that in which the most was allocated."""
    gpu = FakeGPU()
    history = History(2)
    with gpu.monitor() as vram:
        for name, n_bytes in (("low", 5), ("high", 50), ("middle", 20), ("last", 10)):
            with vram.phase(name):
                gpu.allocate(n_bytes - gpu.current)
                history.add(vram.sample())
    assert [span.high.phase for span in history.spans] == ["high", "middle"]
    assert [span.n_samples for span in history.spans] == [2, 2]


def test_the_peak_of_the_device_survives_the_merging() -> None:
    """The highest use of the whole device is kept when the history gets coarser."""
    gpu = FakeGPU()
    with gpu.monitor(max_history=2) as vram:
        for n_others in (0, 900, *([10] * 50)):
            gpu.others_bytes = n_others
            vram.sample()
    assert vram.peak.used_bytes == 300 + 900


def test_on_a_cpu_the_host_is_watched() -> None:
    """Without a GPU the device's numbers are None, each with the reason, and the host's are there."""
    with VRAMMonitor("cpu", interval_s=None) as vram, vram.phase("forward") as forward:
        sample = vram.sample()
    assert sample.device == "cpu"
    assert sample.tensors_bytes is None
    assert sample.sources["tensors"] == "not known: device cpu has no CUDA allocator"
    assert forward.peak_allocated_bytes is None
    assert vram.phases["forward"].n_times == 1
    if host_memory() is not None:
        assert sample.host_process_bytes is not None
        assert 2**20 < sample.host_process_bytes < (sample.host_total_bytes or 0)
        assert vram.peak.host_process_bytes is not None
        assert "host memory" in vram.line()


def test_where_there_is_no_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a system without /proc the host's memory is unknown too, and everything still works."""
    monkeypatch.setattr(probe_module, "host_memory", lambda: None)
    with VRAMMonitor("cpu", interval_s=None) as vram:
        sample = vram.sample()
    assert sample.host_process_bytes is None
    assert sample.sources["host"] == "not known: this system has no /proc"
    assert vram.line() == "memory unknown"


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


RANK = """
import json, sys
import torch.distributed as dist
from tests.fake_gpu import FakeGPU

rank, path = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
gpu = FakeGPU()
with gpu.monitor() as vram:
    gpu.allocate((700, 900)[rank])
    gpu.allocate(-600)
    print(json.dumps(vram.across_ranks()))
dist.destroy_process_group()
"""


def test_the_highest_of_all_ranks_and_which_it_is(tmp_path: Path) -> None:
    """Two ranks gather their peaks through the CPU: both learn the highest, and whose it is."""
    command = [sys.executable, "-c", RANK]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    answers = [json.loads(rank.communicate(timeout=120)[0]) for rank in ranks]
    assert answers[0] == answers[1]
    assert answers[0]["allocated_bytes"] == [900, 1]
    assert answers[0]["host_process_bytes"] == [7, 0]


def test_without_other_ranks_there_is_this_one() -> None:
    """Where nothing is distributed the one rank has the highest peaks; what it does not know, nobody has."""
    with VRAMMonitor("cpu", interval_s=None) as vram:
        ranks = vram.across_ranks()
    assert ranks["allocated_bytes"] == (None, None)
    assert ranks["host_process_bytes"].rank in (0, None)


class TestWhoHoldsWhat:
    """Telling this process's memory from the others' by NVML's list of processes."""

    def test_our_pid_counts_where_it_is_the_hosts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where this process sees the PIDs that NVML lists, its own entry is its own."""
        monkeypatch.setattr("torchfast._nvml._pids_are_ours", lambda _: True)
        monkeypatch.setattr("os.getpid", lambda: 7)
        assert shares({7: 100, 8: 900, 9: 50}, 1060, 60) == (100, 950, "")

    def test_alone_on_the_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A single process on the list is this one, by whatever PID: we hold memory there."""
        monkeypatch.setattr("torchfast._nvml._pids_are_ours", lambda _: False)
        assert shares({4711: 100}, 100 + 9 * MIB, 60) == (100, 0, "")

    def test_somebody_who_is_not_listed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where more is used than is listed, by more than a driver takes, the others are unknown."""
        monkeypatch.setattr("torchfast._nvml._pids_are_ours", lambda _: False)
        why = "NVML does not list all that use this GPU"
        assert shares({4711: 100}, 100 + 300 * MIB, 60) == (100, None, why)

    @pytest.mark.parametrize(
        ("listed", "why"),
        [
            ({}, "NVML lists no process on this GPU"),
            ({1: 100, 2: 100}, "NVML names processes by PIDs of the host, which this container does not see"),
            ({1: None}, "the driver does not tell NVML what each process holds"),
            ({1: 50}, "NVML's process list does not show this process"),
        ],
    )
    def test_unknown_rather_than_guessed(
        self, listed: dict[int, int | None], why: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where it cannot be told which process is ours, the reason is given and no number."""
        monkeypatch.setattr("torchfast._nvml._pids_are_ours", lambda _: False)
        with pytest.raises(Unknown) as unknown:
            shares(listed, 500, 60)
        assert str(unknown.value) == why


@pytest.mark.parametrize(
    ("namespace", "listed", "ours"),
    [
        ("pid:[4026531836]", [7, 1], True),
        ("pid:[4026531836]", [1], False),
        ("pid:[4026531836]", [7, 999_999_999], False),
        ("pid:[4026532259]", [7, 1], False),
        (None, [7, 1], False),
    ],
)
def test_whether_the_pids_are_ours(
    namespace: str | None, listed: list[int], *, ours: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """PIDs are ours in the host's namespace only, if ours is listed, and if all that are listed are here."""
    for pid in (1, 7):
        (tmp_path / str(pid)).mkdir()
    (tmp_path / "self" / "ns").mkdir(parents=True)
    if namespace is not None:
        (tmp_path / "self" / "ns" / "pid").symlink_to(namespace)
    monkeypatch.setattr("torchfast._nvml._PROC", tmp_path)
    monkeypatch.setattr("os.getpid", lambda: 7)
    assert _pids_are_ours(dict.fromkeys(listed)) is ours


@pytest.mark.parametrize(
    ("backend", "setting", "why"),
    [
        ("native", "", ""),
        ("native", "max_split_size_mb:64", ""),
        ("native", "expandable_segments:True", "with expandable_segments the allocator does not count it"),
        ("cudaMallocAsync", "", "the cudaMallocAsync allocator does not count it"),
    ],
)
def test_fragments_that_the_allocator_does_not_count(
    backend: str, setting: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where PyTorch does not count fragments, they are None and not zero, and the cache holds them."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: backend)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", setting)
    gpu = FakeGPU()
    gpu.allocate(1000)
    sample = gpu.monitor().sample()
    assert (sample.fragmented_bytes, sample.cached_bytes) == ((None, 1000) if why else (200, 800))
    assert sample.sources["fragmented"] == (f"not known: {why}" if why else "allocator")


class FakeDevice:
    """The readings that `probe_of` combines, for a GPU with one other process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gpu = FakeGPU()
        self.gpu.allocate(1000)
        self.listed: dict[int, int | None] = {1: 2300, 2: 500}
        self.moves: list[int] = []
        monkeypatch.setattr(probe_module, "ledger_of", lambda _: self.gpu.ledger)
        monkeypatch.setattr(probe_module, "driver_memory", lambda _: self.gpu._driver())
        monkeypatch.setattr(probe_module, "Nvml", lambda _: self)
        monkeypatch.setattr("os.getpid", lambda: 1)
        monkeypatch.setattr("torchfast._nvml._pids_are_ours", lambda pids: 1 in pids)

    def used_by_process(self) -> dict[int, int | None]:
        """Return the list of processes; meanwhile the training may take memory."""
        if self.moves:
            self.gpu.allocate(self.moves.pop())
        return self.listed

    def sample(self) -> VRAMSample:
        """Sample through the real combination of sources."""
        probe: Probe = probe_of(torch.device("cuda", 0))
        return probe.sample(self.gpu.clock, 0.0, None, fresh=True)


def test_outside_and_others_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this process holds beyond the reserved is outside PyTorch; what it does not hold is others'."""
    sample = FakeDevice(monkeypatch).sample()
    assert (sample.not_pytorch_bytes, sample.outside_bytes, sample.others_bytes) == (800, 300, 500)


def test_what_cannot_be_told_apart_is_given_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where NVML cannot name this process, outside and others are None, and their sum is still known."""
    device = FakeDevice(monkeypatch)
    device.listed = {3: 100, 2: 2200}
    sample = device.sample()
    assert (sample.not_pytorch_bytes, sample.outside_bytes, sample.others_bytes) == (800, None, None)
    assert sample.sources["others"].startswith("not known: NVML names processes by PIDs of the host")
    assert "not PyTorch 800 B" in repr(sample)


def test_others_alone_may_be_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process can be known where the others are not; then only theirs is None, with the reason."""
    device = FakeDevice(monkeypatch)
    device.gpu.total_bytes, device.gpu.others_bytes = 10**12, 10**9
    sample = device.sample()
    assert (sample.outside_bytes, sample.others_bytes) == (300, None)
    assert sample.sources["others"] == "not known: NVML does not list all that use this GPU"
    assert sample.sources["outside"] == "the CUDA driver and NVML"


def test_a_training_that_allocates_meanwhile_is_not_taken_for_somebody_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Readings between which PyTorch took memory from the driver are thrown away and made again."""
    device = FakeDevice(monkeypatch)
    device.moves = [-1000, 1000]
    sample = device.sample()
    assert (sample.not_pytorch_bytes, sample.outside_bytes) == (800, 300)
    device.moves = [100, 100, 100, 100]
    assert device.sample().sources["not_pytorch"] == (
        "not known: PyTorch took or gave back memory each time while it was read"
    )
