"""Doing something over and over beside a block, and once more at its end."""

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress


@contextmanager
def repeating(act: Callable[[], object], every_s: float) -> Iterator[None]:
    """Call `act` every `every_s` seconds in a thread while the block runs, and once after it.

    Watching never fails what is watched: an `act` that raises is not called again, and becomes a warning.
    """
    stop, act_safely = threading.Event(), _Safely(act)

    def loop() -> None:
        while not stop.wait(every_s) and not act_safely.has_failed:
            act_safely()

    thread = threading.Thread(target=loop, name="torchfast-live-view", daemon=True)
    thread.start()
    with _afterwards(act_safely):
        try:
            yield
        finally:
            stop.set()
            thread.join()


@contextmanager
def afterwards(act: Callable[[], object]) -> Iterator[None]:
    """Call `act` once after the block, whatever becomes of that; an `act` that raises becomes a warning."""
    with _afterwards(_Safely(act)):
        yield


@contextmanager
def _afterwards(act: "_Safely") -> Iterator[None]:
    try:
        yield
    except BaseException:
        with suppress(RuntimeWarning):  # where warnings are errors, ours would replace the block's own
            act()
        raise
    act()


class _Safely:
    """Calls something until it has failed once."""

    def __init__(self, act: Callable[[], object]) -> None:
        self._act = act
        self.has_failed = False

    def __call__(self) -> None:
        """Call it; what it raises becomes a warning."""
        if self.has_failed:
            return
        try:
            self._act()
        except Exception as error:  # noqa: BLE001 - a display that broke must not break a training
            self.has_failed = True
            said = f"the live view stopped: {type(error).__name__}: {error}. Nothing else is affected."
            warnings.warn(said, RuntimeWarning, stacklevel=2)
