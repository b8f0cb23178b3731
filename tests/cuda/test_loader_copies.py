"""How copies to a GPU are made: by one call of the driver or by PyTorch, in either thread, never wrong."""

import gc
import itertools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.loader_sources import MS, Numbered, pinned_by_pytorch, wrong_leaves
from tests.loader_transport import computing_with
from torchfast import DeviceLoader
from torchfast._bytes import MIB
from torchfast._loader import driver, helpers, pinned_ring, shipment, staging, transport, turns

pytestmark = pytest.mark.cuda

N_BATCHES = 100
Shapes = list[tuple[int, ...]]
SHAPES: Shapes = [(0, 4), (3,), (64, 1024), (64, 1024), (2, 3, 16, 16), (64, 8192)]
"""Leaves of a batch: three that are staged, the first empty; two copied straight; one that travels alone."""

ALIKE: Shapes = [(64, 1024)] * 3
"""Leaves that are packed as the rows of one tensor."""

MANY: Shapes = [(64, 1024)] * 24
"""Leaves that are worth helpers if they are pageable: 6 MiB, in small ones."""


class Reused:
    """The same batches in the same pinned memory, overwritten each time."""

    def __init__(self, shapes: Shapes) -> None:
        self._shapes = shapes

    def __iter__(self) -> Iterator[list[torch.Tensor]]:
        leaves = [torch.empty(shape, pin_memory=True) for shape in self._shapes]
        for number in range(N_BATCHES):
            yield [leaf.fill_(float(number)) for leaf in leaves]


def numbered(shapes: Shapes) -> list[list[torch.Tensor]]:
    """Return the same batches as a list."""
    return [Numbered(shapes, N_BATCHES)[number] for number in range(N_BATCHES)]


SOURCES: dict[str, Any] = {
    "pinned, dropped at once": lambda s: pinned_by_pytorch(Numbered(s, N_BATCHES)),
    "pinned, kept": lambda s: [[leaf.pin_memory() for leaf in batch] for batch in numbered(s)],
    "pageable": numbered,
    "reused": Reused,
}


@pytest.fixture
def _four_threads() -> Iterator[None]:
    """Compute with several threads: a loop that does not gets no helpers."""
    with computing_with(4):
        yield


@pytest.mark.usefixtures("_four_threads")
@pytest.mark.parametrize("shapes", [SHAPES, ALIKE, MANY], ids=["of all kinds", "alike", "many"])
@pytest.mark.parametrize("is_batched", [True, False])
@pytest.mark.parametrize("is_sent_here", [True, False])
@pytest.mark.parametrize("source", SOURCES)
def test_no_leaf_is_wrong(
    source: str, shapes: Shapes, *, is_sent_here: bool, is_batched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under a lagging GPU every leaf holds its batch's number, whoever enqueues the copies, and how."""
    monkeypatch.setattr(transport, "HERE_FROM_LEAVES", 1)
    monkeypatch.setattr(turns.Turns, "is_here", lambda *_: is_sent_here)
    n_here = count_calls(monkeypatch, transport.CudaTransport, "send_here")
    n_helped = count_calls(monkeypatch, helpers.Share, "copied")
    monkeypatch.setattr(staging, "team_size", lambda _: 4)
    if not is_batched:
        monkeypatch.setattr(shipment, "batched_copy", lambda: None)
    wrong = sum(
        wrong_leaves(DeviceLoader(SOURCES[source](shapes), "cuda"), N_BATCHES, sleep=MS) for _ in range(3)
    )
    assert int(wrong) == 0
    assert source == "pageable" or (n_here() > 200) is (is_sent_here and source == "pinned, kept")
    assert (n_helped() > 0) is (source == "pageable" and shapes is MANY)


@pytest.mark.parametrize("is_batched", [True, False])
@pytest.mark.parametrize("large_mib", [1, 4])
def test_no_piece_of_a_large_tensor_is_wrong(
    large_mib: int, *, is_batched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor where tensors are cut into pieces or share them, in few pinned buffers or in many."""
    monkeypatch.setattr(staging, "CHUNK_BYTES", 3 * MIB)
    monkeypatch.setattr(pinned_ring, "LARGE_BYTES", large_mib * MIB)
    if not is_batched:
        monkeypatch.setattr(shipment, "batched_copy", lambda: None)
    shapes: Shapes = [(300, 1000), (1_000_003,), (2_500_000,), (270_001,), (3,)]
    loader = DeviceLoader(numbered(shapes), "cuda")
    assert sum(int(wrong_leaves(loader, N_BATCHES, sleep=MS)) for _ in range(3)) == 0


def count_calls(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> Callable[[], int]:
    """Return what tells how often a method has been called from now on."""
    original, calls = getattr(owner, name), itertools.count()

    def counted(*arguments: Any) -> Any:
        next(calls)
        return original(*arguments)

    monkeypatch.setattr(owner, name, counted)
    return lambda: next(calls)


def test_pinned_and_pageable_tensors_mix() -> None:
    """Of tensors that are alike only the first is asked whether it is pinned; the others arrive whole too."""
    lengths = [
        300_000,
        300_000,
        300_000,
        400_000,
        70_000,
        70_000,
    ]  # three kinds, of 1.2 and 1.6 MB and 280 KB
    batches = [
        [
            leaf.pin_memory() if (index + number) % 2 else leaf
            for index, leaf in enumerate(torch.full((length,), float(number)) for length in lengths)
        ]
        for number in range(30)
    ]
    wrong = torch.zeros((), dtype=torch.long, device="cuda")
    for number, batch in enumerate(DeviceLoader(batches, "cuda")):
        torch.cuda._sleep(MS)
        for leaf in batch:
            wrong += (leaf != number).any()
    assert int(wrong) == 0


def test_the_driver_copies_many_tensors_in_one_call() -> None:
    """The driver takes pinned and pageable memory alike; what has no memory it leaves to PyTorch."""
    batched = driver.batched_copy()
    assert batched is not None, "this driver has no cuMemcpyBatchAsync: copies are made one by one"
    sources = [torch.randn(1000).pin_memory(), torch.randn(70_000)]
    targets = [torch.zeros(source.shape, device="cuda") for source in sources]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    to, of = ([tensor.data_ptr() for tensor in tensors] for tensors in (targets, sources))
    assert batched(to, of, [source.nbytes for source in sources], stream.cuda_stream)
    stream.synchronize()
    for source, target in zip(sources, targets, strict=True):
        assert torch.equal(source, target.cpu())
    assert not batched(to[:1], [torch._efficientzerotensor((1000,)).data_ptr()], [4000], stream.cuda_stream)


def test_the_current_stream_is_found_with_and_without_the_private_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The address of the current stream is that of PyTorch's own object."""
    device = torch.device("cuda", torch.cuda.current_device())
    assert hasattr(torch._C, "_cuda_getCurrentRawStream"), "gone: each next takes longer"
    for _ in range(2):
        assert driver.current_raw_stream(device) == 0
        with torch.cuda.stream(torch.cuda.Stream()) as stream:
            assert driver.current_raw_stream(device) == torch.cuda.current_stream().cuda_stream != 0
        del stream
        monkeypatch.delattr(torch._C, "_cuda_getCurrentRawStream", raising=False)


@pytest.mark.parametrize("length", [100, 10_000], ids=["packed", "by itself"])
def test_zeros_without_memory_arrive(length: int) -> None:
    """A tensor of zeros that has no memory, as autograd makes, arrives as zeros; so does a part of one."""
    zeros = torch._efficientzerotensor((300, length))
    alike = torch.zeros(300, length).pin_memory()
    for leaves in ([zeros, torch.ones(3)], [zeros[100:]], [alike, zeros], [alike[100:], zeros[100:]]):
        (batch,) = DeviceLoader([leaves], "cuda")
        for leaf, original in zip(batch, leaves, strict=True):
            assert torch.equal(leaf, torch.full(original.shape, float(original.numel() == 3), device="cuda"))


def test_a_pass_that_is_over_holds_nothing_of_its_source() -> None:
    """Host memory that the device has read is nobody's any more once the pass has ended."""
    alive: list[weakref.ref[torch.Tensor]] = []

    def fresh() -> Iterator[list[torch.Tensor]]:
        for batch in numbered(SHAPES)[:8]:
            pinned = [leaf.pin_memory() for leaf in batch]
            alive.extend(map(weakref.ref, pinned))
            yield pinned

    loader = DeviceLoader(fresh(), "cuda")
    for _ in loader:
        torch.cuda.synchronize()
    gc.collect()
    assert [leaf() for leaf in alive] == [None] * (8 * len(SHAPES))
