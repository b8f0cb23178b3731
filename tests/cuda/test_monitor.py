"""The monitor against memory of known size, on a real GPU."""

import ctypes
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from torchfast import VRAMMonitor
from torchfast._bytes import MIB
from torchfast._memory import allocator_stats, peak_scope
from torchfast._nvml import Nvml, Unknown

pytestmark = pytest.mark.cuda

BALLAST_BYTES = 64 * MIB  # a multiple of the allocator's rounding: allocated is requested


@pytest.fixture
def device() -> torch.device:
    """Return the first GPU, with a context and an empty cache."""
    device = torch.device("cuda", 0)
    torch.zeros(1, device=device)
    torch.cuda.empty_cache()
    return device


def ballast(n_bytes: int, device: torch.device) -> torch.Tensor:
    """Return a tensor of exactly so many bytes."""
    return torch.empty(n_bytes, dtype=torch.uint8, device=device)


def test_ballast_is_seen_to_the_byte(device: torch.device) -> None:
    """A tensor of 64 MiB adds 64 MiB to the tensors; freed, it is cached; and the peak remembers it."""
    with VRAMMonitor(device, interval_s=None) as vram:
        before = vram.sample()
        tensor = ballast(BALLAST_BYTES, device)
        during = vram.sample()
        del tensor
        after = vram.sample()
        assert before.tensors_bytes is not None
        assert during.tensors_bytes == before.tensors_bytes + BALLAST_BYTES
        assert after.tensors_bytes == before.tensors_bytes
        assert after.reserved_bytes == during.reserved_bytes == torch.cuda.memory_reserved(device)
        assert vram.peak.allocated_bytes == during.tensors_bytes


def test_direct_and_public_readings_agree(device: torch.device) -> None:
    """PyTorch's private reading, which costs a fifth, says the same as its public functions."""
    assert hasattr(torch._C, "_cuda_memoryStats")
    tensor = ballast(BALLAST_BYTES, device)
    stats = allocator_stats(device)
    assert stats is not None
    assert stats.allocated_bytes == torch.cuda.memory_allocated(device)
    assert stats.reserved_bytes == torch.cuda.memory_reserved(device)
    assert stats.peak_allocated_bytes == torch.cuda.max_memory_allocated(device)
    assert stats.peak_reserved_bytes == torch.cuda.max_memory_reserved(device)
    assert stats.requested_bytes == torch.cuda.memory_stats(device)["requested_bytes.all.current"]
    del tensor


def test_nested_phases_are_exact(device: torch.device) -> None:
    """Each phase has the peak of its own stretch, to the byte, though all share one register."""
    start = torch.cuda.memory_allocated(device)
    with VRAMMonitor(device, interval_s=0.001) as vram:
        with vram.phase("outer") as outer:
            ballast(4 * BALLAST_BYTES, device)
            with vram.phase("inner") as inner:
                kept = ballast(BALLAST_BYTES, device)
            assert vram.peak.allocated_bytes == start + 4 * BALLAST_BYTES
            ballast(2 * BALLAST_BYTES, device)
        ballast(7 * BALLAST_BYTES, device)
    assert inner.peak_allocated_bytes == start + BALLAST_BYTES
    assert inner.kept_bytes == BALLAST_BYTES
    assert outer.peak_allocated_bytes == start + 4 * BALLAST_BYTES
    assert vram.peak.allocated_bytes == start + BALLAST_BYTES + 7 * BALLAST_BYTES
    assert not vram.peak.is_lower_bound
    assert vram.errors == ()
    del kept


def test_foreign_reset_is_noticed(device: torch.device) -> None:
    """When somebody resets the register after it was read, the peak read stays, as a lower bound."""
    start = torch.cuda.memory_allocated(device)
    with VRAMMonitor(device, interval_s=None) as vram:
        ballast(BALLAST_BYTES, device)
        vram.sample()
        torch.cuda.reset_peak_memory_stats(device)
    assert vram.peak.allocated_bytes == start + BALLAST_BYTES
    assert vram.peak.is_lower_bound


def test_two_monitors_and_a_scope_at_once(device: torch.device) -> None:
    """Monitors and scopes that overlap, in several threads, do not spoil one another's peaks."""
    start = torch.cuda.memory_allocated(device)
    with VRAMMonitor(device, interval_s=0.001) as one:
        ballast(3 * BALLAST_BYTES, device)
        with VRAMMonitor(device, interval_s=0.001) as two, peak_scope(device) as scope:
            worker = threading.Thread(target=_open_scopes, args=(device,))
            worker.start()
            ballast(2 * BALLAST_BYTES, device)
            worker.join()
        ballast(BALLAST_BYTES, device)
    assert one.peak.allocated_bytes == start + 3 * BALLAST_BYTES
    assert two.peak.allocated_bytes == scope.peak_allocated_bytes == start + 2 * BALLAST_BYTES


def _open_scopes(device: torch.device) -> None:
    for _ in range(100):
        with peak_scope(device):
            pass


@pytest.fixture
def raw_memory(device: torch.device) -> Iterator[int]:
    """Hold memory that this process took from the driver past PyTorch's allocator; yields its size."""
    torch.zeros(1, device=device)
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").split()
    runtime = ctypes.CDLL(next(part for part in maps if "libcudart" in part))
    pointer = ctypes.c_void_p()
    n_bytes = 512 * MIB
    assert runtime.cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(n_bytes)) == 0
    yield n_bytes
    assert runtime.cudaFree(pointer) == 0


def test_memory_outside_pytorch_shows_as_such(device: torch.device, request: pytest.FixtureRequest) -> None:
    """512 MiB of a raw cudaMalloc are not PyTorch's; where NVML tells processes apart, they are ours."""
    with VRAMMonitor(device, interval_s=None) as vram:
        before = vram.sample()
        n_bytes = request.getfixturevalue("raw_memory")
        during = vram.sample()
    assert before.not_pytorch_bytes is not None
    assert during.not_pytorch_bytes is not None
    assert during.tensors_bytes == before.tensors_bytes
    if before.outside_bytes is None or during.outside_bytes is None:
        assert during.sources["outside"].startswith("not known: ")
    else:
        assert during.outside_bytes - before.outside_bytes == n_bytes


HOLD = """
import sys, torch
held = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
torch.cuda.synchronize()
print("held", flush=True)
sys.stdin.read()
"""


def test_another_process_shows_as_other(device: torch.device) -> None:
    """A second process with 1 GiB is not counted as ours: others where that is known, else not PyTorch's."""
    with VRAMMonitor(device, interval_s=None) as vram:
        other = subprocess.Popen(
            [sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        during = vram.sample()
        other.communicate()
    assert during.tensors_bytes == torch.cuda.memory_allocated(device)
    assert during.not_pytorch_bytes is not None
    assert during.not_pytorch_bytes >= 1024 * MIB
    if during.others_bytes is not None:
        assert during.others_bytes >= 1024 * MIB
    else:
        assert during.sources["others"].startswith("not known: ")


def test_monitor_beside_a_graph_capture(device: torch.device) -> None:
    """Sampling in another thread does not break the capture of a CUDA graph."""
    static = torch.ones(1024, device=device)
    with VRAMMonitor(device, interval_s=0.0005) as vram:
        for _ in range(20):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = static
                for _ in range(300):
                    result = result + 1
            graph.replay()
            assert result[0].item() == 301
    assert vram.errors == ()


def test_looking_makes_no_context() -> None:
    """In a process that has not used the GPU, a monitor says so, and creates no context by looking."""
    program = (
        "import json, torch, torchfast\n"
        "with torchfast.VRAMMonitor(interval_s=0.001) as vram:\n"
        "    seen = vram.status()\n"
        "has_context = torch._C._cuda_hasPrimaryContext(0)\n"
        "print(json.dumps([has_context, seen['free_bytes'], seen['sources']['free']]))\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    has_context, free_bytes, source = json.loads(run.stdout)
    assert (has_context, free_bytes) == (False, None)
    assert source.startswith("not known: ")


def test_nvml_finds_the_same_gpu(device: torch.device) -> None:
    """NVML's device, found by UUID, lists a process that holds at least what we reserved."""
    try:
        nvml = Nvml(device)
    except Unknown as unknown:
        pytest.skip(f"NVML is not to be had here: {unknown}")
    tensor = ballast(BALLAST_BYTES, device)
    listed = nvml.used_by_process()
    assert max(n_bytes or 0 for n_bytes in listed.values()) >= torch.cuda.memory_reserved(device)
    del tensor
