"""Memory formats: what is an image, what feeds a convolution, and how a tensor is laid out again.

`channels_last` keeps the channels of one pixel side by side in memory; the shape stays (N, C, H, W).
"""

from collections.abc import Iterator

import torch
from torch.nn.modules.conv import _ConvNd

MAX_IMAGE_CHANNELS = 16
"""More channels than that are features, not an image: RGB has 3, satellites about 13, latents 4 to 16."""

_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def is_image(tensor: torch.Tensor, /, *, rank_5: bool = False) -> bool:
    """Say whether a tensor of a batch looks like images, (N, C, H, W).

    The rule: floating point or uint8, rank 4 (with `rank_5=True` also volumes, (N, C, D, H, W)), between 1
    and 16 channels, and no side shorter than the number of channels. The last part tells (N, C, H, W) from
    (N, H, W, C), and a volume from a clip (N, T, C, H, W). Sparse, nested and expanded tensors do not count:
    laying them out again is impossible, or multiplies their memory.

    Example:
        >>> import torch
        >>> from torchfast._layout import is_image
        >>> is_image(torch.zeros(8, 3, 32, 32)), is_image(torch.zeros(8, 32, 32, 3))
        (True, False)
    """
    if not is_strided(tensor) or tensor.dim() not in ((4, 5) if rank_5 else (4,)):
        return False
    if not (tensor.is_floating_point() or tensor.dtype == torch.uint8):
        return False
    channels, *sides = tensor.shape[1:]
    return 1 <= channels <= min(MAX_IMAGE_CHANNELS, *sides) and not is_expanded(tensor)


def is_strided(tensor: torch.Tensor, /) -> bool:
    """Say whether the tensor has a shape and strides; a nested one says it is strided, and has neither."""
    return tensor.layout is torch.strided and not tensor.is_nested


def is_expanded(tensor: torch.Tensor, /) -> bool:
    """Say whether elements of the tensor share memory, as after `expand`."""
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def channels_last_format(rank: int, /) -> torch.memory_format | None:
    """Return the channels-last format for tensors of that rank, or None where there is none."""
    return _FORMATS.get(rank)


def to_channels_last_tensor(tensor: torch.Tensor, /) -> torch.Tensor:
    """Return the tensor laid out channels last; the tensor itself where it is, or where its rank has no such.

    Always by `.to`: `.contiguous` leaves the strides alone where C == 1 or H == W == 1, and then kernels,
    fused optimizers and DDP buckets disagree about the layout.
    """
    memory_format = channels_last_format(tensor.dim())
    return tensor if memory_format is None else tensor.to(memory_format=memory_format)


def laid_out_like(tensor: torch.Tensor, model: torch.Tensor, /) -> torch.Tensor:
    """Return the tensor's values with the strides of `model`, which has its shape; itself if it has them."""
    if tensor.stride() == model.stride():
        return tensor
    return torch.empty_like(model, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def convolutions(model: torch.nn.Module, /) -> Iterator[tuple[str, _ConvNd]]:
    """Go through the 2-d and 3-d convolutions of a model, transposed and lazy ones included, by name.

    What a module hands to `torch.nn.functional.conv2d` by itself cannot be seen from outside.
    """
    for name, module in model.named_modules():
        if isinstance(module, _ConvNd) and len(module.kernel_size) in (2, 3):
            yield name, module


def stored_weight(convolution: _ConvNd, /) -> torch.nn.Parameter | None:
    """Return the parameter that is the convolution's weight, or None where the weight is computed.

    Weight norm, spectral norm, pruning and other parametrizations compute it anew in each forward.
    """
    return convolution._parameters.get("weight")
