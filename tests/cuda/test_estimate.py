"""The estimate against the GPU it speaks for. What is measured runs in a fresh process each."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torchfast import VRAMEstimate, estimate_vram
from torchfast._bytes import GIB, MIB
from torchfast._estimate import calibrate
from torchfast._estimate.allocator import Block, CachingAllocator, OutOfSegmentsError
from torchfast._estimate.gpus import resolve_gpu
from torchfast._estimate.search import BatchSize
from torchfast._estimate.settings import AllocatorSettings

pytestmark = pytest.mark.cuda

TRAINING = """
import json, sys
import torch
import torch.nn.functional as F
from torch import nn
batch_size, limit = int(sys.argv[1]), int(sys.argv[2])
total = torch.cuda.get_device_properties(0).total_memory
if limit:
    torch.cuda.set_per_process_memory_fraction(limit / total)
model = nn.Sequential(*(nn.Sequential(nn.Linear(1024, 1024), nn.GELU()) for _ in range(8))).cuda()
x, target = torch.randn(batch_size, 1024).cuda(), torch.zeros(batch_size, dtype=torch.long).cuda()
optimizer = torch.optim.AdamW(model.parameters())
try:
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        optimizer.step()
    torch.cuda.synchronize()
    ran = True
except torch.OutOfMemoryError:
    ran = False
print(json.dumps([ran, torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()]))
"""

# Allocates and frees at random; prints what the allocator says after each call.
PROGRAM = """
import json, random, sys
import torch
rng, limit = random.Random(int(sys.argv[1])), int(sys.argv[2])
total = torch.cuda.get_device_properties(0).total_memory
torch.cuda.set_per_process_memory_fraction(limit / total)
torch.zeros(1, device="cuda")
torch.cuda.empty_cache()
live, rows = {}, []
for i in range(400):
    if rng.random() < 0.55 or not live:
        size = rng.choice([rng.randint(1, 2**20), rng.randint(2**20, 2**24), rng.randint(2**24, 2**27)])
        try:
            live[i] = torch.empty(size, dtype=torch.uint8, device="cuda")
        except torch.OutOfMemoryError:
            size = -size
        call = [i, size]
    else:
        call = [rng.choice(list(live)), 0]
        del live[call[0]]
    stats = torch.cuda.memory_stats()
    names = ("allocated_bytes.all.current", "reserved_bytes.all.current", "num_alloc_retries")
    rows.append(call + [stats[name] for name in names])
print(json.dumps(rows))
"""


SETTINGS = (
    "",
    "expandable_segments:True",
    "garbage_collection_threshold:0.5,max_split_size_mb:64",
)
LIMIT_BYTES = 1200 * MIB


def start(code: str, *arguments: int, settings: str = "") -> "subprocess.Popen[str]":
    """Start a script in a process of its own."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": settings}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def answer(process: "subprocess.Popen[str]") -> Any:
    """Wait for a script and return the JSON it prints."""
    printed, _ = process.communicate()
    assert process.returncode == 0
    return json.loads(printed.splitlines()[-1])


def network() -> nn.Module:
    """Return the model of TRAINING."""
    return nn.Sequential(*(nn.Sequential(nn.Linear(1024, 1024), nn.GELU()) for _ in range(8)))


def estimated(model: nn.Module, batch_size: int) -> VRAMEstimate:
    """Estimate what TRAINING does."""
    batch = (torch.randn(batch_size, 1024), torch.zeros(batch_size, dtype=torch.long))
    return estimate_vram(model, batch, loss=F.cross_entropy, optimizer=torch.optim.AdamW)


@dataclass(frozen=True)
class Runs:
    """What was predicted, and what the GPU did."""

    estimate: VRAMEstimate
    training: Any
    largest: BatchSize
    at_largest: Any
    beyond_largest: Any
    programs: dict[str, Any]


@pytest.fixture(scope="module")
def runs() -> Runs:
    """Predict, then run everything at once: starting CUDA takes longer than what is measured."""
    model = network()
    estimate = estimated(model, 8192)
    largest = estimated(model, 1024).max_batch_size(limit_bytes=2 * GIB)
    training = start(TRAINING, 8192, 0)
    at_largest = start(TRAINING, largest.batch_size, 2 * GIB)
    beyond_largest = start(TRAINING, int(largest.batch_size * 1.03) + 1, 2 * GIB)
    programs = {settings: start(PROGRAM, 7, LIMIT_BYTES, settings=settings) for settings in SETTINGS}
    return Runs(
        estimate,
        answer(training),
        largest,
        answer(at_largest),
        answer(beyond_largest),
        {settings: answer(process) for settings, process in programs.items()},
    )


def test_the_peaks_are_those_that_are_observed(runs: Runs) -> None:
    """Allocated and reserved bytes of a step are within half a percent of the estimate."""
    ran, allocated, reserved = runs.training
    assert ran
    assert runs.estimate.peak_allocated_bytes == pytest.approx(allocated, rel=5e-3)
    assert runs.estimate.peak_reserved_bytes == pytest.approx(reserved, rel=5e-3)


def test_the_largest_batch_runs_and_a_larger_one_does_not(runs: Runs) -> None:
    """Under a limit of 2 GiB the found batch trains, and 3 % more runs out of memory."""
    assert runs.at_largest[0]
    assert not runs.beyond_largest[0]


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_replayed_allocator_is_the_real_one(settings: str, runs: Runs) -> None:
    """Under each setting and a limit, random calls leave the same bytes after each."""
    rows = runs.programs[settings]
    total = torch.cuda.get_device_properties(0).total_memory
    allocator = CachingAllocator(
        AllocatorSettings.parse(settings), limit_bytes=int(LIMIT_BYTES / total * total)
    )
    live: dict[int, Block] = {}
    for block, size, *stats in rows:
        if size > 0:
            live[block] = allocator.allocate(size)
        elif size == 0:
            allocator.free(live.pop(block))
        else:
            with pytest.raises(OutOfSegmentsError):
                allocator.allocate(-size)
        assert stats == [allocator.allocated_bytes, allocator.reserved_bytes, allocator.n_retries]


def test_calibration_agrees_with_the_table() -> None:
    """Measuring the context of a GPU that the table has measured gives what the table says."""
    known = resolve_gpu().measured
    if known is None or not known.source.startswith("measured on an"):
        pytest.skip("the context of this GPU is not in the table")
    free, total = torch.cuda.mem_get_info()
    if total - free - torch.cuda.memory_reserved() > GIB:
        pytest.skip("others are using this GPU, and calibration needs it alone")
    found = calibrate.measure()
    for name in ("bare_bytes", "blas_bytes", "dnn_bytes"):
        assert getattr(found, name) == pytest.approx(getattr(known, name), abs=16 * MIB)
