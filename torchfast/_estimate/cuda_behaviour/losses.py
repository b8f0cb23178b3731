"""Loss operators: element by element first, then the reduction."""

import math
from typing import Any

import torch

from torchfast._estimate.cuda_behaviour.reductions import scratch_bytes
from torchfast._estimate.recorder import Recorder, Rule


def reduced_into_full_size(
    recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run a loss whose reduced result keeps the storage of its elements (Loss.cpp, torch 2.11).

    The output is made in the size of the elements and shrunk to a number; the elements are computed into a
    tensor of their own, which is gone at the end.
    """
    meta = recorder.run_unrecorded(func, args, kwargs)
    if meta.dim() != 0:
        return recorder.adopt(meta)
    shape = torch.broadcast_shapes(args[0].shape, args[1].shape)
    full = torch.empty(shape, dtype=meta.dtype, device="meta")
    output = recorder.adopt(full.as_strided((), ()))
    accumulator_bytes = max(4, meta.dtype.itemsize)
    partial = scratch_bytes(full, range(len(shape)), accumulator_bytes, recorder.gpu)
    with recorder.scratch(math.prod(shape) * meta.dtype.itemsize, *partial):
        return output


def elements_then_reduced(
    recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run a loss whose elements are gone once they are reduced."""
    output = recorder.run(func, args, kwargs)
    if output.dim() != 0:
        return output
    size_bytes = math.prod(torch.broadcast_shapes(args[0].shape, args[1].shape)) * output.dtype.itemsize
    with recorder.scratch(size_bytes):
        return output


def ctc(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run CTC: one loss a sample, and alpha for every time step and place in the target (LossCTC.cu)."""
    del func, kwargs
    log_probs, targets = args[0], args[1]
    n_steps, batch = log_probs.shape[0], log_probs.shape[1]
    longest = targets.shape[1] if targets.dim() == 2 else -(-targets.shape[0] // batch)
    losses = recorder.new((batch,), log_probs.dtype)
    return losses, recorder.new((batch, n_steps, 2 * longest + 1), log_probs.dtype)


def ctc_backward(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run its backward pass, which takes twice as much for beta as the forward pass kept for alpha."""
    del func, kwargs
    log_probs, log_alpha = args[1], args[6]
    with recorder.scratch(2 * log_alpha.numel() * log_alpha.dtype.itemsize):
        return recorder.new(log_probs.shape, log_probs.dtype, log_probs.stride())


def reduced_in_place(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a loss whose elements are reduced within the output's own storage, which is then shrunk."""
    meta = recorder.run_unrecorded(func, args, kwargs)
    if meta.dim() != 0:
        return recorder.adopt(meta)
    full = torch.empty(args[0].shape, dtype=meta.dtype, device="meta")
    output = recorder.adopt(full.as_strided((), ()))
    with recorder.scratch(*scratch_bytes(full, range(full.dim()), max(4, meta.dtype.itemsize), recorder.gpu)):
        return output


def with_logits(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run binary cross entropy on logits: their log-sigmoid, and the elements before they are reduced."""
    output = recorder.run(func, args, kwargs)
    size_bytes = args[0].numel() * output.dtype.itemsize
    if output.dim() != 0:
        with recorder.scratch(size_bytes):
            return output
    full = torch.empty(args[0].shape, dtype=output.dtype, device="meta")
    partial = scratch_bytes(full, range(full.dim()), max(4, output.dtype.itemsize), recorder.gpu)
    with recorder.scratch(size_bytes, size_bytes, *partial):
        return output


def soft_margin_backward(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run the soft margin's backward pass, which takes two tensors of the input's size on its way."""
    outputs = recorder.run(func, args, kwargs)
    size_bytes = args[1].numel() * args[1].dtype.itemsize
    with recorder.scratch(size_bytes, size_bytes):
        return outputs


def log_sigmoid(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run the log-sigmoid, which on CUDA keeps no buffer for the backward pass (Activation.cpp)."""
    meta = recorder.run_unrecorded(func, args, kwargs)
    return recorder.adopt(meta[0]), recorder.new((0,), args[0].dtype)


RULES: dict[str, Rule] = {
    "_ctc_loss": ctc,
    "_ctc_loss_backward": ctc_backward,
    "mse_loss": reduced_into_full_size,
    "smooth_l1_loss": reduced_into_full_size,
    "binary_cross_entropy": reduced_in_place,
    "binary_cross_entropy_with_logits": with_logits,
    "huber_loss": elements_then_reduced,
    "soft_margin_loss": reduced_in_place,
    "soft_margin_loss_backward": soft_margin_backward,
    "log_sigmoid_forward": log_sigmoid,
}
