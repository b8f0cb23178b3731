"""Threads that nobody waits for, not even as they start."""

import _thread
from collections.abc import Callable
from typing import Any


def start_unwaited(function: Callable[..., Any], *arguments: Any) -> bool:
    """Start a thread; say whether that could be done, which at the end of the interpreter it cannot.

    Not a `Thread`: who starts one waits for it, and the collector, which may run in it and there end the pass
    of who starts it, waits for that.
    """
    try:
        _thread.start_new_thread(function, arguments)
    except RuntimeError:
        return False
    return True
