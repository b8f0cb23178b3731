"""What a teacher cannot be, or cannot be made with."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from os import PathLike

import torch
from torch import nn

from torchfast._device import resolve_device
from torchfast._modules import comes_from, quantised_for_cpu, unwrapped, what, without_shape
from torchfast._teacher.plan import PARTS


def bare(teacher: object) -> nn.Module:
    """Return the module without wrappers that make no sense for a teacher."""
    if not isinstance(teacher, nn.Module):
        hint = (
            "To load one from a file, use GPUTeacher.from_checkpoint(factory, path)."
            if isinstance(teacher, (str, PathLike, Mapping))
            else "Give an instance of the module that computes the targets."
        )
        raise TypeError(f"GPUTeacher takes a torch.nn.Module, but was given {what(teacher)}. {hint}")
    return unwrapped(teacher)


def _name(thing: object) -> str:
    return thing.__name__ if isinstance(thing, type) else type(thing).__name__


def checked_place(
    dtype: torch.dtype | None, chunk_size: int | None, device: torch.device | str | int | None
) -> torch.device:
    """Return the device; refuse types, numbers of samples and devices that no teacher can have."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise (ValueError if isinstance(dtype, torch.dtype) else TypeError)(
            f"dtype={dtype!r} was asked for, but a teacher computes in floating point. "
            "Choose torch.bfloat16, torch.float16 or torch.float32, or leave dtype=None to keep the module's."
        )
    if chunk_size is not None and not (hasattr(chunk_size, "__index__") and chunk_size >= 1):
        raise (ValueError if hasattr(chunk_size, "__index__") else TypeError)(
            f"chunk_size={chunk_size!r} was asked for, but at least one sample has to run at a time. "
            "Give a positive number, or None for no limit."
        )
    place = resolve_device(device)
    if place.type == "meta":
        raise ValueError(
            "device='meta' was asked for, where tensors have no values: a teacher could not compute targets. "
            "Choose a device with memory, or None for the current one."
        )
    return place


def parts_of(plan: str | Collection[str]) -> set[str]:
    """Return the parts that a plan may have."""
    if isinstance(plan, str):
        parts = {"eager": set(), "auto": set(PARTS)}.get(plan)
    else:
        named = list(plan) if isinstance(plan, Collection) else [plan]
        parts = set(named) if all(part in PARTS for part in named) else None
    if parts is None:
        raise (ValueError if isinstance(plan, Collection) else TypeError)(
            f"plan={plan!r} was asked for, which is no way to run a teacher. "
            f'Choose "eager", "auto", or some of {", ".join(map(repr, PARTS))}, as in plan=("fold", "graph").'
        )
    return parts


def names_of(features: Sequence[str], /, *, outputs: bool) -> list[str]:
    """Return the names that `features=` gives."""
    names = list(features) if isinstance(features, Iterable) and not isinstance(features, str) else [features]
    if not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"features={features!r} was asked for, which are no names. Name modules inside the teacher as "
            'named_modules() does, as in features=("layer3",).'
        )
    if not names and not outputs:
        raise ValueError(
            "outputs=False was asked for without features=, so the teacher would return nothing. "
            'Name modules inside it, as in features=("layer3",), or leave outputs=True.'
        )
    return names


def paths_of(path: str | PathLike[str] | Iterable[str | PathLike[str]], /) -> list[str | PathLike[str]]:
    """Return the files that a path, or several, name."""
    paths = list(path) if isinstance(path, Iterable) and not isinstance(path, str) else [path]
    if not all(isinstance(each, (str, PathLike)) for each in paths):
        raise TypeError(
            f"GPUTeacher.from_checkpoint takes the path of a file, or of several, but was given {path!r}. "
            "Give a .safetensors file, or one that torch.save wrote."
        )
    if not paths:
        raise ValueError(
            "GPUTeacher.from_checkpoint was given no file: its list of paths is empty. "
            "Give the files that together hold the weights."
        )
    return paths


def check_factory(factory: object, /) -> None:
    """Refuse what builds no module."""
    if isinstance(factory, nn.Module) or not callable(factory):
        raise TypeError(
            "GPUTeacher.from_checkpoint takes a function that builds the module, but was given "
            f"{what(factory)}. Give it a way to build one without memory: lambda: {_name(factory)}(...)."
        )


def check_built(module: object, /) -> None:
    """Refuse what a factory built, if it is no module whose weights can be loaded."""
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"the factory given to GPUTeacher.from_checkpoint returned {what(module)}, not a "
            "torch.nn.Module. It has to build and return the teacher's module."
        )
    _check_shapes_are_known(module)


def check_has_values(module: nn.Module) -> None:
    """Refuse modules whose weights are not there as plain tensors."""
    _check_shapes_are_known(module)
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_meta:
            raise ValueError(
                f"{name!r} of the teacher lies on the meta device and has no values. "
                "Load them with GPUTeacher.from_checkpoint(factory, path)."
            )


def _check_shapes_are_known(module: nn.Module) -> None:
    if isinstance(module, torch.jit.ScriptModule):
        raise TypeError(
            "the teacher is a TorchScript module, whose weights cannot be placed one by one. "
            "Give the Python module that it was made from."
        )
    packed = quantised_for_cpu(module)
    if packed is not None:
        raise ValueError(
            f"{packed!r} of the teacher is quantised for the CPU: its weights are "
            "packed and no parameters, so they cannot be placed on a device or read from a file. "
            "Give the module as it was before, with dtype=torch.bfloat16 to save memory."
        )
    if next(module.parameters(), None) is None:
        raise ValueError(
            f"the teacher, {type(module).__name__}, has no parameters, so it has learnt nothing to teach. "
            "Give the trained module itself; what needs no weights can be called as it is."
        )
    shapeless = without_shape(module)
    if shapeless is not None:
        raise ValueError(
            f"{shapeless!r} of the teacher has no shape yet: it takes it from the first batch. "
            "Run one batch through the module, then make it a teacher."
        )
    for name, parameter in module.named_parameters():
        if comes_from(parameter, "torch.distributed.tensor"):
            raise ValueError(
                f"{name!r} of the teacher is a DTensor, spread over several processes, and a teacher is "
                "whole on each device. "
                "Make it before fully_shard, or load it with GPUTeacher.from_checkpoint."
            )
