"""Loss operators: element by element first, then the reduction."""

import math
from typing import Any

import torch

from torchfast._estimate.cuda_behaviour.reductions import scratch_bytes
from torchfast._estimate.recorder import Recorder, Rule


def reduced_into_full_size(
    recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run a loss whose reduced result keeps the storage of its elements (Loss.cpp, torch 2.11).

    The output is made in the size of the elements and shrunk to a number; the elements are computed into a
    tensor of their own, which is gone at the end.
    """
    meta = recorder.run_unrecorded(func, args, kwargs)
    if meta.dim() != 0:
        return recorder.adopt(meta)
    shape = torch.broadcast_shapes(args[0].shape, args[1].shape)
    full = torch.empty(shape, dtype=meta.dtype, device="meta")
    output = recorder.adopt(full.as_strided((), ()))
    accumulator_bytes = max(4, meta.dtype.itemsize)
    partial = scratch_bytes(full, range(len(shape)), accumulator_bytes, recorder.gpu)
    with recorder.scratch(math.prod(shape) * meta.dtype.itemsize, *partial):
        return output


def elements_then_reduced(
    recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run a loss whose elements are gone once they are reduced."""
    output = recorder.run(func, args, kwargs)
    if output.dim() != 0:
        return output
    size_bytes = math.prod(torch.broadcast_shapes(args[0].shape, args[1].shape)) * output.dtype.itemsize
    with recorder.scratch(size_bytes):
        return output


RULES: dict[str, Rule] = {
    "mse_loss": reduced_into_full_size,
    "smooth_l1_loss": reduced_into_full_size,
    "binary_cross_entropy": reduced_into_full_size,
    "huber_loss": elements_then_reduced,
    "soft_margin_loss": elements_then_reduced,
}
