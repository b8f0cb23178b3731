"""What a DeviceLoader tells of its loader's state, and how it goes along with loaders that look ahead."""

import functools
import itertools
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from tests.loader_transport import HostTransport, threaded, until
from torchfast import DeviceLoader
from torchfast._loader.epoch import Epoch, InlineFeed
from torchfast._loader.feed import ThreadedFeed
from torchfast._loader.stats import Tally

Make = Callable[..., DeviceLoader[Any]]


@pytest.fixture(params=[functools.partial(DeviceLoader, device="cpu"), threaded], ids=["inline", "ahead"])
def make(request: pytest.FixtureRequest) -> Make:
    """Return what makes a DeviceLoader: one that loads batch by batch, and one that loads ahead."""
    made: Make = request.param
    return made


class Stateful:
    """A loader that counts the batches it has made, in its state."""

    def __init__(self) -> None:
        self.n_made = 0

    def __iter__(self) -> Iterator[int]:
        while self.n_made < 10:
            self.n_made += 1
            yield self.n_made

    def state_dict(self) -> dict[str, int]:
        """Return how many batches were made."""
        return {"n_made": self.n_made}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after so many."""
        self.n_made = state["n_made"]


class Rewinding(Stateful):
    """One that begins anew when it has ended."""

    def __iter__(self) -> Iterator[int]:
        yield from super().__iter__()
        self.n_made = 0


class Given(Stateful):
    """One whose state is what a test wants."""

    state: Any = None

    def state_dict(self) -> Any:
        """Return it, or raise it."""
        if isinstance(self.state, Exception):
            raise self.state
        return self.state


def test_on_the_cpu_a_state_is_read_once_a_batch_at_most() -> None:
    """Where something is done to each batch, for which it may be put back; else not before somebody asks."""

    class Counted(Stateful):
        n_read = 0

        def state_dict(self) -> dict[str, int]:
            self.n_read += 1
            return super().state_dict()

    def n_read(**options: Any) -> int:
        loader = Counted()
        assert list(DeviceLoader(loader, "cpu", **options)) == [*range(1, 11)]
        return loader.n_read

    assert n_read() == 0
    assert n_read(transform=lambda batch: batch) <= 12


class Heavy:
    """An object that moves itself, if there is room."""

    room = True

    def __init__(self, number: int) -> None:
        self.number = number

    def to(self, _: torch.device) -> "Heavy":
        """Move, or find no room."""
        if not self.room:
            raise torch.OutOfMemoryError
        return self


def test_a_batch_that_found_no_room_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """On other accelerators than CUDA, once there is room; the state is that before it until then."""
    loader = Stateful()
    source = map(Heavy, iter(loader))
    feed = InlineFeed(source, torch.device("meta"), Tally(), loader.state_dict)
    epoch: Epoch[Heavy] = Epoch(feed, None, owner=None)
    assert next(epoch).number == 1
    monkeypatch.setattr(Heavy, "room", False)
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            next(epoch)
        assert feed.state == {"n_made": 1}
    monkeypatch.setattr(Heavy, "room", True)
    assert [next(epoch).number, feed.state["n_made"]] == [2, 2]
    assert [batch.number for batch in epoch] == [*range(3, 11)]


def test_state_follows_delivery_not_loading() -> None:
    """A loader that runs ahead has the state of the batch handed out last, and resuming goes on there."""
    loader = Stateful()
    snapshot = loader.state_dict
    feed = ThreadedFeed(iter(loader), HostTransport(), Tally(), depth=3, snapshot=snapshot)
    epoch: Epoch[int] = Epoch(feed, None, owner=None)
    assert feed.state == {"n_made": 0}
    assert [next(epoch), next(epoch)] == [1, 2]
    until(lambda: len(feed._work.ready) >= 3)
    assert feed.state == {"n_made": 2}
    state = feed.state
    epoch.close()
    resumed = DeviceLoader(Stateful(), "cpu")
    resumed.load_state_dict(state)
    assert list(resumed) == list(range(3, 11))
    assert resumed.state_dict() == {"n_made": 10}


def test_state_after_an_early_break_is_that_of_the_last_batch() -> None:
    """Leaving the loop does not make the state jump ahead to what was loaded for nothing."""
    loader: Any = threaded(Stateful(), depth=3)
    for batch in loader:
        if batch == 2:
            break
    assert loader.state_dict() == {"n_made": 2}
    loader.load_state_dict({"n_made": 7})
    assert loader.state_dict() == {"n_made": 7}
    assert list(loader) == [8, 9, 10]


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, KeyboardInterrupt])
def test_state_does_not_count_what_the_transform_is_to_be_given_again(
    kind: type[BaseException], make: Make
) -> None:
    """Saved after an interrupt or out of memory in a transform, the state resumes at that very batch."""
    errors = [kind("in the middle")]

    def transform(batch: int) -> int:
        if batch == 3 and errors:
            assert next(batches) == 4  # a transform may take batches itself
            raise errors.pop()
        return batch

    loader: DeviceLoader[int] = make(Stateful(), transform=transform)
    batches = iter(loader)
    assert [next(batches), next(batches)] == [1, 2]
    with pytest.raises(kind):
        next(batches)
    assert loader.state_dict() == {"n_made": 2}
    assert next(batches) == 3
    assert loader.state_dict() == {"n_made": 3}
    assert list(batches) == [4, 5, 6, 7, 8, 9, 10]
    assert loader.state_dict() == {"n_made": 10}


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
@pytest.mark.parametrize("n_workers", [0, 2])
def test_torchdatas_stateful_loader_resumes_where_the_loop_was(n_workers: int, make: Make) -> None:
    """A StatefulDataLoader's state through a DeviceLoader is that of the last batch, and resumes after it."""
    stateful = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
    dataset = TensorDataset(torch.arange(24))

    def loader() -> DeviceLoader[Any]:
        made: DeviceLoader[Any] = make(stateful(dataset, batch_size=3, num_workers=n_workers))
        return made

    first = loader()
    batches = iter(first)
    assert [next(batches)[0].tolist() for _ in range(3)] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    state = first.state_dict()
    first.close()
    resumed = loader()
    resumed.load_state_dict(state)
    assert torch.cat([batch for (batch,) in resumed]).tolist() == list(range(9, 24))


def test_a_loader_without_state_has_none() -> None:
    """Whoever asks by hasattr whether there is a state is told the truth."""
    assert not hasattr(DeviceLoader([1], "cpu"), "state_dict")
    assert hasattr(DeviceLoader(Stateful(), "cpu"), "load_state_dict")


def test_state_at_the_end_is_the_end_though_the_last_batches_came_again(make: Make) -> None:
    """A transform that takes batches runs out of memory at the last ones: after all, the pass is over."""
    errors = [torch.OutOfMemoryError("full")]

    def four(batch: int) -> Any:
        if batch % 4 != 1:
            return batch
        group = [batch, *itertools.islice(batches, 3)]
        if len(group) < 4 and errors:
            raise errors.pop()
        return group

    loader: DeviceLoader[Any] = make(Rewinding(), transform=four)
    batches = iter(loader)
    assert [next(batches), next(batches)] == [[1, 2, 3, 4], [5, 6, 7, 8]]
    with pytest.raises(torch.OutOfMemoryError):
        next(batches)
    assert loader.state_dict() == {"n_made": 8}
    assert list(batches) == [[9, 10]]
    assert loader.state_dict() == {"n_made": 0}


def test_a_state_that_cannot_be_had_troubles_only_who_asks(make: Make) -> None:
    """A loop that does not save it goes on, whatever it is."""
    for state, error in ((NotImplementedError("none"), "none"), ({"lock": threading.Lock()}, "pickle")):
        source = Given()
        source.state = state
        loader: DeviceLoader[int] = make(source)
        assert list(loader) == list(range(1, 11))
        with pytest.raises(Exception, match=error):
            loader.state_dict()


def test_the_state_is_a_copy_and_each_time_a_new_one() -> None:
    """Neither the loader nor who asked can change it; what cannot be pickled is copied otherwise."""
    for kept in ([1], lambda: 1):
        source = Given()
        source.state = {"kept": kept, "numbers": [1]}
        loader: DeviceLoader[int] = threaded(source)
        batches = iter(loader)
        next(batches)
        feed: Any = loader._feed
        until(feed._work.ready.__len__)
        source.state["numbers"][0] = 2
        loader.state_dict()["numbers"].append(3)
        assert loader.state_dict()["numbers"] == [1]
        loader.close()


def test_a_loader_with_a_state_has_its_methods_on_the_class() -> None:
    """So that protocols find them, as that of PyTorch's distributed checkpoints does; others have none."""

    class Mine(DeviceLoader[int]):
        pass

    for kind in (DeviceLoader, Mine):
        loader = kind(Stateful(), "cpu")
        assert isinstance(loader, Resumable)
        assert isinstance(loader, kind)
        assert type(loader).__name__ == kind.__name__
        assert not isinstance(kind([1], "cpu"), Resumable)


@runtime_checkable
class Resumable(Protocol):
    """What can be saved and put back."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put it back."""


def test_the_state_is_loaded_by_its_name_too() -> None:
    """The parameter is called as that of torchdata's loader is."""
    loader = DeviceLoader(Stateful(), "cpu")
    loader.load_state_dict(state_dict={"n_made": 8})
    assert list(loader) == [9, 10]


# --- loaders that look a batch ahead ---------------------------------------------------------------------


def test_the_last_batch_of_an_accelerate_loader_is_known_as_the_last() -> None:
    """A loader prepared by accelerate says that it is at its end exactly while the last batch is in use."""
    accelerate = pytest.importorskip("accelerate.data_loader")
    from torch.utils.data import BatchSampler, SequentialSampler

    dataset = TensorDataset(torch.arange(10))
    sampler = BatchSampler(SequentialSampler(dataset), 4, drop_last=False)
    prepared = accelerate.DataLoaderShard(dataset, batch_sampler=sampler)
    source = prepared.base_dataloader
    loader = DeviceLoader(prepared, "cpu")
    for _ in range(2):
        ends = [(batch.tolist(), prepared.end_of_dataloader) for (batch,) in loader]
        assert ends == [([0, 1, 2, 3], False), ([4, 5, 6, 7], False), ([8, 9], True)]
        assert prepared.base_dataloader is source
    for _ in loader:
        break
    assert prepared.base_dataloader is source


class LooksAhead:
    """A loader that looks a batch ahead, as accelerate's prepared ones do."""

    def __init__(self, base: Any) -> None:
        self.base_dataloader = base
        self.end_of_dataloader = False

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.base_dataloader)
        current = next(batches, None)
        while current is not None:
            following = next(batches, None)
            self.end_of_dataloader = following is None
            yield current
            current = following

    def state_dict(self) -> Any:
        """Return the state of what it is around, which need not have one."""
        return self.base_dataloader.state_dict()


def test_passes_over_one_loader_that_looks_ahead_leave_it_as_it_was() -> None:
    """Two DeviceLoaders around it, one made and begun in the midst of the other's pass, put its own back."""
    source = [1, 2, 3]
    prepared = LooksAhead(source)
    first = DeviceLoader(prepared, "cpu")
    batches = iter(first)
    assert next(batches) == 1
    second = DeviceLoader(prepared, "cpu")
    assert second._inner is not None
    assert second._inner.loader is source
    others = iter(second)
    assert next(others) == 1
    first.close()
    assert [*others] == [2, 3]
    assert prepared.base_dataloader is source
    other_source = prepared.base_dataloader = [4]
    list(first)
    assert prepared.base_dataloader is other_source


def test_a_loader_that_looks_ahead_has_a_state_if_what_it_is_around_has_one() -> None:
    """Those of accelerate have the methods in any case; during a pass the answer is the same."""
    for source, has_state in ((Stateful(), True), ([1, 2, 3], False)):
        loader = DeviceLoader(LooksAhead(source), "cpu", transform=lambda batch: batch)
        assert hasattr(loader, "state_dict") is has_state
        for _ in loader:
            assert hasattr(loader, "state_dict") is has_state


def test_lost_workers_of_a_loader_that_looks_ahead_are_told_of_once() -> None:
    """The loader that stands in it keeps still."""
    base = DataLoader(TensorDataset(torch.arange(4)), num_workers=1)
    prepared: Any = LooksAhead(base)
    prepared.num_workers, prepared.persistent_workers = 1, False
    loader = DeviceLoader(prepared, "cpu")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(3):
            list(loader)
    places = [warning.filename for warning in told if "persistent_workers=True" in str(warning.message)]
    assert places == [__file__]
