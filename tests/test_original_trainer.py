"""What the hardening of the original image-distillation trainer asked for, each demand as a test.

Every test runs on the CPU; those that speak of a GPU run there too.
"""

import json
from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset, get_worker_info

from torchfast import DeviceLoader, GPUTeacher, VRAMMonitor, estimate_vram, oom_guard, to_channels_last

Batch = dict[str, Any]

ON_EACH_DEVICE = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])


def network() -> nn.Sequential:
    """Return a small convolutional classifier of 10 classes."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def batches(n_batches: int = 6, batch_size: int = 16) -> list[Batch]:
    """Return batches of inputs, targets and metadata, the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "image": torch.randn(batch_size, 3, 16, 16, generator=generator),
            "label": torch.randint(10, (batch_size,), generator=generator),
            "meta": {"weight": torch.rand(batch_size, generator=generator), "name": f"batch {index}"},
        }
        for index in range(n_batches)
    ]


def loss_of(model: nn.Module, batch: Batch, teacher: GPUTeacher | None = None) -> torch.Tensor:
    """Return the weighted loss of a batch, with the teacher's opinion if there is one."""
    logits = model(batch["image"])
    loss = (F.cross_entropy(logits, batch["label"], reduction="none") * batch["meta"]["weight"]).mean()
    if teacher is not None:
        loss = loss + F.mse_loss(logits, teacher(batch["image"]))
    return cast(torch.Tensor, loss)


@ON_EACH_DEVICE
def test_parameters_and_batches_are_channels_last(device: str) -> None:
    """Where the model trains, its convolution weights and the images it is given are channels_last."""
    model = to_channels_last(network().to(device))
    weight = model.get_parameter("0.weight")
    for batch in DeviceLoader(batches(), device, channels_last=True):
        image = batch["image"]
        assert (image.device.type, weight.device.type) == (device, device)
        assert image.is_contiguous(memory_format=torch.channels_last)
        assert weight.is_contiguous(memory_format=torch.channels_last)
        assert model[:3](image).is_contiguous(memory_format=torch.channels_last)


def trained(loader: Any, device: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Return the losses and the weights of two epochs over the loader."""
    torch.manual_seed(1)
    model = network().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(2):
        for batch in loader:
            loss = loss_of(model, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses, model.state_dict()


class CopiedOneByOne:
    """The bare loop: every tensor copied on its own, blocking."""

    def __init__(self, host: list[Batch], device: str) -> None:
        self.host, self.device = host, device

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches with every tensor moved."""
        for batch in self.host:
            meta = {**batch["meta"], "weight": batch["meta"]["weight"].to(self.device)}
            yield {
                "image": batch["image"].to(self.device),
                "label": batch["label"].to(self.device),
                "meta": meta,
            }


@ON_EACH_DEVICE
def test_training_is_identical_with_non_blocking_transfers(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inputs, targets and metadata brought ahead of use train just as blocking copies do."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    losses, weights = trained(DeviceLoader(batches(), device), device)
    expected_losses, expected_weights = trained(CopiedOneByOne(batches(), device), device)
    assert losses == expected_losses
    assert all(torch.equal(weights[name], expected_weights[name]) for name in weights)


class WorkerNumbers(Dataset[int]):
    """A dataset whose samples are the process numbers of the workers that load them."""

    def __len__(self) -> int:
        """Return the number of samples."""
        return 8

    def __getitem__(self, index: int) -> int:
        """Return who loads it."""
        import os

        assert get_worker_info() is not None
        return os.getpid()


@ON_EACH_DEVICE
def test_workers_of_epoch_2_are_those_of_epoch_1(device: str) -> None:
    """A loader made from a dataset keeps its workers from one epoch to the next."""
    loader = DeviceLoader.from_dataset(WorkerNumbers(), device, batch_size=1, num_workers=2)
    epochs = [{int(process) for process in loader} for _ in range(2)]
    assert len(epochs[0]) == 2
    assert epochs[0] == epochs[1]


@ON_EACH_DEVICE
def test_the_teacher_stays_on_its_device_while_it_teaches(device: str) -> None:
    """All through distillation the teacher is where the student trains, whatever is done to the student."""
    student = to_channels_last(network().to(device))
    teacher = GPUTeacher(network(), device)
    setattr(student, "teacher", teacher)  # noqa: B010  an attribute that mypy takes for a submodule
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    for batch in DeviceLoader(batches(), device, channels_last=True):
        student.train()
        loss_of(student, batch, teacher).backward()
        optimizer.step()
        assert teacher.device.type == device
        assert teacher(batch["image"]).device.type == device
    assert not any(name.startswith("teacher") for name in student.state_dict())


@ON_EACH_DEVICE
def test_the_teacher_loads_under_no_grad(device: str, tmp_path: Any) -> None:
    """Nothing of the teacher's loading or use enters an autograd graph."""
    from safetensors.torch import save_file

    save_file(network().state_dict(), tmp_path / "teacher.safetensors")
    teacher = GPUTeacher.from_checkpoint(network, tmp_path / "teacher.safetensors", device)
    assert all(p.is_leaf and not p.requires_grad for p in teacher.module.parameters())
    assert not teacher(torch.randn(2, 3, 16, 16, requires_grad=True)).requires_grad


def test_the_estimate_is_one_line_for_the_log() -> None:
    """When a run starts, one line tells what it will need, with the teacher and the batch size in it."""
    images = torch.randn(32, 3, 16, 16)
    labels = torch.randint(10, (32,))
    model = network()
    estimate = estimate_vram(
        model, (images, labels), loss=F.cross_entropy, optimizer=torch.optim.AdamW, teacher=network()
    )
    line = estimate.summary()
    assert "\n" not in line
    assert "teacher" in line
    assert "32" in line


def test_an_oom_in_the_loop_names_the_batch_size_to_try() -> None:
    """Running out of memory in the loop tells the user to lower the batch size, and to which value."""
    with pytest.raises(torch.OutOfMemoryError) as error, oom_guard() as guard:  # noqa: PT012  the loop is the test
        for batch in guard.steps(batches(batch_size=64)):
            loss_of(network(), batch)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert guard.report is not None
    suggested = guard.report.suggested_batch_size
    assert suggested is not None
    assert 1 <= suggested < 64
    assert f"Try batch_size={suggested} instead of 64" in str(error.value)


@ON_EACH_DEVICE
def test_the_status_of_a_running_training_carries_current_vram(device: str) -> None:
    """A training UI gets one JSON record, and on a GPU it tells how much VRAM is used right now."""
    model = network().to(device)
    with VRAMMonitor(device) as vram:
        for batch in DeviceLoader(batches(), device):
            loss_of(model, batch).backward()
            status = vram.status()
    assert json.loads(json.dumps(status)) == status
    if device == "cuda":
        assert status["tensors_bytes"] > 0
        assert status["total_bytes"] > status["free_bytes"] > 0
