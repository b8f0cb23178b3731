"""Batch norms folded into the convolutions before them: in eval mode, one linear map after another."""

from collections import Counter
from collections.abc import Callable, Collection
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode

from torchfast import _layout
from torchfast._tree import tensors

Run = Callable[[], object]
PLAIN_NORMS = (nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class Pair(NamedTuple):
    """A convolution, and the batch norm that its output goes to."""

    convolution: _ConvNd
    norm: _BatchNorm
    norm_name: str


def pairs_of(module: nn.Module, run: Run, keep: Collection[str], /) -> list[Pair]:
    """Run the module once, and return the batch norms that can be folded; `keep` names modules to leave.

    Found by watching, not by tracing, so that any forward will do: a norm whose input is the very tensor that
    a convolution returned, which nothing else reads, each called once.
    """
    calls: Counter[int] = Counter()
    found: list[tuple[int, Pair]] = []
    readers = _Readers()

    def after(convolution: _ConvNd, _args: Any, output: Any) -> None:
        calls[id(convolution)] += 1
        if isinstance(output, torch.Tensor):
            readers.made[id(output)] = output, convolution, output._version

    def before_norm(name: str, norm: _BatchNorm, args: tuple[Any, ...]) -> None:
        calls[id(norm)] += 1
        readers.n_norms += 1
        output, convolution, version = readers.made.get(id(args[0]) if args else 0, (None, None, 0))
        if convolution is not None and output is not None and output._version == version:
            found.append((id(output), Pair(convolution, norm, name)))

    def after_norm(_norm: _BatchNorm, _args: Any, _output: Any) -> None:
        readers.n_norms -= 1

    with ExitStack() as hooks:
        for name, convolution in _layout.convolutions(module):
            if name not in keep and _is_plain(convolution):
                hooks.callback(convolution.register_forward_hook(after).remove)
        for name, norm in module.named_modules():
            if name not in keep and isinstance(norm, _BatchNorm) and _is_foldable(norm):
                hooks.callback(norm.register_forward_pre_hook(partial(before_norm, name)).remove)
                hooks.callback(norm.register_forward_hook(after_norm).remove)
        hooks.enter_context(readers)
        run()
    return [
        pair
        for output, pair in found
        if output not in readers.read and calls[id(pair.convolution)] == calls[id(pair.norm)] == 1
    ]


class _Readers(TorchDispatchMode):
    """Notes which convolutions' outputs are read outside of batch norms."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[torch.Tensor, _ConvNd, int]] = {}
        self.read: set[int] = set()
        self.n_norms = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator as it is."""
        del types
        if not self.n_norms:
            self.read.update(id(tensor) for tensor in tensors([args, kwargs]) if id(tensor) in self.made)
        return func(*args, **(kwargs or {}))


def fold(module: nn.Module, pairs: Collection[Pair], /) -> Callable[[], None]:
    """Fold the pairs in place, and return what undoes it."""
    undo: list[Callable[[], None]] = []

    def unfold() -> None:
        for step in undo:
            step()

    try:
        for convolution, norm, name in pairs:
            parent_name, _, child = name.rpartition(".")
            parent = module.get_submodule(parent_name)
            undo.append(partial(_set, convolution, convolution._parameters.get("weight"), convolution.bias))
            undo.append(partial(setattr, parent, child, norm))
            _set(convolution, *_folded(convolution, norm))
            setattr(parent, child, _rest_of(norm))
    except BaseException:
        unfold()
        raise
    return unfold


def _set(convolution: _ConvNd, weight: torch.Tensor | None, bias: torch.Tensor | None) -> None:
    convolution._parameters["weight"] = _frozen(weight)
    convolution._parameters["bias"] = _frozen(bias)


def _frozen(tensor: torch.Tensor | None) -> nn.Parameter | None:
    return None if tensor is None else nn.Parameter(tensor, requires_grad=False)


def _folded(convolution: _ConvNd, norm: _BatchNorm) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weight and bias that do both: s * (W x + b - mean) + beta, with s = gamma / sqrt(var + eps).

    Computed in float32 at least, and rounded once.
    """
    exact = torch.promote_types(convolution.weight.dtype, torch.float32)
    mean, variance = norm.get_buffer("running_mean").to(exact), norm.get_buffer("running_var").to(exact)
    gamma, beta = (norm.weight.to(exact), norm.bias.to(exact)) if norm.affine else (1.0, 0.0)
    scale = gamma * torch.rsqrt(variance + norm.eps)
    old_bias = 0.0 if convolution.bias is None else convolution.bias.to(exact)
    weight = convolution.weight.to(exact) * scale.reshape(-1, *[1] * (convolution.weight.dim() - 1))
    dtype = convolution.weight.dtype
    return weight.to(dtype), ((old_bias - mean) * scale + beta).to(dtype)


def _is_plain(convolution: _ConvNd) -> bool:
    return not convolution.transposed and _layout.stored_weight(convolution) is not None


def _is_foldable(norm: _BatchNorm) -> bool:
    return norm.running_mean is not None and (type(norm) in PLAIN_NORMS or _has_activation(norm))


def _has_activation(norm: _BatchNorm) -> bool:
    """Say whether this is a batch norm of timm's, which drops and activates as well."""
    return all(isinstance(getattr(norm, name, None), nn.Module) for name in ("drop", "act"))


def _rest_of(norm: _BatchNorm) -> nn.Module:
    return nn.Sequential(norm.drop, norm.act) if _has_activation(norm) else nn.Identity()  # type: ignore[arg-type]  # modules
