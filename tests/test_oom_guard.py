"""`oom_guard` as a context manager and a decorator: what it turns into what, and what it leaves alone."""

import asyncio
import copy
import gc
import inspect
import pickle
import sys
import traceback
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, assert_type

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from torchfast import HostOutOfMemoryError, OutOfMemoryError, OutOfMemoryReport, _holders, oom_guard

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


def test_coroutine_functions_are_guarded() -> None:
    """A decorated coroutine function is one still, and its await is guarded."""

    @oom_guard()
    async def serve() -> None:
        await asyncio.sleep(0)
        run_out()

    assert inspect.iscoroutinefunction(serve)
    with pytest.raises(OutOfMemoryError):
        asyncio.run(serve())


# --- letting go ---------------------------------------------------------------------------------------------


def collected(make: Callable[[], list[weakref.ref[Any]]]) -> list[bool]:
    """Run with the garbage collector off, and return which tensors are gone."""
    gc.disable()
    try:
        return [reference() is None for reference in make()]
    finally:
        gc.enable()


def test_failed_frames_let_go_while_the_error_is_kept() -> None:
    """Tensors in the failed functions die though the error, its cause and its traceback are alive."""
    kept: list[BaseException] = []
    references: list[weakref.ref[torch.Tensor]] = []

    def layer(images: torch.Tensor, depth: int) -> torch.Tensor:
        hidden = images * 2
        references.append(weakref.ref(hidden))
        if depth == 0:
            run_out(hidden)
        return layer(hidden, depth - 1)

    def train() -> list[weakref.ref[torch.Tensor]]:
        try:
            with oom_guard():
                layer(torch.zeros(4), 3)
        except OutOfMemoryError as error:
            kept.append(error)
        return references

    assert collected(train) == [True] * 4
    assert kept[0].__cause__ is not None
    assert [entry.name for entry in traceback.extract_tb(kept[0].__cause__.__traceback__)][1:] == [
        *["layer"] * 4,
        "run_out",
    ]


def test_variables_of_the_block_itself_let_go() -> None:
    """Names that the block binds in its own function become None; what was bound before stays."""

    def train() -> list[weakref.ref[Any]]:
        before, rebound, number = torch.zeros(4), torch.zeros(4), 1
        history = [torch.zeros(4)]
        with oom_guard(reraise=False) as guard:
            for batch in guard.steps([torch.zeros(4)]):
                hidden = batch * 2
                rebound = hidden * 2
                outputs = {"logits": hidden * 3, "name": "net"}
                history.append(hidden * 4)
                number = 2
                references = [weakref.ref(t) for t in (batch, hidden, rebound, outputs["logits"])]
                run_out()
        assert (before is not None, number, len(history)) == (True, 2, 2)
        assert guard.report is not None
        gone: list[Any] = [batch, hidden, rebound, outputs]
        assert gone == [None] * 4
        return references

    assert collected(train) == [True] * 4


def test_variables_seen_by_inner_functions_let_go() -> None:
    """A variable that an inner function closes over is let go too."""

    def train() -> list[weakref.ref[torch.Tensor]]:
        with oom_guard(reraise=False):
            hidden = torch.zeros(4)

            def look() -> torch.Tensor:
                return hidden

            references = [weakref.ref(look())]
            run_out()
        return references

    assert collected(train) == [True]


def test_rebound_name_lets_go_even_at_the_same_address() -> None:
    """A name rebound many times in the block, where addresses are used again, is let go of."""

    def train() -> list[weakref.ref[torch.Tensor]]:
        hidden = torch.zeros(4)
        with oom_guard(reraise=False):
            for _ in range(20):
                hidden = hidden * 2
            references = [weakref.ref(hidden)]
            run_out()
        return references

    assert collected(train) == [True]


def test_names_of_a_module_let_go() -> None:
    """In a script or a notebook's cell, where variables are globals, the same holds."""
    script = (
        "before = torch.zeros(4)\n"
        "with oom_guard(reraise=False):\n"
        "    hidden = before * 2\n"
        "    alive = weakref.ref(hidden)\n"
        "    raise torch.OutOfMemoryError('CUDA out of memory.')\n"
    )
    names: dict[str, Any] = {"torch": torch, "oom_guard": oom_guard, "weakref": weakref}
    exec(compile(script, "cell", "exec"), names)  # noqa: S102 -- what a notebook does
    assert names["hidden"] is None
    assert names["alive"]() is None
    assert names["before"] is not None


def test_last_uncaught_error_lets_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """An earlier failure that an interactive session keeps for its debugger is let go at the next one."""
    references: list[weakref.ref[torch.Tensor]] = []

    def layer() -> None:
        hidden = torch.zeros(4)
        references.append(weakref.ref(hidden))
        run_out(hidden)

    with pytest.raises(torch.OutOfMemoryError) as unguarded:
        layer()
    name = "last_exc" if sys.version_info >= (3, 12) else "last_value"
    monkeypatch.setattr(sys, name, unguarded.value, raising=False)
    assert references[0]() is not None
    with oom_guard(reraise=False):
        run_out()
    assert references[0]() is None


def test_failures_in_a_notebook_let_go() -> None:
    """IPython keeps the last error; neither a guarded nor an earlier bare failure keeps tensors in it."""
    shell = pytest.importorskip("IPython.core.interactiveshell").InteractiveShell.instance()
    try:
        shell.run_cell("import torch, weakref\nfrom torchfast import oom_guard")
        shell.run_cell(
            "def layer(images):\n"
            "    hidden = images * 2\n"
            "    alive.append(weakref.ref(hidden))\n"
            "    raise torch.OutOfMemoryError('CUDA out of memory.')\n"
            "alive = []"
        )
        bare = shell.run_cell("layer(torch.zeros(4))")
        guarded = shell.run_cell(
            "with oom_guard():\n    images = torch.zeros(4)\n    alive.append(weakref.ref(images))\n "
            "   layer(images)"
        )
        assert isinstance(bare.error_in_exec, torch.OutOfMemoryError)
        assert isinstance(guarded.error_in_exec, OutOfMemoryError)
        del bare
        assert [reference() is None for reference in shell.user_ns["alive"]] == [True] * 3
        assert shell.user_ns["images"] is None
    finally:
        type(shell).clear_instance()


def test_keep_frames_keeps_everything() -> None:
    """For a post-mortem, the failed variables stay where they were."""

    def train() -> torch.Tensor:
        with oom_guard(reraise=False, keep_frames=True):
            hidden = torch.zeros(4)
            run_out()
        return hidden

    assert train() is not None


def test_models_and_optimizers_stay() -> None:
    """A model or an optimizer made in the block is not data, and stays; so do gradients."""

    def train() -> tuple[Any, Any]:
        with oom_guard(reraise=False):
            model = torch.nn.Linear(2, 2)
            optimizer = torch.optim.SGD(model.parameters())
            model(torch.zeros(1, 2)).sum().backward()
            run_out()
        return model, optimizer

    model, optimizer = train()
    assert isinstance(optimizer, torch.optim.SGD)
    assert model.weight.grad is not None


def test_guard_in_an_exit_stack_clears_what_it_can() -> None:
    """Entered through an `ExitStack`, the guard explains and clears the functions that failed."""
    references: list[weakref.ref[torch.Tensor]] = []

    def layer() -> None:
        hidden = torch.zeros(4)
        references.append(weakref.ref(hidden))
        run_out(hidden)

    def train() -> None:
        with ExitStack() as stack:
            stack.enter_context(oom_guard())
            layer()

    with pytest.raises(OutOfMemoryError):
        train()
    assert references[0]() is None


def test_entering_keeps_nothing_alive() -> None:
    """While a block runs, the guard does not keep alive what the variables were bound to before."""
    gc.disable()
    try:
        loss = torch.zeros(4)
        alive = weakref.ref(loss)
        with oom_guard():
            loss = torch.ones(4)
            assert alive() is None
        assert loss is not None
    finally:
        gc.enable()


@pytest.mark.parametrize("fails", [False, True])
def test_dict_of_locals_is_the_users_own(*, fails: bool) -> None:
    """What `locals()` returned before the block, often a run's settings, has its entries afterwards."""

    def train(rate: float, depth: int) -> dict[str, Any]:
        settings = locals()
        with oom_guard(reraise=False):
            rate, hidden = rate / 2, torch.zeros(4)
            if fails:
                run_out(hidden)
        return settings

    settings = train(0.5, 3)
    assert settings["depth"] == 3
    assert set(settings) >= {"rate", "depth"}


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
