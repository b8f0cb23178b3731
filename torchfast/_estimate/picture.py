"""An estimate as a picture for the notebook: inline SVG and CSS, no script, no network, light and dark."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

from torchfast._bytes import GIB, KIB, MIB, format_bytes
from torchfast._estimate.text import LINES, share, verdict, where

if TYPE_CHECKING:
    from array import array

    from torchfast._estimate.events import Trace
    from torchfast._estimate.report import VRAMEstimate

# One colour a line of the breakdown, of about equal lightness; the three that are nobody's tensors in greys.
COLOURS = {
    "weights": "#4878d0",
    "buffers": "#85a7e6",
    "gradients": "#d1605e",
    "optimizer state": "#956cb4",
    "activations": "#3fa27c",
    "teacher": "#c78a2c",
    "batch": "#2aa5b8",
    "workspaces": "#d287b8",
    "other": "#a08a68",
    "rounding": "#7f8894",
    "fragmentation": "#a3abb5",
    "context": "#c6ccd3",
}
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 760, 210, 56, 18, 22
_POINTS = 360

_STYLE = """
.tfv{--ink:#1f2328;--soft:#656d76;--line:#d0d7de;--card:#ffffff;--band:#f3f5f7;
font:13px/1.45 system-ui,-apple-system,"Segoe UI",sans-serif;color:var(--ink);background:var(--card);
border:1px solid var(--line);border-radius:10px;padding:16px 18px 12px;max-width:800px;box-sizing:border-box}
@media (prefers-color-scheme:dark){
.tfv{--ink:#e6edf3;--soft:#9198a1;--line:#3d444d;--card:#14181d;--band:#1d232a}}
[data-jp-theme-light="true"] .tfv,.vscode-light .tfv,html[theme="light"] .tfv{--ink:#1f2328;--soft:#656d76;
--line:#d0d7de;--card:#ffffff;--band:#f3f5f7}
[data-jp-theme-light="false"] .tfv,.vscode-dark .tfv,html[theme="dark"] .tfv{--ink:#e6edf3;--soft:#9198a1;
--line:#3d444d;--card:#14181d;--band:#1d232a}
.tfv .tfv-head{display:flex;justify-content:space-between;gap:16px;align-items:flex-start;flex-wrap:wrap}
.tfv .tfv-big{font-size:27px;font-weight:650;letter-spacing:-.02em;line-height:1.1}
.tfv .tfv-soft{color:var(--soft)}
.tfv .tfv-facts{display:grid;grid-template-columns:auto auto;gap:0 12px;font-variant-numeric:tabular-nums}
.tfv .tfv-facts span:nth-child(even){text-align:right}
.tfv svg{display:block;width:100%;height:auto;margin:12px 0 4px}
.tfv svg text{font:11px system-ui,-apple-system,"Segoe UI",sans-serif;fill:var(--soft)}
.tfv .tfv-legend{display:grid;grid-template-columns:repeat(auto-fill,minmax(215px,1fr));
gap:2px 22px;margin:8px 0 4px}
.tfv .tfv-row{display:grid;grid-template-columns:14px 1fr auto 54px;align-items:center;
font-variant-numeric:tabular-nums}
.tfv .tfv-row i{width:9px;height:9px;border-radius:2px;display:block}
.tfv .tfv-row span:last-child{text-align:right;color:var(--soft)}
.tfv details{border-top:1px solid var(--line);padding:6px 0 2px;margin-top:8px}
.tfv summary{cursor:pointer;color:var(--soft)}
.tfv ul{margin:4px 0 4px 18px;padding:0}
"""


def html(estimate: "VRAMEstimate") -> str:
    """Return a self-contained picture of the breakdown and the timeline."""
    parts = [
        f"<div class='tfv'><style>{_STYLE}</style>",
        _head(estimate),
        _bar(estimate),
        _legend(estimate),
        _timeline(estimate),
        _details("Taken for granted", estimate.assumptions, is_open=False),
        _details("Not modelled", estimate.unmodelled, is_open=True),
        "</div>",
    ]
    return "".join(parts)


def _head(estimate: "VRAMEstimate") -> str:
    facts = (
        ("reserved", estimate.peak_reserved_bytes),
        ("allocated", estimate.peak_allocated_bytes),
        ("safe bound", estimate.safe_bytes),
    )
    cells = "".join(
        f"<span class='tfv-soft'>{name}</span><span>{format_bytes(size)}</span>" for name, size in facts
    )
    return (
        "<div class='tfv-head'><div>"
        f"<div class='tfv-big'>{format_bytes(estimate.peak_process_bytes)}</div>"
        f"<div>{escape(str(estimate.subject))}</div>"
        f"<div class='tfv-soft'>{escape(verdict(estimate))}</div>"
        f"</div><div class='tfv-facts'>{cells}</div></div>"
    )


def _bar(estimate: "VRAMEstimate") -> str:
    """Draw the breakdown as one bar."""
    total = max(estimate.peak_process_bytes, 1)
    x, pieces = 0.0, []
    for name, size in estimate.breakdown.items():
        width = _WIDTH * size / total
        label = f"{name}: {format_bytes(size)}"
        pieces.append(
            f"<rect x='{x:.1f}' y='0' width='{max(width - 0.8, 0.2):.1f}' height='22' fill='{COLOURS[name]}'>"
            f"<title>{label}</title></rect>"
        )
        x += width
    return (
        f"<svg viewBox='0 0 {_WIDTH} 22' role='img' aria-label='breakdown of the peak'>"
        f"<clipPath id='tfv-round'><rect width='{_WIDTH}' height='22' rx='5'/></clipPath>"
        f"<g clip-path='url(#tfv-round)'>{''.join(pieces)}</g></svg>"
    )


def _legend(estimate: "VRAMEstimate") -> str:
    total = estimate.peak_process_bytes
    drawn = {LINES[estimate._trace.category(event)] for event in estimate._trace.events if event.size_bytes}
    rows = "".join(
        f"<div class='tfv-row'><i style='background:{COLOURS[name]}'></i><span>{name}</span>"
        f"<span>{format_bytes(size)}</span><span>{share(size, total)}</span></div>"
        for name in COLOURS
        if (size := estimate.breakdown.get(name, 0)) or name in drawn
    )
    return (
        f"<div class='tfv-legend'>{rows}</div><div class='tfv-soft'>Peak in {escape(where(estimate))}</div>"
    )


def _details(title: str, notes: Sequence[str], *, is_open: bool) -> str:
    if not notes:
        return ""
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    state = " open" if is_open else ""
    return f"<details{state}><summary>{title} ({len(notes)})</summary><ul>{items}</ul></details>"


# --- the timeline ------------------------------------------------------------------------------------------


def points(allocated: "array[int] | Sequence[int]", n_points: int = _POINTS) -> list[int]:
    """Choose the events to draw: of each stretch of the run, the one where most is allocated."""
    n = len(allocated)
    edges = [n * i // n_points for i in range(n_points + 1)]
    stretches = itertools.pairwise(edges)
    return [max(range(a, b), key=allocated.__getitem__) for a, b in stretches if b > a]


def stacks(trace: "Trace", at: Iterable[int], lines: dict[str, str]) -> dict[str, list[int]]:
    """Return, for each line of the breakdown, the requested bytes live at each of the events `at`."""
    sums = dict.fromkeys(lines.values(), 0)
    result: dict[str, list[int]] = {line: [] for line in sums}
    owner: dict[int, tuple[str, int]] = {}
    wanted = iter(sorted(at))
    next_wanted = next(wanted, -1)
    for i, event in enumerate(trace.events):
        if event.size_bytes:
            line = lines[trace.category(event)]
            owner[event.block] = line, event.size_bytes
            sums[line] += event.size_bytes
        else:
            line, size = owner.pop(event.block)
            sums[line] -= size
        if i == next_wanted:
            for name, size in sums.items():
                result[name].append(size)
            next_wanted = next(wanted, -1)
    return {name: series for name, series in result.items() if any(series)}


def nice_step(top_bytes: int) -> int:
    """Return a round distance for grid lines: two to five of them up to `top_bytes`."""
    unit = GIB if top_bytes > 2 * GIB else MIB if top_bytes > 2 * MIB else KIB
    rough = top_bytes / 5 / unit
    power = 1
    while power * 10 <= rough:
        power *= 10
    return unit * next((m * power for m in (1, 2, 5, 10) if m * power >= rough), power)


def _timeline(estimate: "VRAMEstimate") -> str:
    trace, done = estimate._trace, estimate._replay
    if done is None or not trace.events:
        return ""
    at = points(done.allocated_bytes)
    top = max(done.peak_reserved_bytes, 1) * 1.1
    span_x, span_y = _WIDTH - _LEFT, _HEIGHT - _TOP - _BOTTOM
    n = len(trace.events)

    def x_of(event: int) -> float:
        return _LEFT + span_x * event / n

    def y_of(size: float) -> float:
        return _TOP + span_y * (1 - size / top)

    svg = [f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' role='img' aria-label='memory over the run'>"]
    svg += _bands(estimate, x_of)
    svg += _grid(top, y_of)
    base = [0] * len(at)
    for name, series in stacks(trace, at, LINES).items():
        upper = [a + b for a, b in zip(base, series, strict=True)]
        outline = [f"{x_of(i):.1f},{y_of(size):.1f}" for i, size in zip(at, upper, strict=True)]
        outline += [f"{x_of(i):.1f},{y_of(size):.1f}" for i, size in reversed([*zip(at, base, strict=True)])]
        svg.append(
            f"<polygon points='{' '.join(outline)}' fill='{COLOURS[name]}'><title>{name}</title></polygon>"
        )
        base = upper
    reserved = " ".join(f"{x_of(i):.1f},{y_of(done.reserved_bytes[i]):.1f}" for i in at)
    svg.append(
        f"<polyline points='{reserved}' fill='none' stroke='var(--soft)' stroke-width='1.2' "
        "stroke-dasharray='4 3'><title>reserved</title></polyline>"
    )
    label_y = y_of(done.peak_reserved_bytes) - 5
    svg.append(f"<text x='{_WIDTH - 2}' y='{label_y:.1f}' text-anchor='end'>reserved</text>")
    svg.append(_peak_mark(x_of(done.peak_event), y_of(done.peak_allocated_bytes), estimate))
    return "".join(svg) + "</svg>"


def _bands(estimate: "VRAMEstimate", x_of: Callable[[int], float]) -> list[str]:
    """Shade the backward passes, and name the phases that are wide enough, the step on top."""
    svg, start, step_labelled = [], 0, ""
    height = _HEIGHT - _TOP - _BOTTOM
    for phase in estimate.phases:
        x, width = x_of(start), x_of(start + phase.n_events) - x_of(start)
        step, name = split_phase(phase.name)
        if name == "backward":
            svg.append(
                f"<rect x='{x:.1f}' y='{_TOP}' width='{width:.1f}' height='{height}' fill='var(--band)'/>"
            )
        if width > 6 * len(name):
            svg.append(
                f"<text x='{x + width / 2:.1f}' y='{_HEIGHT - 7}' text-anchor='middle'>{escape(name)}</text>"
            )
        if step and step != step_labelled:
            svg.append(
                f"<line x1='{x:.1f}' x2='{x:.1f}' y1='4' y2='{_HEIGHT - _BOTTOM}' stroke='var(--line)'/>"
            )
            svg.append(f"<text x='{x + 5:.1f}' y='{_TOP - 6}'>{escape(step)}</text>")
            step_labelled = step
        start += phase.n_events
    return svg


def split_phase(name: str) -> tuple[str, str]:
    """Split `step 2 backward` into the step and what happens in it; other phases belong to no step."""
    words = name.split()
    if len(words) > 2 and words[0] == "step" and words[1].isdigit():
        return " ".join(words[:2]), " ".join(words[2:])
    return "", name


def _grid(top_bytes: float, y_of: Callable[[float], float]) -> list[str]:
    step = nice_step(int(top_bytes))
    svg = []
    for size in range(0, int(top_bytes) + 1, step):
        y = y_of(size)
        svg.append(
            f"<line x1='{_LEFT}' x2='{_WIDTH}' y1='{y:.1f}' y2='{y:.1f}' stroke='var(--line)' opacity='.6'/>"
        )
        svg.append(f"<text x='{_LEFT - 6}' y='{y + 4:.1f}' text-anchor='end'>{tick(size)}</text>")
    return svg


def tick(size_bytes: int) -> str:
    """Write a round size on an axis."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if size_bytes >= unit:
            return f"{size_bytes / unit:g} {name}"
    return str(size_bytes)


def _peak_mark(x: float, y: float, estimate: "VRAMEstimate") -> str:
    size = format_bytes(estimate.peak_allocated_bytes)
    label = f"{size} allocated: {where(estimate)}"
    is_left = x > _WIDTH * 0.8
    return (
        f"<text x='{x - 9 if is_left else x + 9:.1f}' y='{y - 3:.1f}' style='fill:var(--ink)' "
        f"text-anchor='{'end' if is_left else 'start'}'>{size}</text>"
        f"<circle cx='{x:.1f}' cy='{y:.1f}' r='4' fill='var(--card)' stroke='var(--ink)' stroke-width='1.6'>"
        f"<title>{escape(label)}</title></circle>"
    )
