"""DeviceLoader on a GPU that lags behind: every batch whole, in constant memory, and nothing left behind."""

import gc
import itertools
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, TensorDataset

from tests import strategies
from tests.loader_sources import MS, pinned_by_pytorch
from torchfast import DeviceLoader, _holders
from torchfast._tree import flatten

pytestmark = pytest.mark.cuda

SMALL = (64, 1024)  # 256 KiB of float32: packed
LARGE = (64, 8192)  # 2 MiB: travels by itself


def numbered(n: int, shape: tuple[int, ...], *, pinned: bool = False) -> Iterator[torch.Tensor]:
    """Yield batches that hold their own number everywhere."""
    for number in range(n):
        yield torch.full(shape, float(number), pin_memory=pinned)


def in_one_buffer(n: int, shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
    """Yield the same pinned tensor again and again, overwritten each time, as some readers do."""
    buffer = torch.empty(shape, pin_memory=True)
    for number in range(n):
        yield buffer.fill_(float(number))


class Numbered(Dataset[torch.Tensor]):
    """The same, for a `DataLoader`, which pins each anew."""

    def __init__(self, n: int, shape: tuple[int, ...]) -> None:
        self.n, self.shape = n, shape

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full(self.shape, float(index))


def source_of(kind: str, n: int, shape: tuple[int, ...]) -> Iterable[torch.Tensor]:
    """Return numbered batches in pageable memory, in pinned memory, kept or dropped, or all in the same."""
    if kind == "reused":
        return in_one_buffer(n, shape)
    if kind == "dropped":
        return pinned_by_pytorch(Numbered(n, shape))
    return numbered(n, shape) if kind == "pageable" else list(numbered(n, shape, pinned=True))


def wrong_batches(batches: Iterable[torch.Tensor], sleep: int = 2 * MS) -> int:
    """Count, on the GPU and with the host running ahead, the batches that do not hold their own number."""
    wrong = torch.zeros((), dtype=torch.long, device="cuda")
    numbers = itertools.count()  # enumerate would hold each batch until the next one
    for batch in batches:
        torch.cuda._sleep(sleep)
        wrong += (batch != next(numbers)).any()
        del batch
    return int(wrong)


def unsafe_prefetcher(batches: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Prefetch as widely copied loaders do: on a side stream, without an edge back from the consumer."""
    side = torch.cuda.Stream()
    ahead: torch.Tensor | None = None
    for batch in batches:
        with torch.cuda.stream(side):
            on_device = batch.to("cuda", non_blocking=True)
        if ahead is not None:
            yield ahead
        torch.cuda.current_stream().wait_stream(side)
        ahead = on_device
        del on_device
    if ahead is not None:
        yield ahead


def test_the_count_can_see_a_race() -> None:
    """The count that shows no wrong batch for DeviceLoader shows some for an unsafe prefetcher."""
    pinned = list(numbered(100, LARGE, pinned=True))
    assert wrong_batches(unsafe_prefetcher(pinned)) > 0


@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("shape", [SMALL, LARGE])
@pytest.mark.parametrize("kind", ["pageable", "pinned", "dropped", "reused"])
def test_no_batch_is_overwritten_under_a_lagging_gpu(kind: str, shape: tuple[int, ...], depth: int) -> None:
    """With the host far ahead of the GPU each batch still holds its own number when the GPU reads it."""
    assert wrong_batches(DeviceLoader(source_of(kind, 100, shape), "cuda", depth=depth)) == 0


class Tagged(torch.Tensor):
    """A tensor of a class of its own, which moves by its own `.to`."""


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_moves_by_itself_is_not_overwritten_either(device: str) -> None:
    """A reader that fills one tensor again and again, on the device or of a class of its own, is safe too."""
    buffer = torch.empty(SMALL, device=device).as_subclass(Tagged)
    source = (buffer.fill_(float(number)) for number in range(100))
    assert wrong_batches(DeviceLoader(source, "cuda")) == 0


def test_large_pageable_batches_travel_in_pieces_and_arrive_whole() -> None:
    """A pageable batch larger than the staging pieces, of odd size, arrives bit for bit."""
    torch.manual_seed(3)
    batches = [torch.randn(5_000_001), torch.randn(13, 700_001).t(), torch.randn(9_000_000)[::2]]
    arrived = [batch.cpu() for batch in DeviceLoader(batches, "cuda")]
    for batch, there in zip(batches, arrived, strict=True):
        assert torch.equal(batch, there)


def test_kept_batches_stay_intact() -> None:
    """Batches kept in a list or by an autograd graph hold their numbers to the end."""
    weight = torch.ones((), device="cuda", requires_grad=True)
    kept, losses = [], []
    for number, batch in enumerate(DeviceLoader(numbered(60, LARGE), "cuda")):
        torch.cuda._sleep(MS)
        if number % 3 == 0:
            kept.append((number, batch))
        if number % 7 == 0:
            losses.append(((batch * weight).mean(), number))
    for number, batch in kept:
        assert (batch == number).all()
    for loss, number in losses:
        (gradient,) = torch.autograd.grad(loss, weight)
        assert gradient.item() == pytest.approx(number)


def test_changing_one_leaf_in_place_does_not_spoil_another() -> None:
    """Packed leaves share no version counter: labels saved for a backward survive images.sub_(1)."""
    weight = torch.ones(4, device="cuda", requires_grad=True)
    for images, labels in DeviceLoader([(torch.ones(4), torch.ones(4))] * 3, "cuda"):
        loss = (weight * labels).sum()
        images.sub_(1)
        loss.backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [3.0] * 4


def test_a_recorded_stream_protects_a_batch() -> None:
    """PyTorch's own rule holds: after record_stream another stream may read a batch that was dropped."""
    other = torch.cuda.Stream()
    wrong = torch.zeros((), dtype=torch.long, device="cuda")
    numbers = itertools.count()
    for batch in DeviceLoader(numbered(60, LARGE), "cuda"):
        other.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(other):
            torch.cuda._sleep(4 * MS)
            wrong += (batch != next(numbers)).any()
        batch.record_stream(other)
        del batch
    torch.cuda.synchronize()
    assert int(wrong) == 0


@pytest.mark.parametrize("shape", [SMALL, LARGE])
def test_a_named_stream_protects_every_batch(shape: tuple[int, ...]) -> None:
    """A stream named in streams= may read batches that were dropped, with nothing said batch by batch."""
    other = torch.cuda.Stream()
    wrong = torch.zeros((), dtype=torch.long, device="cuda")
    numbers = itertools.count()
    for batch in DeviceLoader(numbered(60, shape), "cuda", streams=[other]):
        other.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(other):
            torch.cuda._sleep(4 * MS)
            wrong += (batch != next(numbers)).any()
        del batch
    torch.cuda.synchronize()
    assert int(wrong) == 0


def test_the_consumer_may_change_streams() -> None:
    """Batches taken now on one stream, now on another, are whole on each."""
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    wrongs = [torch.zeros((), dtype=torch.long, device="cuda") for _ in streams]
    torch.cuda.synchronize()
    batches = iter(DeviceLoader(numbered(80, LARGE), "cuda"))
    for number in range(80):
        with torch.cuda.stream(streams[number // 3 % 2]):
            batch = next(batches)
            torch.cuda._sleep(2 * MS)
            wrongs[number // 3 % 2] += (batch != number).any()
            del batch
    torch.cuda.synchronize()
    assert [int(wrong) for wrong in wrongs] == [0, 0]


@pytest.mark.gpus(2)
@pytest.mark.parametrize("n_leaves", [1, 20], ids=["by the thread", "by either"])
def test_batches_go_to_the_gpu_that_was_named(n_leaves: int) -> None:
    """They are whole on a second GPU while the first is the current one."""
    batches = [
        [torch.full((5120,), float(number)).pin_memory() for _ in range(n_leaves)] for number in range(80)
    ]
    wrong = torch.zeros((), dtype=torch.long, device="cuda:1")
    for number, batch in enumerate(DeviceLoader(batches, "cuda:1")):
        assert torch.cuda.current_device() == 0
        assert {leaf.device for leaf in batch} == {wrong.device}
        with torch.cuda.device(1):
            torch.cuda._sleep(MS)
        wrong += (torch.cat(batch) != number).any()
        del batch
    assert int(wrong) == 0


def test_memory_is_constant() -> None:
    """No more than depth + 2 batches are reserved, and no more after ten epochs than after the first."""
    torch.cuda.empty_cache()
    batch_bytes = 32 * 2**20
    host = torch.zeros(batch_bytes // 4)
    loader = DeviceLoader([host] * 20, "cuda", depth=2)
    before = torch.cuda.memory_reserved()
    reserved = []
    for _ in range(10):
        for batch in loader:
            torch.cuda._sleep(MS // 4)
            batch.add_(1)
        reserved.append(torch.cuda.memory_reserved() - before)
    assert reserved[-1] == reserved[0] <= 4 * batch_bytes


def test_nothing_is_pinned_after_the_first_epoch() -> None:
    """The pinned ring is filled in the first epoch; later ones allocate no pinned memory."""
    loader = DeviceLoader([[torch.zeros(5_000_000), torch.zeros(10)]] * 20, "cuda")
    for _ in loader:
        pass
    pinned = torch.cuda.host_memory_stats()["num_host_alloc"]
    for _ in range(3):
        for _ in loader:
            pass
    assert torch.cuda.host_memory_stats()["num_host_alloc"] == pinned


@given(st.lists(strategies.batches(), max_size=4))
@settings(max_examples=60)
def test_any_batch_arrives_as_by_to(batches: list[Any]) -> None:
    """Whatever its nesting, a batch has the structure, types, shapes, strides and values that `.to` gives."""
    arrived = list(DeviceLoader(batches, "cuda"))
    for batch, there in zip(batches, arrived, strict=True):
        leaves, structure = flatten(batch)
        moved = [leaf.to("cuda") for leaf in leaves]
        found, _ = flatten(there)
        assert len(found) == len(moved)
        for leaf, like in zip(found, moved, strict=True):
            assert isinstance(leaf, torch.Tensor)
            assert torch.equal(leaf, like)
            assert (leaf.dtype, leaf.device, leaf.stride()) == (like.dtype, like.device, like.stride())
        assert type(there) is type(structure.rebuild(moved))


def test_structures_layouts_and_types_arrive_as_by_to() -> None:
    """Any nesting, dtype and layout arrives as `.to` would have brought it; aliases stay aliases."""
    shared = torch.arange(6).reshape(2, 3)
    packed = torch.nn.utils.rnn.pack_sequence([torch.ones(3), torch.ones(2)])
    batch: dict[str, Any] = {
        "nhwc": torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last),
        "cropped": torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)[:, :, 1:6, :7],
        "large": torch.randn(8, 3, 256, 256).to(memory_format=torch.channels_last)[:, :, :250, 5:],
        "aliases": (shared, [shared]),
        "odd": [torch.tensor(True), torch.zeros(0, 3), torch.ones(3, dtype=torch.bfloat16), 1 + 2j],
        "complex": torch.ones(3, dtype=torch.complex64).conj(),
        "sparse": torch.eye(3).to_sparse(),
        "sequence": packed,
        "graph": torch.ones(2, requires_grad=True),
        "resident": torch.ones(2, device="cuda"),
        "name": "no tensor",
    }
    (there,) = DeviceLoader([batch], "cuda")
    for name in ("nhwc", "cropped", "large"):
        assert there[name].stride() == batch[name].to("cuda").stride()
        assert torch.equal(there[name].cpu(), batch[name])
    assert there["aliases"][0] is there["aliases"][1][0]
    assert there["name"] is batch["name"]
    assert there["resident"] is batch["resident"]
    assert there["sequence"].data.device.type == "cuda"
    assert there["graph"].requires_grad
    assert torch.equal(there["sparse"].to_dense().cpu(), torch.eye(3))
    assert torch.equal(there["complex"].cpu(), batch["complex"])
    assert [leaf.dtype for leaf in there["odd"][:3]] == [torch.bool, torch.float32, torch.bfloat16]
    assert there["odd"][1].shape == (0, 3)
    assert all(leaf.data_ptr() % 256 == 0 for leaf in there["odd"][:3])


def test_channels_last_and_transform_run_on_the_device_in_order() -> None:
    """Images are laid out channels last, and a transform draws random numbers in the order of the batches."""
    batches = [torch.ones(4, 3, 16, 16) for _ in range(8)]

    def noisy(images: torch.Tensor) -> torch.Tensor:
        assert images.is_contiguous(memory_format=torch.channels_last)
        return images + torch.randn(images.shape, device=images.device)

    torch.manual_seed(1)
    ahead = [
        batch.sum() + torch.rand((), device="cuda")
        for batch in DeviceLoader(batches, "cuda", channels_last=True, transform=noisy)
    ]
    torch.manual_seed(1)
    bare = [
        noisy(batch.cuda().to(memory_format=torch.channels_last)).sum() + torch.rand((), device="cuda")
        for batch in batches
    ]
    assert torch.equal(torch.stack(ahead), torch.stack(bare))


class Pairs(Dataset[Any]):
    """Images, labels and metadata, reproducible by index."""

    def __len__(self) -> int:
        return 96

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        image = torch.randn(3, 16, 16, generator=generator)
        return {"image": image, "label": index % 10, "meta": {"weight": torch.rand((), generator=generator)}}


def train(batches: Iterable[Any], *, moves: bool) -> torch.Tensor:
    """Train a small network for three epochs and return its weights."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(8 * 14 * 14, 10)
    ).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(3):
        for batch in batches:
            image, label, weight = batch["image"], batch["label"], batch["meta"]["weight"]
            if moves:
                image, label, weight = image.cuda(), label.cuda(), weight.cuda()
            losses = torch.nn.functional.cross_entropy(model(image), label, reduction="none")
            optimizer.zero_grad()
            (losses * weight).mean().backward()
            optimizer.step()
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach()


@pytest.mark.parametrize("n_workers", [0, 2])
def test_training_is_identical_to_the_bare_loop(n_workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Non-blocking transfers of inputs, targets and metadata train the very same weights."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)

    def loader() -> DataLoader[Any]:
        return DataLoader(
            Pairs(),
            batch_size=16,
            shuffle=True,
            generator=torch.Generator().manual_seed(5),
            num_workers=n_workers,
            persistent_workers=n_workers > 0,
        )

    assert torch.equal(train(DeviceLoader(loader(), "cuda"), moves=False), train(loader(), moves=True))


def test_evicted_batches_come_back_whole() -> None:
    """After release_memory no batch is lost or changed, and the memory held ahead is free."""
    loader = DeviceLoader([torch.full(LARGE, float(i)) for i in range(12)], "cuda", depth=3)
    batches = iter(loader)
    assert (next(batches) == 0).all()
    feed: Any = batches._feed
    while len(feed._work.ready) < 3:
        threading.Event().wait(0.001)
    held = torch.cuda.memory_allocated()
    assert _holders.release_all() >= 1
    assert torch.cuda.memory_allocated() <= held - 3 * 2 * 2**20
    for number, batch in enumerate(batches, start=1):
        assert (batch == number).all()
    assert number == 11


def test_a_batch_without_room_is_an_error_at_its_own_place_and_not_lost() -> None:
    """A batch for which there is no memory fails when it is taken, and comes once there is room."""
    torch.cuda.empty_cache()
    large = torch.full((64 * 2**20,), 7.0)  # 256 MiB
    batches = iter(DeviceLoader([torch.zeros(3), torch.zeros(3), large, torch.ones(3)], "cuda"))
    total_bytes = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 64 * 2**20) / total_bytes)
    try:
        assert len(next(batches)) == len(next(batches)) == 3
        for _ in range(2):
            with pytest.raises(torch.OutOfMemoryError):
                next(batches)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert bool((next(batches) == 7).all())
    assert next(batches).tolist() == [1, 1, 1]


def test_breaks_leave_nothing_behind() -> None:
    """Early breaks with persistent workers leave no thread and no device memory, and lose no batch."""
    dataset = TensorDataset(torch.arange(64.0))
    loader = DeviceLoader(DataLoader(dataset, batch_size=4, num_workers=2, persistent_workers=True), "cuda")
    memory = None
    for _ in range(30):
        for (batch,) in loader:
            assert batch[0] == 0
            break
        del batch
        gc.collect()
        memory = memory or torch.cuda.memory_allocated()
        assert "torchfast-loader" not in [thread.name for thread in threading.enumerate()]
        assert torch.cuda.memory_allocated() <= memory
    assert torch.cat([batch for (batch,) in loader]).tolist() == dataset.tensors[0].tolist()


def test_exit_in_the_middle_of_an_epoch_is_clean() -> None:
    """An interpreter that ends with a pass open, workers and copies under way, ends without a word."""
    script = textwrap.dedent(
        """
        import torch
        from torch.utils.data import DataLoader, Dataset, TensorDataset
        from torchfast import DeviceLoader

        loader = DataLoader(TensorDataset(torch.zeros(64, 1000000)), num_workers=1, persistent_workers=True)
        batches = iter(DeviceLoader(loader, "cuda"))
        next(batches)
        torch.cuda._sleep(100000000)
        """
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


class Suicidal(Dataset[Any]):
    """Its worker dies at one index."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.tensor(index)


def test_a_killed_worker_is_an_error_not_a_hang() -> None:
    """A worker that is killed ends the pass with PyTorch's own error, which depends on what it was doing."""
    with pytest.raises((RuntimeError, ConnectionError, EOFError)):
        list(DeviceLoader(DataLoader(Suicidal(), num_workers=1), "cuda"))
