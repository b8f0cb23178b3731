"""Operators that look at values, which paper tensors have only where they follow from integers."""

from typing import Any

import torch

from torchfast._estimate.known import values_of
from torchfast._estimate.recorder import Recorder

_READ_BACK = "numbers that the step reads back from the GPU were taken to be 0 (1 for integers)"
_ALL_CHOSEN = "masks that depend on activations were taken to choose every element"
_EVEN = "choices that depend on activations (top-k, arg max, sorting) were taken to be spread evenly"


def item(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Answer `.item()` and `bool()`: with what is known, else with what stops nothing."""
    known = values_of(args[0])
    if known is not None:
        return func(known, **kwargs)
    dtype = args[0].dtype
    recorder.assumptions[_READ_BACK] = None
    if dtype == torch.bool:
        return False
    return 0.0 if dtype.is_floating_point else 1


def to_copy(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Copy to another type, or to the host: what is not known arrives as zeros."""
    device = kwargs.get("device")
    if device is None or device.type == "meta":
        return recorder.run(func, args, kwargs)
    known = values_of(args[0])
    if known is not None:
        return func(known, **kwargs)
    recorder.assumptions[_READ_BACK] = None
    return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)


def copy(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Copy into a tensor; one of the host's stays as it is."""
    return recorder.run(func, args, kwargs) if args[0].is_cuda else args[0]


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
    return recorder.new((count,), tensor.dtype)


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


def choice(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Choose among activations: the indices are taken to go round, so that each is chosen equally often."""
    outputs = recorder.run(func, args, kwargs)
    chosen = outputs[1] if isinstance(outputs, (tuple, list)) else outputs
    if values_of(args[0]) is None and chosen.dtype == torch.int64 and chosen.numel() <= _MOST_CHOICES:
        dim = _dim(func, args, kwargs)
        n_classes = args[0].shape[dim] if args[0].dim() else 1
        recorder.assumptions[_EVEN] = None
        # Along the chosen dimension the classes differ; from row to row the first one moves on.
        order = torch.arange(chosen.numel()).reshape(chosen.shape) % max(n_classes, 1)
        chosen.values = order
    return outputs


_MOST_CHOICES = 2**21
CHOICES = ("topk", "argmax", "argmin", "sort", "multinomial")


def _dim(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    names = [argument.name for argument in func._schema.arguments]
    dim = (dict(zip(names, args, strict=False)) | kwargs).get("dim")
    return -1 if dim is None else int(dim)
