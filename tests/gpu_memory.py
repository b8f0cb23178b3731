"""Memory of a real GPU, for tests that count it or take most of it away."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def empty_gpu() -> None:
    """Give back all that nobody holds, also what cuBLAS keeps between products.

    Its workspaces lie in whatever block was cached when a test first multiplied, and would keep all of that.
    """
    gc.collect()
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()


@contextmanager
def limited_gpu(limit_bytes: int) -> Iterator[torch.device]:
    """Give the first GPU, empty, of which this process may use so many bytes."""
    device = torch.device("cuda", 0)
    empty_gpu()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(limit_bytes / total, device)
    try:
        yield device
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
        empty_gpu()
