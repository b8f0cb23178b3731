"""`oom_guard`: an out-of-memory error becomes something that a person can act on."""

import functools
import inspect
from collections.abc import Callable
from types import TracebackType
from typing import Any, Literal, ParamSpec, TypeVar, overload

import torch

from torchfast._device import resolve_device
from torchfast._oom.base import Guard
from torchfast._oom.report import OutOfMemoryError, error_of
from torchfast._oom.telemetry import Monitor
from torchfast._oom_errors import classify

P = ParamSpec("P")
R = TypeVar("R")
_DEFAULT_DIM = 0


@overload
def oom_guard(
    *,
    reraise: Literal[True] = True,
    batch_size: int | None = None,
    batch_dim: int = 0,
    keep_frames: bool = False,
    monitor: Monitor | None = None,
    device: torch.device | str | int | None = None,
) -> "OOMGuard": ...


@overload
def oom_guard(
    *,
    reraise: Literal[False],
    batch_size: int | None = None,
    batch_dim: int = 0,
    keep_frames: bool = False,
    monitor: Monitor | None = None,
    device: torch.device | str | int | None = None,
) -> "QuietOOMGuard": ...


@overload
def oom_guard(
    *,
    reraise: bool,
    batch_size: int | None = None,
    batch_dim: int = 0,
    keep_frames: bool = False,
    monitor: Monitor | None = None,
    device: torch.device | str | int | None = None,
) -> "OOMGuard | QuietOOMGuard": ...


def oom_guard(  # noqa: PLR0913 -- options, all keyword-only
    *,
    reraise: bool = True,
    batch_size: int | None = None,
    batch_dim: int = 0,
    keep_frames: bool = False,
    monitor: Monitor | None = None,
    device: torch.device | str | int | None = None,
) -> "OOMGuard | QuietOOMGuard":
    """Turn an out-of-memory error in a block, a loop or a function into one that says what to do.

    Any kind of out-of-memory error (CUDA, cuBLAS, cuDNN, NCCL, Triton, host, MPS; wrapped, chained or
    grouped) becomes an `OutOfMemoryError`, which is a `torch.OutOfMemoryError` (for host memory a
    `MemoryError` too). Its message names the batch size to try and why. Every other exception passes as the
    same object with the same traceback. Costs a few microseconds while nothing fails.

    On failure, everything that the block held through its frames is let go before caches are emptied: the
    local variables of the functions that failed, and, in the function with the `with` statement itself, the
    names that the block has bound to tensors or to containers of tensors, which become None. Gradients,
    optimizer state and whatever was bound before the block stay. The original error is the cause; its
    traceback keeps its lines but no variables.

    Example:
        >>> import torch
        >>> from torchfast import oom_guard
        >>> with oom_guard(reraise=False) as guard:
        ...     for batch in guard.steps([torch.zeros(64, 3)]):
        ...         raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        >>> guard.report.suggested_batch_size, guard.report.batch_size
        (32, 64)
        >>> @oom_guard()
        ... def double(batch):
        ...     return 2 * batch
        >>> double(torch.ones(2))
        tensor([2., 2.])

    Args:
        reraise: False ends the block quietly, or has the decorated function return None; `guard.report` then
            says what happened.
        batch_size: the size of the batches in the block, in samples, if it is known and the loop does not go
            through `guard.steps(loader)`, which knows better.
        batch_dim: the dimension along which samples are counted. The size is the one that most tensors of the
            batch share.
        keep_frames: True lets go of nothing, for a post-mortem in a debugger.
        monitor: an object with `phase(name)` and `status()`, such as a `VRAMMonitor`: every step of
            `guard.steps` is a phase "step", and its status is in the report.
        device: the device meant where the error does not name one; None is the current accelerator.

    Raises:
        ValueError: `batch_size` is no number of at least 1, `batch_dim` is negative, or there is no such
            device.
        TypeError: `monitor` lacks `phase` or `status`.
    """
    # What a guard costs while nothing fails begins here: the defaults need no check.
    if batch_size is not None or batch_dim is not _DEFAULT_DIM or monitor is not None or device is not None:
        device = _checked(batch_size, batch_dim, monitor, device)
    guard = OOMGuard if reraise else QuietOOMGuard
    return guard(batch_size, batch_dim, monitor, device, keep_frames=keep_frames)


def _checked(
    batch_size: Any, batch_dim: Any, monitor: Any, device: torch.device | str | int | None
) -> torch.device | None:
    """Refuse options that make no sense, and return the device."""
    if not (batch_size is None or _is_count(batch_size)) or batch_size == 0:
        raise ValueError(
            f"batch_size={batch_size!r} was given to oom_guard; it must be the number of samples in a "
            "batch, at least 1. Leave it out if it is not known."
        )
    if not _is_count(batch_dim):
        raise ValueError(
            f"batch_dim={batch_dim!r} was given to oom_guard; the tensors of a batch differ in rank, so "
            "the dimension must be counted from the front: 0, 1, ..."
        )
    if monitor is not None and not (hasattr(monitor, "phase") and hasattr(monitor, "status")):
        raise TypeError(
            "monitor must have phase(name) and status(), as a VRAMMonitor has; "
            f"{type(monitor).__name__} has not. Give a VRAMMonitor, or leave it out."
        )
    # An error now, rather than in place of the one that is to be explained.
    return None if device is None else resolve_device(device)


def _is_count(number: Any) -> bool:
    # Whatever counts as an index counts, NumPy's integers too.
    return hasattr(number, "__index__") and not isinstance(number, bool) and number >= 0


class OOMGuard(Guard):
    """A context manager, and a decorator, that raises an explained error. Made by `oom_guard()`.

    `report` is the `OutOfMemoryReport` of the block if it ran out of memory, else None.

    Example:
        >>> from torchfast import oom_guard
        >>> with oom_guard() as guard:
        ...     total = sum(guard.steps([1, 2, 3]))
        >>> total, guard.report
        (6, None)
    """

    _is_quiet = False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        report = self._leave(error)
        if error is not None and report is not None and not isinstance(error, OutOfMemoryError):
            raise error_of(report) from error

    def __call__(self, function: Callable[P, R], /) -> Callable[P, R]:
        """Return the function with every call of it guarded; coroutine functions too."""
        return _decorate(self, function)


class QuietOOMGuard(Guard):
    """A context manager, and a decorator, that ends quietly. Made by `oom_guard(reraise=False)`.

    `report` is the `OutOfMemoryReport` of the block if it ran out of memory, else None.

    Example:
        >>> from torchfast import oom_guard
        >>> with oom_guard(reraise=False) as guard:
        ...     raise MemoryError
        >>> guard.report.message.splitlines()[0]
        'Out of host memory. Try a smaller batch.'
    """

    _is_quiet = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> bool:
        report = self._leave(error)
        rest = _rest_of(error) if report is not None and isinstance(error, ExceptionGroup) else None
        if rest is not None:
            raise rest
        return report is not None

    def __call__(self, function: Callable[P, R], /) -> Callable[P, R | None]:
        """Return the function with every call of it guarded: one that runs out of memory returns None."""
        return _decorate(self, function)


def _rest_of(group: ExceptionGroup[Exception]) -> ExceptionGroup[Exception] | None:
    """Return what of a group is not about memory."""
    return group.split(lambda error: not isinstance(error, ExceptionGroup) and classify(error) is not None)[1]


def _decorate(outer: OOMGuard | QuietOOMGuard, function: Callable[..., Any]) -> Callable[..., Any]:
    if isinstance(function, (staticmethod, classmethod)):
        return type(function)(_decorate(outer, function.__func__))
    if isinstance(function, type) or not callable(function):
        what = f"the class {function.__name__}" if isinstance(function, type) else repr(function)
        raise TypeError(
            f"oom_guard was put on {what}, and guards functions: put it on the function or the method that "
            "runs out of memory, as @oom_guard(), or use `with oom_guard():` around the code."
        )
    if _runs_in_pieces(function):
        name = getattr(function, "__name__", type(function).__name__)
        raise TypeError(
            f"oom_guard was put on {name}, which is a generator: its body runs in "
            "pieces, between which other code runs. Use `with oom_guard():` inside it."
        )
    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def run_async(*args: Any, **kwargs: Any) -> Any:
            guard = outer._per_call()
            try:
                with guard:
                    return await function(*args, **kwargs)
            finally:
                outer.report = guard.report
                del args, kwargs  # the error keeps this frame

        return run_async

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        guard = outer._per_call()
        try:
            with guard:
                return function(*args, **kwargs)
        finally:
            outer.report = guard.report
            del args, kwargs  # as above

    return run


def _runs_in_pieces(function: Callable[..., Any]) -> bool:
    """Say whether calling it makes a generator: a function, or an object that is called like one."""
    call = function if inspect.isroutine(function) else type(function).__call__
    return any(
        inspect.isgeneratorfunction(part) or inspect.isasyncgenfunction(part) for part in (function, call)
    )
