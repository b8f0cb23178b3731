"""What copies consist of, and what they hold; whether they are right is in cuda/test_loader_copies.py."""

import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchfast._loader import shipment
from torchfast._loader.plan import Plan, tensor_on
from torchfast._loader.shipment import Shipment, let_go_of_what_was_read
from torchfast._loader.staging import PinnedBuffer


class Device:
    """A device that gets to what was enqueued only when told to."""

    def __init__(self) -> None:
        self.n_enqueued = self.n_done = 0

    def event(self, **_: object) -> "Event":
        """Return an event of this device."""
        return Event(self)


class Event:
    """A point in what was enqueued."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._at = 0

    def record(self, _: object) -> None:
        """Take what was enqueued so far."""
        self._device.n_enqueued += 1
        self._at = self._device.n_enqueued

    def query(self) -> bool:
        """Say whether the device got there."""
        return self._device.n_done >= self._at


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    """Return a device on which copies are enqueued, by the driver, one event behind each call."""
    device = Device()
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(shipment, "_being_read", type(shipment._being_read)())
    monkeypatch.setattr(shipment, "batched_copy", lambda: lambda *_: True)
    return device


class Stream:
    """A stream, as far as shipments care."""

    cuda_stream = 0


def ship(device: Device, sources: list[torch.Tensor], buffers: list[PinnedBuffer]) -> None:
    """Enqueue copies of tensors and of staging buffers."""

    def mark(stream: Any) -> Any:
        event = device.event()
        event.record(stream)
        return event

    one: Any = Shipment(Stream(), mark)  # type: ignore[arg-type]  # a stream of the imagination
    for source in sources:
        one.add(torch.empty_like(source), source)
    for buffer in buffers:
        one.add_staged(torch.empty(4, dtype=torch.uint8), buffer.memory[:4], buffer)
    one.enqueue()


def test_what_the_device_is_to_read_is_held_though_nobody_else_holds_it(device: Device) -> None:
    """Tensors and staging memory live until the event behind their copy has passed, and no longer."""
    alive = []
    for _ in range(3):
        tensor, buffer = torch.ones(5), PinnedBuffer()
        buffer.memory = torch.ones(8, dtype=torch.uint8)
        alive.append((weakref.ref(tensor), weakref.ref(buffer.memory)))
        ship(device, [tensor], [buffer])
        del tensor, buffer
    gc.collect()
    for n_read in range(4):
        let_go_of_what_was_read()
        assert [all(part() is not None for part in parts) for parts in alive] == [
            number >= n_read for number in range(3)
        ]
        device.n_done = device.n_enqueued * (n_read + 1) // 3


SHAPES: dict[str, tuple[int, ...]] = {
    "bare": (),
    "none": (0, 3),
    "4 KiB": (1024,),
    "84 KB": (3, 7000),
    "1 MB": (250_000,),
}
DTYPES = (torch.float32, torch.bool, torch.bfloat16, torch.complex128)
LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "as it is": lambda leaf: leaf,
    "transposed": lambda leaf: leaf.mT if leaf.dim() > 1 else leaf,
    "from an offset on": lambda leaf: torch.cat([leaf.view(-1), leaf.view(-1)])[leaf.numel() :].view(
        leaf.shape
    ),
    "every other": lambda leaf: leaf[..., ::2] if leaf.dim() else leaf,
}
LEAVES = st.builds(
    lambda shape, dtype, layout: LAYOUTS[layout](torch.zeros(SHAPES[shape], dtype=dtype)),
    st.sampled_from([*SHAPES]),
    st.sampled_from(DTYPES),
    st.sampled_from([*LAYOUTS]),
)


@given(st.lists(st.tuples(LEAVES, st.integers(1, 20)), min_size=1, max_size=8))
def test_the_driver_is_told_where_the_tensors_are(kinds: list[tuple[torch.Tensor, int]]) -> None:
    """Addresses that are added up, and sizes that are remembered, are those of the tensors."""
    leaves = [leaf.clone() if leaf.is_contiguous() else leaf for leaf, n in kinds for _ in range(n)]
    plan = Plan(leaves)
    if not plan.groups:
        return
    buffer = torch.empty(plan.buffer_layouts[0].n_bytes, dtype=torch.uint8)
    target = (
        buffer if plan.buffer_layouts[0].dtype is torch.uint8 else tensor_on(buffer, plan.buffer_layouts[0])
    )
    one: Any = Shipment(Stream(), lambda _: None)  # type: ignore[arg-type, return-value]  # of the imagination
    for group, copies in zip(plan.groups, plan.packed_on(target), strict=True):
        if group.may_go_straight:
            one.add_group(copies, [leaves[index] for index in group.indexes], group)
    assert one._addresses == [copy.data_ptr() for copy in one._targets]
    assert (
        one._sizes_bytes == [copy.nbytes for copy in one._targets] == [leaf.nbytes for leaf in one._sources]
    )
    assert one.reads_directly is any(group.may_go_straight for group in plan.groups)


def test_another_device_that_lags_keeps_nothing_of_this_one(device: Device) -> None:
    """What was read is let go of though something older was not."""
    lagging, tensor, older = Device(), torch.ones(5), torch.ones(6)
    shipment._being_read.append((lagging.event(), [older]))  # type: ignore[arg-type]  # of the imagination
    lagging.n_done = -1
    gone = weakref.ref(tensor)
    ship(device, [tensor], [])
    del tensor
    device.n_done = device.n_enqueued
    let_go_of_what_was_read()
    assert gone() is None
    assert [held for _, held in shipment._being_read] == [[older]]
