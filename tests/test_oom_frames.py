"""What is let go through the frames of a failure, and what must go on in spite of it."""

import asyncio
import gc
import weakref
from collections.abc import Iterator

import pytest
import torch

from torchfast import OutOfMemoryError, oom_guard

pytestmark = pytest.mark.usefixtures("quick_collections")


def run_out() -> None:
    """Fail as CUDA's allocator does."""
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


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
