"""Putting a training step back to where it began.

What a failed step has changed by the time it fails: some gradients, the running statistics of batch norms
(any buffer), random state, the scaler, and, if it got that far, parameters and moments. All but the last are
cheap to keep; the last need a copy, which is the user's to ask for.
"""

import functools
import operator
import weakref
from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import nn

from torchfast._oom.random_state import RandomState
from torchfast._oom.step_probe import StepProbe

State = dict[str, Any]
Pairs = tuple[list[torch.Tensor], list[torch.Tensor]]
# At every step these go over hundreds of tensors: calls from C take half the time of a comprehension.
_gradient_of = operator.attrgetter("grad")


class Subjects(NamedTuple):
    """What takes part in a step."""

    modules: tuple[nn.Module, ...]
    optimizers: tuple[torch.optim.Optimizer, ...]
    scaler: Any
    generators: tuple[torch.Generator, ...]


class Transaction:
    """The state of a training step at its beginning, and the way back to it.

    `begin` notes the state, `roll_back` restores it as often as asked. Buffers are copied into memory that is
    kept from step to step; gradients are copied only where a step begins with some, while accumulating. With
    `copy`, parameters and optimizer state are copied too: memory of that size again, and the time to copy it.

    The modules' structure is looked at once: a module added later is not part of it.
    """

    def __init__(self, subjects: Subjects, *, copy: bool) -> None:
        self._subjects, self._copy = subjects, copy
        modules = list(dict.fromkeys(m for root in subjects.modules for m in root.modules()))
        slots = [(m._buffers, name) for m in modules for name in m._buffers]
        self._owners: list[dict[str, Any]] = [owner for owner, _ in slots]
        self._names = [name for _, name in slots]
        in_modules = (p for m in modules for p in m._parameters.values() if p is not None)
        in_groups = (p for o in subjects.optimizers for g in o.param_groups for p in g["params"])
        self._parameters = list(dict.fromkeys([*in_modules, *in_groups]))
        self._buffer_copies = _Copies()
        self._parameter_copies = _Copies()
        self._moment_copies = _Copies()
        self._probes = [StepProbe(optimizer) for optimizer in subjects.optimizers]
        self._random = RandomState(subjects.generators)
        self._has_step_begun = self._is_watching = False
        self._hook_up()

    def begin(self, inputs: Sequence[Any] = ()) -> None:
        """Note the state that `roll_back` is to restore; tensors among the inputs may get gradients too."""
        self._has_step_begun = False
        for probe in self._probes:
            probe.seen = None
        self._buffers = list(map(dict.get, self._owners, self._names))
        self._buffer_copies.take([buffer for buffer in self._buffers if buffer is not None])
        self._random.note()
        self._scaler = _scaler_state(self._subjects.scaler)
        self._with_gradients = [*self._parameters, *filter(_is_leaf, inputs)]
        gradients = list(map(_gradient_of, self._with_gradients))
        are_none = set(map(type, gradients)) == {NoneType}  # as a rule: all but while accumulating
        self._gradients = (
            gradients if are_none else [None if g is None else (g, g.clone()) for g in gradients]
        )
        self._optimizers = [_optimizer_state(o, copy=self._copy) for o in self._subjects.optimizers]
        if self._copy:
            self._parameter_copies.take(self._parameters)
            self._moment_copies.take([t for state in self._optimizers for t in state.tensors])

    def watch(self) -> None:
        """Before each step of an optimizer find out whether it will fit, then note that it has begun."""
        self._is_watching = True

    def stop_watching(self) -> None:
        """Stop watching."""
        self._is_watching = False
        for probe in self._probes:
            probe.stop()

    def probe(self) -> None:
        """Find out now whether the optimizers' steps will fit."""
        if not self._copy:
            for probe in self._probes:
                probe.check()

    @property
    def n_alloc_retries(self) -> int | None:
        """How often the allocator had given its cache back when a probe asked; None if none has."""
        return next((probe.seen.n_alloc_retries for probe in self._probes if probe.seen is not None), None)

    @property
    def can_roll_back(self) -> bool:
        """Whether there is a way back: with a copy always, else until an optimizer's step has begun."""
        return self._copy or not self._has_step_begun

    @torch.no_grad()
    def roll_back(self) -> None:
        """Restore the state noted by `begin`."""
        for parameter, before in zip(self._with_gradients, self._gradients, strict=True):
            parameter.grad = None if before is None else before[0].copy_(before[1])
        for owner, name, buffer in zip(self._owners, self._names, self._buffers, strict=True):
            if buffer is not None or name in owner:
                owner[name] = buffer
        self._buffer_copies.put_back()
        for optimizer, state in zip(self._subjects.optimizers, self._optimizers, strict=True):
            state.restore(optimizer)
        if self._copy:
            self._parameter_copies.put_back()
            self._moment_copies.put_back()
        _restore_scaler(self._subjects.scaler, self._scaler)
        self._random.restore()
        self._has_step_begun = False

    def end(self) -> None:
        """Let go of the gradients that the step began with; the other copies are for the next one."""
        self._gradients, self._with_gradients = [], []

    def _hook_up(self) -> None:
        """Have the optimizers tell of their steps for as long as this lives, which they do not prolong."""
        this, handles = weakref.ref(self), []
        for optimizer, probe in zip(self._subjects.optimizers, self._probes, strict=True):
            before = functools.partial(_before_step, this, probe)
            after = functools.partial(_after_step, this, probe)
            handles.append(optimizer.register_step_pre_hook(before))
            if not self._copy:
                handles.append(optimizer.register_step_post_hook(after))
        weakref.finalize(self, _remove, handles).atexit = False

    def _begin_step(self, probe: StepProbe) -> None:
        if not self._copy:
            probe.before()
        # Which of its changes a step has made by the time it fails cannot be told: fused optimizers, and any
        # under a dispatch mode, change parameters without counting up their versions.
        self._has_step_begun = True


def _before_step(reference: "weakref.ref[Transaction]", probe: StepProbe, *_: Any) -> None:
    transaction = reference()
    if transaction is not None and transaction._is_watching:
        transaction._begin_step(probe)


def _after_step(reference: "weakref.ref[Transaction]", probe: StepProbe, *_: Any) -> None:
    transaction = reference()
    if transaction is not None and transaction._is_watching:
        probe.after()


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()


def _is_leaf(part: Any) -> bool:
    return isinstance(part, torch.Tensor) and part.requires_grad and part.is_leaf


class _Copies:
    """Copies of tensors, in memory that is kept for the next time."""

    def __init__(self) -> None:
        self._tensors: list[torch.Tensor] = []
        self._copies: list[torch.Tensor] = []
        self._groups: list[Pairs] = []
        self._require_grad = False

    def take(self, tensors: list[torch.Tensor]) -> None:
        """Copy the tensors: into new memory the first time, and when they are others or of other shapes."""
        is_same = len(tensors) == len(self._tensors) and all(map(operator.is_, tensors, self._tensors))
        if is_same and not self._require_grad and self._renew():
            return
        with torch.no_grad():  # which takes as long as all that comes before it, so not for buffers
            if not (is_same and self._renew()):
                views = [_without_repeats(tensor) for tensor in tensors]
                self._tensors, self._copies = tensors, [view.clone() for view in views]
                self._groups = _grouped(self._copies, views)
                self._require_grad = any(tensor.requires_grad for tensor in tensors)

    @torch.no_grad()
    def put_back(self) -> None:
        """Write the copies into the tensors."""
        for copies, tensors in self._groups:
            copy_all(tensors, copies)

    def _renew(self) -> bool:
        try:
            for copies, tensors in self._groups:
                copy_all(copies, tensors)
        except RuntimeError:  # a tensor was resized in place
            return False
        return True


def _without_repeats(tensor: torch.Tensor) -> torch.Tensor:
    """Return each place in memory once: into an expanded tensor nothing can be written."""
    if tensor.layout is not torch.strided or 0 not in tensor.stride():
        return tensor
    return tensor[tuple(slice(1) if stride == 0 else slice(None) for stride in tensor.stride())]


def copy_all(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """Copy each source into its target, all of one type on one device: few kernels instead of many."""
    copy = getattr(torch, "_foreach_copy_", _copy_one_by_one)
    copy(targets, sources)


def _copy_one_by_one(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


def _grouped(copies: list[torch.Tensor], tensors: list[torch.Tensor]) -> list[Pairs]:
    groups: dict[tuple[torch.dtype, torch.device], Pairs] = {}
    for copy, tensor in zip(copies, tensors, strict=True):
        pairs = groups.setdefault((tensor.dtype, tensor.device), ([], []))
        pairs[0].append(copy)
        pairs[1].append(tensor)
    return list(groups.values())


# --- the optimizer ---------------------------------------------------------------------------------------


class _OptimizerState(NamedTuple):
    """Which state an optimizer has: that which a failed step makes must go, or the next one trips over it."""

    entries: dict[Any, State] | None
    groups: list[State]
    rates: list[tuple[torch.Tensor, torch.Tensor]]  # settings that are tensors, and their values
    tensors: list[torch.Tensor]

    def restore(self, optimizer: torch.optim.Optimizer) -> None:
        """Restore settings, and, with a copy, which entries there are; values are restored apart."""
        del optimizer.param_groups[len(self.groups) :]
        for group, settings in zip(optimizer.param_groups, self.groups, strict=True):
            group.update(settings)
        for rate, value in self.rates:
            rate.copy_(value)
        if self.entries is None:
            return
        for key in list(optimizer.state):
            if key not in self.entries:
                del optimizer.state[key]
        for key, before in self.entries.items():
            optimizer.state[key].clear()
            optimizer.state[key].update(_apart(before, []))


def _optimizer_state(optimizer: torch.optim.Optimizer, *, copy: bool) -> _OptimizerState:
    groups = [{key: value for key, value in g.items() if key != "params"} for g in optimizer.param_groups]
    rates = [(v, v.clone()) for group in groups for v in group.values() if isinstance(v, torch.Tensor)]
    if not copy:  # then there is no way back once a step has begun, and before it nothing is made
        return _OptimizerState(None, groups, rates, [])
    tensors: list[torch.Tensor] = []
    entries = {key: _apart(state, tensors) for key, state in optimizer.state.items()}
    return _OptimizerState(entries, groups, rates, tensors)


def _apart(state: Any, tensors: list[torch.Tensor]) -> Any:
    """Return the state in containers of its own, as L-BFGS appends to its lists; collect its tensors."""
    if isinstance(state, torch.Tensor):
        tensors.append(state)
    elif isinstance(state, dict):
        return {key: _apart(value, tensors) for key, value in state.items()}
    elif type(state) in (list, tuple):
        return type(state)(_apart(value, tensors) for value in state)
    return state


# --- the gradient scaler ---------------------------------------------------------------------------------


_SCALER_TENSORS = ("_scale", "_growth_tracker")


def _scaler_state(scaler: Any) -> State | None:
    """Return the scaler's state: from private attributes, as its own `state_dict` would wait for the GPU."""
    if scaler is None:
        return None
    if not hasattr(scaler, "_per_optimizer_states"):
        return {"public": scaler.state_dict()}
    stages = _copied_stages(scaler._per_optimizer_states)
    tensors = {name: getattr(scaler, name) for name in _SCALER_TENSORS}
    return {"stages": stages, **{k: None if t is None else t.clone() for k, t in tensors.items()}}


def _restore_scaler(scaler: Any, state: State | None) -> None:
    if state is None:
        return
    if "public" in state:
        scaler.load_state_dict(state["public"])
        return
    scaler._per_optimizer_states.clear()
    scaler._per_optimizer_states.update(_copied_stages(state["stages"]))
    for name in _SCALER_TENSORS:
        copy = state[name]
        setattr(scaler, name, None if copy is None else copy.clone())


def _copied_stages(stages: Mapping[int, State]) -> dict[int, State]:
    return {
        key: {**stage, "found_inf_per_device": dict(stage["found_inf_per_device"])}
        for key, stage in stages.items()
    }
