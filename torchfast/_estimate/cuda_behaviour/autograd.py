"""What autograd does with plain tensors and not with tensor subclasses."""

from typing import Any

import torch

from torchfast._estimate.cuda_behaviour.indexing import index_put_bytes
from torchfast._estimate.recorder import Recorder


def add(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an addition; autograd sums two gradients in place where it alone holds the first.

    accumulate() in torch/csrc/autograd/input_buffer.cpp leaves tensor subclasses out, so that paper tensors
    would take memory for sums that take none on a GPU.
    """
    is_sum = _in_backward_pass(recorder) and len(args) == 2 and not kwargs and _alike(*args)
    if is_sum and _held_by_autograd_alone(args[0]):
        return args[0]
    return recorder.run(func, args, kwargs)


def in_place(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run what backward formulas do in place, but for tensor subclasses (FunctionsManual.cpp, torch 2.11).

    The gradient of an indexing, for one, starts as zeros that nobody else holds, and is added to in place.
    """
    outputs = recorder.run_unrecorded(func, args, kwargs)
    if func._schema.name == "aten::index_put":
        with recorder.scratch(*index_put_bytes(args)):
            pass
    if _in_backward_pass(recorder) and _held_by_autograd_alone(args[0]) and outputs.dtype == args[0].dtype:
        return args[0]
    return recorder.adopt(outputs)


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


def _held_by_autograd_alone(tensor: torch.Tensor) -> bool:
    """Whether nobody else holds the tensor or its storage.

    Four uses are autograd's own, the dispatcher's, the Python object's and the argument tuple's; two of the
    storage are the tensor's and the Python object's that is made by asking.
    """
    storage = tensor.untyped_storage()
    uses: int = tensor._use_count()  # type: ignore[attr-defined] # not in the stubs
    return uses <= _USES and torch._C._storage_Use_Count(storage._cdata) <= _STORAGE_USES


_USES = 4
_STORAGE_USES = 2
