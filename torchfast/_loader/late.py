"""What no transfer is planned for: leaves that move by their own `.to`."""

import copy
from typing import Any

import torch

from torchfast._tree import Leaf

_PARTS = {
    torch.sparse_coo: ("_indices", "_values"),
    torch.sparse_csr: ("crow_indices", "col_indices", "values"),
    torch.sparse_bsr: ("crow_indices", "col_indices", "values"),
    torch.sparse_csc: ("ccol_indices", "row_indices", "values"),
    torch.sparse_bsc: ("ccol_indices", "row_indices", "values"),
    torch.jagged: ("values", "offsets", "lengths"),
}
"""The methods that return the tensors of which a tensor of such a layout consists; of other nested ones,
`values`."""


def moved(leaf: Leaf, device: torch.device, /) -> Any:
    """Return the leaf on the device; an object's own `.to` may know no more than the device."""
    return leaf.to(device, non_blocking=True) if isinstance(leaf, torch.Tensor) else leaf.to(device)


def copied(leaf: Leaf, /) -> Any:
    """Return a copy that the loader cannot overwrite with its next batch."""
    clone = getattr(leaf, "clone", None)
    if callable(clone):
        return clone()
    try:
        return copy.deepcopy(leaf)
    except Exception as error:
        raise TypeError(
            f"a batch holds a {type(leaf).__name__}, which moves by its own .to when the batch is handed "
            "out. The loader may have written its next batch there by then, so a copy is kept, but it has no "
            f"clone(), and copy.deepcopy failed: {error}. Give it a clone(), or load by a DataLoader with "
            "workers, whose batches are its own."
        ) from error


def pinned(part: Any, /) -> Any:
    """Return a leaf, or an object without any, in pinned memory, if it knows how and is not on a device."""
    pin = getattr(part, "pin_memory", None)
    is_on_device = isinstance(part, torch.Tensor) and not part.is_cpu
    return part if pin is None or is_on_device else pin()


def record_use(leaf: Any, stream: torch.cuda.Stream, /) -> None:
    """Tell the allocator that what the leaf has on a GPU is used on this stream too."""
    if not isinstance(leaf, torch.Tensor):
        parts = leaf if isinstance(leaf, tuple) else ()  # PackedSequence
        for part in parts:
            record_use(part, stream)
        if not parts and callable(getattr(leaf, "record_stream", None)):
            leaf.record_stream(stream)
    elif leaf.is_nested or leaf.layout in _PARTS:
        for name in _PARTS.get(leaf.layout, ("values",)):
            record_use(getattr(leaf, name)(), stream)
    elif leaf.is_cuda:
        leaf.record_stream(stream)
