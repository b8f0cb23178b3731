"""Which names a block may bind: all that it can, and few others."""

import asyncio
import contextlib
import inspect
import sys
import textwrap
from types import TracebackType
from typing import Any, Self

import pytest

from torchfast._oom import blocks


class Looks:
    """A context manager that looks up which names its block may bind."""

    names: tuple[str, ...] | None = None

    def __enter__(self) -> Self:
        frame = sys._getframe(1)
        self.names = blocks.names_bound(frame.f_code, frame.f_lasti)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        pass


def names_in(body: str, *, head: str = "def function():") -> tuple[str, ...] | None:
    """Return the names that are told to `looks` in a function with this body."""
    looks = Looks()
    names: dict[str, Any] = {"looks": looks, "contextlib": contextlib, "asyncio": asyncio}
    exec(f"{head}\n{textwrap.indent(textwrap.dedent(body), '    ')}", names)  # noqa: S102 -- code is what this is about
    result = names["function"]()
    if inspect.iscoroutine(result):
        asyncio.run(result)
    elif result is not None:
        list(result)
    return looks.names


def test_every_way_to_bind_a_name_is_seen() -> None:
    """Assignments of all kinds, in whatever nested statement, are among the names."""
    found = names_in(
        """
        with looks as one:
            two = 1
            for three in range(2):
                four = [five for five in range(three)]
                try:
                    six = int("no")
                except ValueError as seven:
                    eight = seven
                else:
                    nine = 9
                finally:
                    ten = 10
                with contextlib.nullcontext(1) as eleven:
                    twelve = 12
                if three == 7:
                    thirteen = 13
                    continue
                while two > 1:
                    fourteen = 14
            (fifteen := 15)
            sixteen, (seventeen, *eighteen) = 1, (2, 3)
            import os as nineteen
            match four:
                case [twenty]:
                    last = 21
        """
    )
    expected = "one two three four six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    expected += "seventeen eighteen nineteen twenty last"
    assert set(found or ()) >= set(expected.split())


def test_names_bound_elsewhere_are_left_out() -> None:
    """What the function binds before its block, or after it, is not what the block binds."""
    found = names_in(
        """
        before = 1
        for index in range(before):
            early = index
            with contextlib.nullcontext(), looks:
                inside = early
            late = inside
        """
    )
    assert found == ("inside",)


def test_names_that_inner_functions_bind() -> None:
    """A variable shared with an inner function may be bound by it at any time."""
    found = names_in(
        """
        shared = 0
        def inner():
            nonlocal shared
            shared = 1
        with looks:
            inner()
        """
    )
    assert found == ("shared",)


def test_generators_and_coroutines() -> None:
    """Blocks of functions that run in pieces are known as well."""
    assert names_in("with looks:\n    sent = yield 1") == ("sent",)
    waiting = "with looks:\n    waited = await asyncio.sleep(0)"
    assert names_in(waiting, head="async def function():") == ("waited",)


def test_names_of_a_module() -> None:
    """In a script or a notebook's cell, where variables are globals, it is the same."""
    names: dict[str, Any] = {"looks": Looks()}
    exec("before = 1\nwith looks:\n    inside = before\nafter = 2\n", names)  # noqa: S102 -- what a notebook does
    assert names["looks"].names == ("inside",)


@pytest.mark.parametrize(
    "body",
    [
        "looks.__enter__()\nbound = 1",
        "with contextlib.nullcontext():\n    looks.__enter__()\n    bound = 1",
        "try:\n    looks.__enter__()\n    bound = 1\nfinally:\n    bound = 2",
        "with contextlib.ExitStack() as stack:\n    stack.enter_context(looks)\n    bound = 1",
    ],
)
def test_block_that_nobody_knows(body: str) -> None:
    """Entered in other ways than by a `with` statement of its own, nothing is known of the block."""
    assert names_in(body) is None


def test_what_is_known_is_bounded() -> None:
    """Ever new code, as that of a notebook's cells, does not fill the memory."""
    for _ in range(blocks._MAX_BLOCKS + 10):
        exec(compile("with looks:\n    pass\n", "cell", "exec"), {"looks": Looks()})  # noqa: S102 -- as above
    assert 0 < len(blocks._known) <= blocks._MAX_BLOCKS
