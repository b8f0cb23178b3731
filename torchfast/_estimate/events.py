"""The stream of allocations and frees that tracing yields and the allocator's replay takes."""

from dataclasses import dataclass, field
from typing import NamedTuple

# The lines of the breakdown that a block of memory can belong to. What the allocator adds (rounding and
# fragmentation) and the context are not blocks, and are reckoned by the report.
CATEGORIES = (
    "weights",
    "buffers",
    "gradients",
    "optimizer",
    "activations",
    "teacher",
    "batch",
    "workspace",
    "other",
)


class Event(NamedTuple):
    """One allocation or one free."""

    block: int  # the number of the block; never used twice
    size_bytes: int  # > 0: that many bytes are requested for the block; 0: the block is freed
    note: int  # index into `Trace.notes`: who did it


@dataclass(frozen=True, slots=True)
class Note:
    """Where in the step something happened."""

    phase: str  # "weights", "batch", "teacher", then "step 1 forward", "step 1 backward", "step 1 optimizer"
    module: str  # dotted path of the module, "" outside of any
    operator: str  # "aten.convolution", "" for what no operator asked for
    category: str  # one of CATEGORIES: what the block was taken for


@dataclass(frozen=True, slots=True)
class Trace:
    """Everything that one traced run asked of the allocator, in order."""

    events: list[Event]
    notes: list[Note]
    # What a block turned out to be, where that differs from the category of the note it was allocated under:
    # an activation of the backward pass that became a gradient, a tensor that the optimizer kept as state.
    categories: dict[int, str] = field(default_factory=dict)
    unmodelled: tuple[str, ...] = ()  # in words: what may need memory and is not in the events
    assumptions: tuple[str, ...] = ()  # in words: what the estimate took for granted
    # Blocks that are done without where memory ends: cuDNN runs another kernel when it gets no workspace.
    optional: frozenset[int] = frozenset()

    def category(self, event: Event) -> str:
        """Return what the block of an allocation is."""
        return self.categories.get(event.block, self.notes[event.note].category)
