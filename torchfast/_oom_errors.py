"""Is this exception an out-of-memory error, and which?

`classify` looks at an exception, what it was raised from and what it groups, and returns a record or None.
What it knows is the table `_RULES`; the first rule that fits decides. A text counts only on the types that
PyTorch and its libraries raise, and only where it stands as a statement: neither a `ValueError` that speaks
of memory nor a hint on "how to avoid CUDA out of memory errors" is one.
"""

import dataclasses
import errno
import re
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import torch

from torchfast._bytes import GIB, KIB, MIB, TIB

Kind = Literal[
    "device",  # the device's memory, through PyTorch's allocator
    "library",  # the device's memory, outside PyTorch's allocator: cuBLAS, cuDNN, Triton, the driver
    "pinned",  # page-locked host memory
    "host",  # ordinary host memory
    "shared_memory",  # /dev/shm, through which DataLoader workers hand over batches
    "communicator",  # NCCL: the process group cannot be used any more
    "address_space",  # virtual addresses, not memory
    "too_large",  # one tensor is larger than the backend can index or allocate at once
    "impossible",  # a size that no machine has: a bug in a shape
]
Confidence = Literal["certain", "likely"]


@dataclasses.dataclass(frozen=True, slots=True)
class OutOfMemoryRecord:
    """What an out-of-memory error says; None where it does not say it.

    `allocated_bytes` and `reserved_bytes` are this process's, in PyTorch's allocator. `allowed_bytes` is the
    limit set with `set_per_process_memory_fraction`. `retryable` tells whether the same work may succeed
    after cleaning up or with a smaller batch.
    """

    kind: Kind
    retryable: bool
    confidence: Confidence
    text: str
    device: torch.device | None = None
    requested_bytes: int | None = None
    free_bytes: int | None = None
    total_bytes: int | None = None
    allocated_bytes: int | None = None
    reserved_bytes: int | None = None
    private_pool_bytes: int | None = None
    allowed_bytes: int | None = None
    other_processes_bytes: int | None = None


def is_memory_short(device: torch.device | None = None, /) -> bool:
    """Tell whether less than 5 % of what this process may have of the device is free; False if unknown."""
    if not torch.cuda.is_initialized():
        return False
    from torchfast._memory import room_on

    room = room_on(torch.device("cuda", torch.cuda.current_device()) if device is None else device)
    return room is not None and room.untaken_bytes < room.limit_bytes / 20


def classify(
    error: BaseException, /, *, memory_is_short: Callable[[], bool] = is_memory_short, handled_id: int = 0
) -> OutOfMemoryRecord | None:
    """Return what is known of an out-of-memory error, or None for any other exception.

    Causes and the members of exception groups count; the implicit context counts only under a `RuntimeError`
    (a `KeyError` raised while handling an out-of-memory error is a new bug). Some texts mean one thing on a
    full device and another on an empty one: for these `memory_is_short` is asked. The exception with the id
    `handled_id` was being handled before: being raised in its context means nothing.

    Example:
        >>> from torchfast._oom_errors import classify
        >>> record = classify(RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."))
        >>> record.kind, record.requested_bytes == 2 * 2**30, record.retryable
        ('device', True, True)
        >>> classify(ValueError("CUDA out of memory.")) is None
        True
    """
    for found, is_sure in _related(error, handled_id):
        record = _classify_one(found, memory_is_short)
        if record is not None:
            return record if is_sure else dataclasses.replace(record, confidence="likely")
    return None


class _Rule(NamedTuple):
    pattern: str
    kind: Kind | None  # None: never an out-of-memory error
    retryable: bool = True
    on_empty: Kind | Literal["same"] | None = "same"  # what it is on a device with memory left


# A statement begins a line or follows "SomeError: ", as in "torch.OutOfMemoryError: CUDA out of memory."
_START = r"(?:^|: |\] )"
_RULES = (
    # Fatal for the context, or another resource altogether.
    _Rule(r"out of resource: shared memory", None),
    _Rule(r"device-side assert triggered|illegal memory access|unspecified launch failure", None),
    # NCCL first: its text quotes CUDA's.
    _Rule(r"(?is)nccl.*(?:out of memory|Failed to CUDA (?:c|m)alloc)", "communicator", retryable=False),
    _Rule(r"Failed to CUDA (?:c|m)alloc", "communicator", retryable=False),
    _Rule(r"ncclInternalError", "communicator", retryable=False, on_empty=None),
    # PyTorch's caching allocators.
    _Rule(r"Tried to allocate more than 1EB memory", "impossible", retryable=False),
    _Rule(r"expandable-segment reserve|virtual-address-space \(VSZ\)", "address_space", retryable=False),
    _Rule(r"MPS backend out of memory", "device"),
    _Rule(rf"(?m){_START}\w+ out of memory\. (?:Tried to allocate|Allocation was preemptively)", "device"),
    _Rule(rf"(?m){_START}(?:CUDA|HIP|XPU|MPS|SUPA|NPU|MUSA) out of memory\.?(?: |$)", "device"),
    _Rule(r"Allocation on device \d* ?would exceed allowed memory", "device"),
    # The allocator failed while it was writing its report (MIG slices, Jetson), or while it mapped memory.
    _Rule(r"NVML_SUCCESS == \w+ INTERNAL ASSERT FAILED at .*CachingAllocator", "device"),
    _Rule(r"handles_\.at\(i\) INTERNAL ASSERT FAILED at .*CachingAllocator", "device"),
    # The runtime and the driver. On a device with room, it was page-locked memory that ran out.
    _Rule(rf"(?m){_START}(?:CUDA|HIP) error: out of memory", "device", on_empty="pinned"),
    _Rule(r"(?:CUDA|HIP) driver error: out of memory", "library"),
    _Rule(r"CUDA driver error: device not ready", "library", on_empty=None),
    _Rule(r"cuda runtime error ?\(2\) ?: out of memory", "device"),
    _Rule(r"CUDA ran out of memory outside PyTorch's allocator", "library"),
    _Rule(r"cuDNN SDPA execution failed.*err 2\b", "library"),
    _Rule(r"Triton Error \[\w+\]: out of memory", "library"),
    # Libraries with handles and workspaces of their own.
    _Rule(r"(?:CU|HIP)BLAS_STATUS_ALLOC_FAILED", "library"),
    _Rule(r"(?:CU|HIP)BLAS_STATUS_NOT_INITIALIZED", "library", on_empty=None),
    _Rule(r"CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED", "host"),
    _Rule(r"CUDNN_STATUS_(?:INTERNAL_ERROR_DEVICE_ALLOCATION|ALLOC)_FAILED", "library"),
    _Rule(r"CUDNN_STATUS_NOT_SUPPORTED\. This error may appear if you passed", "library", on_empty=None),
    _Rule(r"CUDNN_STATUS_INTERNAL_ERROR\b", "library", on_empty=None),
    _Rule(r"unable to find an engine", "library", on_empty=None),
    _Rule(r"(?:CU|HIP|ROC)FFT_ALLOC_FAILED", "library"),
    _Rule(r"(?:CU|HIP)(?:SOLVER|SPARSE)_STATUS_ALLOC_FAILED", "library"),
    _Rule(r"(?:CU|HIP)SPARSE_STATUS_INSUFFICIENT_RESOURCES", "library"),
    _Rule(r"(?:CU|HIP)RAND_STATUS_ALLOCATION_FAILED", "library"),
    # The host.
    _Rule(r"DefaultCPUAllocator: (?:can't allocate|not enough) memory", "host"),
    _Rule(r"unable to allocate shared memory ?\(shm\)", "shared_memory", retryable=False),
    _Rule(r"workers are out of shared memory", "shared_memory", retryable=False),
    # Limits on a single tensor: a smaller batch helps, more memory would not.
    _Rule(rf"(?m){_START}Invalid buffer size: ", "too_large"),
    _Rule(r"is not supported for tensors with more than INT_MAX elements", "too_large"),
)


def _related(error: BaseException, handled_id: int) -> Iterator[tuple[BaseException, bool]]:
    """Yield the error, what it groups and what it came from, and whether the relation was meant."""
    waiting: list[tuple[BaseException | None, bool]] = [(error, True)]
    seen: set[int] = set()
    while waiting:
        current, is_sure = waiting.pop(0)
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        yield current, is_sure
        if isinstance(current, BaseExceptionGroup):
            waiting += [(member, is_sure) for member in current.exceptions]
        waiting.append((current.__cause__, is_sure))
        is_context_meant = not current.__suppress_context__ and id(current.__context__) != handled_id
        if isinstance(current, RuntimeError) and is_context_meant:
            waiting.append((current.__context__, False))


def _classify_one(error: BaseException, memory_is_short: Callable[[], bool]) -> OutOfMemoryRecord | None:
    text = str(error)
    if isinstance(error, RuntimeError):
        rule = next((rule for rule in _RULES if re.search(rule.pattern, text)), None)
        if rule is not None:
            return _by_rule(rule, text, memory_is_short)
        if _says_so(error):
            return _record("device", text)
    if isinstance(error, MemoryError):
        # RMM and CuPy speak of the device through a MemoryError.
        return _record("device" if re.search(r"(?i)cuda|rmm|cupy", text) else "host", text)
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return _record("host", text)
    return None


def _says_so(error: RuntimeError) -> bool:
    """Say whether the type is enough: PyTorch's own, or cudaErrorMemoryAllocation."""
    if isinstance(error, torch.AcceleratorError):
        return getattr(error, "error_code", None) == 2
    return isinstance(error, torch.OutOfMemoryError) and not isinstance(error, MemoryError)


def _by_rule(rule: _Rule, text: str, memory_is_short: Callable[[], bool]) -> OutOfMemoryRecord | None:
    if rule.kind is None or rule.on_empty == "same":
        return None if rule.kind is None else _record(rule.kind, text, retryable=rule.retryable)
    if memory_is_short():
        return _record(rule.kind, text, retryable=rule.retryable, confidence="likely")
    if rule.on_empty == "pinned" and not torch.cuda.is_initialized():
        return _record(rule.kind, text, retryable=rule.retryable)  # nothing is known of the device
    return None if rule.on_empty is None else _record(rule.on_empty, text, confidence="likely")


# --- what the texts say ---------------------------------------------------------------------------------

_SIZE = r"(\d+(?:\.\d+)?) ?(bytes|[KMGTPE]i?B)"
# MPS writes "GB" for 2**30 bytes, and so did PyTorch everywhere before 1.0.
_UNITS = {"b": 1, "K": KIB, "M": MIB, "G": GIB, "T": TIB, "P": 2**50, "E": 2**60}


# Where each number stands, in the words of the allocators: CUDA's of today, CUDA's before 2.1,
# cudaMallocAsync's, MPS's, and NumPy's.
_REQUESTED = (
    rf"(?i)tried to allocate {_SIZE}",
    rf"Requested(?: size)? *: *{_SIZE}",
    rf"Unable to allocate {_SIZE}",
    rf"Invalid buffer size: {_SIZE}",
    rf"alloc {_SIZE}",
)
_FREE = (rf"{_SIZE} is free", rf"{_SIZE} free;", rf"Free \(according to CUDA\) *: *{_SIZE}")
_TOTAL = (rf"total capaci?ty of {_SIZE}", rf"{_SIZE} total capacity", rf"Device limit *: *{_SIZE}")
_ALLOCATED = (
    rf"{_SIZE} is allocated by PyTorch",
    rf"{_SIZE} already allocated",
    rf"Currently allocated *: *{_SIZE}",
    rf"MPS allocated: {_SIZE}",
)
_ALLOWED = (rf"{_SIZE} allowed", rf"PyTorch limit[^:]*: *{_SIZE}", rf"max allowed: {_SIZE}")
_NO_LIMIT_BYTES = 2**50  # "no limit" is printed as 16 EiB


def _record(
    kind: Kind, text: str, *, retryable: bool = True, confidence: Confidence = "certain"
) -> OutOfMemoryRecord:
    allocated = _size(text, *_ALLOCATED)
    unallocated = _size(text, rf"{_SIZE} is reserved by PyTorch but unallocated")
    reserved = _size(text, rf"{_SIZE} (?:reserved in total|cached)")
    if reserved is None and allocated is not None and unallocated is not None:
        reserved = allocated + unallocated
    allowed = _size(text, *_ALLOWED)
    return OutOfMemoryRecord(
        kind=kind,
        retryable=retryable,
        confidence=confidence,
        text=text,
        device=_device(kind, text),
        requested_bytes=_size(text, *_REQUESTED),
        free_bytes=_size(text, *_FREE),
        total_bytes=_size(text, *_TOTAL),
        allocated_bytes=allocated,
        reserved_bytes=reserved,
        private_pool_bytes=_size(text, rf"{_SIZE} allocated in private pools"),
        allowed_bytes=allowed if allowed is None or allowed < _NO_LIMIT_BYTES else None,
        other_processes_bytes=_other_processes(text, reserved),
    )


def _size(text: str, *patterns: str) -> int | None:
    for pattern in patterns:
        match = re.search(pattern, text)
        if match:
            return int(float(match[1]) * _UNITS[match[2][0]])
    return None


def _other_processes(text: str, reserved: int | None) -> int | None:
    sizes = [
        int(float(number) * _UNITS[unit[0]])
        for number, unit in re.findall(rf"Process \d+ has {_SIZE} memory in use", text)
    ]
    if "this process has" in text:
        return sum(sizes)
    if not sizes:
        return None
    # In a container this process is listed under a number that it does not know: it is the smallest one that
    # can hold what PyTorch has reserved.
    own = min((size for size in sizes if size >= (reserved or 0)), default=0)
    return sum(sizes) - own


def _device(kind: Kind, text: str) -> torch.device | None:
    if kind in ("host", "shared_memory", "pinned"):
        return torch.device("cpu")
    if "MPS" in text:
        return torch.device("mps")
    match = re.search(r"(?:GPU|[Dd]evice) (\d+)", text)
    if match is None:
        return None
    return torch.device("xpu" if re.search(r"\bXPU\b", text) else "cuda", int(match[1]))
