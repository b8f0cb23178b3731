"""`to_channels_last(sample=...)`: the faster layout is kept, nothing else changes, losses are named."""

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from torchfast import LayoutReport, _timing, to_channels_last
from torchfast._channels_last import measuring
from torchfast._tree import tensors


def net(*layers: nn.Module) -> nn.Sequential:
    """Return two convolutions with something between them."""
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), *layers, nn.Conv2d(8, 8, 3), nn.Dropout())


SAMPLE = torch.randn(2, 3, 16, 16)


@pytest.fixture(autouse=True)
def short_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure with the real clock, but briefly."""
    monkeypatch.setattr(_timing, "MIN_ROUND_S", 0.001)


@pytest.fixture
def reports() -> list[LayoutReport]:
    """Collect what is reported."""
    return []


def clock(monkeypatch: pytest.MonkeyPatch, *, plain_ms: float, channels_last_ms: float) -> None:
    """Have each pass take a given time, by the layout of the model that it runs."""

    def time_ms(run: Any, _device: torch.device) -> float:
        run()
        weight: torch.Tensor = run.args[0][0].weight
        return channels_last_ms if weight.stride(1) == 1 else plain_ms

    monkeypatch.setattr(measuring, "time_ms", time_ms)


@pytest.mark.parametrize(
    ("plain_ms", "channels_last_ms", "kept"),
    [(2.0, 1.0, True), (1.0, 2.0, False), (1.0, 1.01, True)],
    ids=["faster", "slower", "a tie"],
)
def test_the_faster_layout_is_kept(
    plain_ms: float,
    channels_last_ms: float,
    kept: bool,  # noqa: FBT001 -- parametrized
    monkeypatch: pytest.MonkeyPatch,
    reports: list[LayoutReport],
) -> None:
    """Channels_last is kept unless plain is faster by more than noise, and the report has both times."""
    clock(monkeypatch, plain_ms=plain_ms, channels_last_ms=channels_last_ms)
    model = net()
    first = model[0]
    assert isinstance(first, nn.Conv2d)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    to_channels_last(model, optimizer=optimizer, sample=SAMPLE, report=reports.append)
    (report,) = reports
    assert report.channels_last is kept
    assert (report.plain_ms, report.channels_last_ms) == (plain_ms, channels_last_ms)
    assert first.weight.is_contiguous(memory_format=torch.channels_last) is kept


@pytest.mark.parametrize("training", [True, False])
def test_measuring_leaves_no_trace(training: bool, reports: list[LayoutReport]) -> None:  # noqa: FBT001 -- parametrized
    """Weights, batch-norm statistics, gradients, random numbers and the mode are as without measuring."""
    model = net().train(training)
    model(SAMPLE).sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    to_channels_last(model, sample=SAMPLE, report=reports.append)
    assert torch.equal(torch.rand(2), expected)
    assert model.training is training
    assert reports[0].has_backward is training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is old for parameter, old in zip(model.parameters(), gradients, strict=True))


def test_a_sample_that_does_not_fit_leaves_the_model_as_it_was() -> None:
    """The model's own error comes through, says where it happened, and nothing has changed."""
    model = net()
    before = [parameter.data_ptr() for parameter in model.parameters()]
    with pytest.raises(RuntimeError, match="channels") as error:
        to_channels_last(model, sample=torch.randn(2, 5, 16, 16))
    assert error.value.__notes__ == [
        (
            "This happened while to_channels_last measured the model on sample=. It calls the model with a "
            "tensor as the one argument, a tuple or list as positional, a dict as keyword arguments."
        )
    ]
    assert [parameter.data_ptr() for parameter in model.parameters()] == before


@pytest.mark.parametrize(
    "sample", [(SAMPLE,), [SAMPLE], {"input": SAMPLE}], ids=["tuple", "list", "keywords"]
)
def test_samples_of_several_arguments(sample: Any, reports: list[LayoutReport]) -> None:
    """A tuple or list is positional arguments, a dict keyword arguments."""
    to_channels_last(net().eval(), sample=sample, report=reports.append)
    assert reports[0].plain_ms is not None


class Skip(nn.Module):
    """Adds a plain tensor before its convolution: code of a parent, not a module, loses the layout."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.bias = nn.Parameter(torch.zeros(1, 8, 16, 16))
        self.second = nn.Conv2d(8, 8, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Add in the order that loses the layout."""
        result: torch.Tensor = self.second(self.bias + self.first(images))
        return result


@pytest.mark.parametrize(
    ("build", "lost_in", "lost_before"),
    [
        (lambda: net(nn.ReLU(), nn.MaxPool2d(2)), None, None),
        (lambda: net(nn.ReLU(), nn.InstanceNorm2d(8), nn.ReLU()), "3", "5"),
        (Skip, None, "second"),
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(2), nn.Softmax(-1)), None, None),
    ],
    ids=["kept", "instance norm", "addition", "transformer"],
)
def test_the_first_loss_of_the_layout_is_named(
    build: Callable[[], nn.Module], lost_in: str | None, lost_before: str | None, reports: list[LayoutReport]
) -> None:
    """Named are the module that returns plain activations and the convolution that has to convert them."""
    to_channels_last(build(), sample=SAMPLE, report=reports.append)
    assert (reports[0].lost_in, reports[0].lost_before) == (lost_in, lost_before)


def test_without_a_sample_the_report_says_that_nothing_was_measured(
    reports: list[LayoutReport], caplog: pytest.LogCaptureFixture
) -> None:
    """The model is converted; a report, or else the log, says that this was not measured."""
    expected = (
        "channels_last: 2 convolution weights laid out. "
        "Whether it pays was not measured: give a batch as sample= for that."
    )
    to_channels_last(net(), report=reports.append)
    assert str(reports[0]) == expected
    with caplog.at_level(logging.INFO, logger="torchfast"):
        to_channels_last(net())
    assert caplog.messages == [f"to_channels_last: {expected}"]


def test_a_report_that_fails_leaves_the_model_as_it_was() -> None:
    """Who handles the error finds the layout, of the optimizer's state too, that was there before."""
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    model(SAMPLE).sum().backward()
    optimizer.step()

    def strides() -> list[Any]:
        return [tensor.stride() for tensor in tensors([*model.parameters(), optimizer.state_dict()])]

    before = strides()
    with pytest.raises(ZeroDivisionError):
        to_channels_last(model, optimizer=optimizer, report=lambda _: 1 / 0)
    assert strides() == before
    to_channels_last(model, optimizer=optimizer)
    assert strides() != before


def test_reports_in_words() -> None:
    """A report reads as sentences: the layout and why, what was left alone, where it is lost."""
    report = LayoutReport(False, 3, 2, 1.0, 2.0, True, "norm", "conv2")
    assert str(report) == (
        "plain: 3 convolution weights laid out, 2 left alone that are computed in each forward. "
        "A forward and backward pass takes 2 ms in channels_last and 1 ms plain. "
        "The layout is lost in 'norm': the convolution 'conv2' has to convert."
    )


def test_switched_off_nothing_is_measured(reports: list[LayoutReport]) -> None:
    """With enabled=False the model is plain, whatever would be faster."""
    first = nn.Conv2d(3, 8, 3)
    to_channels_last(nn.Sequential(first), sample=SAMPLE, enabled=False, report=reports.append)
    assert first.weight.is_contiguous()
    assert reports[0].plain_ms is None


class Drifting(nn.Module):
    """Changes all that a forward pass may: tensors in place, tensors for others, and its batch."""

    mean: torch.Tensor
    last: torch.Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.book = nn.Parameter(torch.ones(8), requires_grad=False)
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("last", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve, and leave traces."""
        x.detach().sub_(1)
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean()
        self.last = x.detach()
        self.book.mul_(0.5)
        seen: torch.Tensor = self.conv(x) * self.book[:, None, None]
        return seen


def test_whatever_a_forward_pass_changes_is_put_back() -> None:
    """Buffers that it replaces or makes, parameters that it changes, and the batch."""
    model, sample = Drifting(), torch.ones(2, 3, 16, 16, requires_grad=True)
    mean = model.mean
    to_channels_last(model, sample=sample)
    assert model.mean is mean
    assert (float(mean), model.last) == (0.0, None)
    assert model.book.tolist() == [1.0] * 8
    assert bool((sample == 1).all())
    assert sample.grad is None
