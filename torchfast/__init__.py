"""Six composable primitives for PyTorch training loops: fast on a GPU, and they do not die of memory."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchfast._channels_last import to_channels_last
    from torchfast._channels_last.measuring import LayoutReport
    from torchfast._estimate.estimate import estimate_vram
    from torchfast._estimate.gpus import GPU
    from torchfast._estimate.report import VRAMEstimate
    from torchfast._estimate.settings import AllocatorSettings
    from torchfast._loader.loader import DeviceLoader
    from torchfast._loader.stats import LoaderStats
    from torchfast._monitor.history import VRAMSpan
    from torchfast._monitor.monitor import VRAMMonitor
    from torchfast._monitor.sample import RankPeak, VRAMPeak, VRAMPhase, VRAMSample
    from torchfast._oom.guard import OOMGuard, QuietOOMGuard, oom_guard
    from torchfast._oom.injection import inject_oom
    from torchfast._oom.report import HostOutOfMemoryError, OutOfMemoryError, OutOfMemoryReport
    from torchfast._oom.retry import OOMAttempt, OOMRetry
    from torchfast._teacher import GPUTeacher
    from torchfast._teacher.features import TeacherOutputs

__all__ = [
    "GPU",
    "AllocatorSettings",
    "DeviceLoader",
    "GPUTeacher",
    "HostOutOfMemoryError",
    "LayoutReport",
    "LoaderStats",
    "OOMAttempt",
    "OOMGuard",
    "OOMRetry",
    "OutOfMemoryError",
    "OutOfMemoryReport",
    "QuietOOMGuard",
    "RankPeak",
    "TeacherOutputs",
    "VRAMEstimate",
    "VRAMMonitor",
    "VRAMPeak",
    "VRAMPhase",
    "VRAMSample",
    "VRAMSpan",
    "estimate_vram",
    "inject_oom",
    "oom_guard",
    "to_channels_last",
]

# What is imported when it is first asked for: records of many fields cost milliseconds to define.
_HOMES = {
    "AllocatorSettings": "_estimate.settings",
    "DeviceLoader": "_loader.loader",
    "GPU": "_estimate.gpus",
    "GPUTeacher": "_teacher",
    "HostOutOfMemoryError": "_oom.report",
    "LayoutReport": "_channels_last.measuring",
    "LoaderStats": "_loader.stats",
    "OOMAttempt": "_oom.retry",
    "OOMGuard": "_oom.guard",
    "OOMRetry": "_oom.retry",
    "OutOfMemoryError": "_oom.report",
    "OutOfMemoryReport": "_oom.report",
    "QuietOOMGuard": "_oom.guard",
    "RankPeak": "_monitor.sample",
    "TeacherOutputs": "_teacher.features",
    "VRAMEstimate": "_estimate.report",
    "VRAMMonitor": "_monitor.monitor",
    "VRAMPeak": "_monitor.sample",
    "VRAMPhase": "_monitor.sample",
    "VRAMSample": "_monitor.sample",
    "VRAMSpan": "_monitor.history",
    "estimate_vram": "_estimate.estimate",
    "inject_oom": "_oom.injection",
    "oom_guard": "_oom.guard",
    "to_channels_last": "_channels_last",
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
