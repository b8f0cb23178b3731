"""Processes forked in the midst of a pass."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.loader_transport import open_feed
from torchfast._loader import forks

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]

is_importing, may_end, has_ended = threading.Event(), threading.Event(), threading.Event()


def imports(name: str) -> Iterator[int]:
    """Import a module where batches are made: in the copying thread."""
    __import__(name)
    yield 1


def fork_that_imports(name: str) -> int:
    """Return the status of a new process that imports a module; a negative one if it hangs."""
    process = os.fork()
    if process == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(10)
        __import__(name)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


@pytest.fixture
def slow_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Write a module that takes until the test goes on, and return its name."""
    (tmp_path / "made_slowly.py").write_text(
        "from tests.test_loader_forks import has_ended, is_importing, may_end\n"
        "is_importing.set()\nmay_end.wait(20)\nhas_ended.set()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "made_slowly", raising=False)
    for event in (is_importing, may_end, has_ended):
        event.clear()
    return "made_slowly"


def test_a_fork_waits_while_the_thread_imports(slow_module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has the module's lock, and not the thread that holds it, could never import it."""
    pauses = list[float]()

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        may_end.set()
        time.sleep(seconds)

    monkeypatch.setattr(forks, "pause", pause)
    batches, _, _ = open_feed(imports(slow_module))
    is_importing.wait()
    assert fork_that_imports(slow_module) == 0
    assert pauses
    assert list(batches) == [1]


def test_a_fork_does_not_wait_for_ever(slow_module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The import may wait for what the forking thread holds."""
    monkeypatch.setattr(forks, "PATIENCE_S", 0.01)
    batches, _, _ = open_feed(imports(slow_module))
    is_importing.wait()
    assert fork_that_imports("this") == 0
    assert not has_ended.is_set()
    may_end.set()
    assert list(batches) == [1]


def test_a_fork_by_a_module_that_is_imported_waits_for_nobody(
    tmp_path: Path, slow_module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever imports may be the one that is waited for."""
    monkeypatch.setattr(forks, "pause", lambda _: pytest.fail("waits"))
    (tmp_path / "forks_itself.py").write_text(
        "from tests.test_loader_forks import fork_that_imports\nstatus = fork_that_imports('this')\n"
    )
    batches, _, _ = open_feed(imports(slow_module))
    is_importing.wait()
    assert __import__("forks_itself").status == 0
    may_end.set()
    assert list(batches) == [1]
