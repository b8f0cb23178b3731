"""Stand-ins for the parts of PyTorch that look for a GPU, in place while a step runs on paper.

Everything here is scoped: what is replaced is put back, also after an error.
"""

import importlib
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from torchfast._estimate.cuda_calls import StandIn, cuda_calls
from torchfast._estimate.flex import flex_attention
from torchfast._estimate.gpus import GPU
from torchfast._estimate.paper import CUDA, META, PaperTensor


class OnPaper(TorchFunctionMode):
    """Sends what is created on or moved to a GPU to paper instead, before PyTorch initialises CUDA for it."""

    def __torch_function__(self, func: Any, types_: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Rewrite devices among the arguments of one function."""
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        if handler is not None:
            return handler(self, func, args, kwargs)
        device = kwargs.get("device")
        if device is not None and _is_gpu(device):
            kwargs = {**kwargs, "device": META}
        return func(*args, **kwargs)


def _is_gpu(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, int) and not isinstance(device, bool)


def _move(_: OnPaper, func: Any, args: Any, kwargs: Any) -> Any:
    """Handle `tensor.to`: the device may be the first argument or a keyword."""
    if len(args) > 1 and not isinstance(args[1], torch.dtype) and _is_gpu(args[1]):
        args = (args[0], META, *args[2:])
    if kwargs.get("device") is not None and _is_gpu(kwargs["device"]):
        kwargs = {**kwargs, "device": META}
    return func(*args, **kwargs)


def _cuda(_: OnPaper, func: Any, args: Any, kwargs: Any) -> Any:
    """Handle `tensor.cuda()`."""
    del func, kwargs
    return args[0].to(META)


def _from_data(_: OnPaper, func: Any, args: Any, kwargs: Any) -> Any:
    """Handle `torch.tensor` and its like: made on the host, then moved, as they would be on a GPU."""
    device = kwargs.get("device")
    if device is None or not _is_gpu(device):
        return func(*args, **kwargs)
    return func(*args, **{**kwargs, "device": None}).to(META)


def _new_tensor(mode: OnPaper, func: Any, args: Any, kwargs: Any) -> Any:
    """Handle `tensor.new_tensor(data)`: on paper it would ask for the backend that paper borrows."""
    tensor, data = args
    if not isinstance(tensor, PaperTensor):
        return func(*args, **kwargs)
    made = {"dtype": tensor.dtype, "device": tensor.device} | kwargs
    return _from_data(mode, torch.tensor, (data,), made)


def _on_host(_: OnPaper, func: Any, args: Any, kwargs: Any) -> Any:
    """Handle reading a tensor's values as a whole: `tolist`, `numpy`."""
    tensor, *rest = args
    return func(tensor.cpu() if isinstance(tensor, PaperTensor) else tensor, *rest, **kwargs)


def _type(_: OnPaper, func: Any, args: Any, kwargs: Any) -> Any:
    """Handle `tensor.type()`, which names a type and its device, and converts to one that is named."""
    tensor, *rest = args
    wanted = rest[0] if rest else kwargs.get("dtype")
    if wanted is None and isinstance(tensor, PaperTensor):
        return func(tensor).replace("torch.meta.", "torch.cuda.")
    if wanted is None or isinstance(wanted, torch.dtype):
        return func(*args, **kwargs)
    name = wanted if isinstance(wanted, str) else f"{wanted.__module__}.{wanted.__name__}"
    dtype = getattr(torch, name.rpartition(".")[2]).dtype
    return tensor.to(META if ".cuda." in name else tensor.device, dtype)


def _same(_: OnPaper, func: Any, args: Any, kwargs: Any) -> Any:
    """Handle what has no meaning on paper and gives back the tensor."""
    return args[0] if isinstance(args[0], PaperTensor) else func(*args, **kwargs)


_HANDLERS: dict[Any, Callable[[OnPaper, Any, Any, Any], Any]] = {
    **dict.fromkeys((torch.tensor, torch.as_tensor, torch.asarray), _from_data),
    torch.Tensor.to: _move,
    torch.Tensor.cuda: _cuda,
    torch.Tensor.new_tensor: _new_tensor,
    torch.Tensor.tolist: _on_host,
    torch.Tensor.numpy: _on_host,
    torch.Tensor.type: _type,
    torch.Tensor.pin_memory: _same,
    torch.Tensor.record_stream: lambda *_: None,
}


@contextmanager
def watched_backward(mode: OnPaper, begins: Callable[[], None], ends: Callable[[], None]) -> Iterator[None]:
    """Tell of each backward pass, and run it with the mode on: checkpointing runs the model again in it."""
    autograd: Any = torch.autograd
    run = autograd._engine_run_backward

    def run_watched(*args: Any, **kwargs: Any) -> Any:
        with mode:
            begins()
            try:
                return run(*args, **kwargs)
            finally:
                ends()

    autograd._engine_run_backward = run_watched
    try:
        yield
    finally:
        autograd._engine_run_backward = run


@contextmanager
def imagined_gpu(gpu: GPU) -> Iterator[None]:
    """Make PyTorch's Python side believe that this GPU is there."""
    with ExitStack() as undo:
        for owner, attribute, value in (
            *_a_gpu(gpu),
            *cuda_calls(gpu.total_bytes),
            *_paper_as_cuda(),
            *_no_handing_over(),
            *_without_wrappers(),
            *flex_attention(),
            (torch, "compile", _uncompiled),
        ):
            if hasattr(owner, attribute):
                undo.callback(setattr, owner, attribute, getattr(owner, attribute))
                setattr(owner, attribute, value)
        undo.callback(_forget_stand_ins, _filled_tables())
        undo.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def _a_gpu(gpu: GPU) -> list[StandIn]:
    """Return what PyTorch asks about GPUs, answered for this one."""
    capability, name = gpu.capability, gpu.name
    properties = types.SimpleNamespace(
        name=name,
        major=capability[0],
        minor=capability[1],
        total_memory=gpu.total_bytes,
        multi_processor_count=gpu.n_multiprocessors,
    )
    return [
        (torch.cuda, "is_available", lambda *_: True),
        (torch.cuda, "is_bf16_supported", _has_bfloat16(capability)),
        (torch.cuda, "device_count", lambda: 1),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "set_device", lambda *_, **__: None),
        (torch.cuda, "get_device_capability", lambda *_, **__: capability),
        (torch.cuda, "get_device_name", lambda *_, **__: name),
        (torch.cuda, "get_device_properties", lambda *_, **__: properties),
        (torch.accelerator, "is_available", lambda: True),
        (torch.accelerator, "current_accelerator", lambda *_, **__: torch.device(CUDA.type)),
        (torch.accelerator, "device_count", lambda: 1),
        (torch.accelerator, "current_device_index", lambda: 0),
    ]


def _has_bfloat16(capability: tuple[int, int]) -> Callable[..., bool]:
    """Return what answers as PyTorch does, to whom every GPU has bfloat16: older ones emulate it."""

    def is_bf16_supported(including_emulation: bool = True) -> bool:  # noqa: FBT001, FBT002 -- as in torch
        return including_emulation or capability >= (8, 0)

    return is_bf16_supported


def _paper_as_cuda() -> list[StandIn]:
    """Return what has PyTorch treat paper tensors as it treats those on a GPU."""
    foreach = importlib.import_module("torch.utils._foreach_utils")
    optimizers = importlib.import_module("torch.optim.optimizer")  # torch.optim hides its submodule
    scalers = importlib.import_module("torch.amp.grad_scaler")
    grouping = "_group_tensors_by_device_and_dtype"
    return [
        (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        (scalers, "amp_definitely_not_available", lambda: False),
        (torch.backends.cudnn, "is_acceptable", lambda *_: False),  # flattening is recorder.merge's
        (torch._C, grouping, _grouped(getattr(torch._C, grouping))),
        (foreach, "_foreach_supported_types", [*foreach._foreach_supported_types, PaperTensor]),
        (optimizers, "_foreach_supported_types", [*optimizers._foreach_supported_types, PaperTensor]),
    ]


def _no_handing_over() -> list[StandIn]:
    """Return what keeps PyTorch's functions in Python from handing a call to the function mode as a whole.

    What they create inside would be out of the mode's reach.
    """
    modules = ("torch.nn.functional", "torch.functional", "torch._tensor", "torch.nn.init")
    checks = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
    return [(sys.modules[module], check, _never) for module in modules for check in checks]


def _filled_tables() -> dict[str, Any]:
    """Return the tables of PyTorch's compiler, by name, that know functions of `torch.cuda` by identity."""
    rules = vars(sys.modules.get("torch._dynamo.trace_rules", sys))
    return {
        name: table
        for name, table in rules.items()
        if hasattr(table, "cache_info") and table.cache_info().currsize
    }


def _forget_stand_ins(before: dict[str, Any]) -> None:
    """Empty the tables that were filled while stand-ins were in place; they are filled again when asked."""
    for name in _filled_tables().keys() - before.keys():
        _filled_tables()[name].cache_clear()


def _uncompiled(model: Any = None, **_: Any) -> Any:
    """Stand for `torch.compile`, called on a function or as a decorator with options."""
    return (lambda function: function) if model is None else model


def _without_wrappers() -> list[StandIn]:
    """Return what runs the module inside of a wrapper: its own work, and its state, belong to other GPUs."""

    def run_inside(wrapper: Any, *args: Any, **kwargs: Any) -> Any:
        return wrapper.module(*args, **kwargs)

    def run_uncompiled(compiled: Any, *args: Any, **kwargs: Any) -> Any:
        return compiled._orig_mod(*args, **kwargs)

    wrappers = (torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel)
    compiled = importlib.import_module("torch._dynamo.eval_frame").OptimizedModule
    return [
        *((wrapper, "forward", run_inside) for wrapper in wrappers),
        (compiled, "__call__", run_uncompiled),
    ]


def _never(*_: Any) -> bool:
    return False


def _grouped(real: Callable[..., Any]) -> Callable[..., Any]:
    def grouped(*args: Any, **kwargs: Any) -> Any:
        return {
            (CUDA if device == META else device, dtype): group
            for (device, dtype), group in real(*args, **kwargs).items()
        }

    return grouped
