"""What cannot be laid out again, and why."""

from collections import UserDict
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import is_dataclass
from itertools import chain

import torch
from torch import nn
from torch.optim import LBFGS, Optimizer

from torchfast import _layout
from torchfast._modules import comes_from, what, without_shape
from torchfast._tree import flatten

Changes = list[tuple[torch.Tensor, torch.Tensor]]
"""Tensors, each with the same values in a new layout."""


def optimizers_of(optimizer: Optimizer | Iterable[Optimizer] | None) -> list[Optimizer]:
    if optimizer is None:
        return []
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else optimizer
    found = list(optimizers) if isinstance(optimizers, Iterable) else [optimizers]
    for each in found:
        if not isinstance(each, Optimizer):
            raise TypeError(
                f"optimizer= takes a torch.optim.Optimizer, or several, but was given {what(each)}. "
                "Its state has to be laid out like the parameters, and only an Optimizer says where it is."
            )
    return [_inner(each) for each in found]


def _inner(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer that holds the state, inside of wrappers such as accelerate's."""
    inner = getattr(optimizer, "optimizer", None)
    return _inner(inner) if isinstance(inner, Optimizer) else optimizer


def check_batch(batch: object, /, *, only_for_models: Mapping[str, object]) -> None:
    """Refuse what is neither a module nor a batch, and options that a batch has no use for."""
    if isinstance(batch, type) or not (
        isinstance(batch, (Mapping, UserDict, list, tuple)) or is_dataclass(batch) or flatten(batch)[0]
    ):
        raise TypeError(
            "to_channels_last takes a module or a batch (tensors, or dicts, lists, tuples and dataclasses of "
            f"them), but was given {what(batch)}. "
            "For the batches of a loader, use DeviceLoader(loader, channels_last=True)."
        )
    parts = (
        batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else ()
    )
    if any(isinstance(part, nn.Module) for part in parts):
        raise TypeError(
            f"to_channels_last was given a {type(batch).__name__} with modules in it, which is no batch, and "
            "would leave them as they are. Convert each: for model in models: to_channels_last(model)."
        )
    for option, value in only_for_models.items():
        if value is not None:
            raise TypeError(
                f"{option}= was given together with a batch, and only a model has a use for it. "
                f"Give it where the model is converted: to_channels_last(model, {option}={option})."
            )


def check_options(*, enabled: object, **called: object) -> None:
    """Refuse options that would fail only when the model has changed."""
    if enabled not in (True, False):
        raise TypeError(
            f"enabled={enabled!r} was given to to_channels_last, which is neither True (channels last) nor "
            "False (the plain layout). Give one of the two."
        )
    for option, function in called.items():
        kind = "a LayoutReport, such as print" if option == "report" else "a tensor and says yes or no"
        if function is not None and not callable(function):
            raise TypeError(
                f"{option}= takes a function, but was given {what(function)}. Give one that is called with "
                f"{kind}, or leave it out."
            )


def check_convertible(model: nn.Module) -> None:
    """Refuse models whose weights are not there as plain tensors."""
    for name, convolution in _layout.convolutions(model):
        weight = _layout.stored_weight(convolution)
        if without_shape(convolution) is not None:
            raise ValueError(
                f"the convolution {name!r} has no weight yet: it takes its shape from the first batch. "
                "Run one batch through the model, then convert it."
            )
        if weight is not None and comes_from(weight, "torch.distributed.tensor"):
            raise ValueError(
                f"the weight of {name!r} is a DTensor, spread over several processes by fully_shard or "
                f"tensor parallelism, which keep weights contiguous. {_BATCHES_ALONE}"
            )
    for name, module in model.named_modules():
        if comes_from(module, "torch.distributed.fsdp.fully_sharded_data_parallel"):
            raise ValueError(
                f"{name or 'the model'!r} is wrapped in FullyShardedDataParallel, which keeps its weights as "
                f"pieces of one flat tensor. {_BATCHES_ALONE}"
            )
        if isinstance(module, torch.jit.ScriptModule) and any(p.dim() > 3 for p in module.parameters()):
            raise ValueError(
                f"{name or 'the model'!r} is a TorchScript module, in which convolutions cannot be told from "
                "other code. Convert the model before torch.jit.script or torch.jit.trace."
            )


_BATCHES_ALONE = (
    "Leave the model as it is and convert its batches: convolutions pass on the layout of their input."
)


def check_may_change(model: nn.Module, optimizers: list[Optimizer], changes: Changes, /) -> None:
    """Refuse changes that somebody who holds the same memory would not notice, or not survive."""
    if changes and any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
        raise ValueError(
            "the model is wrapped in DistributedDataParallel, whose gradient buckets are laid out like the "
            "weights at the time of wrapping. Convert first, on every rank, and wrap then: "
            "DistributedDataParallel(to_channels_last(model))."
        )
    _check_memory(model, changes)
    for optimizer in optimizers:
        _check_optimizer(optimizer, model, changes)


def _check_memory(model: nn.Module, changes: Changes) -> None:
    changing = {id(tensor) for tensor, _ in changes}
    places = {_address(tensor): place(tensor) for tensor, _ in changes}
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if id(tensor) in changing and tensor.device.type == "cpu" and tensor.is_shared():
            raise ValueError(
                f"{name!r} lies in memory shared with other processes, which would keep the old one. "
                "Convert the model before model.share_memory()."
            )
        if torch.nn.parameter.is_lazy(tensor) or _address(tensor) == 0:
            continue
        if places.get(_address(tensor), place(tensor)) != place(tensor):
            raise ValueError(
                f"{name!r} is a view into the memory of a convolution's weight: laying the weight out again "
                "would untie them. Tie them after the conversion, or give each its own memory."
            )


def _check_optimizer(optimizer: Optimizer, model: nn.Module, changes: Changes) -> None:
    kind = type(optimizer).__name__
    own = {id(parameter) for parameter in model.parameters()}
    if not any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
        raise ValueError(
            f"none of the parameters of the {kind} given as optimizer= belongs to this model, so its state "
            "cannot follow the model's layout. Give the optimizer that was made from this model's parameters."
        )
    if isinstance(optimizer, LBFGS) and any(not new.is_contiguous() for _, new in changes):
        raise ValueError(
            "LBFGS flattens parameters with .view(-1), which fails for channels_last weights. "
            "Leave the model as it is and convert its batches, or choose another optimizer."
        )


def check_state(optimizer: Optimizer, state: torch.Tensor, /) -> None:
    """Refuse optimizer state whose values depend on where they lie."""
    if type(state) not in (torch.Tensor, nn.Parameter) or not state.is_floating_point():
        raise ValueError(
            f"{type(optimizer).__name__} keeps state as {type(state).__name__} of {state.dtype}, whose "
            "scales belong to blocks of memory: laid out again, its values would be others. "
            "Convert the model before the optimizer's first step."
        )


def place(tensor: torch.Tensor, /) -> Hashable:
    """Return what two tensors have in common that are the same piece of memory."""
    address = _address(tensor)
    if address == 0:  # on `meta`, nothing is anywhere
        return id(tensor)
    return address, tensor.storage_offset(), tensor.dtype, tensor.shape, tensor.stride()


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
