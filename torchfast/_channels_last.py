"""`to_channels_last`: convolutional models and their batches in the layout that tensor cores read.

A model is changed in three steps, so that a failure leaves it as it was: refuse what cannot go well, lay
every tensor out in new memory, and only then put the new memory under the old tensors.
"""

from collections import UserDict
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import is_dataclass
from itertools import chain
from typing import TypeVar
from weakref import WeakSet

import torch
from torch import nn
from torch.optim import LBFGS, Optimizer

from torchfast import _layout
from torchfast._tree import flatten, map_tensors, tensors

T = TypeVar("T")
Changes = list[tuple[torch.Tensor, torch.Tensor]]
"""Tensors, each with the same values in a new layout."""


def to_channels_last(
    model_or_batch: T,
    /,
    *,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    enabled: bool = True,
    is_image: Callable[[torch.Tensor], bool] | None = None,
    rank_5: bool = False,
) -> T:
    """Lay a model out channels last in place and return it, or return a batch with its images laid out so.

    In a model the weights of 2-d and 3-d convolutions are laid out again, with their gradients, and nothing
    else: other parameters of rank 4 are no concern of a convolution. Parameters stay the same objects, so
    ties, optimizers and references hold. What the model computes changes by no more than another, equally
    valid kernel gives. All or nothing: an error leaves model and optimizer as they were. While it runs, the
    tensors that change are there twice.

    In a batch (any nesting of dicts, lists, tuples, dataclasses) every leaf that looks like images is laid
    out; everything else is passed on as the same object.

    Example:
        >>> import torch
        >>> from torchfast import to_channels_last
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> model = to_channels_last(model, optimizer=optimizer)
        >>> images, labels = to_channels_last((torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])))
        >>> images.shape, images.is_contiguous(memory_format=torch.channels_last)
        (torch.Size([4, 3, 32, 32]), True)
        >>> model(images).is_contiguous(memory_format=torch.channels_last)
        True

    Args:
        model_or_batch: a module, or a batch. Convert a model before it is wrapped in DDP or compiled.
        optimizer: the model's optimizer, or several. Its state is laid out like the parameters, now and after
            each later `load_state_dict`: a fused optimizer whose state lies differently from its parameters
            computes wrong updates without an error, and others fall back to slow kernels.
        enabled: False lays everything out plainly again (also the optimizer's state), so that one flag of a
            script can decide.
        is_image: replaces the rule for what in a batch is an image. The default: floating point or uint8,
            rank 4, 1 to 16 channels, no side shorter than the number of channels.
        rank_5: in a batch, volumes (N, C, D, H, W) count as images as well. Models need no such flag.

    Raises:
        TypeError: neither a module nor a batch.
        ValueError: the model cannot be converted as it is: not materialised yet, already wrapped or scripted,
            weights in memory that others look into, or an optimizer that cannot work with the layout. The
            message names the culprit and the way out.

    It cannot see weights that a module hands to `torch.nn.functional.conv2d` by itself, and leaves weights
    alone that are computed in each forward (weight norm, pruning, parametrizations): their convolutions
    still pass channels_last activations on. It does not measure whether the layout pays on this GPU.
    """
    if isinstance(model_or_batch, nn.Module):
        _convert_model(model_or_batch, _optimizers(optimizer), enabled=enabled)
        return model_or_batch
    _check_batch(model_or_batch)
    if optimizer is not None:
        raise TypeError(
            "optimizer= was given together with a batch, which has no optimizer. "
            "Give it where the model is converted: to_channels_last(model, optimizer=optimizer)."
        )
    lay_out = _layout.to_channels_last_tensor if enabled else _to_plain

    def lay_out_images(leaf: torch.Tensor) -> torch.Tensor:
        counts = is_image(leaf) if is_image is not None else _layout.is_image(leaf, rank_5=rank_5)
        return lay_out(leaf) if counts else leaf

    return map_tensors(lay_out_images, model_or_batch)


def _convert_model(model: nn.Module, optimizers: list[Optimizer], *, enabled: bool) -> None:
    _check_convertible(model)
    changes = _weight_changes(model, _layout.to_channels_last_tensor if enabled else _to_plain)
    _check_may_change(model, optimizers, changes)
    for optimizer in optimizers:
        changes += _state_changes(optimizer, changes)
    _apply(changes)
    for optimizer in optimizers:
        if optimizer not in _followed:
            optimizer.register_load_state_dict_post_hook(_match_state)
            _followed.add(optimizer)


_followed: WeakSet[Optimizer] = WeakSet()
"""Optimizers whose state already follows the parameters after each `load_state_dict`."""


def _match_state(optimizer: Optimizer) -> None:
    _apply(_state_changes(optimizer, []))


def _to_plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(memory_format=torch.contiguous_format)


# --- what changes ----------------------------------------------------------------------------------------


def _weight_changes(model: nn.Module, lay_out: Callable[[torch.Tensor], torch.Tensor]) -> Changes:
    """Return the convolution weights that lie differently, and their gradients, in their new layout.

    Parameters that share memory (`a.data = b.data` ties them as well) get the same new memory.
    """
    changes: Changes = []
    laid_out: dict[Hashable, torch.Tensor] = {}
    for weight in _weights(model):
        old = weight.detach()
        new = laid_out.setdefault(_place(weight), lay_out(old))
        if new.stride() != old.stride():
            changes.append((weight, new))
        if weight.grad is not None and weight.grad.stride() != new.stride():
            changes.append((weight.grad, _layout.laid_out_like(weight.grad.detach(), new)))
    return changes


def _weights(model: nn.Module) -> list[nn.Parameter]:
    """Return the distinct parameters that are convolution weights."""
    weights = (_layout.stored_weight(convolution) for _, convolution in _layout.convolutions(model))
    return list({id(weight): weight for weight in weights if weight is not None}.values())


def _place(tensor: torch.Tensor) -> Hashable:
    """Return what two tensors have in common that are the same piece of memory."""
    address = _address(tensor)
    if address == 0:  # on `meta`, nothing is anywhere
        return id(tensor)
    return address, tensor.storage_offset(), tensor.dtype, tensor.shape, tensor.stride()


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _state_changes(optimizer: Optimizer, parameter_changes: Changes) -> Changes:
    """Return the optimizer's state that lies differently from its parameters, laid out like them."""
    changes: Changes = []
    new_layouts = {id(old): new for old, new in parameter_changes}
    for parameter, state in optimizer.state.items():
        layout = new_layouts.get(id(parameter), parameter)
        for tensor in tensors(state):
            if tensor.shape == layout.shape and tensor.stride() != layout.stride() and tensor.dim() in (4, 5):
                _check_state(optimizer, tensor)
                changes.append((tensor, _layout.laid_out_like(tensor.detach(), layout.detach())))
    return changes


def _apply(changes: Changes) -> None:
    """Put the new memory under the old tensors; on an error, put the old memory back."""
    undo: Changes = []
    try:
        for tensor, new in changes:
            old = tensor.data
            tensor.data = new
            undo.append((tensor, old))
    except BaseException:
        for tensor, old in undo:
            tensor.data = old
        raise


# --- what is refused -------------------------------------------------------------------------------------


def _optimizers(optimizer: Optimizer | Iterable[Optimizer] | None) -> list[Optimizer]:
    if optimizer is None:
        return []
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else optimizer
    found = list(optimizers) if isinstance(optimizers, Iterable) else [optimizers]
    for each in found:
        if not isinstance(each, Optimizer):
            raise TypeError(
                f"optimizer= takes a torch.optim.Optimizer, or several, but was given {_an(each)}. "
                "Its state has to be laid out like the parameters, and only an Optimizer says where it is."
            )
    return found


def _check_batch(batch: object) -> None:
    if isinstance(batch, type) or not (
        isinstance(batch, (Mapping, UserDict, list, tuple)) or is_dataclass(batch) or flatten(batch)[0]
    ):
        raise TypeError(
            "to_channels_last takes a module or a batch (tensors, or dicts, lists, tuples and dataclasses of "
            f"them), but was given {_an(batch)}. "
            "For the batches of a loader, use DeviceLoader(loader, channels_last=True)."
        )


def _an(thing: object) -> str:
    return (
        f"the class {thing.__name__}"
        if isinstance(thing, type)
        else f"an object of type {type(thing).__name__}"
    )


def _check_convertible(model: nn.Module) -> None:
    """Refuse models whose weights are not there as plain tensors."""
    for name, convolution in _layout.convolutions(model):
        weight = _layout.stored_weight(convolution)
        if weight is not None and torch.nn.parameter.is_lazy(weight):
            raise ValueError(
                f"the convolution {name!r} has no weight yet: it takes its shape from the first batch. "
                "Run one batch through the model, then convert it."
            )
        if weight is not None and _comes_from(weight, "torch.distributed.tensor"):
            raise ValueError(
                f"the weight of {name!r} is a DTensor, spread over several processes by fully_shard or "
                f"tensor parallelism, which keep weights contiguous. {_BATCHES_ALONE}"
            )
    for name, module in model.named_modules():
        if _comes_from(module, "torch.distributed.fsdp.fully_sharded_data_parallel"):
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


def _comes_from(thing: object, module: str) -> bool:
    """Say whether a thing's class is of that module, without importing it."""
    return any(base.__module__.startswith(module) for base in type(thing).__mro__)


def _check_may_change(model: nn.Module, optimizers: list[Optimizer], changes: Changes) -> None:
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
    places = {_address(tensor): _place(tensor) for tensor, _ in changes}
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if id(tensor) in changing and tensor.device.type == "cpu" and tensor.is_shared():
            raise ValueError(
                f"{name!r} lies in memory shared with other processes, which would keep the old one. "
                "Convert the model before model.share_memory()."
            )
        if torch.nn.parameter.is_lazy(tensor) or _address(tensor) == 0:
            continue
        if places.get(_address(tensor), _place(tensor)) != _place(tensor):
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


def _check_state(optimizer: Optimizer, state: torch.Tensor) -> None:
    if type(state) not in (torch.Tensor, nn.Parameter) or not state.is_floating_point():
        raise ValueError(
            f"{type(optimizer).__name__} keeps state as {type(state).__name__} of {state.dtype}, whose "
            "scales belong to blocks of memory: laid out again, its values would be others. "
            "Convert the model before the optimizer's first step."
        )
