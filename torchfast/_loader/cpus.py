"""How many CPUs a process may use: what it is bound to, what its container grants, shared with its equals."""

import os
from pathlib import Path

import torch

CGROUPS = Path("/sys/fs/cgroup")


def cpu_share() -> int:
    """Return how many CPUs this process may use, beside its equals on this machine under `torchrun`."""
    n_cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    n_cpus = min(n_cpus, _granted() or n_cpus)
    return max(1, n_cpus // ranks_here())


def ranks_here() -> int:
    """Return how many ranks `torchrun` started on this machine, which share what it has; 1 without it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or 1)


def chosen_threads() -> int:
    """Return with how many threads this thread computes; where that is `torchrun`'s 1, how many it may."""
    n_threads = torch.get_num_threads()
    is_torchruns = "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1"
    return cpu_share() if n_threads == 1 and is_torchruns else n_threads


def keep_threads() -> None:
    """Have the calling thread keep the number of threads with which it computes, from here on.

    PyTorch settles it when it is first asked for. The thread in which a `DataLoader` pins sets its own to 1,
    which is that of every thread that has not asked yet: a loop that only computes on a GPU among them.
    """
    torch.get_num_threads()


def compute_with(n_threads: int, /) -> None:
    """Let the calling thread compute with so many threads; it is the default of new ones then, too."""
    # The first question in a thread gives it the process's number; asked later it would undo what is set.
    torch.get_num_threads()
    torch.set_num_threads(n_threads)


def _granted() -> int | None:
    """Return how many CPUs' time the container has, as `docker run --cpus` sets it; None without a limit.

    As the kernel documents them: "QUOTA PERIOD" or "max PERIOD" in one file, or two files, -1 for no limit.
    """
    try:
        quota, period = (CGROUPS / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota, period = (
                (CGROUPS / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period")
            )
        except OSError:
            return None
    try:
        return max(1, int(quota) // int(period)) if int(quota) > 0 else None
    except (ValueError, ZeroDivisionError):
        return None
