"""`to_channels_last`: convolutional models and their batches in the layout that tensor cores read.

A model is changed in three steps, so that a failure leaves it as it was: refuse what cannot go well, lay
every tensor out in new memory, and only then put the new memory under the old tensors.
"""

import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from weakref import WeakSet

import torch
from torch import nn
from torch.optim import Optimizer

from torchfast import _layout
from torchfast._channels_last.changes import applied, apply, state_changes, to_plain, weight_changes
from torchfast._channels_last.measuring import Comparison, LayoutReport, compared
from torchfast._channels_last.refusals import (
    check_batch,
    check_convertible,
    check_may_change,
    check_options,
    optimizers_of,
)
from torchfast._tree import map_tensors

T = TypeVar("T")


def to_channels_last(  # noqa: PLR0913 -- keyword options
    model_or_batch: T,
    /,
    *,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    enabled: bool = True,
    sample: Any = None,
    report: Callable[[LayoutReport], object] | None = None,
    is_image: Callable[[torch.Tensor], bool] | None = None,
    rank_5: bool = False,
) -> T:
    """Lay a model out channels last in place and return it, or return a batch with its images laid out so.

    In a model the weights of 2-d and 3-d convolutions are laid out again, with their gradients, and nothing
    else: other parameters of rank 4 are no concern of a convolution. Parameters stay the same objects, so
    ties, optimizers and references hold. What the model computes changes by no more than another, equally
    valid kernel gives. All or nothing: an error leaves model and optimizer as they were. While it runs, the
    tensors that change are there twice.

    In a batch (any nesting of dicts, lists, tuples, dataclasses) every leaf that looks like images is laid
    out; everything else is passed on as the same object.

    Example:
        >>> import torch
        >>> from torchfast import to_channels_last
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> model = to_channels_last(model, optimizer=optimizer)
        >>> images, labels = to_channels_last((torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])))
        >>> images.shape, images.is_contiguous(memory_format=torch.channels_last)
        (torch.Size([4, 3, 32, 32]), True)
        >>> model(images).is_contiguous(memory_format=torch.channels_last)
        True

    Args:
        model_or_batch: a module, or a batch. Convert a model before it is wrapped in DDP or compiled.
        optimizer: the model's optimizer, or several. Its state is laid out like the parameters, now and after
            each later `load_state_dict`: a fused optimizer whose state lies differently from its parameters
            computes wrong updates without an error, and others fall back to slow kernels.
        enabled: False lays everything out plainly again (also the optimizer's state), so that one flag of a
            script can decide.
        sample: a batch for the model: a tensor, a tuple of arguments or a dict of keyword arguments, where
            the model is. Both layouts are timed on it, under the autocast that is active, forward and
            backward if the model is in training mode; the faster one is kept. Weights, buffers, gradients
            and random numbers are put back. Without it nothing is measured, and the model is converted.
        report: called with a `LayoutReport` of what was done and why; `report=print` prints it. Otherwise it
            is logged, to the logger `torchfast` at level INFO.
        is_image: replaces the rule for what in a batch is an image. The default: floating point or uint8,
            rank 4, 1 to 16 channels, no side shorter than the number of channels.
        rank_5: in a batch, volumes (N, C, D, H, W) count as images as well. Models need no such flag.

    Raises:
        TypeError: neither a module nor a batch, or an option of the wrong kind.
        ValueError: the model cannot be converted as it is: not materialised yet, already wrapped or scripted,
            weights in memory that others look into, or an optimizer that cannot work with the layout. The
            message names the culprit and the way out.

    It cannot see weights that a module hands to `torch.nn.functional.conv2d` by itself, and leaves weights
    alone that are computed in each forward (weight norm, pruning, parametrizations): their convolutions
    still pass channels_last activations on.
    """

    def lay_out_images(batch: T, layout: bool) -> T:  # noqa: FBT001 -- private
        def lay_out(leaf: torch.Tensor) -> torch.Tensor:
            counts = is_image(leaf) if is_image is not None else _layout.is_image(leaf, rank_5=rank_5)
            return _LAY_OUT[layout](leaf) if counts else leaf

        return map_tensors(lay_out, batch)

    check_options(enabled=enabled, report=report, is_image=is_image)
    if not isinstance(model_or_batch, nn.Module):
        check_batch(
            model_or_batch, only_for_models={"optimizer": optimizer, "sample": sample, "report": report}
        )
        return lay_out_images(model_or_batch, enabled)
    model, optimizers = model_or_batch, optimizers_of(optimizer)
    check_convertible(model)
    comparison = None
    if sample is not None and enabled:
        own = map_tensors(lambda leaf: leaf.detach().clone().requires_grad_(leaf.requires_grad), sample)
        samples = {layout: lay_out_images(own, layout) for layout in (False, True)}
        comparison = _measured(model, optimizers, samples)
        enabled = comparison.pays
    with _converted(model, optimizers, enabled=enabled) as n_weights:
        _report(model, n_weights, comparison, report, enabled=enabled)
    return model_or_batch


_LAY_OUT = {True: _layout.to_channels_last_tensor, False: to_plain}


@contextmanager
def _converted(model: nn.Module, optimizers: list[Optimizer], *, enabled: bool) -> Iterator[int]:
    """Lay the model and its optimizers out, and say how many weights changed; undo it if the block fails."""
    weights = weight_changes(model, _LAY_OUT[enabled])
    check_may_change(model, optimizers, weights)
    states = [change for optimizer in optimizers for change in state_changes(optimizer, weights)]
    with applied(weights + states):
        yield sum(isinstance(tensor, nn.Parameter) for tensor, _ in weights)
    for optimizer in optimizers:
        if optimizer not in _followed:
            optimizer.register_load_state_dict_post_hook(_match_state)
            _followed.add(optimizer)


def _measured(model: nn.Module, optimizers: list[Optimizer], samples: dict[bool, Any]) -> Comparison:
    changes = {layout: weight_changes(model, lay_out) for layout, lay_out in _LAY_OUT.items()}
    for either in changes.values():
        check_may_change(model, optimizers, either)
    return compared(model, samples, changes)


def _report(
    model: nn.Module,
    n_weights: int,
    comparison: Comparison | None,
    report: Callable[[LayoutReport], object] | None,
    *,
    enabled: bool,
) -> None:
    logger = logging.getLogger("torchfast")
    if report is None and not logger.isEnabledFor(logging.INFO):
        return
    n_computed = sum(
        _layout.stored_weight(convolution) is None for _, convolution in _layout.convolutions(model)
    )
    measured = {} if comparison is None else dataclasses.asdict(comparison)
    found = LayoutReport(enabled, n_weights, n_computed, **measured)
    if report is not None:
        report(found)
    else:
        logger.info("to_channels_last: %s", found)


_followed: WeakSet[Optimizer] = WeakSet()
"""Optimizers whose state already follows the parameters after each `load_state_dict`."""


def _match_state(optimizer: Optimizer) -> None:
    apply(state_changes(optimizer, []))
