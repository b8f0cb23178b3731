"""Memory formats: what counts as an image, what feeds a convolution, and laying tensors out again."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from torchfast._layout import (
    channels_last_format,
    convolutions,
    is_image,
    laid_out_like,
    stored_weight,
    to_channels_last_tensor,
)


@pytest.mark.parametrize(
    ("tensor", "verdict"),
    [
        (torch.zeros(8, 3, 32, 32), True),
        (torch.zeros(8, 1, 28, 28, dtype=torch.uint8), True),
        (torch.zeros(8, 16, 16, 16, dtype=torch.bfloat16), True),
        (torch.zeros(0, 3, 32, 32), True),
        (torch.zeros(8, 32, 32, 3), False),  # (N, H, W, C)
        (torch.zeros(8, 64, 128, 128), False),  # features
        (torch.zeros(8, 12, 512, 8), False),  # attention: (N, heads, T, D)
        (torch.zeros(8, 3, 32, 32, dtype=torch.int64), False),
        (torch.zeros(8, 1, 32, 32, dtype=torch.bool), False),
        (torch.zeros(3, 32, 32), False),
        (torch.zeros(2, 1, 8, 8, 8), False),
        (torch.zeros(1, 3, 32, 32).expand(8, 3, 32, 32), False),
        (torch.zeros(2, 3, 8, 8).to_sparse(), False),
    ],
    ids=lambda value: str(tuple(value.shape)) if isinstance(value, torch.Tensor) else "",
)
def test_what_counts_as_an_image(tensor: torch.Tensor, verdict: bool) -> None:  # noqa: FBT001 -- parametrized
    """Images are floating point or uint8, of rank 4, with 1 to 16 channels and no side shorter than that."""
    assert is_image(tensor) is verdict


def test_volumes_count_on_request() -> None:
    """A volume (N, C, D, H, W) is an image with rank_5=True; a clip with its frames first is not."""
    assert is_image(torch.zeros(2, 1, 8, 8, 8), rank_5=True)
    assert not is_image(torch.zeros(2, 8, 3, 32, 32), rank_5=True)


@given(st.lists(st.integers(1, 4), min_size=0, max_size=6))
def test_laying_out_keeps_values_and_reaches_the_strides_of_the_format(shape: list[int]) -> None:
    """Values stay, and the channels become the fastest dimension even where C == 1 or H == W == 1."""
    tensor = torch.randn(shape)
    laid = to_channels_last_tensor(tensor)
    assert torch.equal(laid, tensor)
    if channels_last_format(tensor.dim()) is None:
        assert laid is tensor
    else:
        assert laid.movedim(1, -1).stride() == torch.empty(laid.movedim(1, -1).shape).stride()
        assert to_channels_last_tensor(laid) is laid


@given(st.lists(st.integers(1, 3), min_size=4, max_size=5), st.booleans())
def test_laying_out_like_another_takes_its_strides_only(shape: list[int], back: bool) -> None:  # noqa: FBT001 -- drawn
    """Values, dtype and device are the tensor's own, the strides are the other's, in both directions."""
    plain = torch.randn(shape, dtype=torch.float64)
    channels_last = to_channels_last_tensor(torch.randn(shape))
    tensor, like = (channels_last, plain) if back else (plain, channels_last)
    laid = laid_out_like(tensor, like)
    assert laid.stride() == like.stride()
    assert laid.dtype == tensor.dtype
    assert torch.equal(laid, tensor)


def test_convolutions_are_found_by_their_own_rank() -> None:
    """2-d and 3-d convolutions count, transposed and lazy ones too; 1-d ones and everything else do not."""
    model = nn.ModuleDict(
        {
            "conv1": nn.Conv1d(2, 2, 1),
            "conv2": nn.Conv2d(2, 2, 1),
            "up": nn.ConvTranspose3d(2, 2, 1),
            "lazy": nn.LazyConv2d(2, 1),
            "norm": nn.BatchNorm2d(2),
        }
    )
    assert [name for name, _ in convolutions(model)] == ["conv2", "up", "lazy"]


def test_a_computed_weight_is_not_stored() -> None:
    """Weight norm computes the weight in each forward, so there is no parameter to lay out."""
    plain = nn.Conv2d(2, 2, 3)
    assert stored_weight(plain) is plain.weight
    assert stored_weight(nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 2, 3))) is None
