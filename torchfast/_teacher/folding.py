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

from torchfast import _layout

Run = Callable[[], object]
PLAIN_NORMS = (nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class Pair(NamedTuple):
    """A convolution, and the batch norm that its output goes to."""

    convolution: _ConvNd
    norm: _BatchNorm
    norm_name: str


def pairs_of(module: nn.Module, run: Run, keep: Collection[str], /) -> list[Pair]:
    """Run the module once, and return the batch norms that can be folded; `keep` names modules to leave.

    Found by watching, not by tracing, so that any forward will do. Who else reads a convolution's output
    cannot be seen; whoever folds compares the outputs afterwards.
    """
    made: dict[int, tuple[torch.Tensor, _ConvNd, int]] = {}
    calls: Counter[int] = Counter()
    found: list[Pair] = []

    def after(convolution: _ConvNd, _args: Any, output: Any) -> None:
        calls[id(convolution)] += 1
        if isinstance(output, torch.Tensor):
            made[id(output)] = output, convolution, output._version

    def before(name: str, norm: _BatchNorm, args: tuple[Any, ...]) -> None:
        calls[id(norm)] += 1
        output, convolution, version = made.get(id(args[0]) if args else 0, (None, None, 0))
        if convolution is not None and output is not None and output._version == version:
            found.append(Pair(convolution, norm, name))

    with ExitStack() as hooks:
        for name, convolution in _layout.convolutions(module):
            if (
                name not in keep
                and not convolution.transposed
                and _layout.stored_weight(convolution) is not None
            ):
                hooks.callback(convolution.register_forward_hook(after).remove)
        for name, norm in module.named_modules():
            if name not in keep and isinstance(norm, _BatchNorm) and _is_foldable(norm):
                hooks.callback(norm.register_forward_pre_hook(partial(before, name)).remove)
        run()
    return [pair for pair in found if calls[id(pair.convolution)] == calls[id(pair.norm)] == 1]


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


def _is_foldable(norm: _BatchNorm) -> bool:
    return norm.running_mean is not None and (type(norm) in PLAIN_NORMS or _has_activation(norm))


def _has_activation(norm: _BatchNorm) -> bool:
    """Say whether this is a batch norm of timm's, which drops and activates as well."""
    return all(isinstance(getattr(norm, name, None), nn.Module) for name in ("drop", "act"))


def _rest_of(norm: _BatchNorm) -> nn.Module:
    return nn.Sequential(norm.drop, norm.act) if _has_activation(norm) else nn.Identity()  # type: ignore[arg-type]  # modules
