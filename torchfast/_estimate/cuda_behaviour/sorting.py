"""Sorting and choosing among activations: the scratch of the kernels, and the indices that come out."""

from typing import Any

import torch

from torchfast._estimate.cuda_behaviour import reductions
from torchfast._estimate.gpus import GPU
from torchfast._estimate.known import values_of
from torchfast._estimate.recorder import Recorder

CHOICES = ("topk", "sort", "multinomial", "argmax", "argmin", "max", "min")
_EVEN = "choices that depend on activations (top-k, arg max, sorting) were taken to be spread evenly"
_MOST_CHOICES = 2**21


def choice(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Choose among activations: the indices are taken to go round, so that each is chosen equally often."""
    name = func._schema.name.removeprefix("aten::")
    if name in reductions.OPERATORS:
        outputs = reductions.reduction(recorder, func, args, kwargs)
    else:
        outputs = recorder.run(func, args, kwargs)
    if name in ("max", "min") and isinstance(outputs, torch.Tensor):
        return outputs  # the largest of all is a number, and no choice
    tensor, chosen = args[0], outputs[1] if isinstance(outputs, (tuple, list)) else outputs
    size = tensor.shape[_dim(func, args, kwargs)] if tensor.dim() else 1
    if values_of(tensor) is None and chosen.numel() <= _MOST_CHOICES:
        recorder.assumptions[_EVEN] = None
        # Along the chosen dimension the classes differ; from row to row the first one moves on.
        chosen.values = torch.arange(chosen.numel()).reshape(chosen.shape) % max(size, 1)
    with recorder.scratch(_scratch_bytes(name, tensor, size, recorder.gpu)):
        return outputs


def _scratch_bytes(name: str, tensor: torch.Tensor, size: int, gpu: GPU) -> int:
    if name == "multinomial":
        # The probabilities, each divided by a random number (Distributions.cpp).
        return tensor.numel() * tensor.dtype.itemsize
    if name == "topk":
        return _topk_bytes(tensor.numel() // max(size, 1), size, gpu)
    return _sort_bytes(tensor, size) if name == "sort" else 0


# From so many slices on, slices of so many elements are shared by blocks of threads (TensorTopK.cpp, 2.11).
_SHARED_FROM = ((4001, 400), (800, 800), (200, 3000), (81, 5000), (41, 8000), (21, 10_000), (0, 20_000))
_THREADS, _RADIX = 256, 256


def _topk_bytes(n_slices: int, size: int, gpu: GPU) -> int:
    """Return what counting digits takes where blocks share a slice (TensorTopK.cu, torch 2.11)."""
    if size < next(least for slices, least in _SHARED_FROM if n_slices >= slices):
        return 0
    blocks_at_once = gpu.n_multiprocessors * 6  # of 40 registers a thread
    a_thread = -(-n_slices * size // (blocks_at_once * _THREADS))
    n_blocks = n_slices * -(-size // (min(max(a_thread, 4), 64) * _THREADS))
    return n_blocks * (2 * _RADIX + 8) + n_slices * (4 * _RADIX + 20)


_SORTED_BY_A_BLOCK = 4096
_MANY_SLICES = 128


def _sort_bytes(tensor: torch.Tensor, size: int) -> int:
    """Return what a sort takes (Sort.cu, torch 2.11): the places, and for long slices a copy of the keys.

    A few long slices are sorted together, twice: with pairs of slice and place for values.
    """
    if size <= _SORTED_BY_A_BLOCK:
        return 8 * size
    is_few = 1 < tensor.numel() // size < _MANY_SLICES
    return tensor.numel() * (2 * tensor.dtype.itemsize + 24 if is_few else tensor.dtype.itemsize + 16)


def _dim(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    names = [argument.name for argument in func._schema.arguments]
    dim = (dict(zip(names, args, strict=False)) | kwargs).get("dim")
    return -1 if dim is None else int(dim)
