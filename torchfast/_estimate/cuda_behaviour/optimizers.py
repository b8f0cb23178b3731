"""Foreach and fused operators of optimizers: shapes only, since their decomposition in Python is slow."""

from typing import Any

import torch

from torchfast._estimate.recorder import Recorder


def foreach(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run `_foreach_*`: in place nothing is taken, else one tensor for each of the first list."""
    del kwargs
    if func._schema.returns == []:
        return None
    first = next(arg for arg in args if isinstance(arg, (list, tuple)))  # pow may take its number first
    return [recorder.new(t.shape, t.dtype, t.stride()) for t in first]


def foreach_norm(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run `_foreach_norm`: one scalar a tensor, and partial results of its chunks of 65,536 elements.

    ForeachReduceOp.cu, torch 2.11: `output_per_tensor` holds the largest number of chunks for every tensor.
    """
    del func
    tensors = args[0]
    dtype = kwargs.get("dtype") or tensors[0].dtype
    accumulated_bytes = max(4, dtype.itemsize)
    n_chunks = max(-(-t.numel() // _CHUNK) for t in tensors)
    with recorder.scratch(len(tensors) * n_chunks * accumulated_bytes):
        return [recorder.new((), dtype) for _ in tensors]


_CHUNK = 65_536


def nothing(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operator that works in place and takes no memory."""
    del recorder, func, args, kwargs


IN_PLACE = (
    "_fused_adam_",
    "_fused_adamw_",
    "_fused_sgd_",
    "_fused_adagrad_",
    "_amp_foreach_non_finite_check_and_unscale_",
)


def amp_update_scale(
    recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> torch.Tensor:
    """Run `_amp_update_scale_`, which changes the scale in place."""
    del recorder, func, kwargs
    scale: torch.Tensor = args[0]
    return scale
