"""Large pageable tensors on their way through pinned buffers: whole, side by side, in few calls."""

import itertools
from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.loader_transport import computing_with, grow_unpinned
from torchfast._loader import staging
from torchfast._loader.plan import ALIGNMENT_BYTES
from torchfast._loader.shared_memory import Dropper
from torchfast._loader.shipment import Shipment
from torchfast._loader.staging import PinnedBuffer, PinnedRing, Staging

KIB = 1024
PIECE_BYTES = 64 * KIB


class Sent(Shipment):
    """A shipment that makes its copies at once, from host to host, and counts the calls for them."""

    def __init__(self) -> None:
        super().__init__(None, lambda _: None)  # type: ignore[arg-type, return-value]  # on no stream
        self.n_copies: list[int] = []

    def enqueue(self) -> None:
        """Copy what was added since the last time."""
        if self._targets:
            torch._foreach_copy_(self._targets, self._sources)
            self.n_copies.append(len(self._targets))
            self._begin()


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let pieces be of 64 KiB, for a team of three, in memory that is not pinned."""
    monkeypatch.setattr(staging, "CHUNK_BYTES", PIECE_BYTES)
    monkeypatch.setattr(staging, "PAGE_BYTES", 512)
    monkeypatch.setattr(staging, "team_size", lambda _: 3)
    monkeypatch.setattr(PinnedBuffer, "grow", grow_unpinned)
    with computing_with(3):
        yield


def staged(sources: Sequence[torch.Tensor], by: Staging | None = None) -> tuple[list[torch.Tensor], Sent]:
    """Stage some tensors; return what arrived."""
    sent = Sent()
    targets = [torch.full_like(source, 77) for source in sources]
    by = by or Staging(2, 0)
    by.begin()
    by.stage([*zip(sources, targets, strict=True)], sent)
    return targets, sent


def tensors(sizes_bytes: Sequence[int]) -> list[torch.Tensor]:
    """Return random bytes."""
    numbers = torch.Generator().manual_seed(sum(sizes_bytes))
    return [
        torch.randint(0, 256, (n_bytes,), dtype=torch.uint8, generator=numbers) for n_bytes in sizes_bytes
    ]


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes_bytes=st.lists(st.integers(1, 3 * PIECE_BYTES), max_size=8))
def test_every_byte_arrives(sizes_bytes: list[int]) -> None:
    """However many tensors of whatever sizes there are, each is in its own place afterwards."""
    sources = tensors(sizes_bytes)
    by = Staging(2, 0)
    for _ in range(2):
        targets, sent = staged(sources, by)
        assert all(map(torch.equal, targets, sources))
        assert sent.staged_bytes == sum(sizes_bytes)


@pytest.mark.parametrize(
    ("kib", "n_copies"),
    [
        ([10] * 6, [6]),
        ([20] * 8, [3, 3, 2]),
        ([60, 60, 4], [1, 2]),
        ([20, 150], [1, 1, 1, 1]),
        ([150, 20], [1, 1, 2]),
        ([64] * 3, [2, 2, 2]),
    ],
    ids=["one piece", "some in each", "a gap", "a large one last", "a large one first", "full"],
)
def test_what_fits_a_piece_travels_together(
    kib: list[int], n_copies: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each piece is one copy on the host and one call to the driver, however many tensors are in it."""
    calls, copy = itertools.count(), torch._foreach_copy_
    sources = tensors([n * KIB for n in kib])
    monkeypatch.setattr(torch, "_foreach_copy_", lambda to, of: (next(calls), copy(to, of)))
    _, sent = staged(sources)
    assert sent.n_copies == n_copies
    assert next(calls) == 2 * len(n_copies)  # of which the shipment here makes one each


def test_tensors_in_a_piece_begin_where_a_member_of_the_team_may() -> None:
    """Each begins at a multiple of 512 bytes, and what a team of three copies is a multiple of its pages."""
    sources = tensors([10_001, 20_000, 5])
    sent = Sent()
    pieces = staging.Pieces(PinnedRing(2), 3, PIECE_BYTES, sent, Dropper())
    for source in sources:
        pieces.add(source, torch.empty_like(source))
    assert [staged.storage_offset() % ALIGNMENT_BYTES for staged in pieces._staged[::2]] == [0] * 3
    assert [staged.nbytes for staged in pieces._staged] == [9_216, 785, 19_968, 32, 0, 5]


@pytest.mark.parametrize(("kib", "buffer_kib"), [([10], 10), ([10, 20], 30), ([20] * 8, 64)])
def test_buffers_are_no_larger_than_needed(kib: list[int], buffer_kib: int) -> None:
    """A batch of a few MiB does not pin 16 for each buffer of the ring."""
    by = Staging(2, 0)
    staged(tensors([n * KIB for n in kib]), by)
    assert max(buffer.memory.nbytes for buffer in by._ring._buffers) == buffer_kib * KIB


def test_zeros_without_memory_are_staged() -> None:
    """Autograd's tensors of zeros have no memory that could be read."""
    zeros = torch._efficientzerotensor((30, 1000))
    assert zeros.data_ptr() == 0
    (arrived, after), _ = staged([zeros, torch.ones(5000)])
    assert torch.equal(arrived, torch.zeros(30, 1000))
    assert torch.equal(after, torch.ones(5000))


def test_mapped_memory_is_dropped_once_it_has_been_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not when it is added, nor with the batch: as soon as the last piece that it is in has been copied."""
    dropped = list[int]()
    sent = Sent()
    monkeypatch.setattr(
        Dropper, "take", lambda _, memory: dropped.append(memory[0] * 10 + len(sent.n_copies))
    )
    views = [memoryview(bytearray([number]) * n) for number, n in ((1, 20 * KIB), (2, 100 * KIB), (3, KIB))]
    targets = [torch.empty(len(view), dtype=torch.uint8) for view in views]
    pieces = staging.Pieces(PinnedRing(8), 3, 122 * KIB, sent, Dropper())
    for view, target in zip(views, targets, strict=True):
        pieces.add_mapped(view, target)
    assert dropped == [11]
    pieces.send()
    assert dropped == [11, 23, 33]
    assert [int(target.unique()) for target in targets] == [1, 2, 3]


def test_a_copy_that_fails_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """What could not be staged does not reach the device, and the next batch is whole."""
    by, sent = Staging(2, 0), Sent()
    sources = tensors([30 * KIB] * 3)
    targets = [torch.full_like(source, 77) for source in sources]

    def fail(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(torch, "_foreach_copy_", fail)
        with pytest.raises(MemoryError):
            by.stage([*zip(sources, targets, strict=True)], sent)
    assert sent.n_copies == []
    assert all(bool((target == 77).all()) for target in targets)
    assert all(map(torch.equal, staged(sources, by)[0], sources))
