"""Small streams of allocations, as a traced training step would yield them."""

from torchfast._bytes import KIB, MIB
from torchfast._estimate.events import Event, Note, Trace
from torchfast._estimate.gpus import GPU, resolve_gpu
from torchfast._estimate.report import Subject, VRAMEstimate, estimate_of

N_LAYERS = 6


class Builder:
    """Appends allocations and frees to a trace, one note a call."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.notes: list[Note] = []
        self.n_blocks = 0

    def take(self, size_bytes: int, phase: str, category: str, module: str = "", operator: str = "") -> int:
        """Allocate a block and return its number."""
        self.notes.append(Note(phase, module, operator, category))
        self.events.append(Event(self.n_blocks, size_bytes, len(self.notes) - 1))
        self.n_blocks += 1
        return self.n_blocks - 1

    def give(self, block: int, phase: str) -> None:
        """Free a block."""
        self.notes.append(Note(phase, "", "", "other"))
        self.events.append(Event(block, 0, len(self.notes) - 1))


def training(batch_size: int = 8, *, n_steps: int = 2, width: int = MIB) -> Trace:
    """Return a run of a network of six layers whose activations grow with the batch."""
    b = Builder()
    for i in range(N_LAYERS):
        b.take(width + 4 * i, "weights", "weights", f"layers.{i}")
    b.take(batch_size * 12 * KIB, "batch", "batch")
    for step in range(1, n_steps + 1):
        gradients = []
        phase = f"step {step} forward"
        size = batch_size * 700 * KIB + 64
        kept = [b.take(size, phase, "activations", f"layers.{i}", "aten.addmm") for i in range(N_LAYERS)]
        phase = f"step {step} backward"
        for i in reversed(range(N_LAYERS)):
            workspace = b.take(
                batch_size * 100 * KIB, phase, "workspace", f"layers.{i}", "aten.convolution_backward"
            )
            gradients.append(b.take(width + 4 * i, phase, "gradients", f"layers.{i}", "aten.mm"))
            b.give(workspace, phase)
            b.give(kept.pop(), phase)
        phase = f"step {step} optimizer"
        if step == 1:
            for i in range(N_LAYERS):
                b.take(2 * (width + 4 * i), phase, "optimizer", "", "aten._foreach_add_")
        for gradient in gradients:
            b.give(gradient, phase)
    optional = frozenset(e.block for e in b.events if b.notes[e.note].category == "workspace")
    return Trace(
        b.events,
        b.notes,
        unmodelled=("a made-up <operator>",),
        assumptions=("a made-up assumption",),
        optional=optional,
    )


def retrace(
    *, batch_size: int | None = None, gpu: GPU | None = None, variant: str | None = None
) -> Trace | None:
    """Trace the made-up step again."""
    del gpu
    if variant not in (None, "pure bf16", "SGD"):
        return None
    return training(batch_size or 8, width=MIB // 2 if variant == "pure bf16" else MIB)


def estimate(batch_size: int = 8, gpu: str | int = "H200") -> VRAMEstimate:
    """Return an estimate of the made-up step."""
    return estimate_of(
        training(batch_size),
        gpu=resolve_gpu(gpu),
        subject=Subject("Made", "AdamW", "fp32", batch_size, "Taught"),
        retrace=retrace,
    )
