"""What an estimate says: sums that add up, a table, a picture, a plot, a snapshot, one line for the log."""

import pickle
import pickletools
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.cuda import _memory_viz

from tests.traces import estimate, training
from torchfast._bytes import GIB, MIB
from torchfast._estimate import calibrate
from torchfast._estimate.events import CATEGORIES, Event, Note, Trace
from torchfast._estimate.gpus import GPU, GPU_NAMES, MeasuredContext, calibration_file, resolve_gpu
from torchfast._estimate.picture import COLOURS, nice_step, points
from torchfast._estimate.report import Subject, estimate_of
from torchfast._estimate.settings import AllocatorSettings
from torchfast._estimate.snapshot import snapshot
from torchfast._estimate.text import LINES


def test_peaks_stand_in_order() -> None:
    """Requested, allocated, reserved, process and safe bound never decrease in this order."""
    e = estimate()
    assert 0 < e.peak_requested_bytes <= e.peak_allocated_bytes <= e.peak_reserved_bytes
    assert e.peak_reserved_bytes < e.peak_process_bytes < e.safe_bytes


@given(batch_size=st.integers(1, 200), expandable=st.booleans())
def test_breakdown_adds_up(batch_size: int, expandable: bool) -> None:  # noqa: FBT001  # drawn by hypothesis
    """The lines of the breakdown sum to the peak of the process, to the byte, and none is negative."""
    e = estimate_of(
        training(batch_size),
        gpu=resolve_gpu("T4"),
        subject=Subject("Made"),
        settings=AllocatorSettings(expandable_segments=expandable),
    )
    assert sum(e.breakdown.values()) == e.peak_process_bytes
    assert min(e.breakdown.values()) >= 0


def test_every_category_has_a_line_and_a_colour() -> None:
    """No category of block can fall out of the table or the picture."""
    assert tuple(LINES) == CATEGORIES
    assert set(COLOURS) == {*LINES.values(), "rounding", "fragmentation", "context"}


def test_the_peak_is_named() -> None:
    """The estimate says in which phase, module and operator the peak lies."""
    e = estimate()
    assert (e.peak_phase, e.peak_operator) == ("step 2 backward", "aten.mm")
    assert e.peak_module == "layers.5"


def test_a_block_counts_as_what_it_turned_out_to_be() -> None:
    """A block that the trace relabels is counted under its new name."""
    trace = training()
    relabelled = Trace(trace.events, trace.notes, categories={0: "teacher"})
    e = estimate_of(relabelled, gpu=resolve_gpu("T4"), subject=Subject("Made"))
    assert e.breakdown["teacher"] == MIB


def test_phases_and_timeline() -> None:
    """Phases come in the order of the run, and each one's peak is the timeline's within it."""
    e = estimate()
    assert [phase.name for phase in e.phases][:3] == ["weights", "batch", "step 1 forward"]
    assert sum(phase.n_events for phase in e.phases) == len(e.timeline)
    start = 0
    for phase in e.phases:
        moments = e.timeline[start : start + phase.n_events]
        assert {moment.phase for moment in moments} == {phase.name}
        assert max(moment.allocated_bytes for moment in moments) == phase.peak_allocated_bytes
        assert moments[-1].allocated_bytes == phase.end_allocated_bytes
        start += phase.n_events


def test_an_empty_trace_is_an_answer_too() -> None:
    """A step that needs no GPU memory at all is all context."""
    e = estimate_of(Trace([], []), gpu=resolve_gpu("T4"), subject=Subject("Nothing"))
    assert e.peak_process_bytes == e.context_bytes
    assert "nothing was allocated" in str(e)
    assert "0 B" in e._repr_html_()


def test_an_estimate_travels() -> None:
    """Pickled, an estimate says the same in another process; only another trace is out of reach there."""
    e = estimate()
    twin = pickle.loads(pickle.dumps(e))  # noqa: S301  # written in the same line
    assert str(twin) == str(e)
    assert twin.breakdown == e.breakdown
    assert twin.fits("H200")
    with pytest.raises(TypeError):
        twin.breakdown["weights"] = 0
    with pytest.raises(ValueError, match="was pickled or copied"):
        twin.max_batch_size()


# --- text --------------------------------------------------------------------------------------------------


def test_the_line_for_the_log() -> None:
    """One line names the model, the batch, the optimizer, the precision, the teacher and the sizes."""
    line = estimate().summary()
    assert line.startswith("VRAM estimate: Made, batch 8, AdamW, fp32, teacher Taught: ")
    assert "\n" not in line
    assert re.search(r"allocated \d+\.?\d* MiB, reserved \d+\.?\d* MiB, context \d+ MiB; safe bound", line)
    assert repr(estimate()) == f"<VRAMEstimate {line.removeprefix('VRAM estimate: ')}>"


def test_the_table() -> None:
    """The table holds the peaks, the breakdown, every phase and both lists of notes."""
    text = str(estimate())
    for part in ("process at its peak", "reserved", "activations", "together", "step 2 backward"):
        assert part in text
    for part in ("Taken for granted:", "a made-up assumption", "Not modelled:", "a made-up <operator>"):
        assert part in text
    assert max(len(line) for line in text.splitlines()) <= 100


# --- picture -----------------------------------------------------------------------------------------------


class Checker(HTMLParser):
    """Collects tags, and checks that they close."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Remember a tag and what it points to."""
        self.open.append(tag)
        self.seen.add(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Remember a tag that closes itself."""
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        """Close the innermost tag."""
        assert self.open.pop() == tag


def test_the_picture_is_self_contained() -> None:
    """The notebook's picture is well-formed, has no script and no link, and escapes what users named."""
    html = estimate()._repr_html_()
    checker = Checker()
    checker.feed(html)
    assert checker.open == []
    assert {"svg", "polygon", "style", "details"} <= checker.seen
    assert not checker.seen & {"script", "link", "img", "iframe"}
    assert checker.links == []
    assert "url(http" not in html
    assert "&lt;operator&gt;" in html
    assert "<operator>" not in html
    assert "prefers-color-scheme:dark" in html


def test_the_picture_names_what_it_draws() -> None:
    """The legend has each colour of the timeline, also of what is gone by the peak; the peak has its size."""
    notes = [Note("teacher", "", "", "teacher"), Note("weights", "", "", "weights")]
    events = [Event(0, 4 * MIB, 0), Event(0, 0, 0), Event(1, 9 * MIB, 1)]
    e = estimate_of(Trace(events, notes), gpu=resolve_gpu("H200"), subject=Subject("Made"))
    assert "teacher" not in e.breakdown
    assert "<span>teacher</span><span>0 B</span>" in e._repr_html_()
    assert ">9.00 MiB</text>" in e._repr_html_()


def test_a_context_that_nobody_measured_is_said() -> None:
    """Where the context is known by rule only, the list of what is not modelled says so."""
    ruled = estimate(gpu="RTX 3090").unmodelled
    assert "a made-up <operator>" in ruled
    assert any(said.startswith("the context is not measured on this GPU") for said in ruled)
    assert estimate(gpu="H200").unmodelled == ("a made-up <operator>",)


def test_the_picture_stays_small() -> None:
    """However long the run, the picture draws a few hundred points."""
    assert len(points(range(100_000))) == 360
    assert points([1, 5, 2]) == [0, 1, 2]
    many = estimate_of(training(4, n_steps=60), gpu=resolve_gpu("T4"), subject=Subject("Made"))
    assert len(many._repr_html_()) < 100_000


@pytest.mark.parametrize("top", [5000, 3 * MIB, 900 * MIB, 3 * GIB, 141 * GIB])
def test_grid_lines_are_round_and_few(top: int) -> None:
    """An axis gets three to six grid lines, zero among them."""
    assert 2 <= top // nice_step(top) <= 5


def test_the_plot() -> None:
    """The figure has a stack for each line of the breakdown that is tensors, and round ticks."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    axes = estimate().plot()
    legend = axes.get_legend()
    assert legend is not None
    labels = [text.get_text() for text in legend.get_texts()]
    stacked = ["weights", "gradients", "optimizer state", "activations", "batch", "workspaces"]
    assert labels == [*stacked, "reserved"]
    assert estimate().plot(axes) is axes
    matplotlib.pyplot.close(axes.figure)


# --- snapshot ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("expandable", [False, True])
def test_the_snapshot_opens_in_pytorchs_own_viewer(tmp_path: Path, *, expandable: bool) -> None:
    """Every function of `torch.cuda._memory_viz` that needs no network reads the file, and its sums agree."""
    e = estimate_of(
        training(40),
        gpu=resolve_gpu("T4"),
        subject=Subject("Made"),
        settings=AllocatorSettings(expandable_segments=expandable),
    )
    e.save_snapshot(tmp_path / "step.pickle")
    data = pickle.loads((tmp_path / "step.pickle").read_bytes())  # noqa: S301  # written two lines above
    assert f"segments: {len(data['segments'])}" in _memory_viz.segsum(data)
    assert "cudaMalloc" in _memory_viz.trace(data) or expandable
    assert "snapshot.pickle" in _memory_viz.trace_plot(data)
    assert "snapshot.pickle" in _memory_viz.segment_plot(data)
    assert sum(segment["total_size"] for segment in data["segments"]) == e.timeline[-1].reserved_bytes
    assert sum(segment["allocated_size"] for segment in data["segments"]) == e.timeline[-1].allocated_bytes


@pytest.mark.parametrize("allocator", ["expandable_segments:False", "expandable_segments:True"])
@given(batch_size=st.integers(1, 100))
def test_the_snapshots_history_leads_to_what_is_left(allocator: str, batch_size: int) -> None:
    """Replayed as the viewer does, each block lies in memory that is held, and the last ones are listed."""
    settings = AllocatorSettings.parse(allocator)
    e = estimate_of(training(batch_size), gpu=resolve_gpu("T4"), subject=Subject("Made"), settings=settings)
    data = snapshot(e)
    held: set[int] = set()  # pages of 2 MiB, of which every segment is made
    live: dict[int, int] = {}
    for entry in data["device_traces"][0]:
        address, size = entry["addr"], entry["size"]
        pages = set(range(address // (2 * MIB), -(-(address + size) // (2 * MIB))))
        match entry["action"]:
            case "segment_alloc" | "segment_map":
                assert not pages & held
                held |= pages
            case "segment_free" | "segment_unmap":
                assert pages <= held
                held -= pages
            case "alloc":
                assert pages <= held
                assert address not in live
                live[address] = size
            case "free_completed":
                assert live.pop(address) == size
    blocks = [block for segment in data["segments"] for block in segment["blocks"]]
    active = {b["address"]: b["requested_size"] for b in blocks if b["state"] == "active_allocated"}
    assert active == live
    assert len(held) * 2 * MIB == sum(segment["total_size"] for segment in data["segments"])


def test_the_snapshot_says_who_allocated() -> None:
    """The frames of an entry are the operator, the module and the phase."""
    history = snapshot(estimate())["device_traces"][0]
    entry = next(entry for entry in history if entry["frames"][0]["name"] == "aten.addmm")
    assert entry["frames"][0]["filename"] == "layers.0"
    assert entry["frames"][1]["name"] == "step 1 forward"
    assert entry["category"] == "activations"


def test_the_snapshot_is_in_a_format_that_the_viewer_reads(tmp_path: Path) -> None:
    """The viewer in the browser has a reader of pickles of its own, and the file uses nothing else."""
    estimate().save_snapshot(tmp_path / "step.pickle")
    codes = {
        code.name: value for code, value, _ in pickletools.genops((tmp_path / "step.pickle").read_bytes())
    }
    assert codes["PROTO"] == 4
    assert set(codes) <= VIEWERS_CODES


def test_the_viewers_own_category_is_there() -> None:
    """Segments are of the category that the viewer adds to any others, which in some versions it cannot."""
    history = snapshot(estimate())["device_traces"][0]
    kinds = {entry["action"]: entry.get("category") for entry in history}
    assert kinds["segment_alloc"] == "unknown"
    assert kinds["alloc"] in LINES.values()


# What `unpickle` in torch/utils/viz/MemoryViz.js knows; at anything else it ends with "UNKNOWN OPCODE".
VIEWERS_CODES = {
    *("PROTO", "FRAME", "STOP", "MARK", "MEMOIZE", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"),
    *("NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("SHORT_BINUNICODE", "BINUNICODE", "EMPTY_LIST", "APPEND", "APPENDS", "LIST"),
    *("EMPTY_DICT", "SETITEM", "SETITEMS", "DICT", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
}


# --- GPUs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("rtx4090", "RTX 4090"),
        ("RTX 3090 24GB", "RTX 3090"),
        ("NVIDIA GeForce RTX 4060 Ti", "RTX 4060 Ti"),
        ("NVIDIA A100-SXM4-80GB", "A100-80"),
        ("A100-40GB", "A100-40"),
        ("A100", "A100-80"),
        ("Tesla T4", "T4"),
        ("Tesla V100-SXM2-32GB", "V100-32"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        *((name, name) for name in GPU_NAMES),
    ],
)
def test_gpus_are_known_by_their_names(asked: str, found: str) -> None:
    """What CUDA, shops and people call a GPU finds it."""
    assert resolve_gpu(asked).name == found


def test_any_other_gpu_by_its_numbers() -> None:
    """A GPU can be given whole, or as so many bytes."""
    own = GPU("mine", total_bytes=6 * GIB, capability=(7, 5), n_multiprocessors=24)
    assert resolve_gpu(own) is own
    assert resolve_gpu(24 * GIB).total_bytes == 24 * GIB


def test_a_context_that_nobody_measured_widens_the_bound() -> None:
    """Where the context is known only by rule it says so, and the safe bound is the wider for it."""
    measured, ruled = (resolve_gpu(name).context(["aten.mm"]) for name in ("H200", "RTX 3090"))
    assert measured.source.startswith("measured on an H200")
    assert ruled.source.startswith("not measured on this GPU")
    assert ruled.spread_bytes / ruled.expected_bytes > 5 * measured.spread_bytes / measured.expected_bytes


def test_libraries_count_once_they_are_used() -> None:
    """A step without a matrix product does not load cuBLAS, one without convolution or attention no cuDNN."""
    gpu = resolve_gpu("H200")
    bare, blas, dnn = (
        gpu.context(names).expected_bytes
        for names in ([], ["aten.addmm"], ["aten.addmm", "aten.convolution", "aten.relu"])
    )
    assert bare < blas < dnn


def test_a_calibration_is_preferred(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What was measured on the user's own GPU replaces the rule; a broken file does not."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calibration_file().parent.mkdir(parents=True)
    calibration_file().write_text(
        '{"NVIDIA GeForce RTX 3090": {"bare_bytes": 1000, "blas_bytes": 10, "dnn_bytes": 1,'
        ' "spread_bytes": 5, "source": "measured here"}}'
    )
    assert resolve_gpu("RTX 3090").context(["aten.mm"]).expected_bytes == 1010
    calibration_file().write_text('{"NVIDIA GeForce RTX 3090": {"bytes": 3}}')
    assert resolve_gpu("RTX 3090").context([]).source.startswith("not measured")


def test_a_measurement_is_written_where_estimates_look(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two runs become one record: the larger of each stage, and by how much they differ."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    runs = iter([[500 * MIB, 620 * MIB, 640 * MIB], [500 * MIB, 600 * MIB, 640 * MIB]])
    monkeypatch.setattr(calibrate, "_one_run", lambda: next(runs))
    calibrate.write("NVIDIA L4", calibrate.measure())
    calibrate.write("Tesla T4", MeasuredContext(1, 2, 3, 4, "made up"))
    measured = resolve_gpu("L4").measured
    assert measured is not None
    assert (measured.bare_bytes, measured.blas_bytes, measured.dnn_bytes) == (500 * MIB, 120 * MIB, 20 * MIB)
    assert measured.spread_bytes == 20 * MIB
    assert resolve_gpu("T4").context(["aten.mm"]).expected_bytes == 3
