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
    n = len(estimate._trace.events)
    top = max(estimate.peak_reserved_bytes, 1) * 1.08
    step = nice_step(int(top))
    sizes = list(range(0, int(top) + 1, step))
    axes.set_yticks(sizes, [tick(size) for size in sizes])
    axes.set_ylim(0, top)
    axes.set_xlim(0, n)
    axes.set_xticks([])
    start = 0
    for number, phase in enumerate(estimate.phases):
        end = start + phase.n_events
        if number % 2 == 0:
            axes.axvspan(start, end, color=_GREY, alpha=0.08, lw=0, zorder=0)
        _, name = split_phase(phase.name)
        if phase.n_events > n * 0.012 * len(name):
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
    axes.grid(axis="y", color=_GREY, alpha=0.25, lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(
        f"{estimate.subject}\n{format_bytes(estimate.peak_process_bytes)} on {estimate.gpu.name}, "
        f"peak in {where(estimate)}",
        loc="left",
        fontsize=9,
    )
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
