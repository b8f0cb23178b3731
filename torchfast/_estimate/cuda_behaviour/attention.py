"""Scaled dot-product attention: the backend that PyTorch would choose on the GPU, and what each takes.

The order and the conditions are those of aten/src/ATen/native/transformers/cuda/sdp_utils.cpp in torch 2.11
with cuDNN 9.15 or later; checked against the runs on an H200 that the accuracy benchmark compares with.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from torchfast._estimate.cuda_behaviour.layouts import copy_bytes
from torchfast._estimate.gpus import GPU
from torchfast._estimate.paper import META
from torchfast._estimate.recorder import Recorder

aten = torch.ops.aten
_HALVES = (torch.float16, torch.bfloat16)


def attention_kernel(gpu: GPU) -> Callable[..., torch.Tensor]:
    """Return `scaled_dot_product_attention` as it would run on this GPU."""

    def scaled_dot_product_attention(  # noqa: PLR0913, PLR0917 - aten's own signature
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,  # noqa: FBT001, FBT002 - as above
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        call = Call(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
        backend = choose(call, gpu)
        mask = _float_mask(attn_mask, query.dtype)
        if backend == "flash":
            return _flash(call, scale)
        if backend == "cudnn":
            outputs = aten._scaled_dot_product_cudnn_attention(
                query, key, value, mask, call.requires_grad, dropout_p, is_causal, False, scale=scale
            )
        elif backend == "efficient":
            if mask is not None:
                mask = _aligned_mask(mask).expand(*query.shape[:3], key.shape[2])
            outputs = aten._scaled_dot_product_efficient_attention(
                query, key, value, mask, call.requires_grad, dropout_p, is_causal, scale=scale
            )
        else:
            with _math():
                outputs = aten._scaled_dot_product_attention_math(
                    query, key, value, mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
                )
        output: torch.Tensor = outputs[0]
        return output

    return scaled_dot_product_attention


class Math:
    """Whether the math kernel is running: it adds its mask in place, but for tensor subclasses."""

    is_running = False


@contextmanager
def _math() -> Iterator[None]:
    Math.is_running = True
    try:
        yield
    finally:
        Math.is_running = False


@dataclass(frozen=True, slots=True)
class Call:
    """The arguments that decide the backend: what PyTorch's sdp_params holds."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    dropout: float
    is_causal: bool
    enable_gqa: bool

    @property
    def requires_grad(self) -> bool:
        """Whether the backward pass will need what the forward pass saves."""
        return torch.is_grad_enabled() and any(t.requires_grad for t in (self.query, self.key, self.value))


def choose(call: Call, gpu: GPU) -> str:
    """Return "cudnn", "flash", "efficient" or "math": the first of PyTorch's order that can run the call."""
    if _dense(call):
        # cuDNN comes first on Hopper and Blackwell (check_prefer_cudnn_attention), else after the others.
        prefers_cudnn = gpu.capability[0] in (9, 10)
        order = ("cudnn", "flash", "efficient") if prefers_cudnn else ("flash", "efficient", "cudnn")
        for backend in order:
            if _CAN_RUN[backend](call, gpu):
                return backend
    return "math"


def _dense(call: Call) -> bool:
    return all(
        t.dim() == 4 and t.shape[2] > 0 and (t.stride(3) == 1 or t.shape[3] == 1)
        for t in (call.query, call.key, call.value)
    ) and (call.mask is None or call.mask.stride(-1) == 1 or call.mask.shape[-1] == 1)


def _heads_match(call: Call, *, supports_gqa: bool) -> bool:
    q, k, v = call.query.shape, call.key.shape, call.value.shape
    if not q[0] == k[0] == v[0]:
        return False
    if call.enable_gqa and supports_gqa:
        return k[1] == v[1] and q[1] % k[1] == 0
    return q[1] == k[1] == v[1]


def _cudnn(call: Call, gpu: GPU) -> bool:
    q, k, v = call.query, call.key, call.value
    widths = q.shape[3], v.shape[3]
    is_deepseek = (gpu.capability[0], *widths) == (10, 192, 128)
    limit = 256 if gpu.capability == (9, 0) else 192 if is_deepseek else 128  # check_cudnn_tensor_shapes
    return (
        torch.backends.cuda.cudnn_sdp_enabled()
        and (8, 0) <= gpu.capability <= (12, 1)
        and not torch.are_deterministic_algorithms_enabled()
        and _same_dtype(call, _HALVES)
        and (call.mask is None or (not call.mask.requires_grad and _mask_fits(call)))
        and _heads_match(call, supports_gqa=True)
        and max(q.shape[0], q.shape[1]) <= 65_535
        and max(widths) <= limit
        and q.shape[3] % 8 == 0 == v.shape[3] % 8
        and k.shape[2] != 1
        and not (call.dropout and q.shape[2] == 1)
    )


def _mask_fits(call: Call) -> bool:
    """Whether a mask broadcasts to (batch, heads, queries, keys) in the way that cuDNN takes."""
    assert call.mask is not None  # noqa: S101 - the caller asked
    full = (*call.query.shape[:3], call.key.shape[2])
    sizes = call.mask.shape
    return len(sizes) in (2, 4) and all(a in (1, b) for a, b in zip(sizes[::-1], full[::-1], strict=False))


def _flash(call: Call, scale: float | None) -> torch.Tensor:
    """Run flash attention with head sizes padded to a multiple of 8, as attention.cpp does."""
    size = call.query.shape[-1]
    scale = size**-0.5 if scale is None else scale
    tensors = [call.query, call.key, call.value]
    if size % 8:
        tensors = [torch.nn.functional.pad(t, (0, 8 - size % 8)) for t in tensors]
    output: torch.Tensor = aten._scaled_dot_product_flash_attention(
        *tensors, call.dropout, call.is_causal, False, scale=scale
    )[0]
    return output[..., :size] if size % 8 else output


def _can_flash(call: Call, gpu: GPU) -> bool:
    q, k, v = call.query, call.key, call.value
    large_heads_fail = gpu.capability in ((8, 6), (8, 7), (8, 9), (12, 0), (12, 1)) and call.requires_grad
    return (
        torch.backends.cuda.flash_sdp_enabled()
        and (8, 0) <= gpu.capability <= (12, 1)
        and call.mask is None
        and _same_dtype(call, _HALVES)
        and q.shape[3] == k.shape[3] == v.shape[3] <= 256
        and not (call.is_causal and q.shape[2] != k.shape[2])
        and not (large_heads_fail and (192 < q.shape[3] <= 224 or (q.shape[3] > 224 and call.dropout > 0)))
        and _heads_match(call, supports_gqa=True)
    )


def _can_efficient(call: Call, gpu: GPU) -> bool:
    q, k, v = call.query, call.key, call.value
    dtypes = (torch.float32, *_HALVES) if gpu.capability >= (8, 0) else (torch.float32, torch.float16)
    alignment = _gemm_alignment(q.dtype, gpu)
    return (
        torch.backends.cuda.mem_efficient_sdp_enabled()
        and (5, 0) <= gpu.capability <= (12, 1)
        and _same_dtype(call, dtypes)
        and q.shape[3] == k.shape[3]
        and q.shape[3] % alignment == 0 == v.shape[3] % alignment
        and _heads_match(call, supports_gqa=False)
    )


def _gemm_alignment(dtype: torch.dtype, gpu: GPU) -> int:
    is_half = dtype in _HALVES
    tensor_cores = gpu.capability[0] >= 8 or (gpu.capability[0] == 7 and is_half)
    least = 4 if gpu.capability[0] >= 8 else 1
    return max(least, 128 // (16 if is_half else 32)) if tensor_cores else least


def _same_dtype(call: Call, allowed: tuple[torch.dtype, ...]) -> bool:
    return call.query.dtype == call.key.dtype == call.value.dtype and call.query.dtype in allowed


_CAN_RUN: dict[str, Callable[[Call, GPU], bool]] = {
    "cudnn": _cudnn,
    "flash": _can_flash,
    "efficient": _can_efficient,
}


def _float_mask(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """Turn a mask of booleans into one of numbers to add, as convert_boolean_attn_mask does."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    lowest = torch.scalar_tensor(float("-inf"), dtype=dtype, device=META)
    return torch.where(mask, torch.scalar_tensor(0.0, dtype=dtype, device=META), lowest)


def _aligned_mask(mask: torch.Tensor) -> torch.Tensor:
    """Pad a mask whose rows are not aligned to 8 elements, as preprocess_mask does."""
    strides = mask.stride()[:-1]
    if all(stride % 8 == 0 for stride in strides) and mask.shape[-1] % 8 == 0:
        return mask
    size = mask.shape[-1]
    return torch.nn.functional.pad(mask, (0, 8 - size % 8))[..., :size]


def cudnn(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run cuDNN's forward pass: the random state first, a workspace of 256 bytes last (H200, torch 2.11)."""
    del func, kwargs
    query, key, value, _, with_lse = args[:5]
    seed, offset = recorder.new((), torch.int64), recorder.new((), torch.int64)
    shape = (*query.shape[:3], value.shape[3])
    output = recorder.new(shape, query.dtype, _strides_like(query, shape))
    lse = recorder.new((*query.shape[:3], 1), torch.float32) if with_lse else None
    with recorder.scratch(256):
        return output, lse, None, None, query.shape[2], key.shape[2], seed, offset, None


def _strides_like(query: torch.Tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return dense strides in the query's order of dimensions (alloc_with_matching_layout in MHA.cpp)."""
    strides, step = [0, 0, 0, 0], 1
    for dim in sorted(range(4), key=lambda d: (query.stride(d), -d)):
        strides[dim] = step
        step *= shape[dim]
    return tuple(strides)


def cudnn_backward(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run cuDNN's backward pass: gradients, then a workspace as measured on an H200 (torch 2.11, cuDNN 9.15).

    It holds the query's gradient in fp32, one fp32 number a row, and with grouped heads the gradients of keys
    and values for every query head.
    """
    query, key = args[1], args[2]
    n_rows = query.shape[0] * query.shape[1] * query.shape[2]
    workspace_bytes = n_rows * (query.shape[3] + 1) * 4 + 256
    if key.shape[1] != query.shape[1]:
        n_keys = query.shape[0] * query.shape[1] * key.shape[2]
        workspace_bytes += n_keys * (key.shape[3] + args[3].shape[3]) * key.dtype.itemsize
    outputs = recorder.run(func, args, kwargs)
    with recorder.scratch(workspace_bytes):
        return outputs


def flash_backward(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run flash attention's backward pass (attention_backward.cu and flash_api.cpp, torch 2.11).

    First gradient and output are made contiguous with the heads behind the rows. The query's gradient is
    summed in fp32 with rows padded to 128 and the head to 32, beside one fp32 number a row; those of grouped
    keys and values are reckoned for every query head.
    """
    gradient, query, key, output = args[0], args[1], args[2], args[4]
    n_heads, rows, width = query.shape[0] * query.shape[1], _padded(query.shape[2], 128), query.shape[3]
    each = n_heads * key.shape[2] * width * key.dtype.itemsize
    expanded = (each, each) if key.shape[1] != query.shape[1] else ()
    with recorder.scratch(*(size for t in (gradient, output) for size in copy_bytes(t.transpose(1, 2)))):
        outputs = recorder.run(func, args, kwargs)
        with recorder.scratch(n_heads * rows * 4, n_heads * rows * _padded(width, 32) * 4, *expanded):
            return outputs


def _padded(size: int, step: int) -> int:
    return -(-size // step) * step


def efficient(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run memory-efficient attention, whose random state lies on the host outside of CUDA graphs.

    Heads wider than a tile are summed in fp32 first (kNeedsOutputAccumulatorBuffer in kernel_forward.h).
    """
    with recorder.unrecorded(8):
        outputs = recorder.run(func, args, kwargs)
    value = args[2]
    is_wide = value.dtype in _HALVES and value.shape[3] > _WIDEST_IN_REGISTERS
    with recorder.scratch(4 * outputs[0].numel() if is_wide else 0):
        return outputs


_WIDEST_IN_REGISTERS = 128


def efficient_backward(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run its backward pass: one fp32 number a row (delta), then the kernel's workspace.

    attention_backward.cu and kernel_backward.h, torch 2.11. In half precision the kernel reckons delta by
    itself; in fp32 it is a product of gradient and output, summed. The gradient is made contiguous before the
    results are there (allocations recorded on an H200).
    """
    grad_out, query, value = args[0], args[1], args[3]
    n_rows = query.shape[0] * query.shape[1] * query.shape[2]
    copies = [recorder.allocate(size, "workspace") for size in copy_bytes(grad_out.transpose(1, 2))]
    outputs = recorder.run(func, args, kwargs)
    if grad_out.dtype in _HALVES and recorder.gpu.capability != (7, 0):
        delta = recorder.allocate(n_rows * 4, "workspace")
    else:
        sizes = (grad_out.numel() * 4,) * (2 if grad_out.dtype in _HALVES else 0)
        with recorder.scratch(*sizes, n_rows * value.shape[3] * 4, n_rows * 4):
            delta = recorder.allocate(n_rows * 4, "workspace")
    workspace = recorder.allocate(_workspace_bytes(query, value), "workspace")
    for block in (delta, workspace, *copies):
        recorder.free(block)
    return outputs


def _workspace_bytes(query: torch.Tensor, value: torch.Tensor) -> int:
    """Return what sums of gradients over blocks of keys take: tiles of 64 queries, 16 bytes of locks each."""
    n_heads, width = query.shape[0] * query.shape[1], query.shape[3]
    n_tiles = -(-query.shape[2] // 64)
    if width <= _WIDEST_IN_REGISTERS or query.dtype not in _HALVES:
        return n_heads * n_tiles * (64 * _padded(width, 64) * 4 + 16)
    n_splits = max(1, min(-(-value.shape[2] // 128), 200 // n_heads))
    keys_and_values = n_splits * 128 * (_padded(width, 64) + _padded(value.shape[3], 64)) * 4
    return n_heads * (n_tiles * -(-width // 128) * (64 * 128 * 4 + 16) + keys_and_values)
