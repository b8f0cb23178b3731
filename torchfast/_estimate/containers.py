"""The lists, dicts and sets that the user's objects hold: found, put on paper, and put back."""

import math
import types
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from torchfast._modules import comes_from


def containers_within(
    attributes: dict[str, Any],
    /,
    *,
    deep: float = math.inf,
    most_items: float = math.inf,
    objects_deep: int = 0,
) -> Iterator[Any]:
    """Yield the containers that an object holds, which a step may write into, inner ones first.

    Of objects of the user's own among what they hold, to such a depth, the attributes are containers too.
    """
    seen = {id(attributes): deep}

    def within(container: Any, deep: float, objects_deep: int) -> Iterator[Any]:
        for item in list(container.values() if isinstance(container, dict) else container):
            is_object = objects_deep > 0 and _is_plain_object(item)
            value = vars(item) if is_object else item
            if not isinstance(value, (dict, list, set, deque)) or len(value) > most_items:
                continue
            if seen.get(id(value), 0) < deep:
                seen[id(value)] = deep
                yield from within(value, deep - 1, objects_deep - is_object)
                yield value

    return within(attributes, deep, objects_deep)


def put_on_paper(container: Any, papers: dict[int, torch.Tensor], /) -> None:
    """Replace the tensors in a list or a dict that are on paper: those to clip, or to average."""
    if isinstance(container, dict):
        container.update({key: papers[id(value)] for key, value in container.items() if id(value) in papers})
    elif isinstance(container, list):
        container[:] = [papers.get(id(item), item) for item in container]


def refill(container: Any, contents: Any, /) -> None:
    """Put back what a list, dict or set held."""
    container.clear()
    (container.extend if isinstance(container, (list, deque)) else container.update)(contents)


def _is_plain_object(value: Any) -> bool:
    """Whether a value is an instance of a class of the user's own, in whose attributes a model may write."""
    if isinstance(value, (nn.Module, torch.Tensor, type, types.ModuleType, types.FunctionType)):
        return False
    return isinstance(getattr(value, "__dict__", None), dict) and not comes_from(value, "torch")
