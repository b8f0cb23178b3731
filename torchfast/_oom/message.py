"""The words: what an out-of-memory error is about and what to do, for people who want to go on working."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from torchfast._bytes import format_bytes
from torchfast._oom.frames import Findings
from torchfast._oom.report import OutOfMemoryReport, SizeSource
from torchfast._oom.telemetry import Suggestion
from torchfast._oom_errors import Kind, OutOfMemoryRecord


class Case(NamedTuple):
    """All that is known of a failure, for the message."""

    record: OutOfMemoryRecord
    device: torch.device
    findings: Findings
    batch_size: int | None
    batch_size_source: SizeSource | None
    suggestion: Suggestion
    growth_bytes: int
    place: str
    traceback: str
    status: Mapping[str, Any] | None


_WHAT: dict[Kind, str] = {
    "device": "Out of memory on {device}",
    "library": "Out of memory on {device}, outside PyTorch's allocator",
    "pinned": "Out of page-locked host memory",
    "host": "Out of host memory",
    "shared_memory": "The DataLoader's workers ran out of shared memory (/dev/shm)",
    "communicator": "NCCL ran out of memory on {device}",
    "address_space": "Out of virtual addresses for expandable segments on {device}",
    "too_large": "One tensor is larger than {device} can hold in one piece",
    "impossible": "A tensor larger than any machine was asked for",
}
_PHASES = {
    "forward": "the forward pass",
    "backward": "the backward pass",
    "optimizer": "the optimizer's step",
}

# What to do where the batch size is not the answer.
_INSTEAD: dict[Kind, str] = {
    "pinned": "Lock fewer pages: lower the DataLoader's num_workers or prefetch_factor, or set "
    "pin_memory=False.",
    "shared_memory": (
        "Give the container more (docker run --shm-size=8g, or --ipc=host), or lower num_workers or "
        "prefetch_factor."
    ),
    "communicator": (
        "Its process group cannot be used any more: restart the job and leave NCCL room with "
        "torch.cuda.set_per_process_memory_fraction(0.95)."
    ),
    "address_space": "A smaller batch does not help: try PYTORCH_ALLOC_CONF=expandable_segments:False.",
    "impossible": "That is a mistake in a shape or an index, not a lack of memory: see the line that failed.",
}


def report(case: Case) -> OutOfMemoryReport:
    """Return the report of a failure, with its texts."""
    short = _message(case)
    by_size = _depends_on_batch(case)
    return OutOfMemoryReport(
        message=short,
        details=_details(case, short),
        record=case.record,
        suggested_batch_size=case.suggestion.batch_size if by_size else None,
        batch_size=case.batch_size,
        batch_size_source=case.batch_size_source,
        phase=case.findings.phase,
        traceback=case.traceback,
        status=case.status,
    )


def _depends_on_batch(case: Case) -> bool:
    return case.record.kind not in _INSTEAD and case.findings.phase != "optimizer"


def _message(case: Case) -> str:
    where = f" in {_PHASES[case.findings.phase]}" if case.findings.phase else ""
    # A text may not name its device, and a machine without a GPU may read one from elsewhere.
    device = "the device" if case.device.type == "cpu" else case.device
    what = _WHAT[case.record.kind].format(device=device) + where
    return "\n".join([f"{what}. {_first(case)}", *_numbers(case.record), *_advice(case)])


def _numbers(record: OutOfMemoryRecord) -> list[str]:
    """Say what was asked for and what was there."""
    if record.requested_bytes is None:
        return []
    text = f"{format_bytes(record.requested_bytes)} were asked for"
    if record.allowed_bytes is not None and record.reserved_bytes is not None:
        text += f"; of the {format_bytes(record.allowed_bytes)} that this process may use, PyTorch holds "
        text += format_bytes(record.reserved_bytes)
    elif record.free_bytes is not None and record.total_bytes is not None:
        text += f", {format_bytes(record.free_bytes)} of {format_bytes(record.total_bytes)} were free"
        if record.reserved_bytes is not None:
            text += f"; PyTorch holds {format_bytes(record.reserved_bytes)} in this process"
    return [f"{text}."]


def _details(case: Case, short: str) -> str:
    record = case.record
    numbers = [
        ("asked for", record.requested_bytes),
        ("free", record.free_bytes),
        ("in all", record.total_bytes),
        ("PyTorch's tensors", record.allocated_bytes),
        ("PyTorch's cache and tensors", record.reserved_bytes),
        ("private pools (CUDA graphs)", record.private_pool_bytes),
        ("limit set by the process", record.allowed_bytes),
        ("other processes", record.other_processes_bytes),
    ]
    known = [f"{name}: {format_bytes(n_bytes)}" for name, n_bytes in numbers if n_bytes is not None]
    status = [f"monitor: {case.status}"] if case.status is not None else []
    place = [f"at {case.place}"] if case.place else []
    return "\n".join([short, "", *known, *status, *place, "", record.text])


def _first(case: Case) -> str:
    if case.record.kind in _INSTEAD:
        return _INSTEAD[case.record.kind]
    if case.findings.phase == "optimizer":
        return "What the step needs there does not depend on the batch."
    suggestion = case.suggestion
    if suggestion.batch_size is None:
        return suggestion.reason
    text = f"Try batch_size={suggestion.batch_size} instead of {case.batch_size}: {suggestion.reason}"
    if case.batch_size_source == "guess":
        text += (
            f" (That it was {case.batch_size} is a guess: the leading dimension most common among the "
            "tensors of the code that failed. Give batch_size=, or loop over guard.steps(loader).)"
        )
    return text


def _advice(case: Case) -> list[str]:
    record = case.record
    advice = []
    if record.kind in ("device", "library") and record.total_bytes:
        total = record.total_bytes
        if (others := record.other_processes_bytes or 0) > total // 20:
            advice.append(
                f"Other processes hold {format_bytes(others)} of the {format_bytes(total)}: "
                "nvidia-smi lists them, and ending those that are not needed helps at once."
            )
        unused = (record.reserved_bytes or 0) - (record.allocated_bytes or 0)
        if unused > max(record.requested_bytes or 0, total // 20):
            advice.append(
                f"{format_bytes(unused)} are held in pieces that do not fit: start with "
                "PYTORCH_ALLOC_CONF=expandable_segments:True."
            )
    if (pools := record.private_pool_bytes or 0) and record.total_bytes and pools > record.total_bytes // 20:
        advice.append(f"CUDA graphs keep {format_bytes(pools)} to themselves: capture fewer shapes.")
    if record.kind == "library":
        advice.append("Leave room for libraries: torch.cuda.set_per_process_memory_fraction(0.9).")
    if record.kind == "host":
        advice.append(
            "A DataLoader's workers hold batches too: fewer num_workers or a lower prefetch_factor help."
        )
    if case.growth_bytes > max(record.requested_bytes or 0, (record.total_bytes or 0) // 50):
        advice.append(
            f"{format_bytes(case.growth_bytes)} more are held between steps than at the start: "
            "something keeps tensors, such as a loss added up without .item()."
        )
    return advice or _generic(case)


def _generic(case: Case) -> list[str]:
    if case.record.kind not in ("device", "library"):
        return []
    if case.findings.phase == "optimizer":
        return ["An optimizer with fused=True or foreach=False needs less at its peak than the default."]
    return ["Without a smaller batch: bfloat16 autocast or activation checkpointing need less for a step."]
