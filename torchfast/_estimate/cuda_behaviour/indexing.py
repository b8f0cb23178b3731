"""Scatter by sorting: the backward passes of embeddings and of indexing, and index_put with accumulation."""

from typing import Any

import torch

from torchfast._estimate.cuda_behaviour.layouts import copy_bytes
from torchfast._estimate.known import values_of
from torchfast._estimate.recorder import Recorder

_INDEX_BYTES = 8
_SMALL_EMBEDDING = 3072  # up to so many indices one kernel does it without sorting
_ROWS_A_THREAD = 10


def embedding_backward(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run the backward pass of an embedding (Embedding.cu, EmbeddingBackwardKernel.cu, torch 2.11).

    Indices are sorted; each run of equal ones is a segment, summed in parts of ten rows in fp32. Memory is
    taken for as many segments as there can be.
    """
    gradient, indices, n_rows = args[0], args[1], args[2]
    n, width = indices.numel(), gradient.shape[-1]
    copies = *copy_bytes(indices), *copy_bytes(gradient)
    if n <= _SMALL_EMBEDDING:
        with recorder.scratch(*copies):
            return recorder.run(func, args, kwargs)
    column = n * _INDEX_BYTES
    with recorder.scratch(*copies, column, column):  # sorted indices, where they came from
        with recorder.scratch(column, 2 * column + _SORT_BYTES):
            pass
        outputs = recorder.run(func, args, kwargs)
        n_segments = min(n, n_rows)
        n_parts = n // _ROWS_A_THREAD + n_segments
        sums = n_parts * width * max(4, gradient.dtype.itemsize)
        offsets = n_segments * _INDEX_BYTES
        with recorder.scratch(column, offsets, offsets, n_parts * _INDEX_BYTES, sums):
            return outputs


_SORT_BYTES = 20_000


def index_put_bytes(args: tuple[Any, ...]) -> tuple[int, ...]:
    """Return what an accumulating index_put takes: sorted indices, and its values if not contiguous.

    Indexing.cu, torch 2.11; six columns of indices, four where they are few, as measured on an H200.
    """
    accumulate = len(args) > 3 and args[3]
    if not accumulate:
        return ()
    shapes = [_places(i) for i in args[1] if i is not None]
    n = torch.broadcast_shapes(*shapes).numel() if shapes else 0
    column = n * _INDEX_BYTES
    values = args[2].expand(torch.broadcast_shapes(args[2].shape, (1,)))
    return *copy_bytes(values), *((column,) * (4 if n <= _SMALL_EMBEDDING else 6))


def _places(index: torch.Tensor) -> tuple[int, ...]:
    """Return the shape of an index; a mask stands for the places that it chooses."""
    if index.dtype not in (torch.bool, torch.uint8):
        return tuple(index.shape)
    known = values_of(index)
    return (index.numel() if known is None else int(known.count_nonzero()),)
