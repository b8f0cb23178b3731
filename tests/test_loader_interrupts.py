"""An interrupt anywhere in `next` loses no batch, repeats none, and hangs nothing."""

import dis
import functools
import itertools
import sys
from types import CodeType, FrameType
from typing import Any

import pytest

from tests.loader_transport import HostTransport, copying_threads
from torchfast._loader.epoch import Epoch
from torchfast._loader.feed import ThreadedFeed
from torchfast._loader.stats import Tally
from torchfast._loader.thread import no_state

N_BATCHES = 7


@functools.cache
def checkpoints(code: CodeType) -> set[int]:
    """Return the offsets at which the interpreter looks for signals: of what follows a call, and loops."""
    looks_after = ("CALL", "CALL_FUNCTION_EX", "JUMP_BACKWARD", "RESUME")
    offsets, looked = set(), False
    for instruction in dis.get_instructions(code):
        if looked:
            offsets.add(instruction.offset)
        looked = instruction.opname.startswith(looks_after)
    return offsets


class Interrupt:
    """Raises KeyboardInterrupt at one of the moments at which a signal may do so, within calls of `next`."""

    def __init__(self, at: int) -> None:
        self.n_moments = 0
        self.has_come = False
        self._at = at
        self._returned_to: FrameType | None = None

    def next(self, epoch: Epoch[Any]) -> Any:
        """Return the next batch, unless interrupted."""
        sys.settrace(self._enter)
        try:
            return next(epoch)
        finally:
            sys.settrace(None)

    def _enter(self, frame: FrameType, event: str, arg: object) -> Any:
        del event, arg
        is_ours = "torchfast" in frame.f_code.co_filename or "threading" in frame.f_code.co_filename
        if self.has_come or not is_ours:
            return None
        frame.f_trace_opcodes = True
        return self._trace

    def _trace(self, frame: FrameType, event: str, arg: object) -> Any:
        del arg
        # Back from a function in Python the interpreter does not look: it did when it entered it.
        looks = frame.f_lasti in checkpoints(frame.f_code) and self._returned_to is not frame
        if event == "return":
            self._returned_to = frame.f_back
        if event != "opcode":
            return self._trace
        self._returned_to = None
        if looks and not self.has_come:
            self.n_moments += 1
            if self.n_moments == self._at:
                self.has_come = True
                raise KeyboardInterrupt
        return self._trace


def taken(interrupt: Interrupt, depth: int, sends_here: str) -> list[int]:
    """Return what a loop gets that goes on after an interrupt, and asks again until the end."""
    transport = HostTransport()
    transport.sends_here = itertools.cycle(letter == "h" for letter in sends_here)
    feed = ThreadedFeed(
        iter(range(N_BATCHES)), transport, Tally(), depth=depth, snapshot=no_state, is_instant=True
    )
    epoch: Epoch[int] = Epoch(feed, None, owner=None)
    batches = []
    while True:
        try:
            batches.append(interrupt.next(epoch))
        except KeyboardInterrupt:
            continue
        except StopIteration:
            return batches


@pytest.mark.parametrize("sends_here", ["-", "h", "-h"])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_an_interrupt_loses_nothing(depth: int, sends_here: str) -> None:
    """Whenever it comes, and whichever thread sends, the loop that goes on gets each batch once, in order."""
    never = Interrupt(at=0)
    assert taken(never, depth, sends_here) == list(range(N_BATCHES))
    assert never.n_moments > 20 * N_BATCHES
    for at in range(1, never.n_moments + 1):
        interrupt = Interrupt(at)
        assert taken(interrupt, depth, sends_here) == list(range(N_BATCHES)), f"moment {at}"
    assert copying_threads() == 0
