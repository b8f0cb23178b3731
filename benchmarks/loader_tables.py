"""The tables of the loader's results: a function for each subject, which `tables.py` calls."""

from collections.abc import Callable
from typing import Any

import record


def device_loader(result: dict[str, Any]) -> str:
    """Render the workloads: the floor, the fastest peer, torchfast, and how much of the transfer it hid."""
    lines = ["| step, source | resident | best peer | torchfast | hidden |", "|---|---:|---|---:|---:|"]
    for (workload, source), rows in _cells(result, "workload", "source").items():
        resident, ours, best = _three(rows)
        lines.append(
            f"| {workload}, {source} | {resident['step_ms']:.4g} ms "
            f"| {best['step_ms']:.4g} ms ({best['peer']}) "
            f"| {ours['step_ms']:.4g} ms | {_efficiency(rows, '.0%')} |"
        )
    return "\n".join([*lines, "", record.source(result), ""])


def loader_small(result: dict[str, Any]) -> str:
    """Render small batches: torchfast's step and the fastest peer's, loop by loop."""
    loops = list(dict.fromkeys(row["loop"] for row in result["rows"]))
    lines = [f"| tensors | bytes of each | source | {' | '.join(loops)} |"]
    lines.append("|---:|---:|---|" + "---:|" * len(loops))
    cells = _cells(result, "n_leaves", "leaf_bytes", "source", "loop")
    for n_leaves, leaf_bytes, source in dict.fromkeys(where[:3] for where in cells):
        found = (_three(cells[n_leaves, leaf_bytes, source, loop]) for loop in loops)
        texts = [f"{ours['step_ms']:.3g} / {best['step_ms']:.3g}" for _, ours, best in found]
        lines.append(f"| {n_leaves} | {leaf_bytes:,} | {source} | {' | '.join(texts)} |")
    return "\n".join([*lines, "", record.source(result), ""])


def loader_workers(result: dict[str, Any]) -> str:
    """Render loaders with workers: each peer's step, and the longest of its parts by itself."""
    lines = ["| `pin_memory` | work | loading | best peer | torchfast | ideal / torchfast |"]
    lines.append("|---|---:|---:|---|---:|---:|")
    for (is_pinned,), rows in _cells(result, "pin_memory").items():
        resident, ours, best = _three(rows)
        lines.append(
            f"| {is_pinned} | {resident['step_ms']:.4g} ms "
            f"| {ours['load_ms']:.4g} ms | {best['step_ms']:.4g} ms ({best['peer']}) "
            f"| {ours['step_ms']:.4g} ms | {ours['ideal_share']:.3f} |"
        )
    return "\n".join([*lines, "", record.source(result), ""])


def loader_loading(result: dict[str, Any]) -> str:
    """Render how fast batches of workers get to the GPU: the fastest peer's time for one, and ours."""
    lines = ["| batches, by 8 workers | MB | best peer | torchfast |", "|---|---:|---|---:|"]
    for (what,), rows in _cells(result, "batches").items():
        ours = rows.pop("torchfast")
        best = min(rows.values(), key=lambda row: float(row["step_ms"]))
        lines.append(
            f"| {what} | {ours['n_bytes'] / 1e6:.1f} | {best['step_ms']:.3g} ms ({best['peer']}) "
            f"| {ours['step_ms']:.3g} ms, {ours['n_bytes'] / ours['step_ms'] / 1e6:.2g} GB/s |"
        )
    return "\n".join([*lines, "", record.source(result), ""])


def loader_resnet50(result: dict[str, Any]) -> str:
    """Render the training step of ResNet-50, by how its images come."""
    lines = ["| images | loader | ms a step |", "|---|---|---:|"]
    lines += [f"| {row['source']} | {row['peer']} | {row['step_ms']:.4g} |" for row in result["rows"]]
    return "\n".join([*lines, "", record.source(result), ""])


def loader_host_time(result: dict[str, Any]) -> str:
    """Render what one `next` costs the loop's thread."""
    lines = ["| tensors in a batch | bytes of each | median | 99th percentile |", "|---:|---:|---:|---:|"]
    lines += [
        f"| {row['n_leaves']} | {row['leaf_bytes']:,} | {row['median_us']:.3g} µs | {row['p99_us']:.3g} µs |"
        for row in result["rows"]
    ]
    return "\n".join([*lines, ""])


def loader_sweep(result: dict[str, Any]) -> str:
    """Render torchfast against the fastest peer in each cell of the sweep, and how much it hides there."""
    cells = _cells(result, "source", "n_leaves", "consumer", "ratio")
    cells = {where: rows for where, rows in cells.items() if "torchfast" in rows}
    n_lost = sum(_is_lost(rows) for rows in cells.values())
    ours = [rows["torchfast"] for rows in cells.values()]
    n_ideal = sum(row["step_ms"] <= 1.02 * row["ideal_ms"] + 0.05 for row in ours)
    slower = (
        f"Of {len(cells)} cells, {n_lost} are slower by more than 2 % and 50 µs (bold); "
        f"in {n_ideal} a step takes at most 1.02 x ideal + 50 µs."
    )
    hidden = (
        "Overlap efficiency in the same runs: 1 where a step takes as long as the longest of its parts, 0 "
        "where it takes as long as all of them; - where it takes longer, since copying from pageable memory, "
        "and the calls for hundreds of tensors, are not among the parts that are known."
    )
    tables = [_swept(cells, _over_best), slower, _swept(cells, _efficiency), hidden, record.source(result)]
    return "\n\n".join(tables) + "\n"


def _cells(result: dict[str, Any], *names: str) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Return the rows of each cell by their peers; a cell is what rows have in common under these names."""
    cells: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in result["rows"]:
        cells.setdefault(tuple(row[name] for name in names), {})[row["peer"]] = row
    return cells


def _swept(cells: dict[tuple[Any, ...], dict[str, Any]], text: Callable[[dict[str, Any]], str]) -> str:
    ratios = sorted({where[3] for where in cells})
    lines = ["| source | tensors | loop | " + " | ".join(f"{ratio:g}" for ratio in ratios) + " |"]
    lines.append("|---|---:|---|" + "---:|" * len(ratios))
    for line in dict.fromkeys(where[:3] for where in cells):
        texts = [text(cells[*line, ratio]) if (*line, ratio) in cells else "" for ratio in ratios]
        lines.append(f"| {line[0]} | {line[1]} | {line[2]} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def _is_lost(rows: dict[str, dict[str, Any]]) -> bool:
    _, ours, best = _three(rows)
    return bool(ours["step_ms"] > best["step_ms"] + max(0.02 * best["step_ms"], 0.05))


def _over_best(rows: dict[str, dict[str, Any]]) -> str:
    _, ours, best = _three(rows)
    text = f"{ours['step_ms'] / best['step_ms']:.2f}"
    return f"**{text}**" if _is_lost(rows) else text


def _efficiency(rows: dict[str, dict[str, Any]], form: str = ".2f") -> str:
    efficiency = rows["torchfast"]["overlap_efficiency"]
    return f"{efficiency:{form}}" if efficiency >= 0 else "-"


def _three(rows: dict[str, dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Return the rows of the resident batch, of torchfast, and of the best of the others."""
    others = [row for name, row in rows.items() if name not in ("resident", "torchfast")]
    return rows["resident"], rows["torchfast"], min(others, key=lambda row: float(row["step_ms"]))


def loader_reliability(result: dict[str, Any]) -> str:
    """Render how many numbered batches were handed out, and how many were wrong; then the other counts."""
    counted = [row for row in result["rows"] if "peer" in row]
    ours = [row for row in counted if row["peer"] == "torchfast"]
    n_batches, n_wrong = (sum(row[key] for row in ours) for key in ("n_batches", "n_wrong"))
    lines = [
        "| loader | batches | source | GPU was behind | handed out | wrong |",
        "|---|---|---|---:|---:|---:|",
        *[
            f"| {row['peer']} | {row['shape']} | {row['source']} | {row['gpu_was_behind']:.0%} "
            f"| {row['n_batches']:,} | {row['n_wrong']:,} |"
            for row in counted
        ],
        f"| torchfast | all | | | {n_batches:,} | {n_wrong:,} |",
        "",
        "| counted beside them | times | wrong |",
        "|---|---:|---:|",
        *[f"| {_counted(row)} | {row['n_wrong']:,} |" for row in result["rows"] if "peer" not in row],
    ]
    return "\n".join([*lines, "", record.source(result).replace("Medians", "Counted", 1), ""])


def _counted(row: dict[str, Any]) -> str:
    """Render what was counted beside numbered batches, and how often."""
    if row["part"] == "memory":
        most = row["reserved_bytes_most"] / row["batch_bytes"]
        what = f"epochs, {row['source']}, depth {row['depth']}: {most:g} batches reserved, in each"
        return f"{what} | {row['n_epochs']:,}"
    if row["part"] == "breaks":
        options = ", ".join(f"`{name}={value}`" for name, value in row["options"].items())
        return f"early breaks with persistent workers{options and ', ' + options} | {row['n_breaks']:,}"
    if row["part"] == "faults":
        return f"errors: {row['fault']} | {row['n_faults']:,}"
    return f"ends of the interpreter in the middle of a pass | {row['n_exits']:,}"


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "device_loader": device_loader,
    "loader_host_time": loader_host_time,
    "loader_loading": loader_loading,
    "loader_reliability": loader_reliability,
    "loader_resnet50": loader_resnet50,
    "loader_small": loader_small,
    "loader_sweep": loader_sweep,
    "loader_worker_sweep": loader_sweep,
    "loader_many_by_workers": loader_sweep,
    "loader_workers": loader_workers,
}
"""What renders the result file of each subject."""
