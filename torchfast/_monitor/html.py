"""A monitor to look at: the gauge, the timeline, the table of phases.

Self-contained HTML and SVG without scripts: it shows the same in a notebook, in Gradio and in a saved page.
Text takes the colour of its surroundings, and the rest is chosen to be told apart on light and dark ground
and by the colour-blind (after Okabe and Ito), so neither a theme nor a media query has to be known.
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from torchfast._bytes import format_bytes
from torchfast._monitor.history import VRAMSpan
from torchfast._monitor.sample import VRAMPhase, size

if TYPE_CHECKING:
    from torchfast._monitor.monitor import VRAMMonitor

_COLOURS = {
    "tensors": "#1F83C4",
    "cached": "#56B4E9",
    "fragmented": "#E69F00",
    "outside PyTorch": "#CC79A7",
    "other processes": "#8A8A8A",
    "not PyTorch": "#CC79A7",
    "this process": "#1F83C4",
}
_TRACK = "rgba(128,128,128,.22)"  # free memory, and the grid: visible on white and on black
_BOX = "font:13px/1.5 system-ui,sans-serif;font-variant-numeric:tabular-nums;max-width:720px;color:inherit"
_ROW = "display:flex;flex-wrap:wrap;gap:.1em 1.2em"
_SWATCH = "display:inline-block;width:.8em;height:.8em;border-radius:2px"
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 720, 200, 64, 22


def gauge(status: Mapping[str, Any]) -> str:
    """Return a bar of who holds the memory now, from what `VRAMMonitor.status()` returns.

    The record may come from another process, by way of JSON. The mark on the bar is the peak of the tensors.
    """
    on_gpu = status["total_bytes"] is not None
    total_bytes = status["total_bytes"] if on_gpu else status["host_total_bytes"]
    if total_bytes is None:
        return f'<div style="{_BOX}">{escape(str(status["device"]))}: memory unknown</div>'
    parts = _gpu_parts(status) if on_gpu else _host_parts(status)
    free_bytes = status["free_bytes"] if on_gpu else status["host_free_bytes"]
    used_bytes = total_bytes - free_bytes
    where = escape(str(status["device"])) + ("" if on_gpu else ", host memory")
    used = f"{format_bytes(used_bytes)} of {format_bytes(total_bytes)} used"
    legend = "".join(_legend(name, _COLOURS[name], n_bytes) for name, n_bytes in parts)
    return (
        f'<div style="{_BOX}">'
        f'<div style="display:flex;justify-content:space-between;gap:1em"><b>{where}</b>'
        f"<span>{used} ({used_bytes / total_bytes:.0%})</span></div>"
        f"{_bar(parts, total_bytes, status['peak']['allocated_bytes'], f'{where}: {used}')}"
        f'<div style="{_ROW}">{legend}{_legend("free", _TRACK, free_bytes)}'
        f"{_peak_text(status['peak'])}</div></div>"
    )


def timeline(spans: Sequence[VRAMSpan], peak_bytes: int | None) -> str:
    """Return the run as a drawing: the highest tensors, reserved and device use of each span of time.

    The shade below the tensors reaches down to their lowest value in each span: the breathing of the steps.
    """
    lines = [
        ("device used", "#8A8A8A", [span.highest_used_bytes for span in spans]),
        ("reserved", "#56B4E9", [span.high.reserved_bytes for span in spans]),
        ("tensors", "#1F83C4", [span.high.tensors_bytes for span in spans]),
    ]
    if all(span.high.tensors_bytes is None for span in spans):
        lines = [("host process", "#1F83C4", [span.high.host_process_bytes for span in spans])]
    shown = [line for line in lines if any(n_bytes is not None for n_bytes in line[2])]
    if len(spans) < 2 or not shown:
        return ""
    values = [n_bytes for _, _, line in shown for n_bytes in line if n_bytes is not None]
    top_bytes = max([*values, peak_bytes or 0, 1]) * 1.05
    start_s, end_s = spans[0].start_s, spans[-1].end_s
    drawn = "".join(_line(spans, line, colour, top_bytes) for _, colour, line in shown)
    legend = "".join(_legend(name, colour, None) for name, colour, _ in shown)
    return (
        f'<div style="{_BOX}"><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="100%" role="img" '
        f'aria-label="memory over {end_s - start_s:.1f} seconds" style="display:block">'
        f"{_grid(top_bytes, start_s, end_s)}{_shade(spans, top_bytes)}{drawn}"
        f"{_peak_line(peak_bytes, top_bytes)}</svg>"
        f'<div style="{_ROW}">{legend}</div></div>'
    )


def page(monitor: "VRAMMonitor", status: Mapping[str, Any]) -> str:
    """Return gauge, timeline and phases, one below the other."""
    tables = _phase_table(list(monitor.phases.values())) if monitor.phases else ""
    return f"<div>{gauge(status)}{timeline(monitor.history, monitor.peak.allocated_bytes)}{tables}</div>"


def _gpu_parts(status: Mapping[str, Any]) -> list[tuple[str, int]]:
    names = {"tensors": "tensors", "cached": "cached", "fragmented": "fragmented"}
    if status["outside_bytes"] is None or status["others_bytes"] is None:
        names["not_pytorch"] = "not PyTorch"
    else:
        names |= {"outside": "outside PyTorch", "others": "other processes"}
    parts = [(shown, status[f"{name}_bytes"]) for name, shown in names.items()]
    return [(shown, n_bytes) for shown, n_bytes in parts if n_bytes is not None]


def _host_parts(status: Mapping[str, Any]) -> list[tuple[str, int]]:
    own_bytes = status["host_process_bytes"]
    others_bytes = status["host_total_bytes"] - status["host_free_bytes"] - own_bytes
    return [("this process", own_bytes), ("other processes", max(0, others_bytes))]


def _bar(parts: Sequence[tuple[str, int]], total_bytes: int, peak_bytes: int | None, label: str) -> str:
    x, rects = 0.0, []
    for name, n_bytes in parts:
        width = 100 * n_bytes / total_bytes
        title = f"<title>{name} {format_bytes(n_bytes)}</title>"
        rects.append(
            f'<rect x="{x:.3f}%" width="{width:.3f}%" height="18" fill="{_COLOURS[name]}">{title}</rect>'
        )
        x += width
    if peak_bytes is not None:
        at = 100 * peak_bytes / total_bytes
        mark = f"<title>peak of the tensors {format_bytes(peak_bytes)}</title>"
        rects.append(f'<rect x="{at:.3f}%" width="2" height="18" fill="currentColor">{mark}</rect>')
    return (
        f'<svg width="100%" height="18" role="img" aria-label="{label}" '
        f'style="display:block;border-radius:4px;margin:.2em 0;background:{_TRACK}">{"".join(rects)}</svg>'
    )


def _legend(name: str, colour: str, n_bytes: int | None) -> str:
    swatch = f'<span style="{_SWATCH};background:{colour}"></span>'
    number = "" if n_bytes is None else f" {format_bytes(n_bytes)}"
    return f"<span>{swatch} {name}{number}</span>"


def _peak_text(peak: Mapping[str, Any]) -> str:
    if peak["allocated_bytes"] is None:
        return ""
    at_least = "at least " if peak["is_lower_bound"] else ""
    return f"<span>▏peak of the tensors {at_least}{format_bytes(peak['allocated_bytes'])}</span>"


def _line(spans: Sequence[VRAMSpan], values: Sequence[int | None], colour: str, top_bytes: float) -> str:
    points = " ".join(_points(spans, values, top_bytes))
    return f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>'


def _shade(spans: Sequence[VRAMSpan], top_bytes: float) -> str:
    high = _points(spans, [span.high.tensors_bytes for span in spans], top_bytes)
    low = _points(spans, [span.low.tensors_bytes for span in spans], top_bytes)
    points = " ".join([*high, *reversed(low)])
    return f'<polygon points="{points}" fill="{_COLOURS["tensors"]}" fill-opacity=".3"/>' if points else ""


def _points(spans: Sequence[VRAMSpan], values: Sequence[int | None], top_bytes: float) -> list[str]:
    start_s, length_s = spans[0].start_s, max(spans[-1].end_s - spans[0].start_s, 1e-9)
    points = []
    for span, n_bytes in zip(spans, values, strict=True):
        if n_bytes is not None:
            y = _y(n_bytes, top_bytes)
            edges = [(time_s - start_s) / length_s for time_s in (span.start_s, span.end_s)]
            points += [f"{_LEFT + edge * (_WIDTH - _LEFT):.1f},{y:.1f}" for edge in edges]
    return points


def _grid(top_bytes: float, start_s: float, end_s: float) -> str:
    base = _HEIGHT - _BOTTOM
    parts = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = _y(share * top_bytes / 1.05, top_bytes)
        text = format_bytes(int(share * top_bytes / 1.05))
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="{_TRACK}"/>')
        parts.append(_text(_LEFT - 6, y + 4, text, "end"))
    parts.append(_text(_LEFT, base + 16, f"{start_s:.1f} s", "start"))
    parts.append(_text(_WIDTH, base + 16, f"{end_s:.1f} s", "end"))
    return "".join(parts)


def _peak_line(peak_bytes: int | None, top_bytes: float) -> str:
    if peak_bytes is None:
        return ""
    y = _y(peak_bytes, top_bytes)
    place = f'x1="{_LEFT}" x2="{_WIDTH}" y1="{y:.1f}" y2="{y:.1f}"'
    return f'<line {place} stroke="currentColor" stroke-dasharray="4 4"/>' + _text(
        _WIDTH, y - 4, f"peak of the tensors {format_bytes(peak_bytes)}", "end"
    )


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return (
        f'<text x="{x}" y="{y:.1f}" font-size="11" fill="currentColor" text-anchor="{anchor}">{text}</text>'
    )


def _y(n_bytes: float, top_bytes: float) -> float:
    return (_HEIGHT - _BOTTOM) * (1 - n_bytes / top_bytes)


def _phase_table(phases: Sequence[VRAMPhase]) -> str:
    right = ' style="text-align:right;padding:0 .8em"'
    head = "".join(f"<th{right}>{name}</th>" for name in ("times", "seconds", "peak", "reserved", "kept"))
    rows = "".join(
        f'<tr><td style="text-align:left">{escape(phase.name)}</td><td{right}>{phase.n_times}</td>'
        f"<td{right}>{phase.total_s:.2f}</td>"
        f"<td{right}>{'≥ ' if phase.is_lower_bound else ''}{size(phase.peak_allocated_bytes)}</td>"
        f"<td{right}>{size(phase.peak_reserved_bytes)}</td><td{right}>{size(phase.kept_bytes)}</td></tr>"
        for phase in phases
    )
    head = f'<thead><tr><th style="text-align:left">phase</th>{head}</tr></thead>'
    return f'<table style="{_BOX};border-collapse:collapse">{head}<tbody>{rows}</tbody></table>'
