"""The one rule for which dimension of a batch is the batch, wherever batches are counted or split.

A batch's size is the size of dimension 0 that most of its tensors share; on a tie, the one met first. Tensors
of that size in dimension 0 are split along it; all others (masks, tables, scalars, lengths of one) belong to
every part. A batch whose samples lie along another dimension names it with `dim`. A `PackedSequence` has one
sample for each of its sequences, whatever the dimension.

`cut` takes a batch apart; `Gathered` puts together what a function returned for its parts.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any, TypeGuard, TypeVar

import torch
from torch.nn.utils.rnn import PackedSequence

from torchfast._tree import flatten

T = TypeVar("T")


def batch_size(batch: object, /, *, dim: int = 0) -> int | None:
    """Return the number of samples in a (nested) batch, or None when no tensor has a dimension `dim`.

    Example:
        >>> import torch
        >>> from torchfast._batch import batch_size
        >>> batch_size({"image": torch.zeros(8, 3, 4, 4), "label": torch.zeros(8), "mean": torch.zeros(3)})
        8
    """
    return common_size(flatten(batch)[0], dim)


def common_size(leaves: Sequence[Any], dim: int, /) -> int | None:
    """Return the number of samples in a batch of these leaves."""
    sizes = [size for leaf in leaves if (size := size_along(leaf, dim)) is not None]
    if not sizes or 2 * sizes.count(sizes[0]) >= len(sizes):  # as a rule, and asked at every step
        return sizes[0] if sizes else None
    return Counter(sizes).most_common(1)[0][0]


def size_along(leaf: Any, dim: int, /) -> int | None:
    """Return a leaf's size along a dimension, or None where it has none, as those of nested tensors."""
    if isinstance(leaf, PackedSequence):
        return int(leaf.batch_sizes[0])
    if not isinstance(leaf, torch.Tensor) or leaf.ndim <= dim or (leaf.is_nested and dim > 0):
        return None
    return leaf.size(dim)  # a nested tensor has a size, but no shape


def lengths_of(n_samples: int, size: int, /, *, uneven: bool = False) -> list[int]:
    """Return how many samples each part of a batch has, if it has at most `size`.

    With `uneven`, parts that would all be of one size get a last one in two halves: by that `Gathered` tells
    rows from what is only as long as a part.

    Example:
        >>> from torchfast._batch import lengths_of
        >>> lengths_of(8, 4), lengths_of(8, 4, uneven=True), lengths_of(7, 4, uneven=True)
        ([4, 4], [4, 2, 2], [4, 3])
    """
    lengths = [min(size, n_samples - start) for start in range(0, n_samples, size)]
    if uneven and len(lengths) > 1 and lengths[-1] == size > 1:
        lengths[-1:] = [size - size // 2, size // 2]
    return lengths


def cut(batch: T, lengths: Sequence[int], /, *, dim: int = 0) -> list[T]:
    """Return parts of the batch that have these numbers of samples, from its first sample on.

    Tensors are cut into views. Packed sequences are copied, as their samples lie in between each other.

    Example:
        >>> import torch
        >>> from torchfast._batch import cut, lengths_of
        >>> [part.tolist() for part in cut(torch.arange(5), lengths_of(5, 2))]
        [[0, 1], [2, 3], [4]]
    """
    n_samples = batch_size(batch, dim=dim)
    leaves, structure = flatten(batch)
    return [
        structure.rebuild(
            [
                _samples(leaf, end - length, length, dim) if size_along(leaf, dim) == n_samples else leaf
                for leaf in leaves
            ]
        )
        for length, end in zip(lengths, accumulate(lengths), strict=True)
    ]


def _samples(leaf: Any, start: int, length: int, dim: int) -> Any:
    if isinstance(leaf, torch.Tensor):
        return leaf.narrow(dim, start, length)
    # Sequences lie time by time, the longest first: at each time those that have not ended yet.
    n_all = int(leaf.batch_sizes[0])
    places = torch.arange(n_all) if leaf.unsorted_indices is None else leaf.unsorted_indices.cpu()
    chosen, order = places[start : start + length].sort()
    n_left = leaf.batch_sizes[:, None]
    is_left = chosen < n_left
    rows = (n_left.cumsum(0) - n_left + chosen)[is_left]
    sizes = is_left.sum(1)
    device = leaf.data.device
    return PackedSequence(
        leaf.data[rows.to(device)],
        sizes[sizes > 0],
        None if leaf.sorted_indices is None else order.to(device),
        None if leaf.unsorted_indices is None else order.argsort().to(device),
    )


class Gathered:
    """What a function returned for the parts of a batch, each put into its place as it comes.

    A tensor that has as many rows as each part has samples gets the rows of all of them. What is the same for
    every part, tensors and other things, is returned once. All else is refused, with the exception that
    `refusal` makes of a description. Where parts have one size only, a tensor of as many rows is taken for
    rows, and a list of as many strings or numbers is refused: give parts of `lengths_of(..., uneven=True)`.

    Example:
        >>> import torch
        >>> from torchfast._batch import Gathered, cut
        >>> gathered = Gathered(5, refusal=ValueError)
        >>> for part in cut(torch.arange(5), [2, 2, 1]):
        ...     gathered.add((part * 10, "tens"), len(part))
        >>> gathered.whole()
        (tensor([ 0, 10, 20, 30, 40]), 'tens')
    """

    def __init__(self, n_samples: int, /, *, refusal: Callable[[str], Exception], dim: int = 0) -> None:
        self._n_samples, self._refusal, self._dim = n_samples, refusal, dim
        self._lengths: list[int] = []
        self._places: list[Any] = []

    def add(self, output: Any, length: int, /) -> None:
        """Take what was returned for the next part, which has this many samples."""
        leaves, structure = flatten(output)
        around = structure.rebuild([_Mark(index) for index in range(len(leaves))])
        if not self._lengths:
            self._structure, self._around = structure, around
            self._places = [self._place(leaf, length) for leaf in leaves]
        elif len(leaves) != len(self._places) or _differ(around, self._around):
            raise self._refusal("things other than tensors, which differ from part to part")
        for index, leaf in enumerate(leaves):
            place = self._places[index]
            if not isinstance(place, _Rows):
                if not _same(place, leaf):
                    raise self._refusal(_what(leaf, length))
            elif place.fits(leaf, length):
                place.put(leaf)
            elif all(_same(rows, leaf) for rows in place.parts(self._lengths)):
                self._places[index] = leaf  # a table that was as long as the parts so far
            else:
                raise self._refusal(_what(leaf, length))
        self._lengths.append(length)

    def _place(self, leaf: Any, length: int) -> Any:
        """Return a place for the rows of all samples where the leaf has one for each, else the leaf."""
        is_rows = isinstance(leaf, torch.Tensor) and size_along(leaf, self._dim) == length
        return _Rows(leaf, self._n_samples, self._dim) if is_rows and not leaf.is_nested else leaf

    def whole(self) -> Any:
        """Return what there is for the whole batch."""
        length = self._lengths[0]
        if self._lengths == [length] * len(self._lengths) and _has_list(self._around, length):
            raise self._refusal(f"a list of {length} for {length} samples, which may be one for each of them")
        return self._structure.rebuild(
            [place.whole() if isinstance(place, _Rows) else place for place in self._places]
        )


class _Mark(int):
    """What stands for a leaf, and equals that of the same leaf of another part."""


class _Rows:
    """One tensor for the rows of all samples; or those of each part, where gradients are recorded."""

    def __init__(self, first: torch.Tensor, n_samples: int, dim: int) -> None:
        self._dim, self._n_done = dim, 0
        shape = [*first.shape[:dim], n_samples, *first.shape[dim + 1 :]]
        # Written into one tensor, every part's graph would depend on it. Concatenated, all is held twice.
        self._parts: list[torch.Tensor] | None = [] if first.requires_grad else None
        self._room = first.new_empty(0 if first.requires_grad else shape)
        self._rest = (shape[:dim], shape[dim + 1 :], first.dtype)

    def fits(self, leaf: Any, length: int) -> TypeGuard[torch.Tensor]:
        """Say whether a tensor has as many rows as a part has samples, each like those before."""
        return (
            isinstance(leaf, torch.Tensor)
            and size_along(leaf, self._dim) == length
            and self._rest == ([*leaf.shape[: self._dim]], [*leaf.shape[self._dim + 1 :]], leaf.dtype)
        )

    def put(self, leaf: torch.Tensor) -> None:
        length = leaf.size(self._dim)
        if self._parts is not None:
            self._parts.append(leaf)
        else:
            self._room.narrow(self._dim, self._n_done, length).copy_(leaf)
        self._n_done += length

    def parts(self, lengths: Sequence[int]) -> Sequence[torch.Tensor]:
        return cut(self._room, lengths, dim=self._dim) if self._parts is None else self._parts

    def whole(self) -> torch.Tensor:
        return self._room if self._parts is None else torch.cat(self._parts, self._dim)


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    return (
        isinstance(one, torch.Tensor)
        and isinstance(other, torch.Tensor)
        and not (one.is_nested or other.is_nested)
        and (one.shape, one.dtype, one.layout) == (other.shape, other.dtype, torch.strided)
        and torch.equal(one, other)
    )


def _differ(one: Any, other: Any) -> bool:
    # Without an `==` of its own, a container is equal to nothing but itself.
    kind: Any = type(one)
    try:
        return kind.__eq__ is not object.__eq__ and bool(one != other)
    except (RuntimeError, ValueError):  # arrays do not say yes or no
        return True


def _has_list(part: Any, length: int) -> bool:
    """Say whether there is a list or tuple of so many strings or numbers."""
    if isinstance(part, Mapping):
        return any(_has_list(value, length) for value in part.values())
    if not isinstance(part, (list, tuple)) or isinstance(part, torch.Size):
        return False
    values = (isinstance(v, (str, bytes, int, float, complex)) and not isinstance(v, _Mark) for v in part)
    return (len(part) == length and all(values)) or any(_has_list(value, length) for value in part)


def _what(leaf: Any, length: int) -> str:
    if not isinstance(leaf, torch.Tensor) or leaf.is_nested:
        return f"{type(leaf).__name__}, which cannot be put together from parts"
    return f"a tensor of shape {tuple(leaf.shape)} for {length} samples"
