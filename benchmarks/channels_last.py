"""Whether channels_last pays: `python benchmarks/channels_last.py`.

Training steps (forward, backward, SGD) of image models under bfloat16 autocast, in the plain layout, in
channels_last always, and as `to_channels_last(sample=...)` chooses. Among them are models that lose by it.
The score is the geometric mean of the speed-up over plain; choosing costs what `choice_s` says.

Gradients are compared with the plain layout's before anything is timed.
"""

import argparse
import copy
import math
import time
from typing import Any

import record
import torch
from torch import nn

from torchfast import LayoutReport, to_channels_last

MODELS = (
    "resnet50",
    "efficientnet_b0",
    "regnety_032",
    "convnext_tiny",
    "resnet50_gn",
    "convmixer_768_32",
    "vgg16",
    "vit_small_patch16_224",
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROTOCOL = (
    "Training step at 224 px under bfloat16 autocast, batch as given, fused SGD with momentum; 7 samples of "
    "5 steps, the GPU drained around each. The chosen layout is that of to_channels_last(sample=images)."
)


def main() -> None:
    """Measure all models and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    options = parser.parse_args()
    rows = [measure(name, options.batch_size) for name in options.models]
    scores = {
        f"{kind}_geomean": geomean([row[kind] for row in rows]) for kind in ("always", "chosen", "best")
    }
    print(scores, record.write("channels_last", PROTOCOL, rows, scores=scores))


def geomean(values: list[float]) -> float:
    """Return the geometric mean."""
    return math.exp(math.fsum(math.log(value) for value in values) / len(values))


def measure(name: str, batch_size: int) -> dict[str, Any]:
    """Return times of both layouts and of the choice, with speed-ups over plain."""
    import timm

    torch.manual_seed(0)
    plain: nn.Module = timm.create_model(name).to(DEVICE).train()
    images = torch.randn(batch_size, 3, 224, 224, device=DEVICE)
    check(plain, images[:4])
    converted, chosen = copy.deepcopy(plain), copy.deepcopy(plain)
    reports: list[LayoutReport] = []
    start_s = time.perf_counter()
    with torch.autocast(DEVICE, torch.bfloat16):
        to_channels_last(chosen, sample=images, report=reports.append)
    choice_s = time.perf_counter() - start_s
    plain_samples = step_samples(plain, images)
    samples = step_samples(to_channels_last(converted), to_channels_last(images))
    plain_ms, channels_last_ms = record.median(plain_samples), record.median(samples)
    chosen_ms = channels_last_ms if reports[0].channels_last else plain_ms
    row = {
        "name": name,
        "batch_size": batch_size,
        "plain_ms": plain_ms,
        "channels_last_ms": channels_last_ms,
        "is_chosen": reports[0].channels_last,
        "choice_s": choice_s,
        "report": str(reports[0]),
        "always": plain_ms / channels_last_ms,
        "chosen": plain_ms / chosen_ms,
        "best": plain_ms / min(plain_ms, channels_last_ms),
        "plain_samples_ms": plain_samples,
        "channels_last_samples_ms": samples,
    }
    print(
        f"{name:24s} {plain_ms:8.2f} {channels_last_ms:8.2f} ms  {choice_s:5.2f} s  {reports[0]}", flush=True
    )
    return row


def check(model: nn.Module, images: torch.Tensor) -> None:
    """Compare the gradients of both layouts in float64."""
    gradients = []
    for channels_last in (False, True):
        copied = copy.deepcopy(model).double().eval()
        to_channels_last(copied, enabled=channels_last)
        copied(to_channels_last(images.double(), enabled=channels_last)).square().sum().backward()
        gradients.append([parameter.grad for parameter in copied.parameters() if parameter.grad is not None])
    for ours, theirs in zip(*gradients, strict=True):
        moved = float((theirs - ours).abs().max())
        if not moved <= 1e-6 * float(ours.abs().max()) + 1e-9:
            raise AssertionError(f"a gradient moved by {moved:.2g} of {float(ours.abs().max()):.2g}")


def step_samples(model: nn.Module, images: torch.Tensor) -> list[float]:
    """Return times of a training step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, fused=True)

    def step() -> None:
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = model(images).float().logsumexp(1).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    samples: list[float] = record.times_ms(step, n_samples=7, n_steps=5, n_warmup=5)
    return samples


if __name__ == "__main__":
    main()
