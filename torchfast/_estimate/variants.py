"""One thing about a step changed, for what-if rows: a change turns a plan into another plan, or into None."""

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from torchfast import _tree
from torchfast._estimate.step import Plan

_MIN_BLOCKS = 3


def changed(plan: Plan, change: str) -> Plan | None:
    """Return the plan with the change made; None where it makes no sense for this step.

    The user's model is left alone: where modules change, a copy without memory does.
    """
    if plan.step is not None:  # a step of the user's own holds its objects by itself
        return None
    return _CHANGES[change](plan)


# --- precision ---------------------------------------------------------------------------------------------


def _is_fp32(plan: Plan) -> bool:
    return plan.autocast is None and all(p.dtype == torch.float32 for p in plan.model.parameters())


def _autocast(plan: Plan) -> Plan | None:
    return replace(plan, autocast=torch.bfloat16, grad_scaler=False) if _is_fp32(plan) else None


def _pure_bf16(plan: Plan) -> Plan | None:
    if any(p.dtype != torch.float32 for p in plan.model.parameters()):
        return None
    half = _copied(plan)
    if half is None:
        return None
    half.model.to(torch.bfloat16)
    if isinstance(half.teacher, nn.Module):
        half.teacher.to(torch.bfloat16)
    return replace(half, autocast=None, grad_scaler=False, inputs=_tree.map_tensors(_to_bf16, half.inputs))


def _to_bf16(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor


# --- optimizers --------------------------------------------------------------------------------------------


def _sgd(plan: Plan) -> Plan | None:
    return _with_optimizer(plan, torch.optim.SGD, lr=0.1)


def _sgd_with_momentum(plan: Plan) -> Plan | None:
    return _with_optimizer(plan, torch.optim.SGD, lr=0.1, momentum=0.9)


def _adamw(plan: Plan) -> Plan | None:
    return _with_optimizer(plan, torch.optim.AdamW)


def _fused_adamw(plan: Plan) -> Plan | None:
    return _with_optimizer(plan, torch.optim.AdamW, fused=True)


def _adafactor(plan: Plan) -> Plan | None:
    return _with_optimizer(plan, torch.optim.Adafactor)


def _with_optimizer(plan: Plan, kind: Callable[..., Any], **options: Any) -> Plan | None:
    return replace(plan, optimizer=functools.partial(kind, **options)) if plan.training else None


def _fused(plan: Plan) -> Plan | None:
    """Ask the optimizer that the plan has, or makes, for its fused kernel."""
    if plan.optimizer is None or not plan.training:
        return None
    sample = sample_of(plan.optimizer)
    known = inspect.signature(type(sample)).parameters
    if sample.param_groups[0].get("fused") or "fused" not in known:
        return None
    return replace(plan, optimizer=functools.partial(_maker(sample), foreach=None, fused=True))


def sample_of(optimizer: Any) -> torch.optim.Optimizer:
    """Return the optimizer itself, or one that its maker makes for a single number."""
    if isinstance(optimizer, torch.optim.Optimizer):
        return optimizer
    made: torch.optim.Optimizer = optimizer([nn.Parameter(torch.zeros(1))])
    return made


# --- modules -----------------------------------------------------------------------------------------------


def _channels_last(plan: Plan) -> Plan | None:
    images = [t for t in _tree.tensors(plan.inputs) if t.ndim == 4 and t.is_floating_point()]
    convolutions = [module for module in plan.model.modules() if isinstance(module, nn.Conv2d)]
    is_already = any(t.is_contiguous(memory_format=torch.channels_last) for t in images)
    if not images or not convolutions or is_already:
        return None
    laid_out = _copied(plan)
    if laid_out is None:
        return None
    for module in laid_out.model.modules():
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
    return replace(laid_out, inputs=_tree.map_tensors(_last, laid_out.inputs))


def _last(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


def _checkpointing(plan: Plan) -> Plan | None:
    """Recompute each block: by the model's own switch, else of every list of like blocks."""
    recomputed = _copied(plan) if plan.training else None
    if recomputed is None:
        return None
    model: Any = recomputed.model
    if getattr(model, "supports_gradient_checkpointing", False):  # transformers
        if getattr(model, "is_gradient_checkpointing", False):
            return None
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.config.use_cache = False
        return recomputed
    blocks = _blocks(model)
    for block in blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    return recomputed if blocks else None


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Return the outermost runs of three or more modules of one class in a list or a sequence."""
    if isinstance(model, (nn.ModuleList, nn.Sequential)):
        children = list(model)
        kinds = [type(child) for child in children]
        common = max(set(kinds), key=kinds.count) if kinds else None
        with_children = [c for c in children if type(c) is common and any(True for _ in c.children())]
        if len(with_children) >= _MIN_BLOCKS:
            return with_children
    return [block for child in model.children() for block in _blocks(child)]


def _copied(plan: Plan) -> Plan | None:
    """Return the plan with copies of model and teacher whose tensors are on `meta`: they take no memory."""
    try:
        model, teacher = _on_meta(plan.model), plan.teacher
        if isinstance(teacher, nn.Module):
            teacher = _on_meta(teacher)
    except Exception:  # noqa: BLE001  a module may refuse to be copied for any reason: then there is no row
        return None
    optimizer = plan.optimizer
    if isinstance(optimizer, torch.optim.Optimizer):
        optimizer = _maker(optimizer)
    return replace(plan, model=model, teacher=teacher, optimizer=optimizer)


def _on_meta(module: nn.Module) -> nn.Module:
    memo: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        twin = torch.empty_like(tensor, device="meta")
        is_weight = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(twin, requires_grad=tensor.requires_grad) if is_weight else twin
    return copy.deepcopy(module, memo)


def _maker(optimizer: torch.optim.Optimizer) -> Callable[..., Any]:
    """Return what makes an optimizer like this one, of its first group's options."""
    known = inspect.signature(type(optimizer)).parameters
    options = {k: v for k, v in optimizer.param_groups[0].items() if k in known and k != "params"}
    return functools.partial(type(optimizer), **options)


_CHANGES: dict[str, Callable[[Plan], Plan | None]] = {
    "checkpointing": _checkpointing,
    "bf16 autocast": _autocast,
    "pure bf16": _pure_bf16,
    "fused optimizer": _fused,
    "channels_last": _channels_last,
    "SGD": _sgd,
    "SGD with momentum": _sgd_with_momentum,
    "AdamW": _adamw,
    "fused AdamW": _fused_adamw,
    "Adafactor": _adafactor,
}
