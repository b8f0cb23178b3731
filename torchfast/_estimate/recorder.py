"""Records what every operator on paper tensors takes from the allocator and gives back."""

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from torchfast._estimate.events import Event, Note
from torchfast._estimate.gpus import GPU
from torchfast._estimate.known import follow, off_host, on_zeros
from torchfast._estimate.paper import META, PaperTensor, meta_kernels, wrap, wrap_outputs
from torchfast._estimate.shapes import ShapeCache
from torchfast._estimate.untouched import RealTensors

Rule = Callable[["Recorder", Any, tuple[Any, ...], dict[str, Any]], Any]


class _Block(weakref.ref[Any]):
    """A storage that is alive, and the number of its block."""

    __slots__ = ("address", "number")
    address: int
    number: int


class Recorder(TorchDispatchMode):
    """While active, runs operators on paper tensors by their meta kernels and records each new storage.

    A storage is an allocation when it first comes out of an operator and a free when it dies, which PyTorch
    tells through a weak reference: autograd, Python and views keep it alive exactly as they do on a GPU.
    """

    def __init__(self, gpu: GPU, rule_for: Callable[[Any], Rule | None]) -> None:
        super().__init__()
        self.gpu = gpu
        self.kept: dict[
            tuple[str, str], int
        ] = {}  # blocks that libraries keep for good, by library and thread
        self.events: list[Event] = []
        self.notes: list[Note] = []
        self.categories: dict[int, str] = {}
        self.optional: set[int] = set()
        self.assumptions: dict[str, None] = {}  # an ordered set
        self.unmodelled: dict[str, None] = {}
        self.phase = ""
        self.category = "other"
        self.module: Callable[[], str] = str
        self._rule_for = rule_for
        self._rules: dict[Any, Rule | None] = {}
        self._operator: Any = None
        self._live: dict[int, _Block] = {}
        self._note_indices: dict[tuple[str, str, Any, str], int] = {}
        self._n_blocks = 0
        self._shapes = ShapeCache()
        self._host_bytes = 0
        self.asked: dict[Any, int] = {}  # how often each place in the user's code asked for a value
        self._thread = threading.get_ident()
        self.real = RealTensors()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator on paper, or for real where no paper tensor takes part."""
        kwargs = kwargs or {}
        if PaperTensor not in types and kwargs.get("device") != META:
            if kwargs.get("pin_memory"):  # memory of the host, which only a CUDA build can pin
                kwargs = {**kwargs, "pin_memory": False}
            self.real.remember(func._schema, args, kwargs)
            return func(*args, **kwargs)
        self._operator = func
        try:
            rule = self._rules[func]
        except KeyError:
            rule = self._rules[func] = self._rule_for(func)
        # Asking a tensor for its shape goes through function modes too, at 2 us each.
        with torch._C.DisableTorchFunction():
            try:
                outputs = self.run(func, args, kwargs) if rule is None else rule(self, func, args, kwargs)
            finally:
                self._operator = None
            follow(func, args, kwargs, outputs)
        return outputs

    def run_elsewhere(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """Run an operator that came past this mode: record those of other threads, not the rules' own."""
        if threading.get_ident() != self._thread:
            return self.__torch_dispatch__(func, types, args, kwargs)
        with meta_kernels():
            return wrap_outputs(func(*args, **kwargs))

    def run(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run the operator's meta kernel and record what it returns."""
        return self.adopt(self.run_unrecorded(func, args, kwargs))

    def run_unrecorded(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run the operator's meta kernel: meta tensors come out."""
        key = self._shapes.key(func, args, kwargs)
        known = None if key is None else self._shapes.recall(key, args)
        if known is not None:
            return known
        try:
            with meta_kernels():
                outputs = func(*args, **kwargs)
        except NotImplementedError as error:  # PyTorch's own word for an operator without a meta kernel
            return self._shapes_on_host(func, args, kwargs, error)
        except RuntimeError as error:
            if func.namespace not in _PYTORCHS_OWN:  # a custom operator that registered no shapes
                return self._shapes_on_host(func, args, kwargs, error)
            if _ELSEWHERE not in str(error):
                raise
            # A tensor of the host: PyTorch's path for tensor subclasses leaves some there that CUDA's moves.
            with meta_kernels():
                return func(*(off_host(a) for a in args), **kwargs)
        if key is not None:
            self._shapes.remember(key, args, outputs)
        return outputs

    def _shapes_on_host(
        self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], error: RuntimeError
    ) -> Any:
        """Run an operator without a meta kernel on zeros on the CPU, for the shapes that come out."""
        outputs = on_zeros(func, args, kwargs)
        if outputs is None:
            raise error
        self.unmodelled[f"{_name(func)} tells no shapes: run on zeros on the CPU, scratch not known"] = None
        return outputs

    def adopt(self, outputs: Any) -> Any:
        """Make paper tensors of meta tensors, recording storages that are new."""
        if isinstance(outputs, torch.Tensor):
            return self._adopt_tensor(outputs)
        if isinstance(outputs, (tuple, list)):
            return type(outputs)(self.adopt(output) for output in outputs)
        return outputs

    def _adopt_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        if type(tensor) is not torch.Tensor or not tensor.is_meta:
            return tensor  # an argument given back, or a tensor of the host
        self._record(tensor.untyped_storage())
        return wrap(tensor)

    def new(self, size: Any, dtype: torch.dtype, stride: Any = None) -> torch.Tensor:
        """Return a new paper tensor, recorded."""
        with meta_kernels():
            shape = (
                torch.empty(size, dtype=dtype, device=META)
                if stride is None
                else torch.empty_strided(size, stride, dtype=dtype, device=META)
            )
        return self._adopt_tensor(shape)

    @contextmanager
    def scratch(self, *sizes_bytes: int, optional: bool = False) -> Iterator[None]:
        """Hold memory that an operator takes and gives back within one call; `optional`: if it can get it."""
        blocks = [self.allocate(size, "workspace") for size in sizes_bytes if size > 0]
        if optional:
            self.optional.update(blocks)
        yield
        for block in reversed(blocks):
            self.free(block)

    @contextmanager
    def unrecorded(self, size_bytes: int) -> Iterator[None]:
        """Leave out new storages of this size: tensors that really lie on the host."""
        self._host_bytes = size_bytes
        try:
            yield
        finally:
            self._host_bytes = 0

    def allocate(self, size_bytes: int, category: str = "") -> int:
        """Record an allocation that no tensor stands for; returns the number of its block."""
        block = self._n_blocks
        self._n_blocks += 1
        self.events.append(Event(block, size_bytes, self._note(category or self.category)))
        return block

    def free(self, block: int) -> None:
        """Record that a block was given back."""
        self.events.append(Event(block, 0, self._note(self.category)))

    def merge(self, tensors: list[torch.Tensor]) -> None:
        """Record that tensors were copied into one block and given back one by one."""
        blocks = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
        self.allocate(sum(blocks.values()))
        for address in blocks:
            self.free(self._live.pop(address).number)

    def stop(self) -> None:
        """Record nothing more: what is freed from now on is freed by taking things back."""
        self.events = list(self.events)
        self._live.clear()

    def block_of(self, tensor: torch.Tensor) -> int | None:
        """Return the number of the block that a paper tensor lies in."""
        block = self._live.get(tensor.untyped_storage()._cdata)
        return None if block is None else block.number

    def label(self, tensor: torch.Tensor, category: str) -> None:
        """Say what a tensor turned out to be."""
        block = self.block_of(tensor)
        if block is not None:
            self.categories[block] = category

    def _record(self, storage: torch.UntypedStorage) -> None:
        address = storage._cdata
        size_bytes = storage.nbytes()
        if address in self._live or size_bytes in (0, self._host_bytes):
            return
        block = _Block(storage, self._storage_died)
        block.address = address
        block.number = self.allocate(size_bytes)
        self._live[address] = block

    def _storage_died(self, block: _Block) -> None:
        if self._live.get(block.address) is block:
            del self._live[block.address]
            self.free(block.number)

    def _note(self, category: str) -> int:
        module = self.module()
        key = (self.phase, module, self._operator, category)
        index = self._note_indices.get(key)
        if index is None:
            index = self._note_indices[key] = len(self.notes)
            operator = "" if self._operator is None else _name(self._operator)
            self.notes.append(Note(self.phase, module, operator, category))
        return index


_PYTORCHS_OWN = ("aten", "prim", "prims")
_ELSEWHERE = "is not on the expected device"


def _name(func: Any) -> str:
    """Return "aten.add" for the overload `aten::add.Tensor`."""
    return str(func).rsplit(".", 1)[0]
