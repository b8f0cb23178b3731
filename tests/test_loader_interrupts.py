"""An interrupt anywhere loses no batch, repeats none, leaves nothing behind and hangs nothing."""

import contextlib
import dis
import functools
import itertools
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
import torch

import torchfast
from tests.loader_transport import copying_threads, open_feed, threaded, until
from torchfast import DeviceLoader
from torchfast._loader.turns import N_BATCHES_DECIDED, Turns

N_BATCHES = 7
OURS = str(Path(torchfast.__file__).parent)
"""Not `threading`, which an interrupt breaks while a thread starts."""


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


is_traced_at_once = pytest.mark.skipif(
    sys.version_info >= (3, 13), reason="opcodes are then traced from the second call of a function on only"
)


class Interrupt:
    """Raises KeyboardInterrupt at one of the moments at which a signal may do so."""

    def __init__(self, at: int) -> None:
        self.n_moments = 0
        self.has_come = False
        self._at = at
        self._returned_to = 0

    def during(self, act: Callable[[], Any]) -> Any:
        """Do it, unless interrupted."""
        sys.settrace(self._enter)
        try:
            return act()
        finally:
            sys.settrace(None)

    def _enter(self, frame: FrameType, event: str, arg: object) -> Any:
        del event, arg
        if self.has_come or not frame.f_code.co_filename.startswith(OURS):
            return None
        frame.f_trace_opcodes = True
        return self._trace

    def _trace(self, frame: FrameType, event: str, arg: object) -> Any:
        del arg
        # Back from a function in Python the interpreter does not look: it did when it entered it.
        looks = frame.f_lasti in checkpoints(frame.f_code) and self._returned_to != id(frame)
        if event == "return":
            # Not the frame itself: one that is held on to ends Python 3.11 now and then.
            self._returned_to = id(frame.f_back)
        if event != "opcode":
            return self._trace
        self._returned_to = 0
        if looks and not self.has_come:
            self.n_moments += 1
            if self.n_moments == self._at:
                self.has_come = True
                raise KeyboardInterrupt
        return self._trace


def taken(interrupt: Interrupt, epoch: Iterator[int], look: Callable[[], object] = lambda: None) -> list[int]:
    """Return what a loop gets that goes on after an interrupt, and asks again until the end."""
    batches: list[int] = []
    while True:
        try:
            batches.append(interrupt.during(lambda: next(epoch)))
            look()
        except KeyboardInterrupt:
            continue
        except StopIteration:
            return batches


def interrupts() -> Iterator[Interrupt]:
    """Yield an interrupt for each moment of what is done with it, until five in a row find no such moment.

    Not until a number counted once: how many there are depends on whether the other thread was faster.
    """
    n_came = n_idle = 0
    while n_idle < 5:
        yield (interrupt := Interrupt(n_came + n_idle + 1))
        n_came += interrupt.has_come
        n_idle = 0 if interrupt.has_come else n_idle + 1
    assert n_came > 10


@pytest.mark.parametrize("sends_here", ["-", "h", "-h"])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_an_interrupt_of_next_loses_nothing(depth: int, sends_here: str) -> None:
    """Whenever it comes, whoever sends: each batch comes once, in order, and no more are ahead than ever."""

    def passed(interrupt: Interrupt) -> list[int]:
        turns = itertools.cycle(letter == "h" for letter in sends_here)
        epoch, _, feed = open_feed(range(N_BATCHES), depth, turns=turns)
        n_ahead: list[int] = []
        batches = taken(
            interrupt, epoch, lambda: n_ahead.append(sum(not one.is_end for one in list(feed._work.ready)))
        )
        assert max(n_ahead) <= depth
        return batches

    for interrupt in interrupts():
        assert passed(interrupt) == list(range(N_BATCHES))
    assert copying_threads() == 0


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_an_interrupt_at_the_end_of_a_pass_leaves_the_next_one_whole(depth: int) -> None:
    """Across epochs too, where the next pass goes on with what the thread has in line behind that end."""
    for interrupt in interrupts():
        loader = threaded(range(3), across_epochs=True, depth=depth)
        epoch = iter(loader)
        assert [next(epoch) for _ in range(3)] == [0, 1, 2]
        with contextlib.suppress(KeyboardInterrupt), pytest.raises(StopIteration):
            interrupt.during(lambda: next(epoch))  # noqa: B023 - called at once
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # the first is open where no end was told
            assert list(loader) == [0, 1, 2]
        loader.close()
    assert copying_threads() == 0


class Grouping:
    """A transform that takes further batches itself; it runs out of memory once, if told to."""

    def __init__(self, *, runs_out: bool) -> None:
        self.batches: Iterator[Any] = iter(())
        self._runs_out = runs_out

    def __call__(self, number: int) -> Any:
        """Return the batch and the two behind it, as far as there are any."""
        if number % 3:
            return number
        group = (number, *itertools.islice(self.batches, 2))
        if number and self._runs_out:
            self._runs_out = False
            raise torch.OutOfMemoryError
        return group


@pytest.mark.parametrize("runs_out", [False, True])
def test_an_interrupt_of_a_transform_that_takes_batches_loses_none(*, runs_out: bool) -> None:
    """All that it had come again, the last and incomplete ones as well, and nothing is held afterwards."""
    for interrupt in interrupts():
        grouping = Grouping(runs_out=runs_out)
        grouping.batches = epoch = iter(threaded(range(N_BATCHES), transform=grouping))
        groups = list[Any]()
        while True:
            try:
                groups.append(interrupt.during(functools.partial(next, epoch)))
            except (KeyboardInterrupt, torch.OutOfMemoryError):
                continue
            except StopIteration:
                break
        assert groups == [(0, 1, 2), (3, 4, 5), (6,)]
        assert epoch._inside.taken is None
        grouping.batches = iter(())  # else the collector finds the two, within the next interrupt
    until(lambda: copying_threads() == 0)


def whole(loader: DeviceLoader[int]) -> list[int]:
    """Return the batches of a pass, whatever was open before."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a pass that was under way is closed
        return list(loader)


def begin(interrupt: Interrupt, loader: DeviceLoader[int]) -> None:
    """Be interrupted while a pass begins."""
    interrupt.during(lambda: iter(loader))


def begin_another(interrupt: Interrupt, loader: DeviceLoader[int]) -> None:
    """Be interrupted while a pass closes the one that is open."""
    epoch = iter(loader)
    next(epoch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        interrupt.during(lambda: iter(loader))


def close_a_pass(interrupt: Interrupt, loader: DeviceLoader[int]) -> None:
    """Be interrupted while a pass is closed."""
    epoch = iter(loader)
    next(epoch)
    interrupt.during(epoch.close)


def close_the_loader(interrupt: Interrupt, loader: DeviceLoader[int]) -> None:
    """Be interrupted while the loader closes its pass."""
    epoch = iter(loader)
    next(epoch)
    interrupt.during(loader.close)


@is_traced_at_once
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # an interrupt of a __del__
@pytest.mark.parametrize("across_epochs", [False, True])
@pytest.mark.parametrize("act", [begin, begin_another, close_a_pass, close_the_loader])
def test_after_an_interrupt_a_new_pass_is_whole(
    act: Callable[[Interrupt, DeviceLoader[int]], None], *, across_epochs: bool
) -> None:
    """An interrupt while a pass begins or is closed leaves no thread, and nothing to the next pass."""

    def next_pass(interrupt: Interrupt) -> list[int]:
        loader = threaded(range(N_BATCHES), across_epochs=across_epochs)
        with contextlib.suppress(KeyboardInterrupt):
            act(interrupt, loader)
        batches = whole(loader)
        loader.close()
        return batches

    for interrupt in interrupts():
        assert next_pass(interrupt) == list(range(N_BATCHES))
        until(lambda: copying_threads() == 0)


@is_traced_at_once
def test_an_interrupted_release_loses_no_batch() -> None:
    """Whenever an interrupt comes while memory is given back, the pass goes on with all its batches."""

    def released(interrupt: Interrupt) -> list[int]:
        loader = threaded(range(N_BATCHES), depth=3)
        epoch = iter(loader)
        first = next(epoch)
        with contextlib.suppress(KeyboardInterrupt):
            interrupt.during(loader.release_memory)
        return [first, *epoch]

    for interrupt in interrupts():
        assert released(interrupt) == list(range(N_BATCHES))


@pytest.mark.parametrize("options", [{"channels_last": True}, {"transform": lambda batch: batch}])
def test_an_interrupt_of_what_happens_on_the_device_loses_no_batch(options: dict[str, Any]) -> None:
    """A batch that was being finished is finished when the next one is asked for."""

    def taken_from(interrupt: Interrupt) -> list[int]:
        return taken(interrupt, iter(threaded(range(N_BATCHES), **options)))

    for interrupt in interrupts():
        assert taken_from(interrupt) == list(range(N_BATCHES))


def test_an_interrupt_leaves_the_turns_in_order() -> None:
    """Whenever it comes while turns are decided, the loop that goes on is told whose turn it is."""

    def decide(interrupt: Interrupt) -> Turns:
        turns = Turns(2)
        for number in range(100):
            with contextlib.suppress(KeyboardInterrupt):
                interrupt.during(functools.partial(turns.is_here, float(number)))
        return turns

    for interrupt in interrupts():
        assert decide(interrupt)._trial.n_batches == N_BATCHES_DECIDED
