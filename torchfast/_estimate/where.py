"""Which module an operator belongs to: by hooks going forward, by autograd's numbers going backward."""

from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook


class Whereabouts:
    """Follows the modules that are running."""

    def __init__(self, roots: dict[str, nn.Module], root_runs: Callable[[], None]) -> None:
        self._root = id(roots[""])
        self._root_runs = root_runs
        self._names: dict[int, str] = {}
        for prefix, root in roots.items():
            for name, module in root.named_modules():
                self._names.setdefault(id(module), ".".join(part for part in (prefix, name) if part))
        self._stack: list[str] = []
        # Where autograd's sequence numbers pass from one module to another.
        self._numbers: list[int] = []
        self._owners: list[str] = []

    def module(self) -> str:
        """Return the dotted path of the running module, "" outside of any."""
        if self._stack:
            return self._stack[-1]
        node = torch._C._current_autograd_node()
        if node is None or not self._numbers:
            return ""
        # Sequence numbers are dealt out when an operator's node is made, after it has run.
        position = bisect_right(self._numbers, node._sequence_nr()) - 1
        return self._owners[position] if position >= 0 else ""

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Follow modules within this context, through PyTorch's hooks for all modules."""
        handles = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, args: Any) -> None:
        del args
        if id(module) == self._root:
            self._root_runs()
        self._stack.append(self._names.get(id(module), self._stack[-1] if self._stack else ""))
        self._mark()

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        del module, args, output
        if self._stack:
            self._stack.pop()
        self._mark()

    def _mark(self) -> None:
        self._numbers.append(torch._C._autograd._get_sequence_nr())
        self._owners.append(self._stack[-1] if self._stack else "")
