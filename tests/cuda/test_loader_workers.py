"""DeviceLoader on a GPU around a DataLoader: whose batches are pinned by us, and read from shared memory."""

import _thread
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from tests.loader_sources import MS, Numbered, pinned_by_pytorch, wrong_leaves
from tests.loader_transport import computing_with, until
from torchfast import DeviceLoader
from torchfast._loader import staging, wrapped
from torchfast._loader.shared_memory import mapped_again
from torchfast._loader.staging import team_size

pytestmark = pytest.mark.cuda

LARGE = (64, 8192)  # 2 MiB: travels by itself


BATCHES = Numbered([LARGE, (5,)], 60)
"""Each of a large and a small tensor."""


def wrong_of(loader: DeviceLoader[Any], sleep: int = 2 * MS) -> int:
    """Count the wrong tensors of a pass."""
    return int(wrong_leaves(loader, len(BATCHES), sleep=sleep))


def loader_with_workers(**options: Any) -> DataLoader[list[torch.Tensor]]:
    """Return a DataLoader with two workers, whose items are batches."""
    return DataLoader(BATCHES, batch_size=None, num_workers=2, persistent_workers=True, **options)


def shared_mappings() -> int:
    """Count the mappings of shared memory of PyTorch's in this process."""
    return Path("/proc/self/maps").read_text().count("/torch_")


@pytest.mark.parametrize("pin_memory", [False, True])
def test_batches_of_workers_arrive_whole_and_leave_nothing(
    monkeypatch: pytest.MonkeyPatch, *, pin_memory: bool
) -> None:
    """All are read through second mappings, by no thread of PyTorch's, and no shared memory is left."""
    is_mapped_again = []

    def counted(tensor: torch.Tensor) -> Any:
        memory = mapped_again(tensor)
        is_mapped_again.append(memory is not None)
        return memory

    monkeypatch.setattr(staging, "mapped_again", counted)
    n_mapped = shared_mappings()
    loader = DeviceLoader(loader_with_workers(pin_memory=pin_memory), "cuda")
    for _ in range(3):
        assert wrong_of(loader) == 0
    assert is_mapped_again == [True] * 3 * 60
    loader.close()
    until(lambda: shared_mappings() == n_mapped)
    until(lambda: _thread._count() == threading.active_count() - 1)  # no thread but those that have names
    names = {thread.name for thread in threading.enumerate()}
    assert not any(name.startswith("torchfast") or "pin_memory" in name for name in names)
    assert loader.pin_memory is pin_memory


def test_batches_that_pytorch_goes_on_pinning_arrive_whole() -> None:
    """A loader that was iterated over bare keeps its thread that pins; its batches are whole too."""
    loader = DeviceLoader(pinned_by_pytorch(BATCHES), "cuda")
    for _ in range(3):
        assert wrong_of(loader) == 0


class IntoOneBuffer:
    """A collate function that fills the same pinned memory for each batch, as some readers do."""

    def __init__(self) -> None:
        self.leaves = [torch.empty(LARGE, pin_memory=True), torch.empty(5, pin_memory=True)]

    def __call__(self, batch: list[torch.Tensor]) -> list[torch.Tensor]:
        """Copy a batch there."""
        return [buffer.copy_(leaf) for buffer, leaf in zip(self.leaves, batch, strict=True)]


@pytest.mark.parametrize("is_trusted", [False, True])
def test_a_collate_function_may_fill_one_pinned_buffer(
    monkeypatch: pytest.MonkeyPatch, *, is_trusted: bool
) -> None:
    """To pin such a batch changes nothing, so it is copied in time; without that, batches are wrong."""
    if is_trusted:
        monkeypatch.setattr(wrapped, "writes_afresh", lambda _: True)
    loader = DataLoader(BATCHES, batch_size=None, collate_fn=IntoOneBuffer(), pin_memory=True)
    torch.cuda._sleep(2000 * MS)  # a second, in which no copy begins, and the slowest of hosts fills the next
    assert (wrong_of(DeviceLoader(loader, "cuda")) > 0) is is_trusted


class Handle:
    """An object that pins itself, and says whether it was when it was moved."""

    def __init__(self, *, is_pinned: bool = False) -> None:
        self.is_pinned = is_pinned

    def pin_memory(self) -> "Handle":
        """Return it in pinned memory."""
        return type(self)(is_pinned=True)


class MovableHandle(Handle):
    """One that also moves itself."""

    def to(self, _: torch.device) -> "Handle":
        """Return it on the device."""
        return self


class Handles(Dataset[Any]):
    """Such objects, as whole batches."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make

    def __len__(self) -> int:
        return 3

    def __getitem__(self, _: int) -> Any:
        return self._make()


@pytest.mark.parametrize("pin_memory", [False, True])
@pytest.mark.parametrize("kind", [Handle, MovableHandle])
def test_what_pins_itself_is_asked_to_where_the_loader_pins(
    kind: Callable[[], Any], *, pin_memory: bool
) -> None:
    """Objects of the user's own are pinned as a DataLoader would pin them, and only if it was told to."""
    loader = DataLoader(Handles(kind), batch_size=None, pin_memory=pin_memory)
    assert [batch.is_pinned for batch in DeviceLoader(loader, "cuda")] == [pin_memory] * 3


class Threads(Dataset[torch.Tensor]):
    """Says with how many threads it is loaded, before and after it computes something in parallel."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, _: int) -> torch.Tensor:
        before = torch.get_num_threads()
        torch.ones(2**22).sum()
        return torch.tensor([before, torch.get_num_threads()])


def test_a_loader_without_workers_computes_with_no_more_threads_than_the_loop() -> None:
    """Its sums come out as in the bare loop: the copying thread has the loop's number, or its share."""
    for n_allowed in (1, 3, 1000):
        with computing_with(n_allowed):
            loader = DeviceLoader(DataLoader(Threads(), batch_size=None), "cuda")
            for _ in range(2):
                assert {int(n) for batch in loader for n in batch} == {min(n_allowed, team_size(0))}
            assert torch.get_num_threads() == n_allowed


@pytest.mark.parametrize("is_torchruns", [False, True])
def test_batches_of_workers_are_staged_by_a_team(
    monkeypatch: pytest.MonkeyPatch, *, is_torchruns: bool
) -> None:
    """By as many threads as the loop chose, and by all CPUs that are left over where only torchrun did."""
    if is_torchruns:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
    seen, stage = [], staging.Staging.stage

    def staged(*arguments: Any) -> None:
        stage(*arguments)
        seen.append(torch.get_num_threads())

    monkeypatch.setattr(staging.Staging, "stage", staged)
    with computing_with(1):
        assert wrong_of(DeviceLoader(loader_with_workers(), "cuda")) == 0
        assert torch.get_num_threads() == 1
    assert set(seen) == {team_size(2) if is_torchruns else 1}
