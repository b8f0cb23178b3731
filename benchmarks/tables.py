"""Writes the tables of README and docs from the result files: `python benchmarks/tables.py [--check]`.

A table stands between `<!-- table: SUBJECT -->` and `<!-- end -->`; SUBJECT names the result file
(`results/SUBJECT_*.json`, the newest by name) and the function, below or in `loader_tables.py`, that renders
its rows.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import loader_tables
import record

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
    return PLACE.sub(lambda found: found[1] + _table(found[2]) + found[3], page.read_text())


def _table(subject: str) -> str:
    result = newest(subject)
    return "Not measured yet.\n" if result is None else TABLES[subject](result)


def newest(subject: str) -> dict[str, Any] | None:
    """Return the newest result of a subject, if there is one."""
    paths = sorted(
        (ROOT / "benchmarks" / "results").glob(f"{subject}_*_[0-9]*.json"), key=lambda p: p.stem[-6:]
    )
    return json.loads(paths[-1].read_text()) if paths else None


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
        row = [_speed(cells[name, size]) if (name, size) in cells else "not measured" for size in sizes]
        lines.append(f"| {name} | " + " | ".join(row) + " |")
    return "\n".join([*lines, "", record.source(result), ""])


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
    """Render what became of the same failing training under each, one table a case."""
    lines = []
    for case in dict.fromkeys(row["case"] for row in result["rows"]):
        titles = "batch | steps | samples computed | batch norm counted | random state | loss differs by"
        lines += [f"| {case} | {titles} |", "|---|---|---:|---:|---:|---|---:|"]
        lines += [_beside(row) for row in result["rows"] if row["case"] == case]
        lines.append("")
    versions = {row["way"].split()[0]: row["without_fault"]["version"] for row in result["rows"]}
    named = ", ".join(f"{way} {version}" for way, version in versions.items() if "oom_guard" not in way)
    return "\n".join([*lines, record.source(result).replace("Medians", "Run", 1), f"With {named}.", ""])


def _beside(row: dict[str, Any]) -> str:
    bare = row["without_fault"]
    if "error" in row:
        return f"| {row['way']} | the training ended with `{row['error'].split(':')[0]}` | | | | | |"
    parts = "" if row["micro_batch_size"] is None else f" in parts of {row['micro_batch_size']}"
    counted = row["n_batches_in_statistics"]
    random = {True: "the same", False: "another", None: ""}[row.get("same_random_state")]
    cells = [
        f"{row['batch_size']}{parts}",
        f"{row['n_steps']} for {bare['n_steps']}",
        f"{row['n_samples']} for {bare['n_samples']}",
        "" if counted is None else f"{counted} for {bare['n_batches_in_statistics']}",
        random,
        f"{row['loss_differs_by']:.2g}",
    ]
    return f"| {row['way']} | " + " | ".join(cells) + " |"


def oom_guard_ranks(result: dict[str, Any]) -> str:
    """Render how many faults two ranks went through over each backend, and what they left behind."""
    titles = "faults, real / injected|hung|longest step|unlike the other rank|unlike without faults"
    lines = [f"| ranks over | {titles.replace('|', ' | ')} |", "|---|---:|---:|---:|---:|---:|"]
    for row in result["rows"]:
        n_real = sum(n for kind, n in row["faults"].items() if kind.startswith("real"))
        n_tensors = row["n_tensors"]
        lines.append(
            f"| {row['backend']} | {n_real} / {row['n_faults'] - n_real} | {row['n_hanging']} "
            f"| {row['longest_step_s']:.1f} s | {row['n_different_across_ranks']} of {n_tensors} tensors "
            f"| {row['n_different_from_no_faults']} of {n_tensors} tensors |"
        )
    return "\n".join([*lines, "", record.source(result).replace("Medians", "Run", 1), ""])


def oom_guard_overhead(result: dict[str, Any]) -> str:
    """Render what the guard costs while nothing fails: in steps, on the host, and entering a block."""
    lines = ["| a ResNet-50 step | bare | guarded | guarded / bare, with its 95 % interval |"]
    lines.append("|---|---:|---:|---:|")
    for row in (row for row in result["rows"] if row["part"] == "steps"):
        ratio = f"{row['ratio']:.3f} ({row['ratio_low']:.3f} to {row['ratio_high']:.3f})"
        steps = f"{row['bare_ms']:.4g} ms | {row['median_ms']:.4g} ms"
        lines.append(f"| {row['step']}: {row['way']} | {steps} | {ratio} |")
    timed = (row for row in result["rows"] if "median_us" in row)
    us = {(row["part"], row["way"]): f"{row['median_us']:.3g}" for row in timed}
    copy_bytes = next(row["copy_bytes"] for row in result["rows"] if row["part"] == "copy")
    guard = "oom_guard(), "
    more = [
        f"`with oom_guard():` takes {us['entering', guard + 'an empty block']} µs back to back,",
        f"{us['entering', guard + 'a block that binds four names']} µs where the block binds four names",
        f"(`with nullcontext():` {us['entering', 'nullcontext()']} µs). Once a step, with the caches that",
        f"the rest of the step leaves, it takes {us['in place', 'oom_guard()']} µs",
        f"(`with nullcontext():` {us['in place', 'nullcontext()']} µs). A retry's own calls take",
        f"{us['host', 'retry']} µs of the host's time a step, {us['host', 'retry, copy=True']} µs with",
        f"`copy=True`; the copy takes {copy_bytes / 2**20:.0f} MiB here.",
    ]
    return "\n".join([*lines, "", " ".join(more), "", record.source(result), ""])


def vram_accuracy(result: dict[str, Any]) -> str:
    """Render the errors of the estimate by kind of model, and the safe bound."""
    summary = result["summary"]
    lines = [
        "| models | runs | allocated | reserved | process |",
        "|---|---:|---:|---:|---:|",
    ]
    for family, words in (("dense", "transformers, MLPs"), ("conv", "five convolutions and more")):
        found = summary["families"][family]
        cells = [f"{found[f'{n}_median_pct']:.2f} % / {found[f'{n}_p95_pct']:.1f} %" for n in _SIZES]
        lines.append(f"| {words} | {found['n']} | " + " | ".join(cells) + " |")
    bound = (
        f"Error at the median / at the 95th percentile. The safe bound was too low for "
        f"{summary['safe_bound_under_pct']:.1f} % of the runs, and "
        f"{summary['safe_bound_over_median_pct']:.1f} % above the truth at the median; "
        f"an estimate took {summary['seconds_median']:.1f} s at the median."
    )
    source = f"torch {result['versions']['torch']}, {result['date']}: {result['protocol']}"
    return "\n".join([*lines, "", bound, "", f"{result['truth_gpu']}; {source}", ""])


_SIZES = ("allocated", "reserved", "process")


def vram_host_memory(result: dict[str, Any]) -> str:
    """Render by how much the process that estimates grows."""
    summary = result["summary"]
    source = f"{result['machine']['system']}, torch {result['versions']['torch']}, {result['date']}"
    return (
        f"{summary['grown_median_mib']:.0f} MiB at the median of {summary['n']} models, "
        f"{summary['grown_max_mib']:.0f} MiB at most ({source}: {result['protocol'].rstrip('.')}).\n"
    )


def vram_batch_size(result: dict[str, Any]) -> str:
    """Render the batches that were found, and which of the sizes around them ran."""
    lines = ["| model | limit | found | ran | ran out of memory |", "|---|---:|---:|---|---|"]
    for row in result["rows"]:
        sizes = {int(size): outcome["runs"] for size, outcome in row["tried"].items()}
        ran, failed = (", ".join(str(s) for s in sorted(sizes) if sizes[s] == runs) for runs in (True, False))
        lines.append(f"| {row['id']} | {row['limit_gib']} GiB | {row['batch_size']} | {ran} | {failed} |")
    gpu, torch_version = result["machine"]["gpu"], result["versions"]["torch"]
    source = f"One {gpu}, torch {torch_version}, {result['date']}: {result['protocol']}"
    return "\n".join([*lines, "", source, ""])


def monitor(result: dict[str, Any]) -> str:
    """Render what one call costs, and what a training step does beside each way of watching."""
    costs = {(row["what"], row["gpu"]): row["median_us"] for row in result["rows"] if row["kind"] == "cost"}
    states = list(dict.fromkeys(state for _, state in costs))
    lines = [f"| µs a call, the GPU being | {' | '.join(states)} |", "|---|" + "---:|" * len(states)]
    for what in dict.fromkeys(what for what, _ in costs):
        cells = [f"{costs[what, state]:.3g}" for state in states]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    steps = {(row["what"], row["workload"]): row for row in result["rows"] if row["kind"] == "step"}
    workloads = list(dict.fromkeys(workload for _, workload in steps))
    lines += ["", f"| beside a training step | {' | '.join(workloads)} |", "|---|" + "---:|" * len(workloads)]
    for what in dict.fromkeys(what for what, _ in steps):
        ratios = [f"{steps[what, workload]['ratio']:.3f}" for workload in workloads]
        lines.append(f"| {what} | {' | '.join(ratios)} |")
    return "\n".join([*lines, "", record.source(result), ""])


def teacher_forward(result: dict[str, Any]) -> str:
    """Render the ways to run a teacher: alone, in a distillation step, and how far outputs move."""
    lines = [
        "| teacher | batch | alone | a step | efficiency | outputs move by |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row['name']} | {row['batch_size']} | {row['median_ms']:.4g} ms | {row['step_median_ms']:.4g} ms "
        f"| {row['efficiency']:.2f} | {row['largest_move']:.1%} |"
        for row in result["rows"]
    ]
    floors = {row["batch_size"]: row["step_without_teacher_ms"] for row in result["rows"]}
    floor = ", ".join(f"{ms:.4g} ms at batch {size}" for size, ms in floors.items())
    return "\n".join([*lines, "", f"Without a teacher a step takes {floor}.", "", record.source(result), ""])


def teacher_loading(result: dict[str, Any]) -> str:
    """Render what loading a teacher takes of the host at most."""
    lines = ["| file | loaded with | host peak | time |", "|---|---|---:|---:|"]
    for row in result["rows"]:
        peak_mib = row["host_peak_bytes"] / 2**20
        lines.append(f"| .{row['suffix']} | {row['name']} | {peak_mib:.0f} MiB | {row['seconds']:.1f} s |")
    where = result["machine"]["gpu"] or f"{result['machine']['cpu_cores']} CPU cores"
    source = f"One run each on {where}, torch {result['versions']['torch']}, {result['date']}."
    return "\n".join([*lines, "", source, ""])


def _speed(row: dict[str, Any]) -> str:
    return f"{row['samples_per_s']:,.0f} ({row['median_ms']:,.4g})"


def _put(page: Path, text: str) -> bool:
    if "--check" not in sys.argv:
        page.write_text(text)
    return True


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    **loader_tables.TABLES,
    "distillation": distillation,
    "monitor": monitor,
    "oom_guard_faults": oom_guard_faults,
    "oom_guard_overhead": oom_guard_overhead,
    "oom_guard_ranks": oom_guard_ranks,
    "oom_guard_recognition": oom_guard_recognition,
    "oom_guard_side_by_side": oom_guard_side_by_side,
    "teacher_forward": teacher_forward,
    "teacher_loading": teacher_loading,
    "vram_accuracy_blind": vram_accuracy,
    "vram_accuracy_first": vram_accuracy,
    "vram_accuracy_known": vram_accuracy,
    "vram_host_memory": vram_host_memory,
    "vram_batch_size": vram_batch_size,
}

if __name__ == "__main__":
    raise SystemExit(main())
