"""Close to the limit the allocator flushes its cache again and again: slow long before it fails."""

import warnings

import torch

_N_STEPS = 2


class Thrash:
    """Watches how often the allocator had to give its whole cache back to satisfy a request."""

    def __init__(self) -> None:
        self._n_flushes: int | None = None
        self._n_steps = 0
        self._has_warned = False

    def has_risen(self, n_flushes: int, device: torch.device, /) -> bool:
        """Tell, once a step, whether the count has risen in two steps running; warn the first time."""
        before, self._n_flushes = self._n_flushes, n_flushes
        self._n_steps = self._n_steps + 1 if before is not None and n_flushes > before else 0
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
