"""Remembers what meta kernels answered: steps and layers repeat, and many of the kernels are slow Python."""

from collections.abc import Mapping
from typing import Any

import torch

from torchfast._estimate.paper import META

Spec = tuple[torch.Size, tuple[int, ...], torch.dtype] | None


class ShapeCache:
    """Outputs of operators by the shapes, strides and types of their inputs and by their other arguments."""

    def __init__(self) -> None:
        self._known: dict[Any, tuple[bool, list[Spec]]] = {}
        self._makes_new: dict[Any, bool] = {}

    def key(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return what decides the outputs, or None where they are not new tensors or it cannot be told."""
        makes_new = self._makes_new.get(func)
        if makes_new is None:
            makes_new = self._makes_new[func] = _makes_new(func)
        if not makes_new:
            return None
        try:
            key = (func, _key(args), _key(tuple(kwargs.items())) if kwargs else ())
            hash(key)
        except TypeError:
            return None
        return key

    def recall(self, key: Any) -> Any:
        """Return new meta tensors as the operator would, or None where it was not asked before."""
        known = self._known.get(key)
        if known is None:
            return None
        single, specs = known
        with torch._C.DisableTorchFunction():
            outputs = [
                None if s is None else torch.empty_strided(s[0], s[1], dtype=s[2], device=META) for s in specs
            ]
        return outputs[0] if single else tuple(outputs)

    def remember(self, key: Any, args: tuple[Any, ...], outputs: Any) -> None:
        """Keep what the operator answered, if its outputs are new and dense in their storage."""
        single = isinstance(outputs, torch.Tensor)
        items = [outputs] if single else outputs
        if not isinstance(items, (list, tuple)) or isinstance(outputs, list):
            return
        inputs = {t.untyped_storage()._cdata for t in args if isinstance(t, torch.Tensor)}
        specs: list[Spec] = []
        for item in items:
            if item is None:
                specs.append(None)
                continue
            if type(item) is not torch.Tensor or not item.is_meta or item.untyped_storage()._cdata in inputs:
                self._makes_new[key[0]] = False
                return
            if item.storage_offset() or item.untyped_storage().nbytes() != _span_bytes(item):
                return
            specs.append((item.shape, item.stride(), item.dtype))
        self._known[key] = single, specs


def _makes_new(func: Any) -> bool:
    """Whether an operator's schema says that it writes to nothing and returns no alias."""
    schema = func._schema
    return not schema.is_mutable and all(returned.alias_info is None for returned in schema.returns)


def _key(arg: Any) -> Any:
    if isinstance(arg, torch.Tensor):
        return arg.shape, arg.stride(), arg.dtype, type(arg)
    if isinstance(arg, (tuple, list)):
        return tuple(_key(item) for item in arg)
    return arg, type(arg)  # 1, 1.0 and True are equal and decide different types


def _span_bytes(tensor: torch.Tensor) -> int:
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.dtype.itemsize
