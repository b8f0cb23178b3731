"""What keeps processes from being forked while a copying thread imports a module.

The new process has the lock of that module, and not the thread that would give it back: whoever imports the
module there waits for ever. A worker of another loader does, since what the thread imports is what batches
are made of: a jagged tensor as it is opened asks for 2 s of imports. Which modules those are, nobody can know
before.
"""

import os
import sys
import threading
from collections.abc import Callable, Iterable
from time import monotonic
from time import sleep as pause

PATIENCE_S = 60.0
"""How long a fork waits: for ever if the import waits for what the forking thread holds."""

PAUSE_S = 0.001


def spare_imports(threads: Callable[[], Iterable[int]], /) -> None:
    """Have each fork wait while one of these threads imports. An import begun meanwhile is not seen."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=lambda: _wait(threads()))


def _wait(threads: Iterable[int]) -> None:
    if _is_importing(threading.get_ident()):  # a thread may wait for that
        return
    until_s = monotonic() + PATIENCE_S
    for thread in threads:
        while _is_importing(thread) and monotonic() < until_s:
            pause(PAUSE_S)


def _is_importing(thread: int) -> bool:
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False
