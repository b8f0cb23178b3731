"""What keeps processes from being forked while a copying thread imports a module.

The new process has the lock of that module, and not the thread that would give it back: whoever imports the
module there waits for ever. A worker of another loader does, since what the thread imports is what batches
are made of: a jagged tensor as it is opened asks for 2 s of imports. Which modules those are, nobody can know
before.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from time import monotonic
from time import sleep as pause
from types import FrameType

from torchfast._loader.unwaited import start_unwaited

PATIENCE_S = 60.0
"""How long a fork waits: for ever if the import waits for what the forking thread holds."""

PATIENCE_IMPORTING_S = 5.0
"""The same for a thread that is importing itself: a module that is imported may fork."""

PAUSE_S = 0.001

INTERRUPT_S = 0.02
"""How long after a fork an interrupt comes that was put off."""

_put_off: list[int] = []
"""The interrupt that came while a fork waited, if one did: it would be lost in there."""


def spare_imports(threads: Callable[[], Iterable[int]], /) -> None:
    """Have each fork wait while one of these threads imports. An import begun meanwhile is not seen."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=lambda: _wait(threads))
        os.register_at_fork(after_in_parent=_pass_on_interrupt, after_in_child=_put_off.clear)


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


def _pass_on_interrupt() -> None:
    """Interrupt once other hooks are through: what is raised where Python runs for a fork is lost."""
    if _put_off:
        start_unwaited(_interrupt_soon, _put_off.pop())


def _interrupt_soon(number: int) -> None:
    threading.Event().wait(INTERRUPT_S)
    signal.pthread_kill(threading.main_thread().ident or 0, number)


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
