"""Close to the limit the allocator flushes its cache again and again: slow long before it fails."""

import warnings

import torch

from torchfast._memory import allocator_stats

_N_STEPS = 2


class Thrash:
    """Watches how often the allocator had to give its whole cache back to satisfy a request."""

    def __init__(self) -> None:
        self._n_retries: int | None = None
        self._n_steps = 0
        self._has_warned = False

    def has_risen(self, device: torch.device, /) -> bool:
        """Tell, once a step, whether the count has risen in two steps running; warn the first time."""
        stats = allocator_stats(device)
        if stats is None:
            return False
        before, self._n_retries = self._n_retries, stats.n_alloc_retries
        self._n_steps = self._n_steps + 1 if before is not None and stats.n_alloc_retries > before else 0
        if self._n_steps < _N_STEPS:
            return False
        self._n_steps = 0
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"{device} is so full that PyTorch gave its whole cache back and asked for memory anew in "
                f"{_N_STEPS} steps running, which is slow. A batch smaller by a tenth would run faster.",
                stacklevel=4,
            )
        return True
