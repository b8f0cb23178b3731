"""Questions that a step asks of activations before it goes on, answered so that it does."""

import math
import sys
from typing import Any

import torch

from torchfast._estimate.cuda_behaviour import reductions
from torchfast._estimate.known import values_of, worth_keeping
from torchfast._estimate.recorder import Recorder

_READ_BACK = "numbers that the step reads back from the GPU were taken to be 0 (1 for integers)"
_HOLDS = "checks that all of something holds (all, equal, allclose, isfinite) were taken to hold"
_FINITE = "activations that are looked at for NaN or infinity were taken to have none"
_LEFT = "a loop that waits for a number of the GPU's was taken to end after 10,000 rounds"
_PATIENCE = 10_000
_TRUE = torch.ones((), dtype=torch.bool)  # by its identity, the answer that was assumed


def item(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Answer `.item()` and `bool()`: with what is known, else with what stops nothing."""
    known = values_of(args[0])
    if known is not None and known is not _TRUE:
        return func(known, **kwargs)
    n_times = _times_asked(recorder)
    if n_times > _PATIENCE:
        recorder.assumptions[_LEFT] = None
        return _unlike(args[0].dtype, n_times, was=known is _TRUE)
    if known is _TRUE:
        return True
    recorder.assumptions[_READ_BACK] = None
    if args[0].dtype == torch.bool:
        return False
    return 0.0 if args[0].dtype.is_floating_point else 1


def _unlike(dtype: torch.dtype, n_times: int, *, was: bool) -> Any:
    """Return another answer than all the times before: numbers become very large and very small in turn."""
    if dtype == torch.bool:
        return not was
    if dtype.is_floating_point:
        return math.inf if n_times % 2 else -math.inf
    return 0


def _times_asked(recorder: Recorder) -> int:
    """Count the questions from one place in the user's code, within one phase."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(_INSIDE):
        frame = frame.f_back
    place = recorder.phase, frame.f_code, frame.f_lasti
    recorder.asked[place] = recorder.asked.get(place, 0) + 1
    return recorder.asked[place]


_INSIDE = ("torchfast._estimate.", "torch.", "contextlib")


def every(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Answer `all()`: programs go on where it holds, and end where it does not."""
    run = reductions.reduction if func._schema.name == "aten::all" else Recorder.run
    return _taken_to_hold(recorder, run(recorder, func, args, kwargs), args[0])


def equal(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Answer `equal` and `allclose` about two tensors."""
    ours, others = values_of(args[0]), values_of(args[1])
    if ours is not None and others is not None:
        return bool(func(ours, others, *args[2:], **kwargs))
    recorder.assumptions[_HOLDS] = None
    return True


def itself(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Answer the two halves of `isfinite`: a number equals itself, and its size is not infinite."""
    outputs = recorder.run(func, args, kwargs)
    is_half = args[0] is args[1] if func._schema.name == "aten::eq" else _is_infinity(args[1])
    return _taken_to_hold(recorder, outputs, args[0]) if is_half else outputs


def not_finite(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Answer `isnan` and `isinf`: a step that works has no such numbers."""
    outputs = recorder.run(func, args, kwargs)
    if values_of(args[0]) is None and worth_keeping(outputs):
        recorder.assumptions[_FINITE] = None
        outputs.values = torch.zeros(outputs.shape, dtype=torch.bool)
    return outputs


def _is_infinity(other: Any) -> bool:
    return isinstance(other, float) and other == math.inf


def _taken_to_hold(recorder: Recorder, outputs: Any, asked_of: torch.Tensor) -> Any:
    if outputs.dim() == 0 and values_of(asked_of) is None:
        recorder.assumptions[_HOLDS] = None
        outputs.values = _TRUE
    return outputs
