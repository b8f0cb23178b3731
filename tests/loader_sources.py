"""Loaders whose batches hold their own number, and the count of those that do not when a GPU reads them."""

import itertools
from collections.abc import Generator, Iterable, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

MS = 1_000_000
"""About half a millisecond of `torch.cuda._sleep` cycles on a GPU of 1.7 to 2 GHz."""


class Numbered(Dataset[list[torch.Tensor]]):
    """Batches of tensors of these shapes, which hold the number of their batch everywhere."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], n_batches: int) -> None:
        self._shapes, self._n_batches = shapes, n_batches

    def __len__(self) -> int:
        return self._n_batches

    def __getitem__(self, index: int) -> list[torch.Tensor]:
        return [torch.full(shape, float(index)) for shape in self._shapes]


class Fragile(Dataset[int]):
    """Ten numbers, of which 7 cannot be had."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> int:
        if index == 7:
            raise self._error
        return index


def failing(at: int) -> Generator[int, None, None]:
    """Fail in the place of one batch."""
    yield from range(at)
    raise LookupError("broken")


def pinned_by_pytorch(dataset: Dataset[Any]) -> DataLoader[Any]:
    """Return a loader whose batches PyTorch goes on pinning: it has the thread for that from a bare pass."""
    loader: DataLoader[Any] = DataLoader(
        dataset, batch_size=None, num_workers=1, persistent_workers=True, pin_memory=True
    )
    next(iter(loader))
    return loader


def wrong_leaves(batches: Iterable[list[torch.Tensor]], n_batches: int, *, sleep: int) -> torch.Tensor:
    """Count, on the GPU and with the host running ahead, the tensors that do not hold their batch's number.

    The count is on the GPU too, which may not have got there yet.
    """
    wrong = torch.zeros((), dtype=torch.long, device="cuda")
    numbers = itertools.count()  # enumerate would hold each batch until the next one
    for batch in batches:
        torch.cuda._sleep(sleep)
        number = next(numbers)
        for leaf in batch:
            wrong += (leaf != number).any()
        del batch, leaf
    assert next(numbers) == n_batches
    return wrong
