"""What a step, or a loss, of the user's own gets at: modules, optimizers and what else it holds."""

import copy
import functools
import types
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn

from torchfast._estimate.containers import containers_within, put_on_paper, refill
from torchfast._estimate.paper import PaperTensor
from torchfast._estimate.step import teacher_module
from torchfast._modules import comes_from

T = TypeVar("T")
_MOST_ITEMS = 1000
_DEPTH = 4


@dataclass(slots=True)
class Reached:
    """What was found, modules and optimizers by the names under which the user's code knows them."""

    modules: dict[str, nn.Module] = field(default_factory=dict)
    optimizers: dict[str, torch.optim.Optimizer] = field(default_factory=dict)
    scalers: list[torch.amp.GradScaler] = field(default_factory=list)
    objects: list[Any] = field(default_factory=list)  # attributes of what a step may count in, and its lists
    containers: list[Any] = field(default_factory=list)  # lists, dicts and sets that a step may write into


def reached_by(*callables: Any) -> Reached:
    """Follow variables of functions, attributes of objects and items of containers, a few levels deep.

    What a function in another module uses, and what is looked up by a computed name, is not found.
    """
    found = Reached()
    seen: set[int] = set()
    for each in callables:
        _follow(each, "", found, seen, _DEPTH)
    return found


def _follow(value: Any, name: str, found: Reached, seen: set[int], depth: int) -> None:
    if depth < 0 or id(value) in seen or isinstance(value, _PLAIN):
        return
    seen.add(id(value))
    teacher = teacher_module(value) if callable(value) else None
    if teacher is not None:
        _add(found.modules, name, teacher)
    elif isinstance(value, torch.optim.Optimizer):
        _add(found.optimizers, name, value)
    elif isinstance(value, torch.amp.GradScaler):
        found.scalers.append(value)
    else:
        for inner_name, inner in _inside(value, found):
            _follow(inner, inner_name or name, found, seen, depth - 1)


def _add(found: dict[str, T], name: str, value: T) -> None:
    """Add what was found; two functions may know different things by one name."""
    name = free = name or type(value).__name__
    number = 1
    while found.get(free, value) is not value:
        number += 1
        free = f"{name} ({number})"
    found[free] = value


@contextmanager
def kept(found: Reached, papers: dict[int, torch.Tensor]) -> Iterator[None]:
    """Take back what a step counts in its own objects, and every container that it put a paper tensor into.

    Gradient scalers are as new meanwhile: where there is no GPU, the user's own is switched off.
    """
    scalers = [vars(scaler) for scaler in found.scalers]
    before = [(held, copy.copy(held)) for held in (*scalers, *found.objects, *found.containers)]
    for attributes in scalers:
        attributes.update(vars(torch.amp.GradScaler("cuda")))
    for held in (*found.objects, *found.containers):
        put_on_paper(held, papers)
    try:
        yield
    finally:
        always = {id(held) for held in (*scalers, *found.objects)}
        for held, contents in before:
            if id(held) in always or _has_paper(held):
                refill(held, contents)


def _has_paper(value: Any, depth: int = _DEPTH) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    if depth and isinstance(value, (list, tuple, set, deque)):
        return any(_has_paper(item, depth - 1) for item in value)
    return isinstance(value, PaperTensor)


_PLAIN = (type(None), str, bytes, int, float, complex, type, types.ModuleType, torch.Tensor, torch.dtype)


def _inside(value: Any, found: Reached) -> Iterable[tuple[str, Any]]:
    """Return what is held by something that is neither a module nor an optimizer."""
    if isinstance(value, functools.partial):
        return [("", value.func), *(("", arg) for arg in value.args), *value.keywords.items()]
    if isinstance(value, types.MethodType):
        return [("", value.__func__), ("", value.__self__)]
    if isinstance(value, types.FunctionType):
        return [*_variables(value, value.__code__), *(("", each) for each in value.__defaults__ or ())]
    if isinstance(value, (dict, list, tuple, set, deque)):
        return _items(value, found)
    is_pytorchs = comes_from(value, "torch") and not comes_from(value, "torch.optim")  # a scheduler counts
    if is_pytorchs or not hasattr(value, "__dict__"):
        return ()
    found.objects += [vars(value), *containers_within(vars(value), deep=_DEPTH, most_items=_MOST_ITEMS)]
    return [*vars(value).items(), ("", vars(type(value)).get("__call__"))]


def _items(container: Any, found: Reached) -> Iterable[tuple[str, Any]]:
    if not isinstance(container, tuple):
        found.containers.append(container)
    items = container.items() if isinstance(container, dict) else (("", item) for item in container)
    return [(str(key), item) for key, item in items] if len(container) <= _MOST_ITEMS else ()


def _variables(function: types.FunctionType, code: types.CodeType) -> Iterator[tuple[str, Any]]:
    """Yield the variables that a function, or a function within it, takes from outside."""
    if f"{function.__module__}.".startswith(("torch.", "torchfast.")):
        return
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    for each in (code, *(constant for constant in code.co_consts if isinstance(constant, types.CodeType))):
        for name in each.co_names:
            if name in function.__globals__:
                yield name, function.__globals__[name]
