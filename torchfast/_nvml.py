"""Which process holds how much of a GPU: what only NVML knows.

NVML is read through `nvidia-ml-py`, an optional package; without it, and wherever NVML's answer cannot be
trusted, the answer is the reason why it is not known.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torchfast._bytes import MIB

if TYPE_CHECKING:
    import torch

# The inode that Linux gives the first process namespace (PROC_PID_INIT_INO in include/linux/proc_ns.h).
# What the driver uses for nobody in particular: 9 MiB beside one process and 14 MiB beside two on an H200. A
# CUDA context takes hundreds, so a process that is not listed shows.
_DRIVER_BYTES = 64 * MIB
_PROC = Path("/proc")
_HOST_NAMESPACE = "pid:[4026531836]"


class Unknown(Exception):  # noqa: N818 - it is no error: a source that cannot know says why
    """Why a source cannot tell, in words that end the sentence "not known: ..."."""


class Nvml:
    """One GPU as NVML sees it, found by its UUID: indices differ under CUDA_VISIBLE_DEVICES and MIG."""

    def __init__(self, device: "torch.device") -> None:
        import torch

        if not torch.cuda.is_initialized():
            raise Unknown("CUDA is not initialised")
        if torch.version.hip:
            raise Unknown("NVML is for NVIDIA GPUs")
        try:
            import pynvml
        except ImportError as error:
            raise Unknown("nvidia-ml-py is not installed (pip install nvidia-ml-py)") from error
        self._nvml: Any = pynvml
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        self._handle = self._ask(lambda: (pynvml.nvmlInit(), self._find(uuid))[1])

    def used_by_process(self) -> dict[int, int | None]:
        """Return the bytes each process holds, by its PID as NVML knows it; 25 to 35 µs."""
        nvml = self._nvml
        listed = self._ask(
            lambda: [
                *nvml.nvmlDeviceGetComputeRunningProcesses(self._handle),
                *nvml.nvmlDeviceGetGraphicsRunningProcesses(self._handle),
            ]
        )
        return {process.pid: process.usedGpuMemory for process in listed}

    def _find(self, uuid: str) -> Any:
        try:
            return self._nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        except self._nvml.NVMLError_NotFound:
            return self._nvml.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}")

    def _ask(self, question: Any) -> Any:
        try:
            return question()
        except self._nvml.NVMLError as error:
            raise Unknown(f"NVML answers {str(error)!r}") from error


class Shares(NamedTuple):
    """What this process holds of a GPU, and what all others do: None, and why, where that is unknown."""

    own_bytes: int
    others_bytes: int | None
    why: str


def shares(used_by_process: Mapping[int, int | None], used_bytes: int, reserved_bytes: int) -> Shares:
    """Tell this process from the others, given the list, what all use, and what this one reserves.

    In a container NVML names processes by the PIDs of the host, where this process may go by any number, and
    its own number may be somebody else's. So our PID counts only where it is the host's; elsewhere we are
    told apart only where nobody else is listed.

    Raises:
        Unknown: which of the processes is this one, or what it holds, cannot be known.
    """
    used = dict(used_by_process)
    if not used:
        raise Unknown("NVML lists no process on this GPU")
    if _pids_are_ours(used):
        own_bytes = used.pop(os.getpid())
    elif len(used) == 1:
        own_bytes = used.popitem()[1]
    else:
        raise Unknown("NVML names processes by PIDs of the host, which this container does not see")
    if own_bytes is None:
        raise Unknown("the driver does not tell NVML what each process holds")
    if own_bytes < reserved_bytes:
        raise Unknown("NVML's process list does not show this process")
    others = [n_bytes for n_bytes in used.values() if n_bytes is not None]
    if used_bytes - own_bytes - sum(others) > _DRIVER_BYTES:
        return Shares(own_bytes, None, "NVML does not list all that use this GPU")
    return Shares(own_bytes, sum(others), "")


def _pids_are_ours(pids: Mapping[int, object]) -> bool:
    try:
        namespace = str((_PROC / "self/ns/pid").readlink())
    except OSError:
        return False
    # Sandboxes such as gVisor show the host's namespace without being in it: so every PID has to be here.
    return (
        namespace == _HOST_NAMESPACE
        and os.getpid() in pids
        and all((_PROC / str(pid)).exists() for pid in pids)
    )
