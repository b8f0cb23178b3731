"""`inject_oom`: an out-of-memory error on purpose, at a chosen point, with or without a GPU."""

import sys
import warnings
from types import FrameType, TracebackType
from typing import Any, Literal, Self

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from torchfast._bytes import MIB
from torchfast._oom import work
from torchfast._oom.frames import phase_of
from torchfast._tree import tensors

Phase = Literal["forward", "backward", "optimizer"]


class inject_oom(TorchDispatchMode):  # noqa: N801 -- used like a function, as torch.no_grad is
    """Raise an out-of-memory error at a chosen operator of a block, as the GPU's allocator would.

    For tests of code that must survive running out of memory; needs no GPU. The operators of the block are
    counted as PyTorch dispatches them, in the forward pass, the backward pass and the optimizer's step. The
    error is a `torch.OutOfMemoryError` with the allocator's text, raised in place of the operator, which has
    then changed nothing. Counting costs some 10 µs an operator.

    Example:
        >>> import torch
        >>> from torchfast import inject_oom, oom_guard
        >>> model = torch.nn.Linear(4, 4)
        >>> with oom_guard(reraise=False, batch_size=64) as guard, inject_oom(phase="backward") as injection:
        ...     model(torch.zeros(64, 4)).sum().backward()
        >>> guard.report.phase, guard.report.suggested_batch_size, injection.n_failures
        ('backward', 32, 1)

    Args:
        at: which of the operators that fit the other conditions fails, counted from 0; counted anew after
            each failure.
        phase: only operators of the "forward" pass, the "backward" pass or the "optimizer" step.
        operator: only operators whose name contains this, such as "convolution".
        above: only while more than this many samples are being worked on at once, as a guard's `steps`,
            `attempts` and `chunked` tell; elsewhere it warns that it could not fail.
        times: how often to fail; None is always. 0 only counts.
        rank: fail on this rank of the default process group only.

    Attributes:
        n_operators: how many operators fitted so far.
        n_failures: how many of them failed.

    It does not see what compiled code does inside, nor memory that is taken without an operator.
    """

    def __init__(  # noqa: PLR0913 -- conditions, all keyword-only
        self,
        at: int = 0,
        *,
        phase: Phase | None = None,
        operator: str | None = None,
        above: int | None = None,
        times: int | None = 1,
        rank: int | None = None,
    ) -> None:
        super().__init__()
        if phase not in (None, "forward", "backward", "optimizer"):
            raise ValueError(
                f'phase={phase!r} was given to inject_oom; a step has the phases "forward", "backward" and '
                '"optimizer". Leave it out to count operators of all three.'
            )
        for option, number in (("at", at), ("times", times)):
            if number is not None and number < 0:
                raise ValueError(
                    f"{option}={number!r} was given to inject_oom; it counts from 0. Leave it out for one "
                    "failure at the first operator."
                )
        self._at, self._phase, self._operator, self._above = at, phase, operator, above
        self._left = times
        self._rank = rank
        self._n_since = 0
        self._has_seen_samples = False
        self.n_operators = 0
        self.n_failures = 0

    def __enter__(self) -> Self:
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, tb)
        if self._above is not None and not self._has_seen_samples and kind is None:
            warnings.warn(
                f"inject_oom(above={self._above}) could not fail: it counts the samples that a guard's "
                "steps, attempts or chunked hand out, and none were handed out within its block. Loop over "
                "guard.steps(loader).",
                stacklevel=2,
            )

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Count the operator, and fail in its place if it is the one."""
        if not self._fits(func):
            return func(*args, **(kwargs or {}))
        self.n_operators += 1
        self._n_since += 1
        if self._left != 0 and self._n_since > self._at and self._rank in (None, _rank()):
            self._left = None if self._left is None else self._left - 1
            self._n_since = 0
            self.n_failures += 1
            raise torch.OutOfMemoryError(_text(func, args))
        return func(*args, **(kwargs or {}))

    def _fits(self, func: Any) -> bool:
        n_samples = work.now.n_samples
        self._has_seen_samples |= n_samples is not None
        if self._operator is not None and self._operator not in str(func):
            return False
        if self._phase is not None and self._phase != _current_phase():
            return False
        return self._above is None or (n_samples or 0) > self._above


def _rank() -> int:
    is_one_of_several = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_rank() if is_one_of_several else 0


def _current_phase() -> str | None:
    """Return the phase of the operator that is being dispatched, from the Python code that called it."""
    # On a GPU the backward pass runs in a thread of its own, without a Python frame below it.
    if _in_backward():
        return "backward"
    frame: FrameType | None = sys._getframe(1)
    found = None
    while frame is not None:
        phase = phase_of(frame)
        if phase in ("backward", "optimizer"):
            return phase
        found = phase or found
        frame = frame.f_back
    return found


def _in_backward() -> bool:
    # Without this private function the backward pass is still known by its frames on the CPU.
    task_id = getattr(torch._C, "_current_graph_task_id", lambda: -1)
    return bool(task_id() != -1)


def _text(func: Any, args: Any) -> str:
    size = _segment_bytes(max((tensor.nbytes for tensor in tensors(args)), default=0))
    return (
        f"CUDA out of memory. Tried to allocate {size / MIB:.2f} MiB. GPU 0 has a total capacity of "
        "15.77 GiB of "
        "which 0 bytes is free. Including non-PyTorch memory, this process has 15.77 GiB memory in "
        "use. Of the "
        "allocated memory 15.00 GiB is allocated by PyTorch, and 128.00 MiB is reserved by PyTorch but "
        f"unallocated. (Injected in place of {func}.)"
    )


def _segment_bytes(size: int) -> int:
    """Return what the allocator asks the driver for, which is what its message names."""
    if size <= MIB:
        return 2 * MIB
    return 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB
