"""oom_guard: out-of-memory errors that say what to do, and steps that are tried again."""

from torchfast._oom.guard import oom_guard
from torchfast._oom.report import HostOutOfMemoryError, OutOfMemoryError, OutOfMemoryReport

__all__ = ["HostOutOfMemoryError", "OutOfMemoryError", "OutOfMemoryReport", "oom_guard"]
