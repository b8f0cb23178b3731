"""What-if changes: what each does to a plan, when it makes no sense, and that nothing of the user changes."""

from typing import Any

import pytest
import torch
from torch import nn

from torchfast import estimate_vram
from torchfast._bytes import MIB
from torchfast._estimate.search import OPTIMIZERS, SAVINGS
from torchfast._estimate.step import Plan
from torchfast._estimate.variants import _CHANGES, changed


class Block(nn.Module):
    """A residual block of two layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add what the layers make of it."""
        y: torch.Tensor = x + self.inner(x)
        return y


def blocks(width: int = 64) -> nn.Module:
    """Return four blocks in a row."""
    return nn.Sequential(*(Block(width) for _ in range(4)))


def plan(model: nn.Module, inputs: Any, **options: Any) -> Plan:
    """Return a training plan without anything special."""
    plain: dict[str, Any] = {
        "model": model,
        "inputs": inputs,
        "target": None,
        "loss": None,
        "teacher": None,
        "optimizer": torch.optim.AdamW,
        "autocast": None,
        "grad_scaler": False,
        "clip_grad_norm": None,
        "training": True,
        "step": None,
        "n_steps": 2,
    }
    return Plan(**(plain | options))


def test_every_row_has_its_change() -> None:
    """Each name in the tables is a change, but half the batch, which is a matter of the batch."""
    assert {*SAVINGS, *OPTIMIZERS} - {"half the batch"} == set(_CHANGES)


@pytest.mark.parametrize("change", sorted(_CHANGES))
def test_the_users_objects_stay_as_they_are(change: str) -> None:
    """No change touches the model, its tensors, its modules' forward, or the optimizer."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), *(Block(6) for _ in range(3)))
    optimizer = torch.optim.AdamW(model.parameters())
    before = {name: (id(p), p.clone(), p.stride(), p.dtype) for name, p in model.named_parameters()}
    options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    changed(plan(model, torch.randn(2, 3, 8, 8), optimizer=optimizer), change)
    for name, parameter in model.named_parameters():
        same, value, stride, dtype = before[name]
        assert (id(parameter), parameter.stride(), parameter.dtype) == (same, stride, dtype)
        assert torch.equal(parameter, value)
    assert all("forward" not in vars(module) for module in model.modules())
    assert options == [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]


def test_copies_take_no_memory() -> None:
    """Where modules change, it is a copy on `meta` that does, with tied weights still tied."""
    model = blocks()
    model[1].inner[0].weight = model[0].inner[0].weight  # type: ignore[index]  # a chain of modules
    half = changed(plan(model, torch.randn(2, 64)), "pure bf16")
    assert half is not None
    assert {(p.device.type, p.dtype) for p in half.model.parameters()} == {("meta", torch.bfloat16)}
    assert len(list(half.model.parameters())) == len(list(model.parameters()))
    assert half.inputs.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "options"),
    [
        ("bf16 autocast", {"autocast": torch.float16}),
        ("channels_last", {}),  # no images
        ("fused optimizer", {"optimizer": torch.optim.Adafactor}),  # has no fused kernel
        ("fused optimizer", {"optimizer": lambda p: torch.optim.AdamW(p, fused=True)}),
        ("fused optimizer", {"optimizer": None}),
        ("checkpointing", {"training": False}),
        ("SGD", {"training": False}),
        ("SGD", {"step": lambda: None}),
    ],
)
def test_what_makes_no_sense_is_left_out(change: str, options: dict[str, Any]) -> None:
    """A change that the step already has, or cannot have, gives no plan."""
    assert changed(plan(blocks(), torch.randn(2, 64), **options), change) is None


def test_channels_last_lays_out_convolutions_only() -> None:
    """Convolution weights and images change their layout, other weights do not."""
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 2))
    laid_out = changed(plan(model, torch.randn(2, 4, 8, 8)), "channels_last")
    assert laid_out is not None
    assert laid_out.inputs.is_contiguous(memory_format=torch.channels_last)
    weight = next(laid_out.model.parameters())
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_what_would_save_how_much() -> None:
    """Of a deep model's step, checkpointing and half precision save much, a fused optimizer its scratch."""
    model = blocks(256)
    found = estimate_vram(model, torch.randn(4096, 256), optimizer=torch.optim.AdamW, n_steps=2, gpu="H200")
    saves = {row.change: row.saves_bytes for row in found.what_if()}
    assert found.what_if().left_out == ()
    assert set(saves) == {
        "checkpointing", "bf16 autocast", "pure bf16", "fused optimizer", "SGD", "half the batch",
    }  # fmt: skip
    assert saves["checkpointing"] > 20 * MIB
    assert saves["pure bf16"] > 20 * MIB
    assert min(saves.values()) >= -32 * MIB


def test_without_an_optimizer_the_common_ones_are_rows() -> None:
    """An estimate of forward and backward alone tells what each common optimizer would add."""
    model = blocks(256)
    found = estimate_vram(model, torch.randn(64, 256), n_steps=2, gpu="H200")
    saves = {row.change: row.saves_bytes for row in found.what_if()}
    assert set(OPTIMIZERS) <= set(saves)
    assert saves["AdamW"] <= saves["SGD with momentum"] <= saves["SGD"] <= 0
