"""What a retry cannot be made with: said when it is made, not in the step that first needs it."""

import math
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import nn

from torchfast._modules import what, without_shape

T = TypeVar("T")


def check_function(function: object, /) -> None:
    """Refuse what cannot be called with a batch."""
    if not callable(function):
        raise TypeError(
            f"guard.chunked takes a function or a module, but was given {what(function)}. "
            "Give what is to be called with the batch."
        )


def check_pace(split: str, grow_after: object, /) -> None:
    """Refuse an unknown `split`, and a number of quiet steps that is none."""
    if split not in ("safe", "always", "never"):
        raise ValueError(
            f"split={split!r} was given to oom_guard; it says when a batch may be worked on in parts: "
            '"safe", "always" or "never".'
        )
    if not isinstance(grow_after, int) or grow_after < 1:
        raise ValueError(
            f"grow_after={grow_after!r} was given to oom_guard; it is how many steps without a failure go by "
            "before a larger size is tried, at least 1."
        )


def modules_of(model: nn.Module | Iterable[nn.Module], /) -> tuple[nn.Module, ...]:
    """Return the modules of `model=`, at least one."""
    modules = _all_of("model", model, nn.Module, "a torch.nn.Module, or several")
    if not modules:
        raise ValueError(
            "guard.retry was given no module: model= is empty, so no gradient and no buffer would be put "
            "back before a step is tried again. Give what the step trains."
        )
    for module in modules:
        lazy = without_shape(module)
        if lazy is not None:
            raise ValueError(
                f"guard.retry was given a {type(module).__name__} whose {lazy!r} has no shape yet, so there "
                "is nothing that could be put back. Run a batch through it first."
            )
    return modules


def optimizers_of(
    optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] | None, /
) -> tuple[torch.optim.Optimizer, ...]:
    """Return the optimizers of `optimizer=`."""
    given = () if optimizer is None else optimizer
    return _all_of("optimizer", given, torch.optim.Optimizer, "a torch.optim.Optimizer, several, or None")


def generators_of(generators: Iterable[torch.Generator], /) -> tuple[torch.Generator, ...]:
    """Return the generators of `generators=`."""
    return _all_of("generators", generators, torch.Generator, "torch.Generators")


def _all_of(option: str, given: Any, kind: type[T], wanted: str) -> tuple[T, ...]:
    one = isinstance(given, kind) or not isinstance(given, Iterable)
    found: tuple[Any, ...] = (given,) if one else tuple(given)
    for each in found:
        if not isinstance(each, kind):
            raise TypeError(
                f"{option}= of guard.retry takes {wanted}, but was given {what(each)}. "
                "What a retry does not know, it cannot put back."
            )
    return found


def check_options(*, scaler: Any, tokens: Any, timeout_s: float) -> None:
    """Refuse options of a retry that would fail, or do nothing, in a later step."""
    if scaler is not None and not (hasattr(scaler, "state_dict") and hasattr(scaler, "load_state_dict")):
        raise TypeError(
            "scaler= of guard.retry takes a torch.amp.GradScaler, but was given an object of type "
            f"{type(scaler).__name__}, which has no state to put back. Leave it out if there is none."
        )
    if tokens is not None and not callable(tokens):
        raise TypeError(
            "tokens= of guard.retry takes a function, but was given an object of type "
            f"{type(tokens).__name__}. Give one from a part of the batch to its number of valid tokens, or "
            "leave it out."
        )
    if not (isinstance(timeout_s, (int, float)) and 0 < timeout_s < math.inf):
        raise ValueError(
            f"timeout_s={timeout_s!r} was given to guard.retry; it is how long a rank waits for the others, "
            "a positive number of seconds."
        )
