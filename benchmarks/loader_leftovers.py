"""What a DeviceLoader leaves behind: memory over epochs, early breaks, ends of the interpreter.

Part of `device_loader_reliability.py`. Without a GPU, breaks and ends are counted on the CPU.
"""

import _thread
import functools
import gc
import itertools
import subprocess
import sys
import textwrap
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from loader_numbered import Filled, Shape
from torch.utils.data import DataLoader, TensorDataset

from torchfast import DeviceLoader

Report = Callable[[dict[str, Any]], None]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


MEMORY_KINDS = (
    ("pinned", 1),
    ("pinned", 2),
    ("pageable", 2),
    ("pageable", 4),
    ("small tensors", 2),
    ("workers", 2),
)
"""Sources, and depths, of batches of 32 MiB: one tensor of them, or 128."""


def count_memory(report: Report, *, source: str, depth: int, n_epochs: int) -> None:
    """Compare the memory reserved after the first epoch with that of all later ones."""
    batch_bytes, n_batches = 32 * 2**20, 20
    loader = DeviceLoader(_batches(source, batch_bytes, n_batches), "cuda", depth=depth)
    torch.cuda._sleep(1)
    before_bytes = torch.cuda.memory_reserved()
    reserved, pinned = list[int](), list[int]()
    for _ in range(n_epochs):
        for batch in loader:
            torch.cuda._sleep(200_000)
            torch._foreach_add_(batch, 1)
            del batch
        reserved.append(torch.cuda.memory_reserved() - before_bytes)
        pinned.append(torch.cuda.host_memory_stats()["num_host_alloc"])
    report(
        {
            "source": source,
            "depth": depth,
            "n_epochs": n_epochs,
            "batch_bytes": batch_bytes,
            "allowed_bytes": (depth + 2) * batch_bytes,
            "reserved_bytes_first_epoch": reserved[0],
            "reserved_bytes_most": max(reserved),
            "reserved_bytes_last_epoch": reserved[-1],
            "n_pinned_allocations_after_first_epoch": pinned[-1] - pinned[0],
            "n_wrong": int(max(reserved) > (depth + 2) * batch_bytes or len(set(reserved)) > 1)
            + int(pinned[-1] != pinned[0]),
        }
    )


def _batches(source: str, batch_bytes: int, n_batches: int) -> Any:
    n_leaves = 128 if source == "small tensors" else 1
    n_elements = batch_bytes // 4 // n_leaves
    if source == "workers":
        dataset = Filled(Shape(1, (n_elements,), n_per_pass=n_batches))
        return DataLoader(dataset, batch_size=None, num_workers=2, persistent_workers=True)
    return [[torch.zeros(n_elements, pin_memory=source != "pageable") for _ in range(n_leaves)]] * n_batches


def count_breaks(report: Report, *, options: dict[str, Any], n_breaks: int, limit_s: float) -> None:
    """Leave a pass early, take the next one whole, and look for anything left behind; again and again."""
    torch.set_num_threads(1)
    began_s, empty = time.perf_counter(), Leftovers()
    loader = _with_workers(**options)
    for number in range(N_WARMUP):
        _break_and_go_on(loader, number)  # what is made once and kept: workers, streams, the pinned ring
    before = _settled(loader)
    left, n_lost = dict[str, int](), 0

    def tell(n_seen: int, **more: Any) -> None:
        row = {"options": options, "n_asked": n_breaks, "n_breaks": n_seen, "n_epochs_not_whole": n_lost}
        seconds = round(time.perf_counter() - began_s, 1)
        wrong = {"left_behind": dict(left), "n_wrong": n_lost + len(left), "seconds": seconds}
        report({**row, **wrong, **more})

    for n_seen in range(1, n_breaks + 1):
        n_lost += not _break_and_go_on(loader, n_seen)
        if n_seen % 5 == 0:
            left = {name: max(n, left.get(name, 0)) for name, n in _settled(loader).beyond(before).items()}
        if n_seen % 50 == 0:
            tell(n_seen)
        if time.perf_counter() - began_s > limit_s:
            break
    del loader
    left |= _left_at_the_end(empty) | _pinned_anew(options)
    tell(n_seen, is_over=True)


def _settled(loader: DeviceLoader[Any]) -> "Leftovers":
    """Return what is held once the pass is closed, and a bare one has emptied the DataLoader's own queues."""
    loader.close()
    deque(loader.loader, maxlen=0)
    return Leftovers()


def _left_at_the_end(empty: "Leftovers") -> dict[str, int]:
    """Return what outlives the loader, but for memory that PyTorch keeps for the next to ask."""
    patience_s = time.perf_counter() + 10  # a queue's feeder thread ends a moment after its queue
    while True:
        left = Leftovers().beyond(empty)
        left = {name: n for name, n in left.items() if name not in KEPT_BY_PYTORCH}
        if not left or time.perf_counter() > patience_s:
            return left


KEPT_BY_PYTORCH = ("pinned allocations", "pinned bytes", "reserved_bytes")


def _pinned_anew(options: dict[str, Any]) -> dict[str, int]:
    """Return what a second loader has to pin, for which the memory of one that is gone must do.

    PyTorch's own count of pinned bytes in use never goes down (2.11).
    """
    if not torch.cuda.is_available():
        return {}
    before = Leftovers()
    loader = _with_workers(**options)
    for number in range(N_WARMUP):
        _break_and_go_on(loader, number)
    left = _settled(loader).beyond(before)
    return {f"{name}, anew": n for name, n in left.items() if name.startswith("pinned")}


N_SAMPLES, BATCH_SIZE, N_WARMUP = 96, 4, 24


def _with_workers(**options: Any) -> DeviceLoader[Any]:
    numbers = torch.arange(N_SAMPLES)
    dataset = TensorDataset(numbers, numbers.float()[:, None].expand(-1, 70_000).contiguous())  # 1.1 MB
    settings: dict[str, Any] = {"num_workers": 2, "persistent_workers": True, "prefetch_factor": 4}
    own = {name: value for name, value in options.items() if name == "across_epochs"}
    theirs = {name: value for name, value in options.items() if name not in own}
    return DeviceLoader(DataLoader(dataset, BATCH_SIZE, **{**settings, **theirs}), DEVICE, **own)


def _break_and_go_on(loader: DeviceLoader[Any], number: int) -> bool:
    """Break after a changing number of batches; say whether that pass and the next held what they must."""
    n_taken = number % (N_SAMPLES // BATCH_SIZE)
    seen = []
    for index, (numbers, rows) in enumerate(loader):
        seen.append((numbers, rows[:, 0]))
        if index == n_taken:
            break
    del numbers, rows
    threads = [thread.name for thread in threading.enumerate()]
    is_right = len(seen) == n_taken + 1 and "torchfast-loader" not in threads
    whole = [(numbers, rows[:, 0]) for numbers, rows in loader]
    return (
        is_right
        and _come_in_turn(seen, loader)
        and len(whole) == len(loader)
        and _come_in_turn(whole, loader)
    )


def _come_in_turn(seen: list[tuple[torch.Tensor, torch.Tensor]], loader: DeviceLoader[Any]) -> bool:
    """Say whether batches are the first ones of a pass; without `in_order`, only whether each came once."""
    numbers, rows = (torch.cat(column).tolist() for column in zip(*seen, strict=True))
    if loader.in_order:
        return numbers == rows == list(range(len(numbers)))
    firsts = sorted(numbers[::BATCH_SIZE])
    return numbers == rows and firsts == sorted(set(firsts))


class Leftovers:
    """What a process holds: threads, processes, file handles, pinned and device memory."""

    def __init__(self) -> None:
        gc.collect()
        if torch.cuda.is_available():
            # Host memory that copies still read when their pass ended goes with the next pass of any loader.
            torch.cuda.synchronize()
            list(_other_loader())
        self.held = {
            "threads": _thread._count(),  # those too that `threading` does not know
            "processes": len(list(_children())),
            "file handles": len(list(Path("/proc/self/fd").iterdir())),
            "shared memory": Path("/proc/self/maps").read_text().count("/torch_"),
        }
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            host = torch.cuda.host_memory_stats()
            self.held |= {
                "device_bytes": torch.cuda.memory_allocated(),
                "reserved_bytes": torch.cuda.memory_reserved(),
                "pinned allocations": host["num_host_alloc"],
                "pinned bytes": host["allocated_bytes.current"],
            }

    def beyond(self, before: "Leftovers") -> dict[str, int]:
        """Return what there is more of than before."""
        return {name: n - before.held[name] for name, n in self.held.items() if n > before.held[name]}


@functools.cache
def _other_loader() -> DeviceLoader[Any]:
    loader = DeviceLoader([torch.zeros(100_000)], DEVICE)  # too much for a plain copy
    for _ in range(10):
        list(loader)  # its pinned ring is then as large as it will be
    return loader


def _children() -> list[str]:
    children = list[str]()
    for thread in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError):  # a thread that ended meanwhile
            children += (thread / "children").read_text().split()
    return children


def count_exits(report: Report, *, n_exits: int) -> None:
    """End interpreters in the middle of a pass, in several ways; each must end as a bare loop's would."""
    kinds = [job for job in itertools.product(ENDS, LOADERS) if job != ("at the end", "endless")]
    jobs = list(itertools.islice(itertools.cycle(kinds), n_exits))
    began_s = time.perf_counter()
    failures = list[str]()
    with ThreadPoolExecutor(3) as pool:
        for n_seen, failure in enumerate(pool.map(lambda job: _ended_badly(*job), jobs), start=1):
            failures += [failure] if failure else []
            report(
                {
                    "n_asked": n_exits,
                    "n_exits": n_seen,
                    "n_wrong": len(failures),
                    "failures": failures[:5],
                    "seconds": round(time.perf_counter() - began_s, 1),
                }
            )


SCRIPT = """
import os, signal, sys, torch
from torch.utils.data import DataLoader, TensorDataset
from torchfast import DeviceLoader

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has jobs in the background ignore it
data = TensorDataset(torch.zeros(64, 300_000))
loader = {loader}
for number, batch in enumerate(loader):
    if number == 2:
        if {is_cuda}:
            torch.cuda._sleep(100_000_000)
        {end}
"""
LOADERS = {
    "workers": "DeviceLoader(DataLoader(data, num_workers=2, persistent_workers=True), {device!r})",
    "pin_memory": "DeviceLoader(DataLoader(data, num_workers=2, pin_memory={is_cuda}), {device!r})",
    "no workers": "DeviceLoader(DataLoader(data), {device!r})",
    "across epochs": "DeviceLoader([torch.zeros(300_000)] * 5, {device!r}, across_epochs=True)",
    "large": "DeviceLoader(DataLoader(TensorDataset(torch.zeros(3, 50_000_000)), num_workers=1), {device!r})",
    "endless": "DeviceLoader((torch.zeros(9) for _ in iter(int, 1)), {device!r})",
}
ENDS = {
    "break": ("break", 0, ""),
    "at the end": ("pass", 0, ""),
    "sys.exit": ("sys.exit(3)", 3, ""),
    "error": ("raise LookupError('mine')", 1, "LookupError: mine"),
    "interrupt": ("os.kill(os.getpid(), signal.SIGINT)", -2, "KeyboardInterrupt"),
    "held": ("held = iter(loader); next(held); break", 0, "RuntimeWarning: a new pass"),
}


def _ended_badly(end: str, loader: str) -> str | None:
    """Run a script to its end; return what is wrong with it, or None."""
    statement, status, last_words = ENDS[end]
    code = textwrap.dedent(SCRIPT).format(
        loader=LOADERS[loader].format(device=DEVICE, is_cuda=DEVICE == "cuda"),
        end=statement,
        is_cuda=DEVICE == "cuda",
    )
    try:
        ended = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
        )
    except subprocess.TimeoutExpired:
        return f"{end}, {loader}: hangs"
    is_quiet = not ended.stderr if not last_words else last_words in ended.stderr
    if (
        ended.returncode == status
        and is_quiet
        and ended.stderr.count("Traceback") == (end in ("error", "interrupt"))
    ):
        return None
    return f"{end}, {loader}: status {ended.returncode}, {ended.stderr[-1000:]!r}"
