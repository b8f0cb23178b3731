"""`torchfast-calibrate`: measures what a process holds on this GPU beside its tensors, and writes it down.

A second process goes through three stages: a training step without a library, the first matrix products, the
first convolutions and attention. The first process watches the device's memory from outside, which needs no
NVML and works in containers. Nothing else should run on the GPU meanwhile.
"""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F

from torchfast._bytes import MIB, format_bytes
from torchfast._estimate.gpus import MeasuredContext, calibration_file

_N_RUNS = 2


def main() -> None:
    """Measure the current GPU and write the result where estimates look for it."""
    if not torch.cuda.is_available():
        raise SystemExit(
            "torchfast-calibrate measures the GPU of the machine it runs on, but PyTorch finds no CUDA GPU "
            "here. Run it on the machine that will train; estimates made there use the result by themselves."
        )
    name = torch.cuda.get_device_name()
    context = measure()
    path = write(name, context)
    print(  # noqa: T201 -- a command's answer
        f"{name}: {format_bytes(context.bare_bytes)} bare, {format_bytes(context.blas_bytes)} more with "
        f"matrix products, {format_bytes(context.dnn_bytes)} more with convolutions and attention; "
        f"written to {path}"
    )


def measure() -> MeasuredContext:
    """Measure the context of a fresh process on the current GPU, stage by stage."""
    runs = [_one_run() for _ in range(_N_RUNS)]
    bare, blas, dnn = (max(run[i] for run in runs) for i in range(3))
    spread = max(abs(a - b) for a, b in zip(*runs, strict=True))
    return MeasuredContext(
        bare_bytes=bare,
        blas_bytes=max(blas - bare, 0),
        dnn_bytes=max(dnn - blas, 0),
        spread_bytes=max(spread, 16 * MIB),
        source=f"measured on this machine with torch {torch.__version__}",
    )


def write(name: str, context: MeasuredContext) -> str:
    """Add a measurement to the file in the user's cache folder, and return the file's path."""
    path = calibration_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(path.read_text()) if path.exists() else {}
    known[name] = dataclasses.asdict(context)
    path.write_text(json.dumps(known, indent=1) + "\n")
    return str(path)


def _one_run() -> list[int]:
    """Return the context after each stage, seen from outside."""
    torch.zeros(1, device="cuda")
    before = _used()
    command = [sys.executable, "-c", "from torchfast._estimate import calibrate; calibrate.child()"]
    found = []
    # S603: the command is this interpreter and a constant.
    with subprocess.Popen(  # noqa: S603
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None  # noqa: S101 -- both were asked for
        assert process.stdout is not None  # noqa: S101
        for reserved in process.stdout:
            found.append(_used() - before - int(reserved))
            process.stdin.write("go on\n")
            process.stdin.flush()
    if len(found) != len(STAGES):
        raise SystemExit(
            f"torchfast-calibrate starts a second process that computes on the GPU; it ended with code "
            f"{process.returncode} after {len(found)} of {len(STAGES)} stages, its own words are above. "
            "Nothing was written."
        )
    return found


def _used() -> int:
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return total - free


# --- what the second process does --------------------------------------------------------------------------


def child() -> None:
    """Run the stages; after each, print what PyTorch has reserved and wait to be told to go on."""
    for stage in STAGES:
        stage()
        torch.cuda.synchronize()
        print(torch.cuda.memory_reserved(), flush=True)  # noqa: T201 -- the first process reads it
        sys.stdin.readline()


def _bare() -> None:
    weight = torch.randn(64, 64, device="cuda", requires_grad=True)
    F.cross_entropy(F.dropout(weight.exp()), torch.arange(64, device="cuda")).backward()
    torch.optim.AdamW([weight]).step()


def _products() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(256, 256, device="cuda", dtype=dtype, requires_grad=True)
        F.linear(x, x, x[0]).sum().backward()
        torch.bmm(x.reshape(4, 64, 256), x.reshape(4, 256, 64)).sum().backward()


def _convolutions() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(4, 32, 32, 32, device="cuda", dtype=dtype, requires_grad=True)
        weight = torch.randn(32, 32, 3, 3, device="cuda", dtype=dtype, requires_grad=True)
        F.batch_norm(F.conv2d(x, weight, padding=1), None, None, training=True).sum().backward()
        F.scaled_dot_product_attention(x, x, x).sum().backward()


STAGES: tuple[Callable[[], None], ...] = (_bare, _products, _convolutions)
