"""Tensors that are alike travel as rows of one: by either thread, and whatever happens to them on the way."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.loader_sources import MS
from torchfast import DeviceLoader
from torchfast._loader.transport import CudaTransport
from torchfast._loader.turns import Turns

pytestmark = pytest.mark.cuda

N_BATCHES = 60
Batch = list[torch.Tensor]


@pytest.fixture(params=[True, False], ids=["sent by the loop", "sent by the thread"], autouse=True)
def is_sent_here(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Have all batches sent by the one or the other."""
    is_here: bool = request.param
    monkeypatch.setattr(Turns, "is_here", lambda *_: is_here)
    return is_here


def rows(number: int, n_leaves: int = 16, n_elements: int = 5120) -> Batch:
    """Return tensors of 20 KiB that all hold the number of their batch."""
    return [torch.full((n_elements,), float(number)).pin_memory() for _ in range(n_leaves)]


def n_wrong(batches: Iterator[Batch], first: int = 0) -> int:
    """Count the batches that do not hold their number, on a GPU that lags behind."""
    wrong = torch.zeros((), dtype=torch.long, device="cuda")
    for number, batch in enumerate(batches, first):
        torch.cuda._sleep(MS)
        wrong += torch.stack([(leaf != number).any() for leaf in batch]).any()
        del batch
    assert number == N_BATCHES - 1
    return int(wrong)


@pytest.mark.parametrize("options", [{}, {"poison": True}, {"depth": 1}])
def test_no_row_is_wrong(options: dict[str, Any]) -> None:
    """Rows arrive whole: in memory that was poisoned too, and one batch at a time."""
    host = [rows(number) for number in range(N_BATCHES)]
    assert n_wrong(iter(DeviceLoader(host, "cuda", **options))) == 0


def test_rows_of_changing_number_and_size_arrive_whole() -> None:
    """Memory for the largest of the recent batches is also that of the smaller ones."""
    kinds = itertools.cycle([(16, 5120), (24, 5120), (16, 4224), (20, 5120), (16, 6144)])
    host = [rows(number, *kind) for number, kind in zip(range(N_BATCHES), kinds, strict=False)]
    assert n_wrong(iter(DeviceLoader(host, "cuda"))) == 0


def test_rows_grow_under_another_default_device() -> None:
    """The loader's own pinned memory lies on the host, whatever the loop's default device is."""
    host = [
        [leaf.clone() for leaf in rows(number, 16, 512 * (1 + number // 10))] for number in range(N_BATCHES)
    ]
    with torch.device("cuda"):
        assert n_wrong(iter(DeviceLoader(host, "cuda"))) == 0


def test_evicted_rows_come_back_whole() -> None:
    """Released in the middle of a pass, they go to the host, and to the device again in their turn."""
    loader = DeviceLoader([rows(number) for number in range(N_BATCHES)], "cuda", depth=3)
    batches = iter(loader)
    for number in range(30):
        assert all(bool((leaf == number).all()) for leaf in next(batches))
        if number % 7 == 6:
            loader.release_memory()
    assert n_wrong(batches, first=30) == 0


@pytest.mark.usefixtures("deterministic")
def test_rows_arrive_whole_in_deterministic_mode() -> None:
    """Memory is then made in another way."""
    assert n_wrong(iter(DeviceLoader([rows(number) for number in range(N_BATCHES)], "cuda"))) == 0


def test_an_interrupt_behind_a_copy_loses_nothing(
    *, is_sent_here: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was being sent is sent again, to other memory, and the memory of the first copy is fenced."""
    original, calls = CudaTransport.send_here, itertools.count()

    def interrupted(*arguments: Any) -> Any:
        parcel = original(*arguments)
        if next(calls) % 5 == 3:
            raise KeyboardInterrupt
        return parcel

    monkeypatch.setattr(CudaTransport, "send_here", interrupted)
    batches, n_interrupts = iter(DeviceLoader([rows(number) for number in range(N_BATCHES)], "cuda")), 0

    def going_on() -> Iterator[Batch]:
        nonlocal n_interrupts
        while True:
            try:
                yield next(batches)
            except KeyboardInterrupt:
                n_interrupts += 1
            except StopIteration:
                return

    assert n_wrong(going_on()) == 0
    assert (n_interrupts > 5) is is_sent_here
