"""A forward pass in parts of the batch, where the whole does not fit."""

from collections.abc import Sequence
from typing import Any

import torch

from torchfast._batch import Gathered, batch_size, cut, lengths_of
from torchfast._oom_errors import classify
from torchfast._teacher.closeness import Forward, differs


def forward_in_memory(
    forward: Forward, inputs: Any, held: Sequence[torch.Tensor], size: int | None, /
) -> tuple[Any, int | None]:
    """Run `forward` on as many samples at a time as fit, and return the outputs and that number.

    It begins with `size` samples at a time (None: all of them), and halves after each out-of-memory error,
    down to one. The error of that last attempt is raised. `held` are the tensors of the inputs.
    """
    first_size, before = size, [tensor._version for tensor in held]
    while True:
        try:
            if size != first_size:
                _check_samples_are_independent(forward, inputs, size)
            return _in_chunks(forward, inputs, size), size
        except Exception as error:  # out of memory comes in many types
            record = classify(error)
            if record is None or not record.retryable:
                raise
            n_samples = batch_size(inputs)
            smaller = min(size or n_samples or 0, n_samples or 0) // 2
            if smaller == 0 or [tensor._version for tensor in held] != before:
                error.add_note(_does_not_fit(n_samples) if smaller == 0 else _CHANGED)
                raise
        # Only here, outside the except block, have the failed pass's frames let go of their tensors.
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        size = smaller


_CHANGED = (
    "The teacher had already changed its inputs in place, so it cannot be run on them again. "
    "Change its forward to leave them as they are: x = x - mean instead of x -= mean."
)


def _does_not_fit(n_samples: int | None) -> str:
    if n_samples is None:
        return "The teacher was given no tensor with a batch dimension, so its work cannot be split."
    return (
        "The teacher does not fit even with one sample at a time. Smaller inputs, dtype=torch.bfloat16 or a "
        "smaller student beside it would help."
    )


def _in_chunks(forward: Forward, inputs: Any, size: int | None) -> Any:
    """Return the outputs of all samples, computed `size` at a time."""
    n_samples = None if size is None else batch_size(inputs)
    if size is None or n_samples is None or size >= n_samples:
        return forward(inputs)
    gathered = Gathered(n_samples, refusal=_not_rows)
    lengths = lengths_of(n_samples, size, uneven=True)
    for part, length in zip(cut(inputs, lengths), lengths, strict=True):
        gathered.add(forward(part), length)
    return gathered.whole()


def _check_samples_are_independent(forward: Forward, inputs: Any, size: int | None) -> None:
    """Refuse to split for a teacher whose output for a sample depends on the samples beside it."""
    if size is None or size < 2:
        return
    half = size // 2
    lengths = [half + 1, half - 1] if half > 1 else [half, half]
    together, apart = forward(cut(inputs, [2 * half])[0]), Gathered(2 * half, refusal=_not_rows)
    for part, length in zip(cut(inputs, lengths), lengths, strict=True):
        apart.add(forward(part), length)
    if differs(together, apart.whole()) is not None:
        raise _cannot_split("gives a sample other outputs when the samples beside it change")


def _not_rows(what: str) -> RuntimeError:
    return _cannot_split(f"returns {what}")


def _cannot_split(reason: str) -> RuntimeError:
    return RuntimeError(
        "the teacher cannot run in parts of the batch, as a lack of memory or chunk_size= asks for: "
        f"it {reason}. Give it a smaller batch, or a smaller type such as dtype=torch.bfloat16."
    )
