"""A frozen copy of a module, put together tensor by tensor on another device, in another type and layout."""

import copy
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from torchfast._bytes import format_bytes
from torchfast._layout import channels_last_format, convolutions, stored_weight
from torchfast._oom_errors import classify

M = TypeVar("M", bound=nn.Module)
HALVES = (torch.float16, torch.bfloat16)


class Placing:
    """Where each tensor of one module goes, and in which type and layout.

    Batch norms keep their own type when the others are halved: their few numbers are read in float32 by every
    kernel, and rounding them costs accuracy and saves nothing.
    """

    def __init__(
        self, module: nn.Module, device: torch.device, dtype: torch.dtype | None, *, channels_last: bool
    ) -> None:
        self.device = device
        self.dtype = dtype
        norms = (m for m in module.modules() if isinstance(m, _BatchNorm)) if dtype in HALVES else ()
        self._keep_dtype = {id(tensor) for norm in norms for tensor in tensors_of(norm)}
        found = [convolution for _, convolution in convolutions(module)] if channels_last else []
        self._lay_out = {id(stored_weight(convolution)) for convolution in found}
        self.image_ranks = frozenset(len(convolution.kernel_size) + 2 for convolution in found)

    def place(self, target: torch.Tensor, values: torch.Tensor, /) -> torch.Tensor:
        """Return `values` in new memory, where and how the module's tensor `target` is to be."""
        if type(values) not in (torch.Tensor, nn.Parameter):  # quantised: only its class knows how to move it
            return copy.deepcopy(values).to(self.device)
        memory_format = channels_last_format(target.dim()) if id(target) in self._lay_out else None
        return values.detach().to(
            device=self.device,
            dtype=self.dtype_of(target),
            memory_format=memory_format or torch.preserve_format,
            copy=True,
        )

    def dtype_of(self, target: torch.Tensor, /) -> torch.dtype:
        """Return the type that the module's tensor `target` is to have."""
        if self.dtype is None or not target.is_floating_point() or id(target) in self._keep_dtype:
            return target.dtype
        return self.dtype


def tensors_of(module: nn.Module, /) -> Iterator[torch.Tensor]:
    """Go through the distinct parameters and buffers of a module."""
    return chain(module.parameters(), module.buffers())


def frozen_copy(module: M, placing: Placing, /) -> M:
    """Return a frozen copy of a module in eval mode; the module itself stays as it is.

    Peaks at the copy plus one tensor on the device, and one tensor on the host.
    """
    with told_what_it_needs(module, placing):
        placed = {id(tensor): placing.place(tensor, tensor) for tensor in tensors_of(module)}
    return assembled(module, placed)


def assembled(module: M, placed: Mapping[int, torch.Tensor], /) -> M:
    """Return a copy of a module around other tensors, given by the `id` of those that they stand for."""
    memo: dict[int, object] = {}
    for parameter in module.parameters():
        tensor = placed[id(parameter)]
        memo[id(parameter)] = (
            tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
        )
    for buffer in module.buffers():
        memo[id(buffer)] = placed[id(buffer)]
    for layer in module.modules():
        for value in vars(layer).values():
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach()  # recomputed by each forward; deepcopy would refuse it
    try:
        twin = copy.deepcopy(module, memo)
    except TypeError as error:  # a lock, a socket, a generator
        raise TypeError(
            f"the teacher cannot be copied: {error}. It holds something that belongs to one process, such as "
            "a lock or an open file. Take it out of the module, or leave it out in its __deepcopy__."
        ) from error
    twin.eval().requires_grad_(False)
    for layer in twin.modules():
        if isinstance(layer, nn.RNNBase):
            layer.flatten_parameters()  # cuDNN wants them in one piece
    return twin


def main_dtype(module: nn.Module, /) -> torch.dtype:
    """Return the floating-point type that most of a module's numbers have."""
    sizes: Counter[torch.dtype] = Counter()
    for tensor in tensors_of(module):
        if tensor.is_floating_point():
            sizes[tensor.dtype] += tensor.numel()
    return sizes.most_common(1)[0][0] if sizes else torch.get_default_dtype()


@contextmanager
def told_what_it_needs(module: nn.Module, placing: Placing, /) -> Iterator[None]:
    """Have an out-of-memory error say how much the whole teacher takes, and what would take less."""
    try:
        yield
    except Exception as error:  # out of memory comes in many types
        if classify(error) is not None:
            error.add_note(_what_it_needs(module, placing))
        raise


def _what_it_needs(module: nn.Module, placing: Placing) -> str:
    floats, others = Counter[torch.dtype](), 0
    for tensor in tensors_of(module):
        if tensor.is_floating_point():
            floats[placing.dtype_of(tensor)] += tensor.numel()
        else:
            others += tensor.numel() * tensor.element_size()
    needed = others + sum(dtype.itemsize * count for dtype, count in floats.items())
    halved = others + 2 * sum(floats.values())
    text = f"The teacher's weights take {format_bytes(needed)} on {placing.device}."
    if halved < needed:
        text += f" With dtype=torch.bfloat16 they take {format_bytes(halved)}."
    return text
