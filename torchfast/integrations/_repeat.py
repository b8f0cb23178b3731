"""Doing something over and over beside a block, and once more at its end."""

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress


@contextmanager
def repeating(act: Callable[[], object], every_s: float | None) -> Iterator[None]:
    """Call `act` every `every_s` seconds in a thread while the block runs (None: not), and once after.

    Watching never fails what is watched: an `act` that raises is not called again, and becomes a warning.
    """
    stop, failed = threading.Event(), threading.Event()

    def act_once() -> None:
        try:
            act()
        except Exception as error:  # noqa: BLE001 - a display that broke must not break a training
            failed.set()
            said = f"the live view stopped: {type(error).__name__}: {error}. Nothing else is affected."
            warnings.warn(said, RuntimeWarning, stacklevel=2)

    def loop() -> None:
        while not stop.wait(every_s) and not failed.is_set():
            act_once()

    thread = threading.Thread(target=loop, name="torchfast-live-view", daemon=True)
    repeats = every_s is not None
    if repeats:
        thread.start()
    # Where warnings are errors, ours would replace the block's own.
    hidden: tuple[type[Warning], ...] = (RuntimeWarning,)
    try:
        yield
        hidden = ()
    finally:
        stop.set()
        if repeats:
            thread.join()
        if not failed.is_set():
            with suppress(*hidden):
                act_once()
