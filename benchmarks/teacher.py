"""What a teacher costs: `python benchmarks/teacher.py`.

Four questions, for ResNet-50 teaching ResNet-18 at 224 px:

- forward: how long does the teacher alone take, written naively and as each plan of `GPUTeacher`?
- fidelity: how far are its outputs from the float32 teacher's?
- step: how long is a distillation step, beside the same step with targets computed beforehand?
- loading: what do host and device hold at most while 1 GiB of weights in float32 becomes a bfloat16 teacher?

Every teacher's outputs are checked against the float32 module before it is timed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import record
import torch
import torch.nn.functional as F
from torch import nn

from torchfast import GPUTeacher, to_channels_last

Teacher = Callable[[torch.Tensor], torch.Tensor]

PROTOCOL = (
    "ResNet-50 with random weights and calibrated batch norms; forward: 7 samples of 5 passes; step: "
    "ResNet-18, bfloat16 autocast, channels_last, SGD with momentum, teacher first, 7 samples of 5 steps; "
    "the GPU drained around each sample. efficiency is (step without teacher + fastest teacher alone) / step."
)
PROTOCOL_OF_LOADING = (
    "16 layers of 4096 x 4096 in float32, 1 GiB, into a bfloat16 teacher; a process each, after CUDA's own "
    "initialisation; host peak is anonymous memory, read every 2 ms."
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BIG = (16, 4096)  # layers and width of the net for loading: 1 GiB in float32


def main() -> None:
    """Measure everything and write the result file; or one loading, for a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--parts", nargs="+", choices=("loading", "forward"), default=["loading", "forward"])
    parser.add_argument("--load", nargs=2, metavar=("KIND", "PATH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        print(json.dumps(loading_of(*options.load)))
        return
    if "loading" in options.parts:
        print(record.write("teacher_loading", PROTOCOL_OF_LOADING, loadings()))
    if "forward" in options.parts:
        rows = [row for batch_size in options.batch_sizes for row in forwards_and_steps(batch_size)]
        print(record.write("teacher_forward", PROTOCOL, rows))


# --- forward, fidelity, step -----------------------------------------------------------------------------


def resnet50() -> nn.Module:
    """Return a ResNet-50 with logits that differ: every branch counts, and norms are calibrated."""
    import timm

    torch.manual_seed(0)
    module: nn.Module = timm.create_model("resnet50", zero_init_last=False).cuda().train()
    with torch.no_grad():
        for _ in range(10):
            module(torch.randn(32, 3, 224, 224, device="cuda"))
    return module.eval().requires_grad_(requires_grad=False)


def teachers(module: nn.Module) -> Iterator[tuple[str, Teacher]]:
    """Go through the ways to run the teacher, naive ones first."""
    yield "plain PyTorch, float32", no_grad(module)
    yield "plain PyTorch, float32 under bfloat16 autocast", autocast(module)
    yield "plain PyTorch, bfloat16", in_bfloat16(module)
    options: dict[str, Any] = {"dtype": torch.bfloat16}
    yield "GPUTeacher, plain layout", GPUTeacher(module, channels_last=False, **options)
    yield "GPUTeacher", GPUTeacher(module, **options)
    yield 'GPUTeacher, plan=("fold",)', GPUTeacher(module, plan=["fold"], **options)
    yield 'GPUTeacher, plan=("fold", "graph")', GPUTeacher(module, plan=["fold", "graph"], **options)
    yield 'GPUTeacher, plan="auto"', GPUTeacher(module, plan="auto", **options)


def no_grad(module: nn.Module) -> Teacher:
    """Run a module without gradients."""

    @torch.no_grad()
    def run(images: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = module(images)
        return outputs

    return run


def autocast(module: nn.Module) -> Teacher:
    """Run a float32 module under autocast, as a loop around student and teacher does."""
    run = no_grad(module)

    def under_autocast(images: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return run(images)

    return under_autocast


def in_bfloat16(module: nn.Module) -> Teacher:
    """Run a copy of a module in bfloat16."""
    import copy

    run = no_grad(copy.deepcopy(module).bfloat16())
    return lambda images: run(images.bfloat16())


def forwards_and_steps(batch_size: int) -> list[dict[str, Any]]:
    """Return a row for each way to run the teacher."""
    module = resnet50()
    images = to_channels_last(torch.randn(batch_size, 3, 224, 224, device="cuda"))
    exact = no_grad(module)(images)
    floor = step_samples(lambda _: exact, images)
    rows: list[dict[str, Any]] = []
    for name, teacher in teachers(module):
        start_s = time.perf_counter()
        outputs = teacher(images)
        torch.cuda.synchronize()
        first_call_s = time.perf_counter() - start_s
        row: dict[str, Any] = {"name": name, "batch_size": batch_size, "first_call_s": first_call_s}
        row |= fidelity(outputs.float(), exact)
        row["samples_ms"] = record.times_ms(lambda t=teacher: t(images), n_samples=7, n_steps=5, n_warmup=3)
        row["median_ms"] = record.median(row["samples_ms"])
        row["step_samples_ms"] = step_samples(teacher, images)
        row["step_median_ms"] = record.median(row["step_samples_ms"])
        if isinstance(teacher, GPUTeacher) and teacher.plan is not None:
            row["plan"] = str(teacher.plan)
        rows.append(row)
        print(
            f"{batch_size:4d} {row['median_ms']:8.2f} ms {row['step_median_ms']:8.2f} ms a step  {name}",
            flush=True,
        )
    fastest_ms = min(row["median_ms"] for row in rows)
    floor_ms = record.median(floor)
    for row in rows:
        row["step_without_teacher_ms"] = floor_ms
        row["efficiency"] = (floor_ms + fastest_ms) / row["step_median_ms"]
    return rows


def fidelity(outputs: torch.Tensor, exact: torch.Tensor) -> dict[str, float]:
    """Return how far outputs are from the float32 module's; too far is an error."""
    moved = float((outputs - exact).abs().max() / exact.abs().max())
    if not moved < 0.05:
        raise AssertionError(f"outputs moved by {moved:.1%} of the largest one")
    divergence = F.kl_div(
        F.log_softmax(outputs, 1), F.log_softmax(exact, 1), reduction="batchmean", log_target=True
    )
    agreement = (outputs.argmax(1) == exact.argmax(1)).float().mean()
    return {"largest_move": moved, "kl": float(divergence), "top1_agreement": float(agreement)}


def step_samples(teacher: Teacher, images: torch.Tensor) -> list[float]:
    """Return times of a distillation step with this teacher."""
    import timm

    torch.manual_seed(1)
    student: nn.Module = timm.create_model("resnet18").cuda().train()
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3, momentum=0.9)
    to_channels_last(student, optimizer=optimizer)

    def step() -> None:
        targets = teacher(images)
        with torch.autocast("cuda", torch.bfloat16):
            logits = student(images)
        loss = F.kl_div(
            F.log_softmax(logits.float(), 1),
            F.log_softmax(targets.float(), 1),
            reduction="batchmean",
            log_target=True,
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    samples: list[float] = record.times_ms(step, n_samples=7, n_steps=5, n_warmup=5)
    return samples


# --- loading ---------------------------------------------------------------------------------------------


def big() -> nn.Sequential:
    """Return the net whose weights are loaded."""
    n_layers, width = BIG
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(n_layers)))


def loadings() -> list[dict[str, Any]]:
    """Return a row for each way to load, each measured in a process of its own."""
    from safetensors.torch import save_file

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        state = big().state_dict()
        torch.save(state, f"{folder}/teacher.pt")
        save_file(state, f"{folder}/teacher.safetensors")
        for kind, suffix in (
            ("plain", "pt"),
            ("plain", "safetensors"),
            ("ours", "pt"),
            ("ours", "safetensors"),
        ):
            command = [sys.executable, __file__, "--load", kind, f"{folder}/teacher.{suffix}"]
            found = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append({"suffix": suffix, **json.loads(found.stdout.splitlines()[-1])})
            print(rows[-1], flush=True)
    return rows


def loading_of(kind: str, path: str) -> dict[str, Any]:
    """Load a bfloat16 teacher one way and return what it took."""
    torch.zeros(1, device=DEVICE)
    before = allocated_bytes("memory_allocated")
    with host_peak() as peak:
        start_s = time.perf_counter()
        teacher: Any = (
            plain_loading(path)
            if kind == "plain"
            else GPUTeacher.from_checkpoint(big, path, dtype=torch.bfloat16)
        )
        drain()
        seconds = time.perf_counter() - start_s
    weights = BIG[0] * BIG[1] ** 2
    if teacher(torch.zeros(1, BIG[1], device=DEVICE, dtype=torch.bfloat16)).dtype != torch.bfloat16:
        raise AssertionError("the teacher does not compute in bfloat16")
    return {
        "name": "plain PyTorch" if kind == "plain" else "GPUTeacher.from_checkpoint",
        "seconds": seconds,
        "file_bytes": weights * 4,
        "teacher_bytes": weights * 2,
        "device_peak_bytes": allocated_bytes("max_memory_allocated") - before,
        "host_peak_bytes": peak[0],
    }


def drain() -> None:
    """Wait for the device."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def allocated_bytes(which: str) -> int:
    """Return one of PyTorch's counters of device memory; 0 on the CPU, where all of it is the host's."""
    return int(getattr(torch.cuda, which)()) if DEVICE == "cuda" else 0


def plain_loading(path: str) -> nn.Module:
    """Load the way most scripts do: build, read everything, copy, move, cast."""
    from safetensors.torch import load_file

    module = big()
    state = (
        load_file(path)
        if path.endswith(".safetensors")
        else torch.load(path, map_location="cpu", weights_only=True)
    )
    module.load_state_dict(state)
    return module.to(DEVICE).to(torch.bfloat16).eval().requires_grad_(requires_grad=False)


@contextmanager
def host_peak() -> Iterator[list[int]]:
    """Watch the anonymous memory of this process, and give its peak over what it was."""
    before, stop = anonymous_bytes(), threading.Event()
    peak = [0]

    def watch() -> None:
        while not stop.wait(0.002):
            peak[0] = max(peak[0], anonymous_bytes() - before)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    yield peak
    stop.set()
    thread.join()


def anonymous_bytes() -> int:
    """Return the memory of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024


if __name__ == "__main__":
    main()
