"""How many samples at a time: strictly decreasing while it fails, growing again when it is quiet."""


class Sizes:
    """The largest part of a batch that is worked on at once, remembered from step to step.

    `limit` is None until something has failed. Each failure at `n` sets it to half of `n`, rounded up. After
    `grow_after` steps without a failure it doubles; if the larger size then fails at once, it takes twice as
    many quiet steps until the next trial, so that a size that never fits is tried ever less often.
    """

    def __init__(self, grow_after: int) -> None:
        self.limit: int | None = None
        self.is_trial = False
        self._grow_after = self._patience = grow_after
        self._n_quiet = 0
        self._largest = 0

    def of(self, n_samples: int) -> int:
        """Return the size of a part for a batch of `n_samples`."""
        self._largest = max(self._largest, n_samples)
        return n_samples if self.limit is None else min(self.limit, n_samples)

    def shrink(self, size: int) -> bool:
        """Go down from parts of `size`; return whether there is a smaller size."""
        self._patience = 2 * self._patience if self.is_trial else self._grow_after
        self._n_quiet, self.is_trial = 0, False
        if size <= 1:
            return False
        self.limit = (size + 1) // 2
        return True

    def worked(self) -> None:
        """Note that a step got through."""
        if self.is_trial:
            self.is_trial = False
            self.limit = None if self.limit is None or self.limit >= self._largest else self.limit
        if self.limit is None:
            return
        self._n_quiet += 1
        if self._n_quiet >= self._patience:
            self._n_quiet, self.is_trial = 0, True
            self.limit *= 2
