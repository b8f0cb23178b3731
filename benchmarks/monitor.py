"""What watching the memory costs: one sample, one phase, and a training step beside it.

    python benchmarks/monitor.py

Compared in the same run, each polled by a thread at the same pace: `torch.cuda.memory_stats()`, and three
such calls a sample (`memory_allocated`, `memory_reserved`, `max_memory_allocated`), as monitors commonly do.
Polling `nvidia-smi` is left out: a fork of 10 to 20 ms is no contest.
"""

import functools
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import record
import torch
from torch import nn

from torchfast import VRAMMonitor
from torchfast._memory import allocator_stats, driver_memory
from torchfast._monitor import probe

DEVICE = torch.device("cuda", 0)
PROTOCOL = (
    "Costs: the median of 2,000 calls back to back, every source due at each (hot); of 300 calls 5 ms "
    "apart, as a sampling thread makes them (idle); of 300 right after 20 matrix products of 4096 were "
    "queued (busy). Steps: 15 rounds in which every variant takes its turn, in an order drawn anew, "
    "each the mean of as many steps as take about 150 ms. The ratio is the median over rounds of "
    "variant to no monitor in the same round; how far the second no monitor is from 1 says how much of "
    "it is noise."
)
N_ROUNDS = 15


def main() -> None:
    """Check, measure, print and write."""
    if not torch.cuda.is_available():
        sys.exit("benchmarks/monitor.py measures a GPU's memory, and this machine has none.")
    check()
    rows = [*costs(), *steps()]
    for row in rows:
        print(*(f"{key}={value}" for key, value in row.items() if key != "samples"))
    print(record.write("monitor", PROTOCOL, rows))


def check() -> None:
    """Stop unless the monitor is right about memory of known size."""
    start = torch.cuda.memory_allocated(DEVICE)
    with VRAMMonitor(DEVICE, interval_s=0.001) as vram:
        with vram.phase("one") as phase:
            tensor = torch.empty(2**26, dtype=torch.uint8, device=DEVICE)
        sample = vram.sample()
        del tensor
    if not sample.tensors_bytes == phase.peak_allocated_bytes == vram.peak.allocated_bytes == start + 2**26:
        raise SystemExit(f"wrong: {sample}, {phase.peak_allocated_bytes}, {vram.peak}")


def costs() -> Iterator[dict[str, Any]]:
    """Yield what single calls cost, in µs."""
    vram = VRAMMonitor(DEVICE, interval_s=None)
    with vram:
        run = vram._run
        if run is None:
            raise SystemExit("the monitor does not run")

        def phase() -> None:
            with vram.phase("phase"):
                pass

        calls: dict[str, Callable[[], object]] = {
            "torchfast: background sample": lambda: run.sample(fresh=False),
            "torchfast: sample(), every source": vram.sample,
            "torchfast: status()": vram.status,
            "torchfast: phase, opened and closed": phase,
            "torchfast: allocator alone": lambda: allocator_stats(DEVICE),
            "torchfast: driver alone": lambda: driver_memory(DEVICE),
            "memory_stats()": lambda: torch.cuda.memory_stats(DEVICE),
            "three memory_stats() calls": three_calls,
        }
        # Back to back, a source would otherwise answer from its last reading: it may take 1 % of the time.
        probe._SHARE = float("inf")
        for name, call in calls.items():
            for state, n_calls, rest_s in (("hot", 2000, 0.0), ("idle", 300, 0.005), ("busy", 300, 0.005)):
                samples = sorted(time_calls(call, n_calls, rest_s, busy=state == "busy"))
                yield {
                    "kind": "cost",
                    "what": name,
                    "gpu": state,
                    "median_us": record.median(samples),
                    "p99_us": float(f"{samples[int(0.99 * len(samples))]:.4g}"),
                }
        probe._SHARE = 0.01


def time_calls(call: Callable[[], object], n_calls: int, rest_s: float, *, busy: bool) -> list[float]:
    """Return the time of each call in µs."""
    matrix = torch.randn(4096, 4096, device=DEVICE, dtype=torch.bfloat16)
    samples = []
    for _ in range(n_calls):
        if rest_s:
            torch.cuda.synchronize()
            time.sleep(rest_s)
        if busy:
            for _ in range(20):
                matrix @ matrix
        start_s = time.perf_counter()
        call()
        samples.append((time.perf_counter() - start_s) * 1e6)
    return samples


def three_calls() -> None:
    """Read as monitors commonly do."""
    torch.cuda.memory_allocated(DEVICE)
    torch.cuda.memory_reserved(DEVICE)
    torch.cuda.max_memory_allocated(DEVICE)


@contextmanager
def polling(call: Callable[[], object], interval_s: float) -> Iterator[None]:
    """Call in a thread, as a monitor of its own would."""
    stop = threading.Event()

    def loop() -> None:
        while not stop.wait(interval_s):
            call()

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    yield
    stop.set()
    thread.join()


def steps() -> Iterator[dict[str, Any]]:
    """Yield how much longer a training step takes beside each way of watching."""
    for workload, step in workloads().items():
        bare = functools.partial(step, None)
        (time_ms,) = record.times_ms(bare, n_samples=1, n_steps=20, n_warmup=25)
        n_steps = max(1, round(150 / time_ms))
        times: dict[str, list[float]] = {}
        for _ in range(N_ROUNDS):
            for name, time_ms in one_round(step, n_steps):
                times.setdefault(name, []).append(time_ms)
        for name, samples in times.items():
            ratios = [one / other for one, other in zip(samples, times["no monitor"], strict=True)]
            yield {
                "kind": "step",
                "workload": workload,
                "what": name,
                "median_ms": record.median(samples),
                "ratio": record.median(ratios),
                "samples": samples,
            }


def one_round(step: Callable[[VRAMMonitor | None], None], n_steps: int) -> Iterator[tuple[str, float]]:
    """Yield the time of a step beside each way of watching, once."""
    variants: dict[str, tuple[Any, bool]] = {
        "no monitor": (nullcontext(), False),
        "VRAMMonitor, 10 a second": (VRAMMonitor(DEVICE), False),
        "VRAMMonitor, 100 a second": (VRAMMonitor(DEVICE, interval_s=0.01), False),
        "VRAMMonitor, 10 a second, 3 phases a step": (VRAMMonitor(DEVICE), True),
        "memory_stats(), 100 a second": (polling(lambda: torch.cuda.memory_stats(DEVICE), 0.01), False),
        "three memory_stats() calls, 100 a second": (polling(three_calls, 0.01), False),
        "no monitor, again": (nullcontext(), False),
    }
    shuffled = random.sample(list(variants.items()), len(variants))
    for name, (watching, with_phases) in shuffled:
        with ExitStack() as stack:
            watcher = stack.enter_context(watching)
            vram = watcher if with_phases else None
            (time_ms,) = record.times_ms(
                lambda vram=vram: step(vram), n_samples=1, n_steps=n_steps, n_warmup=2
            )
        yield name, time_ms


def workloads() -> dict[str, Callable[[VRAMMonitor | None], None]]:
    """Return a step bound by the GPU, and one bound by the host, which notices whoever holds the GIL."""
    try:
        import timm

        large = timm.create_model("resnet50").to(DEVICE, memory_format=torch.channels_last)
        images = torch.randn(64, 3, 224, 224, device=DEVICE).contiguous(memory_format=torch.channels_last)
        result = {"ResNet-50, 64 images, bf16 (GPU-bound)": trainer(large, images)}
    except ImportError:
        result = {}
    small = nn.Sequential(*(nn.Linear(64, 64) for _ in range(20))).to(DEVICE)
    return result | {
        "20 small linear layers (host-bound)": trainer(small, torch.randn(32, 64, device=DEVICE))
    }


def trainer(model: nn.Module, batch: torch.Tensor) -> Callable[[VRAMMonitor | None], None]:
    """Return one training step, in phases if given a monitor."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step(vram: VRAMMonitor | None) -> None:
        with vram.phase("forward") if vram else nullcontext(), torch.autocast("cuda", torch.bfloat16):
            loss = model(batch).float().square().mean()
        with vram.phase("backward") if vram else nullcontext():
            loss.backward()
        with vram.phase("optimizer") if vram else nullcontext():
            optimizer.step()
            optimizer.zero_grad()

    return step


if __name__ == "__main__":
    main()
