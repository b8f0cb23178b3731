"""What a `DeviceLoader` knows about the loaders it wraps."""

import gc
import os
import warnings
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, TypeGuard, TypeVar
from weakref import WeakKeyDictionary

from torch.utils.data import DataLoader, IterableDataset

from torchfast._bytes import MIB
from torchfast._loader.bundle import Bundling
from torchfast._loader.cpus import cpu_share, ranks_here
from torchfast._loader.dead_workers import survive_dead_workers

T = TypeVar("T")

FORWARDED = frozenset({
    "batch_sampler",
    "batch_size",
    "collate_fn",
    "dataset",
    "drop_last",
    "generator",
    "in_order",
    "multiprocessing_context",
    "num_workers",
    "persistent_workers",
    "pin_memory",
    "pin_memory_device",
    "prefetch_factor",
    "sampler",
    "timeout",
    "worker_init_fn",
})  # fmt: skip
"""The attributes that a `DeviceLoader` takes from the loader it wraps."""

OF_WORKERS = ("persistent_workers", "prefetch_factor", "timeout", "multiprocessing_context")
"""The options of `DataLoader` that it refuses without workers."""

MAX_WORKERS = 8
"""`from_dataset` starts no more by itself: each worker costs the memory of an interpreter and its batches."""

ROOM_OF_A_BATCH_BYTES = 256 * MIB
"""Shared memory that must be free for each batch that workers may make ahead; 256 float images are 154 MB."""


def is_instant(loader: object) -> bool:
    """Say whether the batches are all there: asking for one never keeps anybody waiting."""
    return type(loader) in (list, tuple)


def writes_afresh(loader: object) -> bool:
    """Say whether asking the loader for a batch surely leaves the memory of earlier ones alone."""
    return is_instant(loader) or (_iterates_as_pytorch(loader) and loader.num_workers > 0)


def is_pinned_by_us(loader: object) -> bool:
    """Say whether a `DataLoader` was told to pin its batches, and can be spared it.

    PyTorch's thread for that takes batches out of shared memory at once. Without it they wait there, so there
    must be room for those that the workers make ahead.
    """
    if not _iterates_as_pytorch(loader) or not loader.pin_memory:
        return False
    n_waiting = loader.num_workers * (loader.prefetch_factor or 0)
    return n_waiting == 0 or _shared_room_bytes() >= n_waiting * ROOM_OF_A_BATCH_BYTES


def _shared_room_bytes() -> int:
    try:
        where = os.statvfs("/dev/shm")  # noqa: S108 - no file of ours: where Linux keeps shared memory
    except (AttributeError, OSError):
        return 0
    return where.f_bavail * where.f_frsize // ranks_here()


def begun_for_gpu(loader: Iterable[Any], *, is_pinned_by_us: bool) -> Iterator[Any]:
    """Return the iterator of a loader whose batches go to a GPU.

    A `DataLoader` leaves pinning to us, and its workers, if they begin now, bundle what they send.
    """
    if not _iterates_as_pytorch(loader):
        return begun(loader)
    ours = dict[str, Any]()
    if is_pinned_by_us:
        ours["pin_memory"] = False
    if loader.num_workers:
        ours["collate_fn"] = Bundling(loader.collate_fn)
    return begun(_Seen(loader, ours))


class _Seen:
    """A `DataLoader` as its iterator sees it: with a few attributes of ours. All else is its own.

    So it is never changed, which somebody might see, or a subclass might not take well; nor copied, which one
    with a `__del__` or slots might not.
    """

    __iter__ = DataLoader.__iter__
    _get_iterator = DataLoader._get_iterator

    def __init__(self, loader: DataLoader[Any], ours: dict[str, Any]) -> None:
        vars(self).update(ours, _loader=loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self._loader, name, value)


def _iterates_as_pytorch(loader: object) -> TypeGuard[DataLoader[Any]]:
    """Say whether a loader is iterated over as PyTorch's own."""
    if not isinstance(loader, DataLoader):
        return False
    kind = type(loader)
    return kind.__iter__ is DataLoader.__iter__ and kind._get_iterator is DataLoader._get_iterator


_FROZEN_BY_PYTHON = min(gc.get_freeze_count(), 1000)
"""Python 3.12 freezes some objects of its own as it starts, 375 of them; more were frozen by somebody."""


def begun(loader: Iterable[Any]) -> Iterator[Any]:
    """Return the loader's iterator.

    Workers are forked with the garbage of this process. Were their collectors to find a CUDA event in it, its
    destructor would end them: so what there is by now is kept from them, and costs them no memory either.
    """
    if not getattr(loader, "num_workers", 0):
        return iter(loader)
    if gc.get_freeze_count() > _FROZEN_BY_PYTHON:
        gc.collect()  # quick, where somebody froze the rest; to unfreeze would undo that
        batches = iter(loader)
    else:
        gc.freeze()
        try:
            batches = iter(loader)
        finally:
            gc.unfreeze()
    survive_dead_workers(batches)
    return batches


def default_workers(dataset: object) -> int:
    """Return how many workers suit a dataset: each of several would go through an iterable one whole."""
    most = 1 if isinstance(dataset, IterableDataset) else MAX_WORKERS
    return max(0, min(most, cpu_share() - 1))


_users: "WeakKeyDictionary[object, weakref.ref[Any]]" = WeakKeyDictionary()


def replace_user(loader: object, user: T, /) -> T | None:
    """Make `user` the one that uses a loader's workers, if these stay; return who was, if another."""
    if not (isinstance(loader, DataLoader) and getattr(loader, "persistent_workers", False)):
        return None
    last = _users.get(loader, lambda: None)()
    _users[loader] = weakref.ref(user)
    return None if last is user else last


def warn_of_lost_workers(loader: object, stacklevel: int) -> None:
    n_workers = getattr(loader, "num_workers", 0)
    if n_workers and not getattr(loader, "persistent_workers", True):
        warnings.warn(
            f"this loader ends its {n_workers} worker(s) after each epoch and starts new ones, which takes "
            "seconds an epoch and loses what their datasets have cached. "
            "Build it with DataLoader(..., persistent_workers=True), or with DeviceLoader.from_dataset.",
            UserWarning,
            stacklevel=stacklevel,
        )


def looks_ahead(loader: object) -> bool:
    """Say whether the loader looks a batch ahead to know the last one, as accelerate's do."""
    return hasattr(loader, "base_dataloader") and hasattr(loader, "end_of_dataloader")


def base_of(loader: Any) -> Any:
    """Return what such a loader is around, and not the `DeviceLoader` that stands there during a pass."""
    base = loader.base_dataloader
    return base.loader if getattr(base, "stands_in", False) else base


def through(loader: Any, inner: Iterable[Any]) -> Iterator[Any]:
    """Iterate over such a loader with its own source replaced, for the time of the pass.

    What it does around each batch, above all telling the last one, then happens when the batch is handed out.
    """
    base = base_of(loader)
    loader.base_dataloader = inner
    try:
        yield from loader
    finally:
        loader.base_dataloader = base


def takes_epochs(loader: object) -> Any:
    """Return the first of the loader, its samplers and its dataset that has a `set_epoch`, or None."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    parts: tuple[Any, ...] = (
        loader,
        getattr(loader, "sampler", None),
        batch_sampler,
        getattr(batch_sampler, "sampler", None),
        getattr(loader, "dataset", None),
    )
    return next((part for part in parts if hasattr(part, "set_epoch")), None)
