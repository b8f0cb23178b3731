"""Which process holds how much of a GPU: what only NVML knows.

NVML is read through `nvidia-ml-py`, an optional package; without it, and wherever NVML's answer cannot be
trusted, the answer is the reason why it is not known.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# The inode that Linux gives the first process namespace (PROC_PID_INIT_INO in include/linux/proc_ns.h).
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

    def used_bytes(self) -> int:
        """Return what all processes hold together, without what the driver keeps for itself; 5 to 7 µs."""
        nvml = self._nvml
        info = self._ask(lambda: nvml.nvmlDeviceGetMemoryInfo(self._handle, version=nvml.nvmlMemory_v2))
        return int(info.used)

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


def own_memory(used_by_process: Mapping[int, int | None], reserved_bytes: int) -> int:
    """Return what this process holds, given the list of all and that this one reserves so much.

    In a container NVML names processes by the PIDs of the host, where this process may go by any number, and
    its own number may be somebody else's. So our PID counts only where it is the host's; elsewhere we are
    told apart only where nobody else is listed.

    Raises:
        Unknown: which of the processes is this one, or what it holds, cannot be known.
    """
    if not used_by_process:
        raise Unknown("NVML lists no process on this GPU")
    if _pids_are_ours(used_by_process):
        own_bytes = used_by_process[os.getpid()]
    elif len(used_by_process) == 1:
        own_bytes = next(iter(used_by_process.values()))
    else:
        raise Unknown("NVML names processes by PIDs of the host, which this container does not see")
    if own_bytes is None:
        raise Unknown("the driver does not tell NVML what each process holds")
    if own_bytes < reserved_bytes:
        raise Unknown("NVML's process list does not show this process")
    return own_bytes


def _pids_are_ours(pids: Mapping[int, object]) -> bool:
    try:
        namespace = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return False
    # Sandboxes such as gVisor show the host's namespace without being in it: so every PID has to be here.
    return (
        namespace == _HOST_NAMESPACE
        and os.getpid() in pids
        and all(Path(f"/proc/{pid}").exists() for pid in pids)
    )
