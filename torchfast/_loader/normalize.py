"""From uint8 images to normalised floating-point ones: type, normalisation and layout in one kernel."""

import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from torchfast._layout import MAX_IMAGE_CHANNELS, is_strided


class Normalization:
    """(x - 255 * mean) / (255 * std), computed in float32 and rounded once to `dtype`.

    A uint8 has 256 values, so the formula is evaluated 256 times a channel, and the kernel looks the results
    up: bit for bit what the formula gives, one byte read and one element written for each value.
    """

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype, *, channels_last: bool
    ) -> None:
        self.mean, self.std = tuple(mean), tuple(std)
        self.n_channels = len(mean)
        self._channels_last = channels_last
        exact: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # whatever the defaults are
        means, stds = (torch.tensor(numbers, **exact)[:, None] for numbers in (mean, std))
        table = (torch.arange(256, **exact) - 255 * means) / (255 * stds)
        self._table = table.to(dtype)
        self._tables: dict[torch.device, torch.Tensor] = {}

    def applies(self, leaf: torch.Tensor, /) -> bool:
        """Say whether a leaf is uint8 images of as many channels as there are means, and no shorter sides."""
        if leaf.dtype is not torch.uint8 or not is_strided(leaf) or leaf.dim() != 4:
            return False
        return leaf.shape[1] == self.n_channels <= min(leaf.shape[2:])

    def __call__(self, images: torch.Tensor, /) -> torch.Tensor:
        """Return the normalised images, (N, C, H, W) as before, channels last if so asked."""
        layout = torch.channels_last if self._channels_last else torch.contiguous_format
        normalised = torch.empty(
            images.shape, dtype=self._table.dtype, device=images.device, memory_format=layout
        )
        table = self._table_on(images.device)
        is_unrolled = self.n_channels <= MAX_IMAGE_CHANNELS  # which takes the longer to compile the more
        if not (images.is_cuda and is_unrolled and _in_one_kernel(images, normalised, table)):
            for channel in range(self.n_channels):
                normalised[:, channel] = table[channel][images[:, channel].int()]
        return normalised

    def _table_on(self, device: torch.device) -> torch.Tensor:
        if device not in self._tables:
            self._tables[device] = self._table.to(device)
        return self._tables[device]


def _in_one_kernel(images: torch.Tensor, normalised: torch.Tensor, table: torch.Tensor) -> bool:
    """Look the values up by Triton's kernel, and say whether there is one: its wheels are Linux's alone."""
    launch = next(iter(_launches()), None)
    if launch is None:
        return False
    pixels_are_even = images.stride(2) == images.shape[3] * images.stride(3)
    try:
        launch(images if pixels_are_even else images.contiguous(), normalised, table)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        # Triton needs a C compiler, at the first launch.
        _launches().clear()
        warnings.warn(
            f"Triton could not build the kernel that normalises images ({error}). They are normalised by "
            "several kernels instead: the same values, more slowly. Installing a C compiler usually helps.",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


@cache
def _launches() -> list[Any]:
    """Return what launches the kernel: one function, or none where it is not to be had."""
    try:
        from torchfast._loader.normalize_kernel import launch
    except ImportError:
        return []
    return [launch]
