"""`oom_guard` as a context manager and a decorator: what it turns into what, and what it leaves alone."""

import asyncio
import copy
import inspect
import pickle
import traceback
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, assert_type

import numpy as np
import pytest
import torch
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader, Dataset

from torchfast import HostOutOfMemoryError, OutOfMemoryError, OutOfMemoryReport, _holders, oom_guard
from torchfast._oom import telemetry

pytestmark = pytest.mark.usefixtures("quick_collections")
CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 15.80 GiB"


def run_out(*_: Any) -> None:
    """Fail as CUDA's allocator does."""
    raise torch.OutOfMemoryError(CUDA)


def failing_layer(images: torch.Tensor) -> torch.Tensor:
    """Fail with a tensor in a local variable."""
    hidden = images * 2
    run_out(hidden)
    return hidden


def pickled(thing: Any) -> Any:
    """Return the thing after a round trip through pickle."""
    return pickle.loads(pickle.dumps(thing))  # noqa: S301 -- our own bytes


# --- what passes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [ValueError, KeyError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("guard", [oom_guard(), oom_guard(reraise=False)], ids=["raising", "quiet"])
def test_other_exceptions_pass_untouched(kind: type[BaseException], guard: Any) -> None:
    """An exception of any other kind is the same object with the same traceback and no new context."""
    error = kind("no")

    def fail() -> None:
        with guard:
            raise error

    with pytest.raises(kind) as caught:
        fail()
    assert caught.value is error
    assert [entry.name for entry in traceback.extract_tb(error.__traceback__)][1:] == ["fail"]
    assert error.__context__ is None
    assert error.__cause__ is None
    assert guard.report is None


def test_block_without_failure_is_as_without_guard() -> None:
    """Values, returns, breaks and generators inside a guarded block work as ever."""

    def looped() -> int:
        for number in range(5):
            with oom_guard():
                if number == 3:
                    return number
        return -1

    assert looped() == 3


def test_guard_may_be_nested_and_used_again() -> None:
    """One guard around several blocks, one inside the other, keeps them apart."""
    guard = oom_guard(reraise=False)
    with guard:
        with guard:
            run_out()
        assert guard.report is not None
    with guard:
        pass
    assert guard.report is None


# --- the error ----------------------------------------------------------------------------------------------


def test_error_says_what_to_do_and_keeps_its_cause() -> None:
    """The error is a `torch.OutOfMemoryError` caused by the original, with a size to try."""
    with pytest.raises(OutOfMemoryError, match="Try batch_size=32 instead of 64") as caught, oom_guard():
        failing_layer(torch.zeros(64, 3))
    error = caught.value
    assert isinstance(error, torch.OutOfMemoryError)
    assert str(error.__cause__) == CUDA
    assert error.report is not None
    assert error.report.message == str(error)
    assert CUDA in error.report.details
    assert "failing_layer" in error.report.traceback


def test_host_memory_is_a_memory_error_too() -> None:
    """A real failed allocation of PyTorch, and one of NumPy, become an error of both kinds."""
    for allocate in (lambda: torch.empty(2**60, dtype=torch.uint8), lambda: np.empty(2**60, dtype=np.uint8)):
        with pytest.raises(MemoryError) as caught, oom_guard():
            allocate()
        assert isinstance(caught.value, HostOutOfMemoryError)
        assert isinstance(caught.value, torch.OutOfMemoryError)


def test_wrapped_and_grouped_errors_are_found() -> None:
    """An out-of-memory error behind a cause or in a group becomes the same error."""
    error = ValueError("batch 7")
    error.__cause__ = torch.OutOfMemoryError(CUDA)
    with pytest.raises(OutOfMemoryError), oom_guard():
        raise error
    with pytest.raises(OutOfMemoryError), oom_guard():
        raise ExceptionGroup("all", [torch.OutOfMemoryError(CUDA)])


@pytest.mark.parametrize("twin", [pickled, copy.copy, copy.deepcopy])
@pytest.mark.parametrize("kind", [OutOfMemoryError, HostOutOfMemoryError])
def test_error_pickles_and_copies(twin: Callable[[Any], Any], kind: type[OutOfMemoryError]) -> None:
    """A pickled or copied error has the same type, text and report."""
    with oom_guard(reraise=False) as guard:
        failing_layer(torch.zeros(8, 3))
    other = twin(kind("Try less.", guard.report))
    assert (type(other), str(other), other.report) == (kind, "Try less.", guard.report)


class GuardedDataset(Dataset[torch.Tensor]):
    """A dataset whose items are made under a guard, in vain."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> torch.Tensor:
        with oom_guard(batch_size=16):
            return torch.empty(2**60, dtype=torch.uint8)


def test_error_crosses_a_dataloader_worker() -> None:
    """Raised in a worker process, the error arrives with its type and text, and a guard outside reads it."""
    loader = DataLoader(GuardedDataset(), num_workers=1)
    with pytest.raises(HostOutOfMemoryError, match="Try batch_size=8 instead of 16"):
        next(iter(loader))
    with oom_guard(reraise=False) as guard:
        next(iter(loader))
    assert guard.report is not None
    assert guard.report.record.kind == "host"
    assert guard.report.record.requested_bytes == 2**60


def test_error_crosses_a_dataparallel_replica() -> None:
    """Handed over as `DataParallel` does, type and text arrive, and a guard outside reads them."""
    try:
        with oom_guard(batch_size=16):
            run_out()
    except OutOfMemoryError:
        wrapped = ExceptionWrapper(where="in replica 1 on device 1")
    with pytest.raises(OutOfMemoryError, match="Try batch_size=8 instead of 16"):
        wrapped.reraise()
    with oom_guard(reraise=False, batch_size=16) as guard:
        wrapped.reraise()
    assert guard.report is not None
    assert guard.report.record.requested_bytes == 2 * 2**30


def test_nested_guards_explain_once() -> None:
    """The inner guard's error passes the outer one as the same object; both have its report."""
    with pytest.raises(OutOfMemoryError) as caught, oom_guard() as outer, oom_guard() as inner:
        failing_layer(torch.zeros(64, 3))
    assert outer.report is inner.report is caught.value.report
    assert not isinstance(caught.value.__cause__, OutOfMemoryError)


def test_failure_that_is_being_handled_is_not_this_blocks() -> None:
    """In an `except` clause every error has the handled one as its context; the guard looks past it."""
    guard = oom_guard()

    def fall_back() -> None:
        try:
            run_out()
        except torch.OutOfMemoryError:
            with guard:
                _ = torch.zeros(2, 3) @ torch.zeros(2, 3)

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fall_back()
    assert guard.report is None


def test_second_failure_has_its_own_report() -> None:
    """A smaller try in the `except` clause of a larger one that fails too is explained for itself."""
    first, second = oom_guard(batch_size=64), oom_guard(reraise=False, batch_size=32)
    try:
        with first:
            run_out()
    except OutOfMemoryError:
        with second:
            run_out()
    assert first.report is not None
    assert second.report is not None
    assert (first.report.batch_size, second.report.batch_size) == (64, 32)


def test_report_is_a_plain_frozen_record() -> None:
    """The report compares, pickles and cannot be changed."""
    with oom_guard(reraise=False, batch_size=64) as guard:
        run_out()
    report = guard.report
    assert report is not None
    assert pickled(report) == report
    with pytest.raises(AttributeError):
        report.message = "all is well"  # type: ignore[misc]  # that is the point
    assert (report.suggested_batch_size, report.batch_size, report.batch_size_source) == (32, 64, "given")


def test_quiet_guard_swallows_nothing_else() -> None:
    """Of a group of which only a part is about memory, a quiet guard raises the rest, and still reports."""
    bug = ValueError("bug")
    nested = ExceptionGroup("all", [ExceptionGroup("some", [torch.OutOfMemoryError(CUDA), bug]), KeyError(1)])
    guard = oom_guard(reraise=False)
    with pytest.raises(ExceptionGroup) as caught, guard:
        raise nested
    assert guard.report is not None
    assert caught.group_contains(KeyError, depth=1)
    assert caught.group_contains(ValueError, depth=2)
    assert not caught.group_contains(torch.OutOfMemoryError)


# --- where the batch size comes from ------------------------------------------------------------------------


def test_size_is_guessed_from_the_failed_frames() -> None:
    """Without other knowledge the leading dimension of most tensors counts; weights do not."""

    def step(images: torch.Tensor, labels: torch.Tensor) -> None:
        weight = torch.nn.Parameter(torch.zeros(10, 3))
        failing_layer(images)
        run_out(weight, labels)

    with oom_guard(reraise=False) as guard:
        step(torch.zeros(48, 3), torch.zeros(48))
    assert guard.report is not None
    assert (guard.report.batch_size, guard.report.batch_size_source) == (48, "guess")
    assert "is a guess" in guard.report.message


def test_size_is_known_from_the_steps() -> None:
    """Through `guard.steps` the size of the failed batch is exact, whatever lies in the frames."""
    batches = [{"image": torch.zeros(size, 3), "label": torch.zeros(size)} for size in (8, 40)]
    with oom_guard(reraise=False, batch_size=7) as guard:
        for batch in guard.steps(batches):
            unrelated = [torch.zeros(5) for _ in range(9)]
            if len(batch["label"]) == 40:
                run_out(unrelated)
    assert guard.report is not None
    assert (guard.report.batch_size, guard.report.batch_size_source) == (40, "steps")


def test_batch_dimension_can_be_named() -> None:
    """Sequences of shape (time, batch) are counted along dimension 1."""
    with oom_guard(reraise=False, batch_dim=1) as guard:
        for _ in guard.steps([torch.zeros(100, 24)]):
            run_out()
    assert guard.report is not None
    assert guard.report.batch_size == 24


def test_steps_are_the_loaders_own_batches() -> None:
    """`guard.steps` yields the same objects in the same order, has the length, and keeps no batch."""
    batches = [torch.zeros(2, 2), torch.ones(2, 2)]
    guard = oom_guard()
    with guard:
        assert all(ours is theirs for ours, theirs in zip(guard.steps(batches), batches, strict=True))
    assert len(guard.steps(batches)) == 2
    iterator = iter(guard.steps(torch.zeros(2) for _ in range(2)))
    alive = weakref.ref(next(iterator))
    assert alive() is None
    with pytest.raises(TypeError, match="has no len"):
        len(guard.steps(iter(batches)))


def test_exception_of_the_loader_is_the_loaders() -> None:
    """What the loader raises comes through the steps untouched."""

    def loader() -> Iterator[torch.Tensor]:
        yield torch.zeros(1)
        message = "disk"
        raise OSError(message)

    with pytest.raises(OSError, match="disk"), oom_guard() as guard:
        for _ in guard.steps(loader()):
            pass


# --- the monitor --------------------------------------------------------------------------------------------


class Recorder:
    """A monitor that writes down what it is asked."""

    def __init__(self) -> None:
        self.phases: list[str] = []
        self.held: weakref.ref[torch.Tensor] | None = None
        self.was_held = True

    @contextmanager
    def phase(self, name: str, /) -> Iterator[None]:
        """Write the phase down."""
        self.phases.append(name)
        yield

    def status(self) -> Mapping[str, Any]:
        """Say what is in use, and note whether the failed tensor still lives."""
        self.was_held = self.held is not None and self.held() is not None
        return {"vram": "3 GiB"}


def test_any_monitor_with_two_methods_will_do() -> None:
    """Each step is a phase of the monitor, and its status is in the report, read after letting go."""
    recorder = Recorder()

    def fail(images: torch.Tensor) -> None:
        hidden = images * 2
        recorder.held = weakref.ref(hidden)
        run_out(hidden)

    with oom_guard(reraise=False, monitor=recorder) as guard:
        for batch in guard.steps([torch.zeros(4), torch.zeros(4)]):
            if recorder.phases == ["step", "step"]:
                fail(batch)
    assert guard.report is not None
    assert recorder.phases == ["step", "step"]
    assert guard.report.status == {"vram": "3 GiB"}
    assert "monitor: {'vram': '3 GiB'}" in guard.report.details
    assert recorder.held is not None
    assert not recorder.was_held


def test_failure_matters_more_than_what_fails_while_it_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a monitor that fails nor a driver that no longer answers takes the place of the failure."""
    recorder = Recorder()

    def no_answer(_: object) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(recorder, "status", lambda: no_answer(None))
    monkeypatch.setattr(telemetry, "room_on", no_answer)
    with pytest.raises(OutOfMemoryError) as caught, oom_guard(monitor=recorder, batch_size=8):
        run_out()
    assert caught.value.report is not None
    assert (caught.value.report.suggested_batch_size, caught.value.report.status) == (4, None)


def test_holders_are_asked_to_let_go() -> None:
    """Whoever is registered as a holder, as a DeviceLoader is, is asked on failure and only then."""

    class Prefetcher:
        n_asked = 0

        def release_memory(self) -> None:
            self.n_asked += 1

    prefetcher = Prefetcher()
    _holders.register(prefetcher)
    with oom_guard():
        pass
    assert prefetcher.n_asked == 0
    with oom_guard(reraise=False):
        run_out()
    assert prefetcher.n_asked == 1


# --- the decorator ------------------------------------------------------------------------------------------


def test_decorated_function_keeps_its_face() -> None:
    """Name, signature, result and exceptions of a decorated function are its own."""

    @oom_guard()
    def scale(batch: torch.Tensor, *, factor: int = 2) -> torch.Tensor:
        """Scale."""
        return batch * factor

    assert (scale.__name__, scale.__doc__) == ("scale", "Scale.")
    assert list(inspect.signature(scale).parameters) == ["batch", "factor"]
    assert scale(torch.ones(1), factor=3).item() == 3
    with pytest.raises(TypeError):
        scale()  # type: ignore[call-arg]  # that is the point


def test_decorated_function_explains() -> None:
    """A decorated function raises the explained error; quietly, it returns None and leaves a report."""
    with pytest.raises(OutOfMemoryError, match="instead of 64"):
        oom_guard()(failing_layer)(torch.zeros(64, 3))
    quiet = oom_guard(reraise=False)
    assert quiet(failing_layer)(torch.zeros(64, 3)) is None
    assert quiet.report is not None
    assert quiet.report.batch_size == 64


def test_methods_of_all_kinds() -> None:
    """Methods keep their instance or class, whichever decorator comes first; static ones take neither."""

    class Model:
        scale = 3

        @oom_guard()
        def plain(self, x: int) -> int:
            return self.scale * x

        @oom_guard()
        @staticmethod
        def inner_static(x: int) -> int:
            return x

        @staticmethod
        @oom_guard()
        def outer_static(x: int) -> int:
            return x

        @oom_guard()
        @classmethod
        def of_class(cls, x: int) -> int:
            return cls.scale * x

    model = Model()
    assert (model.plain(2), model.of_class(2), Model.of_class(2)) == (6, 6, 6)
    assert (model.inner_static(2), Model.inner_static(2), model.outer_static(2)) == (2, 2, 2)


def test_coroutine_functions_are_guarded() -> None:
    """A decorated coroutine function is one still, and its await is guarded."""

    @oom_guard()
    async def serve() -> None:
        await asyncio.sleep(0)
        run_out()

    assert inspect.iscoroutinefunction(serve)
    with pytest.raises(OutOfMemoryError):
        asyncio.run(serve())


# --- types --------------------------------------------------------------------------------------------------


def always_returns() -> int:
    """Type-check: a guard that raises does not make the end of the function reachable."""
    with oom_guard():
        return 1


def may_end_quietly() -> int | None:
    """Type-check: after a quiet guard the end of the function is reachable."""
    with oom_guard(reraise=False):
        return 1
    return None


@oom_guard()
def plain(number: int) -> str:
    """Type-check: the decorated function has its own type."""
    return str(number)


@oom_guard(reraise=False)
def quiet(number: int) -> str:
    """Type-check: quietly decorated, it may return None."""
    return str(number)


def test_types_are_what_happens() -> None:
    """What type checkers are told is what happens at run time."""
    assert_type(always_returns(), int)
    assert_type(may_end_quietly(), int | None)
    assert_type(plain(1), str)
    assert_type(quiet(1), str | None)
    with oom_guard(reraise=False) as guard:
        for batch in guard.steps([1, 2]):
            assert_type(batch, int)
    assert_type(guard.report, OutOfMemoryReport | None)
    assert (always_returns(), may_end_quietly(), plain(1), quiet(1)) == (1, 1, "1", "1")


def test_a_guard_says_what_became_of_its_block() -> None:
    """The repr of a guard, which notebooks show, holds the first line of what happened."""
    guard = oom_guard(reraise=False, batch_size=16)
    assert repr(guard) == "<QuietOOMGuard: nothing failed>"
    with guard:
        raise MemoryError
    assert guard.report is not None
    assert repr(guard) == f"<QuietOOMGuard: {guard.report.message.splitlines()[0]}>"
    assert "Out of host memory" in repr(guard)
