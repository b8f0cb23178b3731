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
        self._gives_back: set[Any] = set()  # keys of operators in place, which return their first argument
        self._is_kept: dict[Any, bool] = {}

    def key(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return what decides the outputs, or None where they are not new tensors or it cannot be told."""
        is_kept = self._is_kept.get(func)
        if is_kept is None:
            is_kept = self._is_kept[func] = _makes_new(func) or _works_in_place(func)
        if not is_kept:
            return None
        try:
            key = (func, _key(args), _key(tuple(kwargs.items())) if kwargs else ())
            hash(key)
        except TypeError:
            return None
        return key

    def recall(self, key: Any, args: tuple[Any, ...]) -> Any:
        """Return what the operator would: new meta tensors, or its first argument; None if it is new."""
        known = self._known.get(key)
        if known is None:
            return args[0] if key in self._gives_back else None
        single, specs = known
        with torch._C.DisableTorchFunction():
            outputs = [
                None if s is None else torch.empty_strided(s[0], s[1], dtype=s[2], device=META) for s in specs
            ]
        return outputs[0] if single else tuple(outputs)

    def remember(self, key: Any, args: tuple[Any, ...], outputs: Any) -> None:
        """Keep what the operator answered, if its outputs are new and dense in their storage."""
        if args and outputs is args[0]:
            self._gives_back.add(key)
            return
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
                self._is_kept[key[0]] = False
                return
            if item.storage_offset() or item.untyped_storage().nbytes() != _span_bytes(item):
                return
            specs.append((item.shape, item.stride(), item.dtype))
        self._known[key] = single, specs


def _makes_new(func: Any) -> bool:
    """Whether an operator's schema says that it writes to nothing and returns no alias."""
    schema = func._schema
    return not schema.is_mutable and all(returned.alias_info is None for returned in schema.returns)


def _works_in_place(func: Any) -> bool:
    """Whether an operator changes the values of its first argument, and of nothing else, and returns it."""
    schema = func._schema
    written = [argument.alias_info is not None for argument in schema.arguments]
    return (
        schema.name.endswith("_")
        and len(schema.returns) == 1
        and written[:1] == [True]
        and not any(written[1:])
        and torch.Tag.inplace_view not in func.tags
    )


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
