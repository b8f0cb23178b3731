"""What the ranks do in the tests of a loader on several: run by torchrun, `loader_ranks.py FOLDER DEVICE`.

DEVICE is "cpu", "cuda:0" for ranks that share a GPU, or "cuda" for one GPU a rank.
"""

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from torchfast import DeviceLoader

N_RANKS, N_EPOCHS, N_SAMPLES = 2, 3, 42


def run_ranks(folder: Path, device: str, backend: str = "gloo") -> list[dict[str, Any]]:
    """Return what each rank found, run by torchrun as a user would run them."""
    launch = ["torch.distributed.run", "--nproc-per-node", str(N_RANKS), "--rdzv-backend", "c10d"]
    command = [sys.executable, "-m", *launch, "--rdzv-endpoint", "localhost:0", __file__]
    root = Path(__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [*command, str(folder), device, backend],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
        env=environment,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(N_RANKS)]


def main(folder: str, device: str, backend: str) -> None:
    """Train over a DeviceLoader and over the bare loader; leave the orders and the weights in a file."""
    rank = int(os.environ["RANK"])
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    if device != "cpu":
        torch.cuda.set_device(device)
        torch.backends.cudnn.deterministic = True
    dist.init_process_group(backend)
    ours: DeviceLoader[Any] = DeviceLoader(sharded(), device)
    found = {
        "device": str(ours.device),
        "ours": train(ours, ours, device),
        "bare": train(bare := sharded(), bare.sampler, device),
        "after_a_break": after_a_break(ours),
    }
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def sharded() -> DataLoader[Any]:
    """Return this rank's loader, with workers that stay."""
    numbers = torch.arange(N_SAMPLES)
    samples = torch.randn(N_SAMPLES, 5, generator=torch.Generator().manual_seed(2))
    dataset = TensorDataset(numbers, samples)
    sampler: DistributedSampler[Any] = DistributedSampler(dataset)
    return DataLoader(dataset, batch_size=4, sampler=sampler, num_workers=1, persistent_workers=True)


def train(loader: Iterable[Any], told: Any, device: str) -> dict[str, Any]:
    """Train for some epochs, of each of which `told` is told; return the orders and the weights."""
    torch.manual_seed(1)
    model = DistributedDataParallel(torch.nn.Linear(5, 1).to(device))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    orders = []
    for epoch in range(N_EPOCHS):
        told.set_epoch(epoch)
        seen = []
        for numbers, samples in loader:
            seen.append(numbers)
            optimizer.zero_grad()
            model(samples.to(device)).square().mean().backward()
            optimizer.step()
        orders.append(torch.cat(seen).tolist())
    return {"orders": orders, "weights": [p.detach().cpu() for p in model.parameters()]}


def after_a_break(loader: DeviceLoader[Any]) -> list[int]:
    """Leave an epoch early, and return the order of the first epoch taken again."""
    for _ in loader:
        break
    loader.set_epoch(0)
    return [int(number) for numbers, _ in loader for number in numbers]


if __name__ == "__main__":
    main(*sys.argv[1:])
