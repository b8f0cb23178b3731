"""Autocast for CUDA on paper tensors; PyTorch's own kernels look for real CUDA tensors and leave these alone.

The lists and the rules are those of aten/src/ATen/autocast_mode.{h,cpp} in torch 2.11.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from torchfast._estimate.paper import BACKEND, PaperTensor

_KEY = f"Autocast{BACKEND}"

LOWER = (
    "_convolution",
    "_convolution.deprecated",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_tbc",
    "conv_transpose1d",
    "conv_transpose2d.input",
    "conv_transpose3d.input",
    "convolution",
    "prelu",
    "addmm",
    "addmv",
    "addr",
    "matmul",
    "einsum",
    "mm",
    "mv",
    "linalg_vecdot",
    "linalg_multi_dot",
    "linear",
    "addbmm",
    "baddbmm",
    "bmm",
    "chain_matmul",
    "_thnn_fused_lstm_cell",
    "_thnn_fused_gru_cell",
    "lstm_cell",
    "gru_cell",
    "rnn_tanh_cell",
    "rnn_relu_cell",
    "_scaled_dot_product_flash_attention",
    "scaled_dot_product_attention",
)

FP32 = (
    "acos",
    "asin",
    "cosh",
    "erfinv",
    "exp",
    "expm1",
    "log",
    "log10",
    "log2",
    "log1p",
    "reciprocal",
    "rsqrt",
    "sinh",
    "tan",
    "pow.Tensor_Scalar",
    "pow.Tensor_Tensor",
    "pow.Scalar",
    "softplus",
    "layer_norm",
    "native_layer_norm",
    "group_norm",
    "frobenius_norm.dim",
    "nuclear_norm",
    "nuclear_norm.dim",
    "cosine_similarity",
    "poisson_nll_loss",
    "cosine_embedding_loss",
    "nll_loss",
    "nll_loss2d",
    "hinge_embedding_loss",
    "kl_div",
    "l1_loss",
    "smooth_l1_loss",
    "huber_loss",
    "mse_loss",
    "margin_ranking_loss",
    "multilabel_margin_loss",
    "soft_margin_loss",
    "triplet_margin_loss",
    "multi_margin_loss",
    "binary_cross_entropy_with_logits",
    "dist",
    "pdist",
    "cdist",
    "renorm",
    "logsumexp",
    "upsample_nearest1d",
    "upsample_nearest1d.vec",
    "_upsample_nearest_exact1d",
    "_upsample_nearest_exact1d.vec",
    "upsample_nearest2d",
    "upsample_nearest2d.vec",
    "_upsample_nearest_exact2d",
    "_upsample_nearest_exact2d.vec",
    "upsample_nearest3d",
    "upsample_nearest3d.vec",
    "_upsample_nearest_exact3d",
    "_upsample_nearest_exact3d.vec",
    "upsample_linear1d",
    "upsample_linear1d.vec",
    "upsample_bilinear2d",
    "upsample_bilinear2d.vec",
    "_upsample_bilinear2d_aa",
    "_upsample_bilinear2d_aa.vec",
    "upsample_trilinear3d",
    "upsample_trilinear3d.vec",
    "upsample_bicubic2d",
    "upsample_bicubic2d.vec",
    "_upsample_bicubic2d_aa",
    "_upsample_bicubic2d_aa.vec",
)

FP32_DTYPE = (
    "prod",
    "prod.dim_int",
    "softmax.int",
    "log_softmax.int",
    "cumprod",
    "cumsum",
    "linalg_vector_norm",
    "linalg_matrix_norm",
    "linalg_matrix_norm.str_ord",
    "sum",
    "sum.dim_IntList",
)

PROMOTE = (
    "addcdiv",
    "addcmul",
    "atan2",
    "bilinear",
    "cross",
    "dot",
    "vdot",
    "grid_sampler",
    "index_put",
    "tensordot",
    "scatter_add",
)


# Weights cast once for each autocast context, kept alive until it ends.
_CASTS: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}


@contextmanager
def cuda_autocast() -> Iterator[None]:
    """Let `torch.autocast("cuda")` act on paper tensors within this context."""
    set_enabled, clear = torch.set_autocast_enabled, torch.clear_autocast_cache

    def set_both(*args: Any) -> None:
        set_enabled(*args)
        if args[0] == "cuda" or isinstance(args[0], bool):
            set_enabled(BACKEND.lower(), args[-1])

    def clear_both() -> None:
        clear()
        _CASTS.clear()

    library = torch.library.Library("aten", "IMPL")
    rest = torch.library.Library("_", "IMPL")
    rest.fallback(torch.library.fallthrough_kernel, _KEY)
    for names, make in ((LOWER, _lower), (FP32, _fp32), (FP32_DTYPE, _fp32_dtype), (PROMOTE, _promote)):
        for name in names:
            operator = _overload(name)
            if operator is not None:
                library.impl(operator, make(operator), _KEY)
    library.impl("_cudnn_rnn", _recurrent, _KEY)
    torch.set_autocast_enabled = set_both  # type: ignore[assignment] # it has two signatures
    torch.clear_autocast_cache = clear_both
    try:
        yield
    finally:
        torch.set_autocast_enabled, torch.clear_autocast_cache = set_enabled, clear
        set_enabled(BACKEND.lower(), False)
        _CASTS.clear()
        library._destroy()
        rest._destroy()


def _overload(name: str) -> Any:
    """Return the operator, or None where this version of PyTorch has it not."""
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet, None), overload or "default", None)


def _without_autocast() -> Any:
    key = getattr(torch._C.DispatchKey, _KEY)
    return torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key))


def _lower(operator: Any) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        dtype = torch.get_autocast_dtype("cuda")
        with _without_autocast():
            return operator(*_cast_all(args, dtype), **_cast_dict(kwargs, dtype))

    return kernel


def _recurrent(input: Any, weights: Any, n_weights: int, flat: Any, hx: Any, cx: Any, *rest: Any) -> Any:  # noqa: A002, PLR0913, PLR0917 - aten's own signature
    """Run a recurrent network in float16, whatever autocast's type, its weights copied into one block.

    AutocastRNN.cpp, torch 2.11. The block is made anew at each call; the casts of other weights are kept.
    """
    half = torch.float16
    with _without_autocast():
        if _eligible(weights[0]) and weights[0].dtype != half:
            flat = torch.zeros(sum(weight.numel() for weight in weights), dtype=half, device="meta")
            offsets = itertools.accumulate((weight.numel() for weight in weights), initial=0)
            weights = [_Flattened.apply(w, flat, offset) for w, offset in zip(weights, offsets, strict=False)]
        cx, hx, input = (None if t is None else _cast(t, half) for t in (cx, hx, input))  # noqa: A001
        return torch.ops.aten._cudnn_rnn(input, weights, n_weights, flat, hx, cx, *rest)


class _Flattened(torch.autograd.Function):
    """A weight cast into its place in a block of all weights."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, flat: torch.Tensor, offset: int) -> torch.Tensor:
        ctx.dtype = weight.dtype
        return flat.as_strided(weight.shape, weight.stride(), offset)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return gradients[0].to(ctx.dtype), None, None


def _fp32(operator: Any) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        with _without_autocast():
            return operator(*_cast_all(args, torch.float32), **_cast_dict(kwargs, torch.float32))

    return kernel


def _fp32_dtype(operator: Any) -> Callable[..., Any]:
    position = [argument.name for argument in operator._schema.arguments].index("dtype")

    def kernel(*args: Any, **kwargs: Any) -> Any:
        given = kwargs.get("dtype") if len(args) <= position else args[position]
        if _eligible(args[0]) and given is None:
            args = args[:position]
            kwargs["dtype"] = torch.float32
        with _without_autocast():
            return operator(*args, **kwargs)

    return kernel


def _promote(operator: Any) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        floats = [t for t in _flat((*args, *kwargs.values())) if _eligible(t)]
        dtype = (
            torch.float32
            if any(t.dtype == torch.float32 for t in floats)
            else torch.get_autocast_dtype("cuda")
        )
        with _without_autocast():
            return operator(*_cast_all(args, dtype), **_cast_dict(kwargs, dtype))

    return kernel


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _flat(value)
        else:
            yield value


def _eligible(value: Any) -> bool:
    return type(value) is PaperTensor and value.is_floating_point() and value.dtype != torch.float64


def _cast_all(values: Any, dtype: torch.dtype) -> list[Any]:
    # From the last to the first: the order in which compilers evaluate the arguments of the C++ call.
    return [_cast(value, dtype) for value in reversed(values)][::-1]


def _cast_dict(values: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {name: _cast(value, dtype) for name, value in values.items()}


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, (list, tuple)):
        return [_cast(item, dtype) for item in value]
    if not _eligible(value) or value.dtype == dtype:
        return value
    is_weight = (
        value.dtype == torch.float32 and value.requires_grad and value.is_leaf and not value._is_view()
    )
    if not is_weight or dtype == torch.float32 or not torch.is_autocast_cache_enabled():
        return value.to(dtype)
    known = _CASTS.get(id(value))
    if known is None:
        known = _CASTS[id(value)] = (value, value.to(dtype))
    return known[1]
