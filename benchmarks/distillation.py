"""The whole distillation loop, one primitive at a time: `python benchmarks/distillation.py`.

ResNet-50 teaches ResNet-18 at 224 px. The first row is how the original trainer ran: the teacher on the CPU,
blocking copies, contiguous layout. Each further row adds one primitive of torchfast to the row before. Then
the same loop in plain PyTorch, written naively and written well, and the student without any teacher: the
floor. Every row trains the same student, under bfloat16 autocast, on the same host batches.

The losses of the first steps are checked against the first row's before a time is believed.
"""

import argparse
import contextlib
import functools
import itertools
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import record
import timm
import torch
import torch.nn.functional as F
from torch import nn

from torchfast import DeviceLoader, GPUTeacher, VRAMMonitor, estimate_vram, oom_guard, to_channels_last

Batch = tuple[torch.Tensor, torch.Tensor]

TEMPERATURE = 4.0
N_CHECKED = 3
PROTOCOL = (
    "ResNet-50 teaching ResNet-18, 224 px, float32 images in pageable host memory, bfloat16 autocast, "
    "SGD with momentum; CUDA events over the whole loop without draining it, first 10 steps left out "
    "(the first one, with the teacher on the CPU)."
)


@dataclass(frozen=True)
class Setup:
    """One way to run the loop."""

    name: str
    teacher: str | None = "GPUTeacher"  # None, "cpu", "naive", "well", "compiled", "GPUTeacher" or "planned"
    loader: bool = False
    pinned: bool = False
    channels_last: bool = False
    monitor: bool = False
    guard: bool = False


ALL_SIX = Setup(
    "+ `oom_guard` (all six, `estimate_vram` before the run)",
    loader=True,
    channels_last=True,
    monitor=True,
    guard=True,
)
LADDER = (
    Setup("teacher on the CPU, blocking copies (the original trainer)", teacher="cpu"),
    Setup("+ `GPUTeacher`"),
    Setup("+ `DeviceLoader`", loader=True),
    Setup("+ `to_channels_last`", loader=True, channels_last=True),
    Setup("+ `VRAMMonitor`", loader=True, channels_last=True, monitor=True),
    ALL_SIX,
    replace(ALL_SIX, name='all six, `GPUTeacher(plan="auto")`', teacher="planned"),
    Setup("plain PyTorch, naive: float32 teacher on the GPU", teacher="naive"),
    Setup("plain PyTorch, well: bfloat16, channels_last, pinned", "well", pinned=True, channels_last=True),
    Setup("the same, with a compiled teacher", "compiled", pinned=True, channels_last=True),
    Setup("student alone, no teacher (the floor)", teacher=None, loader=True, channels_last=True),
)


class HostBatches:
    """The same few batches of random images over and over, in pageable or pinned host memory."""

    def __init__(self, batch_size: int, *, pinned: bool) -> None:
        self.batches = pageable_batches(batch_size)
        if pinned:
            self.batches = [(images.pin_memory(), labels.pin_memory()) for images, labels in self.batches]
        self.n_batches = 0

    def __len__(self) -> int:
        """Return how many batches the next iteration yields."""
        return self.n_batches

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches in turn."""
        for index in range(self.n_batches):
            yield self.batches[index % len(self.batches)]


@functools.cache
def pageable_batches(batch_size: int, n_distinct: int = 4) -> list[Batch]:
    """Return the host batches that every setup trains on."""
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(batch_size, 3, 224, 224, generator=generator),
            torch.randint(1000, (batch_size,), generator=generator),
        )
        for _ in range(n_distinct)
    ]


def main() -> None:
    """Measure every setup at every batch size and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[256, 64])
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for batch_size in options.batch_sizes:
        expected: list[float] = []
        for setup in LADDER:
            row = {"name": setup.name, "batch_size": batch_size, **measure(setup, batch_size)}
            if setup.teacher:
                expected = expected or row["first_losses"]
                row["first_losses_off_by"] = check(row["first_losses"], expected)
            rows.append(row)
            print(shown(row), flush=True)
            path = record.write("distillation", PROTOCOL, rows)  # after each: some setups take minutes
    print(path)


def shown(row: dict[str, Any]) -> str:
    """Write a row on one line."""
    speed = f"{row['median_ms']:9.2f} ms  {row['samples_per_s']:9,.0f}/s"
    return f"{row['batch_size']:4d}  {speed}  {row['name']}"


def check(losses: list[float], expected: list[float]) -> float:
    """Return the largest relative difference of the first losses; more than 2 % is not the same training."""
    off_by = max(abs(loss / wanted - 1) for loss, wanted in zip(losses, expected, strict=True))
    if off_by > 0.02:
        raise AssertionError(f"losses {losses} differ from {expected} by {off_by:.1%}")
    return off_by


def measure(setup: Setup, batch_size: int) -> dict[str, Any]:
    """Run the loop of one setup and return its times, first losses and peak memory."""
    torch.manual_seed(0)
    device = torch.device("cuda")
    student = timm.create_model("resnet18").to(device).train()
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3, momentum=0.9)
    teacher = make_teacher(setup.teacher, device)
    host = HostBatches(batch_size, pinned=setup.pinned)
    row: dict[str, Any] = {}
    if setup.guard:
        row["predicted_peak_reserved_bytes"] = predict(student, host.batches[0], optimizer)
    if setup.channels_last:
        to_channels_last(student, optimizer=optimizer)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()

    n_warmup, n_samples, n_steps = (1, 3, 1) if setup.teacher == "cpu" else (10, 7, 10)
    host.n_batches = n_warmup + n_samples * n_steps
    losses, marks = [], []
    with contextlib.ExitStack() as stack:
        for images, labels in feed(setup, host, device, stack):
            losses.append(step(student, optimizer, teacher, images, labels))
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()
    torch.cuda.synchronize()
    ends = marks[n_warmup - 1 :: n_steps]
    samples = [start.elapsed_time(end) / n_steps for start, end in itertools.pairwise(ends)]
    return row | {
        "median_ms": record.median(samples),
        "samples_per_s": float(f"{batch_size / statistics.median(samples) * 1e3:.4g}"),
        "samples_ms": samples,
        "first_losses": [loss.item() for loss in losses[:N_CHECKED]],
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
    }


def feed(
    setup: Setup, host: HostBatches, device: torch.device, stack: contextlib.ExitStack
) -> Iterable[Batch]:
    """Return the batches on the device, the way the setup brings them there."""
    if not setup.loader:
        return (plain_copy(batch, device, setup) for batch in host)
    batches: Iterable[Batch] = DeviceLoader(host, device=device, channels_last=setup.channels_last)
    vram = stack.enter_context(VRAMMonitor(device)) if setup.monitor else None
    if setup.guard:
        guard = stack.enter_context(oom_guard(monitor=vram))
        batches = guard.steps(batches)
    return batches


def plain_copy(batch: Batch, device: torch.device, setup: Setup) -> Batch:
    """Copy a batch on the stream that computes, as loops without torchfast do."""
    images, labels = (tensor.to(device, non_blocking=setup.pinned) for tensor in batch)
    if setup.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    return images, labels


def make_teacher(kind: str | None, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Return the teacher of a setup as a function from images on the device to logits on the device."""
    if kind is None:
        return None
    rng_state = torch.get_rng_state()
    torch.manual_seed(1)
    module = timm.create_model("resnet50").eval()
    torch.set_rng_state(rng_state)
    if kind in ("GPUTeacher", "planned"):
        plan = "auto" if kind == "planned" else "eager"
        return GPUTeacher(module, device, dtype=torch.bfloat16, plan=plan)
    module.requires_grad_(requires_grad=False)
    if kind in ("well", "compiled"):
        module.to(device, torch.bfloat16, memory_format=torch.channels_last)
        forward = torch.compile(module) if kind == "compiled" else module
        return lambda images: call(forward, images.bfloat16())
    if kind == "naive":
        module.to(device)
        return lambda images: call(module, images)
    return lambda images: call(module, images.cpu()).to(device)


@torch.no_grad()
def call(module: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """Run a plain teacher in its own precision."""
    with torch.autocast("cuda", enabled=False):
        return module(images)


def step(
    student: nn.Module,
    optimizer: torch.optim.Optimizer,
    teacher: Callable[[torch.Tensor], torch.Tensor] | None,
    images: torch.Tensor,
    labels: torch.Tensor,
) -> torch.Tensor:
    """Train the student on one batch and return the loss, still on the device."""
    targets = teacher(images) if teacher else None
    with torch.autocast("cuda", torch.bfloat16):
        logits = student(images)
    loss = distillation_loss(logits, labels, targets)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def distillation_loss(
    logits: torch.Tensor, labels: torch.Tensor, targets: torch.Tensor | None
) -> torch.Tensor:
    """Return cross-entropy with the labels plus, where there are targets, the divergence from them."""
    loss = F.cross_entropy(logits.float(), labels)
    if targets is None:
        return loss
    soft = F.kl_div(
        F.log_softmax(logits.float() / TEMPERATURE, dim=1),
        F.softmax(targets.float() / TEMPERATURE, dim=1),
        reduction="batchmean",
    )
    return loss + soft * TEMPERATURE**2


def predict(student: nn.Module, batch: Batch, optimizer: torch.optim.Optimizer) -> int:
    """Return the reserved bytes that the estimate expects, and print its line."""
    estimate = estimate_vram(
        student, batch, loss=F.cross_entropy, optimizer=optimizer, autocast=torch.bfloat16
    )
    print(estimate.summary())
    return int(estimate.peak_reserved_bytes)


if __name__ == "__main__":
    main()
