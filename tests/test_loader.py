"""DeviceLoader on the CPU: the same contract as on a GPU, with batches passed through."""

import gc
import inspect
import os
import re
import subprocess
import sys
import textwrap
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, TensorDataset

from tests.loader_transport import threaded
from torchfast import DeviceLoader
from torchfast._loader import cpus
from torchfast._loader.loader import OPTIONS
from torchfast._loader.wrapped import FORWARDED


class Pids(Dataset[int]):
    """Each sample is the process that made it."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        return os.getpid()


class Fragile(Dataset[torch.Tensor]):
    """Fails at one index."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == 7:
            raise LookupError(f"sample {index} is broken")
        return torch.tensor(index)


def numbers(n: int = 10, **options: Any) -> DataLoader[Any]:
    """Return a loader of the numbers from 0."""
    return DataLoader(TensorDataset(torch.arange(float(n))), **{"batch_size": 3, **options})


def test_batches_come_in_order_and_number() -> None:
    """The same batches in the same order, in each epoch, and the same length."""
    loader = DeviceLoader(numbers(), "cpu")
    for _ in range(2):
        assert [batch.tolist() for (batch,) in loader] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]
    assert len(loader) == 4


@given(st.lists(st.lists(st.one_of(st.integers(), st.text(), st.none()), max_size=3), max_size=5))
def test_batches_without_tensors_pass_through(batches: list[Any]) -> None:
    """What holds no tensor arrives as it was; an empty loader yields nothing."""
    assert list(DeviceLoader(batches, "cpu")) == batches


def test_shuffling_draws_the_same_random_numbers() -> None:
    """A shuffled loader yields the order that it yields bare, and leaves the same random state."""
    torch.manual_seed(4)
    ahead = [batch.tolist() for (batch,) in DeviceLoader(numbers(shuffle=True), "cpu")] + [
        torch.rand(1).item()
    ]
    torch.manual_seed(4)
    bare = [batch.tolist() for (batch,) in numbers(shuffle=True)] + [torch.rand(1).item()]
    assert ahead == bare


def test_workers_are_the_same_processes_in_the_second_epoch() -> None:
    """With from_dataset the workers of epoch 2 are those of epoch 1."""
    loader: DeviceLoader[Any] = DeviceLoader.from_dataset(Pids(), "cpu", batch_size=1, num_workers=2)
    first, second = ({int(pid) for pid in loader} for _ in range(2))
    assert first == second
    assert os.getpid() not in first


def test_from_dataset_chooses_settings_and_takes_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers persist and prefetch by default; whatever DataLoader takes can be given, on one CPU too."""
    loader: DeviceLoader[Any] = DeviceLoader.from_dataset(
        Pids(), "cpu", batch_size=4, num_workers=2, prefetch_factor=3, drop_last=True
    )
    assert (loader.persistent_workers, loader.prefetch_factor, loader.drop_last) == (True, 3, True)
    loader = DeviceLoader.from_dataset(Pids(), "cpu", batch_size=4, num_workers=2)
    assert (loader.persistent_workers, loader.prefetch_factor, loader.drop_last) == (True, 4, False)
    monkeypatch.setattr("torchfast._loader.wrapped.cpu_share", lambda: 1)
    assert DeviceLoader.from_dataset(Pids(), "cpu", batch_size=4).num_workers == 0
    loader = DeviceLoader.from_dataset(Pids(), "cpu", batch_size=4, prefetch_factor=2)
    assert (loader.num_workers, loader.prefetch_factor) == (1, 2)
    for option in ({"timeout": 9}, {"multiprocessing_context": "spawn"}, {"persistent_workers": True}):
        loader = DeviceLoader.from_dataset(Pids(), "cpu", batch_size=4, **option)
        assert loader.num_workers == 1
    monkeypatch.undo()
    assert DeviceLoader.from_dataset(Pids(), "cpu", batch_size=4).num_workers < (os.cpu_count() or 1)


def test_from_dataset_knows_every_option() -> None:
    """What the constructor takes by name goes there, and not to the DataLoader."""
    parameters = inspect.signature(DeviceLoader.__init__).parameters.values()
    assert {one.name for one in parameters if one.kind is one.KEYWORD_ONLY} == OPTIONS


class Stream(IterableDataset[int]):
    """Twelve numbers, one after another."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(12))


def test_from_dataset_yields_each_sample_of_a_stream_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the CPUs, an iterable dataset gets one worker: each of several would yield all of it."""
    monkeypatch.setattr("torchfast._loader.wrapped.cpu_share", lambda: 6)
    loader = DeviceLoader.from_dataset(Stream(), "cpu", batch_size=4)
    assert torch.cat(list(loader)).tolist() == list(range(12))
    assert loader.num_workers == 1


def test_workers_are_as_many_as_the_cpus_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    """One CPU is left to the loop, at most eight workers are started, and none where there is one CPU."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(64))  # PyTorch warns of more workers
    found = []
    for n_cpus in (1, 2, 6, 64):
        monkeypatch.setattr("torchfast._loader.wrapped.cpu_share", lambda n_cpus=n_cpus: n_cpus)
        found.append(DeviceLoader.from_dataset(Pids(), "cpu", batch_size=4).num_workers)
    assert found == [0, 1, 5, 8]


@pytest.mark.parametrize(
    ("files", "n_cpus"),
    [
        ({}, 16),
        ({"cpu.max": "max 100000"}, 16),
        ({"cpu.max": "350000 100000"}, 3),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 16),
        ({"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4),
        ({"cpu.max": "nonsense"}, 16),
    ],
)
def test_a_containers_grant_of_cpus_counts(
    files: dict[str, str], n_cpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container's limit on CPU time counts as CPUs, in either form of its files."""
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(cpus, "CGROUPS", tmp_path)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(16))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert cpus.cpu_share() == n_cpus


def test_an_error_comes_at_its_own_batch_with_its_traceback() -> None:
    """A failing sample is raised when its batch is taken, from the line that failed, and the pass goes on."""
    batches = iter(DeviceLoader(DataLoader(Fragile(), batch_size=3), "cpu"))
    assert [next(batches).tolist() for _ in range(2)] == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(LookupError, match="sample 7 is broken") as error:
        next(batches)
    assert "__getitem__" in "".join(traceback.format_exception(error.value))
    assert next(batches).tolist() == [9, 10, 11]


def test_a_break_loses_no_batch_of_the_next_epoch() -> None:
    """After an early break with persistent workers the next epoch is whole, ten times over."""
    loader = DeviceLoader(numbers(40, num_workers=2, persistent_workers=True), "cpu")
    for _ in range(10):
        for (batch,) in loader:
            assert batch[0] == 0
            break
        assert torch.cat([batch for (batch,) in loader]).tolist() == list(range(40))


def test_a_second_pass_closes_the_first() -> None:
    """Two passes at a time are refused audibly: the first is closed with a warning, and says so when used."""
    loader = DeviceLoader(numbers(), "cpu")
    first = iter(loader)
    next(first)
    with pytest.warns(RuntimeWarning, match="new pass") as warned:
        second = iter(loader)
    assert warned[0].filename == __file__
    with pytest.raises(RuntimeError, match="was closed"):
        next(first)
    assert len(list(second)) == 4
    assert list(second) == []


def test_a_pass_that_another_thread_closes_does_not_look_complete() -> None:
    """On the CPU too, closing is told of as such, and not taken for the end."""

    def batches() -> Iterator[int]:
        yield 1
        closing = threading.Thread(target=loader.close)
        closing.start()
        closing.join()

    loader = DeviceLoader(batches(), "cpu")
    pass_ = iter(loader)
    assert next(pass_) == 1
    with pytest.raises(RuntimeError, match="was closed"):
        next(pass_)


def test_a_failed_or_dropped_pass_is_closed_quietly() -> None:
    """Beginning anew after an error, or after the iterator is gone, is nothing to warn of."""
    loader = DeviceLoader(DataLoader(Fragile(), batch_size=12), "cpu")
    batches = iter(loader)
    with pytest.raises(LookupError):
        next(batches)
    again = iter(loader)
    del again
    gc.collect()
    with pytest.raises(LookupError):
        next(iter(loader))


def test_a_pass_whose_transform_failed_is_closed_quietly() -> None:
    """So is one that ended in an error of the loop's own transform, though somebody holds its iterator."""
    loader: DeviceLoader[Any] = DeviceLoader(["3", "four"], "cpu", transform=int)
    batches = iter(loader)
    assert next(batches) == 3
    with pytest.raises(ValueError, match="four"):
        next(batches)
    assert next(iter(loader)) == 3


def test_attributes_are_forwarded_by_a_stated_list() -> None:
    """What is in FORWARDED comes from the loader; anything else is refused with the way to it."""
    bare = numbers(num_workers=0, drop_last=True)
    loader = DeviceLoader(bare, "cpu")
    for name in FORWARDED & set(dir(bare)):
        assert getattr(loader, name) is getattr(bare, name)
    assert FORWARDED & set(dir(bare)) <= set(dir(loader))
    assert not hasattr(loader, "check_worker_number_rationality")
    with pytest.raises(TypeError, match="len"):
        len(DeviceLoader((batch for batch in [1]), "cpu"))


def test_the_guide_lists_what_is_forwarded() -> None:
    """The attributes that the guide names are those that are forwarded."""
    guide = (Path(__file__).parent.parent / "docs" / "device_loader.md").read_text()
    section = guide.split("## What is forwarded")[1].split("those of the wrapped loader")[0]
    assert set(re.findall(r"`(\w+)`", section)) == FORWARDED


def test_a_tokenizers_batch_stays_one() -> None:
    """A BatchEncoding arrives as one, with the attributes of the one that was loaded."""
    transformers = pytest.importorskip("transformers")
    batch = transformers.BatchEncoding({"input_ids": torch.ones(2, 3), "text": ["a", "b"]}, n_sequences=1)
    (there,) = DeviceLoader([batch], "cpu", transform=lambda batch: batch)
    assert type(there) is transformers.BatchEncoding
    assert (there.n_sequences, there["text"]) == (1, ["a", "b"])
    assert torch.equal(there["input_ids"], batch["input_ids"])


def test_a_transform_runs_in_the_loops_thread_in_order() -> None:
    """Where a thread loads ahead, the transform is called by the loop, batch by batch as it takes them."""
    calls: list[tuple[int, threading.Thread]] = []

    def transform(batch: int) -> int:
        calls.append((batch, threading.current_thread()))
        return batch

    for number, _ in enumerate(threaded(range(6), transform=transform)):
        assert calls == [(batch, threading.current_thread()) for batch in range(number + 1)]


def test_set_epoch_reaches_whatever_wants_it() -> None:
    """The epoch's number reaches a sampler, or the loader itself; where nobody wants it nothing happens."""
    dataset = TensorDataset(torch.arange(8))
    sampler: DistributedSampler[Any] = DistributedSampler(dataset, num_replicas=2, rank=0)
    DeviceLoader(DataLoader(dataset, sampler=sampler), "cpu").set_epoch(5)
    assert sampler.epoch == 5
    batch_sampler = torch.utils.data.BatchSampler(sampler, 2, drop_last=False)
    DeviceLoader(DataLoader(dataset, batch_sampler=batch_sampler), "cpu").set_epoch(6)
    assert sampler.epoch == 6
    DeviceLoader([1, 2], "cpu").set_epoch(7)


def test_ranks_share_an_epoch_and_reshuffle_it() -> None:
    """Two ranks' loaders cover the dataset between them, and set_epoch gives both another common order."""
    dataset = TensorDataset(torch.arange(16))
    loaders = [
        DeviceLoader(DataLoader(dataset, batch_size=4, sampler=DistributedSampler(dataset, 2, rank)), "cpu")
        for rank in range(2)
    ]
    orders = []
    for epoch in range(2):
        for loader in loaders:
            loader.set_epoch(epoch)
        orders.append([torch.cat([batch for (batch,) in loader]).tolist() for loader in loaders])
        assert sorted([*orders[-1][0], *orders[-1][1]]) == list(range(16))
    assert orders[0] != orders[1]


def test_channels_last_comes_before_the_transform() -> None:
    """Images are laid out channels last, other leaves left alone, and the transform sees the result."""
    batch: dict[str, Any] = {"image": torch.randn(2, 3, 8, 8), "label": torch.arange(2), "name": ["a", "b"]}

    def transform(batch: dict[str, Any]) -> Any:
        return batch["image"].is_contiguous(memory_format=torch.channels_last), batch["label"], batch["name"]

    ((is_channels_last, label, name),) = DeviceLoader([batch], "cpu", channels_last=True, transform=transform)
    assert is_channels_last
    assert label is batch["label"]
    assert name is batch["name"]
    assert batch["image"].is_contiguous()


def test_a_transform_cannot_end_the_epoch() -> None:
    """A StopIteration out of a transform is an error, not a quiet end."""

    def transform(_: Any) -> Any:
        return next(iter([]))

    with pytest.raises(RuntimeError, match="StopIteration"):
        list(DeviceLoader([1], "cpu", transform=transform))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")  # of Python 3.12, of any fork
def test_workers_that_are_thrown_away_are_pointed_out_once() -> None:
    """A loader without persistent workers is warned of when its second epoch begins, and never again."""
    loader = DeviceLoader(numbers(num_workers=1), "cpu")
    list(loader)
    with pytest.warns(UserWarning, match="persistent_workers=True") as warned:
        list(loader)
    assert warned[0].filename == __file__
    list(loader)


class Endless(IterableDataset[int]):
    """Has no length and no end."""

    def __iter__(self) -> Iterator[int]:
        while True:
            yield 1


def test_an_endless_loader_can_be_left() -> None:
    """A loader without end is left by break, and closing ends the pass."""
    loader = DeviceLoader(DataLoader(Endless(), batch_size=2), "cpu")
    batches = iter(loader)
    next(batches)
    loader.close()
    with pytest.raises(RuntimeError, match="was closed"):
        next(batches)


def test_the_iterator_keeps_its_loader_alive() -> None:
    """A loader made in the for statement lives as long as its pass: oom_guard must find it."""
    from torchfast import _holders

    batches = iter(DeviceLoader([1, 2, 3], "cpu"))
    gc.collect()
    next(batches)
    assert _holders.release_all() >= 1
    assert list(batches) == [2, 3]


def test_a_holder_that_fails_stands_in_nobodys_way() -> None:
    """Where one holder cannot let go, the others are asked all the same, and no error of it gets out."""
    from torchfast import _holders

    class Holder:
        n_asked = 0

        def release_memory(self) -> None:
            self.n_asked += 1
            raise RuntimeError("no room on the host either")

    first, second = Holder(), Holder()
    _holders.register(first)
    _holders.register(second)
    assert _holders.release_all() >= 2
    assert first.n_asked == second.n_asked == 1


def test_exit_in_the_middle_of_an_epoch_is_clean() -> None:
    """An interpreter that ends with a pass open, workers and all, ends with status 0 and without a word."""
    script = textwrap.dedent(
        """
        import torch
        from torch.utils.data import DataLoader, TensorDataset
        from torchfast import DeviceLoader

        loader = DataLoader(TensorDataset(torch.arange(64)), num_workers=1, persistent_workers=True)
        batches = iter(DeviceLoader(loader, "cpu"))
        next(batches)
        """
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def test_no_thread_on_the_cpu() -> None:
    """On the CPU batches are made in the caller's thread, like bare: random numbers interleave as before."""
    threads: list[threading.Thread] = []

    def source() -> Iterator[int]:
        threads.append(threading.current_thread())
        yield 1

    assert list(DeviceLoader(source(), "cpu")) == [1]
    assert threads == [threading.current_thread()]


def test_a_loader_tells_its_options() -> None:
    """Its repr has what changes batches, and leaves out what does not."""
    assert repr(DeviceLoader([], "cpu")) == "DeviceLoader(list, device='cpu', depth=2)"
    loader: DeviceLoader[Any] = DeviceLoader(
        [], "cpu", depth=3, channels_last=True, normalize=((0.5,), (0.25,)), transform=len, into=torch.ones(2)
    )
    assert repr(loader) == (
        "DeviceLoader(list, device='cpu', depth=3, channels_last=True, normalize=((0.5,), (0.25,)), "
        "image_dtype=torch.float32, transform=len, into=...)"
    )
    loader = DeviceLoader([], "cpu", transform=torch.nn.Sequential())
    assert repr(loader) == "DeviceLoader(list, device='cpu', depth=2, transform=Sequential)"


def test_it_is_true_where_there_may_be_batches() -> None:
    """As the loader itself, but that one without a length does not tell, and so is no error."""

    class Unclear(list[int]):
        def __bool__(self) -> bool:
            raise ValueError("the truth value of an array is ambiguous")

    loaders = [[], [1], (number for number in range(2)), DataLoader(Stream()), Unclear([1])]
    assert [bool(DeviceLoader(loader, "cpu")) for loader in loaders] == [False, True, True, True, True]


def test_the_batches_of_a_transform_are_of_its_type() -> None:
    """What it returns is what is yielded, for a type checker too."""

    def named(batch: tuple[torch.Tensor, int]) -> dict[str, torch.Tensor]:
        return {"images": batch[0]}

    pairs = [(torch.ones(2), 1)]
    for batch in DeviceLoader(pairs, "cpu", transform=named):
        assert batch["images"].tolist() == [1, 1]
    for images, label in DeviceLoader(pairs, "cpu"):
        assert (images.tolist(), label + 1) == ([1, 1], 2)
