"""Inference in chunks: the same outputs from less memory."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from torchfast._batch import Gathered

if TYPE_CHECKING:
    from torchfast._oom.retry import OOMRetry


def chunked(retry: "OOMRetry", function: Callable[..., Any], dim: int) -> Callable[..., Any]:
    """Return the function, working on its batch in chunks where the whole does not fit."""

    def run(*args: Any, **kwargs: Any) -> Any:
        gathered: Gathered | None = None
        try:
            for attempt in retry.attempts((args, kwargs)):
                with attempt:
                    gathered = Gathered(attempt.n_samples, refusal=_refusal, dim=dim)
                    for chunk, share in attempt:
                        output = function(*chunk[0], **chunk[1])
                        if share == 1.0:
                            return output
                        gathered.add(output, round(attempt.n_samples * share))
                        del output
                    return gathered.whole()
            return None  # a quiet guard gave up
        finally:
            gathered = None
            del args, kwargs  # an error keeps this frame

    named = function.forward if isinstance(function, torch.nn.Module) else function
    return functools.wraps(named)(run)


def _refusal(what: str) -> ValueError:
    return ValueError(
        "a chunked function must return tensors with one row for each sample, so that the rows of several "
        f"chunks can be put together, or what is the same for every chunk; it returned {what}. "
        "Return values for each sample, and reduce them outside."
    )
