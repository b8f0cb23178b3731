"""Reductions: partial results of blocks that share an output go through memory.

The launch is reckoned as `setReduceConfig` in aten/src/ATen/native/cuda/Reduce.cuh (torch 2.11) does it.
"""

from collections.abc import Sequence
from typing import Any

import torch

from torchfast._estimate.gpus import GPU
from torchfast._estimate.recorder import Recorder

_MAX_THREADS = 512
_WARP = 32
_OUTPUT_VECTOR = 4
_INPUT_VECTOR = 4
_MIN_VALUES, _MAX_VALUES = 16, 256


def reduction(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a reduction: its output, then the scratch of its blocks and a counter for each group of them."""
    outputs = recorder.run(func, args, kwargs)
    tensor = args[0]
    result = outputs[0] if isinstance(outputs, tuple) else outputs
    if not isinstance(tensor, torch.Tensor) or not isinstance(result, torch.Tensor):
        return outputs
    dims = _reduced_dims(func, args, kwargs)
    if func._schema.name in _CONVERTING and not tensor.is_floating_point() and tensor.dtype != result.dtype:
        with recorder.scratch(tensor.numel() * result.dtype.itemsize):
            return outputs
    with recorder.scratch(
        *scratch_bytes(tensor, dims, _accumulator_bytes(func, tensor, result), recorder.gpu)
    ):
        return outputs


def log_sum_exp(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a log-sum-exp, which holds the exponentials of its whole input (ReduceOps.cpp, torch 2.11)."""
    outputs = recorder.run(func, args, kwargs)
    with recorder.scratch(outputs.numel() * outputs.dtype.itemsize, args[0].numel() * outputs.dtype.itemsize):
        return outputs


def scratch_bytes(
    tensor: torch.Tensor, dims: Sequence[int], accumulator_bytes: int, gpu: GPU
) -> tuple[int, ...]:
    """Return the sizes of partial results and semaphores, or nothing where blocks share no output."""
    reduced = _merged(tensor, [d for d in range(tensor.dim()) if d in dims])
    kept = _merged(tensor, [d for d in range(tensor.dim()) if d not in dims])
    n_outputs, n_inputs = _product(kept), _product(reduced)
    if n_outputs * n_inputs == 0:
        return ()
    launch = _Launch(reduced, kept, n_outputs, n_inputs)
    n_blocks = launch.blocks_per_output(gpu)
    if n_blocks == 1:
        return ()
    size = accumulator_bytes * n_outputs * n_blocks
    if not launch.along_fastest:
        size *= launch.width * launch.output_vector
    return size, 4 * launch.grid


class _Launch:
    """The shape of the blocks of threads, and how inputs and outputs are spread over them."""

    def __init__(
        self, reduced: list[tuple[int, int]], kept: list[tuple[int, int]], n_outputs: int, n_inputs: int
    ) -> None:
        self.n_inputs = n_inputs
        self.along_fastest = not kept or (bool(reduced) and reduced[0][1] < kept[0][1])
        self.output_vector = 1
        fastest = (reduced if self.along_fastest else kept)[:1]
        dims = (n_inputs, n_outputs) if self.along_fastest else (n_outputs, n_inputs)
        first = dims[0]
        if fastest and fastest[0][1] == 1:
            if not self.along_fastest:
                self.output_vector = _vector(kept[0][0], [stride for _, stride in (*reduced, *kept[1:])])
                first //= self.output_vector
            elif not kept and len(reduced) == 1 and first > 128:
                first //= _INPUT_VECTOR
        self.width, self.height = _block(first, dims[1], _MAX_THREADS // self.output_vector)
        step_input, step_output = (
            (self.width, 1) if self.along_fastest else (1, self.width * self.output_vector)
        )
        self.across_warps = -(-n_inputs // step_input) >= min(self.height * 16, _MAX_VALUES)
        if self.across_warps:
            step_input *= self.height
        else:
            step_output *= self.height
        self.values_per_thread = -(-n_inputs // step_input)
        self.grid = -(-n_outputs // step_output)

    def blocks_per_output(self, gpu: GPU) -> int:
        """Return how many blocks share an output."""
        resident = gpu.max_threads_per_multiprocessor // (self.width * self.height)
        target = gpu.n_multiprocessors * resident
        if not self.across_warps or self.values_per_thread < _MAX_VALUES or self.grid > target:
            return 1
        by_grid = -(-target // self.grid)
        at_most = -(-self.values_per_thread // _MIN_VALUES)
        at_least = -(-self.values_per_thread // _MAX_VALUES)
        return max(min(by_grid, at_most), at_least)


def _block(first: int, second: int, max_threads: int) -> tuple[int, int]:
    first, second = (min(last_power(n), max_threads) for n in (first, second))
    width = min(first, _WARP)
    height = min(second, max_threads // width)
    return min(first, max_threads // height), height


def last_power(n: int) -> int:
    """Return the largest power of two that is no larger."""
    return 1 << (max(n, 1).bit_length() - 1)


def _vector(size: int, strides: list[int]) -> int:
    """Return how many neighbouring outputs a thread loads at once."""
    vector = _OUTPUT_VECTOR
    for number in (size, *strides):
        while number % vector:
            vector //= 2
    return vector


def _merged(tensor: torch.Tensor, dims: list[int]) -> list[tuple[int, int]]:
    """Return sizes and strides of some dimensions, fastest first, merged as TensorIterator does."""
    pairs = sorted((tensor.stride(d), tensor.shape[d]) for d in dims if tensor.shape[d] != 1)
    merged: list[tuple[int, int]] = []
    for stride, size in pairs:
        if merged and merged[-1][0] * merged[-1][1] == stride:
            merged[-1] = (merged[-1][0] * size, merged[-1][1])
        else:
            merged.append((size, stride))
    return merged


def _product(pairs: list[tuple[int, int]]) -> int:
    product = 1
    for size, _ in pairs:
        product *= size
    return product


def _reduced_dims(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
    """Return the dimensions that an operator reduces; all of them where it names none."""
    n_dims = args[0].dim()
    names = [argument.name for argument in func._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    dim = given.get("dim")
    if dim is None or (isinstance(dim, (list, tuple)) and not dim):
        return list(range(n_dims))
    return [d % max(n_dims, 1) for d in (dim if isinstance(dim, (list, tuple)) else [dim])]


# Sums of integers are taken of a copy in the type of the result (make_reduction in ReduceOpsUtils.h).
_CONVERTING = ("aten::sum", "aten::prod", "aten::mean")


def _accumulator_bytes(func: Any, tensor: torch.Tensor, result: torch.Tensor) -> int:
    """Return the size of a partial result."""
    name = func._schema.name.removeprefix("aten::")
    if name.startswith(("var", "std")):
        return 16 if tensor.dtype != torch.float64 else 32  # mean, sum of squares and two counts (Welford)
    if name.startswith("arg"):
        return 16  # a value and its index
    return max(4, result.dtype.itemsize) if result.dtype != torch.bool else 1


OPERATORS = (
    "sum",
    "mean",
    "prod",
    "linalg_vector_norm",
    "amax",
    "amin",
    "any",
    "all",
    "nansum",
    "var",
    "std",
    "var_mean",
    "std_mean",
    "argmax",
    "argmin",
)
