"""What became of an out-of-memory error: the record for a UI, and the exception for everybody else."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import torch

from torchfast._oom_errors import OutOfMemoryRecord

SizeSource = Literal["steps", "given", "guess"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OutOfMemoryReport:
    """What ran out of memory, and what to do about it.

    `message` is short and plain, fit for a status box; `details` adds the numbers, the place and PyTorch's
    own text. `suggested_batch_size` is None where no batch size would help or none is known. `batch_size` is
    what failed, and `batch_size_source` where it is known from: "steps" (`guard.steps`), "given"
    (`batch_size=`) or "guess" (the leading dimension most common among the failed code's tensors). `phase`
    is "forward", "backward", "optimizer" or None; `traceback` is text; `status` is the monitor's, if there
    was one.

    Example:
        >>> import torch
        >>> from torchfast import oom_guard
        >>> with oom_guard(reraise=False, batch_size=64) as guard:
        ...     raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        >>> guard.report.batch_size, guard.report.batch_size_source, guard.report.suggested_batch_size
        (64, 'given', 32)
    """

    message: str
    details: str
    record: OutOfMemoryRecord
    suggested_batch_size: int | None = None
    batch_size: int | None = None
    batch_size_source: SizeSource | None = None
    phase: str | None = None
    traceback: str = dataclasses.field(default="", repr=False)
    status: Mapping[str, Any] | None = dataclasses.field(default=None, repr=False)


class OutOfMemoryError(torch.OutOfMemoryError):
    """Out of memory, explained: the message says what to do, `report` holds it in parts.

    Pickles and copies. From a `DataLoader` or `DataParallel` worker it arrives as text alone: there `report`
    is None.

    Example:
        >>> import torch
        >>> from torchfast import OutOfMemoryError, oom_guard
        >>> try:
        ...     with oom_guard(batch_size=64):
        ...         raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        ... except OutOfMemoryError as error:
        ...     print(error.report.suggested_batch_size, isinstance(error, torch.OutOfMemoryError))
        32 True
    """

    def __init__(self, text: str = "", report: OutOfMemoryReport | None = None) -> None:
        super().__init__(text)
        self.report = report


class HostOutOfMemoryError(OutOfMemoryError, MemoryError):
    """The host ran out of memory, explained: also a `MemoryError`.

    Example:
        >>> from torchfast import HostOutOfMemoryError, oom_guard
        >>> try:
        ...     with oom_guard():
        ...         raise MemoryError
        ... except HostOutOfMemoryError as error:
        ...     print(str(error).splitlines()[0], isinstance(error, MemoryError))
        Out of host memory. Try a smaller batch. True
    """


def error_of(report: OutOfMemoryReport, /) -> OutOfMemoryError:
    """Return the error for a report: of the host's kind where it was host memory."""
    is_host = report.record.kind in ("host", "pinned", "shared_memory")
    kind = HostOutOfMemoryError if is_host else OutOfMemoryError
    return kind(report.message, report)


for _public in (OutOfMemoryReport, OutOfMemoryError, HostOutOfMemoryError):
    _public.__module__ = "torchfast"  # where they are imported from, and what a traceback should show
