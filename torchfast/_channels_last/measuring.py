"""Does the layout pay for this model on this device, and how far does it get?"""

import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from torchfast import _layout
from torchfast._channels_last.changes import apply
from torchfast._channels_last.refusals import Changes
from torchfast._modules import call
from torchfast._timing import time_ms
from torchfast._tree import tensors

N_ROUNDS = 3
MIN_GAIN = 0.02
"""Plain has to be faster by this much to be kept: less is within the noise of a clock."""


@dataclass(frozen=True, slots=True)
class LayoutReport:
    """What `to_channels_last` did to a model, and why; `str` says it in a sentence or two.

    Example:
        >>> import torch
        >>> from torchfast import to_channels_last
        >>> model = to_channels_last(torch.nn.Conv2d(3, 8, 3), report=lambda found: print(found.n_weights))
        1

    Attributes:
        channels_last: whether the model is channels_last now.
        n_weights: how many convolution weights were laid out (again).
        n_computed: how many convolutions compute their weight in each forward and were left alone.
        plain_ms: the time of a pass in the plain layout, None if it was not measured.
        channels_last_ms: the same for channels_last.
        has_backward: whether a pass was forward and backward, as in training, or forward alone.
        lost_in: the first module that was given channels_last activations and returned others, for which a
            convolution then had to convert; None if there is none, or nothing was measured.
        lost_before: the convolution that had to convert.
    """

    channels_last: bool
    n_weights: int
    n_computed: int
    plain_ms: float | None = None
    channels_last_ms: float | None = None
    has_backward: bool = False
    lost_in: str | None = None
    lost_before: str | None = None

    def __str__(self) -> str:
        layout = "channels_last" if self.channels_last else "plain"
        parts = [f"{layout}: {self.n_weights} convolution weights laid out"]
        if self.n_computed:
            parts[0] += f", {self.n_computed} left alone that are computed in each forward"
        if self.plain_ms is None or self.channels_last_ms is None:
            parts.append("Whether it pays was not measured: give a batch as sample= for that")
        else:
            work = "forward and backward pass" if self.has_backward else "forward pass"
            times = f"{self.channels_last_ms:.3g} ms in channels_last and {self.plain_ms:.3g} ms plain"
            parts.append(f"A {work} takes {times}")
        if self.lost_before is not None:
            where = f"in {self.lost_in!r}" if self.lost_in is not None else "between modules"
            parts.append(f"The layout is lost {where}: the convolution {self.lost_before!r} has to convert")
        return ". ".join(parts) + "."


@dataclass(frozen=True, slots=True)
class Comparison:
    """Both layouts, measured on one batch."""

    plain_ms: float
    channels_last_ms: float
    has_backward: bool
    lost_in: str | None
    lost_before: str | None

    @property
    def pays(self) -> bool:
        """Whether channels_last is to be kept."""
        return self.channels_last_ms <= self.plain_ms / (1 - MIN_GAIN)


def compared(model: nn.Module, samples: Mapping[bool, Any], changes: Mapping[bool, Changes], /) -> Comparison:
    """Measure a model in both layouts, and leave it as it was: weights, buffers, gradients, random numbers.

    `samples` and `changes` hold, for channels_last (True) and plain (False), the batch in that layout and
    what it takes to bring the model there.
    """
    current = [(tensor, tensor.data) for either in changes.values() for tensor, _ in either]
    device = next((t.device for t in (*model.parameters(), *tensors(samples))), torch.device("cpu"))
    times: dict[bool, list[float]] = {True: [], False: []}
    with _undone(model, current, device):
        has_backward = _pass(model, samples[False])
        for _ in range(N_ROUNDS):
            for layout, sample in samples.items():
                apply(current)
                apply(changes[layout])
                times[layout].append(time_ms(partial(_pass, model, sample), device))
        apply(current)
        apply(changes[True])
        lost_in, lost_before = _first_loss(model, samples[True])
    plain_ms, channels_last_ms = (statistics.median(times[layout]) for layout in (False, True))
    return Comparison(plain_ms, channels_last_ms, has_backward, lost_in, lost_before)


def _pass(model: nn.Module, inputs: Any) -> bool:
    """Run the model as its mode says, and tell whether that had a backward pass."""
    with torch.set_grad_enabled(model.training):
        outputs = call(model, inputs)
        wanted = [output.float().sum() for output in tensors(outputs) if output.requires_grad]
    if wanted:
        for parameter in model.parameters():
            parameter.grad = None
        torch.stack(wanted).sum().backward()
    return bool(wanted)


@contextmanager
def _undone(model: nn.Module, current: Changes, device: torch.device) -> Iterator[None]:
    """Undo at the end whatever running the model changes in it."""
    # Parameters too: a codebook is changed in the forward, weights by an optimizer in a gradient's hook.
    values = [(t, t.detach().clone()) for t in (*model.parameters(), *model.buffers())]
    tables = [(module, dict(module._buffers)) for module in model.modules()]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    devices = [] if device.type == "cpu" else [device]
    try:
        with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
            yield
    except Exception as error:
        error.add_note(
            "This happened while to_channels_last measured the model on sample=. It calls the model with a "
            "tensor as the one argument, a tuple or list as positional, a dict as keyword arguments."
        )
        raise
    finally:
        apply(current)
        with torch.no_grad():
            for module, table in tables:  # a forward may put another tensor there
                module._buffers.clear()
                module._buffers.update(table)
            for tensor, value in values:
                tensor.data.copy_(value)  # unseen by a graph that holds it: the values are the same
        for parameter, gradient in gradients:
            parameter.grad = gradient


# --- where the layout is lost ----------------------------------------------------------------------------


def _first_loss(model: nn.Module, inputs: Any) -> tuple[str | None, str | None]:
    """Run a forward pass, and return the module that loses the layout and the convolution that notices.

    Losses that no convolution notices cost nothing: a transformer reorders its activations on purpose.
    """
    culprit: list[str] = []
    noticed: list[tuple[str | None, str]] = []
    n_convolutions = 0

    def after(name: str) -> Callable[..., None]:
        def look(_module: nn.Module, args: Any, output: Any) -> None:
            if _lies(output) is True:
                culprit.clear()
            elif _lies(args) is True and _lies(output) is False and not culprit:
                culprit.append(name)

        return look

    def before(name: str) -> Callable[..., None]:
        def look(_module: nn.Module, args: Any) -> None:
            nonlocal n_convolutions
            n_convolutions += 1
            if n_convolutions > 1 and _lies(args) is False and not noticed:
                noticed.append((culprit[0] if culprit else None, name))

        return look

    with ExitStack() as hooks, torch.no_grad():
        for name, module in model.named_modules():
            hooks.callback(module.register_forward_hook(after(name)).remove)
        for name, convolution in _layout.convolutions(model):
            hooks.callback(convolution.register_forward_pre_hook(before(name)).remove)
        call(model, inputs)
    return noticed[0] if noticed else (None, None)


def _lies(activations: Any) -> bool | None:
    """Say whether the first activation of rank 4 or 5 is channels_last; None where that cannot be told."""
    for tensor in tensors(activations):
        memory_format = _layout.channels_last_format(tensor.dim())
        if memory_format is None:
            continue
        is_channels_last = tensor.is_contiguous(memory_format=memory_format)
        return None if is_channels_last == tensor.is_contiguous() else is_channels_last
    return None
