"""Host memory as Python's own buffers: tensors on them are made without giving up the GIL.

A thread beside a loop that launches kernels gets it back late, and PyTorch's own ways to the bytes of any
tensor give it up five times.
"""

import ctypes

import torch

_WRITABLE = 0x200  # PyBUF_WRITE: PyTorch warns of memory that is not

_make_view = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)(
    ("PyMemoryView_FromMemory", ctypes.pythonapi)
)


def memory_at(address: int, n_bytes: int, /) -> memoryview:
    """Return a view of memory, which does not hold it: whoever has the view sees to that."""
    view: memoryview = _make_view(address, n_bytes, _WRITABLE)
    return view


def memory_of(tensor: torch.Tensor, /) -> memoryview:
    """Return a view of the memory of a dense host tensor, which does not hold it."""
    return memory_at(tensor.data_ptr(), tensor.nbytes)


def bytes_on(memory: memoryview, start_bytes: int, n_bytes: int, /) -> torch.Tensor:
    """Return a tensor on some bytes of a view, which it holds."""
    return torch.frombuffer(memory, dtype=torch.uint8, count=n_bytes, offset=start_bytes)
