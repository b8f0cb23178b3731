"""Recurrent networks: cuDNN's kernels, and the fused kernels of single cells."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from torchfast._estimate.cuda_behaviour.layouts import copy_bytes
from torchfast._estimate.cuda_behaviour.recurrent_workspaces import (
    GRU,
    LSTM,
    RELU,
    TANH,
    Network,
    algorithm,
    reserve_bytes,
    workspace_bytes,
)
from torchfast._estimate.paper import META
from torchfast._estimate.recorder import Recorder

aten = torch.ops.aten


def _over_batches(mode: int) -> Callable[..., Any]:
    """Return `lstm.input` and its like: a dense batch of sequences."""

    def kernel(input: torch.Tensor, hx: Any, params: Sequence[torch.Tensor], *rest: Any) -> Any:  # noqa: A002 - aten's own name
        has_biases, num_layers, dropout, train, bidirectional, batch_first = rest
        states = hx if mode == LSTM else (hx, None)
        outputs = _cudnn(
            input, states, params, mode, num_layers, dropout, train, bidirectional, batch_first, ()
        )
        del has_biases
        return outputs[:3] if mode == LSTM else outputs[:2]

    return kernel


def _over_packed(mode: int) -> Callable[..., Any]:
    """Return `lstm.data` and its like: a packed batch of sequences."""

    def kernel(
        data: torch.Tensor, batch_sizes: torch.Tensor, hx: Any, params: Sequence[torch.Tensor], *rest: Any
    ) -> Any:
        has_biases, num_layers, dropout, train, bidirectional = rest
        states = hx if mode == LSTM else (hx, None)
        sizes = batch_sizes.tolist()
        outputs = _cudnn(data, states, params, mode, num_layers, dropout, train, bidirectional, False, sizes)
        del has_biases
        return outputs[:3] if mode == LSTM else outputs[:2]

    return kernel


KERNELS: dict[str, Callable[..., Any]] = {
    f"{name}.{overload}": make(mode)
    for name, mode in (("lstm", LSTM), ("gru", GRU), ("rnn_tanh", TANH), ("rnn_relu", RELU))
    for overload, make in (("input", _over_batches), ("data", _over_packed))
}


def _cudnn(  # noqa: PLR0913, PLR0917 - what the operator takes
    input: torch.Tensor,  # noqa: A002 - aten's own name
    states: Any,
    params: Sequence[torch.Tensor],
    mode: int,
    num_layers: int,
    dropout: float,
    train: bool,  # noqa: FBT001 - as above
    bidirectional: bool,  # noqa: FBT001 - as above
    batch_first: bool,  # noqa: FBT001 - as above
    batch_sizes: Sequence[int],
) -> Any:
    hx, cx = states
    hidden = hx.shape[2] if cx is None else cx.shape[2]
    projection = hx.shape[2] if hx.shape[2] != hidden else 0
    n_weights = len(params) // (num_layers * (2 if bidirectional else 1))
    state = None
    if dropout and train:
        state = aten._cudnn_init_dropout_state(dropout, train, 0, dtype=torch.uint8, device=META)
    return aten._cudnn_rnn(
        input,
        params,
        n_weights,
        None,
        hx,
        cx,
        mode,
        hidden,
        projection,
        num_layers,
        batch_first,
        dropout,
        train,
        bidirectional,
        batch_sizes,
        state,
    )


def dropout_state(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the random state of dropout between layers: 24 bytes a resident thread, made once and kept."""
    del func, args, kwargs
    if ("cuDNN dropout", "") not in recorder.kept:
        gpu = recorder.gpu
        size_bytes = 24 * gpu.n_multiprocessors * gpu.max_threads_per_multiprocessor
        recorder.kept["cuDNN dropout", ""] = recorder.allocate(size_bytes, "workspace")
    with recorder.unrecorded(8):
        return recorder.new((1,), torch.int64)


def forward(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run the forward pass: output and states, the workspace, and the reserve while the workspace is held."""
    del func, kwargs
    tensor, _, _, _, hx, cx, _, _, _, _, batch_first, _, train, bidirectional, batch_sizes, _ = args
    shape = (*tensor.shape[:-1], hx.shape[2] * (2 if bidirectional else 1))
    network = _network(args)
    workspace = workspace_bytes(network, algorithm(network, recorder.gpu, is_forward=True))
    first = batch_first and not batch_sizes
    with recorder.scratch(*_copy_of(tensor, batch_first=first)):
        output = _sequence(recorder, shape, tensor.dtype, batch_first=first)
        hy = recorder.new(hx.shape, tensor.dtype)
        cy = recorder.new((0,) if cx is None else cx.shape, tensor.dtype)
        flat = recorder.new((0 if _is_flat(tensor.dtype) else _n_weights(network),), tensor.dtype)
        with recorder.scratch(workspace):
            reserve = recorder.new((reserve_bytes(network) if train else 0,), torch.uint8)
    return output, hy, cy, reserve, flat


def backward(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run the backward pass: first of data and states, then of the weights, into one flat tensor."""
    del func, kwargs
    tensor, params, n_each, _, hx, cx, output, *given = args[:10]
    batch_first, batch_sizes, wanted = args[14], args[18], args[-1]
    network = _network((tensor, params, None, None, hx, cx, *args[10:14], batch_first, *args[15:19], None))
    workspace = workspace_bytes(network, algorithm(network, recorder.gpu, is_forward=False))
    first = batch_first and not batch_sizes
    copy = _copy_of(tensor, batch_first=first)
    of_output = () if given[0] is None else _copy_of(given[0], batch_first=first)
    # Gradients that are absent are zeros, which last as long as the call.
    absent = [like for like, gradient in zip((output, hx, cx), given, strict=True) if gradient is None]
    with recorder.scratch(*(like.numel() * like.dtype.itemsize for like in absent if like is not None)):
        with recorder.scratch(*copy, *of_output):
            dx = _sequence(recorder, tuple(tensor.shape), tensor.dtype, batch_first=first)
            dhx = recorder.new(hx.shape, hx.dtype)
            dcx = None if cx is None else recorder.new(cx.shape, cx.dtype)
            with recorder.scratch(workspace):
                pass
        if not wanted[3]:
            return dx, dhx, dcx, []
        with recorder.scratch(*copy):
            flat = recorder.new((_n_weights(network),), tensor.dtype)
            with recorder.scratch(workspace):
                pass
        return dx, dhx, dcx, _pieces(recorder, flat, params, has_biases=n_each > 3)


def _pieces(
    recorder: Recorder, flat: torch.Tensor, params: Sequence[torch.Tensor], *, has_biases: bool
) -> list[torch.Tensor]:
    """Return the weights' gradients: views of the flat tensor, or copies of it where it has more biases."""
    if not has_biases:
        return [recorder.new(weight.shape, weight.dtype) for weight in params]
    pieces, offset = [], 0
    for weight in params:
        pieces.append(
            recorder.run(aten.as_strided.default, (flat, weight.shape, weight.stride(), offset), {})
        )
        offset += weight.numel()
    return pieces


def _network(args: tuple[Any, ...]) -> Network:
    """Describe the network that `_cudnn_rnn` was called with."""
    tensor, _, _, _, hx, _, mode, hidden, projection, layers, batch_first, dropout, train = args[:13]
    batch_sizes = args[14]
    steps, batch = tensor.shape[:2] if tensor.dim() == 3 else (tensor.shape[0], 1)
    if batch_sizes:
        steps, batch = len(batch_sizes), batch_sizes[0]
    elif batch_first:
        steps, batch = batch, steps
    return Network(
        mode=mode,
        dtype=tensor.dtype,
        batch=max(batch, 1),
        steps=max(steps, 1),
        n_in=tensor.shape[-1],
        hidden=hidden,
        projection=projection,
        layers=layers,
        directions=hx.shape[0] // layers,
        n_rows=tensor.numel() // max(tensor.shape[-1], 1),
        has_dropout=train and dropout > 0,
        is_packed=bool(batch_sizes),
    )


def _copy_of(tensor: torch.Tensor, *, batch_first: bool) -> tuple[int, ...]:
    """Return the size of the copy that lies time first, or nothing where the tensor does."""
    return copy_bytes(tensor.transpose(0, 1) if batch_first else tensor)


def _n_weights(network: Network) -> int:
    """Return the elements of the one block that cuDNN wants weights in."""
    return network.n_matrix_elements + network.n_biases


def _is_flat(dtype: torch.dtype) -> bool:
    """Whether `flatten_parameters` has laid the weights out for cuDNN; it passes bfloat16 by."""
    return dtype != torch.bfloat16


def _sequence(
    recorder: Recorder, shape: tuple[int, ...], dtype: torch.dtype, *, batch_first: bool
) -> torch.Tensor:
    """Return a new tensor that lies time first, whatever its first dimension is called."""
    if not batch_first:
        return recorder.new(shape, dtype)
    n, _, width = shape
    return recorder.new(shape, dtype, (width, n * width, 1))


def lstm_cell(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a fused LSTM cell: output, state, and the gates for the backward pass (RNN.cu, torch 2.11)."""
    del func, kwargs
    gates, state = args[0], args[2]
    return tuple(recorder.new(t.shape, t.dtype) for t in (state, state, gates))


def lstm_cell_backward(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run its backward pass: gradients of gates, state and, where there is one, of the bias."""
    del func, kwargs
    state, workspace, has_bias = args[2], args[4], args[5]
    gates, before = recorder.new(workspace.shape, workspace.dtype), recorder.new(state.shape, state.dtype)
    return gates, before, recorder.new(workspace.shape[1:], workspace.dtype) if has_bias else None


def gru_cell(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a fused GRU cell: output, and five numbers a unit for the backward pass."""
    del func, kwargs
    state = args[2]
    workspace = (*state.shape[:-1], 5 * state.shape[-1])
    return recorder.new(state.shape, state.dtype), recorder.new(workspace, state.dtype)


def gru_cell_backward(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run its backward pass: gradients of both products, of the state and of both biases."""
    del func, kwargs
    gradient, has_bias = args[0], args[2]
    *rows, width = gradient.shape
    shapes: list[tuple[int, ...]] = [(*rows, 3 * width), (*rows, 3 * width), (*rows, width)]
    biases: list[tuple[int, ...]] = [(3 * width,)] * 2 if has_bias else []
    found = [recorder.new(shape, gradient.dtype) for shape in shapes + biases]
    return (*found, *(None,) * (5 - len(found)))
