"""The primitives compose: any pair of them, in one loop, trains exactly as the bare loop does."""

import contextlib
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torchfast import (
    DeviceLoader,
    GPUTeacher,
    VRAMMonitor,
    estimate_vram,
    inject_oom,
    oom_guard,
    to_channels_last,
)

SIX = ("to_channels_last", "DeviceLoader", "GPUTeacher", "estimate_vram", "VRAMMonitor", "oom_guard")
COMBINATIONS = [(), *itertools.combinations(SIX, 2), SIX]
ON_EACH_DEVICE = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])


def network() -> nn.Sequential:
    """Return a small convolutional classifier in double precision, where layouts agree to many digits."""
    layers = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
    return nn.Sequential(*layers).double()


def losses_with(used: tuple[str, ...], device: str) -> list[float]:
    """Return the losses of a distillation loop that uses the named primitives and is bare otherwise."""
    torch.manual_seed(0)
    batches: Any = [(torch.randn(8, 3, 8, 8).double(), torch.randint(10, (8,))) for _ in range(4)]
    student, module = network().to(device), network().eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.01)

    if "estimate_vram" in used:
        estimate_vram(student, batches[0], loss=F.cross_entropy, optimizer=optimizer, teacher=module)
    if "to_channels_last" in used:
        student = to_channels_last(student, optimizer=optimizer)
    teacher = GPUTeacher(module, device) if "GPUTeacher" in used else module.to(device)
    if "DeviceLoader" in used:
        batches = DeviceLoader(batches, device, channels_last="to_channels_last" in used)

    losses = []
    with contextlib.ExitStack() as stack:
        vram = stack.enter_context(VRAMMonitor(device)) if "VRAMMonitor" in used else None
        if "oom_guard" in used:
            batches = stack.enter_context(oom_guard(monitor=vram)).steps(batches)
        for images, labels in batches:
            with vram.phase("step") if vram else contextlib.nullcontext():
                inputs = images.to(device)
                targets = teacher(inputs)
                logits = student(inputs)
                loss = F.cross_entropy(logits, labels.to(device)) + F.mse_loss(logits, targets)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
    return losses


@ON_EACH_DEVICE
@pytest.mark.parametrize("used", COMBINATIONS, ids="+".join)
def test_any_pair_trains_as_the_bare_loop(used: tuple[str, ...], device: str) -> None:
    """Whatever is combined, the losses are those of the loop without torchfast."""
    assert losses_with(used, device) == pytest.approx(losses_with((), device), rel=1e-9)


@ON_EACH_DEVICE
def test_an_oom_in_a_composed_loop_is_explained(device: str) -> None:
    """With all six in one loop, running out of memory names a batch size, and the next epoch is whole."""
    batches = [(torch.randn(8, 3, 8, 8), torch.randint(10, (8,))) for _ in range(4)]
    loader = DeviceLoader(batches, device, channels_last=True)
    with VRAMMonitor(device) as vram, oom_guard(monitor=vram, reraise=False) as guard:
        for step, _ in enumerate(guard.steps(loader)):
            if step == 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert guard.report is not None
    assert guard.report.batch_size == 8
    assert guard.report.suggested_batch_size in range(1, 8)
    assert [labels.tolist() for _, labels in loader] == [labels.tolist() for _, labels in batches]


@ON_EACH_DEVICE
def test_a_composed_loop_that_fails_at_every_step_trains_as_the_bare_loop(device: str) -> None:
    """With a failure in each step, tried again whole, the losses are those of the loop without torchfast."""
    torch.manual_seed(0)
    batches = [(torch.randn(8, 3, 8, 8).double(), torch.randint(10, (8,))) for _ in range(4)]
    student, module = network().to(device), network().eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.01)
    student = to_channels_last(student, optimizer=optimizer)
    teacher = GPUTeacher(module, device)
    losses: list[float] = []
    with VRAMMonitor(device) as vram, oom_guard(monitor=vram) as guard:
        retry = guard.retry(model=student, optimizer=optimizer, copy=True)
        for batch in guard.steps(DeviceLoader(batches, device, channels_last=True)):
            fault = inject_oom(5 * len(losses), phase="backward")
            for attempt in retry.attempts(batch):
                with attempt, fault:
                    for (images, labels), weight in attempt:
                        targets, logits = teacher(images), student(images)
                        loss = F.cross_entropy(logits, labels) + F.mse_loss(logits, targets)
                        (loss * weight).backward()
                    optimizer.step()
                    optimizer.zero_grad()
            assert (attempt.number, fault.n_failures) == (2, 1)
            losses.append(loss.item())
    assert losses == pytest.approx(losses_with((), device), rel=1e-9)
