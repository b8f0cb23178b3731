"""Faults put into a pass over a DeviceLoader, which must come out as they do from the loop without it.

Part of `device_loader_reliability.py`. Without a GPU, they are counted on the CPU.
"""

import faulthandler
import os
import random
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from torchfast import DeviceLoader

Report = Callable[[dict[str, Any]], None]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
N_BATCHES, BATCH_SIZE = 12, 2


class FaultError(Exception):
    """The fault that was put in."""


class Numbers(Dataset[torch.Tensor]):
    """Numbers, of which one cannot be had."""

    def __init__(self, broken: int | None = None) -> None:
        self._broken = broken

    def __len__(self) -> int:
        """Return the number of samples."""
        return N_BATCHES * BATCH_SIZE

    def __getitem__(self, index: int) -> torch.Tensor:
        """Return a number."""
        return torch.tensor(fails_in_dataset(index) if index == self._broken else index)


def fails_in_dataset(index: int) -> int:
    """Fail where a sample is read."""
    raise FaultError(index)


class Collate:
    """A collate function that fails at one batch."""

    def __init__(self, broken: int) -> None:
        self._broken = broken

    def __call__(self, samples: list[torch.Tensor]) -> torch.Tensor:
        """Make a batch."""
        return fails_in_collate(samples) if samples[0] == self._broken else torch.stack(samples)


def fails_in_collate(samples: list[torch.Tensor]) -> torch.Tensor:
    """Fail where a batch is made."""
    raise FaultError(int(samples[0]))


class Stubborn:
    """A batch that cannot be moved, if it holds a certain number."""

    def __init__(self, numbers: torch.Tensor, broken: int) -> None:
        self.numbers, self._broken = numbers, broken

    def to(self, device: torch.device | str) -> torch.Tensor:
        """Move."""
        return fails_in_transfer() if self.numbers[0] == self._broken else self.numbers.to(device)


def fails_in_transfer() -> torch.Tensor:
    """Fail where a batch is moved."""
    raise FaultError


def fails_in_transform() -> torch.Tensor:
    """Fail on the device."""
    raise FaultError


class Transform:
    """A transform that fails at one batch."""

    def __init__(self, broken: int) -> None:
        self._broken = broken

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        """Change a batch."""
        return fails_in_transform() if int(batch[0]) == self._broken else batch


Loops = tuple[Iterator[Any], Iterator[Any]]


def in_dataset(broken: int) -> Loops:
    """A sample that cannot be read, in the loop's process."""
    return _twice(lambda: DataLoader(Numbers(broken + broken % 2), BATCH_SIZE))


def in_collate(broken: int) -> Loops:
    """A batch that cannot be made, in the loop's process."""
    return _twice(lambda: DataLoader(Numbers(), BATCH_SIZE, collate_fn=Collate(broken)))


def in_worker(broken: int) -> Loops:
    """A sample that cannot be read in a worker, or a batch that cannot be made there."""
    if broken % 4:
        return _twice(lambda: DataLoader(Numbers(broken), BATCH_SIZE, num_workers=2))
    return _twice(lambda: DataLoader(Numbers(), BATCH_SIZE, num_workers=2, collate_fn=Collate(broken)))


def in_transfer(broken: int) -> Loops:
    """A batch that cannot be moved."""

    def batches() -> list[Stubborn]:
        return [Stubborn(batch, broken) for batch in DataLoader(Numbers(), BATCH_SIZE)]

    def moved(batch: Stubborn) -> torch.Tensor:
        return batch.to(DEVICE)

    return iter(DeviceLoader(batches(), DEVICE)), map(moved, batches())


def in_transform(broken: int) -> Loops:
    """A transform that fails."""

    def batches() -> list[torch.Tensor]:
        return list(DataLoader(Numbers(), BATCH_SIZE))

    transform = Transform(broken)
    ours = DeviceLoader(batches(), DEVICE, transform=transform)
    return iter(ours), map(transform, batches())


def _twice(make: Callable[[], Iterable[Any]]) -> Loops:
    """Return a pass over DeviceLoader and a bare one."""
    return iter(DeviceLoader(make(), DEVICE)), iter(make())


PLACES: dict[str, Callable[[int], Loops]] = {
    "dataset": in_dataset,
    "collate": in_collate,
    "worker": in_worker,
    "transfer": in_transfer,
    "transform": in_transform,
}


def count_faults(report: Report, *, place: str, n_faults: int, limit_s: float) -> None:
    """Put a fault at each batch in turn; batches, errors and tracebacks must be those of the bare loop."""
    faulthandler.dump_traceback_later(limit_s + 60, exit=True)  # a hang ends the process, and is seen
    torch.set_num_threads(1)
    began_s, n_seen, failures = time.perf_counter(), 0, list[str]()
    while n_seen < n_faults and time.perf_counter() - began_s < limit_s:
        broken = n_seen % N_BATCHES * BATCH_SIZE
        ours, bare = (outcomes(loop) for loop in PLACES[place](broken))
        n_failed = sum("fails_in_" in outcome for outcome in ours)
        if ours != bare or n_failed != 1 or _has_thread():
            failures.append(f"batch {broken // BATCH_SIZE}: {ours} instead of {bare}")
        n_seen += 1
        if n_seen % 12 == 0 or n_seen == n_faults:
            report(_row(place, n_faults, n_seen, failures, began_s))


def outcomes(loop: Iterator[Any]) -> list[str]:
    """Return what a loop got, batch by batch: numbers, or the error and the function that failed."""
    found = list[str]()
    while True:
        try:
            found.append(str(next(loop).tolist()))
        except StopIteration:
            return found
        except FaultError as error:
            text = "".join(traceback.format_exception(error))
            found += [name for name in FAILING if name in text]


FAILING = ("fails_in_dataset", "fails_in_collate", "fails_in_transfer", "fails_in_transform")


def _has_thread(patience_s: float = 0) -> bool:
    until_s = time.perf_counter() + patience_s
    while "torchfast-loader" in [thread.name for thread in threading.enumerate()]:
        if time.perf_counter() >= until_s:
            return True
        time.sleep(0.01)
    return False


def _row(place: str, n_asked: int, n_seen: int, failures: list[str], began_s: float) -> dict[str, Any]:
    return {
        "fault": place,
        "n_asked": n_asked,
        "n_faults": n_seen,
        "n_wrong": len(failures),
        "failures": failures[:5],
        "seconds": round(time.perf_counter() - began_s, 1),
    }


def count_kills(report: Report, *, n_kills: int, limit_s: float) -> None:
    """Kill a worker, from inside or outside, sometimes one that persists: an error, and then a whole pass."""
    faulthandler.dump_traceback_later(limit_s + 60, exit=True)
    torch.set_num_threads(1)
    choose = random.Random(0)  # noqa: S311 - which worker to kill is no secret
    began_s, n_seen, n_disturbed, failures = time.perf_counter(), 0, 0, list[str]()
    while n_seen < n_kills and time.perf_counter() - began_s < limit_s:
        try:
            failure = _killed_badly(choose.randrange(N_BATCHES), is_persistent=bool(n_seen % 2))
        except RuntimeError as error:
            # PyTorch's signal handler tells of the second dead worker wherever it interrupts, also in here.
            if "is killed by signal" not in str(error):
                raise
            n_disturbed += 1
            continue
        failures += [failure] if failure else []
        n_seen += 1
        row = _row("a worker is killed", n_kills, n_seen, failures, began_s)
        report({**row, "n_disturbed": n_disturbed})


def _killed_badly(n_taken: int, *, is_persistent: bool) -> str | None:
    dataset = Deadly()
    bare = DataLoader(dataset, BATCH_SIZE, num_workers=2, persistent_workers=is_persistent, prefetch_factor=1)
    loader = DeviceLoader(bare, DEVICE)
    epoch = iter(loader)
    pids = set()
    try:
        for number, batch in enumerate(epoch):
            pids |= set(batch[:, 1].tolist())
            if number == n_taken % 4:
                for pid in pids:
                    os.kill(pid, signal.SIGKILL)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            return f"{n_taken}: {error!r}"
    except (ConnectionError, EOFError):
        pass  # it was just being asked for a batch's memory; the bare loop gets the same
    else:
        return f"{n_taken}: no error"
    del epoch, loader
    if _has_thread(patience_s=10):  # the handler may interrupt the waiting for it, too
        return f"{n_taken}: a thread is left"
    n_batches = len(list(DeviceLoader(DataLoader(dataset, BATCH_SIZE, num_workers=2), DEVICE)))
    return None if n_batches == N_BATCHES else f"{n_taken}: {n_batches} batches of {N_BATCHES} afterwards"


class Deadly(Numbers):
    """Each sample tells its worker's process, which is then killed."""

    def __getitem__(self, index: int) -> torch.Tensor:
        """Return a number and a process."""
        return torch.tensor([index, os.getpid()])
