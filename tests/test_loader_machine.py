"""Whatever a loop does, in whatever order, loading ahead gives it what the bare loader would give it."""

import gc
import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.loader_transport import HostTransport, copying_threads, threaded


class Pass(Iterator[tuple[int, int]]):
    """One pass over numbers, some of which cannot be had; it goes on after each of those."""

    def __init__(self, number: int, n_batches: int, broken: set[int]) -> None:
        self._number, self._n_batches, self._broken = number, n_batches, broken
        self._next = 0

    def __next__(self) -> tuple[int, int]:
        index, self._next = self._next, self._next + 1
        if index >= self._n_batches:
            raise StopIteration
        if index in self._broken:
            raise LookupError(index)
        return self._number, index


class Numbers:
    """A loader of them, which numbers its passes."""

    def __init__(self, n_batches: int, broken: set[int]) -> None:
        self.n_batches, self.broken = n_batches, broken
        self.n_passes = 0

    def __iter__(self) -> Pass:
        self.n_passes += 1
        return Pass(self.n_passes, self.n_batches, self.broken)


class Loop(RuleBasedStateMachine):
    """Takes batches, stops, begins anew, runs out of memory, is interrupted; knows what must come of it."""

    @initialize(
        n_batches=st.integers(0, 8),
        broken=st.sets(st.integers(0, 7), max_size=2),
        depth=st.integers(1, 3),
        across_epochs=st.booleans(),
        turns=st.lists(st.booleans(), min_size=1, max_size=4),
    )
    def wrap(
        self, n_batches: int, broken: set[int], depth: int, turns: list[bool], *, across_epochs: bool
    ) -> None:
        """Wrap a loader; where nothing in it fails, the loop's thread may send batches too."""
        self.numbers = Numbers(n_batches, broken)
        self.across_epochs = across_epochs
        self.loader = threaded(self.numbers, depth=depth, across_epochs=across_epochs)
        self.transport: HostTransport = self.loader._transport
        self.transport.sends_here = itertools.cycle(turns)
        self.batches: Any = None
        self.state = "none"
        self.index = 0
        self.pass_number: int | None = None

        self.begin(after="nothing")

    @rule(after=st.sampled_from(["nothing", "close", "drop"]))
    def begin(self, after: str) -> None:
        """Begin a pass, over the one that is open if it was neither closed nor dropped: a warning is due."""
        is_due = self.state == "open" and after == "nothing"
        if after == "close":
            self.loader.close()
        elif after == "drop":
            self.batches = None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.batches = iter(self.loader)
        assert bool(caught) is is_due
        feed: Any = self.loader._feed
        feed._is_instant = not self.numbers.broken
        self.state, self.index, self.pass_number = "open", 0, None

    @rule(
        faults=st.lists(
            st.sampled_from([None, "delivery_fails_once", "delivery_is_interrupted_once"]), max_size=5
        )
    )
    def take(self, faults: list[str | None]) -> None:
        """Take some batches, with or without something happening as each is handed out."""
        for fault in faults:
            self.take_one(fault)

    def take_one(self, fault: str | None) -> None:
        """Take what comes next: a batch, an error in its place, or the end."""
        if self.state == "closed":
            with pytest.raises(RuntimeError, match="was closed"):
                next(self.batches)
        elif self.state == "over" or self.index == self.numbers.n_batches:
            assert next(self.batches, "no more") == "no more"
            self.state = "over"
        elif self.index in self.numbers.broken:
            with pytest.raises(LookupError, match=str(self.index)):
                next(self.batches)
            self.index, self.state = self.index + 1, "failed"
        else:
            self.take_whole(fault)

    def take_whole(self, fault: str | None) -> None:
        """Take a batch that can be had; where it is not handed out, it is still the next one."""
        if fault is not None:
            setattr(self.transport, fault, True)
            with pytest.raises((torch.OutOfMemoryError, KeyboardInterrupt)):
                next(self.batches)
            self.state = "failed"
            return
        pass_number, index = next(self.batches)
        assert index == self.index
        self.pass_number = self.pass_number or pass_number
        assert pass_number == self.pass_number
        self.index += 1

    @rule()
    def release(self) -> None:
        """Run out of memory elsewhere: what is ahead goes back to the host, and none of it is lost."""
        self.loader.release_memory()

    @rule()
    def close(self) -> None:
        """Close the pass."""
        self.loader.close()
        if self.state in ("open", "failed"):
            self.state = "closed"

    @invariant()
    def no_thread_but_one(self) -> None:
        """A thread runs only while a pass is open, or the next one is being loaded ahead."""
        is_open = self.__dict__.get("state") in ("open", "failed")
        assert copying_threads() <= int(is_open or self.__dict__.get("across_epochs", False))

    def teardown(self) -> None:
        """Forget the loader: nothing of it runs on."""
        self.__dict__.pop("batches", None)
        self.__dict__.pop("loader", None)
        self.__dict__.pop("transport", None)
        gc.collect()
        assert copying_threads() == 0


Loop.TestCase.settings = settings(max_examples=40, stateful_step_count=12, deadline=None)
TestLoop = Loop.TestCase
