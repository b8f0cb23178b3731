"""What a failed block held through its frames: reading it, and letting go of it.

An exception keeps the frames that it passed through, and so every local variable of the failed code. Frames
that have ended can be cleared whole. The frame with the `with` statement is still running: of its variables,
those that the block has bound to tensors become None, by writing into the frame. Private to CPython and kept
in this file: `PyFrame_LocalsToFast` before Python 3.13, write-through `f_locals` since.
"""

import ctypes
import gc
import inspect
import sys
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from types import AsyncGeneratorType, CodeType, CoroutineType, FrameType, GeneratorType, TracebackType
from typing import Any, NamedTuple

import torch

from torchfast._oom.blocks import names_bound
from torchfast._oom_errors import classify
from torchfast._tree import flatten

_CO_OPTIMIZED = 1  # a function's frame; a module's variables are its globals
_IN_PIECES = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
_OWNERS = GeneratorType, CoroutineType, AsyncGeneratorType
_FRAME_OF = "gi_frame", "cr_frame", "ag_frame"
# Looked up once: a guard is entered at every step.
_Tensor, _ref, _exception, _make_tuple = torch.Tensor, weakref.ref, sys.exception, tuple.__new__
_WRITES_THROUGH = sys.version_info >= (3, 13)
_N_OURS = 4  # references to a snapshot: the frame's, its reader's, and two in the functions that look
_n_references = sys.getrefcount


class Bound(NamedTuple):
    """What the names were bound to that a block may bind; holds nothing alive."""

    frame_id: int
    names: tuple[str, ...] | None  # those that the block may bind; None: any
    values: dict[str, object]  # name: a weak reference to a tensor, else the id
    handled_id: int  # of the exception that was being handled by then: every later one has it as its context
    code: CodeType | None = None  # the id of a frame that has ended, as an `ExitStack`'s has, is used again


def bound_in(frame: FrameType, /) -> Bound:
    """Note what the variables of a running frame are bound to, without keeping any of it alive.

    Almost all that a guard costs while nothing fails. A tensor's id may be used again for another one as soon
    as it is gone, so tensors are noted by weak references.
    """
    code = frame.f_code
    names = names_bound(code, frame.f_lasti)
    values: dict[str, object] = {}
    if names != ():
        variables = frame.f_locals
        for name in _all_names(frame, variables) if names is None else names:
            if name in variables:
                value = variables[name]
                values[name] = _ref(value) if type(value) is _Tensor else id(value)
        if not _WRITES_THROUGH:
            _drop_snapshot(frame, variables)
    # Past the Python function that makes a named tuple, which costs as much again.
    return _make_tuple(Bound, (id(frame), names, values, id(_exception()), code))


def let_go(error: BaseException, bound: Bound | None, /) -> None:
    """Let go of all tensors that the failed block held through its frames.

    Frames that have ended are cleared, along the chain of causes and contexts. In the frame that `bound` was
    taken from, if the error passed through it, tensors and containers of tensors bound since become None.
    """
    related = related_errors(error, 0 if bound is None else bound.handled_id)
    passed = [frame for each in related for frame in _frames(each.__traceback__)]
    waiting = _waiting(passed)
    for frame in passed:
        if id(frame) not in waiting:
            with suppress(RuntimeError):  # it is running
                frame.clear()
        if not _WRITES_THROUGH:
            variables = frame.f_locals
            _drop_snapshot(frame, variables)
    if bound is not None:
        for frame in _frames(error.__traceback__):
            if id(frame) == bound.frame_id and frame.f_code is bound.code:
                _unbind(frame, bound)
                break


def forget_last_error() -> None:
    """Clear the frames of the last uncaught error, which an interactive session keeps for its debugger."""
    last = getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
    if isinstance(last, BaseException) and classify(last) is not None:
        let_go(last, None)


def related_errors(error: BaseException, handled_id: int = 0, /) -> Iterator[BaseException]:
    """Yield the error and all that it groups, was caused by or was raised in the context of, each once.

    The exception with the id `handled_id`, which was being handled before all this, is no such context.
    """
    waiting: list[BaseException | None] = [error]
    seen: set[int] = set()
    while waiting:
        current = waiting.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        waiting.append(current.__cause__)
        if id(current.__context__) != handled_id:
            waiting.append(current.__context__)
        if isinstance(current, BaseExceptionGroup):
            waiting += current.exceptions


class Findings(NamedTuple):
    """What the failed frames tell, as plain numbers and words."""

    phase: str | None
    common_size: int | None
    n_sharing: int


def look_into(error: BaseException, bound: Bound, /) -> Findings:
    """Return the phase that failed, and the leading dimension most common among the frames' tensors."""
    phase = None
    sizes: Counter[int] = Counter()
    seen: set[int] = set()
    for related in related_errors(error, bound.handled_id):
        for frame in _frames(related.__traceback__):
            phase = phase_of(frame) or phase
            for value in _values(frame):
                if isinstance(value, torch.Tensor) and _is_activation(value) and id(value) not in seen:
                    seen.add(id(value))
                    sizes[value.size(0)] += 1  # nested tensors have no shape
    common, n_sharing = sizes.most_common(1)[0] if sizes else (None, 0)
    return Findings(phase, common, n_sharing)


def phase_of(frame: FrameType, /) -> str | None:
    """Return the phase of a training step that a frame of PyTorch's own code stands for."""
    path = frame.f_code.co_filename.replace("\\", "/")
    if "/torch/optim/" in path:
        return "optimizer"
    if (
        path.endswith(("/torch/_tensor.py", "/torch/autograd/__init__.py"))
        and "backward" in frame.f_code.co_name
    ):
        return "backward"
    return "forward" if path.endswith("/torch/nn/modules/module.py") else None


def _waiting(frames: Sequence[FrameType]) -> set[int]:
    """Return the ids of those in which a generator or coroutine waits to go on.

    It had handled an error of before. Until Python 3.13 it would be closed by clearing its frame.
    """
    in_pieces = [frame for frame in frames if frame.f_code.co_flags & _IN_PIECES]
    if _WRITES_THROUGH or not in_pieces:
        return set()
    owners = gc.get_referrers(*in_pieces)  # a frame does not tell; where it has ended, nobody owns it
    found = (
        getattr(owner, name, None) for owner in owners if isinstance(owner, _OWNERS) for name in _FRAME_OF
    )
    return {id(frame) for frame in found if frame is not None}


def _is_activation(value: torch.Tensor) -> bool:
    # A leaf that requires grad is a weight.
    return value.ndim > 0 and not (value.requires_grad and value.is_leaf)


def _frames(tb: TracebackType | None) -> Iterator[FrameType]:
    while tb is not None:
        yield tb.tb_frame
        tb = tb.tb_next


def _values(frame: FrameType) -> list[Any]:
    variables = frame.f_locals
    values = [variables[name] for name in _all_names(frame, variables)]
    _drop_snapshot(frame, variables)
    return values


def _all_names(frame: FrameType, variables: Mapping[str, Any]) -> list[str]:
    if frame.f_code.co_flags & _CO_OPTIMIZED:
        return list(variables)
    # A notebook's globals are many, but a cell's code names few of them.
    return [name for name in frame.f_code.co_names if name in variables]


def _drop_snapshot(frame: FrameType, variables: Any) -> None:
    """Empty the dict that reading `f_locals` leaves in a frame before Python 3.13: it pins the values.

    Unless somebody else has it too: `locals()` returns the very same dict there.
    """
    if not _WRITES_THROUGH and frame.f_code.co_flags & _CO_OPTIMIZED and _n_references(variables) <= _N_OURS:
        variables.clear()


def _unbind(frame: FrameType, bound: Bound) -> None:
    variables = frame.f_locals
    for name in _all_names(frame, variables) if bound.names is None else bound.names:
        value = variables.get(name)
        before = bound.values.get(name)
        is_same = before() is value if isinstance(before, weakref.ref) else before == id(value)
        if not is_same and _is_made_of_tensors(value):
            variables[name] = None
        del value
    if not _WRITES_THROUGH and frame.f_code.co_flags & _CO_OPTIMIZED:
        ctypes.pythonapi.PyFrame_LocalsToFast(ctypes.py_object(frame), ctypes.c_int(0))
        _drop_snapshot(frame, variables)


def _is_made_of_tensors(value: object) -> bool:
    if isinstance(value, torch.Tensor):
        return True
    try:
        leaves, _ = flatten(value)
    except ValueError:  # a container that contains itself is no batch
        return False
    # Of the objects that move themselves, only a packed sequence is data for sure: others may be models.
    return any(isinstance(leaf, (torch.Tensor, torch.nn.utils.rnn.PackedSequence)) for leaf in leaves)
