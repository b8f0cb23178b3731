"""What cuDNN's recurrent kernels take while they run, and what they leave for the backward pass.

No source tells the workspace. Most of it is 8 MiB a layer and direction, the weights once more, and for each
step and sample the gates and the input of one layer; for narrow networks cuDNN has other kernels, which take
up to four times as much. So a network takes that formula, times what the most alike of the measured ones took
of theirs (`recurrent_sweep.csv`: random networks on an H200, torch 2.11, cuDNN 9.19); how far that is off is
in docs/decisions/0031-recurrent-workspaces.md.
"""

import math
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median

from torchfast._bytes import MIB

RELU, TANH, LSTM, GRU = range(4)
_N_ALIKE = 3


@dataclass(frozen=True, slots=True)
class Network:
    """What of a recurrent network and its batch decides its memory."""

    mode: int
    itemsize: int
    batch: int
    steps: int
    n_in: int
    hidden: int
    projection: int
    layers: int
    directions: int
    n_weights: int
    n_rows: int  # samples of all steps together: fewer than batch * steps where sequences are packed

    @property
    def n_out(self) -> int:
        """The width of a state that is passed on."""
        return self.projection or self.hidden

    @property
    def kind(self) -> tuple[int, bool]:
        """What must be the same for two networks to be compared at all."""
        return (TANH if self.mode == RELU else self.mode), self.projection > 0

    @property
    def features(self) -> tuple[float, ...]:
        """Numbers whose distance says how alike two networks of a kind are."""
        return (
            math.log2(self.hidden),
            math.log2(self.batch),
            0.5 * math.log2(self.steps),
            2.0 * self.directions,
            0.5 * math.log2(self.n_in),
            0.5 * self.layers,
        )

    @property
    def fixed_bytes(self) -> int:
        """What does not depend on the batch."""
        return self.n_weights * self.itemsize + 8 * MIB * self.layers * self.directions

    @property
    def batch_bytes(self) -> int:
        """What does, for kernels of wide networks."""
        of_states, of_inputs, once = _MULTIPLES.get(self.mode, _MULTIPLES[TANH])
        a_step = of_states[self.directions - 1] * self.hidden + of_inputs * self.n_in
        once *= self.hidden * self.directions * self.layers
        return (self.n_rows * a_step + self.batch * once) * self.itemsize


# States for each step and sample, in one and in two directions, inputs likewise, and states for each sample.
_MULTIPLES = {LSTM: ((5, 14), 1, 10), GRU: ((4, 12), 2, 6), TANH: ((3, 12), 2, 8)}


def workspace_bytes(network: Network) -> int:
    """Return what the forward pass takes while it runs, and each half of the backward pass."""
    return network.fixed_bytes + int(network.batch_bytes * _share(network))


@cache
def _share(network: Network) -> float:
    """Return how much of the formula the most alike of the measured networks took."""
    features = network.features
    measured = _sweep().get(network.kind, [])
    if not measured:
        return 1.0
    same = [share for known, share in measured if known == features]
    by_distance = sorted(measured, key=lambda row: math.dist(row[0], features))
    return median(same or [share for _, share in by_distance[:_N_ALIKE]])


@cache
def _sweep() -> dict[tuple[int, bool], list[tuple[tuple[float, ...], float]]]:
    by_kind: dict[tuple[int, bool], list[tuple[tuple[float, ...], float]]] = defaultdict(list)
    names, *lines = Path(__file__).with_name("recurrent_sweep.csv").read_text().splitlines()
    for line in lines:
        row = dict(zip(names.split(","), map(int, line.split(",")), strict=True))
        taken = row.pop("workspace_bytes")
        network = Network(**row, n_rows=row["batch"] * row["steps"])
        share = (taken - network.fixed_bytes) / network.batch_bytes
        by_kind[network.kind].append((network.features, max(share, 0.0)))
    return by_kind


def reserve_bytes(network: Network, *, has_dropout: bool) -> int:
    """Return what the forward pass leaves for the backward pass.

    Exact for the measured networks but for a rounding. The masks of dropout are laid out for full sequences.
    """
    between = network.directions * (network.layers - 1) * network.hidden
    gates = {LSTM: 5, GRU: 6}.get(network.mode, 1)
    own = gates * network.hidden
    if network.projection:
        own += network.hidden + network.projection
    size = network.n_rows * (network.directions * network.layers * own + between) * network.itemsize
    if has_dropout and network.layers > 1:
        n_masks = network.batch * network.steps * network.n_out * network.directions * (network.layers - 1)
        size += n_masks * network.directions // 8 + 256
    return size
