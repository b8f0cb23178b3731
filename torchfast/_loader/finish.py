"""What happens to a batch on the device: in the caller's thread, on its current stream, in order."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch

from torchfast._layout import is_expanded, is_image, is_strided, to_channels_last_tensor
from torchfast._loader.normalize import Normalization
from torchfast._tree import flatten, map_tensors, places

Step = Callable[[Any], Any]


def finishing(
    transform: Step | None, normalization: Normalization | None, into: "Into | None", *, channels_last: bool
) -> Step | None:
    """Return the steps asked for as one function, or None where there are none."""
    steps: list[Step] = []
    if normalization is not None:
        steps.append(_normalising(normalization))
    if channels_last:
        steps.append(lambda batch: map_tensors(_laid_out, batch))
    if transform is not None:
        steps.append(transform)
    if into is not None:
        steps.append(into)
    if not steps:
        return None

    def finish(batch: Any) -> Any:
        for step in steps:
            batch = step(batch)
        return batch

    return finish


def _normalising(normalization: Normalization) -> Step:
    n_channels = normalization.n_channels

    def step(batch: Any) -> Any:
        found = []

        def normalised(leaf: torch.Tensor) -> torch.Tensor:
            if not normalization.applies(leaf):
                return leaf
            found.append(leaf)
            return normalization(leaf)

        changed = map_tensors(normalised, batch)
        if not found:
            raise ValueError(
                f"normalize= has numbers for {n_channels} channels, but this batch has no uint8 images "
                f"(N, {n_channels}, H, W), each side at least {n_channels}, and would come through as it is. "
                f"It holds {_text(_kinds(flatten(batch)[0])) or 'nothing'}. Let the loader yield "
                "uint8 images, channels first, or normalise in transform=."
            )
        return changed

    return step


def _laid_out(leaf: torch.Tensor) -> torch.Tensor:
    return to_channels_last_tensor(leaf) if is_image(leaf) else leaf


class Into:
    """Copies each batch into the same tensors, which a CUDA graph reads."""

    def __init__(self, batch: Any, device: torch.device) -> None:
        leaves, _ = flatten(batch)
        self._targets = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if not self._targets or len(self._targets) < len(leaves):
            raise ValueError(
                f"into= holds {_text(_kinds(leaves)) or 'nothing'}: give a batch of tensors, as many "
                "and in the same places as each batch will have, which a CUDA graph then reads."
            )
        if not all(is_strided(target) and not is_expanded(target) for target in self._targets):
            raise ValueError(
                f"into= holds tensors of {_text(_kinds(leaves))}, not each of which has a place of its own "
                "for every element: nested, sparse and expanded ones have not. Give dense tensors, as "
                "torch.empty makes them."
            )
        if any(target.device != device or target.requires_grad for target in self._targets):
            found = ", ".join(
                f"{target.device}{' with requires_grad' * target.requires_grad}" for target in self._targets
            )
            raise ValueError(
                f"into= holds tensors on {found}, but batches are brought to {device} and copied there, "
                f"outside of any autograd graph. Make them with device={str(device)!r}, requires_grad=False."
            )
        self._places = places(batch)

    def __call__(self, batch: Any) -> Any:
        """Return the batch around the static tensors, which then hold its values."""
        leaves, structure = flatten(batch)
        if _kinds(leaves) != _kinds(self._targets) or places(batch) != self._places:
            raise ValueError(
                f"into= holds tensors of {_text(_kinds(self._targets))}, but this batch has "
                f"{_text(_kinds(leaves))}{self._where(leaves)}. "
                "A CUDA graph reads the same memory each time, so every batch must fill it exactly. "
                "drop_last=True leaves out a smaller last batch."
            )
        with torch.no_grad():  # a graph would go on from batch to batch
            for target, leaf in zip(self._targets, leaves, strict=True):
                target.copy_(cast(torch.Tensor, leaf))
        return structure.rebuild(self._targets)

    def _where(self, leaves: Sequence[Any]) -> str:
        are_alike = _kinds(leaves) == _kinds(self._targets)
        return ", in other places of the batch or in another order" if are_alike else ""


Kind = tuple[tuple[int, ...] | str, torch.dtype]
"""A tensor's shape and type."""


def _kind(leaf: Any) -> Kind | None:
    if not isinstance(leaf, torch.Tensor):
        return None
    return "nested" if leaf.is_nested else tuple(leaf.shape), leaf.dtype


def _kinds(leaves: Sequence[Any]) -> list[Kind | None]:
    return [_kind(leaf) for leaf in leaves]


def _text(kinds: Sequence[Kind | None]) -> str:
    return ", ".join("no tensor" if kind is None else f"{kind[0]} {kind[1]}" for kind in kinds)
