"""A transport for tests: hands batches over as they are."""

from typing import Any

import torch

from torchfast._loader.stats import Tally


class HostTransport:
    """Moves nothing; keeps count of what it was asked to do."""

    def __init__(self) -> None:
        self.n_sent = 0
        self.n_delivered = 0
        self.n_evicted = 0
        self.sending_fails_at: int | None = None
        self.n_fences = 0
        self.delivery_fails_once = False
        self.delivery_is_interrupted_once = False
        self.delivery_breaks_once = False

    def begin(self, tally: Tally) -> None:
        """Begin a pass."""

    def follow(self) -> None:
        """Nothing to follow."""

    def blank(self) -> None:
        """Nothing to allocate."""

    def enter_thread(self) -> None:
        """Nothing to set."""

    def settle(self) -> None:
        """Nothing to wait for."""

    def send(self, batch: Any, blank: object) -> Any:
        """Send a batch, or fail."""
        assert blank is None
        if self.n_sent == self.sending_fails_at:
            self.n_sent += 1
            raise ConnectionError("the transfer failed")
        self.n_sent += 1
        return [batch]

    def deliver(self, parcel: Any) -> Any:
        """Hand the batch over, or run out of memory."""
        if self.delivery_fails_once:
            self.delivery_fails_once = False
            raise torch.OutOfMemoryError
        if self.delivery_is_interrupted_once:
            self.delivery_is_interrupted_once = False
            raise KeyboardInterrupt
        if self.delivery_breaks_once:
            self.delivery_breaks_once = False
            raise ConnectionError("cannot be moved")
        self.n_delivered += 1
        return parcel[0]

    def evict(self, parcel: Any) -> None:
        """Count."""
        assert parcel
        self.n_evicted += 1

    def fence(self) -> None:
        """Count."""
        self.n_fences += 1
