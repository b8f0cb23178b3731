"""An estimate as a memory snapshot: the file that PyTorch's memory viewer opens."""

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchfast._bytes import MIB
from torchfast._estimate.text import LINES

if TYPE_CHECKING:
    from torchfast._estimate.events import Note
    from torchfast._estimate.report import VRAMEstimate

_SMALL_SEGMENT = 2 * MIB
# Where entries have categories, some versions of the viewer fail unless one of them is this.
_NO_CATEGORY = "unknown"
_VIEWERS_PROTOCOL = 4  # the newest that the viewer's own reader of pickles knows; Python 3.14 writes 5
Frames = list[dict[str, Any]]


def save_snapshot(estimate: "VRAMEstimate", path: str | Path) -> None:
    """Write the snapshot; see `VRAMEstimate.save_snapshot`."""
    Path(path).write_bytes(pickle.dumps(snapshot(estimate), protocol=_VIEWERS_PROTOCOL))


def snapshot(estimate: "VRAMEstimate") -> dict[str, Any]:
    """Return what `torch.cuda.memory._snapshot()` would after the run: its history, and what is left.

    The frames of an entry are not Python's: they say the operator, the module and the phase.
    """
    frames = [_frames(note) for note in estimate._trace.notes]
    return {
        "segments": _segments(estimate, frames),
        "device_traces": [list(_history(estimate, frames))],
        "allocator_settings": {"expandable_segments": estimate.settings.expandable_segments},
        "external_annotations": [],
    }


def _frames(note: "Note") -> Frames:
    """Put operator, module and phase where the viewers show function, file and line."""
    return [
        {"name": note.operator or note.category, "filename": note.module or "(no module)", "line": 0},
        {"name": note.phase, "filename": note.category, "line": 0},
    ]


def _history(estimate: "VRAMEstimate", frames: list[Frames]) -> Iterator[dict[str, Any]]:
    done = estimate._replay
    assert done is not None  # noqa: S101 -- estimate_of always gives one
    log = iter(done.segment_log)
    segment = next(log, None)
    sizes: dict[int, int] = {}
    series = zip(estimate._trace.events, done.addresses, strict=True)
    for i, (event, address) in enumerate(series, start=1):
        common = {"stream": 0, "time_us": i, "frames": frames[event.note]}
        while segment is not None and segment[0] == i:  # taken or given back within this call
            place = {"addr": segment[2], "size": segment[3], "category": _NO_CATEGORY}
            yield {"action": segment[1], **place, **common}
            segment = next(log, None)
        if event.size_bytes:
            sizes[event.block] = event.size_bytes
            line = LINES[estimate._trace.category(event)]  # the viewer colours by it, with a legend
            yield {"action": "alloc", "addr": address, "size": event.size_bytes, "category": line, **common}
        else:
            freed = {"addr": address, "size": sizes.pop(event.block), **common}
            yield {"action": "free_requested", **freed}
            yield {"action": "free_completed", **freed}


def _segments(estimate: "VRAMEstimate", frames: list[Frames]) -> list[dict[str, Any]]:
    """Return the segments that are held at the end, and the blocks in them."""
    live = sorted(_live_blocks(estimate, frames), key=lambda block: block["address"])
    result = []
    for address, size in _held(estimate):
        blocks = _with_gaps([b for b in live if address <= b["address"] < address + size], address, size)
        active = [block for block in blocks if block["state"] == "active_allocated"]
        result.append(
            {
                "device": 0,
                "address": address,
                "total_size": size,
                "allocated_size": sum(block["size"] for block in active),
                "active_size": sum(block["size"] for block in active),
                "requested_size": sum(block["requested_size"] for block in active),
                "stream": 0,
                "segment_type": "small" if size == _SMALL_SEGMENT else "large",
                "segment_pool_id": (0, 0),
                "is_expandable": estimate.settings.expandable_segments,
                "frames": [],
                "blocks": blocks,
            }
        )
    return result


def _live_blocks(estimate: "VRAMEstimate", frames: list[Frames]) -> Iterator[dict[str, Any]]:
    done = estimate._replay
    assert done is not None  # noqa: S101 -- as above
    events, before = estimate._trace.events, 0
    freed = {event.block for event in events if not event.size_bytes}
    for event, address, allocated in zip(events, done.addresses, done.allocated_bytes, strict=True):
        if event.size_bytes and event.block not in freed:
            yield {
                "address": address,
                "size": allocated - before,
                "requested_size": event.size_bytes,
                "state": "active_allocated",
                "frames": frames[event.note],
            }
        before = allocated


def _held(estimate: "VRAMEstimate") -> list[tuple[int, int]]:
    """Return address and size of what is held from the driver at the end; mapped neighbours are one."""
    done = estimate._replay
    assert done is not None  # noqa: S101 -- as above
    pieces: dict[int, int] = {}
    for _, action, address, size in done.segment_log:
        if action in ("segment_alloc", "segment_map"):
            pieces[address] = size
        else:
            _cut(pieces, address, size)
    if not estimate.settings.expandable_segments:
        return sorted(pieces.items())
    merged: list[tuple[int, int]] = []
    for address, size in sorted(pieces.items()):
        if merged and sum(merged[-1]) == address:
            merged[-1] = merged[-1][0], merged[-1][1] + size
        else:
            merged.append((address, size))
    return merged


def _cut(pieces: dict[int, int], address: int, size: int) -> None:
    """Take a range out of the pieces; it may span several and end within one."""
    for start, length in [*pieces.items()]:
        low, high = max(start, address), min(start + length, address + size)
        if low >= high:
            continue
        del pieces[start]
        if start < low:
            pieces[start] = low - start
        if high < start + length:
            pieces[high] = start + length - high


def _with_gaps(blocks: list[dict[str, Any]], address: int, size: int) -> list[dict[str, Any]]:
    """Fill the space between the live blocks of a segment with the free ones."""
    result: list[dict[str, Any]] = []
    position = address
    for block in blocks:
        if block["address"] > position:
            result.append(_free_block(position, block["address"] - position))
        result.append(block)
        position = block["address"] + block["size"]
    if position < address + size:
        result.append(_free_block(position, address + size - position))
    return result


def _free_block(address: int, size: int) -> dict[str, Any]:
    return {"address": address, "size": size, "requested_size": 0, "state": "inactive", "frames": []}
