"""An estimate as a matplotlib figure."""

from typing import TYPE_CHECKING, Any

from torchfast._bytes import format_bytes
from torchfast._estimate.picture import COLOURS, nice_step, points, split_phase, stacks, tick
from torchfast._estimate.text import LINES, where

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from torchfast._estimate.report import VRAMEstimate

_GREY = "#7f8894"  # readable on white and on black


def plot(estimate: "VRAMEstimate", axes: "Axes | None" = None) -> "Axes":
    """Draw the timeline; see `VRAMEstimate.plot`."""
    if axes is None:
        _, axes = _pyplot().subplots(figsize=(9, 3.6), layout="constrained")
    done, trace = estimate._replay, estimate._trace
    assert done is not None  # noqa: S101 -- estimate_of always gives one
    at = points(done.allocated_bytes, 800)
    series = stacks(trace, at, LINES)
    axes.stackplot(at, *series.values(), labels=list(series), colors=[COLOURS[name] for name in series], lw=0)
    reserved = [done.reserved_bytes[i] for i in at]
    axes.plot(at, reserved, color=_GREY, lw=1.1, ls=(0, (4, 3)), label="reserved")
    axes.plot(done.peak_event, estimate.peak_allocated_bytes, "o", mfc="white", mec="#1f2328", ms=6)
    _dress(axes, estimate)
    return axes


def _pyplot() -> Any:
    try:
        from matplotlib import pyplot as plt
    except ImportError as error:
        raise ImportError(
            "VRAMEstimate.plot() was called, but matplotlib is not installed, and it draws the figure. "
            "Install it (pip install matplotlib), or print the estimate instead."
        ) from error
    return plt


def _dress(axes: "Axes", estimate: "VRAMEstimate") -> None:
    """Name the axes, the phases and the peak."""
    top = max(estimate.peak_reserved_bytes, 1) * 1.08
    sizes = list(range(0, int(top) + 1, nice_step(int(top))))
    axes.set_yticks(sizes, [tick(size) for size in sizes])
    axes.set_ylim(0, top)
    axes.set_xlim(0, len(estimate._trace.events))
    axes.set_xticks([])
    _name_phases(axes, estimate)
    axes.grid(axis="y", color=_GREY, alpha=0.25, lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(
        f"{estimate.subject}\n{format_bytes(estimate.peak_process_bytes)} on {estimate.gpu.name}, "
        f"peak in {where(estimate)}",
        loc="left",
        fontsize=9,
    )
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _name_phases(axes: "Axes", estimate: "VRAMEstimate") -> None:
    """Shade the backward passes, set the steps apart, and name what is wide enough."""
    start, current, n = 0, "", len(estimate._trace.events)
    for phase in estimate.phases:
        end = start + phase.n_events
        step, name = split_phase(phase.name)
        if name == "backward":
            axes.axvspan(start, end, color=_GREY, alpha=0.1, lw=0, zorder=0)
        if step and step != current:
            axes.axvline(start, color=_GREY, alpha=0.4, lw=0.6, zorder=0)
            current = step
        if phase.n_events > n * 0.0085 * len(name):
            axes.text(
                (start + end) / 2,
                -0.03,
                name,
                transform=axes.get_xaxis_transform(),
                ha="center",
                va="top",
                fontsize=8,
                color=_GREY,
            )
        start = end
