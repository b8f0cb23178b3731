"""Runs a training step without memory and without a GPU, and yields its stream of allocations and frees."""

import copy
import importlib
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from torchfast import _tree
from torchfast._estimate import cuda_behaviour
from torchfast._estimate.assumed import lbfgs_history
from torchfast._estimate.containers import containers_within, refill
from torchfast._estimate.events import Trace
from torchfast._estimate.gpus import GPU
from torchfast._estimate.known import keep
from torchfast._estimate.machine import OnPaper, imagined_gpu, watched_backward
from torchfast._estimate.paper import CUDA, PaperTensor, recorded_elsewhere
from torchfast._estimate.paper_optimizers import OBJECTS_DEEP, PaperOptimizers
from torchfast._estimate.reach import Reached, kept, reached_by
from torchfast._estimate.recorder import Recorder
from torchfast._estimate.step import Objects, Plan, run_step, teacher_module
from torchfast._estimate.untouched import collector_kept_quiet, flags_kept, random_state_kept
from torchfast._estimate.where import Whereabouts
from torchfast._keeper import Keeper
from torchfast._modules import unwrapped


def trace(plan: Plan, gpu: GPU) -> Trace:
    """Run the plan's steps on paper. Everything the plan holds comes out as it went in."""
    # PyTorch imports its compiler when an operator is first decomposed. Imported within a step, it leaves a
    # traceback behind, which holds what the step's functions held: the model's output, to the end.
    importlib.import_module("torch._dynamo")
    default = torch.get_default_device().type
    recorder = Recorder(gpu, cuda_behaviour.rule_for)
    with ExitStack() as scope:
        scope.enter_context(_running())
        if default != "cpu":
            scope.enter_context(torch.device("cpu"))
        scope.enter_context(collector_kept_quiet())
        scope.enter_context(random_state_kept())
        scope.enter_context(flags_kept())
        scope.enter_context(imagined_gpu(gpu))
        tracer = _Tracer(plan, recorder, default)
        tracer.run()
    return Trace(
        recorder.events,
        recorder.notes,
        recorder.categories,
        tuple(recorder.unmodelled),
        tuple(recorder.assumptions),
        frozenset(recorder.optional),
    )


class _Tracer:
    """One run: the swapping of objects for paper ones, and the phases."""

    is_running = False

    def __init__(self, plan: Plan, recorder: Recorder, default_device: str) -> None:
        self.plan = plan
        self._default_device = default_device
        self.recorder = recorder
        self._papers: dict[int, torch.Tensor] = {}
        self._parameters: list[torch.Tensor] = []
        self._originals: list[Any] = []  # keeps the ids above from being used again
        self._n = 0
        self._n_backward = 0
        self._grads: list[tuple[torch.Tensor, torch.Tensor | None]] = []

    def run(self) -> None:
        """Put everything on paper, run the steps, and take everything back."""
        plan, recorder = self.plan, self.recorder
        teacher = teacher_module(plan.teacher)
        taught_by = {} if teacher is None else {"teacher": teacher}
        reached = reached_by(plan.step, plan.loss)
        others = _beside([plan.model, *taught_by.values()], reached.modules)
        where = Whereabouts({"": unwrapped(plan.model)} | taught_by | others, self._root_runs)
        recorder.module = where.module
        with ExitStack() as scope:
            # A cycle through the recorder would keep the model until Python's collector comes by.
            scope.callback(setattr, recorder, "module", str)
            scope.callback(self._put_back)
            self._begin("weights", "weights")
            scope.enter_context(self._on_paper(plan.model, training=plan.training))
            for each in others.values():
                scope.enter_context(self._on_paper(each, training=None))
            self._begin("teacher", "teacher")
            for each in taught_by.values():
                scope.enter_context(self._on_paper(each, training=None))
            objects = self._objects(scope, reached)
            scope.enter_context(kept(reached, self._papers))
            self._say_what_was_found(others, reached.optimizers)
            scope.enter_context(where.watching())
            for self._n in range(1, plan.n_steps + 1):
                self._phase("forward")
                with _told(plan):
                    run_step(plan, _with_batch_of_its_own(objects))
            recorder.stop()

    def _put_back(self) -> None:
        """Undo what was done to real tensors, which a step may get at by ways that are not known."""
        self.recorder.real.put_back()
        for original, grad in self._grads:
            if original.grad is not grad:
                original.grad = grad

    def _objects(self, scope: ExitStack, reached: Reached) -> Objects:
        """Put the batch and the optimizers on paper, and have everything recorded from then on."""
        plan, recorder = self.plan, self.recorder
        self._begin("batch", "batch")
        inputs, target = (_tree.map_tensors(self._paper, part) for part in (plan.inputs, plan.target))
        mode = scope.enter_context(OnPaper())
        if self._default_device == "cuda":  # what the user makes without a device is on paper then
            scope.enter_context(torch.device("cuda"))
        scope.enter_context(watched_backward(mode, self._backward_begins, self._backward_ends))
        scope.enter_context(recorder)
        scope.enter_context(recorded_elsewhere(recorder.run_elsewhere))
        scope.enter_context(cuda_behaviour.cuda_kernels(recorder.gpu))
        inputs, target = _moved(inputs), _moved(target)
        self._begin("optimizer state", "optimizer")
        optimizers = PaperOptimizers(self._paper, self._papers)  # not kept, which would be a cycle
        optimizer = plan.optimizer
        if isinstance(optimizer, torch.optim.Optimizer):
            scope.enter_context(optimizers.filled(optimizer))
        elif optimizer is not None:
            optimizer = optimizer([p for p in plan.model.parameters() if p.requires_grad])
        for other in reached.optimizers.values():
            if other is not plan.optimizer:
                scope.enter_context(optimizers.filled(other))
        scaler = torch.amp.GradScaler("cuda") if plan.grad_scaler else None
        return Objects(inputs, target, optimizer, scaler, recorder.assumptions)

    def _say_what_was_found(
        self, modules: dict[str, nn.Module], optimizers: dict[str, torch.optim.Optimizer]
    ) -> None:
        if self.plan.step is None:  # a loss that has weights is known to be on the GPU
            optimizers = {}
        new = {name: o for name, o in optimizers.items() if o is not self.plan.optimizer}
        for each in (self.plan.optimizer, *new.values()):
            if isinstance(each, torch.optim.LBFGS):
                self.recorder.unmodelled[lbfgs_history(each)] = None
        names = [f"{name} ({type(each).__name__})" for name, each in (modules | new).items()]
        if names:
            self.recorder.assumptions[f"taken to be on the GPU as well: {', '.join(names)}"] = None

    def _root_runs(self) -> None:
        """Note that the model is called: another forward pass, where gradients are accumulated."""
        if self.recorder.phase.endswith("optimizer"):
            self._phase("forward")

    def _begin(self, phase: str, category: str) -> None:
        self.recorder.phase, self.recorder.category = phase, category

    def _phase(self, name: str) -> None:
        self._begin(f"step {self._n} {name}", "optimizer" if name == "optimizer" else "activations")

    def _backward_begins(self) -> None:
        self._n_backward += 1
        if self._n_backward == 1:
            self._phase("backward")

    def _backward_ends(self) -> None:
        self._n_backward -= 1
        if self._n_backward:
            return  # one backward pass within another: reentrant checkpointing
        for parameter in self._parameters:
            if parameter.grad is not None:
                self.recorder.label(parameter.grad, "gradients")
        if self.plan.optimizer is not None or self.plan.step is not None:
            self._phase("optimizer")

    def _paper(self, original: torch.Tensor) -> torch.Tensor:
        """Return the paper tensor that stands for a real one, making it where it is new."""
        known = self._papers.get(id(original))
        if known is not None:
            return known
        if isinstance(original, PaperTensor):
            return original  # of a module that model and teacher share
        paper = self.recorder.new(original.shape, original.dtype, _dense_strides(original))
        paper.requires_grad_(original.requires_grad)
        if isinstance(original, nn.Parameter):
            vars(paper).update(vars(original))  # moved to a GPU, a parameter keeps what it is tagged with
            paper._is_param = True  # what makes isinstance(_, Parameter) true
            self._parameters.append(paper)
        keep(paper, original)
        self._papers[id(original)] = paper
        self._originals.append(original)
        if original.requires_grad and original.is_leaf:
            self._grads.append((original, original.grad))
        return paper

    @contextmanager
    def _on_paper(self, model: nn.Module, *, training: bool | None) -> Iterator[None]:
        """Put paper tensors in the place of a module's, in the order in which `.to("cuda")` moves them."""
        taken = [
            (held, copy.copy(held))
            for module in model.modules()
            # The module's attributes last: what a step adds to or replaces in them is taken back too.
            for held in (*containers_within(vars(module), objects_deep=OBJECTS_DEEP), vars(module))
        ]
        try:
            if training is not None and model.training is not training:
                self._assume_mode(model, training=training)
            for module in _children_first(model):
                tables: list[dict[str, Any]] = [module._parameters, module._buffers]
                for held in tables:
                    for name, tensor in held.items():
                        if tensor is not None:
                            held[name] = self._paper(tensor)
                if isinstance(module, nn.RNNBase):
                    self._flatten(module)
            yield
        finally:
            for held, before in taken:
                refill(held, before)

    def _flatten(self, module: nn.RNNBase) -> None:
        """Do as `flatten_parameters` does once the module is on the GPU: weights move into one block."""
        weights = [w for w in module._flat_weights if isinstance(w, torch.Tensor)]
        papers = [self._papers[id(w)] for w in weights if id(w) in self._papers]
        if papers and papers[0].dtype != torch.bfloat16:
            self.recorder.merge(papers)
        module._flat_weights = [self._papers.get(id(w), w) for w in module._flat_weights]

    def _assume_mode(self, model: nn.Module, *, training: bool) -> None:
        model.train(training)
        was, now = ("eval", "train") if training else ("train", "eval")
        self.recorder.assumptions[f"the model was in {was} mode and is estimated in {now} mode"] = None


def _beside(given: list[nn.Module], reached: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Return the modules that a step reaches and that were not given, in whole or in parts."""
    known = {id(tensor) for module in given for tensor in (*module.parameters(), *module.buffers())}
    return {
        name: module
        for name, module in reached.items()
        if any(id(tensor) not in known for tensor in (*module.parameters(), *module.buffers()))
    }


def _moved(batch: Any) -> Any:
    """Return the batch with what moves itself, such as a PackedSequence, moved to paper."""
    leaves, structure = _tree.flatten(batch)
    return structure.rebuild(
        # Some move in place: a copy's parts are replaced, and the user's object keeps its own.
        [leaf if isinstance(leaf, torch.Tensor) else copy.copy(leaf).to(CUDA) for leaf in leaves]
    )


def _with_batch_of_its_own(objects: Objects) -> Objects:
    """Return the objects with the batch in new containers: a step may pop, or replace, what is in its own."""
    parts = []
    for part in (objects.inputs, objects.target):
        leaves, structure = _tree.flatten(part, keep=Keeper())
        parts.append(structure.rebuild(leaves))
    return replace(objects, inputs=parts[0], target=parts[1])


def _children_first(module: nn.Module) -> Iterator[nn.Module]:
    """Yield modules in the order in which `Module._apply` reaches their tensors."""
    for child in module.children():
        yield from _children_first(child)
    yield module


def _dense_strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """Return the strides that a copy of the tensor on a GPU would have."""
    return torch.empty_like(tensor, device="meta").stride()


@contextmanager
def _told(plan: Plan) -> Iterator[None]:
    """Say of an error of the model's own what it came from."""
    try:
        yield
    except Exception as error:
        given = ", ".join(
            f"{tuple(t.shape)} {t.dtype}".replace("torch.", "") for t in _tree.tensors(plan.inputs)
        )
        what = "the given step" if plan.step is not None else f"{type(plan.model).__name__} on this batch"
        first = (str(error).splitlines() or [""])[0]  # PyTorch adds its whole table of kernels to some
        raise ValueError(
            f"estimate_vram could not run {what}: {type(error).__name__}: {first}\n"
            f"The batch holds {given or 'no tensors'}. A tensor is passed as model(x), a mapping as "
            "model(**batch), a tuple as model(*batch); with loss= a pair is (inputs, target). If the same "
            "call works outside of estimate_vram, please report it."
        ) from error


_turn = threading.RLock()


@contextmanager
def turn() -> Iterator[None]:
    """Wait for the estimates of other threads: each puts stand-ins into PyTorch, and models on paper."""
    with _turn:
        if _Tracer.is_running:
            raise RuntimeError(
                "estimate_vram was called within a step that is being estimated, and PyTorch can only be put "
                "on paper once at a time. Call it outside of step=."
            )
        yield


@contextmanager
def _running() -> Iterator[None]:
    with turn():
        _Tracer.is_running = True
        try:
            yield
        finally:
            _Tracer.is_running = False
