"""What several primitives ask of a module: to be called with a batch, and what it is made of."""

from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import nn


def call(model: Callable[..., Any], inputs: Any, /) -> Any:
    """Call a model the way its inputs say: a mapping as keywords, a tuple or list as arguments.

    A named tuple is one argument: its fields have names that the model would not know.

    Example:
        >>> import torch
        >>> from torchfast._modules import call
        >>> call(torch.add, (torch.ones(2), torch.ones(2)))
        tensor([2., 2.])
    """
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)) and not hasattr(inputs, "_fields"):
        return model(*inputs)
    return model(inputs)


def unwrapped(module: nn.Module, /) -> nn.Module:
    """Return the module inside of `DistributedDataParallel`, `DataParallel` and `torch.compile`.

    Example:
        >>> from torch import nn
        >>> from torchfast._modules import unwrapped
        >>> unwrapped(nn.DataParallel(nn.Linear(2, 2)))
        Linear(in_features=2, out_features=2, bias=True)
    """
    if isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        return unwrapped(module.module)
    inner = getattr(module, "_orig_mod", None)
    return unwrapped(inner) if isinstance(inner, nn.Module) else module


def without_shape(module: nn.Module, /) -> str | None:
    """Name the first parameter or buffer that takes its shape from a batch that was not there yet.

    Example:
        >>> from torch import nn
        >>> from torchfast._modules import without_shape
        >>> without_shape(nn.LazyLinear(2)), without_shape(nn.Linear(2, 2))
        ('weight', None)
    """
    tensors = chain(module.named_parameters(), module.named_buffers())
    return next((name for name, tensor in tensors if torch.nn.parameter.is_lazy(tensor)), None)


def quantised_for_cpu(module: nn.Module, /) -> str | None:
    """Name the first layer whose weights PyTorch packed for the CPU, where no GPU can take them.

    Example:
        >>> from torch import nn
        >>> from torchfast._modules import quantised_for_cpu
        >>> quantised_for_cpu(nn.Linear(2, 2)) is None
        True
    """
    packages = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")
    layers = (
        (name or type(layer).__name__, type(layer).__module__) for name, layer in module.named_modules()
    )
    return next((name for name, home in layers if home.startswith(packages)), None)


def comes_from(thing: object, package: str, /) -> bool:
    """Say whether a class of a thing is defined in that package or module, without importing it.

    Example:
        >>> from torch import nn
        >>> from torchfast._modules import comes_from
        >>> comes_from(nn.Linear(1, 1), "torch.nn"), comes_from(nn.Linear(1, 1), "torch.distributed")
        (True, False)
    """
    return any(f"{base.__module__}.".startswith(f"{package}.") for base in type(thing).__mro__)


def what(thing: object, /) -> str:
    """Name something that is of the wrong type, for an error.

    Example:
        >>> from torchfast._modules import what
        >>> what(int), what(3)
        ('the class int', 'an object of type int')
    """
    return (
        f"the class {thing.__name__}"
        if isinstance(thing, type)
        else f"an object of type {type(thing).__name__}"
    )
