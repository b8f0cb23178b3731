"""A forward pass as a CUDA graph that nobody else's graphs, streams or random numbers notice."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from torchfast._teacher.closeness import Forward
from torchfast._tree import flatten, map_tensors, tensors


def captured(run: Forward, inputs: Any, device: torch.device, /) -> Forward:
    """Return `run` as a CUDA graph with memory of its own, apart from every other graph's.

    Inputs are copied in and outputs out, so that nobody ever holds the graph's own memory. A call on another
    stream waits for the call before it.
    """
    leaves, structure = flatten(inputs)
    held = [leaf.clone() for leaf in leaves if isinstance(leaf, torch.Tensor)]
    held_inputs = structure.rebuild(held)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        run(held_inputs)  # libraries take their workspaces before the capture
        with _no_waiting():
            run(held_inputs)
    torch.cuda.current_stream(device).wait_stream(stream)
    graph, outputs = _capture(run, held_inputs, stream)
    done = torch.cuda.Event()

    def replay(new_inputs: Any) -> Any:
        torch.cuda.current_stream(device).wait_event(done)
        for mine, new in zip(held, tensors(new_inputs), strict=True):
            mine.copy_(new)
        graph.replay()
        found = map_tensors(torch.clone, outputs)
        done.record(torch.cuda.current_stream(device))
        return found

    return replay


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Make an operation that waits for the GPU an error: in a capture it would do lasting damage."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # setting the mode warns that it is a prototype
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)


def _capture(run: Forward, inputs: Any, stream: torch.cuda.Stream) -> tuple[torch.cuda.CUDAGraph, Any]:
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    callers = torch.cuda.current_stream(stream.device)
    try:
        # The outer one because a capture that fails to end leaves its stream the current one.
        with (
            torch.cuda.stream(callers),
            torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"),
        ):
            return graph, run(inputs)
    except Exception:
        _clean_up(stream, pool)
        raise


def _clean_up(stream: torch.cuda.Stream, pool: Any) -> None:
    """Undo what a failed capture leaves behind in PyTorch.

    The random generator still believes in a capture and refuses to draw ("Offset increment outside graph
    capture"), until one ends well: so an empty one is made. The allocator still sends memory to the pool, and
    meanwhile does not empty its cache when memory runs out; only private calls end that.
    """
    index = stream.device.index
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        with suppress(AttributeError, RuntimeError):
            getattr(torch._C, name)(index, pool)
    with torch.cuda.device(index), suppress(RuntimeError):
        nothing = torch.zeros(1, device=stream.device)
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=torch.cuda.Stream(index)):
            nothing.add_(1)
