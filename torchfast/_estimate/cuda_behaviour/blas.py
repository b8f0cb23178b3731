"""cuBLAS: the workspaces that stay, one for each handle, and a handle for each thread that multiplies."""

from typing import Any

import torch

from torchfast._bytes import KIB, MIB
from torchfast._estimate.recorder import Recorder


def matrix_product(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a matrix product; the first of a thread takes the workspaces of the thread's handle for good."""
    outputs = recorder.run(func, args, kwargs)
    keep_workspace(recorder, "cuBLAS", workspace_bytes(recorder.gpu.capability))
    if func._schema.name == "aten::addmm" and args[0].dim() == 1:
        # A bias vector is added in cuBLASLt's epilogue.
        keep_workspace(recorder, "cuBLASLt", LT_WORKSPACE_BYTES)
    return outputs


def keep_workspace(recorder: Recorder, library: str, size_bytes: int) -> None:
    """Record a workspace that a library keeps for each thread, unless this thread has it."""
    # On a GPU autograd runs the backward pass in a thread of its own.
    thread = "backward" if recorder.phase.endswith("backward") else "forward"
    if (library, thread) not in recorder.kept:
        recorder.kept[library, thread] = recorder.allocate(size_bytes, "workspace")


LT_WORKSPACE_BYTES = MIB  # CUBLASLT_WORKSPACE_SIZE, by default 1,024 KiB


def workspace_bytes(capability: tuple[int, int]) -> int:
    """Return the size of cuBLAS's workspace (CublasHandlePool.cpp, torch 2.11)."""
    return 32 * MIB if capability[0] in (9, 10, 11, 12) else 8 * MIB + 128 * KIB


def grouped_product(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run `_grouped_mm`, the product of experts: its meta kernel takes bfloat16 only, CUDA more types."""
    names = [argument.name for argument in func._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    a, b, offsets = given["self"], given["mat2"], given.get("offs")
    shape: tuple[int, ...] = (a.shape[-2], b.shape[-1])
    if a.dim() == b.dim():
        n_groups = offsets.shape[0] if isinstance(offsets, torch.Tensor) and a.dim() == 2 else a.shape[0]
        shape = (n_groups, *shape)
    keep_workspace(recorder, "cuBLAS", workspace_bytes(recorder.gpu.capability))
    return recorder.new(shape, given.get("out_dtype") or a.dtype)


PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "addmv", "mv", "dot", "_addmm_activation")
