"""Batches of workers, sent to this process with all their small tensors in one piece.

PyTorch moves each tensor of a batch into a shared memory file of its own, and the process that loads asks for
the handle of each through a connection of its own: 0.25 to 0.7 ms a tensor, one after the other. So a worker
gathers the small ones first. What arrives is the batch, for whoever asks: it is rebuilt as it is unpickled.
"""

import io
import itertools
import pickle
from collections.abc import Callable, Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch

from torchfast._bytes import MIB
from torchfast._loader.plan import Run, arrival, is_plain, runs_of, tensors_on

COPY_BELOW_BYTES = 2 * MIB
"""Smaller tensors are copied: PyTorch would copy each, too, and then send a handle of it."""

COPY_SHARED_BELOW_BYTES = MIB // 4
"""Of those that `default_collate` has put into shared memory already only a handle is left to spare: a worker
copies so much in that time."""

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
        copied = [*map(_is_copied, pickler.tensors)]
        memory, runs = _gathered([*itertools.compress(pickler.tensors, copied)])
        sent = [
            None if is_copied else _sendable(tensor)
            for tensor, is_copied in zip(pickler.tensors, copied, strict=True)
        ]
        self._parts = (skeleton.getvalue(), memory, runs, sent)

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave it to `_unbundled` to make the batch of its parts."""
        return _unbundled, self._parts


def _unbundled(
    skeleton: bytes, memory: bytearray | torch.Tensor, runs: list[Run], sent: list[torch.Tensor | None]
) -> Any:
    copies = iter(tensors_on(runs, _on(memory), 0))
    tensors = [next(copies) if tensor is None else tensor for tensor in sent]
    return _Unpickler(io.BytesIO(skeleton), tensors).load()


class _Pickler(ForkingPickler):
    """Pickles a batch as PyTorch does, but for its plain tensors, which it puts aside."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: list[torch.Tensor] = []

    def reducer_override(self, part: Any) -> Any:
        """Put aside a tensor. Numbers and strings, of which there may be many, do not come here."""
        if not is_plain(part):
            return NotImplemented
        self.tensors.append(part)
        return _stand_in, (len(self.tensors) - 1,)


class _Unpickler(pickle.Unpickler):
    """Unpickles a batch around its plain tensors."""

    def __init__(self, file: io.BytesIO, tensors: Sequence[torch.Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def find_class(self, module: str, name: str) -> Any:
        """Find what is called to rebuild the batch."""
        if (module, name) == (__name__, _stand_in.__name__):
            return self._tensors.__getitem__
        return super().find_class(module, name)


def _stand_in(index: int) -> torch.Tensor:
    """Stand for a tensor in a pickle that only `_Unpickler` can read."""
    raise pickle.UnpicklingError(f"tensor {index} of a batch lies beside its pickle")


def _is_copied(tensor: torch.Tensor) -> bool:
    """Say whether a tensor is copied into the bundle.

    None on large memory that is not shared yet: the queue's thread moves that, and may just be at it.
    """
    memory, n_bytes = tensor.untyped_storage(), tensor.numel() * tensor.element_size()
    if memory.is_shared():
        return n_bytes < COPY_SHARED_BELOW_BYTES
    return max(memory.nbytes(), n_bytes) < COPY_BELOW_BYTES


def _sendable(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor that the queue's thread may send, which then has no small memory to move.

    Where a large tensor shows such, it would be at that while the next batch is read from it.
    """
    memory = tensor.untyped_storage()
    if not memory.is_shared() and memory.nbytes() < COPY_BELOW_BYTES:
        memory.share_memory_()
    return tensor


def _gathered(tensors: list[torch.Tensor]) -> tuple[bytearray | torch.Tensor, list[Run]]:
    """Return the memory in which copies of the tensors lie side by side, and how they lie."""
    runs = runs_of(map(arrival, tensors))
    n_bytes = runs[-1].end_bytes if runs else 0
    memory = bytearray(n_bytes) if n_bytes <= INLINE_BYTES else _shared(n_bytes)
    if tensors:
        torch._foreach_copy_(tensors_on(runs, _on(memory), 0), tensors)
    return memory, runs


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
