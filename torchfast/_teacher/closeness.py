"""When two outputs of the same teacher count as the same."""

from collections.abc import Callable
from typing import Any

import torch

from torchfast._tree import tensors

Forward = Callable[[Any], Any]

# How far an output may move when another kernel computes it (for another batch size, or with a batch norm
# folded into its convolution), as a part of the largest output. Another result would move by far more.
# float32 convolutions round to TF32 on a GPU unless told otherwise: VGG-11 was seen to move by 0.4 %.
TOLERANCES = {torch.float16: 0.03, torch.bfloat16: 0.03, torch.float32: 0.01, torch.float64: 1e-6}


def versions(inputs: Any, /) -> tuple[int, ...]:
    """Return what changes when a tensor of these inputs is changed in place."""
    return tuple(tensor._version for tensor in tensors(inputs))


def differs(expected: Any, found: Any, /) -> str | None:
    """Say how the found outputs differ from the expected ones beyond rounding; None if they do not."""
    for ours, theirs in zip(tensors(expected), tensors(found), strict=True):
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            return f"{tuple(theirs.shape)} {theirs.dtype} instead of {tuple(ours.shape)} {ours.dtype}"
        if not ours.is_floating_point() or not ours.numel():
            continue
        scale = ours.abs().max().float()
        moved = float((theirs - ours).abs().max().float() / scale.clamp(min=1e-30))
        if not moved <= TOLERANCES.get(ours.dtype, 0.03):  # nan is a difference too
            return f"outputs moved by {moved:.2g} of the largest one"
    return None
