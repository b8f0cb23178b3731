"""Many tensors copied side by side: whole whoever copies, with nothing held, changed or waited for after."""

import _thread
import sys
import threading
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.loader_transport import HostTransport, until
from torchfast._loader import helpers
from torchfast._loader.feed import ThreadedFeed
from torchfast._loader.helpers import Helpers, Share
from torchfast._loader.stats import Tally
from torchfast._loader.thread import no_state

MIB = 2**20


@pytest.fixture
def four() -> Iterator[Helpers]:
    """Return four helpers of this thread."""
    four = Helpers(4, usual_threads=torch.get_num_threads())
    yield four
    four.close()


@pytest.fixture
def shares(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the numbers of tensors that helpers were given, as they come to copy them."""
    shares, copied = list[int](), Share.copied

    def counted(share: Share) -> BaseException | None:
        shares.append(len(share.sources))
        return copied(share)

    monkeypatch.setattr(Share, "copied", counted)
    return shares


def copied(by: Helpers, n_tensors: int, n_bytes: int = 16 * MIB) -> bool:
    """Copy some tensors, said to have so many bytes; say whether they arrived."""
    sources = [torch.full((50 + number,), float(number)) for number in range(n_tensors)]
    targets = [torch.zeros_like(source) for source in sources]
    by.copy(targets, sources, n_bytes)
    return all(map(torch.equal, targets, sources))


@given(
    sizes=st.lists(st.integers(0, 60_000), min_size=1, max_size=30),
    n_threads=st.integers(0, 12),
    n_mib=st.integers(0, 16),
)
def test_every_tensor_arrives(sizes: list[int], n_threads: int, n_mib: int) -> None:
    """However many tensors, bytes and helpers there are, each tensor is copied to its own place."""
    some = Helpers(n_threads, usual_threads=torch.get_num_threads())
    sources = [torch.randint(0, 256, (size,), dtype=torch.uint8) for size in sizes]
    targets = [torch.zeros_like(source) for source in sources]
    some.copy(targets, sources, n_mib * MIB)
    some.close()
    assert all(map(torch.equal, targets, sources))


@pytest.mark.parametrize(
    ("n_tensors", "n_bytes", "expected"),
    [
        (10, 16 * MIB, [2, 2, 3, 3]),
        (10, 7 * MIB, [3, 3, 4]),
        (3, 16 * MIB, [1, 1, 1]),
        (10, 6 * MIB - 1, []),
        (2, 16 * MIB, []),
    ],
)
def test_two_mib_are_worth_a_helper(
    four: Helpers, shares: list[int], n_tensors: int, n_bytes: int, expected: list[int]
) -> None:
    """Work is shared out evenly, among as many as it is worth waking, and no fewer than three."""
    assert copied(four, n_tensors, n_bytes)
    assert sorted(shares) == expected


def test_there_are_never_more_than_six(shares: list[int]) -> None:
    """A machine of a hundred CPUs does not get a hundred threads."""
    many = Helpers(100, usual_threads=torch.get_num_threads())
    assert copied(many, 100, 16 * MIB)
    assert len(shares) == 6
    many.close()


def test_another_thread_is_not_helped(four: Helpers, shares: list[int]) -> None:
    """The loop's own thread, which an interrupt could take from its waiting, copies by itself."""
    arrived = list[bool]()
    other = threading.Thread(target=lambda: arrived.append(copied(four, 10)))
    other.start()
    other.join()
    assert arrived == [True]
    assert shares == []


def test_nobody_else_computes_with_fewer_threads() -> None:
    """Helpers have one thread each; this thread, and those begun later, have as many as before."""
    usual, found = torch.get_num_threads(), list[int]()

    def ask() -> None:
        found.append(torch.get_num_threads())

    torch.set_num_threads(3)
    try:
        three = Helpers(3, usual_threads=3)
        assert copied(three, 10)

        def is_put_back() -> bool:
            one = threading.Thread(target=ask)
            one.start()
            one.join()
            return found[-1] == 3

        until(is_put_back)
        assert torch.get_num_threads() == 3
        three.close()
    finally:
        torch.set_num_threads(usual)


class Observed(SimpleQueue[BaseException | None]):
    """Outcomes, and how often each of some tensors is held when they are told."""

    def __init__(self, sources: list[torch.Tensor]) -> None:
        super().__init__()
        self.sources = sources
        self.held = list[list[int]]()

    def put(self, item: BaseException | None, block: bool = True, timeout: float | None = None) -> None:  # noqa: FBT001, FBT002 -- as it is declared
        """Look, and put."""
        self.held.append([sys.getrefcount(source) for source in self.sources])
        super().put(item, block, timeout)


def test_nothing_of_a_batch_is_held() -> None:
    """Helpers let go of tensors before they tell that these are copied."""
    three = Helpers(3, usual_threads=torch.get_num_threads())
    sources = [torch.ones(9) for _ in range(3)]
    three._outcomes = seen = Observed(sources)
    seen.put(None)
    seen.get()
    three.copy([torch.zeros(9) for _ in sources], sources, 16 * MIB)
    three.close()
    assert seen.held[0] == seen.held[-1]


def test_an_error_comes_to_who_is_helped_once_all_are_done(four: Helpers) -> None:
    """What cannot be copied is told of, nothing is copied later, and the next copy is as any other."""
    sources = [torch.ones(5) for _ in range(8)]
    targets = [torch.zeros(5) for _ in range(7)] + [torch.zeros(4)]
    with pytest.raises(RuntimeError, match="size of tensor"):
        four.copy(targets, sources, 16 * MIB)
    assert all(bool(target.all()) for target in targets[:3])
    assert copied(four, 10)


@pytest.mark.parametrize("n_allowed", [0, 1])
def test_where_threads_are_refused_there_is_no_help(
    n_allowed: int, shares: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the end of the interpreter no thread can be started, and one alone is not relied upon."""
    start, n_started = _thread.start_new_thread, 0

    def refusing(function: Any, arguments: Any) -> int:
        nonlocal n_started
        n_started += 1
        if n_started > n_allowed:
            raise RuntimeError("can't start new thread at interpreter shutdown")
        return start(function, arguments)

    monkeypatch.setattr(_thread, "start_new_thread", refusing)
    some = Helpers(4, usual_threads=torch.get_num_threads())
    assert copied(some, 10)
    assert copied(some, 10)
    assert shares == []
    some.close()


def test_threads_end_with_close() -> None:
    """A moment after `close` no thread is left, used or not, and closing again does nothing."""
    before = _thread._count()
    for is_used in (True, False):
        some = Helpers(4, usual_threads=torch.get_num_threads())
        assert not is_used or copied(some, 10)
        some.close()
        some.close()
        until(lambda: _thread._count() == before)


class HelpedTransport(HostTransport):
    """Hands batches over after its thread was helped with a copy."""

    def enter_thread(self) -> None:
        """Get helpers."""
        self.helpers = Helpers(3, usual_threads=torch.get_num_threads())

    def leave_thread(self) -> None:
        """Let them go."""
        self.helpers.close()

    def send(self, batch: Any, blank: object) -> Any:
        """Be helped, and send."""
        assert copied(self.helpers, 4)
        return super().send(batch, blank)


def test_the_collector_may_end_a_pass_in_a_helper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A close in the thread that the copying thread waits for does not wait for that: both would hang."""
    closed_in = list[int]()
    share_copied = Share.copied

    def close_and_copy(share: Share) -> BaseException | None:
        if helpers.helped_thread() == feed._thread.ident and not closed_in:
            feed.close()
            closed_in.append(threading.get_ident())
        return share_copied(share)

    monkeypatch.setattr(Share, "copied", close_and_copy)
    is_made = threading.Event()

    def source() -> Iterator[int]:
        is_made.wait()
        yield from range(3)

    feed = ThreadedFeed(iter(source()), HelpedTransport(), Tally(), depth=2, snapshot=no_state)
    is_made.set()
    assert feed._work.left.wait(30)
    assert closed_in
    assert closed_in != [feed._thread.ident]
    feed.close()
    assert not feed._thread.is_alive()
