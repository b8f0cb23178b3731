"""What autograd does with plain tensors and not with tensor subclasses."""

from typing import Any

import torch

from torchfast._estimate.recorder import Recorder


def add(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an addition; autograd sums two gradients in place where it alone holds one of them.

    accumulate() in torch/csrc/autograd/input_buffer.cpp leaves tensor subclasses out, so that paper tensors
    would take memory for sums that take none on a GPU.
    """
    if _in_backward_pass(recorder) and len(args) == 2 and not kwargs and _alike(*args):
        for tensor in args:
            if _held_by_autograd_alone(tensor):
                return tensor
    return recorder.run(func, args, kwargs)


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
