"""The training step that is run on paper: what the user gave, put in the order in which loops do it."""

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from torchfast import _tree
from torchfast._modules import call, what


@dataclass(frozen=True, slots=True)
class Plan:
    """What a step consists of."""

    model: nn.Module
    inputs: Any
    target: Any
    loss: Callable[..., Any] | None
    teacher: Any
    optimizer: Any  # an instance, something that makes one from parameters, or None
    autocast: torch.dtype | None
    grad_scaler: bool
    clip_grad_norm: float | None
    training: bool
    step: Callable[..., Any] | None
    n_steps: int
    batch_dim: int = 0


@dataclass(slots=True)
class Objects:
    """The same objects on paper."""

    inputs: Any
    target: Any
    optimizer: torch.optim.Optimizer | None
    scaler: torch.amp.GradScaler | None
    assumptions: dict[str, None]  # an ordered set, to which a step adds what it took for granted


def teacher_module(teacher: Any) -> nn.Module | None:
    """Return the teacher, or the module inside of what is called like one, as a GPUTeacher is."""
    inner = getattr(teacher, "module", None)
    return next((each for each in (teacher, inner) if isinstance(each, nn.Module)), None)


def run_step(plan: Plan, objects: Objects) -> None:
    """Run one step: the user's own, a training step, or inference."""
    if plan.step is not None:
        plan.step(*([objects.inputs] if _n_needed(plan.step) else []))
    elif plan.training:
        _train(plan, objects)
    else:
        with torch.no_grad(), _autocast(plan):
            call(plan.model, objects.inputs)


def _train(plan: Plan, objects: Objects) -> None:
    if objects.optimizer is None:
        plan.model.zero_grad()
    else:
        objects.optimizer.zero_grad()
    loss, kept = _forward(plan, objects)
    scaled = loss if objects.scaler is None else objects.scaler.scale(loss)
    scaled.backward()
    del kept
    if plan.clip_grad_norm is not None:
        if objects.scaler is not None and objects.optimizer is not None:
            objects.scaler.unscale_(objects.optimizer)
        nn.utils.clip_grad_norm_(plan.model.parameters(), plan.clip_grad_norm)
    if objects.optimizer is None:
        return
    if objects.scaler is None:
        objects.optimizer.step()
    else:
        objects.scaler.step(objects.optimizer)
        objects.scaler.update()


def _forward(plan: Plan, objects: Objects) -> tuple[torch.Tensor, Any]:
    """Return the loss and what a loop keeps until the backward pass is over: the teacher's outputs."""
    with _autocast(plan):
        taught: tuple[Any, ...] = ()
        if plan.teacher is not None:
            with torch.no_grad():
                taught = (call(plan.teacher, objects.inputs),)
        output = call(plan.model, objects.inputs)
        if plan.loss is None:
            loss, assumption = own_loss(output)
            objects.assumptions[assumption] = None
            return loss, taught
        extra = taught if _takes_three(plan.loss) else ()
        return _of_one_number(plan.loss(output, objects.target, *extra)), taught


def _of_one_number(loss: Any) -> torch.Tensor:
    if isinstance(loss, torch.Tensor) and loss.numel() == 1:
        return loss
    found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else what(loss)
    raise ValueError(
        f"loss= returned {found}, and a backward pass starts from a tensor of one number. Give a function "
        "that returns that alone: lambda output, target: loss(output, target).mean(), or [0], or ['loss']."
    )


def own_loss(output: Any) -> tuple[torch.Tensor, str]:
    """Return the loss of an output that has one, else the sum of its floating-point tensors, and which."""
    own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(own, torch.Tensor):
        return own if own.ndim == 0 else own.sum(), "no loss= was given: the output's own `loss` was taken"
    parts = [_summed(part) for part in _tree.tensors(output) if part.requires_grad]
    if not parts:
        raise ValueError(
            "the model's output has no floating-point tensor that depends on its parameters, so there is "
            "nothing to run a backward pass from. Give loss=, or training=False to estimate inference."
        )
    loss = torch.stack([part.float() for part in parts]).sum() if len(parts) > 1 else parts[0]
    n_tensors = "floating-point tensor" if len(parts) == 1 else f"{len(parts)} floating-point tensors"
    return loss, f"no loss= was given: the sum of the output's {n_tensors} was taken"


def _summed(tensor: torch.Tensor) -> torch.Tensor:
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).sum()


def _autocast(plan: Plan) -> AbstractContextManager[Any]:
    return nullcontext() if plan.autocast is None else torch.autocast("cuda", dtype=plan.autocast)


def _takes_three(loss: Callable[..., Any]) -> bool:
    """Whether a loss wants the teacher's output as its third argument."""
    return _n_needed(loss) >= 3


def _n_needed(function: Callable[..., Any]) -> int:
    """Return how many arguments a function cannot do without."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return 0  # a builtin that does not say
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(1 for p in parameters if p.kind in positional and p.default is p.empty)
