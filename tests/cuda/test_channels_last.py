"""`to_channels_last` on a GPU: the same training, in the layout that convolutions are fastest in."""

import copy

import pytest
import torch
from torch import nn

from torchfast import to_channels_last

pytestmark = pytest.mark.cuda


def net() -> nn.Sequential:
    """Return a net with a convolution of each kind, in float64 on the GPU."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8, bias=False),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 4, 1),
        nn.ConvTranspose2d(4, 6, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    ).to("cuda", torch.float64)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[torch.Tensor]) -> torch.Tensor:
    """Take a step on each batch and return the last outputs."""
    outputs = torch.empty(0)
    for batch in batches:
        optimizer.zero_grad()
        outputs = model(batch)
        outputs.square().mean().backward()
        optimizer.step()
    return outputs


@pytest.mark.parametrize("kind", ["fused", "foreach"])
def test_training_agrees_in_float64(kind: str) -> None:
    """Outputs, gradients and steps agree with the plain layout, converted before or amid training."""
    plain = net()
    model = copy.deepcopy(plain)
    here, there = (
        torch.optim.AdamW(
            m.parameters(),
            lr=0.01,
            eps=1e-4,
            fused=kind == "fused" or None,
            foreach=kind == "foreach" or None,
        )
        for m in (model, plain)
    )
    batches = [torch.randn(4, 3, 16, 16, device="cuda", dtype=torch.float64) for _ in range(6)]
    train(model, here, batches[:2])
    train(plain, there, batches[:2])
    to_channels_last(model, optimizer=here)
    outputs = train(model, here, to_channels_last(batches))
    torch.testing.assert_close(outputs, train(plain, there, batches), rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-6)
        assert ours.grad is not None
        # Where a side is 1 its stride means nothing, and kernels choose one freely.
        sides = [side for side, size in enumerate(ours.shape) if size > 1]
        assert [ours.grad.stride(side) for side in sides] == [ours.stride(side) for side in sides]


def test_a_checkpoint_of_the_other_layout_resumes() -> None:
    """State that was saved from a plain model is laid out like the channels_last parameters it now serves."""
    plain = net()
    there = torch.optim.AdamW(plain.parameters(), lr=0.01, eps=1e-4, fused=True)
    batches = [torch.randn(4, 3, 16, 16, device="cuda", dtype=torch.float64) for _ in range(3)]
    train(plain, there, batches)
    saved = copy.deepcopy((plain.state_dict(), there.state_dict()))
    model = net()
    here = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-4, fused=True)
    to_channels_last(model, optimizer=here)
    model.load_state_dict(saved[0])
    here.load_state_dict(saved[1])
    found, expected = train(model, here, batches), train(plain, there, batches)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_activations_are_channels_last_from_end_to_end() -> None:
    """With model and batch converted, every rank 4 activation has its channels fastest."""
    model = to_channels_last(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 1))
    ).cuda()
    x = to_channels_last(torch.randn(2, 3, 32, 32, device="cuda"))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        for layer in model:
            x = layer(x)
            assert x.is_contiguous(memory_format=torch.channels_last), layer


def test_models_stay_channels_last_when_they_move() -> None:
    """The layout is kept by `.cuda()`, `.to(dtype)` and autocast's casts."""
    model = to_channels_last(nn.Conv2d(3, 8, 3)).cuda().to(torch.bfloat16)
    assert model.weight.is_contiguous(memory_format=torch.channels_last)
