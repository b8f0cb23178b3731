"""What two ranks do in the tests of several ranks: training steps in which one of them runs out of memory."""

import datetime as dt
import gc
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from torchfast import OutOfMemoryError, inject_oom, oom_guard
from torchfast._oom import ranks

N_RANKS = 2
N_SAMPLES = 8
N_FAULTS = int(os.environ.get("TORCHFAST_RANK_FAULTS", "25"))


def small_net() -> nn.Sequential:
    """Return a net with a buffer and, at the end, a parameter that is never used."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, momentum=0.2), nn.ReLU(), nn.Linear(8, 3))
    net.register_parameter("unused", nn.Parameter(torch.ones(2)))
    return net


def batch_of(step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the batch of a rank at a step."""
    generator = torch.Generator("cpu").manual_seed(100 * step + rank)
    samples = torch.randn(N_SAMPLES, 6, generator=generator, device="cpu")
    labels = torch.randint(3, (N_SAMPLES,), generator=generator, device="cpu")
    return samples.to(torch.get_default_device()), labels.to(torch.get_default_device())


def run_ranks(folder: Path, names: list[str], backend: str = "gloo") -> list[dict[str, Any]]:
    """Return what each rank got from the work of these names, done by two processes in a group."""
    spawn(in_group, args=(str(folder), names, backend), nprocs=N_RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(N_RANKS)]


def in_group(rank: int, folder: str, names: list[str], backend: str) -> None:
    """Join the group, do all the work, and leave the results in a file."""
    torch.set_num_threads(1)
    gc.freeze()  # what is imported by now is not walked after each fault
    if backend == "nccl":
        n_gpus = torch.cuda.device_count()
        if n_gpus < N_RANKS:  # two ranks on one GPU are refused, unless they seem to be on two machines
            os.environ.update(NCCL_HOSTID=f"rank-{rank}", NCCL_SOCKET_IFNAME="lo", NCCL_IB_DISABLE="1")
        torch.cuda.set_device(rank % n_gpus)
        torch.set_default_device("cuda")
    dist.init_process_group(
        backend,
        f"file://{folder}/store",
        rank=rank,
        world_size=N_RANKS,
        timeout=dt.timedelta(seconds=60),  # what hangs is to fail
    )
    torch.save({name: WORK[name](rank) for name in names}, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def train(
    rank: int,
    n_steps: int,
    fault: Callable[[int], inject_oom],
    *,
    n_bare: int = 0,
    **options: Any,
) -> list[torch.Tensor]:
    """Train for some steps, the first few by DDP itself and the others with a fault; return the state."""
    model = DistributedDataParallel(small_net(), find_unused_parameters=n_bare > 0, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    retry = oom_guard().retry(model=model, optimizer=optimizer, copy=True, timeout_s=20)
    for step in range(n_steps):
        batch = batch_of(step, rank)
        if step < n_bare:
            F.cross_entropy(model(batch[0]), batch[1]).backward()
            optimizer.step()
            optimizer.zero_grad()
            continue
        injection = fault(step)
        for attempt in retry.attempts(batch):
            with attempt, injection:
                for (samples, labels), weight in attempt:
                    (F.cross_entropy(model(samples), labels) * weight).backward()
                optimizer.step()
                optimizer.zero_grad()
    return [t.cpu() for t in model.module.state_dict().values()]


def no_fault(_: int) -> inject_oom:
    """Return an injection that only counts."""
    return inject_oom(times=0)


def random_fault(step: int) -> inject_oom:
    """Return a fault on one rank at a random operator of a random phase: the same choice on both ranks."""
    chance = random.Random(step)  # noqa: S311 -- reproducible, not secret
    phase, n_operators = chance.choice([("forward", 12), ("backward", 30), ("optimizer", 8)])
    return inject_oom(
        chance.randrange(n_operators),
        phase=cast(Any, phase),
        rank=chance.randrange(N_RANKS),
    )


def same(state: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    """Tell whether two states are bit for bit the same."""
    return all(torch.equal(one, two) for one, two in zip(state, other, strict=True))


def parameters_of(state: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the parameters of a state."""
    names = list(small_net().state_dict())
    kept = dict(small_net().named_parameters())
    return [tensor for name, tensor in zip(names, state, strict=True) if name in kept]


def work_large(rank: int) -> list[torch.Tensor]:
    """Train with a bucket so small that most gradients and buffers are larger, and go alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "_BUCKET_BYTES", 20)
        return train(rank, 4, random_fault)


def work_bare_first(rank: int) -> int:
    """Let DDP average one step, fail on rank 1 before the next forward pass, and count the attempts."""
    model = DistributedDataParallel(nn.Linear(6, 3))
    retry = oom_guard().retry(model=model, timeout_s=20)
    samples, labels = batch_of(0, rank)
    F.cross_entropy(model(samples), labels).backward()
    injection = inject_oom(operator="clone", rank=1)
    for attempt in retry.attempts((samples, labels)):
        with attempt, injection:
            for (part, targets), _ in attempt:
                F.cross_entropy(model(part.clone()), targets).backward()
    return attempt.number


def work_kept_apart(rank: int) -> list[torch.Tensor | None]:
    """Train a net of which the wrapper is to ignore one parameter and one buffer, and return these two."""
    net = small_net()
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(net, ["3.bias", "1.running_mean"])
    model = DistributedDataParallel(net, find_unused_parameters=True)
    for attempt in oom_guard().retry(model=model, timeout_s=20).attempts(batch_of(0, rank)):
        with attempt:
            for (samples, labels), _ in attempt:
                F.cross_entropy(model(samples), labels).backward()
    return [model.get_parameter("module.3.bias").grad, model.get_buffer("module.1.running_mean")]


def work_large_halves(_: int) -> list[torch.Tensor | None]:
    """Average a gradient in half precision whose sum over the ranks would be infinite."""
    model = DistributedDataParallel(nn.Linear(1, 1, bias=False).half())
    for attempt in oom_guard().retry(model=model, timeout_s=20).attempts(torch.full((1, 1), 4e4).half()):
        with attempt:
            for samples, weight in attempt:
                (model(samples).sum() * weight).backward()
    return [p.grad for p in model.parameters()]


def work_alone(rank: int) -> str:
    """Make a retry in a group of one rank, of which the other knows nothing."""
    groups = [dist.new_group([other]) for other in range(N_RANKS)]
    if rank == 1:
        return "took no part"
    model = DistributedDataParallel(nn.Linear(6, 3), process_group=groups[rank])
    for attempt in oom_guard().retry(model=model, timeout_s=20).attempts(batch_of(0, rank)):
        with attempt:
            for (samples, labels), _ in attempt:
                F.cross_entropy(model(samples), labels).backward()
    return "done"


def work_groups_after_one_that_was_alone(rank: int) -> int:
    """Make a group of all ranks, after one of them has made a retry for itself; return how many it has."""
    work_alone(rank)
    one = torch.ones(1)
    dist.all_reduce(one, group=dist.new_group())
    return int(one)


def work_warm_up(_: int) -> list[dict[str, int]]:
    """Return the largest size of each kind of collective: in a step, and in the making of its retry."""
    model = DistributedDataParallel(small_net(), find_unused_parameters=True)
    seen: list[dict[str, int]] = [{}, {}]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_reduce", "broadcast"):
            patch.setattr(dist, name, noting(getattr(dist, name), model.process_group, seen))
        retry = oom_guard().retry(model=model, timeout_s=20)
        seen.reverse()
        for attempt in retry.attempts(torch.ones(2, 6)):
            with attempt:
                for samples, weight in attempt:
                    (model(samples).sum() * weight).backward()
    return seen


def noting(run: Callable[..., Any], of: Any, seen: list[dict[str, int]]) -> Callable[..., Any]:
    """Return the collective, noting the size of what is sent through a group."""

    def noted(tensor: torch.Tensor, *args: Any, group: Any) -> Any:
        if group is of:
            kind = f"{run.__name__} of {tensor.dtype}"
            seen[0][kind] = max(seen[0].get(kind, 0), tensor.numel())
        return run(tensor, *args, group=group)

    return noted


def work_refused(rank: int) -> list[str]:
    """Use what a retry cannot be used with, and return the errors."""
    model = DistributedDataParallel(nn.Linear(6, 3))
    retry = oom_guard().retry(model=model, timeout_s=20)
    with Join([model]), pytest.raises(RuntimeError) as joined:
        next(retry.attempts(batch_of(0, rank))).__enter__()
    assert model.require_backward_grad_sync
    bag = DistributedDataParallel(nn.EmbeddingBag(4, 2, sparse=True))
    with pytest.raises(ValueError, match="sparse") as sparse:
        oom_guard().retry(model=bag)
    return [str(joined.value), str(sparse.value)]


def work_hooked(rank: int) -> tuple[str, int]:
    """Make a retry of a model with a communication hook: return the warning, and how often it was called."""
    n_calls = 0

    def hook(_: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:  # type: ignore[name-defined]
        nonlocal n_calls
        n_calls += 1
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    model = DistributedDataParallel(nn.Linear(6, 3))
    model.register_comm_hook(None, hook)
    with pytest.warns(UserWarning, match="hook") as warned:
        retry = oom_guard().retry(model=model, timeout_s=20)
    for attempt in retry.attempts(batch_of(0, rank)):
        with attempt:
            for (samples, labels), _ in attempt:
                F.cross_entropy(model(samples), labels).backward()
    return str(warned[0].message), n_calls


def work_split(rank: int) -> tuple[int, int]:
    """Run out of memory for large parts on rank 1 only, and return the sizes that were tried last."""
    model = DistributedDataParallel(nn.Linear(6, 3))
    retry = oom_guard().retry(model=model, timeout_s=20)
    with inject_oom(above=3, times=None, rank=1):
        for attempt in retry.attempts(batch_of(0, rank)):
            with attempt:
                for (samples, labels), weight in attempt:
                    (F.cross_entropy(model(samples), labels) * weight).backward()
    return attempt.number, attempt.size


def work_bug(rank: int) -> str:
    """Fail with a bug on rank 1, and return what each rank sees."""
    model = DistributedDataParallel(nn.Linear(6, 3))
    retry = oom_guard().retry(model=model, timeout_s=20)
    try:
        for attempt in retry.attempts(batch_of(0, rank)):
            with attempt:
                for (samples, labels), weight in attempt:
                    (F.cross_entropy(model(samples), labels + 100 * rank) * weight).backward()
    except Exception as error:  # noqa: BLE001 -- whatever it is
        return f"{type(error).__name__}: {error}"
    return "no error"


def work_hopeless(rank: int) -> str:
    """Run out of memory in rank 1's optimizer without a copy, and return what each rank sees."""
    model = DistributedDataParallel(nn.Linear(6, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    retry = oom_guard().retry(model=model, optimizer=optimizer, timeout_s=20)
    try:
        for attempt in retry.attempts(batch_of(0, rank)):
            with attempt, inject_oom(2, phase="optimizer", rank=1):
                for (samples, labels), weight in attempt:
                    (F.cross_entropy(model(samples), labels) * weight).backward()
                optimizer.step()
    except (OutOfMemoryError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def work_no_room(rank: int) -> str:
    """Run out of memory on rank 1 before the step begins, and return what each rank sees."""
    model = DistributedDataParallel(nn.Linear(6, 3))
    retry = oom_guard().retry(model=model, copy=True, timeout_s=20)
    try:
        with inject_oom(operator="clone", rank=1):
            for attempt in retry.attempts(batch_of(0, rank)):
                with attempt:
                    for (samples, labels), weight in attempt:
                        (F.cross_entropy(model(samples), labels) * weight).backward()
    except (OutOfMemoryError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def work_unused(rank: int) -> list[torch.Tensor]:
    """Use a parameter on rank 1 only, and return its gradient on each."""
    model = DistributedDataParallel(small_net(), find_unused_parameters=True)
    for attempt in oom_guard().retry(model=model, timeout_s=20).attempts(torch.ones(2, 6)):
        with attempt:
            for samples, _ in attempt:
                (model(samples).sum() + rank * model.module.unused.sum()).backward()
                if rank == 0:
                    model.module.unused.grad = None
    return [model.module.unused.grad]


WORK: dict[str, Callable[[int], Any]] = {
    "bare": lambda rank: train(rank, 4, no_fault, n_bare=4),
    "guarded": lambda rank: train(rank, 4, no_fault),
    "static": lambda rank: train(rank, 4, random_fault, static_graph=True),
    "views": lambda rank: train(rank, 4, random_fault, gradient_as_bucket_view=True),
    "faulty": lambda rank: train(rank, N_FAULTS, random_fault),
    "clean": lambda rank: train(rank, N_FAULTS, no_fault),
    "split": work_split,
    "unused": work_unused,
    "bug": work_bug,
    "hopeless": work_hopeless,
    "no_room": work_no_room,
    "large": work_large,
    "bare_first": work_bare_first,
    "kept_apart": work_kept_apart,
    "large_halves": work_large_halves,
    "alone": work_alone,
    "groups_after": work_groups_after_one_that_was_alone,
    "warm_up": work_warm_up,
    "refused": work_refused,
    "hooked": work_hooked,
}
