"""Convolutions: the copies that PyTorch makes around cuDNN, and cuDNN's workspaces."""

from collections.abc import Sequence
from typing import Any

import torch

from torchfast._estimate.cuda_behaviour.convolution_workspaces import DTYPES, Shape, workspace_bytes
from torchfast._estimate.cuda_behaviour.layouts import suggests_channels_last
from torchfast._estimate.cuda_behaviour.reductions import scratch_bytes
from torchfast._estimate.recorder import Recorder

_FORWARD, _DATA, _WEIGHT = 0, 1, 2

Options = tuple[Sequence[int], Sequence[int], bool, int]  # stride, dilation, transposed, groups


def convolution(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a convolution: operands are made dense in one layout, the output follows, then the workspace."""
    tensor, weight, bias, stride, _, dilation, transposed, _, groups = args
    memory_format = _memory_format(tensor, weight)
    with recorder.scratch(*_copies(memory_format, tensor, weight)):
        # The meta kernel answers for another backend, which keeps depthwise outputs contiguous.
        like = recorder.run_unrecorded(func, (tensor, weight, None, *args[3:]), kwargs)
        output = _empty_like(recorder, like, memory_format)
        if tensor.dim() > 2 and output.numel():
            shape = _shape(tensor, output, weight, (stride, dilation, transposed, groups))
            size_bytes = _workspace(shape, _DATA if transposed else _FORWARD, transposed=transposed)
            with recorder.scratch(size_bytes, optional=True):
                pass
    del bias  # added in place
    return output


def convolution_backward(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run its backward pass: each gradient is followed by its workspace; that of the bias is a sum."""
    del func, kwargs
    gradient, tensor, weight, _, stride, _, dilation, transposed, _, groups, wanted = args
    memory_format = _memory_format(tensor, weight)
    shape = _shape(tensor, gradient, weight, (stride, dilation, transposed, groups))
    found: list[torch.Tensor | None] = [None, None, None]
    with recorder.scratch(*_copies(memory_format, gradient, tensor, weight)):
        directions = (_FORWARD if transposed else _DATA, _WEIGHT)
        for i, (like, direction) in enumerate(zip((tensor, weight), directions, strict=True)):
            if wanted[i]:
                found[i] = _empty_like(recorder, like, memory_format)
                with recorder.scratch(_workspace(shape, direction, transposed=transposed), optional=True):
                    pass
    if wanted[2]:
        found[2] = recorder.new((gradient.shape[1],), gradient.dtype)
        dims = [d for d in range(gradient.dim()) if d != 1]
        accumulator_bytes = max(4, gradient.dtype.itemsize)
        with recorder.scratch(*scratch_bytes(gradient, dims, accumulator_bytes, recorder.gpu)):
            pass
    return tuple(found)


def _workspace(shape: Shape, direction: int, *, transposed: bool) -> int:
    is_own = not transposed and runs_own_kernels(shape)
    return 0 if is_own else workspace_bytes(shape, direction)


def runs_own_kernels(shape: Shape) -> bool:
    """Whether PyTorch's own kernels, which take nothing, run a convolution unless it is transposed.

    They run contiguous depthwise ones but for some in fp16 (ConvParams::is_depthwise, use_cudnn_depthwise
    and check_cudnn_depthwise_workload_with_filter in Convolution.cpp).
    """
    if not shape.is_depthwise or shape.channels_last:
        return False
    is_for_cudnn = shape.dtype == torch.float16 and len(shape.kernel) == 2 and shape.n_in >= 32
    return not is_for_cudnn or max(shape.dilation) > 1 or not _is_slow_in_own_kernels(shape)


def _is_slow_in_own_kernels(shape: Shape) -> bool:
    (rows, width), (row_stride, stride) = shape.size_in, shape.stride
    if rows == 1 and stride == 1:
        return True
    filter_rows, size = shape.kernel
    is_square = size == filter_rows and (stride == row_stride or rows == 1)
    if not is_square or size not in {1, 3, 5} or width < 7 or stride > 2:
        return False
    if stride == 1:
        return True
    if size == 1:
        return width <= 28 if shape.batch == 1 else shape.batch <= 16 and shape.n_in >= 128 and width <= 7
    return shape.batch == 1 or shape.n_in >= 512 or (shape.n_in >= 256 and width >= 28)


def _memory_format(tensor: torch.Tensor, weight: torch.Tensor) -> torch.memory_format:
    """Return the layout in which cuDNN is called (cudnn_conv_suggest_memory_format in ConvUtils.h)."""
    is_last = suggests_channels_last(tensor) or suggests_channels_last(weight)
    if is_last and tensor.dtype != torch.float64:
        return torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d
    return torch.contiguous_format


def _copies(memory_format: torch.memory_format, *tensors: torch.Tensor) -> list[int]:
    """Return the bytes of the copies of those operands that are not dense in the layout."""
    return [t.numel() * t.dtype.itemsize for t in tensors if not t.is_contiguous(memory_format=memory_format)]


def _empty_like(recorder: Recorder, like: torch.Tensor, memory_format: torch.memory_format) -> torch.Tensor:
    stride = torch.empty(like.shape, device="meta", memory_format=memory_format).stride()
    return recorder.new(like.shape, like.dtype, stride)


def _shape(tensor: torch.Tensor, output: torch.Tensor, weight: torch.Tensor, options: Options) -> Shape:
    stride, dilation, transposed, groups = options
    if transposed:
        tensor, output = output, tensor

    def sizes(of: Sequence[int]) -> tuple[int, ...]:
        return (1, *of) if tensor.dim() == 3 else tuple(of)  # one dimension is run as two (Convolution.cpp)

    return Shape(
        dtype=tensor.dtype if tensor.dtype in DTYPES else torch.float32,
        channels_last=_memory_format(tensor, weight) is not torch.contiguous_format,
        batch=tensor.shape[0],
        n_in=tensor.shape[1],
        n_out=output.shape[1],
        kernel=sizes(weight.shape[2:]),
        stride=sizes(stride),
        dilation=sizes(dilation),
        groups=groups,
        size_in=sizes(tensor.shape[2:]),
        size_out=sizes(output.shape[2:]),
    )
