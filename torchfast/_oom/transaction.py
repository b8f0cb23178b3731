"""Putting a training step back to where it began.

What a failed step has changed by the time it fails: some gradients, the running statistics of batch norms
(any buffer), random state, the scaler, and, if it got that far, parameters and moments. All but the last are
cheap to keep; the last need a copy, which is the user's to ask for.
"""

import random
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from torchfast._bytes import MIB
from torchfast._memory import allocator_stats, driver_memory, peak_scope

State = dict[str, Any]
Pairs = tuple[list[torch.Tensor], list[torch.Tensor]]


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
        self._slots: list[tuple[dict[str, Any], str]] = [
            (m._buffers, name) for m in modules for name, buffer in m._buffers.items() if buffer is not None
        ]
        in_modules = (p for m in modules for p in m._parameters.values() if p is not None)
        in_groups = (p for o in subjects.optimizers for g in o.param_groups for p in g["params"])
        self._parameters = list(dict.fromkeys([*in_modules, *in_groups]))
        self._buffer_copies = _Copies()
        self._parameter_copies = _Copies()
        self._moment_copies = _Copies()
        self._probes = [_StepProbe(optimizer) for optimizer in subjects.optimizers]
        self._handles: list[Any] = []
        self._has_step_begun = False

    def begin(self) -> None:
        """Note the state that `roll_back` is to restore."""
        self._has_step_begun = False
        self._buffers = [slots[name] for slots, name in self._slots]
        self._buffer_copies.take(self._buffers)
        self._random = _random_state(self._subjects.generators)
        self._scaler = _scaler_state(self._subjects.scaler)
        self._gradients = [(p.grad, None if p.grad is None else p.grad.clone()) for p in self._parameters]
        self._optimizers = [_optimizer_state(o, copy=self._copy) for o in self._subjects.optimizers]
        if self._copy:
            self._parameter_copies.take(self._parameters)
            self._moment_copies.take([t for state in self._optimizers for t in state.tensors])

    def watch(self) -> None:
        """Before each step of an optimizer find out whether it will fit, then note that it has begun."""
        for optimizer, probe in zip(self._subjects.optimizers, self._probes, strict=True):
            if not self._copy:
                self._handles.append(optimizer.register_step_pre_hook(probe.before))
                self._handles.append(optimizer.register_step_post_hook(probe.after))
            self._handles.append(optimizer.register_step_pre_hook(self._note_step))

    def stop_watching(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for probe in self._probes:
            probe.stop()

    def probe(self) -> None:
        """Find out now whether the optimizers' steps will fit."""
        if not self._copy:
            for probe in self._probes:
                probe.check()

    @property
    def can_roll_back(self) -> bool:
        """Whether there is a way back: with a copy always, else until an optimizer's step has begun."""
        return self._copy or not self._has_step_begun

    @torch.no_grad()
    def roll_back(self) -> None:
        """Restore the state noted by `begin`."""
        for parameter, (gradient, copy) in zip(self._parameters, self._gradients, strict=True):
            if gradient is not None and copy is not None:
                gradient.copy_(copy)
            parameter.grad = gradient
        for (slots, name), buffer in zip(self._slots, self._buffers, strict=True):
            slots[name] = buffer
        self._buffer_copies.put_back()
        for optimizer, state in zip(self._subjects.optimizers, self._optimizers, strict=True):
            state.restore(optimizer)
        if self._copy:
            self._parameter_copies.put_back()
            self._moment_copies.put_back()
        _restore_scaler(self._subjects.scaler, self._scaler)
        _restore_random(self._random)
        self._has_step_begun = False

    def end(self) -> None:
        """Let go of the gradients that the step began with; the other copies are for the next one."""
        self._gradients = []

    def _note_step(self, *_: Any) -> None:
        # Which of its changes a step has made by the time it fails cannot be told: fused optimizers, and any
        # under a dispatch mode, change parameters without counting up their versions.
        self._has_step_begun = True


class _Copies:
    """Copies of tensors, in memory that is kept for the next time."""

    def __init__(self) -> None:
        self._tensors: list[torch.Tensor] = []
        self._copies: list[torch.Tensor] = []
        self._groups: list[Pairs] = []

    @torch.no_grad()
    def take(self, tensors: list[torch.Tensor]) -> None:
        """Copy the tensors: into new memory the first time, and when they are others or of other shapes."""
        if list(map(id, tensors)) != list(map(id, self._tensors)) or not self._renew():
            self._tensors, self._copies = tensors, [tensor.clone() for tensor in tensors]
            self._groups = _grouped(self._copies, tensors)

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
    tensors: list[torch.Tensor]

    def restore(self, optimizer: torch.optim.Optimizer) -> None:
        """Restore settings, and, with a copy, which entries there are; values are restored apart."""
        for group, settings in zip(optimizer.param_groups, self.groups, strict=True):
            group.update(settings)
        if self.entries is None:
            return
        for key in list(optimizer.state):
            if key not in self.entries:
                del optimizer.state[key]
        for key, before in self.entries.items():
            optimizer.state[key].clear()
            optimizer.state[key].update(before)


def _optimizer_state(optimizer: torch.optim.Optimizer, *, copy: bool) -> _OptimizerState:
    groups = [{key: value for key, value in g.items() if key != "params"} for g in optimizer.param_groups]
    if not copy:  # then there is no way back once a step has begun, and before it nothing is made
        return _OptimizerState(None, groups, [])
    entries = {key: dict(state) for key, state in optimizer.state.items()}
    tensors = [v for state in entries.values() for v in state.values() if isinstance(v, torch.Tensor)]
    return _OptimizerState(entries, groups, tensors)


class _StepProbe:
    """Finds out whether an optimizer's step will find the memory it needs, before it changes anything.

    A foreach optimizer changes moments before its allocating operator, so a failure inside it cannot be
    undone. What a step needs is measured at its first success; before that it is taken to be two tensors of
    state and one of scratch for each parameter. Where free memory is twice that, nothing is tried.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._need_bytes: int | None = None
        self._n_states = 0  # as long as there are as many, the step needs what was measured
        self._device: torch.device | None = None
        self._scope: Any = None

    def check(self) -> None:
        """Allocate what the step will need and let it go again, unless there is plenty."""
        if self._need_bytes is not None and self._device is not None:
            if len(self._optimizer.state) == self._n_states and _has_room(self._device, self._need_bytes):
                return
            self._need_bytes = self._need_bytes if len(self._optimizer.state) == self._n_states else None
        parameters = [p for g in self._optimizer.param_groups for p in g["params"] if p.grad is not None]
        self._device = next((p.device for p in parameters if p.is_cuda), None)
        if self._device is None:
            return
        all_bytes = sum(p.nbytes for p in parameters)
        n_new = sum(p not in self._optimizer.state for p in parameters)
        need = self._need_bytes
        if need is None:
            need = all_bytes + 2 * all_bytes * n_new // len(parameters)
        if _has_room(self._device, need):
            return
        # In the sizes of the parameters, as the step will ask for them: one large block might not be found
        # where many small ones are.
        n_each = max(1, round(need / all_bytes))
        scratch = [torch.empty_like(p) for _ in range(n_each) for p in parameters]
        scratch.clear()

    def before(self, *_args: Any) -> None:
        """Find out whether the step will fit; measure what it needs, if that is not known."""
        self.check()
        self.stop()
        if self._device is not None and self._need_bytes is None:
            self._n_states = len(self._optimizer.state)
            self._scope = peak_scope(self._device)
            self._scope.__enter__()

    def after(self, *_: Any) -> None:
        """Note what the step needed, unless it made its state."""
        scope = self._scope
        self.stop()
        if scope is None or scope.peak_allocated_bytes is None:
            return
        if len(self._optimizer.state) == self._n_states:
            self._need_bytes = scope.peak_allocated_bytes - scope.start.allocated_bytes

    def stop(self) -> None:
        """Stop measuring."""
        if self._scope is not None:
            self._scope.__exit__(None, None, None)
            self._scope = None


def _has_room(device: torch.device, need_bytes: int) -> bool:
    stats, memory = allocator_stats(device), driver_memory(device)
    if stats is None or memory is None:
        return True
    cached = stats.reserved_bytes - stats.allocated_bytes - stats.inactive_split_bytes
    limit = torch.cuda.get_per_process_memory_fraction(device) * memory.total_bytes - stats.reserved_bytes
    return min(memory.free_bytes, limit) + cached > 2 * need_bytes + 64 * MIB


# --- random state ----------------------------------------------------------------------------------------


def _random_state(
    generators: Sequence[torch.Generator],
) -> list[tuple[Callable[[Any], Any], Any]]:
    """Return, for each source of random numbers, what restores it and its state."""
    states: list[tuple[Callable[[Any], Any], Any]] = [
        (torch.set_rng_state, torch.get_rng_state()),
        (random.setstate, random.getstate()),
    ]
    if "numpy" in sys.modules:
        numpy = sys.modules["numpy"]
        states.append((numpy.random.set_state, numpy.random.get_state()))
    if torch.cuda.is_initialized():
        states += [(g.set_state, g.get_state()) for g in torch.cuda.default_generators]
    states += [(generator.set_state, generator.get_state()) for generator in generators]
    return states


def _restore_random(states: list[tuple[Callable[[Any], Any], Any]]) -> None:
    for restore, state in states:
        restore(state)


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
