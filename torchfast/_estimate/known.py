"""Values that are known on paper: those of integer tensors, and what follows from them.

Masks, lengths, labels and positions decide which code a model runs and how large its tensors get. Their
values are carried along on the host where all that they come from is known: never for what weights or images
went into.
"""

import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from torchfast._estimate.paper import META, PaperTensor

_MOST_NUMBERS = 2**22  # 32 MiB of int64: masks and tokens, not images
_MOST_FLOATS = 2**22  # masks of numbers to add, and all that is made of constants


def worth_keeping(tensor: torch.Tensor) -> bool:
    """Whether the values of a tensor are carried along if they are known."""
    most = _MOST_FLOATS if tensor.is_floating_point() or tensor.is_complex() else _MOST_NUMBERS
    return tensor.numel() <= most


def keep(paper: torch.Tensor, original: torch.Tensor) -> None:
    """Remember the values of a tensor of the user's for its paper tensor."""
    if not original.is_meta and worth_keeping(original) and not original.is_floating_point():
        paper.values = original.detach().to("cpu", copy=True)  # type: ignore[assignment] # a paper tensor's own


def values_of(tensor: torch.Tensor) -> torch.Tensor | None:
    """Return the known values of a tensor: a paper tensor's where there are any, a real one's own."""
    if not isinstance(tensor, PaperTensor):
        return None if tensor.is_meta else tensor
    return tensor.values


def follow(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], outputs: Any) -> None:
    """Compute the values of an operator's outputs where those of its inputs are known."""
    if outputs is None and args and isinstance(args[0], (list, tuple)):
        _follow_in_lists(func, args, kwargs)
        return
    first = outputs[0] if isinstance(outputs, (tuple, list)) and outputs else outputs
    if not isinstance(first, PaperTensor):
        return
    if args and first is args[0]:
        _follow_in_place(func, args, kwargs, first)
        return
    if first.is_floating_point() and first.numel() > _MOST_FLOATS and isinstance(outputs, torch.Tensor):
        return
    known = _all_known(args, kwargs)
    if known is None or func._schema.name.startswith(_UNSET):
        return
    try:
        results = func(*known[0], **known[1])
    except RuntimeError:  # the host has no kernel for it, or none for these values: not known, then
        return
    for output, value in zip(_tensors(outputs), _tensors(results), strict=False):
        if isinstance(output, PaperTensor) and worth_keeping(value) and _has_room_for(value):
            output.values = value


class _Held:
    """What the large values that are known take of the host."""

    n_bytes = 0


def _has_room_for(value: torch.Tensor) -> bool:
    """Whether a value may be held too; counts it, if it is large, for as long as it lives."""
    if value.nbytes <= _SMALL_BYTES:
        return True
    if _Held.n_bytes + value.nbytes > _MOST_HELD_BYTES:
        return False
    _Held.n_bytes += value.nbytes
    weakref.finalize(value, _let_go, value.nbytes)
    return True


def _let_go(n_bytes: int) -> None:
    _Held.n_bytes -= n_bytes


_SMALL_BYTES = 2**20
_MOST_HELD_BYTES = 2**26  # an estimate shall take little of the host, however many masks a model makes


def _follow_in_place(
    func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], changed: PaperTensor
) -> None:
    if changed.values is None and not (changed.numel() <= _MOST_FLOATS and func._schema.name in _OVERWRITES):
        return
    if changed.values is None:
        changed.values = torch.empty(changed.shape, dtype=changed.dtype)
    known = _all_known(args, kwargs)
    try:
        if known is None:
            changed.values = None
        else:
            func(*known[0], **known[1])
    except RuntimeError:  # no kernel on the host, as above
        changed.values = None


def _follow_in_lists(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Follow what changes tensors of a list in place: counters of steps that lie on the GPU."""
    changed = [tensor for tensor in args[0] if isinstance(tensor, PaperTensor) and tensor.values is not None]
    if not changed:
        return
    known = _all_known(args, kwargs) if len(changed) == len(args[0]) else None
    try:
        if known is not None:
            func(*known[0], **known[1])
            return
    except RuntimeError:  # no kernel on the host, as above; some may have changed before
        pass
    for tensor in changed:
        tensor.values = None


# Operators whose result has no values, and those that give a tensor new ones whatever it held.
_UNSET = ("aten::empty", "aten::new_empty", "aten::_cudnn")
_OVERWRITES = ("aten::fill_", "aten::zero_", "aten::copy_")


def _all_known(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]] | None:
    """Return the arguments with values in the place of paper tensors, or None where one is unknown."""
    try:
        return [_known(arg) for arg in args], {name: _known(arg) for name, arg in kwargs.items()}
    except _UnknownError:
        return None


class _UnknownError(Exception):
    """An argument's values are not known."""


def _known(arg: Any) -> Any:
    if isinstance(arg, torch.Tensor):
        value = values_of(arg)
        if value is None:
            raise _UnknownError
        return value
    if isinstance(arg, (list, tuple)):
        return [_known(item) for item in arg]
    return torch.device("cpu") if arg == META else arg


def _tensors(outputs: Any) -> Iterator[torch.Tensor]:
    items: Iterable[Any] = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    return (item for item in items if isinstance(item, torch.Tensor))


_MOST_ZEROS = 2**24  # elements: what a shape may cost in memory of the host


def on_zeros(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run an operator on zeros on the CPU and return its outputs on `meta`; None where it cannot be done."""
    n_elements = sum(t.numel() for t in _tensors([*args, *kwargs.values()]))
    if n_elements > _MOST_ZEROS:
        return None
    try:
        return _to_meta(func(*(_zeros(a) for a in args), **{name: _zeros(a) for name, a in kwargs.items()}))
    except RuntimeError:  # no kernel on the host, or one that zeros are no input for
        return None


def _zeros(arg: Any) -> Any:
    if isinstance(arg, torch.Tensor):
        known = values_of(arg)
        return torch.zeros(arg.shape, dtype=arg.dtype) if known is None else known
    if isinstance(arg, (list, tuple)):
        return [_zeros(item) for item in arg]
    return torch.device("cpu") if arg == META else arg


def _to_meta(outputs: Any) -> Any:
    if isinstance(outputs, torch.Tensor):
        return outputs.to(META)
    return type(outputs)(_to_meta(o) for o in outputs) if isinstance(outputs, (tuple, list)) else outputs


def off_host(arg: Any) -> Any:
    """Return a meta tensor in the place of a real one of the host."""
    is_real = isinstance(arg, torch.Tensor) and not isinstance(arg, PaperTensor) and not arg.is_meta
    return torch.empty_like(arg, device=META) if is_real and arg.dim() else arg
