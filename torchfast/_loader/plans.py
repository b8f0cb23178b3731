"""Which batches are built alike, and so travel by the same plan.

Asked of every batch, hence in loops that run in C: first whether all is as in the batch before, by the check
that PyTorch's compiled code makes of its inputs, 8 us for 64 tensors; if not, by what decides, 37 us.
"""

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch

from torchfast._loader.plan import Plan, is_plain


class Plans:
    """The plans of the batches seen so far: most loaders build all their batches alike."""

    def __init__(self) -> None:
        self._plans: dict[Any, Plan] = {}
        self._last: tuple[Plan, Callable[..., bool]] | None = None

    def plan(self, leaves: Sequence[Any], /) -> Plan:
        """Return the plan for these leaves."""
        if self._last is not None:
            last, is_alike = self._last
            if last.n_leaves == len(leaves) and is_alike(*leaves):
                return last
        key = _likeness(leaves)
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= 64:  # shapes without end: remembering them would be a leak
                self._plans.clear()
            plan = self._plans[key] = Plan(leaves)
        check = None if plan.n_late else alike_check(leaves)
        self._last = None if check is None else (plan, check)
        return plan


_LIKENESS = attrgetter("dtype", "shape", "is_cpu", "layout", "requires_grad")
_IS_NESTED = attrgetter("is_nested")
_LAZY = (torch.Tensor.is_neg, torch.Tensor.is_conj, torch.Tensor._is_zerotensor)


def _likeness(leaves: Sequence[Any]) -> Any:
    """Return what decides how leaves travel: read in loops that run in C where all are ordinary tensors."""
    if set(map(type, leaves)) == {torch.Tensor}:
        try:
            if not any(any(map(is_lazy, leaves)) for is_lazy in _LAZY):
                return tuple(map(_LIKENESS, leaves)), tuple(map(torch.Tensor.stride, leaves))
        except RuntimeError:  # nested and compressed tensors have no strides
            pass
    return tuple([(leaf.dtype, leaf.shape, leaf.stride()) if is_plain(leaf) else None for leaf in leaves])


def alike_check(leaves: Sequence[torch.Tensor], /) -> Callable[..., bool] | None:
    """Return what says of as many objects whether each is a tensor like the one in its place; None if gone.

    Private: the guard of compiled code, in C++. It compares type, dtype, device, sizes, strides, whether a
    gradient is required, and all else that makes PyTorch treat a tensor in a way of its own, the modes of the
    calling thread included; and it holds none of the tensors.
    """
    guards = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
    guard = getattr(guards, "TensorGuards", None)
    if guard is None:
        return None
    try:
        # Both by name, always: without any names the constructor ends the process.
        check: Callable[..., bool] = guard(*leaves, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
    except (TypeError, RuntimeError):
        return None
    # A nested tensor is of the same type, has no strides, and being asked for them ends the process.
    return lambda *others: (
        set(map(type, others)) == {torch.Tensor} and not any(map(_IS_NESTED, others)) and check(*others)
    )
