"""What a model asks of values while it is on paper, and what it is told."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from torchfast import VRAMEstimate, estimate_vram

FINITE = "activations that are looked at for NaN or infinity were taken to have none"


class Asks(nn.Linear):
    """A linear layer whose output is looked at, or changed, by a function."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__(8, 8)
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the function makes of the output."""
        return self.function(super().forward(x))


def estimate(function: Callable[[torch.Tensor], torch.Tensor]) -> VRAMEstimate:
    """Estimate one step of a layer with that function."""
    return estimate_vram(Asks(function), torch.zeros(4, 8), gpu="H200", n_steps=1)


def refuses_nan(y: torch.Tensor) -> torch.Tensor:
    """Stop where a number is no number, as quantised models do."""
    if y.isnan().sum() != 0 or torch.isinf(y).any():
        raise ValueError("NaN")
    return y


def test_numbers_are_finite() -> None:
    """A model that stops at NaN or infinity goes on, and the estimate says that this was assumed."""
    assert FINITE in estimate(refuses_nan).assumptions


def test_a_mask_of_what_is_not_finite_chooses_nothing() -> None:
    """Replacing NaN takes no memory for elements, as there are none."""
    found = estimate(lambda y: torch.cat([y.flatten(), y[torch.isnan(y)]]))
    cats = [m for m in found.timeline if m.operator == "aten.cat"]
    assert cats
    assert found._trace.events[found.timeline.index(cats[0])].size_bytes == 4 * 8 * 4


def test_new_tensor_takes_after_its_tensor() -> None:
    """`y.new_tensor(data)` has the type of `y`, lies where it does, and its values are known."""
    seen = []

    def scaled(y: torch.Tensor) -> torch.Tensor:
        counts = y.new_tensor([1, 2], dtype=torch.int64)
        seen.append((y.new_tensor([0.5]).dtype, counts.device, counts.tolist()))
        return y * y.new_tensor(0.5)

    estimate(scaled)
    assert seen == [(torch.float32, torch.device("cuda", 0), [1, 2])]


@pytest.mark.parametrize("in_place", [False, True])
def test_masks_are_filled_with_a_value_of_the_host(*, in_place: bool) -> None:
    """A value made with `torch.tensor(...)` may fill a mask on the GPU, as CUDA allows."""
    lowest = torch.tensor(torch.finfo(torch.float32).min)

    def filled(y: torch.Tensor) -> torch.Tensor:
        scores = y * 2
        return scores.masked_fill_(y > 0, lowest) if in_place else scores.masked_fill(y > 0, lowest)

    assert estimate(filled).unmodelled == ()


def test_the_mask_of_a_long_text_is_known_as_numbers_too() -> None:
    """A mask over all pairs of 1,024 tokens, made to be added, still tells what it lets through."""
    mask = torch.ones(2, 1024, dtype=torch.bool)
    mask[0, 0] = False

    def pairs_decide(y: torch.Tensor) -> torch.Tensor:
        on_gpu = mask.to(y.device)
        pairs = (on_gpu[:, None, :, None] & on_gpu[:, None, None, :]).float() - 1
        return y @ y.T if (pairs < 0).any() else y

    found = estimate(pairs_decide)
    assert any(moment.operator == "aten.mm" and "forward" in moment.phase for moment in found.timeline)


def test_large_values_are_known_up_to_64_mib_together() -> None:
    """However many masks a model makes, what is held of them on the host is little, and is let go."""
    n_known = []

    def makes_masks(y: torch.Tensor) -> torch.Tensor:
        masks = [torch.ones(2**20, device=y.device) for _ in range(40)]
        n_known.append(sum(getattr(mask, "values", None) is not None for mask in masks))
        return y

    estimate(makes_masks)
    estimate(makes_masks)
    assert n_known == [16, 16]
