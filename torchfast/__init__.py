"""Six composable primitives for PyTorch training loops: fast on a GPU, and they do not die of memory."""

from typing import TYPE_CHECKING, Any

from torchfast._channels_last import to_channels_last
from torchfast._loader import DeviceLoader

if TYPE_CHECKING:
    from torchfast._monitor.history import VRAMSpan
    from torchfast._monitor.monitor import VRAMMonitor
    from torchfast._monitor.sample import VRAMPeak, VRAMPhase, VRAMSample
    from torchfast._oom.guard import OOMGuard, QuietOOMGuard, oom_guard
    from torchfast._oom.report import HostOutOfMemoryError, OutOfMemoryError, OutOfMemoryReport
    from torchfast._teacher import GPUTeacher

__all__ = [
    "DeviceLoader",
    "GPUTeacher",
    "HostOutOfMemoryError",
    "OOMGuard",
    "OutOfMemoryError",
    "OutOfMemoryReport",
    "QuietOOMGuard",
    "VRAMMonitor",
    "VRAMPeak",
    "VRAMPhase",
    "VRAMSample",
    "VRAMSpan",
    "oom_guard",
    "to_channels_last",
]

# What is imported when it is first asked for: records of many fields cost milliseconds to define.
_HOMES = {
    "GPUTeacher": "_teacher",
    "HostOutOfMemoryError": "_oom.report",
    "OOMGuard": "_oom.guard",
    "OutOfMemoryError": "_oom.report",
    "OutOfMemoryReport": "_oom.report",
    "QuietOOMGuard": "_oom.guard",
    "VRAMMonitor": "_monitor.monitor",
    "VRAMPeak": "_monitor.sample",
    "VRAMPhase": "_monitor.sample",
    "VRAMSample": "_monitor.sample",
    "VRAMSpan": "_monitor.history",
    "oom_guard": "_oom.guard",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for, and look the version up."""
    if name == "__version__":
        import importlib.metadata

        return importlib.metadata.version("torchfast")
    if name not in _HOMES:
        raise AttributeError(f"module 'torchfast' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(f"torchfast.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Name what can be imported, imported or not."""
    return sorted({*globals(), *__all__})
