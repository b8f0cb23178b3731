"""Which layers make a batch in parts different from the batch whole."""

import pytest
import torch
from torch import nn

from torchfast import OutOfMemoryError, inject_oom, oom_guard
from torchfast._oom import layers


class MyBatchNorm(nn.Module):
    """A batch norm of somebody's own."""


class FrozenBatchNorm2d(nn.Module):
    """One that uses fixed statistics, as in detection models."""


class NTXentLoss(nn.Module):
    """A loss that compares the samples of a batch."""


class MinibatchStdLayer(nn.Module):
    """A discriminator's look at the variety of its batch."""


@pytest.mark.parametrize(
    ("layer", "sees_whole_batch"),
    [
        (nn.BatchNorm1d(2), True),
        (nn.SyncBatchNorm(2), True),
        (MyBatchNorm(), True),
        (NTXentLoss(), True),
        (MinibatchStdLayer(), True),
        (FrozenBatchNorm2d(), False),
        (nn.GroupNorm(1, 2), False),
        (nn.InstanceNorm2d(2), False),
        (nn.LayerNorm(2), False),
        (nn.CrossEntropyLoss(), False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_layers_that_see_the_whole_batch(layer: nn.Module, *, sees_whole_batch: bool) -> None:
    """They are known by their base class or their name, in training only, and named by their path."""
    model = nn.ModuleDict({"layer": layer})
    expected = [f"layer ({type(layer).__name__})"] if sees_whole_batch else []
    assert layers.whole_batch_layers([model]) == expected
    assert layers.whole_batch_layers([model.eval()]) == []


def test_batch_norm_without_running_statistics() -> None:
    """It takes the statistics of the batch even in evaluation, so chunks of a batch are refused there too."""
    model = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)).eval()
    assert layers.whole_batch_layers([model]) == ["0 (BatchNorm1d without running statistics)"]
    predict = oom_guard().chunked(model)
    with pytest.raises(OutOfMemoryError, match="sees the whole batch"), inject_oom(above=4, times=None):
        predict(torch.randn(16, 3))


class DropPath(nn.Module):
    """Stochastic depth as in timm."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob


@pytest.mark.parametrize(
    ("layer", "draws"),
    [
        (nn.Dropout2d(0.1), True),
        (nn.Dropout(0.0), False),
        (nn.AlphaDropout(0.1), True),
        (DropPath(0.1), True),
        (DropPath(0.0), False),
        (nn.RReLU(), True),
        (nn.FractionalMaxPool2d(2, output_size=2), True),
        (nn.LSTM(2, 2, num_layers=2, dropout=0.1), True),
        (nn.LSTM(2, 2), False),
        (nn.MultiheadAttention(2, 1, dropout=0.1), True),
        (nn.ReLU(), False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_layers_that_draw_random_numbers(layer: nn.Module, *, draws: bool) -> None:
    """They are known by their class or their name, where their rate is not zero, in training only."""
    names = layers.random_layers([layer])
    assert bool(names) is draws
    assert layers.random_layers([layer.eval()]) == []


@pytest.mark.parametrize(
    "spectral_norm", [nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm], ids=["new", "old"]
)
def test_layers_that_change_with_every_pass(spectral_norm: object) -> None:
    """Spectral norm refines its estimate at each forward pass: once for each part, which is said."""
    assert callable(spectral_norm)
    model = nn.Sequential(spectral_norm(nn.Linear(4, 4)))
    kind = type(model[0]).__name__
    assert layers.changing_layers([model]) == [f"0 ({kind}) under spectral norm"]
    assert layers.changing_layers([model.eval()]) == []
    model.train()
    step = oom_guard().retry(model=model)(lambda attempt: [model(part) for part, _ in attempt])
    with (
        pytest.warns(UserWarning, match="under spectral norm is refined once for each part"),
        inject_oom(above=4, times=None),
    ):
        step(torch.zeros(8, 4))
