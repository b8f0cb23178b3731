"""A loader with workers, fed by a thread: breaks, errors, and what workers are forked with."""

import gc
import subprocess
import sys
import weakref
from typing import Any, ClassVar

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset, dataloader

from tests.loader_sources import Fragile
from tests.loader_transport import copying_threads, threaded
from torchfast import DeviceLoader
from torchfast._loader.wrapped import begun, begun_for_gpu, is_pinned_by_us, writes_afresh


def test_breaks_with_workers_lose_no_batch() -> None:
    """A hundred early breaks with persistent workers, through the thread, lose no batch of the next pass."""
    dataset = TensorDataset(torch.arange(24))
    loader = threaded(DataLoader(dataset, batch_size=2, num_workers=2, persistent_workers=True))
    for _ in range(100):
        for (batch,) in loader:
            assert batch.tolist() == [0, 1]
            break
    assert torch.cat([batch for (batch,) in loader]).tolist() == list(range(24))
    assert copying_threads() == 0


def test_a_second_pass_steals_nothing_from_workers_that_persist() -> None:
    """A pass begun while another is open is whole, though they would share workers: the first is closed."""
    dataset = TensorDataset(torch.arange(24))
    loader = threaded(DataLoader(dataset, batch_size=2, num_workers=2, persistent_workers=True))
    check_that_a_pass_takes_over(loader, loader)


def check_that_a_pass_takes_over(open_one: DeviceLoader[Any], new_one: DeviceLoader[Any]) -> None:
    """Begin a pass over 24 numbers while another is open: that one is closed, the new one whole."""
    first = iter(open_one)
    next(first)
    with pytest.warns(RuntimeWarning, match="new pass .* or over the workers of its loader"):
        second = iter(new_one)
    assert torch.cat([batch for (batch,) in second]).tolist() == list(range(24))
    with pytest.raises(RuntimeError, match="was closed"):
        next(first)


class Announcing(DataLoader[Any]):
    """A loader with an `__iter__` of its own, as many have."""

    def __iter__(self) -> Any:
        self.is_begun = True
        return super().__iter__()


@pytest.mark.parametrize("kind", [DataLoader, Announcing])
def test_another_loader_around_the_same_workers_steals_nothing_either(kind: type[DataLoader[Any]]) -> None:
    """It is whole, and the pass that had the workers before is closed; without workers both are whole."""
    dataset = TensorDataset(torch.arange(24))
    workers = kind(dataset, batch_size=2, num_workers=1, persistent_workers=True)
    one, another = threaded(workers), threaded(workers)
    check_that_a_pass_takes_over(one, another)
    for loader in (another, one, one):
        assert torch.cat([batch for (batch,) in loader]).tolist() == list(range(24))
    alone = DataLoader(dataset, batch_size=2)
    pairs = zip(DeviceLoader(alone, "cpu"), DeviceLoader(alone, "cpu"), strict=True)
    assert [int(batch[0]) for (batch,), _ in pairs] == [*range(0, 24, 2)]


def test_errors_of_workers_come_in_their_place() -> None:
    """An error in a worker arrives at its own batch, with the worker's traceback, and the pass goes on."""
    loader = threaded(DataLoader(Fragile(LookupError("sample 7 is broken")), batch_size=2, num_workers=2))
    batches = iter(loader)
    assert [next(batches).tolist() for _ in range(3)] == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(LookupError, match="sample 7 is broken"):
        next(batches)
    assert [batch.tolist() for batch in batches] == [[8, 9]]


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator")
def test_a_loader_that_is_begun_without_pinning_is_never_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who looks at it while its iterator is made, as a sampler may, finds what it was told."""
    told, make = list[tuple[bool, bool]](), dataloader._SingleProcessDataLoaderIter.__init__

    def made(epoch: Any, asked: Any) -> None:
        told.append((asked.pin_memory, loader.pin_memory))
        make(epoch, asked)

    monkeypatch.setattr(dataloader._SingleProcessDataLoaderIter, "__init__", made)
    loader: DataLoader[Any] = DataLoader(TensorDataset(torch.arange(4)), pin_memory=True)
    usual = dict(vars(loader))
    assert len(list(begun_for_gpu(loader, is_pinned_by_us=True))) == 4
    assert len(list(begun(loader))) == 4
    assert told == [(False, True), (True, True)]
    assert vars(loader) == usual


class Counting(DataLoader[Any]):
    """Keeps state of its own, some of it in a slot, counts its passes, and tells when it goes."""

    __slots__ = ("rest",)
    gone: ClassVar = list[None]()

    def __init__(self, dataset: Dataset[Any], rest: int, **options: Any) -> None:
        super().__init__(dataset, **options)
        self.rest, self.n_passes = rest, 0

    @property
    def _index_sampler(self) -> Any:
        self.n_passes += 1
        return [[index] for index in range(self.rest)]

    def __del__(self) -> None:
        self.gone.append(None)


@pytest.mark.parametrize("n_workers", [0, 1])
def test_subclasses_with_state_of_their_own_are_asked_themselves(n_workers: int) -> None:
    """No copy of them is, which would lack their slots, forget what changes, and go as if they went."""
    loader = Counting(TensorDataset(torch.arange(4)), 3, num_workers=n_workers)
    Counting.gone.clear()
    for n_passes in range(1, 3):
        assert len(list(begun_for_gpu(loader, is_pinned_by_us=True))) == 3
        assert loader.n_passes >= n_passes
    assert Counting.gone == []


def test_workers_that_stay_are_the_loaders_own() -> None:
    """A second pass, ours or a bare one, goes on with them; so a loader can end them, too."""
    loader = DataLoader(TensorDataset(torch.arange(4)), num_workers=1, persistent_workers=True)
    first = begun_for_gpu(loader, is_pinned_by_us=False)
    assert len(list(first)) == 4
    again = [iter(loader), begun_for_gpu(loader, is_pinned_by_us=False)]
    assert [one is first for one in again] == [True, True]
    assert len(list(again[-1])) == 4


class OddIteration(DataLoader[Any]):
    """Iterates in a way of its own."""

    def __iter__(self) -> Any:
        return super().__iter__()


class OddAttribute(DataLoader[Any]):
    """Says by itself whether it pins."""

    pin_memory = property(lambda _: True, lambda *_: None)


class OddIterator(DataLoader[Any]):
    """Has an iterator of its own."""

    def _get_iterator(self) -> Any:
        return super()._get_iterator()


def test_only_loaders_that_iterate_as_pytorchs_do_are_taken_at_their_word() -> None:
    """A subclass with an iterator of its own may use its memory again, and pins as it likes."""
    numbers = TensorDataset(torch.arange(4))
    plain: DataLoader[Any] = DataLoader(numbers, num_workers=1, pin_memory=True)
    alone: DataLoader[Any] = DataLoader(numbers, pin_memory=True)
    bare: DataLoader[Any] = DataLoader(numbers)
    told = OddAttribute(numbers, num_workers=1, pin_memory=False)
    odd = [kind(numbers, num_workers=1, pin_memory=True) for kind in (OddIteration, OddIterator)]
    fresh: list[Any] = [[], (), plain, told]
    reused: list[Any] = [iter([]), alone, bare, *odd]
    assert [writes_afresh(loader) for loader in fresh + reused] == [True] * 4 + [False] * 5
    unpinned: list[Any] = [[], (), iter([]), bare, *odd]
    assert [is_pinned_by_us(loader) for loader in [plain, alone, told, *unpinned]] == [True] * 3 + [False] * 6


@pytest.mark.parametrize("room_bytes", [2**26, 2 * 2**30 - 1, 2 * 2**30])
def test_pytorch_pins_where_shared_memory_is_scarce(room_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thread takes batches out of shared memory at once: with 256 MiB for each they can wait there."""

    class Room:
        f_bavail, f_frsize = room_bytes, 1

    monkeypatch.setattr("os.statvfs", lambda _: Room)
    numbers = TensorDataset(torch.arange(4))
    loader: DataLoader[Any] = DataLoader(numbers, num_workers=2, prefetch_factor=4, pin_memory=True)
    assert is_pinned_by_us(loader) is (room_bytes >= 2 * 2**30)
    assert is_pinned_by_us(DataLoader(numbers, pin_memory=True))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert not is_pinned_by_us(loader)
    monkeypatch.delattr("os.statvfs")
    assert not is_pinned_by_us(DataLoader(numbers, num_workers=2, pin_memory=True))


class Collecting(Dataset[int]):
    """Collects garbage in its worker, and says what of it was marked."""

    found: list[weakref.ref[Any]] = []  # noqa: RUF012 - the workers' own, by being forked

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        gc.collect()
        return sum(reference() is None for reference in self.found)


def test_garbage_is_left_alone_in_workers() -> None:
    """What was garbage when workers were forked is not destroyed there: CUDA events could not be."""

    class Knot:
        def __init__(self) -> None:
            self.itself = self

    gc.collect()
    gc.disable()
    try:
        Collecting.found.append(weakref.ref(Knot()))
        loader = DataLoader(Collecting(), num_workers=1, multiprocessing_context="fork")
        (n_destroyed,) = DeviceLoader(loader, "cpu")
        assert n_destroyed == 0
        (n_destroyed,) = loader
        assert n_destroyed == 1
    finally:
        gc.enable()
        Collecting.found.clear()


def test_what_was_frozen_before_the_import_stays_frozen() -> None:
    """Only what Python itself freezes as it starts is taken for nobody's."""
    script = """
import gc
import torch
gc.freeze()
n_frozen = gc.get_freeze_count()
from torchfast import DeviceLoader
assert len(list(DeviceLoader(torch.utils.data.DataLoader(range(3), num_workers=1), "cpu"))) == 3
assert gc.get_freeze_count() > n_frozen / 2 > 0
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_what_the_user_froze_stays_frozen(quick_collections: None) -> None:  # noqa: ARG001 - it freezes
    """Where objects are frozen already, beginning a pass lets none of them go."""
    n_frozen = gc.get_freeze_count()
    loader = DataLoader(Collecting(), num_workers=1)
    assert list(DeviceLoader(loader, "cpu")) == [0]
    assert gc.get_freeze_count() > n_frozen / 2 > 0  # some of them have ended by themselves
