"""Recurrent networks on paper leave and take what they did on an H200 (torch 2.11, cuDNN 9.19)."""

from typing import Any

import pytest
import torch
from torch import nn

from torchfast import VRAMEstimate, estimate_vram
from torchfast._bytes import MIB
from torchfast._estimate.cuda_behaviour.recurrent_workspaces import LSTM, Network, workspace_bytes


class First(nn.Module):
    """The outputs of a recurrent network, without its states."""

    def __init__(self, rnn: nn.RNNBase) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the outputs."""
        output: torch.Tensor = self.rnn(x)[0]
        return output


def estimate(rnn: nn.RNNBase, shape: tuple[int, ...], **options: Any) -> VRAMEstimate:
    """Estimate one step on the GPU that was measured."""
    batch = torch.empty(shape, device="meta", dtype=options.pop("dtype", torch.float32))
    return estimate_vram(First(rnn.to(batch.dtype)), batch, gpu="H200", n_steps=1, **options)


def sizes_of(found: VRAMEstimate, operator: str) -> list[int]:
    """Return the bytes of every block that an operator took."""
    notes = found._trace.notes
    return [e.size_bytes for e in found._trace.events if e.size_bytes and notes[e.note].operator == operator]


KEPT = [
    # The network, its batch, and the reserve that it left for the backward pass, less up to 256 bytes.
    (nn.LSTM(1024, 650, 3, dropout=0.2, bidirectional=True, proj_size=162), (256, 128, 1024), 3_540_582_400),
    (nn.GRU(400, 768, 2, dropout=0.2, bidirectional=True), (128, 32, 400), 328_728_576),
    (nn.RNN(80, 640, 3, dropout=0.2), (16, 16, 80), 3_317_760),
    (nn.LSTM(256, 256, 3, proj_size=64), (256, 16, 256), 87_031_808),
]


@pytest.mark.parametrize(("rnn", "shape", "kept"), KEPT)
def test_masks_and_projections_are_part_of_the_reserve(
    rnn: nn.RNNBase, shape: tuple[int, ...], kept: int
) -> None:
    """Dropout keeps a bit an element, two in two directions; a projection a state and its projection more."""
    sizes = sizes_of(estimate(rnn, shape), "aten._cudnn_rnn")
    assert any(0 <= size - kept <= 256 for size in sizes), sorted(sizes)[-4:]


@pytest.mark.parametrize("autocast", [torch.float16, torch.bfloat16])
def test_autocast_runs_recurrent_networks_in_half_precision(autocast: torch.dtype) -> None:
    """Either type of autocast casts the weights to float16, into one block that the next call makes anew."""
    rnn = nn.LSTM(64, 64, 2)
    n_weights = sum(p.numel() for p in rnn.parameters())
    found = estimate(rnn, (8, 4, 64), autocast=autocast)
    assert sizes_of(found, "aten.zeros").count(2 * n_weights) == 1
    sequence = 8 * 4 * 64 * 2
    assert sizes_of(found, "aten._cudnn_rnn").count(sequence) == 1
    assert 2 * n_weights not in sizes_of(found, "aten._cudnn_rnn")


def test_weights_under_autocast_get_gradients_of_their_own_type() -> None:
    """Each weight's part of the flat gradient is cast back when it is accumulated."""
    rnn = nn.LSTM(64, 64)
    found = estimate(rnn, (8, 4, 64), autocast=torch.float16)
    casts = sizes_of(found, "aten._to_copy")
    assert all(casts.count(p.numel() * 4) >= 1 for p in rnn.parameters())


def test_the_workspace_is_that_of_networks_like_it() -> None:
    """A network that was measured takes what it took: of 489.5 MiB, all but 19 depends on the batch."""
    measured = Network(LSTM, 4, 256, 128, 512, 640, 0, 1, 1, n_weights=2_954_240, n_rows=256 * 128)
    assert workspace_bytes(measured) == pytest.approx(489.5 * MIB, rel=0.001)


def test_packed_sequences_take_memory_for_their_steps_only() -> None:
    """Half the steps take half of what depends on the batch."""
    full = Network(LSTM, 4, 64, 128, 512, 1024, 0, 1, 1, n_weights=0, n_rows=64 * 128)
    half = Network(LSTM, 4, 64, 128, 512, 1024, 0, 1, 1, n_weights=0, n_rows=32 * 128)
    assert half.batch_bytes == pytest.approx(full.batch_bytes / 2, rel=0.05)
