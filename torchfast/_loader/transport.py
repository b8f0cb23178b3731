"""How a batch gets to a CUDA device, and when the memory it lies in is free again.

Three rules keep every batch whole, whatever the host and the GPU are doing:

1. Memory is allocated *on the consumer's stream*, mostly in the consumer's thread, and an event (the gate) is
   recorded there at once. Whatever used that memory before was enqueued earlier, so the copy stream, which
   waits for the gate, cannot overwrite anything that is still to be read.
2. The copy records an event, and the consumer's stream waits for it before the batch is handed out.
3. A batch belongs to whoever holds it, like any tensor of that stream: memory is reused when the last
   reference is gone, by the caching allocator and by its rules, `record_stream` included.

So the caching allocator is the ring of slots: it has `depth + 2` of them in steady state, and it alone
decides when one is free. A ring of our own would need to guess that from use counts, and could neither see
`record_stream` nor lend an idle slot to the model.

The host memory that copies read is held until the device is past them, by `shipment.py`.

A small batch may instead be copied as it is handed out, by the consumer's thread and on its stream, which
`turns.py` decides.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from torchfast._bytes import MIB
from torchfast._keeper import Keeper
from torchfast._layout import laid_out_like
from torchfast._loader.blanks import Blank, Blanks
from torchfast._loader.driver import current_raw_stream
from torchfast._loader.events import Events, Gate
from torchfast._loader.late import copied, moved, pinned, record_use
from torchfast._loader.modes import outside_inference_mode
from torchfast._loader.plan import Group, Plan, is_plain, tensor_on
from torchfast._loader.plans import Plans
from torchfast._loader.shipment import Shipment, hold_until_read, let_go_of_what_was_read
from torchfast._loader.staging import Staging
from torchfast._loader.stats import Moment, Span, Tally
from torchfast._loader.turns import Turns
from torchfast._tree import Structure, flatten

HERE_FROM_LEAVES = 16
"""Batches of fewer tensors, unless small, are always sent by the copying thread: `next` should be short."""


class Parcel:
    """One batch on its way: on the device, or with leaves that move by themselves when it is handed out."""

    __slots__ = ("batch", "blank", "has_late", "is_noted", "is_put_off", "n_bytes", "ready", "spans")

    def __init__(
        self, batch: Any, blank: Blank | None, ready: list[torch.cuda.Event], *, has_late: bool
    ) -> None:
        self.batch = batch
        self.blank = blank
        self.ready = ready
        self.has_late = has_late
        self.is_put_off = False
        """Whether it is `Unpacked`, and nothing of it was copied yet."""
        self.is_noted = False
        """Whether it is in the record of the pass."""
        self.spans: list[Span] = []
        self.n_bytes = 0


class Unpacked(NamedTuple):
    """A batch taken apart, and how it travels."""

    leaves: list[Any]
    structure: Structure
    plan: Plan


class CudaTransport:
    """Copies batches to one CUDA device on one stream of its own."""

    def __init__(  # noqa: PLR0913 - what the loader was told, all of it by name
        self,
        device: torch.device,
        depth: int,
        *,
        streams: Sequence[torch.cuda.Stream],
        borrows: bool,
        pins: bool,
        n_workers: int,
        poison: bool,
    ) -> None:
        self._device = device
        self._poison = poison
        self._events = Events()
        self._blanks = Blanks(device, self._events)
        self._staging = Staging(depth, n_workers)
        self._streams = tuple(streams)
        self._borrows = borrows
        self._pins = pins
        self._copy_stream = torch.cuda.Stream(device)
        self._consumer = self._loading = torch.cuda.current_stream(device)
        self._owners = {self._consumer.cuda_stream: self._consumer}
        self._asked: Gate | None = None
        """Where the loop came for the batch that is to be delivered, until the record knows of it."""
        self._tally = Tally()
        self._plans = Plans()
        self._borrowed: torch.cuda.Event | None = None
        self._is_light = self._is_loops_turn = False
        """Whether the last batch took so little work that the loop might bring the next; whether it does."""
        self._turns = Turns(depth)

    # In the consumer's thread.

    def begin(self, tally: Tally) -> None:
        """Begin a pass, which `tally` counts."""
        self._tally = tally
        self._turns.begin()
        self._staging.begin()
        self._follow_stream()

    def follow(self, now_s: float, /) -> None:
        """Note that the loop comes for a batch: on which stream, and whether it has the turn."""
        self._follow_stream()
        if not self._is_light:
            self._turns.pause()
        self._is_loops_turn = self._is_light and self._turns.is_here(now_s)

    def _follow_stream(self) -> None:
        """Take the calling thread's current stream as the one that consumes the batches."""
        stream = current_raw_stream(self._device)
        if stream and torch.cuda.is_current_stream_capturing():  # the default stream, 0, cannot be captured
            raise RuntimeError(
                "a DeviceLoader was asked for a batch while a CUDA graph was being captured: the graph would "
                "read that batch's memory at each replay. Take batches outside, into the tensors that the "
                "graph reads: DeviceLoader(..., into=static_batch)."
            )
        if stream != self._consumer.cuda_stream:
            self._consumer = self._owners[stream] = torch.cuda.current_stream(self._device)

    def blank(self) -> Blank | None:
        """Set memory aside for a batch like the recent ones; None where there is no telling, or no room."""
        blank = self._blanks.set_aside(self._consumer)
        self._asked = blank.gate
        if self._poison:
            return self._blanks.rested(blank, self._copy_stream)
        return blank if blank.buffers else None

    def deliver(self, parcel: Parcel, *, came_at_once: bool) -> Any:
        """Return the batch; the current stream has then waited for its copy.

        Where nothing took time since the loop asked, and the copy is over by now, the batch was there: asking
        takes a tenth of what it takes to wait for the copy and to mark when it is over.
        """
        stream = self._consumer
        was_there = came_at_once and not parcel.has_late and all(event.query() for event in parcel.ready)
        if not was_there:
            for event in parcel.ready:
                stream.wait_event(event)
        blank = parcel.blank
        if blank is not None and (self._streams or blank.stream is not stream):
            for buffer in blank.buffers:
                for other in (stream, *self._streams):
                    buffer.record_stream(other)
        if parcel.is_put_off:
            return self._copied_late(parcel)
        batch = _map_leaves(self._moved, parcel.batch) if parcel.has_late else parcel.batch
        self._note(parcel, parcel.spans, None if was_there else self._events.mark(stream))
        return batch

    def _copied_late(self, parcel: Parcel) -> Any:
        """Copy a batch that was put off, and hold what the device is still to read of its memory."""
        leaves, structure, _ = parcel.batch
        began = self._events.mark(self._consumer)
        with outside_inference_mode():
            copies = [self._moved(leaf) for leaf in leaves]
        there = self._events.mark(self._consumer)
        # PyTorch holds what it pinned itself, but does not know of memory that others pinned.
        if sources := [leaf for leaf in leaves if leaf.is_pinned()]:
            hold_until_read(there, self._consumer, sources)
        self._note(parcel, [(began, there)], there)
        return structure.rebuild(copies)

    def _note(self, parcel: Parcel, spans: list[Span], there: torch.cuda.Event | None) -> None:
        """Note a batch in the record of the pass, once: after an interrupt it may be delivered again."""
        asked = self._asked
        if parcel.is_noted or asked is None:
            return
        moment = (Moment(asked, there or asked.event, spans, parcel.n_bytes),)
        tally = self._tally
        tally.moments += moment
        # Neither batch nor gate is in two moments: no call comes in between, which an interrupt could follow.
        parcel.is_noted, self._asked = True, None

    def _moved(self, leaf: Any) -> Any:
        """Move a leaf as it is handed out. What the loader put on the device, it allocated in the thread."""
        leaf = moved(leaf, self._device)
        for stream in self._streams:
            record_use(leaf, stream)
        if self._consumer != self._loading:
            record_use(leaf, self._consumer)
        return leaf

    def evict(self, parcel: Parcel) -> None:
        """Bring a batch that nobody has seen yet back to the host, and free its device memory."""
        if parcel.blank is None:
            return
        for event in parcel.ready:
            event.synchronize()
        ours = {buffer.untyped_storage().data_ptr() for buffer in parcel.blank.buffers}

        def to_host(leaf: Any) -> Any:
            has_storage = type(leaf) is torch.Tensor and leaf.layout is torch.strided  # sparse ones have none
            return leaf.cpu() if has_storage and leaf.untyped_storage().data_ptr() in ours else leaf

        parcel.batch = _map_leaves(to_host, parcel.batch)
        parcel.blank, parcel.spans, parcel.ready, parcel.has_late = None, [], [], True
        parcel.n_bytes = 0

    def is_sent_here(self) -> bool:
        """Say whether the consumer's thread had better send the next batch than the copying thread."""
        return self._is_loops_turn

    def send_here(self, batch: Any, blank: Blank | None) -> Parcel | None:
        """Send a batch from the consumer's thread; None for one that only the other thread may send."""
        began_s = time.perf_counter()
        with outside_inference_mode():
            unpacked = self._unpacked(batch)
            if not self._is_little_work(unpacked.plan):
                return None
            parcel = self._send(unpacked, blank)
        self._tally.stage_s += time.perf_counter() - began_s
        return parcel

    # In the copying thread.

    def enter_thread(self) -> None:
        """Make the thread work for the device and the stream of the consumer: both belong to a thread."""
        torch.cuda.set_device(self._device)
        self._loading = self._consumer
        torch.cuda.set_stream(self._loading)
        self._staging.enter_thread()

    def leave_thread(self) -> None:
        """Let go of what the thread has beside it."""
        self._staging.leave_thread()

    def settle(self) -> None:
        """Give back the last batch's memory, or wait until it was read: the next may go to the same place."""
        self._staging.settle()
        if self._borrowed is not None:
            self._borrowed.synchronize()
            self._borrowed = None
        self._tally.read_in_turn()
        # Taken first: what another thread counts meanwhile may still guard memory behind the letting go.
        counted = self._tally.take_counted()
        let_go_of_what_was_read()
        for moment in counted:
            self._events.give_back(moment.reusable())

    def send(self, batch: Any, blank: Blank | None) -> Parcel:
        """Start the copies of one batch, into `blank` if it fits."""
        began_s, waited_s = time.perf_counter(), self._staging.waited_s
        parcel = self._send(self._unpacked(batch), blank)
        self._tally.stage_s += time.perf_counter() - began_s - (self._staging.waited_s - waited_s)
        return parcel

    def _unpacked(self, batch: Any) -> Unpacked:
        leaves, structure = flatten(batch, keep=Keeper() if self._borrows else None)
        return Unpacked(leaves, structure, self._plans.plan(leaves))

    def _send(self, unpacked: Unpacked, blank: Blank | None) -> Parcel:
        leaves, structure, plan = unpacked
        if self._is_loops_turn and self._is_small(plan):
            return self._put_off(unpacked)
        ready = []
        if plan.n_late:
            leaves = [leaf if is_plain(leaf) else self._kept(leaf) for leaf in leaves]
            # What the loader itself put on the device, it enqueued on this thread's current stream.
            ready.append(torch.cuda.current_stream(self._device).record_event())
        if not plan.buffer_layouts:
            batch = structure.rebuild(leaves)
            if not leaves and self._pins:
                batch = pinned(batch)  # an object of the user's own that is all of the batch
            self._is_light = False
            return Parcel(batch, None, ready, has_late=plan.n_late > 0)
        try:
            blank = self._blanks.fitting(blank, plan, self._consumer)
        except torch.OutOfMemoryError:
            # The loader may write its next batch into the same host memory: keep a copy.
            return Parcel(structure.rebuild([*map(copied, leaves)]), None, ready, has_late=True)
        try:
            shipment = self._copy(leaves, plan, blank)
            parcel = Parcel(structure.rebuild(leaves), blank, ready, has_late=plan.n_late > 0)
            self._is_light = self._is_little_work(plan) and shipment.staged_bytes < MIB
        except BaseException:
            self.fence()
            raise
        if shipment.spans:
            _, ended = shipment.spans[-1]  # one stream: the last copy ends last
            ready.append(ended)
        parcel.spans, parcel.n_bytes = shipment.spans, plan.n_bytes
        return parcel

    def _is_little_work(self, plan: Plan) -> bool:
        """Say whether the loop's thread may send such a batch, as far as its plan tells."""
        return self._is_small(plan) or (not plan.n_late and plan.n_leaves >= HERE_FROM_LEAVES)

    def _is_small(self, plan: Plan) -> bool:
        """Say whether a batch may be copied late. Memory that is not ours could not show a late read."""
        return plan.is_small and not self._poison

    def _put_off(self, unpacked: Unpacked) -> Parcel:
        """Leave the copies to the delivery, which needs no memory set aside."""
        leaves, structure, plan = unpacked
        self._is_light = True
        self._blanks.expect_none()
        leaves = [*map(copied, leaves)] if self._borrows else leaves
        parcel = Parcel(Unpacked(leaves, structure, plan), None, [], has_late=False)
        parcel.is_put_off, parcel.n_bytes = True, plan.n_bytes
        return parcel

    def _kept(self, leaf: Any) -> Any:
        """Return what will move by itself, out of reach of the loader, which may use its memory again."""
        leaf = copied(leaf) if self._borrows else leaf
        return pinned(leaf) if self._pins else leaf

    def _copy(self, leaves: list[Any], plan: Plan, blank: Blank) -> Shipment:
        """Replace the plain leaves by their copies, and start these: first what is pinned, in one call."""
        self._copy_stream.wait_event(blank.gate.event)
        blank.gate.is_needed = False
        shipment = Shipment(self._copy_stream, self._events.mark)
        targets = [
            buffer if layout == wanted else tensor_on(buffer, wanted)
            for buffer, layout, wanted in zip(blank.buffers, blank.layouts, plan.buffer_layouts, strict=True)
        ]
        if plan.groups:
            packed = targets[0]
            for group, copies in zip(plan.groups, plan.packed_on(packed), strict=True):
                self._copy_group(leaves, group, packed, copies, shipment)
        pageable, is_pinned = [], False
        large_targets = targets[1:] if plan.groups else targets
        for index, target in zip(plan.large, large_targets, strict=True):
            source = laid_out_like(leaves[index], target) if index in plan.loose else leaves[index]
            leaves[index] = target
            # A pageable leaf among others that are pinned is slow to copy, not wrong.
            is_pinned = source.is_pinned() if index in plan.probes else is_pinned
            if is_pinned:
                shipment.add(target, source)
            else:
                pageable.append((source, target))
        shipment.enqueue()
        if self._borrows and shipment.reads_directly:
            _, self._borrowed = shipment.spans[-1]
        self._staging.stage(pageable, shipment)
        return shipment

    def _copy_group(
        self,
        leaves: list[Any],
        group: Group,
        packed: torch.Tensor,
        copies: Sequence[torch.Tensor],
        shipment: Shipment,
    ) -> None:
        originals = [leaves[index] for index in group.indexes]
        if group.may_go_straight and all(leaves[index].is_pinned() for index in group.probes):
            shipment.add_group(copies, originals, group)
        elif group.n_bytes:
            self._staging.pack(group, originals, packed, shipment)
        for index, copy in zip(group.indexes, copies, strict=True):
            leaves[index] = copy

    # In either.

    def fence(self) -> None:
        """Let the streams that own memory wait for all copies so far: then memory may be let go unseen.

        What was handed out has been waited for. Anything else that is dropped while its copy is under way
        would give the allocator memory that is still to be written.
        """
        for stream in list(self._owners.values()):
            stream.wait_stream(self._copy_stream)
        let_go_of_what_was_read()


def _map_leaves(change: Callable[[Any], Any], batch: Any) -> Any:
    leaves, structure = flatten(batch)
    return structure.rebuild([change(leaf) for leaf in leaves])
