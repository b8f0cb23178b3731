"""What keeps processes from being forked while a copying thread imports a module.

The new process has the lock of that module, and not the thread that would give it back: whoever imports the
module there waits for ever. A worker of another loader does, since what the thread imports is what batches
are made of: a jagged tensor as it is opened asks for 2 s of imports. Which modules those are, nobody can know
before.
"""

import _thread
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from time import monotonic
from time import sleep as pause
from types import FrameType

PATIENCE_S = 60.0
"""How long a fork waits: for ever if the import waits for what the forking thread holds."""

PATIENCE_IMPORTING_S = 5.0
"""The same for a thread that is importing itself: a module that is imported may fork."""

PAUSE_S = 0.001

_put_off: list[int] = []
"""Interrupts that came while a fork waited, which would be lost in there."""


def spare_imports(threads: Callable[[], Iterable[int]], /) -> None:
    """Have each fork wait while one of these threads imports. An import begun meanwhile is not seen."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=lambda: _wait(threads))
        # In C: a handler that raises where Python runs for a fork raises nowhere else.
        interrupt = functools.partial(max, _put_off, key=_thread.interrupt_main, default=None)
        os.register_at_fork(after_in_parent=interrupt)
        os.register_at_fork(after_in_parent=_put_off.clear, after_in_child=_put_off.clear)


def _wait(threads: Callable[[], Iterable[int]]) -> None:
    """Wait; a first interrupt is put off until after the fork, a second one ends the waiting."""
    until_s = monotonic() + (PATIENCE_IMPORTING_S if _is_importing(sys._getframe()) else PATIENCE_S)
    while monotonic() < until_s:
        try:
            if not _any_importing(threads()):
                return
            pause(PAUSE_S)
        except KeyboardInterrupt:
            if _put_off:
                return
            _put_off.append(signal.SIGINT)


def _any_importing(threads: Iterable[int]) -> bool:
    """Say whether another thread is: all at one moment, as one may begin while another is waited for."""
    frames = sys._current_frames()
    del frames[threading.get_ident()]  # this one's would hold itself, and all the others, for the collector
    return any(_is_importing(frames.get(thread)) for thread in threads)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False
