"""The fastest way to run a frozen teacher, found by timing and kept only if the outputs stay the same."""

import logging
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from torchfast import _layout
from torchfast._teacher.closeness import Forward, differs, versions
from torchfast._teacher.folding import fold, pairs_of
from torchfast._teacher.graph import captured
from torchfast._teacher.placing import Placing
from torchfast._timing import time_ms
from torchfast._tree import flatten, map_tensors

PARTS = ("plain", "fold", "compile", "graph")
MIN_GAIN = 0.03
"""What a further part has to gain: less is within the noise of a clock."""


@dataclass(frozen=True, slots=True)
class TeacherPlan:
    """How a teacher runs its first batch's shape, and what else was tried; `str` says it in a sentence.

    Attributes:
        parts: of "plain" (the plain layout instead of channels_last), "fold" (batch norms folded into
            convolutions), "compile" (`torch.compile`) and "graph" (a CUDA graph), those in use; empty for the
            module as it is.
        times_ms: the time of a forward pass, by what was tried: "eager", "fold", "fold+graph" and so on.
        rejected: why others are not in use, though they may be faster.
    """

    parts: tuple[str, ...]
    times_ms: dict[str, float] = field(default_factory=dict)
    rejected: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        tried = ", ".join(f"{name} {ms:.3g} ms" for name, ms in self.times_ms.items())
        text = _name(self.parts) + (f". Measured: {tried}" if tried else "")
        for name, reason in self.rejected.items():
            text += f". Rejected {name}: {reason}"
        return text + "."


class Planner:
    """Runs the teacher by the plan that it makes on the first call; other shapes run eagerly."""

    def __init__(
        self,
        module: nn.Module,
        eager: Forward,
        placing: Placing,
        allowed: Collection[str],
        kept: Collection[str],
    ) -> None:
        self.plan: TeacherPlan | None = None
        self._module, self._eager = module, eager
        self._device, self._image_ranks = placing.device, placing.image_ranks
        self._allowed, self._kept = allowed, kept
        self._fast: Forward | None = None
        self._signature: Any = None
        self._is_plain = False
        self._unfold: Callable[[], None] | None = None

    def __call__(self, inputs: Any, /) -> Any:
        """Return the outputs for these inputs."""
        signature = _signature(inputs)
        if self.plan is None and signature is not None:
            self._signature = signature
            return self._make(inputs)
        if self._fast is not None and _equal(signature, self._signature):
            return self._fast(inputs)
        return self._as_laid_out(self._eager)(inputs)

    def _make(self, inputs: Any) -> Any:
        """Choose, and return the module's own outputs for these inputs."""
        before = versions(inputs)
        expected = self._eager(inputs)
        if versions(inputs) != before:  # a second run would have other inputs
            self.plan = TeacherPlan((), {}, {"all": "the teacher changes its inputs in place"})
            return expected
        times: dict[str, float] = {"eager": time_ms(partial(self._eager, inputs), self._device)}
        rejected: dict[str, str] = {}
        best: tuple[str, ...] = ()
        for part in PARTS:
            if part not in self._allowed or (part == "graph" and self._device.type != "cuda"):
                continue
            parts = (*best, part)
            try:
                run = self._built(parts, inputs)
                if run is None:
                    continue
                reason = differs(expected, run(inputs))
                times[_name(parts)] = time_ms(partial(run, inputs), self._device)
            except Exception as error:  # noqa: BLE001 -- whatever a compiler or a capture may raise
                reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            if reason is not None:
                rejected[_name(parts)] = reason
            elif times[_name(parts)] < times[_name(best)] * (1 - MIN_GAIN):
                best = parts
        run = None  # a graph's memory is free before the next one takes its own
        best = _agreed(best)
        self._fast = self._built(best, inputs)
        self.plan = TeacherPlan(best, times, rejected)
        logging.getLogger("torchfast").info("GPUTeacher: %s", self.plan)
        return expected

    def _built(self, parts: Collection[str], inputs: Any) -> Forward | None:
        """Return the forward made of these parts, or None where a part has nothing to do."""
        if not self._lay_out("plain" in parts) or not self._fold("fold" in parts, inputs):
            return None
        run = self._as_laid_out(_compiled(self._module) if "compile" in parts else self._eager)
        return captured(run, inputs, self._device) if "graph" in parts else run

    def _as_laid_out(self, run: Forward) -> Forward:
        """Return `run` with the images among its inputs in the layout of the weights."""
        if not self._is_plain:
            return run

        def lay_out(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.contiguous() if tensor.dim() in self._image_ranks else tensor

        return lambda inputs: run(map_tensors(lay_out, inputs))

    def _lay_out(self, plain: bool) -> bool:  # noqa: FBT001 -- private
        """Bring the convolutions' weights into a layout; False if there is none to leave."""
        if plain == self._is_plain:
            return True
        if not self._image_ranks:
            return False
        if self._unfold is not None:
            self._unfold()
            self._unfold = None
        for _, convolution in _layout.convolutions(self._module):
            weight = _layout.stored_weight(convolution)
            if weight is not None:
                old = weight.detach()
                weight.data = old.contiguous() if plain else _layout.to_channels_last_tensor(old)
        self._is_plain = plain
        return True

    def _fold(self, wanted: bool, inputs: Any) -> bool:  # noqa: FBT001 -- private
        """Bring the module into the folded or unfolded state; False if there is nothing to fold."""
        if not wanted and self._unfold is not None:
            self._unfold()
            self._unfold = None
        if wanted and self._unfold is None:
            pairs = pairs_of(self._module, partial(self._eager, inputs), self._kept)
            if not pairs:
                return False
            self._unfold = fold(self._module, pairs)
        return True


def _name(parts: Collection[str]) -> str:
    return "+".join(parts) or "eager"


def _signature(inputs: Any) -> Any:
    """Return what a plan is made for: shape, type and strides of each tensor, and what is around them."""
    leaves, structure = flatten(inputs)
    seen = [(t.shape, t.dtype, t.stride()) for t in leaves if isinstance(t, torch.Tensor)]
    if len(seen) < len(leaves):
        return None  # objects that move themselves: what is in them cannot be seen
    return seen, structure.rebuild(range(len(leaves)))


def _equal(ours: Any, theirs: Any) -> bool:
    try:
        return bool(ours == theirs)
    except (RuntimeError, ValueError):  # arrays among the inputs do not say yes or no
        return False


def _compiled(module: nn.Module) -> Forward:
    def run(inputs: Any) -> Any:
        args, kwargs = inputs
        with _quiet():
            return compiled(*args, **kwargs)

    with _quiet():
        compiled = torch.compile(module, dynamic=False)
    return run


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep a compiler's warnings to itself: they are not about the user's code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _agreed(parts: tuple[str, ...]) -> tuple[str, ...]:
    """Return rank 0's choice: ranks that computed their targets by other kernels would differ in rounding."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return parts
    choice = [parts]
    dist.broadcast_object_list(choice, src=0)
    return choice[0]
