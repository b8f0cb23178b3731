"""What a DeviceLoader refuses, each with what was found and what to give: before anything is changed."""

import operator
import sys
from collections.abc import Iterable, Mapping
from inspect import isfunction
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset

from torchfast._loader import wrapped
from torchfast._loader.normalize import Normalization


def check(loader: object, transform: object) -> None:
    """Refuse what is no loader, or no transform."""
    if isinstance(loader, type):
        raise TypeError(
            f"DeviceLoader wraps an iterable of batches, and was given the class {loader.__name__}. Make one "
            f"first: DeviceLoader({loader.__name__}(...))."
        )
    if not (hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")):
        if isfunction(loader):
            raise TypeError(
                f"DeviceLoader wraps an iterable of batches, and was given the function {loader.__name__}. "
                f"If it yields batches, call it: DeviceLoader({loader.__name__}()). What it returns then "
                "serves one epoch."
            )
        raise TypeError(
            f"DeviceLoader wraps an iterable of batches, such as a DataLoader; {type(loader).__name__} "
            "cannot be iterated over. For a dataset, use DeviceLoader.from_dataset(dataset, batch_size=...)."
        )
    for kind, yielded in _yielding_no_batches():
        if isinstance(loader, kind):
            raise TypeError(
                f"DeviceLoader wraps an iterable of batches, and {type(loader).__name__} would yield its "
                f"{yielded} one by one. Give a DataLoader, or a list or generator of batches."
            )
    if isinstance(loader, Dataset) and not hasattr(loader, "__iter__"):
        raise TypeError(
            f"DeviceLoader wraps an iterable of batches, and {type(loader).__name__} is a dataset, of "
            "samples: each would be yielded by itself, without end if it raises no IndexError. Use "
            "DeviceLoader.from_dataset(dataset, batch_size=...), or DataLoader(dataset, batch_size=None) if "
            "its items are batches."
        )
    if transform is not None and not callable(transform):
        raise TypeError(
            f"transform={transform!r} cannot be called. Give a function that takes a batch, on the device, "
            "and returns what is to be yielded in its place."
        )


def _yielding_no_batches() -> list[tuple[Any, str]]:
    numpy = sys.modules.get("numpy")
    arrays = (torch.Tensor,) if numpy is None else (torch.Tensor, numpy.ndarray)
    return [
        ((str, bytes), "characters"),
        (Mapping, "keys"),
        (arrays, "rows"),
        (torch.nn.Module, "parts"),
    ]


def check_switches(**switches: object) -> None:
    """Refuse what is neither on nor off: a word such as "no" would count as on."""
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise TypeError(
                f"{name}={value!r} is neither True nor False, and would count as one of them. Give True or "
                "False."
            )


def depth_of(depth: Any) -> int:
    """Return a depth as an `int`; refuse what is none."""
    n_batches = _whole(depth)
    if n_batches is None or n_batches < 1:
        raise ValueError(
            f"depth={depth!r} must be a whole number of at least 1: how many batches are brought to the "
            "device ahead of use. 2 hides most jitter; each one more costs the device memory of a batch."
        )
    return n_batches


def _whole(number: Any) -> int | None:
    """Return a whole number, of any type, as an `int`; None for what is none, True and False included."""
    try:
        return None if isinstance(number, bool) else operator.index(number)
    except TypeError:
        return None


def streams_of(streams: Any) -> tuple[torch.cuda.Stream, ...]:
    """Return CUDA streams; refuse all else."""
    found = tuple(streams) if isinstance(streams, Iterable) else (None,)
    if not all(isinstance(stream, torch.cuda.Stream) for stream in found):
        raise TypeError(
            f"streams={streams!r}: give a list of the torch.cuda.Stream objects, other than the one that the "
            "loop runs on, on which batches are used."
        )
    return found


def check_dataset(dataset: object, num_workers: Any) -> None:
    """Refuse what no `DataLoader` can be built for."""
    if num_workers is not None and _whole(num_workers) is None:
        raise TypeError(
            f"num_workers={num_workers!r}: the number of worker processes, a whole number; 0 loads in the "
            "process itself, and None chooses."
        )
    if isinstance(dataset, type):
        raise TypeError(
            f"from_dataset takes a dataset, and was given the class {dataset.__name__}. Make one first: "
            f"from_dataset({dataset.__name__}(...), ...)."
        )
    if not (isinstance(dataset, IterableDataset) or hasattr(dataset, "__getitem__")):
        raise TypeError(
            "from_dataset takes samples by their index, or an IterableDataset of them; "
            f"{type(dataset).__name__} is neither. An iterable of batches goes to DeviceLoader(batches) as "
            "it is; one of samples becomes a dataset as a subclass of torch.utils.data.IterableDataset."
        )


def check_across_epochs(loader: object, *, across_epochs: bool) -> None:
    """Refuse to load ahead what wants to know the number of its epoch."""
    part = wrapped.takes_epochs(loader) if across_epochs else None
    if part is not None:
        raise ValueError(
            f"across_epochs=True, but {type(part).__name__} has a set_epoch: the next epoch would be loaded "
            "before it is told its number, and repeat the order of this one. Leave across_epochs off."
        )


def normalization_of(
    normalize: Any, image_dtype: torch.dtype, *, channels_last: bool
) -> Normalization | None:
    """Return what was asked for, None if nothing was; refuse numbers and types that cannot be."""
    if normalize is None:
        if image_dtype is not torch.float32:
            raise ValueError(
                f"image_dtype={image_dtype} without normalize=: it is the type of the images that normalize= "
                "makes, and would change nothing. Give normalize=(mean, std), or convert in transform=."
            )
        return None
    try:
        mean, std = ([float(number) for number in numbers] for numbers in normalize)
        fits = len(mean) == len(std) > 0 and image_dtype.is_floating_point
        fits = fits and all(abs(number) <= 1 for number in mean) and all(0 < number <= 1 for number in std)
    except (AttributeError, TypeError, ValueError):
        fits = False
    if not fits:
        raise ValueError(
            f"normalize={normalize!r} with image_dtype={image_dtype!r}: give (mean, std), as many numbers in "
            "each as images have channels, for images in [0, 1] (so those for 0 to 255 divided by 255): each "
            "mean from -1 to 1, each std above 0 and at most 1, and a floating-point dtype, as in "
            "normalize=((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), image_dtype=torch.bfloat16."
        )
    return Normalization(mean, std, image_dtype, channels_last=channels_last)
