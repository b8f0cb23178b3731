"""What is asked of CUDA past PyTorch's public interface, each with a way without it.

`cuMemcpyBatchAsync`, public in the driver since CUDA 12.8, enqueues many copies in one call, which holds no
GIL: 64 copies of 256 KiB in 58 us, where PyTorch takes 311 for them one by one; and they reach the speed of
the link, 54 GB/s instead of 36.
"""

import ctypes
import functools
from array import array
from collections.abc import Sequence

import torch


class _Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _Attributes(ctypes.Structure):
    """CUmemcpyAttributes."""

    _fields_ = (
        ("source_access_order", ctypes.c_int),
        ("source_hint", _Location),
        ("target_hint", _Location),
        ("flags", ctypes.c_uint),
    )


_IN_STREAM_ORDER = 1  # CU_MEMCPY_SRC_ACCESS_ORDER_STREAM: sources are read when the stream gets there


class BatchedCopy:
    """Enqueues many copies in one call."""

    def __init__(self, function: "ctypes._NamedFuncPointer", *, tells_failure: bool) -> None:
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        fail_index = [pointer] if tells_failure else []  # the first version of the call has one argument more
        function.argtypes = [pointer, pointer, pointer, size, pointer, pointer, size, *fail_index, pointer]
        function.restype = ctypes.c_int
        self._function = function
        self._attributes = _Attributes(_IN_STREAM_ORDER)
        self._first = (ctypes.c_size_t * 1)(0)
        self._fail_index = (ctypes.c_size_t * 1)(0)
        self._more = (ctypes.addressof(self._fail_index),) if tells_failure else ()

    def __call__(
        self, targets: Sequence[int], sources: Sequence[int], sizes_bytes: Sequence[int], stream: int
    ) -> bool:
        """Enqueue copies between addresses on a stream, in any order; say whether the driver took them."""
        if 0 in sources:  # a tensor without memory: PyTorch knows what that is
            return False
        numbers = array("Q", [*sources, *targets, *sizes_bytes])  # the three lists, one behind the other
        first, _ = numbers.buffer_info()
        list_bytes = numbers.itemsize * len(sources)
        error: int = self._function(
            first + list_bytes,
            first,
            first + 2 * list_bytes,
            len(sources),
            ctypes.addressof(self._attributes),
            ctypes.addressof(self._first),
            1,
            *self._more,
            stream,
        )
        return error == 0


@functools.cache
def batched_copy() -> BatchedCopy | None:
    """Return the call of this machine's driver, or None where it has none."""
    if torch.version.hip is not None:
        return None
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    for name in ("cuMemcpyBatchAsync_v2", "cuMemcpyBatchAsync"):
        if hasattr(driver, name):
            return BatchedCopy(getattr(driver, name), tells_failure=not name.endswith("_v2"))
    return None


def current_raw_stream(device: torch.device) -> int:
    """Return the address of the calling thread's current stream; 0 is the default stream.

    Private: the public way makes an object of it, which takes ten times as long in each `next`.
    """
    raw = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    if raw is None:
        return torch.cuda.current_stream(device).cuda_stream
    address: int = raw(device.index)
    return address
