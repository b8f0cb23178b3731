"""Inference in chunks: the same outputs from less memory."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from torchfast._tree import flatten, tensors

if TYPE_CHECKING:
    from torchfast._oom.retry import OOMRetry


def chunked(retry: "OOMRetry", function: Callable[..., Any], dim: int) -> Callable[..., Any]:
    """Return the function, working on its batch in chunks where the whole does not fit."""

    def run(*args: Any, **kwargs: Any) -> Any:
        for attempt in retry.attempts((args, kwargs)):
            with attempt:
                outputs = Gathered(attempt.n_samples, dim)
                for (chunk_args, chunk_kwargs), share in attempt:
                    outputs.add(function(*chunk_args, **chunk_kwargs), share)
                return outputs.whole()
        return None  # a quiet guard gave up

    named = function.forward if isinstance(function, torch.nn.Module) else function
    return functools.wraps(named)(run)


class Gathered:
    """Outputs of chunks, each put into its place as it comes, so that only one chunk is held twice."""

    def __init__(self, n_samples: int, dim: int) -> None:
        self._n_samples, self._dim = n_samples, dim
        self._first: Any = None
        self._n_done = 0
        self._places: list[Any] = []

    def add(self, output: Any, share: float) -> None:
        """Take the output of the next chunk, which is this share of the batch."""
        if share == 1.0:
            self._first = output
            return
        leaves, structure = flatten(output)
        size = round(self._n_samples * share)
        for leaf in leaves:
            if not (isinstance(leaf, torch.Tensor) and leaf.shape[self._dim : self._dim + 1] == (size,)):
                raise _refusal(size, _what(leaf))
        around = structure.rebuild(range(len(leaves)))
        if not leaves and output is not None:
            raise _refusal(size, _what(output))
        if self._n_done == 0:
            self._structure, self._around = structure, around
            self._places = [self._place(leaf) for leaf in tensors(output)]
        elif _differs(around, self._around):
            raise _refusal(size, "things other than tensors, which differ from chunk to chunk")
        for place, leaf in zip(self._places, leaves, strict=True):
            if isinstance(place, list):
                place.append(leaf)
            else:
                place.narrow(self._dim, self._n_done, size).copy_(leaf)
        self._n_done += size

    def whole(self) -> Any:
        """Return the output for the whole batch."""
        if not self._places:
            return self._first
        return self._structure.rebuild(
            [torch.cat(p, self._dim) if isinstance(p, list) else p for p in self._places]
        )

    def _place(self, leaf: torch.Tensor) -> Any:
        if leaf.requires_grad:
            return []  # writing into one tensor would make every chunk's graph depend on it
        shape = list(leaf.shape)
        shape[self._dim] = self._n_samples
        return leaf.new_empty(shape)


def _what(leaf: Any) -> str:
    return f"a tensor of shape {tuple(leaf.shape)}" if isinstance(leaf, torch.Tensor) else type(leaf).__name__


def _differs(one: Any, other: Any) -> bool:
    # Without an `==` of its own, a container is equal to nothing but itself.
    kind: Any = type(one)
    return kind.__eq__ is not object.__eq__ and bool(one != other)


def _refusal(size: int, what: str) -> ValueError:
    return ValueError(
        f"a chunked function must return tensors with one row for each of its {size} samples, so that the "
        f"rows of several chunks can be put together; it returned {what}. Return values for each sample, and "
        "reduce them outside."
    )
