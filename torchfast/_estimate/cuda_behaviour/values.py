"""Operators that look at values, which paper tensors have only where they follow from integers."""

from typing import Any

import torch

from torchfast._estimate.known import values_of
from torchfast._estimate.recorder import Recorder

_TO_HOST = "what the step copies to the host was taken to arrive there as zeros"
_ALL_CHOSEN = "masks that depend on activations were taken to choose every element"
_ONCE = "counts of repetitions that depend on activations were taken to be 1"


def to_copy(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Copy to another type, or to the host: what is not known arrives as zeros."""
    device = kwargs.get("device")
    if device is None or device.type == "meta":
        return recorder.run(func, args, kwargs)
    known = values_of(args[0])
    if known is not None:
        return func(known, **kwargs)
    recorder.assumptions[_TO_HOST] = None
    return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)


def copy(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Copy into a tensor; one of the host's stays as it is."""
    return recorder.run(func, args, kwargs) if args[0].is_cuda else args[0]


def masked_fill(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Fill where a mask says so; a single value on the host is read, as CUDA's kernel does."""
    tensor, mask, value = args
    if isinstance(value, torch.Tensor) and not value.is_cuda:
        return recorder.run(func.overloadpacket.Scalar, (tensor, mask, value.item()), kwargs)
    return recorder.run(func, args, kwargs)


def nonzero(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """Return the places of what is not zero: all, where the mask is not known."""
    del func, kwargs
    known = values_of(args[0])
    if known is None:
        recorder.assumptions[_ALL_CHOSEN] = None
        count = args[0].numel()
    else:
        count = int(known.count_nonzero())
    return recorder.new((count, args[0].dim()), torch.int64, (1, max(count, 1)))


def masked_select(
    recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> torch.Tensor:
    """Return what a mask chooses: all, where it is not known."""
    del func, kwargs
    tensor, mask = args
    known = values_of(mask)
    shape = torch.broadcast_shapes(tensor.shape, mask.shape)
    if known is None:
        recorder.assumptions[_ALL_CHOSEN] = None
        count = torch.Size(shape).numel()
    else:
        count = int(known.expand(shape).count_nonzero())
    with recorder.scratch(count * len(shape) * 8):  # the places, as indices
        return recorder.new((count,), tensor.dtype)


def repeat_interleave(
    recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> torch.Tensor:
    """Return the places that a tensor of counts repeats: each once, where the counts are not known."""
    del func, kwargs
    counts = args[0]
    known = values_of(counts)
    if known is None:
        recorder.assumptions[_ONCE] = None
    with recorder.scratch(counts.numel() * 8):  # their running sum
        repeated = recorder.new((counts.numel() if known is None else int(known.sum()),), torch.int64)
    if known is not None:
        repeated.values = torch.repeat_interleave(known)  # type: ignore[assignment] # a paper tensor's own
    return repeated


def index(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Index with tensors; masks become the places that they choose, as the CUDA kernel does inside."""
    if not any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
        return recorder.run(func, args, kwargs)
    indices: list[Any] = []
    for i in args[1]:
        if i is None or i.dtype not in (torch.bool, torch.uint8):
            indices.append(i)
        else:
            indices.extend(nonzero(recorder, func, (i,), {}).unbind(1) if i.dim() else [i])
    return recorder.run(func, (args[0], indices, *args[2:]), kwargs)
