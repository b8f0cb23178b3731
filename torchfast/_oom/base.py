"""What every guard does: note what it must know, explain a failure, make what tries again."""

import dataclasses
import functools
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import suppress
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, Self, TypeVar, cast

import torch
from torch import nn

from torchfast import _batch
from torchfast._device import resolve_device
from torchfast._oom import frames, message, telemetry
from torchfast._oom.refusals import (
    check_function,
    check_options,
    check_pace,
    generators_of,
    modules_of,
    optimizers_of,
)
from torchfast._oom.release import clean_up, place_of
from torchfast._oom.report import OutOfMemoryError, OutOfMemoryReport, SizeSource
from torchfast._oom.telemetry import Monitor
from torchfast._oom_errors import OutOfMemoryRecord, classify

if TYPE_CHECKING:
    from torchfast._oom.retry import OOMRetry, Split

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

# Looked up once: a guard is entered at every step.
_bound_in, _frame = frames.bound_in, sys._getframe


class Guard:
    """What both guards do; they differ in how a block ends that ran out of memory."""

    _is_quiet: bool

    def __init__(
        self,
        batch_size: int | None,
        batch_dim: int,
        monitor: Monitor | None,
        device: torch.device | str | int | None,
        *,
        keep_frames: bool,
    ) -> None:
        self.report: OutOfMemoryReport | None = None
        self._batch_size, self._batch_dim = batch_size, batch_dim
        self._monitor, self._asked_device = monitor, device
        self._keep_frames = keep_frames
        self._bound: list[frames.Bound] = []

    @functools.cached_property
    def _log(self) -> telemetry.StepLog:
        return telemetry.StepLog()

    def __repr__(self) -> str:
        """Say whether the block ran out of memory, and what to try then."""
        outcome = self.report.message.partition("\n")[0] if self.report else "nothing failed"
        return f"<{type(self).__name__}: {outcome}>"

    def __enter__(self) -> Self:
        self.report = None
        self._bound.append(_bound_in(_frame(1)))
        return self

    def steps(self, loader: Iterable[T], /) -> "Steps[T]":
        """Return the loader's batches, to loop over: the guard then knows the size and the peak of each step.

        Each iteration is one step. On a GPU its peak is measured, which takes 150 µs of an H200's host. The
        batches are the loader's own; none is kept. Has a length if the loader has one.

        Example:
            >>> from torchfast import oom_guard
            >>> with oom_guard() as guard:
            ...     for batch in guard.steps([1, 2, 3]):
            ...         print(batch, end=" ")
            1 2 3
        """
        return Steps(loader, self)

    def retry(  # noqa: PLR0913 -- options, all keyword-only
        self,
        *,
        model: nn.Module | Iterable[nn.Module],
        optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] | None = None,
        scaler: torch.amp.GradScaler | None = None,
        generators: Iterable[torch.Generator] = (),
        tokens: Callable[[Any], Any] | None = None,
        split: "Split" = "safe",
        copy: bool = False,
        grow_after: int = 100,
        timeout_s: float = 600.0,
    ) -> "OOMRetry":
        """Return training steps that are tried again, made once and used for every step.

        A step that runs out of memory is put back to where it began (gradients, buffers such as batch norm
        statistics, random state, gradient scaler, optimizer state made meanwhile) and tried again at the same
        size after cleaning up; then in ever smaller parts of the batch, each with the factor for its mean
        loss that makes the sum of the gradients that of the whole batch. The size that fitted is kept for
        the next steps and grows back after quiet ones. Tried again whole, a step is bit for bit the one that
        did not fail; in parts it is equal up to rounding, unless layers draw random numbers (you are warned)
        or see the whole batch (refused, unless `split` says otherwise).

        Under `DistributedDataParallel` the attempts run without gradient synchronisation; the ranks then
        vote on the CPU, and average the gradients once. Making the retry is a collective there.

        Args:
            model: the module, or modules, that the step trains, as it is called (wrapped, under DDP).
            optimizer: the optimizer, or optimizers, that the step runs.
            scaler: the gradient scaler, if there is one.
            generators: random generators of your own that the step draws from.
            tokens: a function from a part of the batch to the number of its valid tokens, where the loss is a
                mean over tokens; None weights by samples.
            split: "safe" works in parts unless a layer sees the whole batch; "always" even then; "never" only
                tries again whole.
            copy: True copies parameters and optimizer state at the start of each step, so that a failure in
                the middle of `optimizer.step()` can be undone too: memory of that size again. By default a
                step of the optimizer is tried for memory before it begins.
            grow_after: how many steps without a failure go by before a larger size is tried, at least 1.
            timeout_s: how long a rank waits for the others, in seconds, as rank 0 may be saving a checkpoint.
                One that has ended is noticed at once. The default is NCCL's own.

        Raises:
            TypeError: an option of the wrong kind.
            ValueError: no model, an unknown `split`, a `grow_after` below 1, a `timeout_s` that is not
                positive; a model under FSDP or tensor parallelism, or with SyncBatchNorm under DDP, or an
                optimizer that is sharded, whose collectives a failed rank would block.

        What it does not do: undo what the step does outside of these, such as a metric that it updates.
        """
        from torchfast._oom.ranks import ranks_of
        from torchfast._oom.retry import OOMRetry
        from torchfast._oom.transaction import Subjects, Transaction

        check_pace(split, grow_after)
        check_options(scaler=scaler, tokens=tokens, timeout_s=timeout_s)
        modules = modules_of(model)
        subjects = Subjects(modules, optimizers_of(optimizer), scaler, generators_of(generators))
        return OOMRetry(
            self,
            modules,
            Transaction(subjects, copy=copy),
            split=split,
            tokens=tokens,
            grow_after=grow_after,
            ranks=ranks_of(modules, subjects.optimizers, timeout_s),
        )

    def chunked(
        self, function: Callable[P, R], /, *, split: "Split" = "safe", grow_after: int = 100
    ) -> Callable[P, R]:
        """Return an inference function that works in chunks of the batch where the whole does not fit.

        The outputs of the chunks are put together along the batch dimension, so they must have one row for
        each sample, or be the same for every chunk; they are those of the whole batch, up to the rounding of
        other kernels. Where a batch would be worked on in chunks of one size only, the last is halved: by
        that, rows are told from what is only as long as a chunk, such as a mean over it. The chunk that
        fitted is kept for the next calls and grows back. Tensors among the arguments that have another size
        along the batch dimension go whole to every chunk. A quiet guard's function returns None where even
        one sample does not fit.

        Example:
            >>> import torch
            >>> from torchfast import inject_oom, oom_guard
            >>> predict = oom_guard().chunked(torch.nn.Linear(3, 2))
            >>> with torch.no_grad(), inject_oom(above=4, times=None):
            ...     predict(torch.zeros(10, 3)).shape
            torch.Size([10, 2])

        Args:
            function: a module or function from (nested) tensors to (nested) tensors.
            split: as for `retry`: "safe" refuses chunks where a layer in training sees the whole batch.
            grow_after: how many calls without a failure go by before a larger chunk is tried, at least 1.

        Raises:
            TypeError: the function cannot be called.
            ValueError: an unknown `split`, a `grow_after` below 1, or, from a call, an output neither has one
                row for each sample nor is the same for every chunk.
        """
        from torchfast._oom.chunks import chunked
        from torchfast._oom.ranks import Ranks
        from torchfast._oom.retry import OOMRetry
        from torchfast._oom.transaction import Subjects, Transaction

        check_pace(split, grow_after)
        check_function(function)
        retry = OOMRetry(
            self,
            (function,) if isinstance(function, nn.Module) else (),
            Transaction(Subjects((), (), None, ()), copy=False),
            split=split,
            tokens=None,
            grow_after=grow_after,
            ranks=Ranks(),
            uneven=True,  # by which rows are told
        )
        return chunked(retry, function, self._batch_dim)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> bool | None:
        raise NotImplementedError  # whether the error goes on is what the two kinds of guard differ by

    def _leave(self, error: BaseException | None) -> OutOfMemoryReport | None:
        """Let go, and return the report, if the block ran out of memory."""
        bound = self._bound.pop() if len(self._bound) == 1 else self._bound_by(_frame(2))
        return None if error is None else self._explained(error, bound)

    def _bound_by(self, frame: FrameType) -> frames.Bound:
        """Return what was noted when this frame entered: tasks and generators leave in any order."""
        places = [i for i, bound in enumerate(self._bound) if bound.frame_id == id(frame)]
        return self._bound.pop(places[-1] if places else -1)

    def _explained(
        self, error: BaseException, bound: frames.Bound, size: int | None = None
    ) -> OutOfMemoryReport | None:
        if not isinstance(error, Exception):
            return None
        record = classify(error, handled_id=bound.handled_id)
        if record is None:
            return None
        # An inner guard has explained it already; of what it held, the outer block lets go as well.
        related = frames.related_errors(error, bound.handled_id)
        inner = [found.report for found in related if isinstance(found, OutOfMemoryError)]
        self.report = next((report for report in inner if report is not None), None)
        if self.report is None:
            self.report = self._explain(error, record, bound, size)
        else:
            clean_up(error, bound, keep_frames=self._keep_frames)
        return self.report

    def _amend(self, report: OutOfMemoryReport, sentence: str | None) -> OutOfMemoryReport:
        """Add to the report why there was no further try."""
        if sentence is not None:
            text = f"{report.message}\n{sentence}"
            more = report.details.replace(report.message, text, 1)
            report = dataclasses.replace(report, message=text, details=more)
        self.report = report
        return report

    def _device(self) -> torch.device:
        return resolve_device(self._asked_device)

    def _explain(
        self, error: BaseException, record: OutOfMemoryRecord, bound: frames.Bound, size: int | None
    ) -> OutOfMemoryReport:
        device = record.device or self._device()
        # First all that is lost when the frames are cleared, then all that is known only afterwards.
        findings, place = frames.look_into(error, bound), place_of(error)
        text = "".join(traceback.format_exception(error))
        now = telemetry.situation(device)
        clean_up(error, bound, keep_frames=self._keep_frames)
        held_bytes = telemetry.situation(device).allocated_bytes
        batch_size, source = self._size(findings) if size is None else (size, "steps")
        case = message.Case(
            record=record,
            device=device,
            findings=findings,
            batch_size=batch_size,
            batch_size_source=source,
            suggestion=telemetry.suggest(self._log, batch_size, held_bytes, now, record.requested_bytes),
            growth_bytes=self._log.growth_bytes,
            place=place,
            traceback=text,
            status=self._status(),
        )
        return message.report(case)

    def _status(self) -> Any:
        # An error of the monitor's would take the place of the failure that is being explained.
        with suppress(Exception):
            return None if self._monitor is None else self._monitor.status()
        return None

    def _size(self, findings: frames.Findings) -> tuple[int | None, SizeSource | None]:
        if self._log.batch_size is not None:
            return self._log.batch_size, "steps"
        if self._batch_size is not None:
            return self._batch_size, "given"
        return findings.common_size, None if findings.common_size is None else "guess"

    def _per_call(self) -> Self:
        """Return a guard of the same options for one call: a decorated function may run in many threads."""
        guard = type(self)(
            self._batch_size,
            self._batch_dim,
            self._monitor,
            self._asked_device,
            keep_frames=self._keep_frames,
        )
        guard._log = self._log  # the function knows the outer guard only, and loops over its `steps`
        return guard


class Steps(Generic[T]):
    """The batches of a loader, each noted by a guard as one step. Made by `guard.steps(loader)`."""

    def __init__(self, loader: Iterable[T], guard: Guard) -> None:
        self._loader, self._guard = loader, guard

    def __iter__(self) -> Iterator[T]:
        guard = self._guard
        return telemetry.logged_steps(
            guard._log,
            self._loader,
            guard._device(),
            lambda batch: _batch.batch_size(batch, dim=guard._batch_dim),
            guard._monitor,
        )

    def __len__(self) -> int:
        return len(cast(Sized, self._loader))
