"""A module's weights, read from a file one tensor at a time: never the whole checkpoint, never twice."""

import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from os import PathLike, fspath
from typing import Any, NamedTuple, cast
from zipfile import is_zipfile

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils.weak import WeakTensorKeyDictionary

from torchfast._teacher.placing import Placing, assembled, tensors_of, told_what_it_needs

Path = str | PathLike[str]


class Stored(NamedTuple):
    """A tensor in a file."""

    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]


def built_without_memory(factory: Callable[[], nn.Module], /) -> nn.Module:
    """Return the module that the factory builds, with its parameters on `meta`.

    Each parameter goes to `meta` as it is registered, so that the factory may use real tensors on its way,
    and what is no parameter is computed for real: position tables and other buffers that no file holds.
    (Under `torch.device("meta")` these would be empty, and a constructor that calls `.item()` would fail.)
    The caller's random numbers go on as if nothing had been built.
    """
    thread = threading.get_ident()
    # Weak: a parameter that is registered twice stays one, and is not kept.
    known = WeakTensorKeyDictionary()

    def to_meta(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if threading.get_ident() != thread or type(parameter) is not nn.Parameter or parameter.is_meta:
            return None
        if parameter not in known:
            known[parameter] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        return cast(nn.Parameter, known[parameter])

    hook = register_module_parameter_registration_hook(
        to_meta  # type: ignore[arg-type]  # declared without the parameter that it may return
    )
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            return factory()
    finally:
        hook.remove()


def loaded(module: nn.Module, paths: Sequence[Path], placing: Placing, /) -> nn.Module:
    """Return a frozen copy of a module without memory, with its values from files.

    Names and shapes are compared before the first value is read. Peaks at the copy plus one tensor on the
    device, and one tensor on the host.
    """
    with opened(paths) as stored:
        sources = _matched(module, stored)
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if tensor.is_meta and id(tensor) not in sources:
                raise ValueError(
                    f"{name!r} is not in the checkpoint, and the factory gave it no values: it lies on the "
                    "meta device. Have the factory compute it from numbers instead of from parameters."
                )
        placed: dict[int, torch.Tensor] = {}
        with torch.no_grad(), told_what_it_needs(module, placing):
            for tensor in tensors_of(module):
                source = sources.get(id(tensor))
                placed[id(tensor)] = placing.place(tensor, tensor if source is None else source.read())
    return assembled(module, placed)


@contextmanager
def opened(paths: Sequence[Path], /) -> Iterator[dict[str, Stored]]:
    """Give the tensors of one or several files by name; each is read when asked for, from mapped memory."""
    with ExitStack() as files:
        stored: dict[str, Stored] = {}
        for path in paths:
            stored |= _safetensors(path, files) if fspath(path).endswith(".safetensors") else _pickled(path)
        yield stored


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Have what cannot be read named in the error: readers speak of stacks, headers and pickles."""
    try:
        yield
    except (OSError, MemoryError):  # not the file's fault, or the file is named
        raise
    except Exception as error:
        stranger = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        if stranger is not None:
            raise TypeError(
                f"{fspath(path)!r} holds an object of {stranger[1]}, and to read one is to run code of "
                "the file. Save the state dict alone: torch.save(module.state_dict(), path)."
            ) from error
        reason = str(error).partition("\n")[0].rstrip(".")
        raise ValueError(
            f"{fspath(path)!r} could not be read as a checkpoint: {type(error).__name__}: {reason}. "
            "Give a whole .safetensors file, or a state dict that torch.save wrote; "
            "one that is broken or empty has to be copied or saved again."
        ) from error


def _safetensors(path: Path, files: ExitStack) -> dict[str, Stored]:
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise ImportError(
            f"reading {fspath(path)!r} needs the safetensors package, which is not installed. "
            "Install it with: pip install safetensors"
        ) from error
    with _named(path):
        file = files.enter_context(safe_open(path, framework="pt", device="cpu"))
        return {
            name: Stored(tuple(file.get_slice(name).get_shape()), partial(file.get_tensor, name))
            for name in file.keys()  # noqa: SIM118 -- not a mapping: it has no __iter__
        }


def _pickled(path: Path) -> dict[str, Stored]:
    # Files of before PyTorch 1.6 are no zip archives and cannot be mapped: they are read whole.
    with _named(path):
        found: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    if not isinstance(found, Mapping):
        raise TypeError(
            f"{fspath(path)!r} holds {type(found).__name__}, not a state dict: tensors by name. "
            "Save the teacher with torch.save(teacher.state_dict(), path)."
        )
    strangers = [str(name) for name, value in found.items() if not isinstance(value, torch.Tensor)]
    if strangers:
        raise TypeError(
            f"{fspath(path)!r} holds more than tensors by name: {_some(strangers)}. "
            "Save the state dict alone: torch.save(checkpoint[<its key>], path)."
        )
    return {str(name): Stored(tuple(t.shape), partial(_itself, t)) for name, t in found.items()}


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _matched(module: nn.Module, stored: Mapping[str, Stored]) -> dict[int, Stored]:
    """Return what the file holds for each tensor of the module, by its id; refuse a file that does not fit.

    A tensor with several names (tied weights) needs one of them. When the file has more, the last one counts,
    as in `load_state_dict`.
    """
    expected = {n: t for n, t in module.state_dict(keep_vars=True).items() if isinstance(t, torch.Tensor)}
    sources = {id(tensor): stored[name] for name, tensor in expected.items() if name in stored}
    missing = [name for name, tensor in expected.items() if id(tensor) not in sources and not _counts(name)]
    unexpected = [name for name in stored if name not in expected]
    shapes = [
        f"{name} {stored[name].shape} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in stored and stored[name].shape != tuple(tensor.shape)
    ]
    found = {"lacks": missing, "has besides": unexpected, "has in another shape": shapes}
    complaints = "; ".join(f"{what} {_some(names)}" for what, names in found.items() if names)
    if complaints:
        raise ValueError(
            f"the checkpoint does not fit the module that the factory built: it {complaints}."
            f"{_prefix(expected, stored)} Nothing was loaded."
        )
    return sources


def _counts(name: str) -> bool:
    """Say whether a name is a batch norm's step counter, which old files lack and eval mode never reads."""
    return name.endswith("num_batches_tracked")


def _prefix(expected: Mapping[str, object], stored: Mapping[str, object]) -> str:
    """Return a hint when the file's names are the module's with something before them."""
    for name in expected:
        for other in stored:
            prefix = other.removesuffix(name)
            if other == prefix + name and prefix and all(each.startswith(prefix) for each in stored):
                return (
                    f" All its names begin with {prefix!r}: it was saved from a wrapper. "
                    "Save the wrapped module's own state dict."
                )
        break
    return ""


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
