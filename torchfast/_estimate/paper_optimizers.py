"""Optimizers on paper, together with those that they step themselves."""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from torchfast import _tree
from torchfast._estimate.containers import containers_within, put_on_paper, refill


class PaperOptimizers:
    """Puts paper parameters into optimizers: what some of them share, they share on paper too."""

    def __init__(
        self, paper: Callable[[torch.Tensor], torch.Tensor], papers: dict[int, torch.Tensor]
    ) -> None:
        self._paper, self._papers = paper, papers
        self._swapped: dict[int, Any] = {}  # groups and states on paper, by the originals' ids
        self._originals: list[Any] = []  # keeps these ids from being used again
        self._done: set[int] = set()

    @contextmanager
    def filled(self, given: torch.optim.Optimizer) -> Iterator[None]:
        """Fill an optimizer with paper parameters, and what it steps; take everything back."""
        whole = [each for each in _with_inner(given) if id(each) not in self._done]
        self._done.update(map(id, whole))
        taken = [(held, copy.copy(held)) for each in whole for held in _held_by(each)]
        self._originals.append(taken)
        try:
            for each in whole:
                groups, state = each.param_groups, each.state
                each.param_groups = self._swap(groups, self._groups)
                each.state = self._swap(state, self._state)
                for held in containers_within(vars(each), objects_deep=OBJECTS_DEEP):
                    if isinstance(held, list):  # other lists of the same parameters, as LBFGS has one
                        put_on_paper(held, self._papers)
            yield
        finally:
            for held, before in taken:
                refill(held, before)

    def _swap(self, original: Any, make: Callable[[Any], Any]) -> Any:
        """Return what stands for an optimizer's groups or state: the same for all that share them."""
        if id(original) not in self._swapped:
            self._swapped[id(original)] = make(original)
        return self._swapped[id(original)]

    def _groups(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [self._swap(group, self._group) for group in groups]

    def _group(self, group: dict[str, Any]) -> dict[str, Any]:
        return {**group, "params": [self._paper(p) for p in group["params"]]}

    def _state(self, state: dict[Any, Any]) -> dict[Any, Any]:
        papers: dict[Any, Any] = defaultdict(dict)
        for key, values in state.items():
            paper = self._paper(key) if isinstance(key, torch.Tensor) else key
            papers[paper] = _tree.map_tensors(self._state_tensor, values)
        return papers

    def _state_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """Put a tensor of the optimizer's state on paper; step counters stay on the host."""
        return tensor.clone() if tensor.ndim == 0 and tensor.device.type == "cpu" else self._paper(tensor)


OBJECTS_DEEP = 2
"""Caches and counters that a module or an optimizer holds, and what these hold."""


def _with_inner(given: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """Return an optimizer and those that it steps itself, as SAM and Lookahead do."""
    found = [given]
    for each in found:
        for held in _held_by(each):
            values = held.values() if isinstance(held, dict) else held
            found += [v for v in values if isinstance(v, torch.optim.Optimizer) and v not in found]
    return found


def _held_by(optimizer: torch.optim.Optimizer) -> list[Any]:
    return [*containers_within(vars(optimizer), objects_deep=OBJECTS_DEEP), vars(optimizer)]
