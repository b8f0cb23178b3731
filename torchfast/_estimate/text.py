"""An estimate as a table for the terminal."""

import textwrap
from typing import TYPE_CHECKING

from torchfast._bytes import format_bytes
from torchfast._estimate.events import CATEGORIES

if TYPE_CHECKING:
    from torchfast._estimate.report import VRAMEstimate

# What the breakdown calls each category; the order is that of the table.
LINES = {
    "weights": "weights",
    "buffers": "buffers",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "activations": "activations",
    "teacher": "teacher",
    "batch": "batch",
    "workspace": "workspaces",
    "other": "other",
}
assert tuple(LINES) == CATEGORIES  # noqa: S101 -- a category without a line would vanish from the sum

_WIDTH = 88
_BAR = 24


def table(estimate: "VRAMEstimate") -> str:
    """Return the estimate as text: the peaks, the breakdown, the phases, what it rests on."""
    return "\n".join(
        [
            f"VRAM estimate for {estimate.gpu}",
            f"  {estimate.subject}",
            "",
            *_peaks(estimate),
            "",
            *_breakdown(estimate),
            "",
            *_phases(estimate),
            *_notes("Taken for granted", estimate.assumptions),
            *_notes("Not modelled", estimate.unmodelled),
        ]
    )


def verdict(estimate: "VRAMEstimate") -> str:
    """Say in words how the safe bound compares with the GPU's memory."""
    total, safe = estimate.gpu.total_bytes, estimate.safe_bytes
    if safe <= total:
        return f"{format_bytes(total - safe)} to spare on {estimate.gpu.name}"
    if estimate.peak_process_bytes <= total:
        return f"may or may not fit on {estimate.gpu.name}: fits() decides by replay"
    return (
        f"{format_bytes(estimate.peak_process_bytes - total)} more than {estimate.gpu.name} has; "
        "fits() tells whether giving back cached memory saves it"
    )


def where(estimate: "VRAMEstimate") -> str:
    """Name the phase, the module and the operator at the peak."""
    parts = (estimate.peak_phase, estimate.peak_module, estimate.peak_operator)
    return ", ".join(part for part in parts if part) or "nothing was allocated"


def share(part_bytes: int, whole_bytes: int) -> str:
    """Write a part in percent of a whole."""
    return f"{100 * part_bytes / whole_bytes:.1f} %" if whole_bytes else "0.0 %"


def _peaks(estimate: "VRAMEstimate") -> list[str]:
    rows = (
        (
            "process at its peak",
            estimate.peak_process_bytes,
            f"safe bound {format_bytes(estimate.safe_bytes)}",
        ),
        ("  reserved", estimate.peak_reserved_bytes, "torch.cuda.max_memory_reserved()"),
        ("  allocated", estimate.peak_allocated_bytes, "torch.cuda.max_memory_allocated()"),
        ("  requested", estimate.peak_requested_bytes, ""),
    )
    lines = [f"  {name:<22}{format_bytes(size):>10}  {note}".rstrip() for name, size, note in rows]
    return [*lines, f"  {verdict(estimate)}"]


def _breakdown(estimate: "VRAMEstimate") -> list[str]:
    total = estimate.peak_process_bytes
    lines = [f"  At the peak ({where(estimate)}):"]
    for name, size in estimate.breakdown.items():
        bar = "█" * round(_BAR * size / total) if total else ""
        lines.append(f"    {name:<20}{format_bytes(size):>10} {share(size, total):>7}  {bar}".rstrip())
    return [*lines, f"    {'together':<20}{format_bytes(total):>10}"]


def _phases(estimate: "VRAMEstimate") -> list[str]:
    lines = [f"  {'phase':<22}{'peak':>12}{'end':>12}{'reserved':>12}"]
    for phase in estimate.phases:
        sizes = (phase.peak_allocated_bytes, phase.end_allocated_bytes, phase.peak_reserved_bytes)
        lines.append(f"  {phase.name:<22}" + "".join(f"{format_bytes(size):>12}" for size in sizes))
    return lines


def _notes(title: str, notes: tuple[str, ...]) -> list[str]:
    if not notes:
        return []
    wrapped = [
        textwrap.fill(note, _WIDTH, initial_indent="    - ", subsequent_indent="      ") for note in notes
    ]
    return ["", f"  {title}:", *wrapped]
