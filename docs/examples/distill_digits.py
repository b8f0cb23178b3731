"""Distil a reader of handwritten digits, with all six primitives of torchfast.

scikit-learn ships 1,797 real handwritten digits. A convolutional teacher learns from 1,297 of them and is
saved as safetensors. A student of a sixtieth its size is then trained twice on the same images, of which only
100 have a label for it: once alone, once with the teacher's opinion on every image. The other 500 digits
judge all three.

    python docs/examples/distill_digits.py [--epochs 12] [--batch-size 64] [--device cuda]
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import Dataset
from tqdm import tqdm

from torchfast import DeviceLoader, GPUTeacher, VRAMMonitor, estimate_vram, oom_guard, to_channels_last

TEMPERATURE = 2.0
N_TRAINING = 1297
N_LABELLED = 100


def main() -> None:
    """Train the teacher, then the student alone and with the teacher, and say what came of it."""
    parser = argparse.ArgumentParser(description="Distil a reader of handwritten digits.")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", default=None, help="the current accelerator, else the CPU")
    options = parser.parse_args()
    torch.manual_seed(0)
    training, test = read_digits()
    loader: DeviceLoader[dict[str, Any]] = DeviceLoader.from_dataset(
        training,
        options.device,
        batch_size=options.batch_size,
        shuffle=True,
        num_workers=1,
        channels_last=True,
    )

    print("The teacher sees every label.")
    teacher = teacher_network()
    train(teacher, loader, options.epochs, all_labels=True)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "teacher.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in teacher.state_dict().items()}, checkpoint)
        frozen = GPUTeacher.from_checkpoint(teacher_network, checkpoint, loader.device)

    print(f"\nThe student, alone, sees {N_LABELLED} labels.")
    alone = student_network()
    distilled = student_network()
    distilled.load_state_dict(alone.state_dict())
    train(alone, loader, options.epochs)

    print(f"\nThe student, from the same start, sees {N_LABELLED} labels and the teacher's opinions.")
    train(distilled, loader, options.epochs, teacher=frozen)

    scores = [accuracy(model, test, loader.device) for model in (teacher, alone, distilled)]
    print(f"\nAccuracy on {len(test[1])} digits that none of them has seen:")
    for name, score in zip(("teacher", "student alone", "student distilled"), scores, strict=True):
        print(f"  {name:<18} {score:6.1%}")
    gain = scores[2] - scores[1]
    print(f"Distillation {'helped' if gain > 0 else 'did not help'}: {100 * gain:+.1f} points.")


def train(
    model: nn.Module,
    loader: DeviceLoader[dict[str, Any]],
    n_epochs: int,
    *,
    teacher: GPUTeacher | None = None,
    all_labels: bool = False,
) -> None:
    """Train a model in place, and report speed and memory."""
    model.to(loader.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=n_epochs * len(loader))
    to_channels_last(model, optimizer=optimizer)

    sample = (torch.zeros(loader.batch_size, 1, 8, 8), torch.zeros(loader.batch_size, dtype=torch.long))
    estimate = estimate_vram(model, sample, loss=F.cross_entropy, optimizer=optimizer, teacher=teacher)
    print(estimate.summary())

    start_s = time.perf_counter()
    progress = tqdm(total=n_epochs * len(loader), unit="step")
    with progress, VRAMMonitor(loader.device) as vram, oom_guard(monitor=vram) as guard:
        for _ in range(n_epochs):
            for batch in guard.steps(loader):
                targets = teacher(batch["image"]) if teacher else None
                with vram.phase("forward"):
                    loss = loss_of(model(batch["image"]), batch, targets, all_labels=all_labels)
                with vram.phase("backward"):
                    loss.backward()
                with vram.phase("optimizer"):
                    optimizer.step()
                    optimizer.zero_grad()
                    schedule.step()
                progress.update()
            progress.set_postfix_str(vram.line())
    n_samples = n_epochs * len(loader.dataset)
    print(f"{n_samples / (time.perf_counter() - start_s):,.0f} samples/s; loss {loss.item():.3f}")
    if vram.peak.allocated_bytes is not None:
        predicted, observed = estimate.peak_allocated_bytes, vram.peak.allocated_bytes
        print(f"peak allocated: {format_mib(predicted)} predicted, {format_mib(observed)} observed")


def loss_of(
    logits: torch.Tensor, batch: dict[str, Any], targets: torch.Tensor | None, *, all_labels: bool
) -> torch.Tensor:
    """Return the cross-entropy of the labels that may be seen, and the divergence from the targets."""
    seen = torch.ones_like(batch["is_labelled"]) if all_labels else batch["is_labelled"]  # (N,)
    losses = F.cross_entropy(logits, batch["label"], reduction="none")  # (N,)
    loss = (losses * seen).sum() / seen.sum().clamp(min=1)
    if targets is None:
        return loss
    soft = F.kl_div(
        F.log_softmax(logits / TEMPERATURE, dim=1),
        F.softmax(targets / TEMPERATURE, dim=1),
        reduction="batchmean",
    )
    return loss + soft * TEMPERATURE**2


class Digits(Dataset[dict[str, Any]]):
    """Digits of which the first few have a label for the student."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        """Return the number of digits."""
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one digit, (1, 8, 8), its label, and whether the student may see it."""
        return {"image": self.images[index], "label": self.labels[index], "is_labelled": index < N_LABELLED}


def read_digits() -> tuple[Digits, tuple[torch.Tensor, torch.Tensor]]:
    """Return the training digits, and images (N, 1, 8, 8) and labels (N,) of the test digits."""
    digits = load_digits()
    order = torch.randperm(len(digits.target))
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1)[order] / 16
    labels = torch.tensor(digits.target)[order]
    return Digits(images[:N_TRAINING], labels[:N_TRAINING]), (images[N_TRAINING:], labels[N_TRAINING:])


def block(n_inputs: int, n_outputs: int) -> nn.Sequential:
    """Return a convolution with its norm and activation."""
    convolution = nn.Conv2d(n_inputs, n_outputs, 3, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(n_outputs), nn.ReLU())


def teacher_network() -> nn.Module:
    """Return a network of 260,000 parameters."""
    return nn.Sequential(
        block(1, 64),
        block(64, 64),
        nn.MaxPool2d(2),
        block(64, 128),
        block(128, 128),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(128, 10),
    )


def student_network() -> nn.Module:
    """Return a network of 4,000 parameters."""
    return nn.Sequential(block(1, 8), nn.MaxPool2d(2), block(8, 16), nn.Flatten(), nn.Linear(256, 10))


@torch.no_grad()
def accuracy(model: nn.Module, test: tuple[torch.Tensor, torch.Tensor], device: torch.device) -> float:
    """Return the share of digits that the model reads right."""
    images, labels = test
    right = model.eval()(images.to(device)).argmax(dim=1) == labels.to(device)
    return float(right.float().mean())


def format_mib(n_bytes: int) -> str:
    """Write bytes as MiB."""
    return f"{n_bytes / 2**20:.1f} MiB"


if __name__ == "__main__":
    main()
