"""The estimated step, to be run on paper again: with another batch, on another GPU, or changed."""

import types
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from torchfast import _batch, _tree
from torchfast._estimate.events import Trace
from torchfast._estimate.gpus import GPU
from torchfast._estimate.reach import reached_by
from torchfast._estimate.step import Plan
from torchfast._estimate.tracing import trace
from torchfast._estimate.variants import changed


def size_of(plan: Plan) -> int | None:
    """Return the number of samples in a plan's batch, by the one rule for that."""
    return _batch.batch_size(_tree.tensors((plan.inputs, plan.target)), dim=plan.batch_dim)


class Again:
    """Runs the step on paper again with one thing changed; holds model, teacher and optimizer weakly."""

    def __init__(self, plan: Plan, gpu: GPU) -> None:
        self._gpu, plan_loss = gpu, plan.loss
        self._held = {name: _weak(getattr(plan, name)) for name in ("model", "teacher", "optimizer")}
        self._held["step"] = _weak_function(plan.step)
        self._held["loss"] = _weak_function(plan.loss) if _holds_modules(plan.loss) else lambda: plan_loss
        self._functions = [name for name in ("step", "loss") if getattr(plan, name) is not None]
        self._plan = replace(
            plan,
            model=_GONE,
            teacher=None,
            optimizer=None,
            step=None,
            loss=None,
            inputs=_without_values(plan.inputs),
            target=_without_values(plan.target),
        )

    def __call__(
        self, *, batch_size: int | None = None, gpu: GPU | None = None, variant: str | None = None
    ) -> Trace | None:
        plan = replace(self._plan, **{name: held() for name, held in self._held.items()})
        if plan.model is None:
            raise ValueError(
                "The model of this estimate is gone, and what was asked for needs it to be run on paper "
                "again. An estimate holds its model weakly: keep the model while you ask, or estimate anew."
            )
        for name in self._functions:
            if getattr(plan, name) is None:
                raise ValueError(
                    f"The {name} of this estimate is gone, and what was asked for needs it to be run on "
                    "paper again. An estimate holds the function weakly: define it under a name, and keep "
                    "that while you ask."
                )
        old, dim = size_of(plan), plan.batch_dim
        if batch_size is not None and old is not None:
            plan = replace(
                plan,
                inputs=_resized(plan.inputs, old, batch_size, dim),
                target=_resized(plan.target, old, batch_size, dim),
            )
        varied = plan if variant is None else changed(plan, variant)
        return None if varied is None else trace(varied, gpu or self._gpu)


_GONE = nn.Module()


def _holds_modules(loss: Callable[..., Any] | None) -> bool:
    """Whether a loss keeps a network alive: its own weights, or what it gets at."""
    if isinstance(loss, nn.Module):
        return any(True for _ in loss.parameters())
    return isinstance(loss, types.MethodType) or bool(reached_by(loss).modules)


def _weak_function(step: Callable[..., Any] | None) -> Callable[[], Any]:
    """Return a weak reference to a function, which may hold the model in its variables."""
    if isinstance(step, types.MethodType):
        return weakref.WeakMethod(step)
    try:
        return (lambda: None) if step is None else weakref.ref(step)
    except TypeError:  # an object of a class with slots and none for weak references
        return lambda: step


def _weak(value: Any) -> Callable[[], Any]:
    """Return a weak reference to a module, what holds one, or an optimizer; a strong one to a factory."""
    if isinstance(value, (nn.Module, torch.optim.Optimizer)) or hasattr(value, "module"):
        return weakref.ref(value)
    return lambda: value


def _resized(batch: Any, old: int, new: int, dim: int) -> Any:
    """Return the batch with another number of samples: rows are repeated or left out."""

    def resize(tensor: torch.Tensor) -> torch.Tensor:
        if _batch.size_along(tensor, dim) != old:
            return tensor
        if tensor.is_meta:
            return tensor.new_empty((*tensor.shape[:dim], new, *tensor.shape[dim + 1 :]))
        return tensor.index_select(dim, torch.arange(new, device=tensor.device) % old)

    return _tree.map_tensors(resize, batch)


def _without_values(batch: Any) -> Any:
    """Return the batch on `meta`, but for integers, whose values a model may look at."""

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point() or tensor.is_meta:
            return torch.empty_like(tensor, device="meta")
        return tensor.detach().to("cpu", copy=True)

    return _tree.map_tensors(keep, batch)
