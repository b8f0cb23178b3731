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


def linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:  # noqa: A002 - as above
    """Add the bias in place where it cannot be fused (Linear.cpp, torch 2.11)."""
    if bias is not None and input.dim() > 1 and input.is_contiguous():
        flat = aten.addmm(bias, input.reshape(-1, input.shape[-1]), weight.t())
        return flat if input.dim() == 2 else flat.view(*input.shape[:-1], weight.shape[0])  # type: ignore[no-any-return]
    if bias is not None and input.dim() == 2:
        return aten.addmm(bias, input, weight.t())  # type: ignore[no-any-return]
    output: torch.Tensor = aten.matmul(input, weight.t())
    return output if bias is None else output.add_(bias)


def rms_norm(
    input: torch.Tensor,  # noqa: A002 - as above
    normalized_shape: list[int],
    weight: torch.Tensor | None = None,
    eps: float | None = None,
) -> torch.Tensor:
    """Run the fused kernel where weight and input have one type (layer_norm.cpp, torch 2.11)."""
    if weight is None or weight.dtype == input.dtype:
        return aten._fused_rms_norm(input, normalized_shape, weight, eps)[0]  # type: ignore[no-any-return]
    wide = input.float() if input.dtype.itemsize < 4 else input
    dims = list(range(-len(normalized_shape), 0))
    normalized = wide * torch.rsqrt(wide.pow(2).mean(dims, keepdim=True).add_(eps or 0.0))
    return (normalized * weight).type_as(input)


def one_hot(tensor: torch.Tensor, num_classes: int = -1) -> torch.Tensor:
    """Scatter ones into zeros, as on CUDA; meta tensors compare with all classes instead (Onehot.cpp)."""
    if num_classes == -1:
        num_classes = int(tensor.max()) + 1
    zeros = torch.zeros((*tensor.shape, num_classes), dtype=tensor.dtype, device="meta")
    return zeros.scatter_(-1, tensor.unsqueeze(-1), 1)


def lstm_cell(  # noqa: PLR0913, PLR0917 - aten's own signature
    input: torch.Tensor,  # noqa: A002 - as above
    hx: list[torch.Tensor],
    w_ih: torch.Tensor,
    w_hh: torch.Tensor,
    b_ih: torch.Tensor | None = None,
    b_hh: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the fused cell, which keeps its gates (RNN.cpp, torch 2.11)."""
    gates = input @ w_ih.t(), hx[0] @ w_hh.t()
    output, state, _ = aten._thnn_fused_lstm_cell(*gates, hx[1], b_ih, b_hh)
    return output, state


def gru_cell(  # noqa: PLR0913, PLR0917 - aten's own signature
    input: torch.Tensor,  # noqa: A002 - as above
    hx: torch.Tensor,
    w_ih: torch.Tensor,
    w_hh: torch.Tensor,
    b_ih: torch.Tensor | None = None,
    b_hh: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run the fused cell, which keeps five numbers a unit (RNN.cpp, torch 2.11)."""
    output: torch.Tensor = aten._thnn_fused_gru_cell(input @ w_ih.t(), hx @ w_hh.t(), hx, b_ih, b_hh)[0]
    return output


def softmax(input: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> torch.Tensor:  # noqa: A002 - as above
    """Turn half precision into fp32 within the kernel (SoftMax.cpp, torch 2.11)."""
    return aten._softmax(*_converted(input, dim, dtype))  # type: ignore[no-any-return]


def log_softmax(input: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> torch.Tensor:  # noqa: A002 - as above
    """Turn half precision into fp32 within the kernel, as the softmax does."""
    return aten._log_softmax(*_converted(input, dim, dtype))  # type: ignore[no-any-return]


def _converted(tensor: torch.Tensor, dim: int, dtype: torch.dtype | None) -> tuple[torch.Tensor, int, bool]:
    """Return the arguments of the kernel, which converts float16, and no other type, by itself."""
    if tensor.dtype == torch.float16 and dtype == torch.float32:
        return tensor, dim, True
    return tensor if dtype is None else tensor.to(dtype), dim, False
