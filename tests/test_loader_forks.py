"""Processes forked in the midst of a pass."""

import functools
import itertools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.loader_transport import open_feed, until
from torchfast._loader import forks

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    pytest.mark.usefixtures("_slow_modules"),
]


class Import:
    """A module that is imported for as long as a test wants."""

    def __init__(self) -> None:
        self.has_begun, self.may_end, self.has_ended = (threading.Event() for _ in range(3))

    def go_on(self) -> None:
        """Wait, as the module that is imported."""
        self.has_begun.set()
        self.may_end.wait(20)
        self.has_ended.set()


SLOW: dict[str, Import] = {}


@pytest.fixture
def _slow_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("slow_one", "slow_other"):
        SLOW[name] = Import()
        code = f"from tests.test_loader_forks import SLOW\nSLOW[{name!r}].go_on()\n"
        (tmp_path / f"{name}.py").write_text(code)
        monkeypatch.delitem(sys.modules, name, raising=False)


def imports(name: str, may_begin: threading.Event | None = None) -> Iterator[int]:
    """Import a module where batches are made: in the copying thread."""
    if may_begin is not None:
        may_begin.wait()
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


def fork_and_wait(name: str) -> None:
    """Fork, and wait for the interrupt that comes after it."""
    assert fork_that_imports(name) == 0
    until(lambda: False)


def pauses(monkeypatch: pytest.MonkeyPatch, *actions: Callable[[], object]) -> Callable[[], int]:
    """Do something each time that a fork pauses; return what tells how often it has."""
    numbers, left = itertools.count(), list(actions)

    def pause(_: float) -> None:
        next(numbers)
        if left:
            left.pop(0)()

    monkeypatch.setattr(forks, "pause", pause)
    return lambda: next(numbers)


def test_a_fork_waits_while_the_thread_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has the module's lock, and not the thread that holds it, could never import it."""
    slow = SLOW["slow_one"]
    n_pauses = pauses(monkeypatch, slow.may_end.set)
    batches, _, _ = open_feed(imports("slow_one"))
    slow.has_begun.wait()
    assert fork_that_imports("slow_one") == 0
    assert n_pauses() > 0
    assert list(batches) == [1]


def test_a_fork_looks_at_all_threads_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One may begin to import while another is waited for."""
    one, other = SLOW.values()
    may_begin = threading.Event()
    late, _, _ = open_feed(imports("slow_one", may_begin))
    early, _, feed = open_feed(imports("slow_other"))
    has_imported = functools.partial(until, lambda: len(feed._work.ready) > 0)
    pauses(monkeypatch, may_begin.set, one.has_begun.wait, other.may_end.set, has_imported, one.may_end.set)
    other.has_begun.wait()
    assert fork_that_imports("slow_one") == 0
    assert [*early, *late] == [1, 1]


def test_a_fork_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """The import may wait for what the forking thread holds."""
    slow = SLOW["slow_one"]
    monkeypatch.setattr(forks, "PATIENCE_S", 0.01)
    batches, _, _ = open_feed(imports("slow_one"))
    slow.has_begun.wait()
    assert fork_that_imports("this") == 0
    assert not slow.has_ended.is_set()
    slow.may_end.set()
    assert list(batches) == [1]


def test_a_fork_by_a_module_that_is_imported_waits_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever imports may be the one that is waited for, or may be a whole training."""
    slow = SLOW["slow_one"]
    monkeypatch.setattr(forks, "PATIENCE_IMPORTING_S", 0.01)
    (tmp_path / "forks_itself.py").write_text(
        "from tests.test_loader_forks import fork_that_imports\nstatus = fork_that_imports('this')\n"
    )
    monkeypatch.delitem(sys.modules, "forks_itself", raising=False)
    batches, _, _ = open_feed(imports("slow_one"))
    slow.has_begun.wait()
    assert __import__("forks_itself").status == 0
    assert not slow.has_ended.is_set()
    slow.may_end.set()
    assert list(batches) == [1]


def interrupt() -> None:
    """Do as Ctrl-C does."""
    raise KeyboardInterrupt


def test_an_interrupt_while_a_fork_waits_comes_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Raised where Python runs for a fork it would be lost, and the fork would not wait any more."""
    slow = SLOW["slow_one"]
    n_pauses = pauses(monkeypatch, interrupt, slow.may_end.set)
    batches, _, _ = open_feed(imports("slow_one"))
    slow.has_begun.wait()
    with pytest.raises(KeyboardInterrupt):
        fork_and_wait("slow_one")
    assert n_pauses() > 1
    assert slow.has_ended.is_set()
    assert fork_that_imports("slow_one") == 0
    assert list(batches) == [1]


def test_a_second_interrupt_ends_the_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever presses Ctrl-C twice does not want to wait."""
    slow = SLOW["slow_one"]
    pauses(monkeypatch, interrupt, interrupt)
    batches, _, _ = open_feed(imports("slow_one"))
    slow.has_begun.wait()
    with pytest.raises(KeyboardInterrupt):
        fork_and_wait("this")
    assert not slow.has_ended.is_set()
    slow.may_end.set()
    assert list(batches) == [1]
