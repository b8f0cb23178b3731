"""What a loader sees, in the thread that loads, of the thread that began the pass: modes are a thread's own.

Context variables come with the thread's context. Modes of a user's own (`TorchFunctionMode`,
`TorchDispatchMode`) and profilers stay behind.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch

AUTOCAST_DEVICES = ("cuda", "cpu")


class Modes:
    """The calling thread's gradient, inference and autocast modes, and its default device."""

    def __init__(self) -> None:
        self._grad = torch.is_grad_enabled()
        self._inference = torch.is_inference_mode_enabled()
        self._autocast = [
            (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
            for device in AUTOCAST_DEVICES
        ]
        self._device = torch.get_default_device()
        self._is_plain = not self._inference and self._device.type == "cpu"

    def enter_thread(self) -> None:
        """Take over, for the rest of this thread, what does not concern the transfer."""
        torch.set_grad_enabled(self._grad)
        # The cache of weights that autocast keeps belongs to all threads, and only leaving it would empty it.
        torch.set_autocast_cache_enabled(False)
        for device, is_enabled, dtype in self._autocast:
            torch.set_autocast_enabled(device, is_enabled)
            torch.set_autocast_dtype(device, dtype)

    def around(self) -> AbstractContextManager[Any]:
        """Take over the rest, for as long as the loader works."""
        return nullcontext() if self._is_plain else self._around()

    @contextmanager
    def _around(self) -> Iterator[None]:
        with ExitStack() as stack:
            if self._inference:
                stack.enter_context(torch.inference_mode())
            if self._device.type != "cpu":
                stack.enter_context(self._device)
            yield


def outside_inference_mode() -> AbstractContextManager[Any]:
    """Leave that mode for a while: tensors made in it could never be saved for a backward."""
    return torch.inference_mode(mode=False) if torch.is_inference_mode_enabled() else nullcontext()
