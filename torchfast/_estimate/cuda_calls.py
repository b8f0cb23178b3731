"""What a step may call of `torch.cuda` beside tensors, answered on paper: streams, statistics, seeds."""

import contextlib
import functools
from collections import Counter
from collections.abc import Callable
from typing import Any, Self

import torch

StandIn = tuple[Any, str, Any]
"""What is replaced for a while: an owner, the name of its attribute, and the value in its place."""


class PaperStream(torch.Stream):
    """A stream on which nothing has to be waited for."""

    cuda_stream, priority = 0, 0

    def __new__(cls, *_: Any, **__: Any) -> Self:
        """Make what PyTorch takes for a stream of the first GPU."""
        return super().__new__(cls, stream_id=0, device_index=0, device_type=_CUDA)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def query(self) -> bool:
        """Say that all work is done."""
        return True

    def is_capturing(self) -> bool:
        """Say that no graph is being captured."""
        return False

    def record_event(self, event: "PaperEvent | None" = None) -> "PaperEvent":  # type: ignore[override] # as in torch.cuda
        """Return the event."""
        return event or PaperEvent()

    def synchronize(self) -> None:
        """Wait for nothing."""

    def wait_stream(self, stream: Any) -> None:
        """Wait for nothing."""

    def wait_event(self, event: Any) -> None:
        """Wait for nothing."""


class PaperEvent:
    """An event of such a stream."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def query(self) -> bool:
        """Say that it has happened."""
        return True

    def elapsed_time(self, _: "PaperEvent") -> float:
        """Return some time that is not zero, by which a step may divide."""
        return 1.0

    def record(self, stream: Any = None) -> None:
        """Do nothing."""

    wait = synchronize = record


class PaperContext(contextlib.ContextDecorator):
    """A context in which another stream or GPU is the current one."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> None:
        """Change nothing: there is one of each."""

    def __exit__(self, *_: object) -> None:
        pass


class _AnyGenerator(type(torch.Generator)):  # type: ignore[misc] # a metaclass that is computed
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, _Generator)


class PaperGenerator(torch.Generator, metaclass=_AnyGenerator):
    """Makes a generator of the host where a GPU's is asked for: operators on paper draw no numbers."""

    def __new__(cls, device: Any = "cpu") -> torch.Generator:  # type: ignore[misc] # as said
        is_gpu = isinstance(device, int) or torch.device(device).type == "cuda"
        return _Generator("cpu" if is_gpu else device)


_Generator = torch.Generator
_CUDA = 1  # the number of CUDA among c10's types of devices


def cuda_calls(total_bytes: int) -> list[StandIn]:
    """Return stand-ins for the functions and classes of `torch.cuda` that ask for a GPU."""
    places: list[StandIn] = []

    def put(owner: Any, value: Any, *names: str) -> None:
        # A function for each place: PyTorch's compiler tells functions apart by identity.
        places.extend((owner, n, value if isinstance(value, type) else _own(value)) for n in names)

    put(torch.cuda, PaperStream, "Stream", "current_stream", "default_stream", "ExternalStream")
    put(torch.cuda, PaperEvent, "Event")
    put(torch.accelerator, PaperStream, "current_stream")
    put(torch.cuda, PaperContext, "stream", "device", "device_of", "StreamContext")
    for owner in (torch.cuda, torch.cuda.memory):
        put(owner, _zero, *_COUNTERS)
        put(owner, _nothing, *_RESETS)
        put(owner, lambda *_, **__: (total_bytes, total_bytes), "mem_get_info")
        put(owner, lambda *_, **__: Counter(), "memory_stats")
        put(owner, lambda *_, **__: {}, "memory_stats_as_nested_dict")
        put(owner, lambda *_, **__: "", "memory_summary", "list_gpu_processes")
    put(torch.cuda, _nothing, "synchronize", "_lazy_init", "init", "ipc_collect", "set_stream")
    put(torch.accelerator, _nothing, "synchronize", "set_device_index", "empty_cache")
    put(torch.cuda, lambda: False, "is_current_stream_capturing")
    put(torch.cuda.nvtx, _nothing, "range_push", "range_pop", "mark")
    put(torch.cuda.nvtx, PaperContext, "range")
    seed = torch.zeros(16, dtype=torch.uint8)
    put(torch.cuda, lambda *_, **__: seed, "get_rng_state")
    put(torch.cuda, lambda: [seed], "get_rng_state_all")
    put(torch.cuda, _nothing, "set_rng_state", "set_rng_state_all", "manual_seed", "manual_seed_all")
    put(torch.cuda, _nothing, "seed", "seed_all")
    put(torch, PaperGenerator, "Generator")
    for name, dtype in _LEGACY.items():
        put(torch.cuda, _legacy(name, dtype), name)
    return places


_COUNTERS = ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved")
_RESETS = (
    "empty_cache",
    "reset_peak_memory_stats",
    "reset_accumulated_memory_stats",
    "reset_max_memory_allocated",
    "set_per_process_memory_fraction",
)
_LEGACY = {
    "FloatTensor": torch.float32,
    "DoubleTensor": torch.float64,
    "HalfTensor": torch.float16,
    "BFloat16Tensor": torch.bfloat16,
    "LongTensor": torch.int64,
    "IntTensor": torch.int32,
    "ShortTensor": torch.int16,
    "CharTensor": torch.int8,
    "ByteTensor": torch.uint8,
    "BoolTensor": torch.bool,
}


def _own(function: Callable[..., Any]) -> Callable[..., Any]:
    return functools.partial(function)


def _zero(*_: Any, **__: Any) -> int:
    return 0


def _nothing(*_: Any, **__: Any) -> None:
    """Do nothing, as there is no GPU that it could be done to."""


def _legacy(name: str, dtype: torch.dtype) -> type:
    """Return what `torch.cuda.FloatTensor` and its like do: make a tensor of a size, or of data."""

    def make(_: type, *args: Any) -> torch.Tensor:
        if all(isinstance(arg, int) for arg in args) or isinstance(args[0], torch.Size):
            return torch.empty(*args, dtype=dtype, device="cuda")
        return torch.tensor(args[0], dtype=dtype, device="cuda")

    return type(name, (), {"__new__": make, "__module__": "torch.cuda", "dtype": dtype, "is_cuda": True})
