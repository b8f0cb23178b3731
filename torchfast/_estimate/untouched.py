"""Keeps what belongs to the whole process as it is while a step runs on paper: random state and flags."""

import gc
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Put the random state of PyTorch's CPU generator, Python and NumPy back afterwards."""
    python_state = random.getstate()
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy is not None else None
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(python_state)
            if numpy is not None:
                numpy.random.set_state(numpy_state)


@contextmanager
def flags_kept() -> Iterator[None]:
    """Record gradients, as a training loop does, wherever the call is made; put back what a step changes."""
    before = [(flag, value) for flag in _flags() if (value := _read(flag)) is not None]
    with torch.inference_mode(mode=False), torch.enable_grad():
        try:
            yield
        finally:
            for flag, value in before:
                if _read(flag) != value:  # older flags, even set to what they are, overwrite newer ones
                    _, put = flag
                    put(value)


Flag = tuple[Callable[[], Any], Callable[[Any], Any]]
"""How a flag is read, and how it is set."""


def _read(flag: Flag) -> Any:
    """Return a flag's value; None for an older flag that cannot be read, as a newer one has been set."""
    get, _ = flag
    try:
        return get()
    except RuntimeError:
        return None


def _flags() -> Iterator[Flag]:
    """Yield the flags of the process that training code sets."""
    yield torch.get_default_dtype, torch.set_default_dtype
    yield torch.get_float32_matmul_precision, torch.set_float32_matmul_precision
    yield torch.is_anomaly_enabled, torch.set_anomaly_enabled
    yield torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode
    for device in ("cuda", "cpu"):
        yield _of_autocast(torch.is_autocast_enabled, torch.set_autocast_enabled, device)
        yield _of_autocast(torch.get_autocast_dtype, torch.set_autocast_dtype, device)
    yield torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled
    for name in ("enabled", "benchmark", "deterministic", "allow_tf32"):
        yield _attribute(torch.backends.cudnn, name)
    backends: Any = torch.backends  # whose types are not complete
    one_by_one = backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn.matmul
    for backend in (*one_by_one, backends):
        yield _attribute(backend, "fp32_precision")
    yield _attribute(torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction")


def _of_autocast(get: Callable[[str], Any], put: Callable[[str, Any], None], device: str) -> Flag:
    return lambda: get(device), lambda value: put(device, value)


def _attribute(owner: Any, name: str) -> Flag:
    return lambda: getattr(owner, name), lambda value: setattr(owner, name, value)


@contextmanager
def collector_kept_quiet() -> Iterator[None]:
    """Keep Python's collector of cycles from freeing tensors at moments of its own choosing."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
