"""Small batches, which either thread may bring to the GPU: ahead, or as they are handed out."""

import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.loader_sources import MS, Numbered, pinned_by_pytorch, wrong_leaves
from torchfast import DeviceLoader
from torchfast._loader.transport import CudaTransport
from torchfast._loader.turns import Turns

pytestmark = pytest.mark.cuda

N_BATCHES = 100
SHAPES = [(100, 100), (3,), (0, 4)]
Batch = list[torch.Tensor]


@pytest.fixture(params=["ahead", "late", "in turn"], autouse=True)
def when(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Have batches copied ahead, late, or now so and now so."""
    turns = {"ahead": [False], "late": [True], "in turn": [False] * 3 + [True] * 4}[request.param]
    numbers = itertools.cycle(turns)
    monkeypatch.setattr(Turns, "is_here", lambda *_: next(numbers))
    return str(request.param)


@pytest.fixture
def n_late(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Return what says how many batches were left to be copied late."""
    put_off, calls = CudaTransport._put_off, list[None]()

    def counted(self: CudaTransport, unpacked: Any) -> Any:
        calls.append(None)
        return put_off(self, unpacked)

    monkeypatch.setattr(CudaTransport, "_put_off", counted)
    return lambda: len(calls)


def numbered(*, is_pinned: bool = False) -> list[Batch]:
    """Return batches that hold their number."""
    batches = [Numbered(SHAPES, N_BATCHES)[number] for number in range(N_BATCHES)]
    return [[leaf.pin_memory() for leaf in batch] for batch in batches] if is_pinned else batches


def fresh() -> Iterator[Batch]:
    """Yield batches whose pinned memory goes back to PyTorch as soon as the loader lets go of it."""
    for number in range(N_BATCHES):
        yield [torch.full(shape, float(number), pin_memory=True) for shape in SHAPES]


def reused(*, is_pinned: bool) -> Iterator[Batch]:
    """Yield the same memory again and again, with another number in it."""
    leaves = [torch.empty(shape, pin_memory=is_pinned) for shape in SHAPES]
    for number in range(N_BATCHES):
        yield [leaf.fill_(float(number)) for leaf in leaves]


SOURCES: dict[str, Callable[[], Any]] = {
    "pageable": numbered,
    "pinned": lambda: numbered(is_pinned=True),
    "pinned, dropped": fresh,
    "pinned by PyTorch": lambda: pinned_by_pytorch(Numbered(SHAPES, N_BATCHES)),
    "pageable, reused": lambda: reused(is_pinned=False),
    "pinned, reused": lambda: reused(is_pinned=True),
}


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("source", SOURCES)
def test_none_is_wrong(source: str, depth: int, when: str, n_late: Callable[[], int]) -> None:
    """Under a lagging GPU each leaf holds its batch's number, wherever it came from."""
    loader = DeviceLoader(SOURCES[source](), "cuda", depth=depth)
    assert int(wrong_leaves(loader, N_BATCHES, sleep=MS)) == 0
    # Which of the batches on their way are sent before the turn changes is up to the two threads.
    low, high = {"ahead": (0, 0), "late": (80, 100), "in turn": (1, 99)}[when]
    assert low <= n_late() <= high


def test_small_batches_among_large_ones_come_in_order() -> None:
    """Each in its place, though the large ones are copied ahead of them."""
    kinds: list[list[tuple[int, ...]]] = [[(100,)], [(700_000,), (3,)], [(50, 50), (7,)]]
    host = [[torch.full(shape, float(n)) for shape in kinds[n // 2 % 3]] for n in range(N_BATCHES)]
    assert int(wrong_leaves(DeviceLoader(host, "cuda"), N_BATCHES, sleep=MS)) == 0


@pytest.mark.parametrize("is_pinned", [False, True])
def test_a_named_stream_may_read_what_was_dropped(*, is_pinned: bool) -> None:
    """And the loop may be on another stream from batch to batch."""
    other, streams = torch.cuda.Stream(), itertools.cycle([torch.cuda.Stream(), torch.cuda.Stream()])
    wrong = torch.zeros((), dtype=torch.long, device="cuda")
    torch.cuda.synchronize()
    batches = iter(DeviceLoader(numbered(is_pinned=is_pinned), "cuda", streams=[other]))
    for number in range(N_BATCHES):
        current = next(streams)
        with torch.cuda.stream(current):
            batch = next(batches)
        other.wait_stream(current)
        with torch.cuda.stream(other):
            torch.cuda._sleep(2 * MS)
            wrong += torch.stack([(leaf != number).any() for leaf in batch]).any()
        del batch
    torch.cuda.synchronize()
    assert int(wrong) == 0


def test_kept_batches_stay_intact_and_share_no_version() -> None:
    """In a list and in a graph, while other leaves of theirs are changed in place."""
    weight = torch.ones((), device="cuda", requires_grad=True)
    kept, losses = [], []
    for number, (images, labels, _) in enumerate(DeviceLoader(reused(is_pinned=True), "cuda")):
        torch.cuda._sleep(MS // 4)
        losses.append(((labels * weight).mean(), number))
        images.sub_(1)
        kept.append((number, images))
    assert all(bool((images == number - 1).all()) for number, images in kept)
    for loss, number in losses:
        (gradient,) = torch.autograd.grad(loss, weight)
        assert gradient.item() == pytest.approx(number)


@torch.inference_mode()
def test_leaves_are_as_by_to_in_inference_mode() -> None:
    """What is fit for a backward is so late too, and what moves by itself moves as in the bare loop."""
    with torch.inference_mode(mode=False):
        host = [[torch.zeros(3), torch.nn.Parameter(torch.zeros(3))] for _ in range(40)]
    for plain, parameter in DeviceLoader(host, "cuda"):
        assert not plain.is_inference()
        assert not parameter.requires_grad
    for (plain,) in DeviceLoader([batch[:1] for batch in host], "cuda"):
        assert not plain.is_inference()


def test_next_does_not_wait_for_the_device() -> None:
    """Nor where a copy of pageable memory stands behind a long kernel: the host goes on meanwhile."""
    host = [[torch.full((64 * 1024,), float(number))] for number in range(40)]
    batches = iter(DeviceLoader(host, "cuda"))
    for _ in range(20):
        next(batches)
    torch.cuda.synchronize()
    passed = torch.cuda.Event()
    torch.cuda._sleep(2000 * MS)
    passed.record()
    batch = next(batches)
    assert not passed.query()
    assert bool((batch[0] == 20).all())


def test_released_memory_loses_no_batch() -> None:
    """What is yet to be copied is on the host anyway."""
    loader = DeviceLoader(numbered(), "cuda", depth=3)
    batches = iter(loader)
    for number in range(30):
        assert all(bool((leaf == number).all()) for leaf in next(batches))
        if number % 7 == 6:
            loader.release_memory()
    assert [float(batch[1][0]) for batch in batches] == list(range(30, N_BATCHES))


def test_memory_is_constant() -> None:
    """On the device and in pinned memory, from the first pass on."""
    loader, found = DeviceLoader(numbered(), "cuda"), []
    for _ in range(6):
        for batch in loader:
            torch.cuda._sleep(MS // 8)
            del batch
        torch.cuda.synchronize()
        pinned = torch.cuda.host_memory_stats()["num_host_alloc"]
        found.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), pinned))
    assert found[2:] == found[1:2] * 4


def test_statistics_count_them() -> None:
    """Their bytes, the time in which these were copied, and every batch."""
    loader = DeviceLoader(numbered(), "cuda")
    for batch in loader:
        torch.cuda._sleep(MS // 8)
        del batch
    torch.cuda.synchronize()
    assert loader.stats.n_batches == N_BATCHES
    assert loader.stats.n_bytes == (N_BATCHES - 1) * 4 * (100 * 100 + 3)
    assert 0 < loader.stats.bytes_per_s < 1e11


@pytest.mark.parametrize("name", ["_put_off", "deliver"])
def test_an_interrupt_loses_none(name: str, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What came between a batch and the loop is done again."""
    original, calls = getattr(CudaTransport, name), itertools.count(1)

    def interrupted(*arguments: Any, **options: Any) -> Any:
        result = original(*arguments, **options)
        if threading.current_thread() is threading.main_thread() and next(calls) % 5 == 0:
            raise KeyboardInterrupt
        return result

    batches, n_interrupts = iter(DeviceLoader(numbered(), "cuda")), 0
    found = [float(next(batches)[1][0]) for _ in range(10)]
    monkeypatch.setattr(CudaTransport, name, interrupted)
    while True:
        try:
            found.append(float(next(batches)[1][0]))
        except KeyboardInterrupt:
            n_interrupts += 1
        except StopIteration:
            break
    assert found == list(range(N_BATCHES))
    assert (n_interrupts > 5) is (when != "ahead" or name == "deliver")
