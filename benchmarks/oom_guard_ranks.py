"""Let one of two ranks run out of memory at random, 200 times: none may hang, and both must end alike.

PYTHONPATH=. python benchmarks/oom_guard_ranks.py [gloo] [nccl]

Each fault hits one rank, in the forward pass, the backward pass or the optimizer's step. On a GPU half of
the faults are real: something fills the memory that the process may use but for a part of what the phase
needs, and the allocator fails wherever that runs out. Two ranks share one GPU if there is only one; NCCL then
takes them for two machines, and talks over the loopback interface.
"""

import datetime as dt
import gc
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import record
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from torchfast import inject_oom, oom_guard

Phase = Literal["forward", "backward", "optimizer"]
PHASES: tuple[Phase, ...] = ("forward", "backward", "optimizer")
N_RANKS = 2
N_FAULTS = int(os.environ.get("TORCHFAST_RANK_FAULTS", "200"))
N_MOST_STEPS = 2 * N_FAULTS
LIMIT_BYTES = 2 * 2**30
LIMIT_S = float(os.environ.get("TORCHFAST_RANKS_LIMIT_S", "400"))


class Fault(NamedTuple):
    """What happens to one rank in one step: the same choice on all ranks."""

    rank: int
    phase: Phase
    is_real: bool
    where: float  # the part of the phase's operators, or of its memory, that is got through


class Training:
    """A rank's model in training, and the ways to fail in one of its steps."""

    def __init__(self, rank: int, device: torch.device) -> None:
        self.rank, self.device = rank, device
        width, self.n_samples = (1024, 4096) if device.type == "cuda" else (8, 16)
        torch.manual_seed(0)
        blocks = [[nn.Linear(width, width), nn.BatchNorm1d(width), nn.GELU()] for _ in range(3)]
        layers = [layer for block in blocks for layer in block]
        self.width = width
        self.model = DistributedDataParallel(nn.Sequential(*layers, nn.Linear(width, 10)).to(device))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, foreach=True)
        self.guard = oom_guard(device=device)
        self.retry = self.guard.retry(model=self.model, optimizer=self.optimizer, copy=True, timeout_s=30)
        self.n_operators = Counter[str]()
        self.need_bytes = Counter[str]()

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return this rank's batch of a step."""
        generator = torch.Generator().manual_seed(1000 * step + self.rank)
        samples = torch.randn(64, self.width, generator=generator).repeat(self.n_samples // 64 or 1, 1)
        labels = torch.randint(10, (len(samples),), generator=generator)
        return samples.to(self.device), labels.to(self.device)

    def step(self, index: int, fault: Fault | None) -> int:
        """Take one step with a fault in it, and return how many attempts that took."""
        for attempt in self.retry.attempts(self.batch(index)):
            own = fault if fault is not None and attempt.number == 1 and fault.rank == self.rank else None
            with attempt:
                for (samples, labels), weight in attempt:
                    with self._phase("forward", own) as ballast:
                        loss = F.cross_entropy(self.model(samples), labels) * weight
                    with self._phase("backward", own) as ballast:
                        loss.backward()
                with self._phase("optimizer", own) as ballast:
                    self.optimizer.step()
                self.optimizer.zero_grad()
                del ballast
        return attempt.number

    def measure(self) -> None:
        """Find out how many operators each phase has, and how much memory it takes."""
        for index in range(2):  # the first step makes the optimizer's state
            self._measured(index)

    def state(self) -> list[torch.Tensor]:
        """Return all that the ranks must have in common at the end."""
        moments = [t for state in self.optimizer.state.values() for t in state.values()]
        return [t.cpu() for t in [*self.model.module.state_dict().values(), *moments]]

    def _measured(self, index: int) -> None:
        for attempt in self.retry.attempts(self.batch(index)):
            with attempt:
                for (samples, labels), weight in attempt:
                    with Measured(self, "forward"):
                        loss = F.cross_entropy(self.model(samples), labels) * weight
                    with Measured(self, "backward"):
                        loss.backward()
                with Measured(self, "optimizer"):
                    self.optimizer.step()
                self.optimizer.zero_grad()

    def _phase(self, phase: Phase, fault: Fault | None) -> "inject_oom | Full":
        if fault is None or fault.phase != phase:
            return inject_oom(times=0)
        if fault.is_real:
            return Full(self.device, leave_bytes=int(fault.where * self.need_bytes[phase]))
        return inject_oom(int(fault.where * self.n_operators[phase]))


class Full:
    """Fill the memory that this process may use, but for some bytes, while a phase runs."""

    def __init__(self, device: torch.device, leave_bytes: int) -> None:
        self._device, self._leave_bytes = device, leave_bytes

    def __enter__(self) -> list[torch.Tensor]:
        """Return what fills the memory: the failed block is what holds it."""
        torch.cuda.empty_cache()
        room_bytes = LIMIT_BYTES - torch.cuda.memory_reserved(self._device) - self._leave_bytes
        n_bytes = max(room_bytes, 0) // 2**21 * 2**21
        return [torch.empty(n_bytes, dtype=torch.uint8, device=self._device)]

    def __exit__(self, *_: object) -> None:
        """Leave it to the guard."""


class Measured(inject_oom):
    """Count the operators of a phase, and what it takes at most."""

    def __init__(self, training: Training, phase: Phase) -> None:
        super().__init__(times=0)
        self._training, self._of = training, phase
        self._start_bytes = 0

    def __enter__(self) -> Self:
        """Begin to count."""
        super().__enter__()
        if self._training.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._training.device)
            self._start_bytes = torch.cuda.memory_allocated(self._training.device)
        return self

    def __exit__(self, *error: Any) -> None:  # noqa: PYI036 -- passed on
        """Note what was counted."""
        super().__exit__(*error)
        self._training.n_operators[self._of] = self.n_operators
        if self._training.device.type == "cuda":
            peak_bytes = torch.cuda.max_memory_allocated(self._training.device)
            self._training.need_bytes[self._of] = peak_bytes - self._start_bytes


def fault_of(step: int, *, has_gpu: bool) -> Fault:
    """Return the fault of a step."""
    chance = random.Random(step)  # noqa: S311 -- reproducible, not secret
    return Fault(
        rank=chance.randrange(N_RANKS),
        phase=chance.choice(PHASES),
        is_real=has_gpu and chance.random() < 0.5,
        where=0.9 * chance.random(),
    )


def rank_main(rank: int, backend: str, folder: str) -> None:
    """Train with faults, then as many steps without, and leave what came of it in a file."""
    torch.set_num_threads(1)
    gc.freeze()  # what is imported by now is not walked after each fault
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        total_bytes = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(LIMIT_BYTES / total_bytes, device)
        torch.use_deterministic_algorithms(mode=True)
    dist.init_process_group(
        backend,
        f"file://{folder}/store",
        rank=rank,
        world_size=N_RANKS,
        timeout=dt.timedelta(seconds=60),
    )
    row = campaign(rank, device)
    torch.save(row, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def campaign(rank: int, device: torch.device) -> dict[str, Any]:
    """Return what this rank saw of the faults, and the states at the end with and without them."""
    faulty = Training(rank, device)
    faulty.measure()
    counts, seconds, index = Counter[str](), [], 2
    while counts["faults"] < N_FAULTS and index < N_MOST_STEPS:
        fault = fault_of(index, has_gpu=device.type == "cuda")
        start_s = time.perf_counter()
        n_attempts = faulty.step(index, fault)
        seconds.append(time.perf_counter() - start_s)
        if n_attempts > 1:
            counts["faults"] += 1
            counts[f"{'real' if fault.is_real else 'injected'}, {fault.phase}"] += 1
        index += 1
    clean = Training(rank, device)
    clean.measure()
    for step in range(2, index):
        clean.step(step, None)
    return {
        "counts": dict(counts),
        "n_steps": index,
        "longest_step_s": round(max(seconds), 2),
        "state": faulty.state(),
        "state_without_faults": clean.state(),
    }


def run(backend: str) -> dict[str, Any]:
    """Let the ranks do their work, at most so long, and compare how they ended."""
    shares_gpu = torch.cuda.device_count() == 1
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            multiprocessing.get_context("spawn").Process(target=_as_rank, args=(rank, backend, folder))
            for rank in range(N_RANKS)
        ]
        for process in ranks:
            process.start()
        end_s = time.monotonic() + LIMIT_S
        for process in ranks:
            process.join(max(0.0, end_s - time.monotonic()))
        hangs = [process.is_alive() for process in ranks]
        for process in ranks:
            process.kill()
            process.join()
        paths = [Path(folder) / f"{rank}.pt" for rank in range(N_RANKS)]
        if not all(path.exists() for path in paths):
            codes = [process.exitcode for process in ranks]
            return {"backend": backend, "n_faults": None, "n_hanging": sum(hangs), "exit_codes": codes}
        rows = [torch.load(path) for path in paths]
    return {
        "backend": backend,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "ranks_share_a_gpu": shares_gpu,
        "n_faults": rows[0]["counts"].pop("faults"),
        "faults": rows[0]["counts"],
        "n_steps": rows[0]["n_steps"],
        "longest_step_s": max(row["longest_step_s"] for row in rows),
        "n_hanging": sum(hangs),
        "n_different_across_ranks": n_different(rows[0]["state"], rows[1]["state"]),
        "n_different_from_no_faults": n_different(rows[0]["state"], rows[0]["state_without_faults"]),
        "n_tensors": len(rows[0]["state"]),
    }


def _as_rank(rank: int, backend: str, folder: str) -> None:
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # deterministic, and as large whatever is free
    if backend == "nccl" and torch.cuda.device_count() < N_RANKS:
        # Two ranks on one GPU are refused as a mistake unless they seem to be on two machines.
        os.environ.update(NCCL_HOSTID=f"rank-{rank}", NCCL_SOCKET_IFNAME="lo", NCCL_IB_DISABLE="1")
    rank_main(rank, backend, folder)


def n_different(state: list[torch.Tensor], other: list[torch.Tensor]) -> int:
    """Return how many tensors are not bit for bit the same."""
    return sum(not torch.equal(one, two) for one, two in zip(state, other, strict=True))


def main() -> None:
    """Run over the backends that were asked for, and write the result file."""
    rows = []
    for backend in sys.argv[1:] or ["gloo"]:
        rows.append(run(backend))
        print(rows[-1], flush=True)
    protocol = (
        f"Two ranks under DistributedDataParallel, {N_FAULTS} faults, each on one rank at a random point of "
        "a random phase; AdamW, copy=True; on a GPU each process may use 2 GiB of it."
    )
    print(record.write("oom_guard_ranks", protocol, rows))


if __name__ == "__main__":
    main()
