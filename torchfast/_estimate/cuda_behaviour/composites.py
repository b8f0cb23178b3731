"""Operators that PyTorch takes apart differently on CUDA than on meta tensors, put together as on CUDA."""

import torch

aten = torch.ops.aten


def dropout(input: torch.Tensor, p: float, train: bool) -> torch.Tensor:  # noqa: A002, FBT001 - aten's own names
    """Keep a mask of one byte an element, as the fused CUDA kernel does (Dropout.cpp)."""
    if not train or p == 0 or input.numel() == 0:
        return input
    if p == 1:
        return input * torch.zeros_like(input)
    output: torch.Tensor = aten.native_dropout(input, p, train)[0]
    return output


def batch_norm(  # noqa: PLR0913, PLR0917 - aten's own signature
    input: torch.Tensor,  # noqa: A002 - as above
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    training: bool,  # noqa: FBT001 - as above
    momentum: float,
    eps: float,
    cudnn_enabled: bool,  # noqa: FBT001 - as above
) -> torch.Tensor:
    """Choose between cuDNN's kernel and PyTorch's own (Normalization.cpp, torch 2.11)."""
    rest = (running_mean, running_var, training, momentum, eps)
    if cudnn_enabled and _cudnn_takes(input, weight, bias, running_mean, training):
        return aten.cudnn_batch_norm(input, weight, bias, *rest)[0]  # type: ignore[no-any-return]
    return aten.native_batch_norm(input, weight, bias, *rest)[0]  # type: ignore[no-any-return]


def _cudnn_takes(
    input: torch.Tensor,  # noqa: A002 - as above
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    training: bool,  # noqa: FBT001 - as above
) -> bool:
    if weight is None or bias is None or input.dim() < 3:
        return False
    if torch.bfloat16 in (input.dtype, weight.dtype) or input.dtype == torch.float64 != weight.dtype:
        return False
    if input.dtype == torch.float16 and weight.dtype != torch.float32:
        return False
    if running_mean is None and not training:
        return False
    return input.shape[0] <= (880_801 if training else 65_535)
