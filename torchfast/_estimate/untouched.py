"""Keeps what is not on paper as it is while a step runs there: random state, flags, and real tensors."""

import functools
import gc
import random
import sys
import weakref
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


class RealTensors:
    """The user's own tensors, by whatever ways a step gets at them: remembered before they change."""

    def __init__(self) -> None:
        self._generators: dict[torch.Generator, torch.Tensor] = {}
        self._written: dict[int, tuple[weakref.ref[torch.UntypedStorage], torch.UntypedStorage]] = {}

    def remember(self, schema: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Copy what an operator is about to write into, and the state of a generator that it draws from."""
        generator = kwargs.get("generator")
        if generator is not None and generator not in self._generators:
            self._generators[generator] = generator.get_state()
        for value in _written_by(schema, args, kwargs) if schema.is_mutable else ():
            if isinstance(value, torch.Tensor) and value.layout == torch.strided:
                self._copy(value.untyped_storage())

    def put_back(self) -> None:
        """Give them the numbers that they had."""
        for generator, state in self._generators.items():
            generator.set_state(state)
        self._generators = {}
        for storage, before in list(self._written.values()):
            alive = storage()
            if alive is not None:
                alive.copy_(before, non_blocking=False)
        self._written = {}

    def _copy(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        known = self._written.get(key)
        if storage.device.type != "meta" and (known is None or known[0]() is not storage):
            self._written[key] = weakref.ref(storage, functools.partial(self._forget, key)), storage.clone()

    def _forget(self, key: int, dead: "weakref.ref[torch.UntypedStorage]") -> None:
        if key in self._written and self._written[key][0] is dead:
            del self._written[key]


def _written_by(schema: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
    """Yield the arguments of an operator that it writes into, of a list each."""
    for number, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[number] if number < len(args) else kwargs.get(argument.name)
            yield from value if isinstance(value, (list, tuple)) else (value,)


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
