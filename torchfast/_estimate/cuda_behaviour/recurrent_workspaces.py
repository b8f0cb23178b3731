"""What cuDNN's recurrent kernels take while they run, and what they leave for the backward pass.

No source tells the workspace, but formulas do, to the byte but for rounding up its parts. They were read off
6,127 runs on an H200 (torch 2.11, cuDNN 9.19): benchmarks/recurrent_sweep.py measures them,
tests/data/recurrent_sweep.csv has them all, and docs/decisions/0031-recurrent-workspaces.md says how far the
formulas go and what was not measured.
"""

from dataclasses import dataclass
from enum import Enum, auto

import torch

from torchfast._bytes import MIB
from torchfast._estimate.gpus import GPU

RELU, TANH, LSTM, GRU = range(4)


@dataclass(frozen=True, slots=True)
class Network:
    """What of a recurrent network and its batch decides its memory."""

    mode: int
    dtype: torch.dtype
    batch: int
    steps: int
    n_in: int
    hidden: int
    projection: int
    layers: int
    directions: int
    n_rows: int  # samples of all steps together: fewer than batch * steps where sequences are packed
    has_dropout: bool = False
    is_packed: bool = False

    @property
    def n_out(self) -> int:
        """The width of a state that is passed on."""
        return self.projection or self.hidden

    @property
    def n_gates(self) -> int:
        """How many products of a state's width make a step."""
        return {LSTM: 4, GRU: 3}.get(self.mode, 1)

    @property
    def n_biases(self) -> int:
        """The elements of all biases: cuDNN has room for two of them a gate, wanted or not."""
        return 2 * self.n_gates * self.hidden * self.layers * self.directions

    @property
    def n_matrix_elements(self) -> int:
        """The elements of all weights but the biases."""
        inputs = self.n_in + (self.layers - 1) * self.directions * self.n_out
        products = self.n_gates * self.hidden * (inputs + self.layers * self.n_out)
        return self.directions * (products + self.layers * self.projection * self.hidden)


class Algorithm(Enum):
    """The algorithms of cuDNN that PyTorch asks for."""

    STANDARD = auto()
    PERSIST_STATIC = auto()
    PERSIST_STATIC_SMALL_H = auto()


def algorithm(network: Network, gpu: GPU, *, is_forward: bool) -> Algorithm:
    """Return what `get_algo` asks for (aten/src/ATen/native/cudnn/RNN.cpp, torch 2.11)."""
    is_double = network.dtype == torch.float64
    if network.projection or network.is_packed or is_double:
        return Algorithm.STANDARD
    is_plain = network.mode in (RELU, TANH)
    widest = (384 if is_plain else 192) if is_forward else (256 if is_plain else 128)
    if gpu.capability[0] >= 6 and network.hidden <= widest:
        return Algorithm.PERSIST_STATIC_SMALL_H
    is_persistent = network.dtype == torch.float16 and _may_persist(network) and _can_persist(network, gpu)
    return Algorithm.PERSIST_STATIC if is_persistent else Algorithm.STANDARD


def _may_persist(network: Network) -> bool:
    """Answer for `use_persist_common_heuristics`."""
    is_single = network.layers == network.directions == 1
    return is_single and network.hidden <= 1024 and network.hidden % 128 == network.n_in % 128 == 0


def _can_persist(network: Network, gpu: GPU) -> bool:
    """Answer for `use_persist_device_heuristics`."""
    batch, steps, (major, minor) = network.batch, network.steps, gpu.capability
    if major == 7:
        is_suitable = batch == 8 or (batch % 16 == 0 and batch not in (80, 112))
        is_long = any(steps >= s and batch <= b for s, b in ((40, 128), (20, 96), (10, 32)))
        return minor != 5 and is_suitable and is_long
    if major < 8 or minor == 6 or gpu.n_multiprocessors < 98 or network.mode == GRU:
        return False
    is_wide = network.mode != LSTM and batch >= 96 and network.hidden >= 896
    return batch % 8 == 0 and batch <= 128 and not is_wide


def workspace_bytes(network: Network, chosen: Algorithm) -> int:
    """Return what the forward pass takes while it runs, or each half of the backward pass.

    That is 8 MiB for each layer and direction, the weights once without their biases, and the larger of two
    ways to lay out the sequences.
    """
    # Whatever is asked for, bfloat16 is measured to take what the standard algorithm does.
    is_standard = chosen is Algorithm.STANDARD or network.dtype == torch.bfloat16
    layouts = (_inputs_first, _gates_first) if network.directions == 1 else (_inputs_twice, _gates_twice)
    n_elements = max(layout(network, is_standard=is_standard) for layout in layouts)
    fixed = 8 * MIB * network.layers * network.directions + 256 + -(-8 * network.batch // 32) * 32
    return (network.n_matrix_elements + n_elements) * network.dtype.itemsize + fixed


# What persistent kernels hold beside, in states a step and sample.
_PERSISTENT = {LSTM: 12, GRU: 14}
_PERSISTENT_PLAIN = 9


def _inputs_first(n: Network, *, is_standard: bool) -> int:
    """Return elements, in one direction, of what holds an input or output for each step."""
    wider = max(n.n_in, n.hidden)
    a_step = 2 * n.n_in + wider + (n.hidden + 2 * n.projection if n.projection else 2 * n.hidden)
    a_sample = 7 * n.hidden + 4 * n.n_out if n.mode == LSTM else 5 * n.hidden
    chunked = n.n_rows
    if is_standard and n.layers > 1:
        chunked = min(n.n_rows, n.batch * _n_chunked_steps(n))
    elif not is_standard:
        a_step += (_PERSISTENT.get(n.mode, _PERSISTENT_PLAIN) + (n.layers > 1)) * n.hidden
        a_sample += n.hidden
    return n.n_rows * a_step + chunked * n.hidden + n.batch * n.layers * a_sample


def _gates_first(n: Network, *, is_standard: bool) -> int:
    """Return elements, in one direction, of what holds all gates for up to 256 steps."""
    a_step = n.n_in + n.hidden + n.projection
    a_sample = 8 * n.hidden + 2 * n.n_out if n.mode == LSTM else 5 * n.hidden
    of_gates = min(n.n_rows, 256 * n.batch)
    if not is_standard:
        a_step += 4 * n.n_gates * n.hidden
        a_sample -= 2 * n.hidden
        of_gates = n.n_rows
    if n.has_dropout and n.layers > 1:
        a_step += n.hidden
    return n.n_rows * a_step + of_gates * n.n_gates * n.hidden + n.batch * n.layers * a_sample


def _inputs_twice(n: Network, *, is_standard: bool) -> int:
    """Return the first for two directions."""
    a_step = 2 * n.n_in + 4 * max(n.n_in, n.hidden) + (8 if n.layers > 1 else 6) * n.hidden
    a_step += 4 * n.projection - 2 * n.hidden if n.projection else 0
    a_sample = 18 * n.hidden + 8 * n.n_out if n.mode == LSTM else 14 * n.hidden
    a_step += 0 if is_standard else _PERSISTENT.get(n.mode, _PERSISTENT_PLAIN) * n.hidden
    return n.n_rows * a_step + n.batch * n.layers * a_sample


def _gates_twice(n: Network, *, is_standard: bool) -> int:
    """Return the second for two directions."""
    a_step = n.n_in + (6 + 2 * n.n_gates) * n.hidden + 2 * n.projection
    a_sample = 20 * n.hidden + 4 * n.n_out if n.mode == LSTM else 14 * n.hidden
    if not is_standard:
        a_step += 4 * n.n_gates * n.hidden
        a_sample -= 6 * n.hidden
    return n.n_rows * a_step + n.batch * n.layers * a_sample


def _n_chunked_steps(n: Network) -> int:
    """Return for how many steps the layers of a stack run ahead of one another."""
    a_layer = next((steps for batch, steps in ((1, 32), (8, 16), (16, 8), (127, 4)) if n.batch <= batch), 2)
    if n.steps > 100:  # 128 and more; 100 are not enough, and nothing between was measured
        a_layer = max(a_layer, 8)
    return n.layers * a_layer + max(8, a_layer)


def reserve_bytes(network: Network) -> int:
    """Return what the forward pass leaves for the backward pass.

    Exact for the measured networks but for a rounding. The masks of dropout are laid out for full sequences.
    """
    between = network.directions * (network.layers - 1) * network.hidden
    gates = {LSTM: 5, GRU: 6}.get(network.mode, 1)
    own = gates * network.hidden
    if network.projection:
        own += network.hidden + network.projection
    n_states = network.directions * network.layers * own + between
    size = network.n_rows * n_states * network.dtype.itemsize
    if network.has_dropout and network.layers > 1:
        n_masks = network.batch * network.steps * network.n_out * network.directions * (network.layers - 1)
        size += n_masks * network.directions // 8 + 256
    return size
