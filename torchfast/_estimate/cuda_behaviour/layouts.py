"""Operators whose CUDA kernels first make their inputs contiguous, and what they take beside."""

from typing import Any

import torch

from torchfast._estimate.recorder import Recorder, Rule


def contiguous_first(*positions: int) -> Rule:
    """Return the rule of an operator that copies these arguments where they are not contiguous."""

    def rule(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with recorder.scratch(*(size for i in positions if i < len(args) for size in copy_bytes(args[i]))):
            return recorder.run(func, args, kwargs)

    return rule


def contiguous_after(*positions: int) -> Rule:
    """Return the rule of a structured operator that does: PyTorch makes its output before its kernel runs."""

    def rule(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        outputs = recorder.run(func, args, kwargs)
        with recorder.scratch(*(size for i in positions for size in copy_bytes(args[i]))):
            return outputs

    return rule


def copy_bytes(tensor: Any) -> tuple[int, ...]:
    """Return the size of a contiguous copy, or nothing where there is none to make."""
    if not isinstance(tensor, torch.Tensor) or tensor.is_contiguous():
        return ()
    return (tensor.numel() * tensor.dtype.itemsize,)


def suggests_channels_last(tensor: torch.Tensor) -> bool:
    """Whether PyTorch reads a tensor's strides as channels last (c10/core/MemoryFormat.h, torch 2.11).

    Strides alone decide: with one position, a weight of (C, 1, C, C) is in channels last and one of
    (C, 1, 1, 1) is not, though both are contiguous.
    """
    n_dims = tensor.dim()
    if n_dims not in (4, 5) or tensor.stride(1) == 0:
        return False
    least = 0
    for dim in (1, *range(n_dims - 1, 1, -1), 0):
        size, stride = tensor.shape[dim], tensor.stride(dim)
        if size == 0 or stride < least or (dim == 0 and least == tensor.stride(1)):
            return False
        least = stride * size if size > 1 else stride
    return True


def suggested_first(position: int) -> Rule:
    """Return the rule of an operator that copies an argument that is dense in neither layout."""

    def rule(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensor = args[position]
        dense = tensor.is_contiguous() or (
            tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
        )
        with recorder.scratch(*(() if dense else copy_bytes(tensor))):
            return recorder.run(func, args, kwargs)

    return rule


def copied_after_output(position: int, *, takes_channels_last: bool = True) -> Rule:
    """Return the rule of an operator that copies an argument once its output is there."""

    def rule(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        outputs = recorder.run(func, args, kwargs)
        tensor = args[position]
        last = torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d
        is_dense = takes_channels_last and tensor.dim() > 3 and tensor.is_contiguous(memory_format=last)
        with recorder.scratch(*(() if is_dense else copy_bytes(tensor))):
            return outputs

    return rule


def pool_backward(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a pooling's backward pass: its gradient is copied into the layout of its input."""
    outputs = recorder.run(func, args, kwargs)
    gradient, tensor = args[0], args[1]
    is_last = suggests_channels_last(tensor)
    layout = torch.channels_last if is_last and tensor.dim() == 4 else torch.contiguous_format
    is_dense = (
        gradient.is_contiguous(memory_format=layout) if gradient.dim() == 4 else gradient.is_contiguous()
    )
    with recorder.scratch(0 if is_dense else gradient.numel() * gradient.dtype.itemsize):
        return outputs


def roll(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Roll along one dimension after the other, each into a tensor of its own (TensorTransformations.cu)."""
    tensor = args[0]
    n_dims = len(args[2]) if len(args) > 2 else 1
    size_bytes = tensor.numel() * tensor.dtype.itemsize
    with recorder.scratch(*(copy_bytes(tensor) if n_dims == 1 else (size_bytes,))):
        return recorder.run(func, args, kwargs)


def softmax_backward(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Multiply gradient and output into a tensor of its own after the result is there (SoftMax.cu)."""
    outputs = recorder.run(func, args, kwargs)
    product = recorder.run_unrecorded(torch.ops.aten.mul.Tensor, (args[0], args[1]), {})
    size_bytes = product.numel() * product.dtype.itemsize
    with recorder.scratch(size_bytes, *copy_bytes(product), *copy_bytes(args[1])):
        return outputs


def im2col(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an unfolding, whose output starts in the size of its input (Im2Col.cu)."""
    with recorder.scratch(*copy_bytes(args[0]), args[0].numel() * args[0].dtype.itemsize):
        return recorder.run(func, args, kwargs)


def col2im(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a folding, whose output lies in a storage of its input's size if that is larger (Col2Im.cu)."""
    meta = recorder.run_unrecorded(func, args, kwargs)
    size = max(meta.numel(), args[0].numel())
    with recorder.scratch(*copy_bytes(args[0])):
        full = torch.empty(size, dtype=meta.dtype, device="meta")
        return recorder.adopt(full.as_strided(meta.shape, meta.stride()))


def absolute(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run `abs`: complex numbers have theirs reckoned as complex ones first."""
    outputs = recorder.run(func, args, kwargs)
    with recorder.scratch(args[0].numel() * args[0].dtype.itemsize if args[0].is_complex() else 0):
        return outputs


def inverse_fft(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a transform to real numbers on a copy: cuFFT overwrites its input (SpectralOps.cpp)."""
    outputs = recorder.run(func, args, kwargs)
    with recorder.scratch(args[0].numel() * args[0].dtype.itemsize):
        return outputs


def complex_fft(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a complex transform, on a copy where the transformed dimensions do not come last."""
    outputs = recorder.run(func, args, kwargs)
    tensor, dims = args[0], [d % args[0].dim() for d in args[1]]
    others = sorted((d for d in range(tensor.dim()) if d not in dims), key=lambda d: -tensor.stride(d))
    is_last = tensor.permute(*others, *dims).is_contiguous()
    with recorder.scratch(0 if is_last else tensor.numel() * tensor.dtype.itemsize):
        return outputs


# Which arguments the kernels of torch 2.11 make contiguous: aten/src/ATen/native/cuda/{layer_norm_kernel.cu,
# SoftMax.cu, Embedding.cu, UpSample*.cu}.
RULES: dict[str, Rule] = {
    "im2col": im2col,
    "col2im": col2im,
    "abs": absolute,
    "_fft_c2r": inverse_fft,
    "_fft_c2c": complex_fft,
    "native_layer_norm": contiguous_first(0),
    "native_group_norm": suggested_first(0),
    "native_group_norm_backward": contiguous_first(0, 1),
    "_log_softmax": contiguous_after(0),
    "_softmax": contiguous_after(0),
    "_log_softmax_backward_data": contiguous_after(0, 1),
    "_softmax_backward_data": softmax_backward,
    "embedding": contiguous_first(1),
    "reflection_pad2d": contiguous_first(0),
    "roll": roll,
    "upsample_nearest1d_backward": copied_after_output(0),
    "upsample_nearest2d_backward": copied_after_output(0),
    "upsample_bilinear2d_backward": copied_after_output(0),
    "upsample_bicubic2d_backward": copied_after_output(0, takes_channels_last=False),
    "upsample_nearest3d_backward": copied_after_output(0),
    "upsample_trilinear3d_backward": copied_after_output(0),
    "avg_pool2d_backward": pool_backward,
    "max_pool2d_with_indices_backward": pool_backward,
}
