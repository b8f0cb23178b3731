"""What copies consist of, and what they hold; whether they are right is in cuda/test_loader_copies.py."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.late_stream import LateEvent, LateStream
from torchfast._loader import shipment
from torchfast._loader.pinned_ring import Part, PinnedBuffer
from torchfast._loader.plan import Plan, empty
from torchfast._loader.shipment import hold_until_read, let_go_of_what_was_read


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> LateStream:
    """Return the stream of a device that lags."""
    stream = LateStream()
    stream.replace_the_device(monkeypatch)
    return stream


def ship(stream: LateStream, sources: list[torch.Tensor], buffers: list[PinnedBuffer]) -> list[torch.Tensor]:
    """Enqueue copies of tensors and of staging buffers; return where they go."""
    one = stream.shipment()
    targets = [torch.empty_like(source) for source in sources]
    for target, source in zip(targets, sources, strict=True):
        one.add(target, source)
    for buffer in buffers:
        targets.append(torch.empty(4, dtype=torch.uint8))
        one.add_staged(Part(targets[-1], 0, 4, buffer, 0))
    one.enqueue()
    return targets


def test_what_the_device_is_to_read_is_held_though_nobody_else_holds_it(stream: LateStream) -> None:
    """Tensors and staging memory live until the event behind their copy has passed, and no longer."""
    alive, targets = [], list[torch.Tensor]()
    for _ in range(3):
        tensor, buffer = torch.ones(5), PinnedBuffer()
        buffer.memory = torch.ones(8, dtype=torch.uint8)
        alive.append((weakref.ref(tensor), weakref.ref(buffer.memory)))
        targets += ship(stream, [tensor], [buffer])
        del tensor, buffer
    gc.collect()
    for n_read in range(4):
        let_go_of_what_was_read()
        assert [all(part() is not None for part in parts) for parts in alive] == [
            number >= n_read for number in range(3)
        ]
        stream.go_on_to(stream.n_enqueued * (n_read + 1) // 3)
    assert all(bool((target == 1).all()) for target in targets)


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
    packed = empty(plan.buffer_layouts[0], torch.device("cpu"))
    one = LateStream().shipment()
    for group, copies in zip(plan.groups, plan.packed_on(packed), strict=True):
        if group.may_go_straight:
            one.add_group(copies, [leaves[index] for index in group.indexes], group)
    assert one._to == [copy.data_ptr() for copy in one._targets]
    assert one._from == [leaf.data_ptr() for leaf in one._sources]
    assert (
        one._sizes_bytes == [copy.nbytes for copy in one._targets] == [leaf.nbytes for leaf in one._sources]
    )
    assert one.reads_directly is any(group.may_go_straight for group in plan.groups)


def test_another_device_that_lags_keeps_nothing_of_this_one(stream: LateStream) -> None:
    """What was read is let go of though something older was not."""
    lagging: Any = LateStream()
    tensor, older = torch.ones(5), torch.ones(6)
    hold_until_read(lagging.mark(), lagging, [older])
    lagging.n_done = -1
    gone = weakref.ref(tensor)
    (target,) = ship(stream, [tensor], [])
    del tensor
    stream.go_on_to(stream.n_enqueued)
    assert torch.equal(target, torch.ones(5))
    let_go_of_what_was_read()
    assert gone() is None
    assert [read.memory for read in shipment._being_read] == [[older]]


def test_a_stream_that_is_behind_is_asked_once(stream: LateStream, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is past its copies in their order, and asking is a call of the driver."""
    asked = list[Any]()
    query = LateEvent.query

    def noted(event: LateEvent) -> bool:
        asked.append(event)
        return query(event)

    monkeypatch.setattr(LateEvent, "query", noted)
    targets = [ship(stream, [torch.ones(5)], []) for _ in range(5)]
    events = [read.ended for read in shipment._being_read]
    stream.go_on_to(2)
    let_go_of_what_was_read()
    assert asked == events[:3]
    assert len(shipment._being_read) == 3
    assert len(targets) == 5


def test_a_buffer_forgets_what_was_read(stream: LateStream) -> None:
    """The event may be recorded again for something else, which who takes the buffer need not wait for."""
    buffer = PinnedBuffer()
    buffer.memory = torch.ones(8, dtype=torch.uint8)
    targets = [ship(stream, [torch.ones(5)], [buffer]) for _ in range(2)]
    first, second = shipment._being_read
    stream.go_on_to(2)
    let_go_of_what_was_read()
    assert (first.ended, first.memory) == (None, [])
    first.let_go()  # so does another thread, which had asked before
    assert buffer.read is second
    assert not second.is_over()
    second.wait()
    let_go_of_what_was_read()
    assert (second.ended, second.memory) == (None, [])
    assert len(targets) == 2
