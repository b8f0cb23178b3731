"""What primitives ask of a module, and that each of them asks it in the same way."""

from collections import UserDict, namedtuple
from typing import Any

import pytest
import torch
from torch import nn

from torchfast import GPUTeacher, estimate_vram, to_channels_last
from torchfast._modules import call, without_shape

Pair = namedtuple("Pair", ["first", "second"])  # noqa: PYI024  the untyped form is what old code yields


def taken(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """Return what it was called with."""
    return args, kwargs


@pytest.mark.parametrize(
    ("inputs", "args", "kwargs"),
    [
        (3, (3,), {}),
        ((3, 4), (3, 4), {}),
        ([3, 4], (3, 4), {}),
        ({"x": 3}, (), {"x": 3}),
        (UserDict({"x": 3}), (), {"x": 3}),
        (Pair(3, 4), (Pair(3, 4),), {}),
        ((), (), {}),
    ],
)
def test_a_batch_says_how_the_model_is_called(inputs: Any, args: Any, kwargs: Any) -> None:
    """A mapping is passed as keywords, a tuple or list as arguments, anything else as the one argument."""
    assert call(taken, inputs) == (args, kwargs)


def test_parameters_and_buffers_may_wait_for_their_shape() -> None:
    """The first tensor without a shape is named, in a nested module too; with shapes there is none."""
    lazy_buffers = nn.Sequential(nn.Linear(2, 2), nn.LazyBatchNorm1d(affine=False))
    assert without_shape(lazy_buffers) == "1.running_mean"
    lazy_buffers(torch.zeros(2, 2))
    assert without_shape(lazy_buffers) is None


def test_no_primitive_takes_a_module_without_shapes() -> None:
    """All three that need a module's tensors refuse one that is still to take its shapes from a batch."""
    for take in (GPUTeacher, to_channels_last, lambda module: estimate_vram(module, torch.zeros(1, 1, 8, 8))):
        with pytest.raises(ValueError, match="from the first batch"):
            take(nn.Sequential(nn.Conv2d(1, 1, 1), nn.LazyConv2d(2, 3)))
