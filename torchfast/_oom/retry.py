"""Trying a training step again: whole after cleaning up, then in parts, with the full batch's gradient."""

import functools
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, Self, TypeVar

import torch
from torch import nn

from torchfast import _batch
from torchfast._memory import allocator_stats
from torchfast._oom import frames, layers, work
from torchfast._oom.ranks import Outcome, PeerRanOutOfMemoryError, Ranks
from torchfast._oom.release import clean_up
from torchfast._oom.report import OutOfMemoryError, OutOfMemoryReport, error_of
from torchfast._oom.sizes import Sizes
from torchfast._oom.thrash import Thrash
from torchfast._oom.transaction import Transaction
from torchfast._tree import flatten

if TYPE_CHECKING:
    from torchfast._oom.base import Guard

T = TypeVar("T")
R = TypeVar("R")
Split = Literal["safe", "always", "never"]


class Part(NamedTuple, Generic[T]):
    """Some samples of a batch, and the factor for their mean loss that adds up to the whole batch's."""

    batch: T
    weight: float


class OOMRetry:
    """Training steps that survive running out of memory. Made by `guard.retry(model=...)`, which see.

    Example:
        >>> import torch
        >>> from torchfast import oom_guard
        >>> model = torch.nn.Linear(4, 1)
        >>> retry = oom_guard().retry(model=model)
        >>> @retry
        ... def gradients(attempt):
        ...     for part, weight in attempt:
        ...         (model(part).mean() * weight).backward()
        >>> gradients(torch.ones(8, 4))
        >>> retry.micro_batch_size is None
        True
    """

    def __init__(  # noqa: PLR0913 -- made in one place only, by guard.retry
        self,
        guard: "Guard",
        modules: Sequence[nn.Module],
        transaction: Transaction,
        *,
        split: Split,
        tokens: Callable[[Any], Any] | None,
        grow_after: int,
        ranks: Ranks,
        uneven: bool = False,
    ) -> None:
        self._guard, self._modules, self._split, self._tokens = guard, modules, split, tokens
        self._transaction, self._uneven = transaction, uneven
        self._sizes = Sizes(grow_after)
        self._ranks = ranks
        self._has_warned = False
        self._thrash = Thrash()

    @property
    def micro_batch_size(self) -> int | None:
        """How many samples are worked on at once; None while whole batches fit."""
        return self._sizes.limit

    def attempts(self, batch: T, /) -> "Iterator[OOMAttempt[T]]":
        """Return the attempts at one step with this batch: one if all goes well.

        Example:
            >>> import torch
            >>> from torchfast import inject_oom, oom_guard
            >>> model = torch.nn.Linear(4, 1)
            >>> optimizer = torch.optim.SGD(model.parameters())
            >>> retry = oom_guard().retry(model=model, optimizer=optimizer)
            >>> with inject_oom(above=4, times=None):
            ...     for attempt in retry.attempts(torch.ones(8, 4)):
            ...         with attempt:
            ...             for images, weight in attempt:
            ...                 (model(images).mean() * weight).backward()
            ...             optimizer.step()
            ...             optimizer.zero_grad()
            >>> attempt.number, attempt.size, retry.micro_batch_size
            (3, 4, 4)
        """
        try:
            yield from self._attempts(batch)
        finally:
            self._transaction.end()

    def _attempts(self, batch: T) -> "Iterator[OOMAttempt[T]]":
        leaves, structure = flatten(batch)
        apart = structure.rebuild(leaves)  # as a step may take things out of the batch, such as labels
        n_samples = _batch.common_size(leaves, self._guard._batch_dim) or 1
        size = self._sizes.of(n_samples)
        may_repeat = not self._sizes.is_trial(size)  # a size on trial that fails was simply too large
        number = 1
        if not self._begins(leaves, size):
            return
        while True:
            offered = batch if number == 1 else flatten(apart)[1].rebuild(leaves)
            attempt = OOMAttempt(self, offered, n_samples, number, may_repeat=may_repeat)
            del offered
            yield attempt
            if attempt.outcome is None:
                raise RuntimeError(
                    "an attempt of retry.attempts(...) was not entered: write `with attempt:` around "
                    "the step, or the same step would be offered for ever."
                )
            if attempt.outcome != Outcome.AGAIN:
                return
            if not may_repeat:
                self._sizes.shrink(attempt.size)
            may_repeat = False
            number += 1

    def _begins(self, leaves: Sequence[Any], size: int) -> bool:
        """Note where the step begins; False where a quiet guard gives up, as that takes memory too."""
        handled_id = id(sys.exception())
        work.now.n_samples = None  # copies are no work on what `guard.steps` has handed out
        try:
            self._transaction.begin(leaves)
        except Exception as error:
            bound = frames.Bound(0, (), {}, handled_id)
            report = self._explained(error, bound, size)
            self._ranks.begin()  # the others are in the step already
            try:
                outcome = Outcome.ERROR if report is None else Outcome.GIVE_UP
                self._ranks.agree(outcome, can_roll_back=True, thrashes=False)
            finally:
                self._ranks.end()
            if report is None:
                raise
            if not self._ends_quietly:
                raise error_of(report) from error
            return False
        return True

    def __call__(self, step: "Callable[[OOMAttempt[Any]], R]", /) -> Callable[[Any], R | None]:
        """Return a function that takes a batch and runs `step(attempt)` on it, again where it must.

        Example:
            >>> import torch
            >>> from torchfast import inject_oom, oom_guard
            >>> model = torch.nn.Linear(4, 1)
            >>> retry = oom_guard().retry(model=model)
            >>> @retry
            ... def gradients(attempt):
            ...     for images, weight in attempt:
            ...         (model(images).mean() * weight).backward()
            ...     return attempt.number
            >>> with inject_oom(at=2):
            ...     gradients(torch.ones(8, 4))
            2
        """

        @functools.wraps(step)
        def run(batch: Any) -> R | None:
            results: list[R] = []  # empty where a quiet guard gave up
            try:
                for attempt in self.attempts(batch):
                    with attempt:
                        results.append(step(attempt))
                return results.pop() if results else None
            finally:
                del batch  # an error keeps this frame

        return run

    @property
    def _ends_quietly(self) -> bool:
        """Whether a step just ends; where the guard has a block, it is that which ends, quietly or not."""
        return self._guard._is_quiet and not self._guard._bound

    def _explained(
        self, error: BaseException | None, bound: frames.Bound, size: int
    ) -> OutOfMemoryReport | None:
        if isinstance(error, PeerRanOutOfMemoryError):
            clean_up(error, bound)
        return None if error is None else self._guard._explained(error, bound, size)

    def _worked(self, n_samples: int, size: int, *, thrashes: bool) -> None:
        if thrashes and self._refusal(size) is None:
            self._sizes.add_a_part(n_samples)
        else:
            self._sizes.worked(size)

    @functools.cached_property
    def _device(self) -> torch.device:
        return self._guard._device()

    def _thrashes(self) -> bool:
        n_alloc_retries = self._transaction.n_alloc_retries  # asked already, for the optimizer's step
        if n_alloc_retries is None:
            stats = allocator_stats(self._device)
            n_alloc_retries = None if stats is None else stats.n_alloc_retries
        return n_alloc_retries is not None and self._thrash.has_risen(n_alloc_retries, self._device)

    def _refusal(self, size: int) -> str | None:
        """Say why a batch must not be worked on in parts of `size`, if so."""
        if size <= 1:
            return "Even one sample at a time does not fit."
        if self._split == "never":
            return 'Working in parts was switched off (split="never").'
        whole = layers.whole_batch_layers(self._modules)
        if whole and self._split == "safe":
            return (
                f"The batch was not worked on in parts: {layers.named(whole)} sees the whole batch in "
                "training, so parts would give another gradient. "
                'guard.retry(split="always") allows that; eval() or group norm avoids it.'
            )
        return None

    def _warn_of_parts(self, size: int) -> None:
        if self._has_warned:
            return
        self._has_warned = True
        whole = layers.whole_batch_layers(self._modules)
        drawing = layers.random_layers(self._modules)
        changing = layers.changing_layers(self._modules)
        differs = []
        if whole:
            differs.append(f"{layers.named(whole)} sees {size} samples at a time instead of all")
        if drawing:
            differs.append(f"{layers.named(drawing)} draws other random numbers than for the whole batch")
        if changing:
            differs.append(f"{layers.named(changing)} is refined once for each part")
        if differs:
            warnings.warn(
                f"oom_guard works in parts of at most {size} samples, and the gradient is not exactly "
                f"that of the whole batch: {'; '.join(differs)}.",
                stacklevel=4,
            )


class OOMAttempt(Generic[T]):
    """One try at a step: a context around it, and the parts of the batch to loop over.

    `n_samples` are in the batch; `number` counts from 1; `size` is the most samples that a part has;
    `outcome` is how it ended, None before. Where the attempt fails for memory, the step is put back to its
    beginning and the loop over `retry.attempts(batch)` offers the next; where there is no next, the
    explained error is raised.

    Example:
        >>> import torch
        >>> from torchfast import inject_oom, oom_guard
        >>> retry = oom_guard().retry(model=torch.nn.Linear(4, 1))
        >>> batch = torch.ones(8, 4)
        >>> with inject_oom(operator="add"):
        ...     for attempt in retry.attempts(batch):
        ...         with attempt:
        ...             for part, weight in attempt:
        ...                 _ = part + 1
        ...         print(attempt.number, attempt.size, attempt.n_samples)
        1 8 8
        2 8 8
    """

    def __init__(self, retry: OOMRetry, batch: T, n_samples: int, number: int, *, may_repeat: bool) -> None:
        self._retry, self._may_repeat = retry, may_repeat
        self._whole = [batch]
        self.n_samples = n_samples
        self.number = number
        self.size = retry._sizes.of(n_samples)
        self.outcome: Outcome | None = None

    def __iter__(self) -> Iterator[Part[T]]:
        retry = self._retry
        for part in self._parts():
            work.now.n_samples = min(self.size, self.n_samples)
            yield part
            del part
        work.now.n_samples = None
        if retry._ranks.is_distributed:
            retry._transaction.probe()  # now, as afterwards the ranks could not go back together
        retry._ranks.reduce()

    def _parts(self) -> Iterator[Part[T]]:
        if self.size >= self.n_samples:
            return iter([Part(self._whole[0], 1.0)])
        self._retry._guard._log.is_plain = False
        self._retry._warn_of_parts(self.size)
        dim, tokens = self._retry._guard._batch_dim, self._retry._tokens
        lengths = _batch.lengths_of(self.n_samples, self.size, uneven=self._retry._uneven)
        parts = _batch.cut(self._whole[0], lengths, dim=dim)
        counts = [float(tokens(part) if tokens else n) for part, n in zip(parts, lengths, strict=True)]
        total = sum(counts) or 1.0
        # Of a part without a valid token the mean is 0 / 0, and so are its gradients, whatever the weight.
        some = any(counts)
        return (
            Part(part, count / total) for part, count in zip(parts, counts, strict=True) if count or not some
        )

    def __enter__(self) -> Self:
        retry = self._retry
        self._bound = frames.bound_in(sys._getframe(1))
        retry._ranks.begin()  # this may refuse; then nothing is left behind
        retry._transaction.watch()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> bool:
        retry = self._retry
        retry._transaction.stop_watching()
        retry._ranks.end()
        work.now.n_samples = None
        if error is not None and not isinstance(error, Exception):
            self.outcome = Outcome.ERROR
            return False  # an interrupt does not wait for the other ranks
        report = retry._explained(error, self._bound, self.size)
        reason = None if report is None else self._why_not_again(report)
        own = _own_outcome(error, report, reason)
        self.outcome, thrashes = retry._ranks.agree(
            own,
            can_roll_back=retry._transaction.can_roll_back,
            thrashes=own == Outcome.DONE and retry._thrashes(),
        )
        if self.outcome != Outcome.DONE:
            retry._guard._log.is_plain = False
        if self.outcome != Outcome.AGAIN:
            self._whole.clear()
        if self.outcome == Outcome.DONE:
            retry._worked(self.n_samples, self.size, thrashes=thrashes)
            return False
        if self.outcome == Outcome.ERROR:
            return self._pass_on(error)
        if retry._transaction.can_roll_back:
            retry._transaction.roll_back()
        return self.outcome == Outcome.AGAIN or self._give_up(error, report, reason)

    def _why_not_again(self, report: OutOfMemoryReport) -> str | None:
        if not report.record.retryable:
            return "It was not tried again: that cannot help here."
        if not self._retry._transaction.can_roll_back:
            return (
                "It was not tried again: the optimizer had begun to change parameters. "
                "guard.retry(copy=True) keeps a copy of parameters and optimizer state, with which that "
                "can be undone."
            )
        return None if self._may_repeat else self._retry._refusal(self.size)

    def _pass_on(self, error: BaseException | None) -> bool:
        if error is None or isinstance(error, PeerRanOutOfMemoryError):
            raise RuntimeError(
                "another rank failed in this step with an error that is not about memory: see its "
                "output. This rank stops here, as it would wait for the other for ever."
            ) from None
        return False

    def _give_up(
        self, error: BaseException | None, report: OutOfMemoryReport | None, reason: str | None
    ) -> bool:
        if report is None or error is None:
            raise RuntimeError(
                "another rank ran out of memory in this step and it could not be tried again: see its output."
            ) from None
        report = self._retry._guard._amend(report, reason)
        # Half of an optimizer's step is done, where there is no way back: nothing must go on from there.
        if self._retry._ends_quietly and self._retry._transaction.can_roll_back:
            return True
        if isinstance(error, OutOfMemoryError):
            return False
        raise error_of(report) from error


def _own_outcome(
    error: BaseException | None, report: OutOfMemoryReport | None, reason: str | None
) -> Outcome:
    if error is None:
        return Outcome.DONE
    if isinstance(error, PeerRanOutOfMemoryError):
        return Outcome.AGAIN
    if report is None:
        return Outcome.ERROR
    return Outcome.AGAIN if reason is None else Outcome.GIVE_UP
