"""The one rule for which dimension of a batch is the batch, wherever batches are counted or split.

A batch's size is the size of dimension 0 that most of its tensors share; on a tie, the one met first. Tensors
of that size in dimension 0 are split along it; all others (masks, tables, scalars, lengths of one) belong to
every part. A batch whose samples lie along another dimension names it with `dim`.
"""

from collections import Counter
from typing import TypeVar

import torch

from torchfast._tree import flatten, tensors

T = TypeVar("T")


def batch_size(batch: object, /, *, dim: int = 0) -> int | None:
    """Return the number of samples in a (nested) batch, or None when no tensor has a dimension `dim`.

    Example:
        >>> import torch
        >>> from torchfast._batch import batch_size
        >>> batch_size({"image": torch.zeros(8, 3, 4, 4), "label": torch.zeros(8), "mean": torch.zeros(3)})
        8
    """
    found = (size_along(tensor, dim) for tensor in tensors(batch))
    sizes = Counter(size for size in found if size is not None)
    return sizes.most_common(1)[0][0] if sizes else None


def size_along(tensor: torch.Tensor, dim: int, /) -> int | None:
    """Return a tensor's size along a dimension, or None where it has none, as those of nested tensors."""
    if tensor.ndim <= dim or (tensor.is_nested and dim > 0):
        return None
    return tensor.size(dim)  # a nested tensor has a size, but no shape


def split(batch: T, size: int, /, *, dim: int = 0) -> list[T]:
    """Return the batch in parts of at most `size` samples, as views, in order; whole if it has no samples.

    Example:
        >>> import torch
        >>> from torchfast._batch import split
        >>> [part.tolist() for part in split(torch.arange(5), 2)]
        [[0, 1], [2, 3], [4]]
    """
    n_samples = batch_size(batch, dim=dim)
    if not n_samples or size >= n_samples:
        return [batch]
    leaves, structure = flatten(batch)
    parts = []
    for start in range(0, n_samples, size):
        length = min(size, n_samples - start)
        parts.append(
            structure.rebuild(
                [
                    leaf.narrow(dim, start, length)
                    if isinstance(leaf, torch.Tensor) and size_along(leaf, dim) == n_samples
                    else leaf
                    for leaf in leaves
                ]
            )
        )
    return parts
