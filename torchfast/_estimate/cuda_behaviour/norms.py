"""Dropout, softmax and normalisations: in what order their CUDA kernels take memory, and their scratch."""

import math
from typing import Any

import torch

from torchfast._estimate.cuda_behaviour.layouts import copy_bytes
from torchfast._estimate.cuda_behaviour.reductions import last_power, scratch_bytes
from torchfast._estimate.recorder import Recorder


def native_dropout(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run fused dropout, which takes its mask before its output (Dropout.cu, torch 2.11)."""
    del func, kwargs
    tensor = args[0]
    dense = torch.empty_like(tensor, device="meta").stride()
    mask = recorder.new(tensor.shape, torch.bool, dense)
    return recorder.new(tensor.shape, tensor.dtype, dense), mask


def safe_softmax(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run the softmax of the math attention kernel, which looks for rows that are masked altogether."""
    outputs = recorder.run(func, args, kwargs)
    tensor, dim = args[0], args[1]
    n_rows = tensor.numel() // max(tensor.shape[dim], 1)
    with recorder.scratch(tensor.numel(), n_rows, 1):
        return outputs


def cudnn_batch_norm(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run cuDNN's batch norm, which sums over tiles of positions first where it is channels last."""
    tensor, training = args[0], args[5]
    outputs = recorder.run(func, args, kwargs)
    n_positions = 64 if tensor.dtype == torch.float32 else 160
    workspace = _tiles_bytes(tensor, n_positions=n_positions, counter_bytes=4) if training else ()
    with recorder.scratch(*workspace):
        return outputs


def cudnn_batch_norm_backward(
    recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run its backward pass, over tiles of 96."""
    outputs = recorder.run(func, args, kwargs)
    with recorder.scratch(*_tiles_bytes(args[0], n_positions=96, counter_bytes=0)):
        return outputs


def _tiles_bytes(tensor: torch.Tensor, *, n_positions: int, counter_bytes: int) -> list[int]:
    """Return the workspace: two sums in fp32 for each of 64 channels of each tile.

    To the byte what 570 layers took on an H200 in fp32, and one in fp16 (cuDNN 9.19); contiguous ones take
    nothing.
    """
    if tensor.dim() != 4 or tensor.is_contiguous() or tensor.dtype not in (torch.float32, torch.float16):
        return []
    n_tiles = -(-tensor.numel() // tensor.shape[1] // n_positions) * -(-tensor.shape[1] // 64)
    return [n_tiles * (2 * 64 * 4 + counter_bytes) + _TILES_BESIDE_BYTES]


_TILES_BESIDE_BYTES = 1100  # from what sizes rounded to: more than 1,024, at most 1,152


def native_batch_norm(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run PyTorch's own batch norm, which sums blocks of positions first where it is channels last.

    Normalization.cu and Normalization.cuh, torch 2.11.
    """
    tensor, training = args[0], args[5]
    outputs = recorder.run(func, args, kwargs)
    with recorder.scratch(*(_staged_bytes(tensor, n_each=4) if training else ())):
        return outputs


def native_batch_norm_backward(
    recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run its backward pass: channels last, the sums over positions are there before the gradient is."""
    gradient, tensor, wanted = args[0], args[1], args[9]
    if not (args[7] and wanted[0] and _runs_channels_last(tensor) and _runs_channels_last(gradient)):
        return recorder.run(func, args, kwargs)
    meta = recorder.run_unrecorded(func, args, kwargs)
    sums = tensor.shape[1] * _accumulator_bytes(tensor)
    with recorder.scratch(sums, sums):
        of_weights = [recorder.adopt(each) for each in meta[1:]]
        with recorder.scratch(*_staged_bytes(tensor, n_each=2)):
            pass
        return (recorder.adopt(meta[0]), *of_weights)


def _runs_channels_last(tensor: torch.Tensor) -> bool:
    """Answer for `batch_norm_use_channels_last_kernels`."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.dim())
    if last is not None and tensor.is_contiguous(memory_format=last):
        return True
    return tensor.dim() > 1 and tensor.is_contiguous() and tensor.stride(1) == 1


def _staged_bytes(tensor: torch.Tensor, *, n_each: int) -> tuple[int, ...]:
    """Return partial sums and counters of the grid that `flexible_launch_configs` chooses."""
    n_channels = tensor.shape[1]
    n_positions = tensor.numel() // max(n_channels, 1)
    if not n_positions or not _runs_channels_last(tensor):
        return ()
    width = min(last_power(n_channels), 32)
    height = min(last_power(-(-n_positions // 16)), 512 // width)
    if width * height != 512:
        width = min(last_power(n_channels), 512 // height)
    n_blocks = min(-(-n_positions // (height * 16)), 128)
    if n_blocks < 8:  # not worth a reduction across blocks
        return ()
    return n_each * n_channels * n_blocks * _accumulator_bytes(tensor), 4 * -(-n_channels // width)


def _accumulator_bytes(tensor: torch.Tensor) -> int:
    return max(4, tensor.dtype.itemsize)


def layer_norm_backward(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run the backward pass of a layer norm (layer_norm_kernel.cu, torch 2.11).

    Over many short rows, the gradients of weight and bias are sums of blocks of 32 rows.
    """
    with recorder.scratch(*copy_bytes(args[0]), *copy_bytes(args[1])):
        outputs = recorder.run(func, args, kwargs)
        width = math.prod(args[2])
        n_rows = args[1].numel() // max(width, 1)
        if n_rows <= _MANY_ROWS or width // _WARP >= recorder.gpu.n_multiprocessors // 2:
            return outputs
        gradients = [gradient for gradient in outputs[1:] if gradient is not None]
        blocks = torch.empty((-(-n_rows // _WARP), width), dtype=args[1].dtype, device="meta")
        sizes = [blocks.numel() * gradient.dtype.itemsize for gradient in gradients]
        with recorder.scratch(*sizes):
            for _ in gradients:
                with recorder.scratch(*scratch_bytes(blocks, [0], max(4, blocks.itemsize), recorder.gpu)):
                    pass
        return outputs


_MANY_ROWS = 64 * 1024
_WARP = 32


def rms_norm(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run the fused kernel: the output, and one number a row for the backward pass (layer_norm_kernel.cu)."""
    del func, kwargs
    tensor, normalized = args[0], args[1]
    n_kept = tensor.dim() - len(normalized)
    with recorder.scratch(*copy_bytes(tensor)):
        output = recorder.new(tensor.shape, tensor.dtype)
        rows = (*tensor.shape[:n_kept], *(1,) * len(normalized))
        return output, recorder.new(rows, torch.float64 if tensor.dtype == torch.float64 else torch.float32)


def rms_norm_backward(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run its backward pass."""
    del func, kwargs
    gradient, tensor, _, _, weight, wanted = args
    with recorder.scratch(*copy_bytes(gradient), *copy_bytes(tensor)):
        return (
            recorder.new(tensor.shape, tensor.dtype) if wanted[0] else None,
            recorder.new(weight.shape, weight.dtype) if wanted[1] and weight is not None else None,
        )
