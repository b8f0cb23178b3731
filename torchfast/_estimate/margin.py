"""The safe bound: what a run may need if what is known only by fit turns out to be something else.

Rules from PyTorch's source are exact; workspaces of cuDNN are fitted, and decide by chance which free blocks
are cut. So the run is replayed with each fitted workspace drawn anew between nothing and its double, and the
largest of these runs counts. Why, and how wide: docs/decisions/0038-safe-bound.md.
"""

import random

from torchfast._estimate.events import Event, Trace
from torchfast._estimate.gpus import Context
from torchfast._estimate.replay import peak_reserved_bytes
from torchfast._estimate.settings import AllocatorSettings

_FLOOR_PCT = 6  # of reserved bytes: what runs without any fitted workspace were off by
_UNMODELLED_PCT = 6  # on top, where operators ran whose scratch nobody knows
_N_DRAWS = 4
_MOST = 2.0  # times the fitted size


def safe_bytes(trace: Trace, reserved_bytes: int, context: Context, settings: AllocatorSettings) -> int:
    """Return what to have free for a run of which `reserved_bytes` are expected to be reserved."""
    fitted = _fitted(trace)
    draws = range(_N_DRAWS if fitted else 0)
    peaks = [peak_reserved_bytes(_drawn(trace, fitted, seed), settings) for seed in draws]
    floor_pct = _FLOOR_PCT + (_UNMODELLED_PCT if trace.unmodelled else 0)
    margin = reserved_bytes * floor_pct // 100
    return max([reserved_bytes, *peaks]) + margin + context.expected_bytes + context.spread_bytes


def _fitted(trace: Trace) -> frozenset[int]:
    """Return the blocks whose size was fitted to measurements: workspaces of convolutions and recurrences."""
    recurrent = {
        i for i, note in enumerate(trace.notes) if "_rnn" in note.operator and note.category == "workspace"
    }
    return trace.optional | {event.block for event in trace.events if event.note in recurrent}


def _drawn(trace: Trace, fitted: frozenset[int], seed: int) -> list[Event]:
    """Return the run with other workspaces: the same ones at every step, as kernels are chosen by shape."""
    draw = random.Random(seed)  # noqa: S311 -- no secret, and the same bound each time
    factors: dict[tuple[str, str, int], float] = {}
    events = []
    for event in trace.events:
        size = event.size_bytes
        if size and event.block in fitted:
            note = trace.notes[event.note]
            key = note.module, note.operator, size
            if key not in factors:
                factors[key] = draw.uniform(0, _MOST)
            size = max(round(size * factors[key]), 1)
        events.append(Event(event.block, size, event.note))
    return events
