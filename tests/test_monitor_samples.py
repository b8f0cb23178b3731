"""What the monitor's samples tell: the sources, their pace, and the history that keeps the extremes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.fake_gpu import FakeGPU
from torchfast import VRAMMonitor, VRAMSample
from torchfast._memory import host_memory
from torchfast._monitor import probe as probe_module
from torchfast._monitor.history import History
from torchfast._monitor.probe import Probe, Source, probe_of


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


@pytest.mark.parametrize(
    ("backend", "setting", "why"),
    [
        ("native", "", ""),
        ("native", "max_split_size_mb:64", ""),
        ("native", "expandable_segments: True", "with expandable_segments the allocator does not count it"),
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
