"""Many tensors copied side by side: whole whoever copies, with nothing held, changed or waited for after."""

import _thread
import gc
import itertools
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.loader_transport import (
    HostTransport,
    computing_with,
    grow_unpinned,
    number_of_a_new_thread,
    until,
)
from torchfast._loader import staging
from torchfast._loader.epoch import Epoch
from torchfast._loader.feed import ThreadedFeed
from torchfast._loader.helpers import Helpers, Share
from torchfast._loader.pinned_ring import PinnedBuffer
from torchfast._loader.plan import Plan
from torchfast._loader.shipment import Shipment
from torchfast._loader.staging import Staging
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
    """Return the sizes of what helpers were given, in bytes, as they come to copy it."""
    shares, copied = list[int](), Share.copied

    def counted(share: Share) -> BaseException | None:
        shares.append(sum(source.nbytes for source in share.sources))
        return copied(share)

    monkeypatch.setattr(Share, "copied", counted)
    return shares


def tensors(sizes_bytes: Sequence[int]) -> list[torch.Tensor]:
    """Return tensors of such sizes, each filled with its own number."""
    return [
        torch.full((n_bytes,), number % 256, dtype=torch.uint8) for number, n_bytes in enumerate(sizes_bytes)
    ]


def copied(by: Helpers, sizes_bytes: Sequence[int] = (MIB // 2,) * 32) -> bool:
    """Copy some tensors, by default 16 MiB in all; say whether they arrived."""
    sources = tensors(sizes_bytes)
    targets = [torch.full_like(source, 255) for source in sources]
    for group in Plan(sources).groups:
        by.copy([targets[i] for i in group.indexes], [sources[i] for i in group.indexes], group)
    return all(map(torch.equal, targets, sources))


@settings(max_examples=60)
@given(sizes_bytes=st.lists(st.integers(0, MIB - 1), min_size=1, max_size=40), n_threads=st.integers(0, 12))
def test_every_tensor_arrives(sizes_bytes: list[int], n_threads: int) -> None:
    """However many tensors, bytes and helpers there are, each tensor is copied to its own place."""
    some = Helpers(n_threads, usual_threads=torch.get_num_threads())
    assert copied(some, sizes_bytes)
    some.close()


@pytest.mark.parametrize(
    ("n_mib", "n_shares"), [(16, 4), (7, 3), (6, 3), (5, 0)], ids=["most", "three", "fewest", "none"]
)
def test_two_mib_are_worth_a_helper(four: Helpers, shares: list[int], n_mib: int, n_shares: int) -> None:
    """As many are woken as it is worth, and no fewer than three."""
    assert copied(four, [MIB // 2] * 2 * n_mib)
    assert len(shares) == n_shares


@pytest.mark.parametrize(
    "kib",
    [[600, 20] * 24, [600, 20, 20] * 24, [1000] * 9 + [20] * 300, [20] * 300 + [1000] * 9, [512] * 31],
    ids=["in turn", "one of three", "large first", "small first", "alike"],
)
def test_work_is_shared_out_evenly(four: Helpers, shares: list[int], kib: list[int]) -> None:
    """Whatever sizes come in a batch and in which order, no helper has more than a MiB beyond its part."""
    sizes_bytes = [n * 1024 for n in kib]
    assert copied(four, sizes_bytes)
    assert len(shares) == 4
    assert max(shares) <= sum(sizes_bytes) / 4 + MIB


def test_there_are_never_more_than_six(shares: list[int]) -> None:
    """A machine of a hundred CPUs does not get a hundred threads."""
    many = Helpers(100, usual_threads=torch.get_num_threads())
    assert copied(many)
    assert len(shares) == 6
    many.close()


def test_nobody_else_computes_with_fewer_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Helpers have one thread each; this thread, and those begun later, have as many as before."""
    of_helpers, share_copied = set[int](), Share.copied

    def asked(share: Share) -> BaseException | None:
        of_helpers.add(torch.get_num_threads())
        return share_copied(share)

    monkeypatch.setattr(Share, "copied", asked)
    with computing_with(3):
        three = Helpers(3, usual_threads=3)
        assert copied(three)
        until(lambda: number_of_a_new_thread() == 3)
        assert torch.get_num_threads() == 3
        assert of_helpers == {1}
        three.close()


class Observed(SimpleQueue[Share | None]):
    """What helpers are given, with outcomes that note how often each of some tensors is held by then."""

    def __init__(self, sources: list[torch.Tensor]) -> None:
        super().__init__()
        self._sources = sources
        self.held = [self._count()]

    def _count(self) -> list[int]:
        return [sys.getrefcount(source) for source in self._sources]

    def get(self, block: bool = True, timeout: float | None = None) -> Share | None:  # noqa: FBT001, FBT002 -- as it is declared
        """Hand out a share whose outcome is observed."""
        share = super().get(block, timeout)
        return None if share is None else share._replace(outcomes=Telling(share.outcomes, self))

    def tell(self) -> None:
        """Note it."""
        self.held.append(self._count())


class Telling(SimpleQueue[BaseException | None]):
    """Where an outcome is told, and before it that it is."""

    def __init__(self, outcomes: SimpleQueue[BaseException | None], observed: Observed) -> None:
        super().__init__()
        self._outcomes, self._observed = outcomes, observed

    def put(self, item: BaseException | None, block: bool = True, timeout: float | None = None) -> None:  # noqa: FBT001, FBT002 -- as it is declared
        """Look, and put."""
        self._observed.tell()
        self._outcomes.put(item, block, timeout)


def test_nothing_of_a_batch_is_held() -> None:
    """Helpers let go of tensors before they tell that these are copied."""
    three = Helpers(3, usual_threads=torch.get_num_threads())
    sources = tensors([MIB - 512] * 7)
    (group,) = Plan(sources).groups
    three._shares = seen = Observed(sources)
    three.copy([torch.empty_like(source) for source in sources], sources, group)
    three.close()
    assert len(seen.held) == 4
    assert seen.held[0] in seen.held[1:]


@pytest.mark.parametrize("error", [OSError, SystemExit])
def test_an_error_comes_to_who_is_helped_once_all_are_done(
    four: Helpers, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cannot be copied is told of when nobody copies any more, holds nothing, and is over then."""
    copy, n_done, has_failed = torch._foreach_copy_, itertools.count(), threading.Event()

    def copy_or_fail(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
        if sources[0][0] == 0:
            has_failed.set()
            raise error
        has_failed.wait()
        threading.Event().wait(0.05)  # who does not wait for all is gone by then
        copy(targets, sources)
        next(n_done)

    monkeypatch.setattr(torch, "_foreach_copy_", copy_or_fail)
    gc.collect()
    gc.disable()
    try:
        alive = fail(four, error)
        assert next(n_done) == 3
        assert [one() for one in alive] == [None] * 32
    finally:
        gc.enable()
    monkeypatch.undo()
    assert copied(four)


def fail(by: Helpers, error: type[BaseException]) -> list["weakref.ref[torch.Tensor]"]:
    """Copy in vain; return references to the tensors."""
    sources = tensors([MIB // 2] * 32)
    with pytest.raises(error) as raised:
        by.copy([torch.empty_like(source) for source in sources], sources, Plan(sources).groups[0])
    del raised
    return [weakref.ref(source) for source in sources]


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
    assert copied(some)
    assert copied(some)
    assert shares == []
    some.close()


def test_threads_end_with_close(shares: list[int]) -> None:
    """A moment after `close` no thread is left, used or not; closing again, and copying, starts none."""
    before = _thread._count()
    for is_used in (True, False):
        some = Helpers(4, usual_threads=torch.get_num_threads())
        assert not is_used or copied(some)
        some.close()
        some.close()
        until(lambda: _thread._count() <= before)
        shares.clear()
        assert copied(some)
        assert shares == []


def packed(staging: Staging) -> bool:
    """Stage 16 MiB of small tensors; say whether they are in the buffer that is to be copied."""
    sources = tensors([MIB // 2] * 32)
    (group,) = Plan(sources).groups
    shipment = Shipment(None, lambda _: None)  # type: ignore[arg-type, return-value]  # on no stream
    shipment.enqueue = lambda: None  # type: ignore[method-assign]  # nor is it sent
    staging.pack(group, sources, torch.empty(group.n_bytes, dtype=torch.uint8), shipment)
    (part,) = shipment._parts
    return all(map(torch.equal, part.buffer.memory[: part.n_bytes].split(MIB // 2), sources))


def test_the_copying_thread_is_helped_and_no_other(
    shares: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that has entered has helpers until it leaves; another, as the loop's own, copies by itself."""
    monkeypatch.setattr(staging, "team_size", lambda _: 4)
    monkeypatch.setattr(PinnedBuffer, "grow", grow_unpinned)
    before = _thread._count()
    has_entered, may_pack, has_packed, may_leave = (threading.Event() for _ in range(4))
    arrived, shares_then = list[bool](), list[int]()
    one = Staging(2, 0)

    def be_the_copying_thread() -> None:
        one.enter_thread()
        has_entered.set()
        may_pack.wait()
        arrived.append(packed(one))
        shares_then.extend(shares)
        has_packed.set()
        may_leave.wait()
        one.leave_thread()

    with computing_with(5):
        one.begin()
        copying = threading.Thread(target=be_the_copying_thread)
        copying.start()
        has_entered.wait()
        torch.set_num_threads(5)  # as a pass says again once its thread has entered
        may_pack.set()
        has_packed.wait()
        arrived.append(packed(one))
        until(lambda: number_of_a_new_thread() == 5)
        may_leave.set()
        copying.join()
    assert arrived == [True, True]
    assert shares == shares_then == [4 * MIB] * 4
    until(lambda: _thread._count() <= before)


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
        assert copied(self.helpers)
        return super().send(batch, blank)


def looped_over(epoch: Epoch[int]) -> Iterator[int]:
    """Iterate as a generator, whose end closes the pass."""
    yield from epoch


@pytest.mark.parametrize("loop", [lambda epoch: epoch, looped_over], ids=["pass", "generator"])
def test_the_collector_may_end_a_pass_in_a_helper(
    loop: Callable[[Epoch[int]], Iterator[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copying thread waits for a helper: where the last reference goes in one, it is not waited for."""
    dropped_in, share_copied = list[int](), Share.copied

    def drop_and_copy(share: Share) -> BaseException | None:
        if is_made.is_set() and held:
            held.clear()
            dropped_in.append(threading.get_ident())
        return share_copied(share)

    monkeypatch.setattr(Share, "copied", drop_and_copy)
    is_made = threading.Event()

    def source() -> Iterator[int]:
        yield 0
        is_made.wait()
        yield from range(1, 4)

    feed = ThreadedFeed(iter(source()), HelpedTransport(), Tally(), depth=2, snapshot=no_state)
    held = [loop(Epoch(feed, None, owner=None))]
    assert next(held[0]) == 0
    is_made.set()
    assert feed._work.left.wait(30)
    assert len(dropped_in) == 1
    assert dropped_in[0] not in (feed._thread.ident, threading.get_ident())
    feed.close()
    assert not feed._thread.is_alive()
