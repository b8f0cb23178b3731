"""Batches of workers, sent to this process with all their small tensors in one piece.

PyTorch moves each tensor of a batch into a shared memory file of its own, and the process that loads asks for
the handle of each through a connection of its own: 0.25 to 0.7 ms a tensor, one after the other. So a worker
gathers the small ones first. What arrives is the batch, for whoever asks: it is rebuilt as it is unpickled.
"""

import io
import pickle
from collections.abc import Callable, Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch

from torchfast._bytes import MIB
from torchfast._loader.plan import Group, Run, arrival, is_plain, tensors_on

BUNDLE_BELOW_BYTES = 2 * MIB
"""Tensors smaller than that are small: a worker copies one in less time than asking for its handle takes."""

INLINE_BYTES = 8 * 2**10
"""No more than that goes through the workers' pipe, which holds 64 KiB, and needs no shared memory at all."""


class Bundling:
    """A collate function in a worker, whose batches then travel as bundles."""

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self._collate = collate

    def __call__(self, samples: Any) -> "Bundle":
        """Collate, and bundle."""
        return Bundle(self._collate(samples))


class Bundle:
    """A batch on its way: unpickled, it is the batch.

    Small tensors are copied at once, so the dataset may write over those that it handed out. Large ones go as
    PyTorch sends them, which moves them into shared memory in a thread of its own, beside the next batch.
    """

    def __init__(self, batch: Any) -> None:
        skeleton = io.BytesIO()
        pickler = _Pickler(skeleton)
        pickler.dump(batch)
        self._parts = (skeleton.getvalue(), *_gathered(pickler.small), pickler.large)

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave it to `_unbundled` to make the batch of its parts."""
        return _unbundled, self._parts


class _Pickler(ForkingPickler):
    """Pickles a batch as PyTorch does, but for its plain tensors, which it puts aside."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.small: list[torch.Tensor] = []
        self.large: list[torch.Tensor] = []

    def reducer_override(self, part: Any) -> Any:
        """Put aside a tensor. Numbers and strings, of which there may be many, do not come here."""
        if not is_plain(part):
            return NotImplemented
        is_small = part.numel() * part.element_size() < BUNDLE_BELOW_BYTES and _stays(part.untyped_storage())
        aside, stand_in = (self.small, _small) if is_small else (self.large, _large)
        aside.append(part)
        return stand_in, (len(aside) - 1,)


def _stays(storage: torch.UntypedStorage) -> bool:
    """Say whether memory may be read now: the queue's thread may just be moving what is large."""
    return storage.nbytes() < BUNDLE_BELOW_BYTES or storage.is_shared()


class _Unpickler(pickle.Unpickler):
    """Unpickles a batch around its plain tensors."""

    def __init__(
        self, file: io.BytesIO, *, small: Sequence[torch.Tensor], large: Sequence[torch.Tensor]
    ) -> None:
        super().__init__(file)
        self._tensors = {_small.__name__: small, _large.__name__: large}

    def find_class(self, module: str, name: str) -> Any:
        """Find what is called to rebuild the batch."""
        if module == __name__ and name in self._tensors:
            return self._tensors[name].__getitem__
        return super().find_class(module, name)


def _unbundled(
    skeleton: bytes, memory: bytearray | torch.Tensor, runs: list[Run], large: list[torch.Tensor]
) -> Any:
    small = tensors_on(runs, _on(memory), 0)
    return _Unpickler(io.BytesIO(skeleton), small=small, large=large).load()


def _small(index: int) -> torch.Tensor:
    """Stand for a small tensor in a pickle that only `_Unpickler` can read."""
    raise pickle.UnpicklingError(f"tensor {index} of a batch lies beside its pickle")


def _large(index: int) -> torch.Tensor:
    """Stand for a large one."""
    return _small(index)


def _gathered(tensors: list[torch.Tensor]) -> tuple[bytearray | torch.Tensor, list[Run]]:
    """Return the memory in which copies of the tensors lie side by side, and how they lie."""
    if not tensors:
        return bytearray(), []
    layouts = dict(enumerate(map(arrival, tensors)))
    group = Group([*layouts], layouts, 0, may_go_straight=False)
    memory = bytearray(group.n_bytes) if group.n_bytes <= INLINE_BYTES else _shared(group.n_bytes)
    torch._foreach_copy_(group.tensors_on(_on(memory), 0), tensors)
    return memory, group.runs


def _shared(n_bytes: int) -> torch.Tensor:
    """Return shared memory. Without the private call what is sent is copied into such, once more."""
    make = getattr(torch.UntypedStorage, "_new_shared", None)
    storage = torch.UntypedStorage(n_bytes, device="cpu") if make is None else make(n_bytes)
    return torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage)


def _on(memory: bytearray | torch.Tensor) -> torch.Tensor:
    """Return the memory as a tensor of bytes."""
    if isinstance(memory, torch.Tensor):
        return memory
    if not memory:
        return torch.empty(0, dtype=torch.uint8, device="cpu")
    return torch.frombuffer(memory, dtype=torch.uint8)
