"""`GPUTeacher`: a frozen distillation teacher, on the device, outside the student."""

import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from os import PathLike
from typing import Any, Self, TypeVar, cast

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from torchfast import _layout
from torchfast._teacher.chunks import forward_in_memory
from torchfast._teacher.features import Taps
from torchfast._teacher.loading import built_without_memory, loaded
from torchfast._teacher.placing import Placing, frozen_copy, main_dtype, tensors_of
from torchfast._teacher.plan import Planner, TeacherPlan
from torchfast._teacher.refusals import (
    bare,
    check_built,
    check_factory,
    check_has_values,
    checked_place,
    names_of,
    parts_of,
    paths_of,
)
from torchfast._tree import Leaf, flatten

T = TypeVar("T")


class GPUTeacher:
    """A frozen teacher, called like the module, whose outputs are targets for a student.

    It holds a copy of the module on the device, in eval mode and without gradients; the module given stays
    as it is and may be deleted. It is no `nn.Module`: as an attribute of the student it follows neither
    `.train()` nor `.to()`, and is in neither `parameters()`, `state_dict()`, optimizers, averaged copies nor
    DDP's buckets. `copy.deepcopy` of an owner shares it, and a pickle leaves its weights out.

    A call moves its inputs to the device, casts those that are floating point, and runs without autograd and
    without autocast. The outputs are the caller's own, in the teacher's type. Where a batch does not fit, it
    runs in parts, with a warning and from then on: the same outputs up to rounding. Call the teacher before
    the student: then its scratch memory is free again when the student's activations need it.

    Example:
        >>> import torch
        >>> from torchfast import GPUTeacher
        >>> module = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Dropout())
        >>> teacher = GPUTeacher(module, device="cpu", dtype=torch.bfloat16)
        >>> targets = teacher(torch.randn(4, 3, 8, 8))
        >>> targets.shape, targets.dtype, targets.requires_grad
        (torch.Size([4, 288]), torch.bfloat16, False)

    Args:
        teacher: the module. A DDP, DataParallel or compiled wrapper is taken off.
        device: where it runs; None is the current accelerator, else the CPU.
        dtype: the type of its floating-point weights and inputs; None keeps the module's. In float16 and
            bfloat16, batch norms keep their own.
        channels_last: lay convolution weights and the images among the inputs out channels last, as
            `to_channels_last` does.
        chunk_size: run at most this many samples at a time; None is no limit. Samples lie along dimension 0.
        features: names of modules inside the teacher, as in `named_modules()`. A call then returns a
            `TeacherOutputs` of the outputs and a dict of what these modules return, in their first call.
        outputs: False gives the features alone; the forward stops after the last one.
        plan: "eager" runs the module as it is. "auto" looks for something faster in the first call: the plain
            layout instead of channels_last ("plain"), batch norms folded into convolutions ("fold"),
            `torch.compile` ("compile") and a CUDA graph ("graph"), or those of them that are named, as in
            plan=("fold", "graph"). Each is timed, compared with the module's own outputs, and kept only if
            they stay the same up to rounding. Compiling may take a minute. Batches of other shapes run
            without "compile" and "graph".

    Attributes:
        device: the device, with its index.
        dtype: the floating-point type of the inputs.
        chunk_size: as given, or what is left of it since memory ran out.
        module: the frozen module, to look at.

    Raises:
        TypeError: not a module, or an option of the wrong kind.
        ValueError: no such device, type or feature, no parameters, or parameters without values.
        torch.OutOfMemoryError: the weights, or a single sample, do not fit; a note says what would.
    """

    def __init__(  # noqa: PLR0913 -- keyword options
        self,
        teacher: nn.Module,
        /,
        device: torch.device | str | int | None = None,
        *,
        dtype: torch.dtype | None = None,
        channels_last: bool = True,
        chunk_size: int | None = None,
        features: Sequence[str] = (),
        outputs: bool = True,
        plan: str | Collection[str] = "eager",
    ) -> None:
        module = bare(teacher)
        place = checked_place(dtype, chunk_size, device)
        parts = parts_of(plan)
        names = names_of(features, outputs=outputs)
        check_has_values(module)
        placing = Placing(module, place, dtype, channels_last=channels_last)
        self._set_up(frozen_copy(module, placing), placing, chunk_size)
        self._choose(names, parts, outputs=outputs)

    @classmethod
    def from_checkpoint(  # noqa: PLR0913 -- the options of GPUTeacher, and a file
        cls,
        factory: Callable[[], nn.Module],
        path: str | PathLike[str] | Iterable[str | PathLike[str]],
        /,
        device: torch.device | str | int | None = None,
        *,
        dtype: torch.dtype | None = None,
        channels_last: bool = True,
        chunk_size: int | None = None,
        features: Sequence[str] = (),
        outputs: bool = True,
        plan: str | Collection[str] = "eager",
    ) -> Self:
        """Build a teacher straight from a file, without ever holding its weights twice.

        Peaks at the teacher plus one tensor on the device, and at one tensor plus the module's buffers on the
        host. Tied weights stay tied, buffers that the file does not hold are computed by the factory, and the
        run's random numbers do not change. A file that does not fit is refused before anything is read.

        Example:
            >>> import os, tempfile, torch
            >>> from torchfast import GPUTeacher
            >>> def build():
            ...     return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     path = os.path.join(folder, "teacher.pt")
            ...     torch.save(build().state_dict(), path)
            ...     teacher = GPUTeacher.from_checkpoint(build, path, device="cpu")
            >>> teacher(torch.zeros(3, 4)).shape
            torch.Size([3, 2])

        Args:
            factory: builds the module, as a function without arguments.
            path: a `.safetensors` file or a state dict written by `torch.save`, or several that together hold
                the weights. What `torch.save` wrote is read with `weights_only=True`.
            device: as for `GPUTeacher`.
            dtype: as for `GPUTeacher`; None is the type that the factory gives.
            channels_last: as for `GPUTeacher`.
            chunk_size: as for `GPUTeacher`.
            features: as for `GPUTeacher`.
            outputs: as for `GPUTeacher`.
            plan: as for `GPUTeacher`.

        Raises:
            TypeError: the factory builds no module, or the file holds other things than tensors by name.
            ValueError: a file is broken, or its names or shapes differ from those of the module.
            ImportError: a `.safetensors` file, and the package safetensors is not installed.
            FileNotFoundError: there is no such file.
        """
        check_factory(factory)
        place = checked_place(dtype, chunk_size, device)
        parts = parts_of(plan)
        names = names_of(features, outputs=outputs)
        paths = paths_of(path)
        module = built_without_memory(factory)
        check_built(module)
        placing = Placing(module, place, dtype, channels_last=channels_last)
        teacher = cls.__new__(cls)
        teacher._set_up(loaded(module, paths, placing), placing, chunk_size)
        teacher._choose(names, parts, outputs=outputs)
        return teacher

    def _set_up(self, module: nn.Module, placing: Placing, chunk_size: int | None) -> None:
        self.module = module
        self.device = placing.device
        self._placing = placing
        self.dtype = placing.dtype or main_dtype(module)
        self.chunk_size = chunk_size
        self._own: tuple[tuple[TeacherPlan | None, int | None], frozenset[int]] | None = None
        """Where its own tensors lie, for a plan and a place of its weights."""
        self._eager = partial(_run, module, None)
        self._planner: Planner | None = None

    def _choose(self, names: Sequence[str], parts: set[str], *, outputs: bool) -> None:
        taps = Taps(self.module, names, outputs=outputs) if names else None
        self._eager = partial(_run, self.module, taps)
        parts = parts - ({"compile"} if names else set())  # taps would cut a compiled graph in pieces
        if parts:
            self._planner = Planner(self.module, self._eager, self._placing, parts, names)

    @property
    def plan(self) -> TeacherPlan | None:
        """How the teacher runs, and what was tried; None before the first call and with plan="eager"."""
        return None if self._planner is None else self._planner.plan

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """Return the module's outputs for these inputs: detached, the caller's own, in the teacher's type."""
        if torch.compiler.is_dynamo_compiling():  # around the student
            # Traced, it would neither catch an out-of-memory error nor know one memory from another. As a
            # decorator, that import would cost each program a second.
            return torch.compiler.disable(self._taught)(args, kwargs)
        return self._taught(args, kwargs)

    def _taught(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # Never in inference mode: what is made there has no version counter, by which changes in place are
        # found out, and would stay an inference tensor for whoever keeps it.
        with (
            torch.inference_mode(mode=False),
            torch.no_grad(),
            torch.autocast(self.device.type, enabled=False),
        ):
            # Where its weights are: on `device`, or on paper while estimate_vram runs the step there.
            weight = next(self.module.parameters(), None)
            place = self.device if weight is None else weight.device
            leaves, structure = flatten((args, kwargs))
            ready = [self._ready(leaf, place) for leaf in leaves]
            held = [leaf for leaf in ready if isinstance(leaf, torch.Tensor)]
            forward = self._planner if self._planner is not None and place == self.device else self._eager
            inputs = structure.rebuild(ready)
            outputs, chunk_size = forward_in_memory(forward, inputs, held, self.chunk_size)
            if chunk_size != self.chunk_size:
                self.chunk_size = chunk_size
                warnings.warn(
                    f"the teacher ran out of memory on this batch and runs {chunk_size} samples at a time "
                    "from now on: the same outputs up to rounding, more slowly. Give "
                    f"GPUTeacher(..., chunk_size={chunk_size}) to begin so, or use a smaller batch.",
                    stacklevel=3,
                )
            return self._released(outputs, ready)

    def _ready(self, leaf: Leaf, place: torch.device) -> Leaf:
        """Return an input in that place, in the teacher's type and layout."""
        if isinstance(leaf, PackedSequence) and leaf.data.is_floating_point():
            return cast(Leaf, leaf.to(place, self.dtype))  # type: ignore[arg-type]  # as Tensor.to
        if not isinstance(leaf, torch.Tensor):
            return cast(Leaf, leaf.to(place))
        dtype = self.dtype if leaf.is_floating_point() else None
        # The host would read what has not arrived yet.
        moved = leaf.to(device=place, dtype=dtype, non_blocking=place.type != "cpu")
        if moved.is_inference():
            moved = moved.clone()  # a plain tensor
        if moved.dim() in self._placing.image_ranks and _layout.is_image(moved, rank_5=True):
            return _layout.to_channels_last_tensor(moved)
        return moved

    def _released(self, outputs: T, given: Sequence[Leaf]) -> T:
        """Return the outputs detached; copied, where they are memory of the teacher or of the inputs."""
        inputs = [leaf.data if isinstance(leaf, PackedSequence) else leaf for leaf in given]
        taken = {_memory(leaf) for leaf in inputs if isinstance(leaf, torch.Tensor)} | self._own_memory()

        def release(output: torch.Tensor) -> torch.Tensor:
            return output.detach().clone() if _memory(output) in taken else output.detach()

        def release_leaf(leaf: Leaf) -> Leaf:
            if isinstance(leaf, PackedSequence):
                return cast(Leaf, leaf._replace(data=release(leaf.data)))
            return release(leaf) if isinstance(leaf, torch.Tensor) else leaf

        leaves, structure = flatten(outputs)
        return cast(T, structure.rebuild([release_leaf(leaf) for leaf in leaves]))

    def _own_memory(self) -> frozenset[int]:
        """Return where the teacher's own tensors lie: elsewhere once a plan is made, and on paper."""
        weight = next(self.module.parameters(), None)
        key = self.plan, weight if weight is None else _memory(weight)
        if self._own is None or self._own[0] != key:
            plain = (value for layer in self.module.modules() for value in vars(layer).values())
            own = (value for value in (*tensors_of(self.module), *plain) if isinstance(value, torch.Tensor))
            self._own = key, frozenset(map(_memory, own))
        return self._own[1]

    def __repr__(self) -> str:
        """Say what is taught by, where and in which type."""
        layout = ", channels_last" if self._placing.image_ranks else ""
        chunks = "" if self.chunk_size is None else f", {self.chunk_size} samples at a time"
        plan = "" if self.plan is None else f", {'+'.join(self.plan.parts) or 'eager'}"
        return f"GPUTeacher({type(self.module).__name__}, {self.device}, {self.dtype}{layout}{chunks}{plan})"

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _without_weights, (self.device, self.dtype)


def _run(module: nn.Module, taps: Taps | None, inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
    args, kwargs = inputs
    forward = partial(module, *args, **kwargs)
    return forward() if taps is None else taps.run(forward)


class _LeftOut(nn.Module):
    """What stands for the module in a teacher that came through a pickle."""

    def forward(self, *_args: object, **_kwargs: object) -> None:
        """Say why there is nothing to call."""
        raise RuntimeError(
            "this GPUTeacher came through a pickle (torch.save of a whole student, or a spawned process), "
            "which leaves a teacher's weights out. "
            "Build it again with GPUTeacher(...) or GPUTeacher.from_checkpoint(...)."
        )


def _without_weights(device: torch.device, dtype: torch.dtype) -> GPUTeacher:
    teacher = GPUTeacher.__new__(GPUTeacher)
    module = _LeftOut()
    teacher._set_up(module, Placing(module, device, dtype, channels_last=False), None)
    return teacher


def _memory(tensor: torch.Tensor) -> int:
    """Return what tensors have in common that are views of the same memory, detached ones too."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse tensors have no storage
        return id(tensor if tensor._base is None else tensor._base)
