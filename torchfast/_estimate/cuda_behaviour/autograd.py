"""What autograd does with plain tensors and not with tensor subclasses."""

from typing import Any

import torch

from torchfast._estimate.cuda_behaviour.attention import Math
from torchfast._estimate.cuda_behaviour.indexing import index_put_bytes
from torchfast._estimate.recorder import Recorder


def add(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an addition; autograd sums two gradients in place where it alone holds the first.

    accumulate() in torch/csrc/autograd/input_buffer.cpp leaves tensor subclasses out, so that paper tensors
    would take memory for sums that take none on a GPU; so does attention.cpp where it adds a mask.
    """
    if Math.is_running and isinstance(args[0], torch.Tensor):
        return recorder.adopt(recorder.run_unrecorded(torch.ops.aten.alias.default, (args[0],), {}))
    is_sum = _in_backward_pass(recorder) and len(args) == 2 and not kwargs and _alike(*args)
    if is_sum and _held_by_autograd_alone(args[0]):
        return args[0]
    return recorder.run(func, args, kwargs)


def in_place(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run what backward formulas do in place, but for tensor subclasses (FunctionsManual.cpp, torch 2.11).

    The gradient of an indexing, for one, starts as zeros that nobody else holds, and is added to in place.
    """
    outputs = recorder.run_unrecorded(func, args, kwargs)
    # The backward formula of an indexing takes the zeros that it fills by value, and so holds them once more.
    n_formulas = 1 if func._schema.name == "aten::index_put" else 0
    is_alone = _in_backward_pass(recorder) and _held_by_autograd_alone(args[0], n_formulas)
    result = args[0] if is_alone and outputs.dtype == args[0].dtype else recorder.adopt(outputs)
    with recorder.scratch(*_scratch(func, args)):
        return result


def _scratch(func: Any, args: tuple[Any, ...]) -> tuple[int, ...]:
    if func._schema.name == "aten::index_put":
        return index_put_bytes(args)
    # A running count of what the mask chooses (IndexKernel.cu).
    return (args[1].numel() * 8,) if func._schema.name == "aten::masked_scatter" else ()


IN_PLACE = ("index_put", "scatter_add", "scatter", "index_add", "index_copy", "masked_scatter", "index_fill")


def _in_backward_pass(recorder: Recorder) -> bool:
    return recorder.phase.endswith("backward") and not torch.is_grad_enabled()


def _alike(a: Any, b: Any) -> bool:
    return (
        isinstance(a, torch.Tensor)
        and isinstance(b, torch.Tensor)
        and a.shape == b.shape
        and a.dtype == b.dtype
        and a is not b
    )


def _held_by_autograd_alone(tensor: torch.Tensor, n_formulas: int = 0) -> bool:
    """Whether nobody but autograd, and so many of its formulas, holds the tensor or its storage.

    Four uses are autograd's own, the dispatcher's, the Python object's and the argument tuple's; two of the
    storage are the tensor's and the Python object's that is made by asking.
    """
    storage = tensor.untyped_storage()
    uses: int = tensor._use_count()  # type: ignore[attr-defined] # not in the stubs
    return uses <= _USES + n_formulas and torch._C._storage_Use_Count(storage._cdata) <= _STORAGE_USES


_USES = 4
_STORAGE_USES = 2
