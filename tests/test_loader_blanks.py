"""Memory set aside for batches to come: as much as the recent ones took, and free once its gate is passed."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchfast._loader import blanks as module
from torchfast._loader.blanks import Blank, Blanks
from torchfast._loader.events import Events
from torchfast._loader.plan import PACK_BELOW_BYTES, Plan, empty

LARGE = PACK_BELOW_BYTES


class Timeline:
    """Streams and events of the imagination, and in which order they were told what."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.told = list[tuple[Any, ...]]()
        self.current: Any = None
        patch.setattr(torch.cuda, "Event", lambda **_: Event(self))
        patch.setattr(torch.cuda, "stream", self._on)
        patch.setattr(module, "empty", self._empty)

    def _empty(self, *of: Any) -> torch.Tensor:
        self.told.append(("allocate", self.current))
        return empty(*of)

    @contextmanager
    def _on(self, stream: "Stream") -> Iterator[None]:
        self.current, usual = stream, self.current
        yield
        self.current = usual


class Event:
    """Tells where it is recorded."""

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline

    def record(self, stream: Any) -> None:
        """Note the stream."""
        self._timeline.told.append(("record", self, stream))


class Stream:
    """Tells what it waits for."""

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline

    def wait_event(self, event: Event) -> None:
        """Note the event."""
        self._timeline.told.append(("wait", self, event))


@pytest.fixture
def timeline(monkeypatch: pytest.MonkeyPatch) -> Timeline:
    """Return a device without a GPU."""
    return Timeline(monkeypatch)


@pytest.fixture
def consumer(timeline: Timeline) -> Any:
    """Return the stream that uses the batches."""
    return Stream(timeline)


def plan(*sizes_bytes: int) -> Plan:
    """Return how a batch of tensors of such sizes travels."""
    return Plan([torch.empty(n_bytes, dtype=torch.uint8) for n_bytes in sizes_bytes])


def sizes(blank: Blank) -> list[int]:
    """Return how large the memory is that was set aside."""
    assert [buffer.nbytes for buffer in blank.buffers] == [layout.n_bytes for layout in blank.layouts]
    return [buffer.nbytes for buffer in blank.buffers]


def after(batches: Sequence[Sequence[int]], consumer: Any) -> Blanks:
    """Return what has seen such batches."""
    some = Blanks(torch.device("cpu"), Events())
    for batch in batches:
        some.fitting(None, plan(*batch), consumer)
    return some


SIZES = st.sampled_from([LARGE, LARGE + 1, 2 * LARGE])


@given(batches=st.lists(st.lists(SIZES, min_size=1, max_size=2), min_size=1, max_size=12))
def test_memory_is_set_aside_for_the_largest_of_the_recent_batches(batches: list[list[int]]) -> None:
    """Buffer by buffer, of those of the last eight that have as many as the last one."""
    with pytest.MonkeyPatch.context() as patch:
        consumer: Any = Stream(Timeline(patch))
        found = sizes(after(batches, consumer).set_aside(consumer))
    alike = [batch for batch in batches[-8:] if len(batch) == len(batches[-1])]
    assert found == [*map(max, zip(*alike, strict=True))]


def test_nothing_is_set_aside_where_there_is_no_telling(consumer: Any) -> None:
    """Before the first batch, and behind one that needs none; the next one that does is expected again."""
    some = Blanks(torch.device("cpu"), Events())
    assert sizes(some.set_aside(consumer)) == []
    some.fitting(None, plan(LARGE), consumer)
    some.expect_none()
    assert sizes(some.set_aside(consumer)) == []
    some.fitting(None, plan(LARGE), consumer)
    assert sizes(some.set_aside(consumer)) == [LARGE]


def test_a_device_that_is_full_is_no_error_of_the_step(
    consumer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None is set aside then, with a gate all the same: the batch asks for itself, and fails for itself."""
    some = after([[LARGE]], consumer)

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(module, "empty", full)
    blank = some.set_aside(consumer)
    assert sizes(blank) == []
    assert isinstance(blank.gate.event, Event)
    with pytest.raises(torch.OutOfMemoryError):
        some.fitting(blank, plan(LARGE), consumer)


@pytest.mark.parametrize(
    ("aside", "wanted", "fits"),
    [
        ([LARGE], [LARGE], True),
        ([2 * LARGE], [LARGE], True),
        ([LARGE], [2 * LARGE], False),
        ([2 * LARGE, LARGE], [LARGE, 2 * LARGE], False),
        ([LARGE, LARGE], [LARGE], False),
        ([LARGE, 2 * LARGE], [LARGE, LARGE], True),
    ],
)
def test_memory_that_fits_is_used_and_no_other(
    aside: list[int], wanted: list[int], consumer: Any, *, fits: bool
) -> None:
    """Every buffer must be large enough; else there is memory of the very sizes, and never too little."""
    some = after([aside], consumer)
    blank = some.set_aside(consumer)
    found = some.fitting(blank, plan(*wanted), consumer)
    assert (found is blank) is fits
    assert sizes(found) == (aside if fits else wanted)
    assert sizes(some.fitting(None, plan(*wanted), consumer)) == wanted


def test_the_gate_is_recorded_on_the_stream_of_the_memory(timeline: Timeline, consumer: Any) -> None:
    """In the loop's thread on its current stream; in the other thread on the stream that it is told."""
    some = after([[LARGE]], consumer)
    timeline.told.clear()
    timeline.current = "the loop's"
    aside = some.set_aside(consumer)
    timeline.current = "another"
    made = some.fitting(None, plan(LARGE), consumer)
    assert timeline.told == [
        ("allocate", "the loop's"),
        ("record", aside.gate.event, consumer),
        ("allocate", consumer),
        ("record", made.gate.event, consumer),
    ]
    assert (aside.stream, made.stream) == (consumer, consumer)
    assert aside.gate.event is not made.gate.event


def test_memory_rests_for_two_batches_once_it_is_poisoned(timeline: Timeline, consumer: Any) -> None:
    """It is filled when its last use is over, and goes on to whoever waited for that: three batches later."""
    some, copying = after([[LARGE, 2 * LARGE]], consumer), Stream(timeline)
    asides = [some.set_aside(consumer) for _ in range(5)]
    timeline.told.clear()
    found = [some.rested(aside, copying) for aside in asides]  # type: ignore[arg-type]
    assert found[:2] == [None, None]
    for aside, rested in zip(asides, found[2:], strict=False):
        assert rested is not None
        assert rested.buffers is aside.buffers
        assert all(bool((buffer == 0xFF).all()) for buffer in rested.buffers)
        poisoned = rested.gate.event
        order = [
            timeline.told.index(what)
            for what in (
                ("wait", copying, aside.gate.event),
                ("record", poisoned, copying),
                ("wait", consumer, poisoned),
            )
        ]
        assert order == sorted(order)


def test_memory_for_nothing_rests_too_and_is_handed_to_nobody(timeline: Timeline, consumer: Any) -> None:
    """The batches behind the first are then told apart from it: it had none set aside."""
    some, copying = Blanks(torch.device("cpu"), Events()), Stream(timeline)
    blanks = [some.set_aside(consumer)]
    some.fitting(None, plan(LARGE), consumer)
    blanks += [some.set_aside(consumer) for _ in range(3)]
    found = [some.rested(blank, copying) for blank in blanks]  # type: ignore[arg-type]
    assert found[:3] == [None] * 3
    assert found[3] is not None
    assert sizes(found[3]) == [LARGE]
