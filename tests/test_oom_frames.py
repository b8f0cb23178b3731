"""What a failed block held through its frames is let go; all else stays."""

import asyncio
import contextlib
import gc
import sys
import traceback
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from torchfast import OutOfMemoryError, oom_guard

pytestmark = pytest.mark.usefixtures("quick_collections")


def run_out(*_: Any) -> None:
    """Fail as CUDA's allocator does."""
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


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
        with contextlib.ExitStack() as stack:
            stack.enter_context(oom_guard())
            layer()

    with pytest.raises(OutOfMemoryError):
        train()
    assert references[0]() is None


@pytest.mark.parametrize("n_variables", range(12))
def test_guard_in_an_exit_stack_leaves_what_was_bound(n_variables: int) -> None:
    """The frame in which it was entered has ended: another that takes its address is not taken for it."""
    lines = [f"    v{number} = batch + {number}" for number in range(n_variables)]
    body = """
    with contextlib.ExitStack() as stack:
        stack.enter_context(oom_guard(reraise=False))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    return batch
"""
    names = {"contextlib": contextlib, "oom_guard": oom_guard, "torch": torch}
    exec("\n".join(["def f(batch):", *lines, body]), names)  # noqa: S102 - frames of different sizes
    function: Any = names["f"]
    assert function(torch.ones(2)) is not None


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


def test_blocks_left_in_another_order() -> None:
    """One guard in two generators, the first of which leaves first, tells their variables apart."""
    guard = oom_guard(reraise=False)
    alive: list[weakref.ref[torch.Tensor]] = []

    def working(*, fails: bool) -> Iterator[bool]:
        with guard:
            hidden = torch.zeros(4)
            alive.append(weakref.ref(hidden))
            yield False
            if fails:
                run_out()
        yield hidden is None

    first, second = working(fails=True), working(fails=False)
    assert (next(first), next(second)) == (False, False)
    assert (next(first), next(second)) == (True, False)
    assert [reference() is None for reference in alive] == [True, False]


def test_tasks_that_share_a_guard() -> None:
    """One guard in two tasks that take turns tells their variables apart."""
    guard = oom_guard(reraise=False)

    async def work(*, fails: bool) -> bool:
        with guard:
            hidden = torch.zeros(4)
            await asyncio.sleep(0)
            if fails:
                run_out(hidden)
        return hidden is None

    async def both() -> tuple[bool, bool]:
        return await asyncio.gather(work(fails=True), work(fails=False))

    assert tuple(asyncio.run(both())) == (True, False)


# --- what must go on in spite of it ------------------------------------------------------------------


def test_generator_that_has_handled_a_failure_goes_on() -> None:
    """A loader that got over an error of its own is not closed with the frames of that error."""
    handled: list[Exception] = []

    def batches() -> Iterator[int]:
        for number in range(3):
            try:
                if number == 1:
                    run_out()
            except torch.OutOfMemoryError as error:
                handled.append(error)
            yield number

    seen = []
    for number in batches():
        seen.append(number)
        if handled:
            with oom_guard(reraise=False):
                raise ValueError(number) from handled.pop()
    assert seen == [0, 1, 2]


def test_coroutine_that_has_handled_a_failure_goes_on() -> None:
    """The same for a task that still waits for something when its error is looked into elsewhere."""
    handled: list[Exception] = []
    is_looked_into = asyncio.Event()

    async def work() -> str:
        try:
            run_out()
        except torch.OutOfMemoryError as error:
            handled.append(error)
        await is_looked_into.wait()
        return "finished"

    async def main() -> str:
        task = asyncio.create_task(work())
        await asyncio.sleep(0)
        with oom_guard(reraise=False):
            raise handled[0]
        is_looked_into.set()
        return await task

    assert asyncio.run(main()) == "finished"


def test_generators_that_have_failed_let_go() -> None:
    """Of a generator that ended with the error, the variables go as those of any function."""
    references = []

    def batches() -> Iterator[torch.Tensor]:
        batch = torch.zeros(4)
        references.append(weakref.ref(batch))
        yield batch
        run_out()

    def train() -> None:
        with oom_guard():
            for _ in batches():
                pass

    gc.disable()
    try:
        with pytest.raises(OutOfMemoryError):
            train()
    finally:
        gc.enable()
    assert [reference() for reference in references] == [None]


def test_arguments_of_a_decorated_function_let_go() -> None:
    """What is handed over to a decorated function is not kept by the error that comes out of it."""
    references = []

    @oom_guard()
    def step(batch: torch.Tensor) -> torch.Tensor:
        run_out()
        return batch

    def tracked() -> torch.Tensor:
        batch = torch.zeros(4)
        references.append(weakref.ref(batch))
        return batch

    with pytest.raises(OutOfMemoryError) as caught:
        step(tracked())
    assert caught.value.__traceback__ is not None
    assert [reference() for reference in references] == [None]
