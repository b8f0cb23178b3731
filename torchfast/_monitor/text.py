"""A monitor in words: a line for a progress bar, and a report."""

from typing import TYPE_CHECKING

from torchfast._bytes import format_bytes
from torchfast._monitor.sample import PARTS, VRAMPeak, VRAMPhase, VRAMSample, size

if TYPE_CHECKING:
    from torchfast._monitor.monitor import VRAMMonitor


def line(sample: VRAMSample, peak: VRAMPeak) -> str:
    """Write the memory now and the peak in a few words."""
    if sample.tensors_bytes is None:
        host = sample.host_process_bytes
        return "memory unknown" if host is None else f"host memory {format_bytes(host)} of this process"
    at_least = "≥ " if peak.is_lower_bound else ""
    peak_text = (
        "" if peak.allocated_bytes is None else f", peak {at_least}{format_bytes(peak.allocated_bytes)}"
    )
    device = (
        ""
        if sample.used_bytes is None
        else f", device {size(sample.used_bytes)} of {size(sample.total_bytes)}"
    )
    return f"VRAM {format_bytes(sample.tensors_bytes)}{peak_text}{device}"


def report(monitor: "VRAMMonitor") -> str:
    """Write the latest sample, the peaks, the phases, and what could not be known."""
    sample, peak = monitor.latest, monitor.peak
    lines = [f"VRAMMonitor of {monitor.device}"]
    if sample is None:
        return f"{lines[0]}: no sample yet. Use it as `with monitor:`."
    lines += [f"  now, {sample.time_s:.1f} s after the start"]
    if sample.total_bytes is not None:
        lines += [_row(name, size(getattr(sample, f"{name}_bytes"))) for name in PARTS]
        lines += [_row("total", size(sample.total_bytes))]
    lines += [_row("host process", size(sample.host_process_bytes))]
    lines += ["  peak of the run", *_peak_rows(peak)]
    if monitor.phases:
        width = max(24, *map(len, monitor.phases))
        lines += [f"  {'phase':<{width}}{'times':>7}{'seconds':>9}{'peak':>12}{'reserved':>12}{'kept':>12}"]
        lines += [_phase_row(phase, width) for phase in monitor.phases.values()]
    unknown = {reason for source in sample.sources.values() if (reason := source).startswith("not known")}
    lines += [f"  {reason}" for reason in sorted(unknown)]
    lines += [f"  error: {error}" for error in monitor.errors]
    return "\n".join(lines)


def _peak_rows(peak: VRAMPeak) -> list[str]:
    rows = []
    if peak.allocated_bytes is not None:
        note = " or more: PyTorch's peak register was disturbed" if peak.is_lower_bound else ""
        rows += [
            _row("allocated", size(peak.allocated_bytes) + note),
            _row("reserved", size(peak.reserved_bytes)),
        ]
        rows += [_row("device used", f"{size(peak.used_bytes)} (highest sample)")]
    return [*rows, _row("host process", f"{size(peak.host_process_bytes)} (highest sample)")]


def _row(name: str, value: str) -> str:
    return f"    {name:<14}{value}"


def _phase_row(phase: VRAMPhase, width: int) -> str:
    at_least = "≥ " if phase.is_lower_bound else ""
    peak = at_least + size(phase.peak_allocated_bytes)
    return (
        f"  {phase.name:<{width}}{phase.n_times:>7}{phase.total_s:>9.2f}{peak:>12}"
        f"{size(phase.peak_reserved_bytes):>12}{size(phase.kept_bytes):>12}"
    )
