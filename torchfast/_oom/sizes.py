"""How many samples at a time: strictly decreasing while it fails, growing again when it is quiet."""


class Sizes:
    """The largest part of a batch that is worked on at once, remembered from step to step.

    `limit` is None until something has failed. Each failure at `n` sets it to half of `n`, rounded up. After
    `grow_after` steps at the limit without a failure it doubles; if the larger size then fails, it takes
    twice as many quiet steps until the next trial, so that a size that never fits is tried ever less often.
    A batch of fewer samples than the limit says nothing about it.
    """

    def __init__(self, grow_after: int) -> None:
        self.limit: int | None = None
        self._grow_after = self._patience = grow_after
        self._n_quiet = 0
        self._largest = 0
        self._grown_from: int | None = None
        self._is_trial = False

    def of(self, n_samples: int) -> int:
        """Return the size of a part for a batch of `n_samples`."""
        self._largest = max(self._largest, n_samples)
        return n_samples if self.limit is None else min(self.limit, n_samples)

    def is_trial(self, size: int) -> bool:
        """Say whether parts of `size` are larger than what is known to fit."""
        return self._is_trial and self._has_grown_to(size)

    def shrink(self, size: int) -> bool:
        """Go down from parts of `size` to half; return whether there is a smaller size."""
        return self._go_down(size, (size + 1) // 2)

    def add_a_part(self, n_samples: int) -> bool:
        """Cut batches of `n_samples` into one part more; return whether there is a smaller size."""
        size = self.of(n_samples)
        n_parts = -(-n_samples // size)
        return self._go_down(size, min(-(-n_samples // (n_parts + 1)), size - 1))

    def worked(self, size: int) -> None:
        """Note that a step with parts of `size` got through."""
        if self.limit is None or size < min(self.limit, self._largest):
            return
        self._is_trial = False
        if self.limit >= self._largest:
            self.limit = None
            return
        self._n_quiet += 1
        if self._n_quiet >= self._patience:
            self._n_quiet, self._is_trial = 0, True
            self._grown_from, self.limit = self.limit, 2 * self.limit

    def _go_down(self, size: int, smaller: int) -> bool:
        self._patience = 2 * self._patience if self._has_grown_to(size) else self._grow_after
        self._n_quiet, self._grown_from, self._is_trial = 0, None, False
        if size <= 1:
            return False
        self.limit = smaller
        return True

    def _has_grown_to(self, size: int) -> bool:
        return self._grown_from is not None and size > self._grown_from
