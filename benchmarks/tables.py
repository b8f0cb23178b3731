"""Writes the tables of README and docs from the result files: `python benchmarks/tables.py [--check]`.

A table stands between `<!-- table: SUBJECT -->` and `<!-- end -->`; SUBJECT names the result file
(`results/SUBJECT_*.json`, the newest by name) and the function below that renders its rows.
"""

import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PLACE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> int:
    """Write every table, or with --check say which are out of date."""
    stale = [page for page in pages() if page.read_text() != (text := rendered(page)) and _put(page, text)]
    for page in stale:
        print(f"{page.relative_to(ROOT)}: {'out of date' if '--check' in sys.argv else 'written'}")
    return int(bool(stale) and "--check" in sys.argv)


def pages() -> list[Path]:
    """Return the pages that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def rendered(page: Path) -> str:
    """Return the text of a page with its tables made from the result files."""
    return PLACE.sub(lambda found: found[1] + TABLES[found[2]](newest(found[2])) + found[3], page.read_text())


def newest(subject: str) -> dict[str, Any]:
    """Return the newest result of a subject."""
    paths = sorted(
        (ROOT / "benchmarks" / "results").glob(f"{subject}_*_[0-9]*.json"), key=lambda p: p.stem[-6:]
    )
    result: dict[str, Any] = json.loads(paths[-1].read_text())
    return result


def distillation(result: dict[str, Any]) -> str:
    """Render samples/s of the distillation loop, one row a step of the ladder, one column a batch size."""
    sizes = sorted({row["batch_size"] for row in result["rows"]})
    names = list(dict.fromkeys(row["name"] for row in result["rows"]))
    cells = {(row["name"], row["batch_size"]): row for row in result["rows"]}
    lines = [
        "| loop | " + " | ".join(f"batch {size}: samples/s (ms a step)" for size in sizes) + " |",
        "|---|" + "---:|" * len(sizes),
    ]
    for name in names:
        row = [_speed(cells[name, size]) for size in sizes]
        lines.append(f"| {name} | " + " | ".join(row) + " |")
    return "\n".join([*lines, "", _source(result), ""])


def oom_guard_recognition(result: dict[str, Any]) -> str:
    """Render what each detector recognises, the best first."""
    rows = sorted(result["rows"], key=lambda row: (-row["n_recognised"], row["n_look_alikes_taken"]))
    lines = ["| detector | errors recognised | look-alikes taken for one |", "|---|---:|---:|"]
    for row in rows:
        found = f"{row['n_recognised']} of {row['n_texts']}"
        taken = f"{row['n_look_alikes_taken']} of {row['n_look_alikes']}"
        lines.append(f"| {row['detector']} | {found} | {taken} |")
    return "\n".join([*lines, ""])


def oom_guard_faults(result: dict[str, Any]) -> str:
    """Render how many faults were injected into each training, and how many left a trace."""
    lines = ["| training | faults in | faults | left a trace |", "|---|---|---:|---:|"]
    lines += [
        f"| {row['training']} | {row['what']} | {row['n_faults']:,} | {row['n_wrong']} |"
        for row in result["rows"]
    ]
    n_faults, n_wrong = (sum(row[key] for row in result["rows"]) for key in ("n_faults", "n_wrong"))
    return "\n".join([*lines, f"| all | | {n_faults:,} | {n_wrong} |", ""])


def oom_guard_side_by_side(result: dict[str, Any]) -> str:
    """Render what became of the same failing training under each."""
    lines = [
        "| under | optimizer steps | samples computed | largest difference of a weight |",
        "|---|---:|---:|---:|",
    ]
    lines += [
        f"| {row['way']} "
        f"| {row['n_optimizer_steps']} instead of {row['n_optimizer_steps_where_it_fits']} "
        f"| {row['n_samples_computed']} for {row['n_samples']} "
        f"| {row['largest_difference_of_a_weight']:.2g} |"
        for row in result["rows"]
    ]
    return "\n".join([*lines, ""])


def oom_guard_overhead(result: dict[str, Any]) -> str:
    """Render what the guard costs while nothing fails, with how much the steps scatter."""
    rows = {row["way"]: row for row in result["rows"]}
    lines = ["| a ResNet-50 step | ms | middle half of the samples | against bare |", "|---|---:|---:|---:|"]
    for way, row in rows.items():
        if "ratio" in row:
            low, _, high = statistics.quantiles(row["samples_ms"], n=4)
            lines.append(f"| {way} | {row['median_ms']:.4g} | {low:.1f} to {high:.1f} | {row['ratio']:.3f} |")
    copy_mib = rows["copy"]["copy_bytes"] / 2**20
    more = (
        f"`with oom_guard():` by itself takes {rows['entering']['median_us']:.2g} µs; "
        f"the copy takes {copy_mib:.0f} MiB here."
    )
    return "\n".join([*lines, "", more, "", _source(result), ""])


def _speed(row: dict[str, Any]) -> str:
    return f"{row['samples_per_s']:,.0f} ({row['median_ms']:,.4g})"


def _source(result: dict[str, Any]) -> str:
    machine, versions = result["machine"], result["versions"]
    return (
        f"Medians on one {machine['gpu']}, torch {versions['torch']}, {result['date']}: {result['protocol']}"
    )


def _put(page: Path, text: str) -> bool:
    if "--check" not in sys.argv:
        page.write_text(text)
    return True


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "device_loader": device_loader,
    "loader_reliability": loader_reliability,
    "distillation": distillation,
    "monitor": monitor,
    "oom_guard_faults": oom_guard_faults,
    "oom_guard_overhead": oom_guard_overhead,
    "oom_guard_recognition": oom_guard_recognition,
    "oom_guard_side_by_side": oom_guard_side_by_side,
    "teacher_forward": teacher_forward,
    "vram_accuracy": vram_accuracy,
    "vram_batch_size": vram_batch_size,
}

if __name__ == "__main__":
    raise SystemExit(main())
