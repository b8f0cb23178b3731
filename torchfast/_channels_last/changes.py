"""Laying tensors out again under the same objects: all of them, or none."""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.optim import Optimizer

from torchfast import _layout
from torchfast._channels_last.refusals import Changes, check_state, place
from torchfast._tree import tensors

LayOut = Callable[[torch.Tensor], torch.Tensor]


def to_plain(tensor: torch.Tensor, /) -> torch.Tensor:
    """Return the tensor laid out row by row; itself where it is."""
    return tensor.to(memory_format=torch.contiguous_format)


def weight_changes(model: nn.Module, lay_out: LayOut, /) -> Changes:
    """Return the convolution weights that lie differently, and their gradients, in their new layout.

    Parameters that share memory (`a.data = b.data` ties them as well) get the same new memory.
    """
    changes: Changes = []
    laid_out: dict[Hashable, torch.Tensor] = {}
    for weight in _weights(model):
        old = weight.detach()
        new = laid_out.setdefault(place(weight), lay_out(old))
        if new.stride() != old.stride():
            changes.append((weight, new))
        if weight.grad is not None and weight.grad.stride() != new.stride():
            changes.append((weight.grad, _layout.laid_out_like(weight.grad.detach(), new)))
    return changes


def _weights(model: nn.Module) -> list[nn.Parameter]:
    """Return the distinct parameters that are convolution weights."""
    weights = (_layout.stored_weight(convolution) for _, convolution in _layout.convolutions(model))
    return list({id(weight): weight for weight in weights if weight is not None}.values())


def state_changes(optimizer: Optimizer, parameter_changes: Changes, /) -> Changes:
    """Return the optimizer's state that lies differently from its parameters, laid out like them."""
    changes: Changes = []
    new_layouts = {id(old): new for old, new in parameter_changes}
    for parameter, state in optimizer.state.items():
        layout = new_layouts.get(id(parameter), parameter)
        for tensor in tensors(state):
            if tensor.shape == layout.shape and tensor.stride() != layout.stride() and tensor.dim() in (4, 5):
                check_state(optimizer, tensor)
                changes.append((tensor, _layout.laid_out_like(tensor.detach(), layout.detach())))
    return changes


def apply(changes: Changes, /) -> None:
    """Put the new memory under the old tensors; on an error, put the old memory back."""
    with applied(changes):
        pass


@contextmanager
def applied(changes: Changes, /) -> Iterator[None]:
    """Do the same, to stay; an error in the block puts the old memory back as well."""
    undo: Changes = []
    try:
        for tensor, new in changes:
            old = tensor.data
            tensor.data = new
            undo.append((tensor, old))
        yield
    except BaseException:
        for tensor, old in undo:
            tensor.data = old
        raise
