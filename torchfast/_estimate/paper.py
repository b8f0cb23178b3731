"""Paper tensors: they look as if they lay on a GPU, have shapes and lifetimes, and hold no memory.

A paper tensor is a meta tensor in C++, so nothing in PyTorch asks for a device that is not there. Its
dispatch keys are those of a backend that nobody uses here (HPU), so that kernels can be put at that backend's
autograd and autocast keys without touching any real tensor. Its Python `.device` says `cuda:0`, which is what
models, optimizers and checkpointing look at. (Fake tensors with device `cuda` were rejected: their
backward pass needs a device guard that a machine without a GPU lacks.)
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

CUDA = torch.device("cuda", 0)
META = torch.device("meta")
_BACKEND = torch.device("hpu")
BACKEND = "HPU"  # the name of the same backend in dispatch keys: "AutogradHPU", "AutocastHPU"


class _State:
    """Whether a meta kernel is running right now: then a paper tensor says what it is, a meta tensor."""

    in_kernel = False
    elsewhere: Callable[..., Any] | None = (
        None  # runs the operators of other threads while a step is on paper
    )


class PaperTensor(torch.Tensor):
    """A tensor without memory that says it is on `cuda:0`."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment] # as torch does

    # What is known of its values, on the host; see known.py.
    values: torch.Tensor | None = None  # type: ignore[assignment] # sparse tensors have a method of this name

    @classmethod
    def __torch_dispatch__(  # type: ignore[override] # torch types it as an instance method
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operator that the recorder does not see: a rule's own, or of another thread."""
        if _State.elsewhere is None:
            raise RuntimeError(
                "A tensor of an estimate was used after estimate_vram had returned. It has no numbers: "
                "something outside of the model kept it, such as a functools.lru_cache or a list that the "
                "step appends to. Clear that after the estimate."
            )
        return _State.elsewhere(func, types, args, kwargs or {})

    @property
    def device(self) -> torch.device:  # type: ignore[override]  # the whole point
        """The GPU on which the tensor is imagined."""
        return META if _State.in_kernel else CUDA

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]  # as above
        """Whether the tensor says that it is on a GPU."""
        return not _State.in_kernel

    @property
    def is_meta(self) -> bool:  # type: ignore[override]  # as above
        """Whether the tensor admits to be a meta tensor."""
        return _State.in_kernel

    def get_device(self) -> int:
        """Return the index of the GPU."""
        return 0

    def __deepcopy__(self, memo: dict[int, Any]) -> "PaperTensor":
        """Copy the tensor: weights of an average model, made within a step."""
        with torch.no_grad():
            twin = self.clone()
        twin.requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            twin._is_param = True  # what makes isinstance(_, Parameter) true
        memo[id(self)] = twin
        return twin  # type: ignore[return-value]  # clone of a paper tensor is one

    def __format__(self, spec: str) -> str:
        """Write a single value as PyTorch does for plain tensors: models look modules up by such names."""
        return format(self.item(), spec) if self.dim() == 0 else super().__format__(spec)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override] # as in torch
        """Say what is known of it."""
        del tensor_contents
        return f"PaperTensor({tuple(self.shape)}, {self.dtype})"


def wrap(meta: torch.Tensor) -> PaperTensor:
    """Return a paper tensor that shares the meta tensor's storage."""
    return torch.Tensor._make_subclass(PaperTensor, meta, False, device_for_backend_keys=_BACKEND)


def wrap_outputs(outputs: Any) -> Any:
    """Wrap the meta tensors among an operator's outputs; everything else stays."""
    if isinstance(outputs, torch.Tensor):
        return wrap(outputs) if type(outputs) is torch.Tensor and outputs.is_meta else outputs
    if isinstance(outputs, (tuple, list)):
        return type(outputs)(wrap_outputs(output) for output in outputs)
    return outputs


@contextmanager
def recorded_elsewhere(run: Callable[..., Any]) -> Iterator[None]:
    """Within, operators on paper tensors that no mode sees are run by `run`."""
    _State.elsewhere = run
    try:
        yield
    finally:
        _State.elsewhere = None


@contextmanager
def meta_kernels() -> Iterator[None]:
    """Within, operators on paper tensors run their meta kernels, and nothing is dispatched to Python."""
    before = _State.in_kernel
    with (
        torch._C._DisableTorchDispatch(),
        torch._C.DisableTorchFunction(),
        torch._C._PreserveDispatchKeyGuard(),
    ):
        torch._C._set_meta_in_tls_dispatch_include(True)
        _State.in_kernel = True
        try:
            yield
        finally:
            _State.in_kernel = before
