"""Reading the allocator and the driver, on a machine without a GPU."""

from typing import Any

import pytest
import torch

from torchfast import _memory
from torchfast._bytes import GIB
from torchfast._memory import AllocatorStats, DriverMemory, Room, allocator_stats, driver_memory, room_on

CUDA = torch.device("cuda", 0)
COUNTERS = ["allocated_bytes", "reserved_bytes", "active_bytes", "requested_bytes", "inactive_split_bytes"]
NESTED: dict[str, Any] = {
    **{
        name: {"all": {"current": 10 * i, "peak": 10 * i + 5, "allocated": 100 * i, "freed": 0}}
        for i, name in enumerate(COUNTERS, 1)
    },
    "num_alloc_retries": 3,
    "num_ooms": 2,
}
EXPECTED = AllocatorStats(10, 20, 30, 40, 50, 15, 25, 35, 45, 55, 3, 2, 100)


def test_a_cpu_has_no_allocator_and_no_driver() -> None:
    """On a CPU there is nothing to read, which is None and not zero."""
    assert allocator_stats(torch.device("cpu")) is None
    assert driver_memory(torch.device("cpu")) is None


def test_nothing_is_initialised_by_looking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before CUDA is initialised the answer is None, and CUDA stays uninitialised."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert allocator_stats(CUDA) is None
    assert driver_memory(CUDA) is None


def test_the_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every field is found in what PyTorch returns, and the reading that resets does both, in order."""
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)

    def read(index: int) -> dict[str, Any]:
        calls.append(f"read {index}")
        return NESTED

    monkeypatch.setattr(_memory, "_READ", read)
    monkeypatch.setattr(_memory, "_RESET", lambda index: calls.append(f"reset {index}"))
    assert allocator_stats(CUDA) == EXPECTED
    assert EXPECTED.peaks == (15, 25, 35, 45, 55)
    assert _memory._read_and_reset(CUDA) == EXPECTED
    assert calls == ["read 0", "read 0", "reset 0"]


@pytest.mark.skipif(torch.version.cuda is not None, reason="a CUDA build has the private functions")
def test_the_public_functions_stand_in_where_the_private_ones_are_gone() -> None:
    """A PyTorch without the private functions is read through its public ones."""
    assert _memory._READ is torch.cuda.memory_stats_as_nested_dict
    assert _memory._RESET is torch.cuda.reset_peak_memory_stats


def test_an_allocator_that_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's public reading is empty where there is nothing to read: None, not zeros."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(_memory, "_READ", lambda _: {})
    assert allocator_stats(CUDA) is None


def test_no_context_is_made_by_looking(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that this process has not used is not asked: the question would create a context there."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch._C, "_cuda_hasPrimaryContext", lambda _: False, raising=False)
    assert driver_memory(CUDA) is None
    monkeypatch.setattr(torch._C, "_cuda_hasPrimaryContext", lambda _: True, raising=False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (5, 9))
    assert driver_memory(CUDA) == (5, 9)


def test_contexts_where_pytorch_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the private question, the current device and one that holds memory are taken to have one."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.delattr(torch._C, "_cuda_hasPrimaryContext", raising=False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (5, 9))
    monkeypatch.setattr(_memory, "_READ", lambda index: NESTED if index == 2 else {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    found = [driver_memory(torch.device("cuda", index)) is not None for index in range(3)]
    assert found == [True, False, True]


@pytest.mark.parametrize(
    ("free_bytes", "fraction", "expected"),
    [
        (3 * GIB, 1.0, Room(80 * GIB, 10 * GIB, 3 * GIB)),
        (60 * GIB, 0.5, Room(40 * GIB, 10 * GIB, 30 * GIB)),  # PyTorch may hold half of the device
        (60 * GIB, 0.1, Room(8 * GIB, 10 * GIB, 0)),  # it held more when the limit was set
    ],
)
def test_room_of_a_process(
    monkeypatch: pytest.MonkeyPatch, free_bytes: int, fraction: float, expected: Room
) -> None:
    """What a process may have is what it holds and what is free, within the limit set for it."""
    stats = EXPECTED._replace(reserved_bytes=10 * GIB)
    monkeypatch.setattr(_memory, "allocator_stats", lambda _: stats)
    monkeypatch.setattr(_memory, "driver_memory", lambda _: DriverMemory(free_bytes, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda _: fraction)
    room = room_on(CUDA)
    assert room == expected
    assert room is not None
    assert room.usable_bytes == expected.held_bytes + expected.untaken_bytes


def test_no_room_is_known_where_nothing_is() -> None:
    """On a CPU nobody knows."""
    assert room_on(torch.device("cpu")) is None


def test_cached_is_neither_in_use_nor_the_rest_of_a_segment() -> None:
    """Blocks that another stream may still use are not cached, and nor are pieces of segments in use."""
    assert EXPECTED._replace(reserved_bytes=100).cached_bytes == 100 - 30 - 50
