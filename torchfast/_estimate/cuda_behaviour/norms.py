"""Dropout, softmax and normalisations: in what order their CUDA kernels take memory, and their scratch."""

from typing import Any

import torch

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
