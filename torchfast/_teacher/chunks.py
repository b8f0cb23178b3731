"""A forward pass in parts of the batch, where the whole does not fit."""

from collections.abc import Sequence
from typing import Any

import torch

from torchfast._batch import batch_size, split
from torchfast._oom_errors import classify
from torchfast._teacher.closeness import Forward, differs
from torchfast._tree import flatten


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
    """Return the outputs of all samples, computed `size` at a time.

    Each chunk's outputs are copied into their place and dropped: concatenation would hold everything twice.
    """
    n_samples = None if size is None else batch_size(inputs)
    if size is None or n_samples is None or size >= n_samples:
        return forward(inputs)
    whole: list[Any] = []
    around: Any = None
    start = 0
    for part in split(inputs, size):
        length = min(size, n_samples - start)
        leaves, structure = flatten(forward(part))
        rest = structure.rebuild(range(len(leaves)))
        if start == 0:
            whole = [_room(leaf, length, n_samples) for leaf in leaves]
            around = rest
        elif rest != around:
            raise _cannot_split("returns things other than tensors, which differ from part to part")
        _put(leaves, whole, start, length)
        start += length
    return structure.rebuild(whole)


def _room(leaf: Any, length: int, n_samples: int) -> Any:
    """Return room for all samples where the output has a row for each sample, else the output itself."""
    if isinstance(leaf, torch.Tensor) and leaf.shape[:1] == (length,):
        return leaf.new_empty((n_samples, *leaf.shape[1:]))
    return leaf


def _put(leaves: list[Any], whole: list[Any], start: int, length: int) -> None:
    for leaf, room in zip(leaves, whole, strict=True):
        if room is leaf:
            continue
        if not isinstance(leaf, torch.Tensor):
            raise _cannot_split(f"returns {type(leaf).__name__}, which cannot be put together from parts")
        if leaf.shape == (length, *room.shape[1:]) and start + length <= len(room):
            room[start : start + length] = leaf
        elif leaf.shape != room.shape or not torch.equal(leaf, room):
            raise _cannot_split(f"returns an output of shape {tuple(leaf.shape)} for {length} samples")


def _check_samples_are_independent(forward: Forward, inputs: Any, size: int | None) -> None:
    """Refuse to split for a teacher whose output for a sample depends on the samples beside it."""
    if size is None or size < 2:
        return
    part = split(inputs, size)[0]
    together, apart = (_in_chunks(forward, part, at_a_time) for at_a_time in (None, size // 2))
    if differs(together, apart) is not None:
        raise _cannot_split("gives a sample other outputs when the samples beside it change")


def _cannot_split(reason: str) -> RuntimeError:
    return RuntimeError(
        "the teacher cannot run in parts of the batch, as a lack of memory or chunk_size= asks for: "
        f"it {reason}. Give it a smaller batch, or a smaller type such as dtype=torch.bfloat16."
    )
