"""Whether an optimizer's step will find the memory it needs: asked before it changes anything."""

from typing import Any

import torch

from torchfast._bytes import MIB
from torchfast._memory import AllocatorStats, allocator_stats, peak_scope, room_on


class StepProbe:
    """Finds out whether an optimizer's step will find the memory it needs, before it changes anything.

    A foreach optimizer changes moments before its allocating operator, so a failure inside it cannot be
    undone. What a step needs is measured at its first success; before that it is taken to be two tensors of
    state and one of scratch for each parameter. Where free memory is twice that, nothing is tried.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._need_bytes: int | None = None
        self._n_states = 0  # as long as there are as many, the step needs what was measured
        self._device: torch.device | None = None
        self._scope: Any = None
        self.seen: AllocatorStats | None = None
        """What the allocator said last."""

    def check(self) -> None:
        """Allocate what the step will need and let it go again, unless there is plenty."""
        if len(self._optimizer.state) != self._n_states:
            self._need_bytes = None
        need = self._need_bytes
        if need is not None and self._device is not None and self._has_room(self._device, need):
            return
        parameters = [p for g in self._optimizer.param_groups for p in g["params"] if p.grad is not None]
        self._device = next((p.device for p in parameters if p.is_cuda), None)
        if self._device is None:
            return
        all_bytes = sum(p.nbytes for p in parameters)
        n_new = sum(p not in self._optimizer.state for p in parameters)
        if need is None:
            need = all_bytes + 2 * all_bytes * n_new // len(parameters)
        if self._has_room(self._device, need):
            return
        # In the sizes of the parameters, as the step will ask for them: one large block might not be found
        # where many small ones are.
        n_each = max(1, round(need / all_bytes))
        scratch = [torch.empty_like(p) for _ in range(n_each) for p in parameters]
        scratch.clear()

    def before(self, *_args: Any) -> None:
        """Find out whether the step will fit; measure what it needs, if that is not known."""
        self.check()
        self.stop()
        if self._device is not None and self._need_bytes is None:
            self._n_states = len(self._optimizer.state)
            self._scope = peak_scope(self._device)
            self._scope.__enter__()

    def after(self, *_: Any) -> None:
        """Note what the step needed, unless it made its state."""
        scope = self._scope
        self.stop()
        if scope is None or scope.peak_allocated_bytes is None:
            return
        if len(self._optimizer.state) == self._n_states:
            self._need_bytes = scope.peak_allocated_bytes - scope.start.allocated_bytes

    def stop(self) -> None:
        """Stop measuring."""
        if self._scope is not None:
            self._scope.__exit__(None, None, None)
            self._scope = None

    def _has_room(self, device: torch.device, need_bytes: int) -> bool:
        stats = self.seen = allocator_stats(device)
        wanted_bytes = 2 * need_bytes + 64 * MIB
        if (
            stats is None or stats.cached_bytes > wanted_bytes
        ):  # as a rule: what the backward pass has let go of
            return True
        room = room_on(device)
        return room is None or room.untaken_bytes + stats.cached_bytes > wanted_bytes
