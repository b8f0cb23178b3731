"""Loaders for tests that take some making."""

from typing import Any

from torch.utils.data import DataLoader, Dataset


def pinned_by_pytorch(dataset: Dataset[Any]) -> DataLoader[Any]:
    """Return a loader whose batches PyTorch goes on pinning: it has the thread for that from a bare pass."""
    loader: DataLoader[Any] = DataLoader(
        dataset, batch_size=None, num_workers=1, persistent_workers=True, pin_memory=True
    )
    next(iter(loader))
    return loader
