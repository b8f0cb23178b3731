"""What happens to a batch on the device: in the caller's thread, on its current stream, in order."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch

from torchfast._layout import is_image, to_channels_last_tensor
from torchfast._loader.normalize import Normalization
from torchfast._tree import flatten, map_tensors

Step = Callable[[Any], Any]


def finishing(
    transform: Step | None, normalization: Normalization | None, into: Any, *, channels_last: bool
) -> Step | None:
    """Return the steps asked for as one function, or None where there are none."""
    steps: list[Step] = []
    if normalization is not None:
        steps.append(lambda batch: map_tensors(_normalised(normalization), batch))
    if channels_last:
        steps.append(lambda batch: map_tensors(_laid_out, batch))
    if transform is not None:
        steps.append(transform)
    if into is not None:
        steps.append(Into(into))
    if not steps:
        return None

    def finish(batch: Any) -> Any:
        for step in steps:
            batch = step(batch)
        return batch

    return finish


def _normalised(normalization: Normalization) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda leaf: normalization(leaf) if normalization.applies(leaf) else leaf


def _laid_out(leaf: torch.Tensor) -> torch.Tensor:
    return to_channels_last_tensor(leaf) if is_image(leaf) else leaf


class Into:
    """Copies each batch into the same tensors, which a CUDA graph reads."""

    def __init__(self, batch: Any) -> None:
        self._targets = [leaf for leaf in flatten(batch)[0] if isinstance(leaf, torch.Tensor)]

    def __call__(self, batch: Any) -> Any:
        """Return the batch around the static tensors, which then hold its values."""
        leaves, structure = flatten(batch)
        found, wanted = _layouts(leaves), _layouts(self._targets)
        if found != wanted:
            raise ValueError(
                f"into= holds tensors of {_text(wanted)}, but this batch has {_text(found)}. "
                "A CUDA graph reads the same memory each time, so every batch must fill it exactly. "
                "drop_last=True leaves out a smaller last batch."
            )
        for target, leaf in zip(self._targets, leaves, strict=True):
            target.copy_(cast(torch.Tensor, leaf))
        return structure.rebuild(self._targets)


def _layouts(leaves: Sequence[Any]) -> list[tuple[tuple[int, ...], torch.dtype] | None]:
    return [(tuple(leaf.shape), leaf.dtype) if isinstance(leaf, torch.Tensor) else None for leaf in leaves]


def _text(layouts: Sequence[tuple[tuple[int, ...], torch.dtype] | None]) -> str:
    return ", ".join("no tensor" if layout is None else f"{layout[0]} {layout[1]}" for layout in layouts)
